"""The loss op's penalty on the squares of the logits' log-sum-exp (z-loss): against the loop, and everything that it must leave alone."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from oracle.naive_loss import assert_equals_naive, result_of
from torch import nn

import iwsgd_ext as iw

KINDS = ["labels", "smoothed", "probabilities"]
# Panels of few classes, rows of many, a row of several chunks; positions.
SIZES = {
    "columns": (3, 35, 10, ()),
    "rows": (3, 5, 100, ()),
    "long": (2, 2, 3001, ()),
    "image": (3, 3, 10, (4, 5)),
    "one": (1, 7, 65, (3,)),
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "class-last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "columns": lambda x: torch.cat([x[:, :3], x, x[:, :2]], 1)[:, 3:-2],
    "rows-innermost": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
}


def data(device, samples, batch, classes, positions=(), kind="labels", dtype=torch.float32):
    logits = (2 * torch.randn(samples * batch, classes, *positions, device=device) + 3).to(dtype)
    target, options = torch.randint(classes, (batch, *positions), device=device), {"lse_square_scale": 0.3}
    if kind == "probabilities":
        target = torch.softmax(torch.randn(batch, classes, *positions, device=device), 1)
    elif positions or batch > 2:
        target.view(batch, -1)[0, 0] = -100
    if kind != "labels":
        options |= {"weight": torch.rand(classes, device=device) + 0.25, "label_smoothing": 0.1}
    return logits, target, options


def check(logits, target, samples, **options):
    assert_equals_naive(result_of(iw.iw_cross_entropy, logits, target, samples, **options), logits, target, samples, **options)


def gradient(logits, target, samples, **options):
    leaf = logits.detach().requires_grad_()
    loss = iw.iw_cross_entropy(leaf, target, samples, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), leaf)


def test_by_hand(backend, device):
    """Two equal logits z have lse = z + log 2, and half of its derivative each."""
    z = torch.tensor([[1.0, 1.0], [3.0, 3.0]], device=device, dtype=torch.float64)
    for weight in (1.0, -2.0):  # of the example: the penalty has its size
        options = {"reduction": "sum", "example_weight": torch.tensor([weight], device=device, dtype=torch.float64)}
        target = torch.tensor([0], device=device)
        (loss, dlogits), (plain, dplain) = gradient(z, target, 2, lse_square_scale=0.5, **options), gradient(z, target, 2, **options)
        lse = z[:, 0] + math.log(2)
        torch.testing.assert_close(loss - plain, abs(weight) * 0.5 / 2 * lse.square().sum())
        torch.testing.assert_close(dlogits - dplain, (abs(weight) * 0.5 / 2 * 2 * lse / 2)[:, None].expand(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_loss(backend, device, size, kind, dtype):
    logits, target, options = data(device, *SIZES[size], kind, dtype)
    for level in ("example", "position"):
        check(logits, target, SIZES[size][0], level=level, **options)


@pytest.mark.parametrize("alpha", [0.0, 0.3, math.inf])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", ["columns", "rows", "image"])
def test_outside_of_the_importance_weights(backend, device, size, kind, alpha):
    """A sample without weight, or that is impossible, is penalised as the others are."""
    logits, target, options = data(device, *SIZES[size], kind)
    for level, reduction in itertools.product(("example", "position"), ("none", "mean", "sum")):
        check(logits, target, 3, level=level, reduction=reduction, alpha=alpha, **options)
    if kind == "labels":
        samples = logits.unflatten(0, (3, -1))
        samples[1, 2].scatter_(0, target[2][None].clamp(min=0), -math.inf)
        check(logits, target, 3, level="position", alpha=alpha, **options)
        _, dlogits = gradient(logits, target, 3, level="position", alpha=alpha, **options)
        assert dlogits.isfinite().all() and (dlogits.unflatten(0, (3, -1))[1, 2] != 0).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", ["columns", "rows", "image"])
def test_weights(backend, device, size, kind):
    """An example's weight and a position's multiply by their sizes, 0 included; a class's not at all."""
    logits, target, options = data(device, *SIZES[size], kind)
    samples, batch, classes, positions = SIZES[size]
    of_examples, of_positions = torch.randn(batch, device=device), torch.randn(batch, *positions, device=device)
    of_examples[1] = of_positions[1] = 0
    of_classes = torch.rand(classes, device=device).index_fill(0, torch.tensor([3], device=device), 0) + (kind != "labels")
    options |= {"weight": of_classes}
    for level in ("example", "position"):
        check(logits, target, samples, level=level, example_weight=of_examples, reduction="sum", **options)
        check(logits, target, samples, level=level, example_weight=of_examples, normalizer=2.5, **options)
        check(logits, target, samples, level=level, example_weight=of_positions.abs(), **options)
    check(logits, target, samples, level="position", example_weight=of_positions, reduction="none", **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_layouts_and_in_place(backend, device, kind, layout):
    for size in ("rows", "image"):
        logits, target, options = data(device, *SIZES[size], kind)
        logits = LAYOUTS[layout](logits)
        check(logits, target, 3, level="position", **options)
        expected = gradient(logits, target, 3, **options)
        leaf = logits.clone().requires_grad_()
        model = leaf * 1
        loss = iw.iw_cross_entropy(model, target, 3, inplace=True, **options)
        assert torch.equal(loss, expected[0])
        assert torch.equal(*torch.autograd.grad(loss, leaf), expected[1])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_sample_is_the_z_loss_of_palm(backend, device, reduction):
    logits, target, _ = data(device, 1, 7, 100, (3,))
    leaf = logits.clone().requires_grad_()
    lse = torch.where(target != -100, torch.logsumexp(leaf, 1), 0)
    z_loss = lse.square() if reduction == "none" else lse.square().sum() / ((target != -100).sum() if reduction == "mean" else 1)
    expected = F.cross_entropy(leaf, target, reduction=reduction) + 1e-2 * z_loss
    loss, dlogits = gradient(logits, target, 1, lse_square_scale=1e-2, level="position", reduction=reduction)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(dlogits, *torch.autograd.grad(expected.sum(), leaf))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_zero_changes_nothing_and_statistics_never_do(backend, device, size, kind):
    logits, target, options = data(device, *SIZES[size], kind)
    scale, samples = options.pop("lse_square_scale"), SIZES[size][0]
    plain = result_of(iw.iw_cross_entropy, logits, target, samples, **options)
    for got in (result_of(iw.iw_cross_entropy, logits, target, samples, lse_square_scale=s, **options) for s in (0, 0.0, scale)):
        assert all(torch.equal(a, b) for a, b in zip(plain[1:4], got[1:4], strict=True))
        changed = got.loss != plain.loss
        assert torch.equal(got.dlogits, plain.dlogits) != changed
    assert changed


def test_nothing_counts(backend, device):
    logits, target, options = data(device, 3, 7, 10, (4,))
    for y, others in (
        (torch.full_like(target, -100), {}),
        (target, {"example_weight": torch.zeros(7, device=device)}),
        (target, {"normalizer": 0}),
    ):
        loss, dlogits = gradient(logits, y, 3, **options, **others)
        assert loss == 0 and (dlogits == 0).all()
    for shape in ((0, 10, 4), (21, 10, 0)):
        y = torch.zeros(shape[0] // 3, shape[2], dtype=torch.int64, device=device)
        assert gradient(logits.new_zeros(shape), y, 3, **options)[0] == 0


def test_not_finite(backend, device):
    """NaN, +infinity and -infinity alone make the loss NaN, as without the penalty; a row that is ignored plays no part."""
    for bad in (math.nan, math.inf):
        logits, target, options = data(device, 2, 3, 100)
        logits[1, 5] = bad
        loss, dlogits = gradient(logits, target, 2, reduction="none", **options)
        assert loss.isnan().tolist() == [False, True, False] and dlogits[1].isnan().all() and dlogits[::3].isfinite().all()
        target[1] = -100
        loss, dlogits = gradient(logits, target, 2, reduction="none", **options)
        assert loss.isfinite().all() and dlogits.isfinite().all()
    logits[2] = -math.inf
    assert gradient(logits, target, 2, reduction="none", **options)[0].isnan().tolist() == [False, False, True]


def test_half_precision_keeps_small_gradients(backend, device):
    """Over a large denominator, and times a loss scale."""
    logits, target, options = data(device, 2, 4000, 10, dtype=torch.float16)
    leaf = logits.clone().requires_grad_()
    (got,) = torch.autograd.grad(iw.iw_cross_entropy(leaf, target, 2, **options) * 4096, leaf)
    expected = gradient(logits.double(), target, 2, **options)[1] * 4096
    torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=1e-6)


def test_derivatives(device):
    logits, target, options = data(device, 2, 3, 5, (2,), "smoothed", torch.float64)
    assert torch.autograd.gradcheck(lambda z: iw.iw_cross_entropy(z, target, 2, **options), logits.requires_grad_())
    loss = iw.iw_cross_entropy(logits, target, 2, **options)
    expected = torch.autograd.grad(loss, logits, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="has no second derivative"):
        expected.sum().backward()
    got = torch.func.grad(lambda z: iw.iw_cross_entropy(z, target, 2, **options))(logits.detach())
    torch.testing.assert_close(got, expected.detach())
    bad = logits.detach().clone()
    bad[0, 0, 0] = math.nan  # of the position that is ignored
    got = torch.func.grad(lambda z: iw.iw_cross_entropy(z, target, 2, **options))(bad)
    assert got.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_exported(backend, device, kind):
    logits, target, options = data(device, 3, 7, 10, (5,), kind)

    def step(x, y):
        return iw.iw_cross_entropy(x * 2, y, 3, **options)

    class Step(nn.Module):
        def forward(self, x, y):
            return step(x, y)

    logits.requires_grad_()
    expected = step(logits, target)
    for run in (torch.compile(step, backend="aot_eager", fullgraph=True), torch.export.export(Step(), (logits, target)).module()):
        loss = run(logits, target)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(*torch.autograd.grad(loss, logits), *torch.autograd.grad(expected, logits, retain_graph=True))


@pytest.mark.parametrize("level", ["example", "position"])
@pytest.mark.parametrize(
    "way", [{"strategy": "loop"}, {"strategy": "streamed"}, {"strategy": "streamed", "chunk": 3}, {"strategy": "batched"}], ids=str
)
def test_strategies(device, way, level):
    """1/S is that of all samples, whichever run at a time; a chunk without importance weight goes backward, too."""
    for alpha, extra in ((1.0, {}), (math.inf, {"grad_scale": 8.0}), (0.0, {})):
        model = nn.Sequential(nn.Linear(4, 8), iw.IWDropout(0.5), nn.Linear(8, 5 * 3), nn.Unflatten(1, (5, 3))).double().to(device)
        x, target = torch.randn(6, 4, device=device, dtype=torch.float64), torch.randint(5, (6, 3), device=device)
        target[1] = target[2, 0] = -100
        targets = {"target": target, "example_weight": torch.rand(6, device=device, dtype=torch.float64), "normalizer": 4.0}
        criterion = iw.IWCrossEntropyLoss(2, lse_square_scale=0.2, alpha=alpha, level=level, label_smoothing=0.1)
        with iw.sampling(7, seed=3):
            logits = model(x)
        options = {"lse_square_scale": 0.2, "alpha": alpha, "level": level, "label_smoothing": 0.1}
        expected = iw.iw_cross_entropy(logits, samples=7, **targets, **options)
        wanted = torch.autograd.grad(expected, list(model.parameters()))
        loss, stats = iw.backward(model, criterion, x, targets, samples=7, seed=3, return_stats=True, **way, **extra)
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close([p.grad for p in model.parameters()], [g * extra.get("grad_scale", 1) for g in wanted])
        assert torch.equal(stats.bound, stats.bound.nan_to_num())


def test_a_subclass_has_the_penalty_too(device):
    """Batched by log-likelihoods, and not by the op at once."""

    class Mine(iw.IWCrossEntropyLoss):
        pass

    model = nn.Sequential(nn.Linear(4, 8), iw.IWDropout(0.5), nn.Linear(8, 5)).double().to(device)
    x, target = torch.randn(6, 4, device=device, dtype=torch.float64), torch.randint(5, (6,), device=device)
    results = []
    for kind in (iw.IWCrossEntropyLoss, Mine):
        model.zero_grad()
        loss = iw.backward(model, kind(4, lse_square_scale=0.5), x, target, samples=4, seed=1)
        results.append([loss, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results)


def test_refusals(device):
    logits, target, _ = data(device, 2, 3, 5)
    for bad in (-1e-3, math.inf, math.nan):
        with pytest.raises(ValueError, match="lse_square_scale: expected a finite number >= 0, got"):
            iw.iw_cross_entropy(logits, target, 2, lse_square_scale=bad)
        with pytest.raises(ValueError, match="lse_square_scale"):
            iw.IWCrossEntropyLoss(2, lse_square_scale=bad)
    for bad in (True, "1", torch.tensor(1.0)):
        with pytest.raises(TypeError, match="lse_square_scale: expected a number"):
            iw.iw_cross_entropy(logits, target, 2, lse_square_scale=bad)
    model = nn.Sequential(iw.IWDropout(0.5), nn.Linear(4, 5)).to(device)
    with pytest.raises(ValueError, match=r"lse_square_scale: expected 0 with strategy='resampled'.*'streamed'"):
        iw.backward(
            model, iw.IWCrossEntropyLoss(2, lse_square_scale=1.0), torch.ones(3, 4, device=device), target, samples=2, strategy="resampled"
        )


def test_process_group_is_refused():
    """Before anything is communicated, and without a group that is real."""
    with pytest.raises(ValueError, match=r"lse_square_scale: expected 0 with a process_group.*logsumexp"):
        iw.iw_cross_entropy(torch.randn(4, 5), torch.tensor([0, 1]), 2, lse_square_scale=1.0, process_group=object())


def test_module_is_the_function(device):
    logits, target, options = data(device, 2, 3, 5)
    criterion = iw.IWCrossEntropyLoss(2, **options)
    torch.testing.assert_close(criterion(logits, target), iw.iw_cross_entropy(logits, target, 2, **options))
    assert "lse_square_scale=0.3" in repr(criterion)
    criterion.lse_square_scale = -1
    with pytest.raises(ValueError, match="lse_square_scale"):
        criterion(logits, target)
