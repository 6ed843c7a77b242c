"""strategy="resampled": which samples are drawn, that the gradient's expectation is the gradient; and memory of the strategies."""

import itertools
import math

import pytest
import torch
from oracle import naive
from test_network import SEED, B, ConvNet, Mlp, assert_as_naive, batch, naive_noise_of, naive_step
from torch import nn

import iwsgd_ext as iw
from bench.strategies import memory, network
from iwsgd_ext.training.strategies import _Step

LAST_STREAM = 2**32 - 1


def backward(model, x, target, samples, seed=SEED, criterion=None, **options):
    model.zero_grad()
    loss = iw.backward(model, criterion or iw.IWCrossEntropyLoss(2), x, target, samples=samples, seed=seed, **options)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}


def step_of(device, samples, seed=SEED, first_example=None):
    x = torch.zeros(1, device=device)
    return _Step(nn.Identity(), iw.IWCrossEntropyLoss(2), x, x, samples, "resampled", seed, first_example, None)


def naive_drawn(weights, keep, seed=SEED, first_example=0):
    """The first sample whose cumulative weight exceeds a number of 32 binary digits: fair coins of the last stream."""
    drawn = []
    for j in range(keep):
        drawn.append([])
        for b, w in enumerate(weights.double().T.tolist()):
            coins = naive.naive_mask(seed, LAST_STREAM, j, first_example + b, 32, 0.5)
            u = sum(0.5 ** (i + 1) for i, coin in enumerate(coins) if coin)
            total = list(itertools.accumulate(w))
            drawn[j].append(next(s for s, c in enumerate(total) if c > u * total[-1]))
    return torch.tensor(drawn)


@pytest.mark.parametrize(("samples", "keep"), [(1, 2), (2, 1), (8, 1), (5, 63)], ids=str)
def test_draws_by_the_definition(device, backend, samples, keep):
    """The same on every backend, by the example's id; keep may exceed S."""
    weights = torch.softmax(3 * torch.randn(samples, 35, device=device), 0)
    for first in (0, 1000):
        got = step_of(device, samples, first_example=first).drawn(weights, keep)
        assert torch.equal(got.cpu(), naive_drawn(weights.cpu(), keep, first_example=first))


def test_draws_follow_the_weights(device, backend):
    """Counts of 8 samples over 100000 examples, and of pairs of two draws: chi-square, false alarm below 1e-6 each; weight 0 is never
    drawn."""
    weights = torch.tensor([0.0, 0.3, 0.02, 0.0, 0.4, 0.1, 0.18, 0.0], device=device)
    n = 100000
    drawn = step_of(device, 8).drawn(weights[:, None].expand(8, n), 2).cpu()
    w = weights.cpu().double()
    for j in range(2):
        counts = torch.bincount(drawn[j], minlength=8).double()
        assert not counts[w == 0].any()
        chi = ((counts - n * w).square() / (n * w))[w > 0].sum()
        assert chi < 35.9  # 4 degrees of freedom
    pairs = torch.bincount(8 * drawn[0] + drawn[1], minlength=64).double().view(8, 8)
    expected = n * w[:, None] * w
    assert ((pairs - expected).square() / expected)[expected > 0].sum() < 73.0  # 24 degrees of freedom


@pytest.mark.parametrize("loss", ["cross-entropy", "any"])
@pytest.mark.parametrize("keep", [1, 2])
def test_expectation(device, monkeypatch, keep, loss):
    """Every outcome of the draw with its probability: their mean is the gradient, exactly."""
    samples, examples = 3, 2
    model = iw.convert(Mlp().double().to(device), 2, expand="first")
    x, target = (v[:examples] for v in batch(model, device))
    with iw.sampling(samples, seed=SEED):
        w = torch.softmax(torch.log_softmax(model(x), 1).view(samples, examples, -1)[:, range(examples), target], 0).cpu().detach()
    criterion = iw.IWCrossEntropyLoss(2) if loss == "cross-entropy" else iw.IWLoss(nn.CrossEntropyLoss(reduction="none"), 2)
    mean, probability = None, 0.0
    for outcome in itertools.product(range(samples), repeat=keep * examples):
        ids = torch.tensor(outcome, device=device).view(keep, examples)
        monkeypatch.setattr(_Step, "drawn", lambda self, weights, keep, ids=ids: ids)
        value, gradients = backward(model, x, target, samples, criterion=criterion, strategy="resampled", keep=keep)
        p = math.prod(float(w[s, b]) for s, b in zip(outcome, itertools.cycle(range(examples)), strict=False))
        probability += p
        mean = {name: p * g + (mean[name] if mean else 0) for name, g in gradients.items()}
    assert abs(probability - 1) < 1e-12
    assert_as_naive((value, mean), naive_step(model, x, target, samples, 1.0))


