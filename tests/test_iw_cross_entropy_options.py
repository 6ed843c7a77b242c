"""The loss op's options, one by one: S=1 against F.cross_entropy, alpha, weights, normalizer, inplace, derivatives, the module."""

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracle.naive_loss import assert_equals_naive, result_of
from torch.utils._pytree import tree_leaves

import iwsgd_ext as iw

KINDS = ["labels", "probabilities"]
POSITIONS = [(), (7,), (4, 5)]


def data(device, samples, batch, classes, positions=(), kind="labels", dtype=torch.float32):
    logits = torch.randn(samples * batch, classes, *positions, device=device, dtype=dtype)
    if kind == "labels":
        return logits, torch.randint(classes, (batch, *positions), device=device)
    return logits, torch.softmax(torch.randn(batch, classes, *positions, device=device, dtype=dtype), 1)


def gradient(loss_function, logits, *arguments, **options):
    leaf = logits.detach().requires_grad_()
    loss = loss_function(leaf, *arguments, **options)
    (dlogits,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), dlogits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_one_sample_is_cross_entropy(backend, device, positions, kind, dtype):
    """Value and gradient, under every combination of weight, ignore_index, label_smoothing, reduction, level and alpha."""
    logits, target = data(device, 1, 5, 11, positions, kind, dtype)
    class_weight = torch.rand(11, device=device, dtype=dtype)
    for weight, ignore, smoothing, reduction in itertools.product(
        (None, class_weight), (-100, 3) if kind == "labels" else (-100,), (0.0, 0.1, 1.0), ("mean", "sum", "none")
    ):
        options = {"weight": weight, "ignore_index": ignore, "label_smoothing": smoothing, "reduction": reduction}
        if ignore == 3:
            target.view(5, -1)[1] = 3  # a whole example
            target.view(5, -1)[2, -1] = 3
        value, dlogits = gradient(F.cross_entropy, logits, target, **options)
        for level, alpha in (("example", 0.0), ("position", 1.0), ("example", 1.0), ("position", math.inf)):
            expected = value.flatten(1).sum(1) if reduction == "none" and level == "example" and positions else value
            got = gradient(iw.iw_cross_entropy, logits, target, 1, level=level, alpha=alpha, **options)
            torch.testing.assert_close(got, (expected, dlogits), msg=lambda m, o=(options, level, alpha): f"{o}\n{m}")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("level", ["example", "position"])
@pytest.mark.parametrize("samples", [1, 3])
def test_nothing_counts(backend, device, samples, level, reduction):
    """Everything ignored, or all weights zero: loss 0 and gradient 0 where torch gives NaN."""
    logits, target = data(device, samples, 3, 5, (7,))
    ignored = torch.full_like(target, -100)
    no_class, no_example = {"weight": torch.zeros(5, device=device)}, {"example_weight": torch.zeros(3, device=device)}
    for y, options in ((ignored, {}), (target, no_class), (target, no_example)):
        loss, dlogits = gradient(iw.iw_cross_entropy, logits, y, samples, level=level, reduction=reduction, **options)
        assert torch.equal(loss, torch.zeros_like(loss))
        assert torch.equal(dlogits, torch.zeros_like(dlogits))


@pytest.mark.parametrize("level", ["example", "position"])
@pytest.mark.parametrize("shape", [(2 * 0, 5), (2 * 0, 5, 7), (2 * 3, 5, 0), (2 * 3, 5, 4, 0)], ids=str)
def test_empty(backend, device, shape, level):
    batch = shape[0] // 2
    logits, target = torch.zeros(shape, device=device), torch.zeros(batch, *shape[2:], dtype=torch.int64, device=device)
    for reduction, y in itertools.product(("mean", "sum", "none"), (target, torch.zeros(batch, *shape[1:], device=device))):
        loss, dlogits = gradient(iw.iw_cross_entropy, logits, y, 2, level=level, reduction=reduction)
        none = (batch, *shape[2:]) if level == "position" else (batch,)
        assert torch.equal(loss, torch.zeros(none if reduction == "none" else (), device=device))
        assert dlogits.shape == shape


