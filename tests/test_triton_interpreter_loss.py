"""Triton's kernels of the loss on the CPU, by its interpreter: against the loop of naive_loss.py. As test_triton_interpreter.py."""

import math

import pytest
import torch
from oracle.naive_loss import assert_equals_naive, naive_loss, result_of
from test_noise import assert_same_bits
from test_triton_interpreter import DTYPES, _on_triton, sparse  # noqa: F401

import iwsgd_ext as iw
from iwsgd_ext.ops.triton import device as devices
from iwsgd_ext.ops.triton import iw_cross_entropy as loss_op
from iwsgd_ext.ops.triton import iw_cross_entropy_plan as loss_plan

REGIMES = ["held", "reread", "split"]


@pytest.fixture
def regime(request, monkeypatch) -> str:
    """The kernels that a call is made of, with blocks so small that every loop has more than one turn."""
    if request.param == "held":
        small = devices.Device(80, 1, 1 << 20)  # several tiles a program
        monkeypatch.setattr(loss_op, "device_of", lambda x: small)
        return "held"
    monkeypatch.setattr(loss_op, "held_plan", lambda shape, device: None)

    def reread(shape: loss_plan.Shape, device):
        units = shape.groups * shape.lanes
        if request.param == "split" or shape.shared or units == 0:
            return None
        return loss_plan.Held(devices.power_of_two(shape.samples), 1, 16, 4, None, units, 2)

    monkeypatch.setattr(loss_op, "reread_plan", reread)
    limits = {80: loss_plan.LIMITS[80]._replace(row_elements=256)}
    monkeypatch.setattr(loss_plan, "LIMITS", limits)
    return request.param


def data(size, dtype=torch.float32, kind="labels"):
    samples, batch, classes, positions = size
    logits = (2 * torch.randn(samples * batch, classes, *positions)).to(dtype)
    target, options = torch.randint(classes, (batch, *positions)), {}
    if kind == "probabilities":
        target = torch.softmax(torch.randn(batch, classes, *positions), 1)
    if kind != "labels":
        options = {"weight": torch.rand(classes) + 0.25, "label_smoothing": 0.1}
    if kind == "smoothed":
        target[torch.rand(batch, *positions) < 0.3] = -100
        target.view(batch, -1)[0, 0] = classes - 1
    return logits, target, options


def check(logits, target, samples, **options):
    assert_equals_naive(result_of(iw.iw_cross_entropy, logits, target, samples, **options), logits, target, samples, **options)


SIZES = {"digits": (8, 5, 10, ()), "odd": (3, 3, 65, ()), "one-class": (1, 2, 1, ()), "positions": (2, 2, 20, (3,))}


@pytest.mark.parametrize("regime", REGIMES, indirect=True)
@pytest.mark.parametrize("kind", ["labels", "smoothed", "probabilities"])
@pytest.mark.parametrize("size", ["odd", "positions"])
def test_weights_of_any_sign(regime, size, kind):
    """Rewards of positions; of examples in any mixture, beside weights of all classes that are negative."""
    logits, target, options = data(SIZES[size], torch.float32, kind)
    samples, batch, classes, positions = SIZES[size]
    rewards, negative = torch.randn(batch, *positions), -torch.rand(classes) - 0.25
    check(logits, target, samples, **(options | {"example_weight": rewards, "level": "position", "reduction": "sum"}))
    check(
        logits,
        target,
        samples,
        **(options | {"example_weight": rewards[(...,) + (0,) * len(positions)], "weight": negative, "normalizer": 3.0}),
    )


@pytest.mark.parametrize("regime", REGIMES, indirect=True)
def test_weights_that_are_special(regime):
    """Terms that add up to 0 give NaN, an infinite weight an infinite loss, weights that cancel in the mean no finite one."""
    logits, target = torch.randn(6, 5), torch.tensor([0, 1, 4])
    soft = torch.zeros(3, 5)
    soft[1, 0], soft[1, 1] = 1, -1
    assert iw.iw_cross_entropy(logits, soft, 2, reduction="none").isnan().tolist() == [False, True, False]
    weight = torch.tensor([math.inf, 1, 1, 1, -1])
    assert iw.iw_cross_entropy(logits, target, 2, weight=weight, reduction="none")[0] == math.inf
    assert not iw.iw_cross_entropy(logits[2:], target[1:], 2, weight=weight).isfinite()


