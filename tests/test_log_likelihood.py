"""log_likelihood of the losses: what they are made of, against the loop of naive_loss.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracle.naive_loss import bound_of, naive_loss
from torch import nn

import iwsgd_ext as iw

S, B, C = 3, 5, 7


def case(spatial=(), probabilities=False, dtype=torch.float64, device="cpu"):
    logits = 2 * torch.randn(S * B, C, *spatial, dtype=dtype, device=device)
    if probabilities:
        return logits, torch.rand(B, C, *spatial, dtype=dtype, device=device).softmax(1)
    target = torch.randint(C, (B, *spatial), device=device)
    target[1] = -100
    if spatial:
        target[2].view(-1)[::2] = -100
    return logits, target


OPTIONS = {
    "plain": ({}, {}),
    "alpha": ({"alpha": 0.5}, {}),
    "mean-of-samples": ({"alpha": 0.0}, {}),
    "best": ({"alpha": math.inf}, {}),
    "weight": ({"weight": torch.rand(C, dtype=torch.float64)}, {}),
    "weight-with-zeros": ({"weight": torch.tensor([0, 1, 0, 2, 3, 0, 0.5], dtype=torch.float64)}, {}),
    "smoothing": ({"label_smoothing": 0.2, "weight": torch.rand(C, dtype=torch.float64)}, {}),
    "sum": ({"reduction": "sum"}, {}),
    "normalizer": ({}, {"normalizer": 11.5}),
    "normalizer-tensor": ({}, {"normalizer": torch.tensor([11.5])}),
    "example-weight": ({"weight": torch.rand(C, dtype=torch.float64)}, {"example_weight": "example"}),
    "position-weight": ({"weight": torch.rand(C, dtype=torch.float64), "label_smoothing": 0.1}, {"example_weight": "position"}),
}


@pytest.mark.parametrize("probabilities", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("level", ["example", "position"])
@pytest.mark.parametrize("spatial", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_loss_comes_of_it(backend, device, options, spatial, level, probabilities):
    """Log-likelihoods, and from them, outer weight and denominator the loss and its gradient."""
    options, named = OPTIONS[options]
    logits, target = case(spatial, probabilities, device=device)
    if "weight" in options:
        options = {**options, "weight": options["weight"].to(device)}
    if "example_weight" in named:
        shape = (B, *spatial) if named["example_weight"] == "position" else (B,)
        named = {**named, "example_weight": torch.rand(shape, dtype=torch.float64, device=device)}
    want = naive_loss(logits, target, S, **options, **named, level=level)
    logits.requires_grad_()
    criterion = iw.IWCrossEntropyLoss(99, **options, level=level)
    log_p, outer, denominator = criterion.log_likelihood(logits, {"target": target, **named} if named else target, S)
    assert log_p.shape == (S, want.bound.numel()) and outer.shape == log_p.shape[1:] and denominator.shape == ()
    counts = outer.cpu() > 0  # elsewhere a log-likelihood has no part in the loss
    torch.testing.assert_close(log_p.cpu().flatten(1)[:, counts], want.log_p.flatten(1)[:, counts], rtol=1e-12, atol=1e-12)
    loss = -(outer * iw.iw_logmeanexp(log_p, S, criterion.alpha)).sum() / denominator
    torch.testing.assert_close(loss.cpu(), want.loss, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient.cpu(), want.dlogits, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("level", ["example", "position"])
def test_derivative(backend, device, level):
    """Of each log-likelihood alone, by differences."""
    logits, target = case((2,), device=device)
    criterion = iw.IWCrossEntropyLoss(S, weight=torch.rand(C, dtype=torch.float64, device=device), label_smoothing=0.1, level=level)
    assert torch.autograd.gradcheck(lambda x: criterion.log_likelihood(x, target, S)[0], logits.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(backend, device, dtype):
    """Log-likelihoods are float32, within its rounding of the logits' own truth; float16 gradients keep a large loss scale."""
    logits, target = case(dtype=dtype, device=device)
    logits.requires_grad_()
    log_p, outer, denominator = iw.IWCrossEntropyLoss(S).log_likelihood(logits, target, S)
    want = naive_loss(logits, target, S)
    assert log_p.dtype == outer.dtype == denominator.dtype == torch.float32
    torch.testing.assert_close(log_p.cpu().double()[:, outer.cpu() > 0], want.log_p[:, outer.cpu() > 0], rtol=1e-6, atol=1e-6)
    loss = -(outer * iw.iw_logmeanexp(log_p, S)).sum() / denominator * 2.0**-10
    (gradient,) = torch.autograd.grad(loss, logits, torch.tensor(2.0**10, device=device))
    torch.testing.assert_close(gradient.cpu().double(), want.dlogits, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_empty_and_ignored(backend, device):
    target = torch.full((B,), -100, device=device)
    logits = torch.randn(S * B, C, device=device, requires_grad=True)
    log_p, outer, denominator = iw.IWCrossEntropyLoss(S).log_likelihood(logits, target, S)
    assert not log_p.any() and not outer.any() and denominator == 0
    assert not torch.autograd.grad(log_p.sum(), logits)[0].any()
    for level in ("example", "position"):
        criterion = iw.IWCrossEntropyLoss(S, level=level)
        targets = {"target": target[:0, None], "example_weight": torch.ones(0, device=device)}
        log_p, outer, denominator = criterion.log_likelihood(logits[:0, :, None], targets, S)
        assert log_p.shape == (S, 0) and outer.shape == (0,) and denominator == 0


def test_iw_loss_by_name(device):
    """Targets by position and by name, repeated alike; the variance of a Gaussian gets its gradient."""
    output = torch.randn(S * B, 4, device=device, dtype=torch.float64)
    mean, var = torch.randn(B, 4, device=device, dtype=torch.float64), 0.5 + torch.rand(B, 4, device=device, dtype=torch.float64)
    var.requires_grad_()
    criterion = iw.IWLoss(nn.GaussianNLLLoss(reduction="none"), 99)
    log_p, outer, denominator = criterion.log_likelihood(output, (mean, var), S)
    by_name = criterion.log_likelihood(output, {"target": mean, "var": var}, S)
    for got, want in zip(by_name, (log_p, outer, denominator), strict=True):
        assert torch.equal(got, want)
    for b in range(B):
        l = [-nn.functional.gaussian_nll_loss(output[s * B + b], mean[b], var[b], reduction="sum") for s in range(S)]
        torch.testing.assert_close(log_p[:, b], torch.stack(l))
        got = torch.autograd.grad(iw.iw_logmeanexp(log_p, S)[b], var, retain_graph=True)[0][b]
        torch.testing.assert_close(got, torch.autograd.grad(bound_of(l, 1.0), var)[0][b])
    assert outer.tolist() == [1.0] * B and denominator == B


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (ValueError, lambda c, x, y: c.log_likelihood(x, y, 2), "logits: expected 2 samples"),
        (ValueError, lambda c, x, y: c.log_likelihood(x, {"target": y, "normalizer": 2.0}, S), "normalizer: expected None"),
        (TypeError, lambda c, x, y: c.log_likelihood(x, {"target": y, "weights": 2.0}, S), "weights"),
        (TypeError, lambda c, x, y: c.log_likelihood(x, (y, y), S), "positional"),
    ],
    ids=["samples", "normalizer", "name", "tuple"],
)
def test_refuses(error, call, message):
    logits, target = case()
    with pytest.raises(error, match=message):
        call(iw.IWCrossEntropyLoss(S, reduction="sum"), logits, target)


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf], ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"ignore_index": 0}], ids=str)
def test_logits_that_are_not_finite_and_weigh_nothing(device, backend, options, bad):
    """One sample is cross-entropy: NaN where torch's is, which a weight of 0 does not hide, and an ignored label does."""
    logits, target = torch.randn(4, 5, device=device, dtype=torch.float64), torch.tensor([0, 1, 2, 3], device=device)
    weight = torch.tensor([0.0, 1, 2, 1, 3], device=device, dtype=torch.float64)
    logits[0, 0] = bad
    criterion = iw.IWCrossEntropyLoss(1, weight=weight, **options)
    log_p, outer, denominator = criterion.log_likelihood(logits, target, 1)
    want = F.cross_entropy(logits, target, weight=weight, **options)
    torch.testing.assert_close(-(outer * log_p[0]).sum() / denominator, want, equal_nan=True)
    assert want.isnan() == ("ignore_index" not in options)