@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.3, 1.0, 2.0, math.inf])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "classes", "positions"), [(35, 10, ()), (3, 65, ()), (3, 10, (4, 5))], ids=["columns", "rows", "image"])
def test_alpha(backend, device, batch, classes, positions, kind, alpha):
    logits, target = data(device, 3, batch, classes, positions, kind)
    options = {"alpha": alpha, "label_smoothing": 0.1, "weight": torch.rand(classes, device=device)}
    for level in ("example", "position"):
        options["level"] = level
        assert_equals_naive(result_of(iw.iw_cross_entropy, logits, target, 3, **options), logits, target, 3, **options)


def test_small_alpha_is_exact(backend, device):
    """L = mean + alpha/2 variance + O(alpha^2): a logsumexp divided by 1e-6 would keep 10 digits in float64, in float32 none."""
    logits, target = data(device, 8, 35, 10, dtype=torch.float64)
    for alpha in (1e-3, 1e-6, 1e-9):
        for dtype, tolerance in ((torch.float64, 4e-15 + 10 * alpha**2), (torch.float32, 4e-6 + 10 * alpha**2)):
            _, stats = iw.iw_cross_entropy(logits.to(dtype), target, 8, alpha=alpha, return_stats=True)
            l = -F.cross_entropy(logits, target.repeat(8), reduction="none").view(8, 35)
            expected = l.mean(0) + alpha / 2 * l.var(0, correction=0)
            torch.testing.assert_close(stats.bound.double(), expected, rtol=0, atol=tolerance * 10)


def test_infinite_alpha_takes_the_first_of_equals(backend, device):
    logits, target = data(device, 1, 3, 10)
    best = torch.zeros_like(logits).scatter_(1, target[:, None], 9.0)
    _, _, weights, _, dlogits = result_of(iw.iw_cross_entropy, torch.cat([logits, best, logits, best]), target, 4, alpha=math.inf)
    assert weights[:, 0].tolist() == [0, 1, 0, 0]
    assert (dlogits.view(4, 3, 10).abs().sum(2) > 0).tolist() == [[False] * 3, [True] * 3, [False] * 3, [False] * 3]


@pytest.mark.parametrize("shape", ["example", "position"])
@pytest.mark.parametrize("level", ["example", "position"])
@pytest.mark.parametrize("kind", KINDS)
def test_example_weight(backend, device, kind, level, shape):
    logits, target = data(device, 3, 7, 10, (4, 5), kind)
    weight = torch.rand(7 if shape == "example" else (7, 4, 5), device=device)
    weight[0] = 0
    for reduction in ("mean", "sum", "none"):
        options = {"example_weight": weight, "level": level, "reduction": reduction, "weight": torch.rand(10, device=device)}
        assert_equals_naive(result_of(iw.iw_cross_entropy, logits, target, 3, **options), logits, target, 3, **options)


def test_integer_example_weight_repeats_the_example(backend, device):
    logits, target = data(device, 3, 5, 10, (7,), dtype=torch.float64)
    times = torch.tensor([1, 0, 3, 2, 1], device=device)
    repeated = logits.view(3, 5, 10, 7).repeat_interleave(times, 1).flatten(0, 1)
    for level in ("example", "position"):
        weighted = iw.iw_cross_entropy(logits, target, 3, level=level, example_weight=times.double())
        torch.testing.assert_close(weighted, iw.iw_cross_entropy(repeated, target.repeat_interleave(times, 0), 3, level=level))