@pytest.mark.parametrize("regime", REGIMES, indirect=True)
@pytest.mark.parametrize("kind", ["labels", "smoothed", "probabilities"])
@pytest.mark.parametrize("size", SIZES)
def test_loss(regime, size, kind):
    for dtype in DTYPES if kind == "smoothed" else DTYPES[:1]:
        logits, target, options = data(SIZES[size], dtype, kind)
        for level in ["example", "position"] if SIZES[size][3] else ["example"]:
            check(logits, target, SIZES[size][0], level=level, **options)
            check(logits, target, SIZES[size][0], level=level, lse_square_scale=0.3, **options)


OPTIONS = {
    "mean-of-samples": {"alpha": 0.0},
    "small-alpha": {"alpha": 1e-3, "reduction": "sum"},
    "best-sample": {"alpha": math.inf, "reduction": "none"},
    "example-weight": {"example_weight": torch.tensor([0.0, 0.5, 2.0]), "alpha": 0.3},
    "position-weight": {"example_weight": torch.rand(3, 4), "reduction": "none"},
    "normalizer": {"normalizer": 7.0, "upstream": -2.0},
    "lse-square": {"lse_square_scale": 0.3, "example_weight": torch.tensor([0.0, 0.5, -2.0]), "reduction": "sum"},
    "lse-square-best": {"lse_square_scale": 0.3, "example_weight": torch.rand(3, 4), "alpha": math.inf, "reduction": "none"},
}


@pytest.mark.parametrize("regime", REGIMES, indirect=True)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(regime, options):
    for dtype, level in ((torch.float64, "example"), (torch.float32, "position")):
        logits, target, others = data((3, 3, 20, (4,)), dtype, "smoothed")
        check(logits, target, 3, level=level, **others, **options)


