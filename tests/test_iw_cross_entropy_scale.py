"""The op that applies an upstream gradient in place, which only the device reads."""

import pytest
import torch

import iwsgd_ext as iw

SHAPES = [(1, 1, 1), (6, 5, 1), (3, 7, 11), (8, 1000, 1), (0, 5, 1)]
LAYOUTS = {"contiguous": lambda x: x, "class-last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1)}


@pytest.fixture
def scale(device):
    if not iw.backend_info()["built"][device.type]:
        pytest.skip(f"no kernels for {device.type} are built")
    return torch.ops.iwsgd_ext.iw_cross_entropy_scale_


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_is_a_product_rounded_once(device, scale, layout, dtype):
    acc = torch.promote_types(dtype, torch.float32)
    for shape in SHAPES:
        for factor in (1.0, 0.3, -2.0, 0.0, float("nan")):
            x = layout(torch.randn(shape).to(dtype))
            expected = x if factor == 1 else (x.to(acc) * torch.tensor(factor, dtype=acc)).to(dtype)
            got = layout(x.to(device).clone())
            assert scale(got, torch.tensor(factor, dtype=acc, device=device)) is None
            torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_one_leaves_every_bit(device, scale):
    """NaN payloads and negative zeros too: the memory is not written."""
    bits = torch.tensor([0x7FC12345, -0x80000000, 0x7F800001, 1], dtype=torch.int32, device=device).view(2, 2, 1)
    x = bits.clone().view(torch.float32)
    scale(x, torch.ones((), device=device))
    assert torch.equal(x.view(torch.int32), bits)


def test_views_behind_an_odd_address(device, scale):
    """What lies before and behind stays."""
    for dtype in (torch.float32, torch.bfloat16):
        for start in range(9):
            memory = torch.randn(64, device=device).to(dtype)
            before = memory.clone()
            scale(memory[start : start + 37].view(1, 37, 1), torch.tensor(2.0, device=device))
            before[start : start + 37] *= 2
            assert torch.equal(memory, before)


def test_refuses_what_it_would_scale_wrongly(device, scale):
    x = torch.ones(4, 6, 1, device=device)
    with pytest.raises(RuntimeError, match=r"without gaps|iw_cross_entropy_scale_"):
        scale(x[:, ::2], torch.ones((), device=device))
    with pytest.raises(RuntimeError):
        scale(x, torch.ones(2, device=device))
    with pytest.raises(RuntimeError):
        scale(x, torch.ones((), dtype=torch.float64, device=device))
    assert torch.equal(x, torch.ones_like(x))


def test_opcheck(device, scale):
    torch.library.opcheck(scale, (torch.randn(6, 5, 2, device=device), torch.full((), 0.5, device=device)))


@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("shape", [(12, 10), (12, 10, 7)], ids=["rows", "positions"])
def test_gradient_is_what_forward_saved(device, scale, shape, factor):
    """Without a copy, whatever the upstream gradient; a retained graph keeps its own."""
    logits = torch.randn(shape, device=device, requires_grad=True)
    target = torch.randint(10, (4, *shape[2:]), device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        loss = iw.iw_cross_entropy(logits, target, 3)
    upstream = torch.tensor(factor, device=device)
    (kept,) = torch.autograd.grad(loss, logits, upstream, retain_graph=True)
    (taken,) = torch.autograd.grad(loss, logits, upstream)
    assert kept.data_ptr() not in saved and taken.data_ptr() in saved
    torch.testing.assert_close(taken, kept, rtol=0, atol=0)
