"""iw.backward: every strategy against loops in float64; and what it accepts."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import naive
from oracle.naive_loss import naive_loss
from test_network import SEED, B, ConvNet, Mlp, assert_as_naive, batch, naive_noise_of, naive_step
from torch import nn

import iwsgd_ext as iw
from iwsgd_ext.layers.context import current

S = 7
WAYS = {
    "batched": {"strategy": "batched"},
    "loop": {"strategy": "loop"},
    "streamed-1": {"strategy": "streamed"},
    "streamed-3": {"strategy": "streamed", "chunk": 3},
    "streamed-7": {"strategy": "streamed", "chunk": 7},
}
EXACT = pytest.mark.parametrize("way", WAYS)
ANY = pytest.mark.parametrize("way", [*WAYS, "resampled"])
LOSSES = {
    "cross-entropy": lambda alpha: iw.IWCrossEntropyLoss(2, alpha=alpha),
    "any": lambda alpha: iw.IWLoss(nn.CrossEntropyLoss(reduction="none"), 2, alpha),
}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run(model, criterion, x, target, way="batched", samples=S, seed=SEED, **options):
    model.zero_grad()
    way = WAYS.get(way, {"strategy": way})
    loss = iw.backward(model, criterion, x, target, samples=samples, seed=seed, **way, **options)
    return loss, gradients(model)


@EXACT
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("expand", ["axis", "first", "input", "not converted"])
@pytest.mark.parametrize("network", [Mlp, ConvNet])
def test_loss_and_every_gradient(device, backend, network, expand, loss, way):
    """The model's and the loss's own numbers of samples are other ones: the call's rules."""
    model = iw.convert(network().double().to(device), 2, expand=expand if expand != "not converted" else "first")
    if expand == "not converted":
        del model._iw_conversion
        model._forward_pre_hooks.clear(), model._forward_hooks.clear()
    x, target = batch(model, device)
    assert_as_naive(run(model, LOSSES[loss](1.0), x, target, way), naive_step(model, x, target, S, 1.0))
    assert current() is None


@ANY
@pytest.mark.parametrize("alpha", [0.0, 0.5, math.inf])
def test_alpha(device, way, alpha):
    """With alpha = inf one sample has all weight, so that the resampled gradient is the gradient; and one chunk is enough."""
    model = iw.convert(Mlp().double().to(device), 2, expand="first")
    x, target = batch(model, device)
    want = naive_step(model, x, target, S, alpha)
    for loss in LOSSES.values():
        got = run(model, loss(alpha), x, target, way)
        if way == "resampled" and alpha != math.inf:
            torch.testing.assert_close(got[0].cpu(), want[0])
        else:
            assert_as_naive(got, want)


@ANY
def test_one_sample(device, way):
    """S = 1 is dropout training, in whatever way."""
    model = iw.convert(Mlp().double().to(device), 2, expand="first")
    x, target = batch(model, device)
    strategy = WAYS.get(way, {"strategy": way})["strategy"]
    got = run(model, iw.IWCrossEntropyLoss(2), x, target, strategy, samples=1)
    assert_as_naive(got, naive_step(model, x, target, 1, 1.0))


@ANY
def test_eval_mode_is_one_pass_without_noise(device, way):
    model = iw.convert(Mlp().double().to(device), 2, expand="first").eval()
    x, target = batch(model, device)
    plain = F.cross_entropy(model(x), target)
    want = torch.autograd.grad(plain, list(model.parameters()))
    for loss in LOSSES.values():
        got, got_gradients = run(model, loss(0.5), x, target, way)
        torch.testing.assert_close(got, plain.detach())
        torch.testing.assert_close(list(got_gradients.values()), list(want))


@EXACT
def test_seed_from_torch(device, way):
    """One draw from torch's default generator, whatever the strategy: the same noise, and the same random numbers after it."""
    model = iw.convert(Mlp().double().to(device), 2, expand="first")
    x, target = batch(model, device)
    results = []
    for other in ("batched", way):
        torch.manual_seed(5)
        loss, got = run(model, iw.IWCrossEntropyLoss(2), x, target, other, seed=None)
        results.append((loss, got, torch.rand(3, device=device)))
    torch.manual_seed(5)
    with iw.sampling(S):
        context = iw.iw_cross_entropy(model(x), target, S)
    torch.testing.assert_close(results[0][0], context.detach())
    torch.testing.assert_close(*results)
    assert run(model, iw.IWCrossEntropyLoss(2), x, target, way, seed=None)[0] != results[1][0]