LAYOUTS = {
    "class-last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "columns": lambda x: torch.cat([x[:, :3], x, x[:, :2]], 1)[:, 3:-2],
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "one-row-expanded": lambda x: x[:1].expand(x.shape),
    "rows-innermost": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "positions-apart": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("regime", REGIMES, indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(regime, layout):
    for positions in ((), (3,)):
        logits, target, options = data((2, 3, 16, positions), torch.float32, "smoothed")
        logits = layout(logits)
        before = logits.clone()
        check(logits, target, 2, **options, **({"level": "position"} if positions else {}))
        assert torch.equal(logits, before), "the logits were overwritten"


@pytest.mark.parametrize("regime", REGIMES, indirect=True)
def test_inplace(regime):
    logits, target, options = data((2, 3, 20, (3,)), torch.float32, "smoothed")
    for level in ("example", "position"):
        options["lse_square_scale"] = 0.3 if level == "position" else 0.0
        expected = result_of(iw.iw_cross_entropy, logits, target, 2, level=level, **options)
        leaf = logits.clone().requires_grad_()
        model = leaf * 1
        loss = iw.iw_cross_entropy(model, target, 2, level=level, inplace=True, **options)
        assert torch.equal(loss, expected.loss)
        (dlogits,) = torch.autograd.grad(loss, leaf)
        assert torch.equal(dlogits, expected.dlogits) and torch.equal(model, expected.dlogits)


SPECIAL = {"nan": (math.nan, 0.0), "inf": (math.inf, 0.0), "-inf-at-label": (0.0, -math.inf), "all--inf": -math.inf, "all-inf": math.inf}


@pytest.mark.parametrize("regime", REGIMES, indirect=True)
@pytest.mark.parametrize("special", SPECIAL.values(), ids=SPECIAL.keys())
def test_one_sample_is_torch(regime, special):
    """NaN for NaN and infinity for infinity, example by example."""
    logits, target = torch.randn(5, 40), torch.ones(5, dtype=torch.int64)
    logits[1, : 2 if isinstance(special, tuple) else 40] = torch.tensor(special)
    for options in ({}, {"label_smoothing": 0.1}):
        leaf = logits.clone().requires_grad_()
        expected = torch.nn.functional.cross_entropy(leaf, target, reduction="none", **options)
        (dexpected,) = torch.autograd.grad(expected.sum(), leaf)
        got = result_of(iw.iw_cross_entropy, logits, target, 1, reduction="none", **options)
        torch.testing.assert_close(got.loss, expected.detach(), equal_nan=True)
        torch.testing.assert_close(got.dlogits, dexpected, equal_nan=True)


@pytest.mark.parametrize("regime", REGIMES, indirect=True)
def test_dead_and_ignored(regime):
    """Impossible under every sample: w = 1/S. Under one: weight 0 and gradient 0. All ignored, or nothing there: 0 and not NaN."""
    logits, target = torch.randn(3, 4, 40), torch.tensor([1, 2, 3, -100])
    logits[:, 0, 1] = -math.inf
    logits[1, 1, 2] = -math.inf
    got = result_of(iw.iw_cross_entropy, logits.flatten(0, 1), target, 3, reduction="none")
    assert got.loss[0] == math.inf and torch.equal(got.weights[:, 0], torch.full((3,), 1 / 3))
    assert got.weights[1, 1] == 0 and (got.dlogits.view(3, 4, 40)[1, 1] == 0).all() and (got.dlogits.view(3, 4, 40)[:, 3] == 0).all()
    for y in (torch.full((4,), -100), torch.empty(0, dtype=torch.int64)):
        loss, *_, dlogits = result_of(iw.iw_cross_entropy, logits.flatten(0, 1)[: 3 * len(y)], y, 3)
        assert loss == 0 and (dlogits == 0).all()
    loss, *_, dlogits = result_of(iw.iw_cross_entropy, torch.zeros(6, 5, 0), torch.zeros(2, 0, dtype=torch.int64), 3)
    assert loss == 0 and dlogits.shape == (6, 5, 0)


def test_loss_past_two_to_the_31(tmp_path):
    """Samples 2^31 + 64 elements apart, a stride that in units of ALIGN fits 32 bits; then neighbouring classes 2^31 apart."""
    memory, small = sparse(tmp_path, 2**31 + 4096), torch.randn(2, 40, 1).half()
    for view, target in ((memory.as_strided((2, 40, 1), (2**31 + 64, 1, 1)), 39), (memory.as_strided((2, 2, 1), (40, 2**31, 1)), 1)):
        view.copy_(small[:, : view.shape[1]])
        got, want = (
            torch.ops.iwsgd_triton.iw_cross_entropy(x, *iw.reference.LossArguments(torch.tensor([[target]]), 2), True)
            for x in (view, small[:, : view.shape[1]].contiguous())
        )
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b) and b.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_scale(dtype):
    """A gradient times a factor that only the device reads: rounded once; of 1 it stays as it is, NaN and all."""
    for n, factor in ((1, -2.0), (3001, 0.3), (3001, 1.0), (0, 5.0)):
        x = torch.randn(n).to(dtype)
        x[::7] = math.nan
        got = x.clone()
        acc = torch.promote_types(dtype, torch.float32)
        torch.ops.iwsgd_triton.iw_cross_entropy_scale_(got, torch.tensor(factor, dtype=acc))
        assert_same_bits(got, (x.to(acc) * torch.tensor(factor, dtype=acc)).to(dtype))


def test_target_out_of_range():
    with pytest.raises(ValueError, match=r"target: .*\[0, 5\).* got 7 in example 1"):
        iw.iw_cross_entropy(torch.randn(4, 5), torch.tensor([0, 7]), 2)


def test_too_many_samples():
    with pytest.raises(ValueError, match="samples: the triton backend takes at most 65536, got 65537"):
        iw.iw_cross_entropy(torch.zeros(65537, 1), torch.tensor([0]), 65537)


def test_the_naive_loss_is_what_is_compared_with():
    """The reference and these kernels agree where the loop does: a case of each level."""
    logits, target, options = data((2, 3, 7, (2,)), torch.float64, "smoothed")
    for level in ("example", "position"):
        got = iw.iw_cross_entropy(logits, target, 2, level=level, **options)
        torch.testing.assert_close(got, naive_loss(logits, target, 2, level=level, **options).loss)
