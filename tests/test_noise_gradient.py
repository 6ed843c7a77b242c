"""Derivatives of the noise op, what it keeps for backward, and how it behaves under compilers; bad arguments."""

from functools import partial

import pytest
import torch
from oracle import naive
from torch._dynamo.testing import CompileCounterWithBackend

from iwsgd_ext import functional as F

FORMS = {"element": F.dropout, "channel": F.dropout2d, "row": F.drop_path}
OPS = torch.ops.iwsgd_ext
P = 0.3


def naive_gradient(x: torch.Tensor, dy: torch.Tensor, p: float, samples: int, batch_dim: int = 0, **address) -> torch.Tensor:
    """sum over s of keep * scale * dy in float64."""
    keep = naive.naive_keep(x, p, samples=samples, batch_dim=batch_dim, **address)
    kept = torch.where(keep, dy.detach().cpu().double(), 0.0) * naive.effective_scale(p)
    return sum(kept.tensor_split(samples, batch_dim))


LAYOUTS = [
    pytest.param((5, 63), 0, torch.contiguous_format, id="odd-63"),
    pytest.param((2, 4097), 0, torch.contiguous_format, id="one-more-than-a-chunk"),
    pytest.param((6, 3, 13), 1, torch.contiguous_format, id="time-major"),
    pytest.param((3, 6, 5, 7), 0, torch.channels_last, id="channels_last"),
    pytest.param((3, 6, 5, 7), 2, torch.channels_last, id="channels_last-batch_dim2"),
    pytest.param((2, 3, 2, 5, 3), 0, torch.channels_last_3d, id="channels_last_3d"),
    pytest.param((0, 7), 0, torch.contiguous_format, id="no-examples"),
]


@pytest.mark.parametrize(("shape", "batch_dim", "memory_format"), LAYOUTS)
@pytest.mark.parametrize("unit", ["element", "row"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_backward_sums_over_samples(device, backend, shape, batch_dim, memory_format, unit, dtype):
    """Every error below that of S float32 sums and one rounding."""
    x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    for samples in (1, 3, 8):
        address = {"samples": samples, "seed": 9, "stream": 2, "first_example": 4, "batch_dim": batch_dim}
        y = FORMS[unit](x, P, **address)
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, dy)
        want = naive_gradient(x, dy, P, unit=unit, **address)
        assert dx.dtype == dtype
        assert dx.shape == x.shape
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        size = naive_gradient(x, dy.abs(), P, unit=unit, **address)
        bound = torch.finfo(dtype).eps / 2 * want.abs() + (samples + 2) * torch.finfo(acc).eps * size + torch.finfo(dtype).tiny
        assert bool(((dx.detach().cpu().double() - want).abs() <= bound).all())


@pytest.mark.parametrize("unit", FORMS)
def test_backward_of_expanded_rows(device, backend, unit):
    """Without an expansion the gradient is the noise of the upstream gradient, to the bit."""
    x = torch.randn(6, 5, 3, 7, device=device, requires_grad=True)
    address = {"samples": 3, "seed": 1, "expand": False, "sample_ids": [4, 0, 9]}
    y = FORMS[unit](x, P, **address)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx.cpu(), naive.naive_noise(dy, P, unit=unit, **address))


