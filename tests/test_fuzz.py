"""Random shapes, dtypes, layouts and options of the loss against the float64 loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle.naive_loss import assert_equals_naive, result_of

import iwsgd_ext as iw

LAYOUTS = {
    "contiguous": lambda x: x,
    "class-last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "rows-innermost": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "columns": lambda x: torch.cat([x[:, :1], x, x[:, :1]], 1)[:, 1:-1],
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "every-second-row": lambda x: x.repeat_interleave(2, 0)[::2],
    "flipped-strides": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
    "expanded": lambda x: x[:1].expand(x.shape),
}


@st.composite
def problems(draw):
    """A size of at most some 2,000 rows times classes, so that the loop takes milliseconds, and everything else at random."""
    samples, batch = draw(st.integers(1, 9)), draw(st.integers(0, 37))
    positions = tuple(draw(st.lists(st.integers(1, 5), max_size=2))) if batch < 10 else ()
    classes = (
        draw(st.one_of(st.integers(1, 20), st.sampled_from([31, 63, 64, 65, 100, 129, 257])))
        if samples * batch < 60
        else draw(st.integers(1, 20))
    )
    return {
        "size": (samples, batch, classes, positions),
        "dtype": draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])),
        "layout": draw(st.sampled_from(sorted(LAYOUTS))),
        "scale": draw(st.sampled_from([0.0, 0.1, 1.0, 5.0, 50.0])),
        "probabilities": draw(st.booleans()),
        "ignored": draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
        "ignore_index": draw(st.sampled_from([-100, -1, 0, classes - 1])),
        "class_weight": draw(st.booleans()),
        "example_weight": draw(st.sampled_from([None, "example", "position"])),
        "normalizer": draw(st.sampled_from([None, None, 3, 0.5])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "level": draw(st.sampled_from(["example", "position"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        "alpha": draw(st.sampled_from([1.0, 1.0, 0.0, 0.3, 2.0, math.inf])),
        "upstream": draw(st.sampled_from(["one", "number", "each"])),
        "seed": draw(st.integers(0, 2**31)),
    }


def make(problem, device):
    """logits, target, samples and options of a drawn problem."""
    torch.manual_seed(problem["seed"])
    samples, batch, classes, positions = problem["size"]
    logits = (problem["scale"] * torch.randn(samples * batch, classes, *positions)).to(problem["dtype"]).to(device)
    options = {name: problem[name] for name in ("ignore_index", "reduction", "level", "label_smoothing", "alpha")}
    if problem["probabilities"]:
        target = torch.softmax(torch.randn(batch, classes, *positions), 1)
        options["ignore_index"] = -100
    else:
        target = torch.randint(classes, (batch, *positions))
        target[torch.rand(target.shape) < problem["ignored"]] = problem["ignore_index"]
    if problem["class_weight"]:
        options["weight"] = torch.rand(classes, device=device)
    if problem["example_weight"] is not None:
        options["example_weight"] = torch.rand(batch, *(positions if problem["example_weight"] == "position" else ()), device=device)
    if problem["normalizer"] is not None and problem["reduction"] == "mean":
        options["normalizer"] = problem["normalizer"]
    each = () if problem["reduction"] != "none" else (batch, *positions) if problem["level"] == "position" else (batch,)
    options["upstream"] = (
        {"one": torch.ones(()), "number": torch.tensor(-2.5), "each": torch.randn(each)}[problem["upstream"]].expand(each).to(device)
    )
    logits = LAYOUTS[problem["layout"]](logits) if logits.numel() else logits
    return logits, target.to(device), samples, options


@pytest.mark.slow
@settings(max_examples=150)
@given(problem=problems())
def test_loss(backend, device, problem):
    logits, target, samples, options = make(problem, device)
    before = logits.clone()
    got = result_of(iw.iw_cross_entropy, logits, target, samples, **options)
    assert_equals_naive(got, logits, target, samples, **options)
    assert torch.equal(logits, before)
    torch.testing.assert_close(got.weights.sum(0), torch.ones_like(got.bound))


@settings(max_examples=50)
@given(problem=problems())
def test_inplace_is_the_same(backend, device, problem):
    """The bits of the call that keeps the logits, where it is not refused; on every layout."""
    logits, target, samples, options = make(problem, device)
    upstream = options.pop("upstream")
    if problem["layout"] == "expanded":
        logits = logits.contiguous()
    kept, overwritten = (logits.detach().requires_grad_() for _ in range(2))
    loss = iw.iw_cross_entropy(kept, target, samples, **options)
    (expected,) = torch.autograd.grad(loss, kept, upstream)
    work = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=device)
    work = work.copy_(logits) + 0 * overwritten if not logits.numel() else WithGradient.apply(overwritten, work.copy_(logits))
    try:
        loss_inplace = iw.iw_cross_entropy(work, target, samples, **options, inplace=True)
    except ValueError as error:
        assert "adjacent in memory" in str(error) and len(problem["size"][3]) > 1
        return
    (got,) = torch.autograd.grad(loss_inplace, overwritten, upstream)
    torch.testing.assert_close(loss_inplace, loss, rtol=0, atol=0)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


class WithGradient(torch.autograd.Function):
    """A tensor of the same values, in memory of its own with its own strides, that a model computed."""

    @staticmethod
    def forward(ctx, x, copy):
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx, dx):
        return dx, None