@pytest.mark.parametrize("normalizer", [11, 2.5, torch.tensor(7.0), torch.tensor([3])], ids=["int", "float", "scalar", "one-element"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_normalizer(backend, device, normalizer, dtype):
    logits, target = data(device, 3, 7, 10, (5,))
    logits, options = logits.to(dtype), {"normalizer": normalizer, "level": "position"}
    assert_equals_naive(result_of(iw.iw_cross_entropy, logits, target, 3, **options), logits, target, 3, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", ["example", "position"])
def test_normalizer_accumulates_gradients(backend, device, level, kind):
    """Uneven parts of a batch, each divided by the whole batch's denominator, add up to the whole batch's loss and gradient."""
    logits, target = data(device, 3, 7, 10, (5,), kind, torch.float64)
    weight = torch.rand(10, device=device, dtype=torch.float64)
    whole = gradient(iw.iw_cross_entropy, logits, target, 3, level=level, weight=weight)
    denominator = weight[target].sum() if kind == "labels" else torch.tensor(35.0)
    loss, dlogits = 0, torch.zeros_like(logits).view(3, 7, 10, 5)
    for part in (slice(0, 2), slice(2, 3), slice(3, 7)):
        rows = logits.view(3, 7, 10, 5)[:, part].flatten(0, 1)
        l, d = gradient(iw.iw_cross_entropy, rows, target[part], 3, level=level, weight=weight, normalizer=denominator)
        loss = loss + l
        dlogits[:, part] = d.unflatten(0, (3, -1))
    torch.testing.assert_close((loss, dlogits.flatten(0, 1)), whole)


@pytest.mark.parametrize("level", ["example", "position"])
def test_scale_of_class_weights_does_not_matter(backend, device, level):
    """Importance weights and the mean stay as they are when ``weight`` is scaled, the sum grows with it."""
    logits, target = data(device, 3, 7, 10, (5,), dtype=torch.float64)
    weight = torch.rand(10, device=device, dtype=torch.float64)
    small = result_of(iw.iw_cross_entropy, logits, target, 3, level=level, weight=weight)
    large = result_of(iw.iw_cross_entropy, logits, target, 3, level=level, weight=100 * weight)
    torch.testing.assert_close(large, small)
    total = [iw.iw_cross_entropy(logits, target, 3, level=level, weight=k * weight, reduction="sum") for k in (1, 100)]
    torch.testing.assert_close(total[1], 100 * total[0])


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0, math.inf])
@pytest.mark.parametrize(("level", "positions"), [("example", ()), ("example", (7,)), ("position", (7,))], ids=str)
def test_bound_weights_and_effective_sample_size(backend, device, level, positions, alpha):
    """L >= mean l (Jensen), L <= max l, sum_s w = 1, 1 <= ESS <= S; float32 rounding of l allowed for."""
    logits, target = data(device, 8, 35, 10, positions)
    _, stats = iw.iw_cross_entropy(3 * logits, target, 8, level=level, alpha=alpha, return_stats=True)
    slack = stats.log_p.abs().amax(0) * 4e-7
    assert (stats.bound >= stats.mean_log_p - slack).all()
    assert (stats.bound <= stats.log_p.amax(0) + slack).all()
    torch.testing.assert_close(stats.mean_log_p, stats.log_p.mean(0))
    torch.testing.assert_close(stats.weights.sum(0), torch.ones_like(stats.bound))
    torch.testing.assert_close(stats.ess, 1 / stats.weights.pow(2).sum(0))
    assert (stats.ess >= 1 - 1e-6).all() and (stats.ess <= 8 + 1e-5).all()
    assert not any(value.requires_grad for value in stats)
    one = logits[:35].repeat(8, *[1] * (logits.dim() - 1))
    equal = iw.iw_cross_entropy(one, target, 8, level=level, alpha=alpha, return_stats=True)[1]
    torch.testing.assert_close(equal.ess, torch.full_like(equal.ess, 1.0 if alpha == math.inf else 8.0))


def test_bound_grows_with_the_samples(backend, device):
    """Equation 6 per draw: the bound averaged over all subsets of k samples does not fall as k grows."""
    logits, target = data(device, 5, 35, 10, dtype=torch.float64)
    rows, averages = (3 * logits).view(5, 35, 10), []
    for k in range(1, 6):
        subsets = [list(subset) for subset in itertools.combinations(range(5), k)]
        bounds = [iw.iw_cross_entropy(rows[s].flatten(0, 1), target, k, return_stats=True)[1].bound for s in subsets]
        averages += [torch.stack(bounds).mean(0)]
    assert all((more > less).all() for less, more in itertools.pairwise(averages))


def test_samples_are_exchangeable(backend, device):
    logits, target = data(device, 4, 7, 10, (5,), dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1], device=device)
    loss, log_p, weights, bound, dlogits = result_of(iw.iw_cross_entropy, logits, target, 4)
    mixed = result_of(iw.iw_cross_entropy, logits.view(4, 7, 10, 5)[order].flatten(0, 1), target, 4)
    torch.testing.assert_close(mixed, (loss, log_p[order], weights[order], bound, dlogits.view(4, 7, 10, 5)[order].flatten(0, 1)))