@EXACT
def test_first_example(device, way):
    """Micro-batches draw what the whole batch does, and with a common normaliser add up to its gradient; seeds as tensors too."""
    model = iw.convert(Mlp().double().to(device), 2, expand="first")
    x, target = batch(model, device)
    loss, criterion = 0, iw.IWCrossEntropyLoss(2)
    model.zero_grad()
    for rows, first in ((slice(0, 2), 0), (slice(2, B), torch.tensor([2], device=device))):
        targets = {"target": target[rows], "normalizer": B}
        seed = torch.tensor(SEED, device=device)
        loss = loss + iw.backward(model, criterion, x[rows], targets, samples=S, **WAYS[way], seed=seed, first_example=first)
    assert_as_naive((loss, gradients(model)), naive_step(model, x, target, S, 1.0))


@ANY
def test_accumulates(device, way):
    """Added to what .grad holds, which stays the same tensor."""
    model = iw.convert(Mlp().double().to(device), 2, expand="first")
    x, target = batch(model, device)
    _, once = run(model, iw.IWCrossEntropyLoss(2), x, target, way)
    for p in model.parameters():
        p.grad.fill_(3.0)
    held = [p.grad for p in model.parameters()]
    iw.backward(model, iw.IWCrossEntropyLoss(2), x, target, samples=S, seed=SEED, **WAYS.get(way, {"strategy": way}))
    for p, grad, (name, want) in zip(model.parameters(), held, once.items(), strict=True):
        assert p.grad is grad, name
        torch.testing.assert_close(p.grad, want + 3.0)


@ANY
@pytest.mark.parametrize("loss", LOSSES)
def test_grad_scale(device, way, loss):
    """A number, a tensor or a GradScaler multiplies the gradients and not the loss; inputs' gradients too."""
    model = iw.convert(Mlp().double().to(device), 2, expand="first")
    x, target = batch(model, device)
    x.requires_grad_()
    want_loss, want = run(model, LOSSES[loss](1.0), x, target, way)
    want_x, x.grad = x.grad, None
    scaler = torch.amp.GradScaler(device.type, init_scale=512.0)
    for scale in (512.0, torch.tensor(512.0), torch.tensor([512.0], device=device), scaler):
        got_loss, got = run(model, LOSSES[loss](1.0), x, target, way, grad_scale=scale)
        torch.testing.assert_close(got_loss, want_loss)
        torch.testing.assert_close(got, {name: 512 * g for name, g in want.items()})
        torch.testing.assert_close(x.grad, 512 * want_x)
        x.grad = None


def test_grad_scaler_steps(device):
    """The whole routine: a finite step is taken, with gradients unscaled; an infinite one is skipped, with streamed too."""
    model = iw.convert(Mlp().to(device), 2, expand="first")
    x, target = batch(model, device, torch.float32)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1.0), torch.amp.GradScaler(device.type, init_scale=1024.0)
    before = [p.detach().clone() for p in model.parameters()]
    _, want = run(model, iw.IWCrossEntropyLoss(2), x, target)
    for loss in LOSSES.values():  # a scale of another type leaves the gradients' type alone
        _, doubled = run(model, loss(1.0), x, target, grad_scale=torch.tensor([2.0], dtype=torch.float64, device=device))
        torch.testing.assert_close(doubled, {name: 2 * g for name, g in want.items()})
    run(model, iw.IWCrossEntropyLoss(2), x, target, "streamed", grad_scale=scaler)
    scaler.step(optimizer)
    scaler.update()
    for p, old, g in zip(model.parameters(), before, want.values(), strict=True):
        torch.testing.assert_close(p.detach(), old - g)
    after = [p.detach().clone() for p in model.parameters()]
    for way in ("streamed", "resampled"):
        run(model, iw.IWCrossEntropyLoss(2), x * math.inf, target, way, grad_scale=scaler)
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), after, strict=True))
    assert scaler.get_scale() == 256.0