@pytest.mark.parametrize("keep", [1, 3])
def test_unbiased_over_draws(device, keep):
    """Paired with the batched gradient of the same seed, over 200 seeds: the mean difference along 4 directions lies within 5 standard
    errors (false alarm below 1e-5), and the differences are not zero."""
    model = iw.convert(Mlp().double().to(device), 4, expand="first")
    x, target = batch(model, device)
    x = 3 * x  # unequal weights
    directions = [torch.randn(4, *p.shape, dtype=torch.float64, device=device) for p in model.parameters()]
    differences = []
    for seed in range(200):
        (loss, got), (want_loss, want) = (
            backward(model, x, target, 4, seed=seed, **o) for o in ({"strategy": "resampled", "keep": keep}, {"strategy": "batched"})
        )
        torch.testing.assert_close(loss, want_loss)
        differences.append(sum((d * (got[n] - want[n])).flatten(1).sum(1) for d, n in zip(directions, got, strict=True)))
    differences = torch.stack(differences)
    error = differences.std(0) / math.sqrt(len(differences))
    assert (differences.mean(0).abs() < 5 * error).all()
    assert (differences.std(0) > 1e-3).all()


@pytest.mark.parametrize(("expand", "chunk"), [("first", None), ("first", 1), ("input", 3)])
def test_keeps_whole_samples(device, backend, expand, chunk):
    """The gradient is that of the drawn samples in every layer: [s][b] alone, by the naive noise, whatever the first pass' chunks."""
    samples, keep = 5, 2
    model = iw.convert(ConvNet().double().to(device), 2, expand=expand)
    x, target = batch(model, device)
    got = backward(model, x, target, samples, strategy="resampled", keep=keep, chunk=chunk)
    assert_as_naive((got[0], {}), (naive_step(model, x, target, samples, 1.0)[0], {}))
    w = {name: p.detach().cpu().requires_grad_() for name, p in model.named_parameters()}
    log_p = torch.tensor([[likelihood(model, w, x[b].cpu(), target[b], s, b).item() for b in range(B)] for s in range(samples)])
    drawn = naive_drawn(torch.softmax(log_p.double(), 0), keep)
    assert len(set(drawn.flatten().tolist())) > 1
    loss = -sum(likelihood(model, w, x[b].cpu(), target[b], int(drawn[j, b]), b) for j in range(keep) for b in range(B)) / (keep * B)
    torch.testing.assert_close(
        {k: v.cpu() for k, v in got[1].items()}, dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))
    )


def likelihood(model, w, x, target, s, b):
    return torch.log_softmax(model.naive(w, x, naive_noise_of(s, b, False)), 0)[target]


@pytest.mark.parametrize("strategy", ["batched", "loop", "streamed", "resampled"])
def test_nan_is_seen(device, strategy):
    """One NaN among an example's log-likelihoods is in the gradient, whichever sample is drawn; else a scaler would take the step."""

    class Loss(iw.IWLoss):
        calls = 0

        def log_likelihood(self, outputs, targets, samples):
            log_p, *others = super().log_likelihood(outputs, targets, samples)
            Loss.calls += 1
            if samples == 4 or (samples == 1 and Loss.calls == 2 and strategy != "resampled"):
                log_p = log_p.index_fill(0, torch.tensor([samples // 2], device=device), math.nan)
            return log_p, *others

    model = iw.convert(Mlp().double().to(device), 2, expand="first")
    x, target = batch(model, device)
    loss, gradients = backward(model, x, target, 4, strategy=strategy, criterion=Loss(nn.CrossEntropyLoss(reduction="none"), 4))
    assert loss.isnan() and all(g.isnan().any() for g in gradients.values())


def test_memory():
    """What graphs hold at one time: streamed under 64 samples at most 1.15 times one sample, chunks of 4 four times; batched 64 times."""
    model = iw.convert(network(width=32, depth=3), 8, expand="first")
    x, y = torch.randn(16, 32), torch.randint(10, (16,))
    held = memory(model, x, y)
    assert held["one sample"] > 16 * 32 * 4 * 3  # three layers' inputs at least
    assert held["streamed"] <= 1.15 * held["one sample"]
    assert held["resampled"] <= 1.15 * held["one sample"]
    assert held["batched"] > 50 * held["one sample"] and held["loop"] > 50 * held["one sample"]


@pytest.mark.parametrize("meets", [lambda h: h - h.mean(0), lambda h: h - 2 * h.flip(0)], ids=["mean", "neighbour"])
def test_rows_that_look_at_one_another_are_refused(meets):
    """An example's neighbours keep other samples than its own, so the estimate would be biased."""

    class Meeting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.drop, self.b = nn.Linear(6, 12), nn.Dropout(0.5), nn.Linear(12, 3)

        def forward(self, x):
            return self.b(meets(self.drop(self.a(x))).tanh())

    x, target = torch.randn(8, 6), torch.randint(3, (8,))
    model = iw.convert(Meeting(), 4, example_inputs=x)
    with pytest.raises(ValueError, match="treats each row by itself"):
        backward(model, x, target, 4, criterion=iw.IWCrossEntropyLoss(4), strategy="resampled")
    backward(model, x, target, 4, criterion=iw.IWCrossEntropyLoss(4), strategy="streamed")