@pytest.mark.parametrize("level", ["example", "position"])
@pytest.mark.parametrize("ignore_index", [-100, 0, 4])
def test_ignored_positions(backend, device, ignore_index, level):
    """Also an index that is a class: those positions count for nothing and their logits, NaN here, get a gradient of exactly 0."""
    logits, target = data(device, 3, 7, 5, (11,))
    target[:, ::3] = ignore_index
    ignored = (target == ignore_index).expand(3, 7, 11).flatten(0, 1)[:, None].expand_as(logits)
    poisoned = logits.masked_fill(ignored, math.nan)
    options = {"ignore_index": ignore_index, "level": level, "label_smoothing": 0.1}
    got = result_of(iw.iw_cross_entropy, poisoned, target, 3, **options)
    assert_equals_naive(got, logits, target, 3, **options)
    assert (got.dlogits[ignored] == 0).all()


@pytest.mark.parametrize("values", ["usual", "scaled"])
def test_retained_graph(backend, device, values):
    """Gradients that were given out may be changed: a second backward through the retained graph gives the right ones again."""
    logits, target = data(device, 3, 7, 10)
    upstream = torch.tensor(1.0 if values == "usual" else 3.0, device=device)
    logits.requires_grad_()
    loss = iw.iw_cross_entropy(logits, target, 3)
    loss.backward(upstream, retain_graph=True)
    expected = logits.grad.clone()
    logits.grad.mul_(5)
    loss.backward(upstream, retain_graph=True)
    torch.testing.assert_close(logits.grad, 6 * expected)
    logits.grad.zero_()
    loss.backward(upstream)
    assert torch.equal(logits.grad, expected)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward(upstream)


def test_no_gradient_wanted(backend, device):
    logits, target = data(device, 3, 7, 10)
    before = logits.clone()
    for inplace in (False, True):
        loss = iw.iw_cross_entropy(logits, target, 3, inplace=inplace)
        with torch.no_grad():
            again = iw.iw_cross_entropy((logits.requires_grad_() * 1), target, 3, inplace=inplace)
        logits.requires_grad_(False)
        assert not loss.requires_grad and not again.requires_grad and torch.equal(loss, again)
        assert torch.equal(logits, before)


def test_second_derivative_raises(backend, device):
    """Never a silent zero; the message names the function that has one."""
    logits, target = data(device, 3, 7, 10)
    for reduction in ("mean", "none"):
        logits.requires_grad_()
        loss = iw.iw_cross_entropy(logits, target, 3, reduction=reduction).sum()
        (dlogits,) = torch.autograd.grad(loss, logits, create_graph=True)
        for penalty in (dlogits.square().sum(), loss + dlogits.square().sum(), logits.sum() * dlogits.sum()):
            with pytest.raises(RuntimeError, match="iw_logmeanexp"):
                penalty.backward(retain_graph=True)


INPLACE = {"rows": lambda x: x.flatten(2)[:, :, 0], "image": lambda x: x, "columns": lambda x: x[:, 2:8].flatten(2)[:, :, 3]}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("of", INPLACE.values(), ids=INPLACE.keys())
def test_inplace(backend, device, of, reduction):
    """The gradient is right and lies in the logits' memory."""
    leaf = torch.randn(21, 10, 4, 5, device=device, requires_grad=True)
    expected = of(leaf)
    target = torch.randint(expected.shape[1], (7, *expected.shape[2:]), device=device)
    (dleaf,) = torch.autograd.grad(iw.iw_cross_entropy(expected, target, 3, reduction=reduction).sum(), leaf)
    dlogits = gradient(iw.iw_cross_entropy, expected, target, 3, reduction=reduction)[1]
    logits = of(leaf * 1)
    version, seen = logits._version, []
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    loss = iw.iw_cross_entropy(logits, target, 3, reduction=reduction, inplace=True).sum()
    assert logits._version > version
    torch.testing.assert_close(logits.detach(), dlogits)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], dleaf)
    assert seen == [logits.data_ptr()]