@ANY
def test_autocast(device, way):
    """Casts of weights that autocast keeps from a pass without graph would leave the weights without gradients."""
    model = iw.convert(Mlp().to(device), 2, expand="first")
    x, target = batch(model, device, torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        loss, got = run(model, iw.IWCrossEntropyLoss(2, alpha=math.inf), x, target, way)
        assert model[0](x).dtype == torch.bfloat16
    assert loss.dtype == torch.float32 and got.keys() == dict(model.named_parameters()).keys()
    true_loss, truth = naive_step(model, x, target, S, math.inf)
    torch.testing.assert_close(loss.cpu().double(), true_loss, rtol=0.03, atol=0.0)
    for name, want in truth.items():
        assert (got[name].cpu() - want).norm() <= 0.05 * want.norm(), name  # 5 roundings of bfloat16, 2^-9 each, and cancellation


@ANY
def test_frozen_parameters(device, way):
    model = iw.convert(Mlp().double().to(device), 2, expand="first")
    x, target = batch(model, device)
    for p in model[0].parameters():
        p.requires_grad_(False)
    loss, got = run(model, iw.IWCrossEntropyLoss(2, alpha=math.inf), x, target, way)
    want_loss, want = naive_step(model, x, target, S, math.inf)
    assert_as_naive((loss, got), (want_loss, {name: g for name, g in want.items() if not name.startswith("0.")}))


class Branches(nn.Module):
    """Two inputs, each with noise of its own; one is needed by name."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(6, 8), nn.Linear(4, 8), iw.IWDropout(0.5)

    def forward(self, x, other, scale=1.0):
        return self.drop(torch.tanh(self.a(x))) + scale * self.drop(torch.tanh(self.b(other)))


@EXACT
@pytest.mark.parametrize("form", ["tuple", "list", "dict"])
def test_several_inputs_and_outside_graphs(device, way, form):
    """Inputs and targets as tuple, list or dict; those that need a gradient get it, leaves and results of other graphs alike."""
    model = Branches().double().to(device)
    x, raw = torch.randn(B, 6, dtype=torch.float64, device=device), torch.randn(B, 4, dtype=torch.float64, device=device)
    mean, spread = torch.randn(B, 8, dtype=torch.float64, device=device), torch.ones(B, 8, dtype=torch.float64, device=device)
    leaves = [x.requires_grad_(), raw.requires_grad_(), spread.requires_grad_(), *model.parameters()]
    seen = []
    other, var = torch.sin(raw), spread.exp()
    other.register_hook(seen.append)
    inputs = {"tuple": (x, other, 2.0), "list": [x, other, 2.0], "dict": {"other": other, "scale": 2.0, "x": x}}[form]
    targets = {"tuple": (mean, var), "list": [mean, var], "dict": {"var": var, "target": mean}}[form]
    criterion = iw.IWLoss(nn.GaussianNLLLoss(reduction="none"), 2)
    loss = iw.backward(model, criterion, inputs, targets, samples=S, seed=SEED, **WAYS[way])
    got = [v.grad for v in leaves]
    assert len(seen) == 1  # the graph outside is gone through once

    log_p = []
    for s in range(S):
        log_p.append([])
        for b in range(B):
            noise = naive_noise_of(s, b, False)
            h = noise(torch.tanh(model.a(x[b])).cpu(), 0.5) + 2 * noise(torch.tanh(model.b(torch.sin(raw[b]))).cpu(), 0.5)
            log_p[s].append(-F.gaussian_nll_loss(h, mean[b].cpu(), spread[b].exp().cpu(), reduction="sum"))
    want = naive.naive_loss(log_p)
    torch.testing.assert_close(loss.cpu(), want.detach())
    torch.testing.assert_close(got, list(torch.autograd.grad(want, leaves)))


@EXACT
def test_trunk_outside(device, way):
    """A trunk before all noise, called once by the user: its graph is gone through once, after the last pass."""
    model = Mlp().double().to(device)
    x, target = batch(model, device)
    layers, calls = list(model), []
    trunk, head = nn.Sequential(*layers[:2]), iw.convert(nn.Sequential(*layers[2:]), 2, expand="first")
    trunk.register_forward_hook(lambda *_: calls.append("forward"))
    trunk.register_full_backward_hook(lambda *_: calls.append("backward"))
    loss, _ = run(head, iw.IWCrossEntropyLoss(2), trunk(x.requires_grad_()), target, way)
    assert calls == ["forward", "backward"]
    assert_as_naive((loss, gradients(model)), naive_step(model, x, target, S, 1.0))


@EXACT
def test_return_stats(device, way):
    model = iw.convert(ConvNet().double().to(device), 2, expand="first")
    x, target = batch(model, device)
    loss, stats = iw.backward(model, iw.IWCrossEntropyLoss(2), x, target, samples=S, seed=SEED, return_stats=True, **WAYS[way])
    with iw.sampling(S, seed=SEED):
        want_loss, want = iw.iw_cross_entropy(model(x), target, S, return_stats=True)
    torch.testing.assert_close((loss, *stats), (want_loss.detach(), *want))
    assert not any(v.requires_grad for v in (loss, *stats))


@EXACT
@pytest.mark.parametrize("level", ["example", "position"])
def test_positions(device, way, level):
    """Dense prediction with ignored positions, class weights and smoothing: loss, statistics and gradients as autograd has them."""
    model = iw.convert(nn.Sequential(nn.Conv1d(3, 8, 3), nn.Tanh(), nn.Dropout(0.5), nn.Conv1d(8, 4, 1)).double().to(device), 2)
    x, target = torch.randn(B, 3, 8, dtype=torch.float64, device=device), torch.randint(4, (B, 6), device=device)
    target[0], target[1, 3:] = -100, -100
    options = {"weight": torch.rand(4, dtype=torch.float64, device=device), "label_smoothing": 0.1, "level": level}
    criterion = iw.IWCrossEntropyLoss(2, **options)
    per_position = torch.rand(B, 6, dtype=torch.float64, device=device)
    targets = {"target": target, "example_weight": per_position}
    loss, stats = iw.backward(model, criterion, x, targets, samples=S, seed=SEED, return_stats=True, **WAYS[way])
    got = list(gradients(model).values())
    with iw.sampling(S, seed=SEED):
        logits = model(x)
    want = naive_loss(logits, target, S, **options, example_weight=per_position)
    torch.testing.assert_close(loss.cpu(), want.loss)
    counted = (target != -100).any(1).cpu() if level == "example" else (target != -100).cpu()
    torch.testing.assert_close(stats.bound.cpu()[counted], want.bound[counted])
    torch.testing.assert_close(stats.weights.cpu(), want.weights)
    torch.testing.assert_close(got, list(torch.autograd.grad(logits, list(model.parameters()), want.dlogits.to(device))))


class Likelihood:
    """A loss of a user: outputs that are no tensor, a number for denominator, units with weights of their own."""

    def log_likelihood(self, outputs, targets, samples):
        log_p = -(outputs["y"].view(samples, len(targets["mean"]), -1) - targets["mean"]).square().sum(-1)
        return log_p, targets["weight"], 4


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(6, 8), iw.IWDropout(0.5)

    def forward(self, batch):
        return {"y": self.drop(self.linear(batch["x"]))}


@EXACT
def test_a_loss_of_ones_own(device, way):
    model = Named().double().to(device)
    x = torch.randn(B, 6, dtype=torch.float64, device=device)
    targets = {"mean": torch.randn(B, 8, dtype=torch.float64, device=device), "weight": torch.rand(B, dtype=torch.float64, device=device)}
    loss = iw.backward(model, Likelihood(), ({"x": x},), targets, samples=S, seed=SEED, **WAYS[way])
    want = 0
    for b in range(B):
        l = [-(naive_noise_of(s, b, False)(model.linear(x[b]).cpu(), 0.5) - targets["mean"][b].cpu()).square().sum() for s in range(S)]
        want = want - targets["weight"][b].cpu() * naive.naive_bound(l, 1.0) / 4
    torch.testing.assert_close(loss.cpu(), want.detach())
    torch.testing.assert_close([p.grad for p in model.parameters()], list(torch.autograd.grad(want, list(model.parameters()))))


@EXACT
def test_nothing_counts(device, way):
    """A denominator of 0: loss 0, gradients 0 that are there."""
    model = iw.convert(Mlp().double().to(device), 2, expand="first")
    x, target = batch(model, device)
    loss, got = run(model, iw.IWCrossEntropyLoss(2), x, torch.full_like(target, -100), way)
    assert loss == 0 and got.keys() == dict(model.named_parameters()).keys() and not any(g.any() for g in got.values())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["streamed-3", "resampled"])
def test_compiled(device, way):
    """A compiled model: the same loss and gradients."""
    torch._dynamo.reset()
    model = iw.convert(Mlp().double().to(device), 2, expand="first")
    x, target = batch(model, device)
    want = run(model, iw.IWCrossEntropyLoss(2), x, target, way)
    model.compile(backend="eager")
    assert_as_naive(run(model, iw.IWCrossEntropyLoss(2), x, target, way), want)
