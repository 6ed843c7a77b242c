"""More elements than 32 bits count, on a GPU: the last rows are right, by plain PyTorch on those rows alone."""

import pytest
import torch

import iwsgd_ext as iw
from iwsgd_ext import functional

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here"),
    pytest.mark.skipif(not iw.backend_info()["built"]["cuda"], reason="the CUDA kernels are not built"),
    pytest.mark.slow,
]
GIB = 2**30


@pytest.fixture(autouse=True)
def _memory():
    torch.utils.deterministic.fill_uninitialized_memory = False  # of tens of GiB; the fixture of all tests sets it back
    yield
    torch.cuda.empty_cache()


def need(gib: float) -> None:
    free = torch.cuda.mem_get_info()[0] / GIB
    if free < gib:
        pytest.skip(f"it takes {gib} GiB of GPU memory, {free:.0f} are free")


def by_reference(call):
    iw.set_backend("reference")
    try:
        return call()
    finally:
        iw.set_backend(None)


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("inner", [2**18, 2**18 + 1], ids=["aligned", "odd"])
def test_noise(inner, expand):
    """Forward and backward of 8 samples of 1027 examples, 2^31 and more in all."""
    need(24)
    samples, examples, last = 8, 1027, 3
    shape = (examples if expand else samples * examples, inner)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()
    y = functional.dropout(x, 0.3, samples=samples, seed=7, expand=expand)
    assert y.numel() > 2**31
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)

    rows = torch.cat([torch.arange(s * examples + examples - last, (s + 1) * examples) for s in range(samples)]).cuda()
    part = (x[-last:] if expand else x[rows]).detach().cpu().requires_grad_()
    address = {"samples": samples, "seed": 7, "first_example": examples - last, "expand": expand}
    expected = by_reference(lambda: functional.dropout(part, 0.3, **address))
    (dexpected,) = torch.autograd.grad(expected, part, dy[rows].cpu())
    assert torch.equal(y[rows].cpu(), expected.detach())
    torch.testing.assert_close((dx[-last:] if expand else dx[rows]).cpu(), dexpected, rtol=1e-2, atol=1e-2)


# samples, examples, classes, positions, GiB. 2^33 elements is a vocabulary of 128k with 1024 examples of 8 samples.
LOSSES = {
    "tiles": (8, 300_000, 1001, 1, 12),
    "vocabulary": (8, 2100, 128_256, 1, 12),
    "vocabulary-2^33": (8, 8400, 128_256, 1, 45),
    "columns": (2, 4, 1000, 300_000, 14),
}


@pytest.mark.parametrize(("samples", "examples", "classes", "positions", "gib"), LOSSES.values(), ids=LOSSES.keys())
def test_loss(samples, examples, classes, positions, gib):
    """The gradient over the logits: the last units' against the same units alone."""
    need(gib)
    shape = (samples * examples, classes) if positions == 1 else (samples * examples, classes, positions)
    z = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
    for part in z.split(max(1, 2**28 * len(z) // z.numel())):  # a generator may count its numbers in 32 bits
        part.normal_(0, 2)
    assert z.numel() > 2**31
    target = torch.randint(classes, (examples,) if positions == 1 else (examples, positions), device="cuda")
    last = 2
    rows = torch.cat([torch.arange(s * examples + examples - last, (s + 1) * examples) for s in range(samples)]).cuda()
    few = z[rows] if positions == 1 else z[rows][:, :, -5:]
    its_target = target[-last:] if positions == 1 else target[-last:, -5:]

    def call(z, target):
        z = z.requires_grad_()
        loss, stats = iw.iw_cross_entropy(z * 1, target, samples, reduction="sum", level="position", return_stats=True)
        return stats.log_p, torch.autograd.grad(loss, z)[0]

    log_p, expected = by_reference(lambda: call(few.detach().cpu().float(), its_target.cpu()))
    leaf = z.requires_grad_()
    loss, stats = iw.iw_cross_entropy(leaf.view(shape), target, samples, reduction="sum", level="position", return_stats=True, inplace=True)
    (dz,) = torch.autograd.grad(loss, leaf)
    mine = dz[rows] if positions == 1 else dz[rows][:, :, -5:]
    torch.testing.assert_close(mine.float().cpu(), expected, rtol=2e-2, atol=1e-4)
    got = stats.log_p[:, -last:] if positions == 1 else stats.log_p[:, -last:, -5:]
    torch.testing.assert_close(got.cpu(), log_p, rtol=1e-4, atol=1e-3)
    assert loss.isfinite()