@pytest.mark.parametrize("expand", [True, False])
def test_layout_of_the_gradient_does_not_choose_the_mask(device, backend, expand):
    """The order of positions is the forward input's: a gradient of the other layout meets the same mask."""
    dense = torch.randn(4, 6, 5, 7, device=device, dtype=torch.float64)
    for x in (dense, dense.to(memory_format=torch.channels_last)):
        x = x.clone().requires_grad_()
        y = F.dropout(x, P, samples=2, seed=3, expand=expand)
        dy = torch.randn(y.shape, device=device, dtype=torch.float64)
        want = naive.naive_keep(x, P, samples=2, seed=3, expand=expand) * dy.cpu() * naive.effective_scale(P)
        want = want.unflatten(0, (2, 4)).sum(0) if expand else want
        transposed = dy.transpose(1, 3).contiguous().transpose(1, 3)
        for layout in (dy, dy.to(memory_format=torch.channels_last), transposed, torch.ones_like(dy[:1]).expand_as(dy)):
            expected = want
            if layout.stride(0) == 0:
                expected = naive.naive_keep(x, P, samples=2, seed=3, expand=expand).double() * naive.effective_scale(P)
                expected = expected.unflatten(0, (2, 4)).sum(0) if expand else expected
            (dx,) = torch.autograd.grad(y, x, layout, retain_graph=True)
            torch.testing.assert_close(dx.cpu(), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("unit", FORMS)
@pytest.mark.parametrize("expand", [True, False])
def test_gradcheck_and_gradgradcheck(device, backend, unit, expand):
    x = torch.randn(2, 3, 2, 3, device=device, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    call = partial(FORMS[unit], p=0.4, samples=2, seed=2, expand=expand)
    assert torch.autograd.gradcheck(lambda v: call(v).pow(2), x)
    assert torch.autograd.gradgradcheck(lambda v: call(v).pow(3), x)


def test_kept_for_backward_is_the_address(device, backend):
    """No mask and no input: 24 bytes of origin and the sample ids, for any size."""
    for n in (8, 100_000):
        saved = []
        x = torch.randn(2, n, device=device, requires_grad=True)

        def keep(t, saved=saved):
            saved.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = F.dropout(x, 0.5, samples=4, seed=0, sample_ids=torch.arange(4))
            F.dropout(y, 0.5, samples=4, seed=0, stream=1, expand=False)
        assert sum(t.untyped_storage().nbytes() for t in saved) == 24 + 32 + 24


def address(device, samples=2, sample_ids=None, stream=1):
    """The arguments that the bare ops share, for 5 positions of one element."""
    return torch.tensor([3, 0, 0], device=device), sample_ids, samples, stream, 0, 5, 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(device, backend, dtype):
    if backend == "reference":
        pytest.skip("the reference is plain torch")
    ids = torch.tensor([[2, 0, 1], [5, 4, 1]], device=device)
    x, y = torch.randn(1, 3, 5, device=device).to(dtype), torch.randn(1, 6, 5, device=device).to(dtype)
    thresholds = torch.full((3, 5), 20000, dtype=torch.int32, device=device)
    for sample_ids, law in ((None, (20000, None, 1.5)), (ids[:, 0].contiguous(), (20000, None, 2.0)), (ids, (0, thresholds, 1.0))):
        arguments = (*address(device, sample_ids=sample_ids), *law)
        torch.library.opcheck(OPS.noise, (x, *arguments, 0.0, 0.5, True))
        torch.library.opcheck(OPS.noise, (y, *arguments, 0.5, 0.0, False))
        torch.library.opcheck(OPS.noise_sum, (y, *arguments))
        torch.library.opcheck(OPS.noise_out, (x, *arguments, 0.0, 0.0, True, torch.zeros_like(y)))


def test_meta_device_gives_shapes():
    x, arguments = (
        torch.empty(5, 6, 7, device="meta"),
        (torch.empty(3, dtype=torch.int64, device="meta"), None, 3, 0, 0, 7, 1, 9, None, 1.0),
    )
    y = OPS.noise(x, *arguments, 0.0, 0.0, True)
    assert y.shape == (5, 18, 7)
    assert OPS.noise_sum(y, *arguments).shape == (5, 6, 7)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["dense", "channels_last"])
def test_compiled_is_eager(device, memory_format):
    check_compiled(device, memory_format)


@pytest.mark.slow
def test_compiled_reference_is_eager(device, backend):
    check_compiled(device, torch.channels_last)


def check_compiled(device, memory_format):
    """The same masks, values and gradients, and one graph for any seed and batch."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(x, seed):
        y = F.dropout(x * 2, 0.4, samples=3, seed=seed)
        return F.dropout2d(y.sin(), 0.4, samples=3, seed=seed, stream=1, expand=False)

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for seed, batch in ((0, 5), (-7, 2), (2**40, 3)):
        x = torch.randn(batch, 6, 4, 7, device=device).to(memory_format=memory_format)
        results = []
        for f in (step, compiled):
            leaf = x.clone().requires_grad_()
            y = f(leaf, torch.tensor(seed, device=device))
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaf)))
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager, rtol=1e-6, atol=1e-6)
        assert torch.equal(results[0][0] == 0, results[1][0] == 0)
    assert counter.frame_count == 1


BAD = [
    (TypeError, "x: expected float32, .* or float16, got torch.int64", {"x": torch.ones(2, 3, dtype=torch.int64)}),
    (TypeError, "x: expected a tensor, got list", {"x": [1.0]}),
    (TypeError, "x: expected float32, .*, got torch.float8", {"x": torch.ones(2).to(torch.float8_e4m3fn)}),
    (TypeError, "x: expected float32, .*, got torch.complex64", {"x": torch.ones(2, dtype=torch.complex64)}),
    (ValueError, "x: expected .*, got 0-D", {"x": torch.tensor(1.0)}),
    (ValueError, r"p: expected a probability in \[0, 1\], got -0.1", {"p": -0.1}),
    (ValueError, r"p: expected a probability in \[0, 1\], got 1.1", {"p": 1.1}),
    (ValueError, r"p: expected a probability in \[0, 1\], got nan", {"p": float("nan")}),
    (TypeError, "p: expected a number .*, got str", {"p": "half"}),
    (ValueError, "samples: expected an integer >= 1, got 0", {"samples": 0}),
    (TypeError, "samples: expected an int, got float", {"samples": 2.0}),
    (TypeError, "seed: expected an int or an int64 tensor of one element, got float", {"seed": 1.0}),
    (TypeError, "seed: expected .*, got torch.float32", {"seed": torch.tensor(1.0)}),
    (TypeError, r"stream: expected .*, got torch.int64 \(2,\)", {"stream": torch.tensor([1, 2])}),
    (TypeError, "first_example: expected .*, got NoneType", {"first_example": None}),
    (ValueError, r"batch_dim: expected a dimension of x in \[-2, 2\), got 2", {"batch_dim": 2}),
    (ValueError, "divisible by samples=4 where expand=False, got 6 rows", {"samples": 4, "expand": False}),
    (TypeError, "sample_ids: expected int64, got torch.float32", {"sample_ids": torch.ones(2)}),
    (TypeError, "sample_ids: expected an int64 tensor or a sequence of ints", {"sample_ids": [0.5, 1.5]}),
    (ValueError, r"sample_ids: expected \[2\] or \[2, batch\] as samples=2, got \(3,\)", {"sample_ids": [1, 2, 3]}),
    (ValueError, r"sample_ids: expected \[2, 6\], got \(2, 5\)", {"sample_ids": torch.ones(2, 5, dtype=torch.int64)}),
]


@pytest.mark.parametrize(("error", "message", "change"), BAD, ids=[f"{next(iter(c))}-{i}" for i, (_, _, c) in enumerate(BAD)])
def test_bad_arguments(error, message, change):
    arguments = {"x": torch.ones(6, 3), "samples": 2, "seed": 0, **change}
    with pytest.raises(error, match=message):
        F.dropout(**arguments)


@pytest.mark.parametrize(("form", "dim"), [(F.dropout1d, 3), (F.dropout2d, 4), (F.dropout3d, 5)], ids=["1d", "2d", "3d"])
def test_channel_forms_take_one_number_of_dimensions(form, dim):
    for d in range(1, 7):
        x = torch.ones([2] * d)
        if d == dim or (dim == 4 and d == 3):  # which torch's dropout2d takes as [B, C, L]
            assert form(x, 0.5, seed=0).shape == x.shape
        else:
            with pytest.raises(ValueError, match=rf"x: expected \[B, C, .*\], got {d}-D"):
                form(x, 0.5, seed=0)