def test_inplace_marks_the_logits_as_changed(backend, device):
    leaf = torch.randn(21, 10, device=device, requires_grad=True)
    logits = leaf * 1
    square = logits.square()
    iw.iw_cross_entropy(logits, torch.randint(10, (7,), device=device), 3, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


def test_inplace_without_gradients_writes_nothing(backend, device):
    logits = torch.randn(21, 10, device=device, requires_grad=True) * 1
    before, target = logits.detach().clone(), torch.randint(10, (7,), device=device)
    with torch.no_grad():
        loss = iw.iw_cross_entropy(logits, target, 3, inplace=True)
    assert torch.equal(logits, before) and torch.equal(loss, iw.iw_cross_entropy(before, target, 3))


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (lambda x: x.requires_grad_(), "a leaf that requires grad"),
        (lambda x: x.requires_grad_()[:, :, 1:].flatten(2), "its view"),
        (lambda x: (x.requires_grad_() * 1).movedim(2, 3), "adjacent in memory"),
        (lambda x: (x.requires_grad_() * 1)[:1].expand(21, 10, 4, 5), "expanded"),
    ],
    ids=["leaf", "view-of-leaf", "positions-apart", "expanded"],
)
def test_inplace_refused(backend, device, logits, message):
    logits = logits(torch.randn(21, 10, 4, 5, device=device))
    with pytest.raises(ValueError, match=f"inplace.*{message}"):
        iw.iw_cross_entropy(logits, torch.zeros(7, *logits.shape[2:], dtype=torch.int64, device=device), 3, inplace=True)


def test_module(backend, device):
    """The module is the function: with its options, in training with S samples, in eval with one; copied and pickled."""
    logits, target = data(device, 3, 7, 10, (5,))
    options = {"ignore_index": 2, "reduction": "sum", "label_smoothing": 0.1, "alpha": 0.5, "level": "position"}
    weight, example_weight = torch.rand(10), torch.rand(7, device=device)
    module = iw.IWCrossEntropyLoss(3, weight=weight, **options).to(device)
    expected = iw.iw_cross_entropy(logits, target, 3, weight=weight.to(device), example_weight=example_weight, **options)
    for m in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(m(logits, target, example_weight=example_weight), expected)
    over_nine = iw.iw_cross_entropy(logits, target, 3, normalizer=9)
    assert torch.equal(iw.IWCrossEntropyLoss(3)(logits, target, normalizer=9), over_nine)
    plain = {name: value for name, value in options.items() if name not in ("alpha", "level")}
    torch.testing.assert_close(module.eval()(logits[:7], target), F.cross_entropy(logits[:7], target, weight=weight.to(device), **plain))
    assert list(iw.IWCrossEntropyLoss(3).state_dict()) == list(torch.nn.CrossEntropyLoss().state_dict())
    other = iw.IWCrossEntropyLoss(3, weight=torch.zeros(10))
    other.load_state_dict(torch.nn.CrossEntropyLoss(weight=weight).state_dict())
    assert torch.equal(other.weight, weight)
    assert "samples=3" in repr(module) and "alpha=0.5" in repr(module)
    loss, stats = iw.IWCrossEntropyLoss(3, return_stats=True)(logits, target)
    assert torch.equal(loss, iw.iw_cross_entropy(logits, target, 3)) and stats.weights.shape == (3, 7)


@pytest.mark.parametrize(
    ("name", "value", "wrong"),
    [
        ("samples", 1, 0),
        ("ignore_index", 2, "2"),
        ("reduction", "sum", "median"),
        ("label_smoothing", 0.1, 1.5),
        ("alpha", 0.5, -1.0),
        ("level", "position", "pixel"),
        ("return_stats", True, None),
    ],
)
def test_options_of_a_module_may_be_changed(name, value, wrong):
    """What is set counts from then on, is checked by the next call, and is what a module made with it has."""
    logits, target = data("cpu", 1 if name == "samples" else 3, 7, 10, (5,))
    module = iw.IWCrossEntropyLoss(3)
    setattr(module, name, value)
    same = iw.IWCrossEntropyLoss(**{"samples": 3, name: value})
    assert getattr(same, name) == value and repr(same) == repr(module)
    got, want, before = (tree_leaves(m(logits, target))[0] for m in (module, same, iw.IWCrossEntropyLoss(len(logits) // 7)))
    assert torch.equal(got, want)
    assert name in ("samples", "return_stats") or not torch.equal(got, before)
    if wrong is not None:
        setattr(module, name, wrong)
        with pytest.raises((TypeError, ValueError), match=f"{name}: expected"):
            module(logits, target)
