"""The loss op at its edges: NaN and infinite logits, huge differences, one class, many samples; and every refusal."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracle.naive_loss import assert_equals_naive, naive_loss, result_of

import iwsgd_ext as iw

INF, NAN = math.inf, math.nan
CLASSES = pytest.mark.parametrize("classes", [10, 65, 2500], ids=["columns", "rows", "chunks"])
# What is put into the logits of one row: (class 0, class 1), or every class; the label is 1.
SPECIAL = {
    "nan": (NAN, 0.0),
    "nan-at-label": (0.0, NAN),
    "inf": (INF, 0.0),
    "inf-at-label": (0.0, INF),
    "-inf": (-INF, 0.0),
    "-inf-at-label": (0.0, -INF),
    "inf-and-inf": (INF, INF),
    "inf-and--inf": (INF, -INF),
    "all--inf": -INF,
    "all-inf": INF,
}


def special_logits(device, rows, classes, special, dtype=torch.float32, row=1):
    logits = torch.randn(rows, classes, device=device).to(dtype)
    if isinstance(special, tuple):
        logits[row, :2] = torch.tensor(special).to(dtype)
    else:
        logits[row] = special
    return logits


@CLASSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("special", SPECIAL.values(), ids=SPECIAL.keys())
def test_one_sample_is_torch(backend, device, special, dtype, classes):
    """Value and gradient of F.cross_entropy, NaN for NaN and infinity for infinity, example by example."""
    logits = special_logits(device, 19, classes, special, dtype)
    target = torch.ones(19, dtype=torch.int64, device=device)
    for options in ({}, {"label_smoothing": 0.1}, {"weight": torch.rand(classes, device=device) + 0.5}):
        leaf = logits.float().requires_grad_()
        expected = F.cross_entropy(leaf, target, reduction="none", **options)
        (dexpected,) = torch.autograd.grad(expected.sum(), leaf)
        loss, _, _, _, dlogits = result_of(iw.iw_cross_entropy, logits, target, 1, reduction="none", **options)
        torch.testing.assert_close(loss, expected.detach(), equal_nan=True)
        torch.testing.assert_close(dlogits, dexpected.to(dtype), equal_nan=True)


@CLASSES
def test_one_sample_is_torch_with_a_masked_class(backend, device, classes):
    """A class of probability 0 and logit -inf: torch's loss is NaN (0 * inf), its gradient is finite."""
    logits, target = torch.randn(19, classes, device=device), torch.softmax(torch.randn(19, classes, device=device), 1)
    logits[:, 2], target[:, 2] = -INF, 0.0
    leaf = logits.clone().requires_grad_()
    (dexpected,) = torch.autograd.grad(F.cross_entropy(leaf, target), leaf)
    loss, _, _, _, dlogits = result_of(iw.iw_cross_entropy, logits, target, 1)
    assert loss.isnan()
    torch.testing.assert_close(dlogits, dexpected)


@CLASSES
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, INF])
def test_nan_stays_in_its_example(backend, device, alpha, classes):
    """A NaN in one noise sample makes its example NaN and leaves the others as they are."""
    logits = torch.randn(3 * 19, classes, device=device)
    target = torch.randint(classes, (19,), device=device)
    clean = result_of(iw.iw_cross_entropy, logits, target, 3, reduction="none", alpha=alpha)
    logits[19 + 4, 2] = NAN
    got = result_of(iw.iw_cross_entropy, logits, target, 3, reduction="none", alpha=alpha)
    others = torch.arange(19, device=device) != 4
    assert got.loss[4].isnan() and got.bound[4].isnan() and got.log_p[1, 4].isnan()
    assert got.dlogits[19 + 4].isnan().all()
    assert not got.dlogits.view(3, 19, -1)[:, others].isnan().any()
    torch.testing.assert_close(got.loss[others], clean.loss[others])
    torch.testing.assert_close(got.dlogits.view(3, 19, -1)[:, others], clean.dlogits.view(3, 19, -1)[:, others])
    assert iw.iw_cross_entropy(logits, target, 3, alpha=alpha).isnan()


@CLASSES
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, INF])
def test_impossible_under_every_sample(backend, device, alpha, classes):
    """l = -inf for all samples: bound -inf, loss inf, w = 1/S, and torch's gradient, (p - q) / S."""
    logits = torch.randn(4 * 19, classes, device=device)
    target = torch.randint(classes, (19,), device=device)
    logits.view(4, 19, classes)[:, 3, target[3]] = -INF
    loss, log_p, weights, bound, dlogits = result_of(iw.iw_cross_entropy, logits, target, 4, reduction="sum", alpha=alpha)
    assert loss == INF and bound[3] == -INF and (log_p[:, 3] == -INF).all()
    assert torch.equal(weights[:, 3], torch.full((4,), 0.25, device=device))
    expected = logits.double().softmax(1) - F.one_hot(target, classes).repeat(4, 1)
    torch.testing.assert_close(dlogits.view(4, 19, -1)[:, 3], (expected / 4).float().view(4, 19, -1)[:, 3])


@CLASSES
@pytest.mark.parametrize("positions", [(), (3,)], ids=["example", "positions"])
def test_impossible_under_one_sample(backend, device, positions, classes):
    """That sample's weight is 0, and so is its gradient; alpha=0 is the mean, which is -inf."""
    logits = torch.randn(4, 19, classes, *positions, device=device)
    target = torch.ones(19, *positions, dtype=torch.int64, device=device)
    logits[2, 3, 1] = -INF
    logits = logits.flatten(0, 1)
    got = result_of(iw.iw_cross_entropy, logits, target, 4)
    assert_equals_naive(got, logits, target, 4)
    assert (got.dlogits.view(4, 19, -1)[2, 3] == 0).all()
    assert iw.iw_cross_entropy(logits, target, 4, alpha=0.0) == INF


@CLASSES
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_logits(backend, device, size, classes):
    logits = size * torch.randn(3 * 19, classes, device=device)
    target = torch.randint(classes, (19,), device=device)
    for alpha in (0.0, 1.0, INF):
        assert_equals_naive(result_of(iw.iw_cross_entropy, logits, target, 3, alpha=alpha), logits, target, 3, alpha=alpha)


@CLASSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_offset(backend, device, dtype, classes):
    """A constant on all of a row's logits changes nothing: log p is taken relative to the maximum before anything is added up."""
    logits = torch.randint(-8, 8, (3 * 19, classes), device=device).to(dtype)
    target = torch.randint(classes, (19,), device=device)
    offset = 1024 if dtype is not torch.bfloat16 else 64  # small integers stay exact
    torch.testing.assert_close(
        result_of(iw.iw_cross_entropy, logits + offset, target, 3), result_of(iw.iw_cross_entropy, logits, target, 3), rtol=0, atol=0
    )


@CLASSES
def test_weights_underflow(backend, device, classes):
    """Samples whose likelihoods are e^-10000 of the best one's: weight 0, gradient exactly 0, and the best one's as if alone."""
    logits = torch.randn(3, 19, classes, device=device)
    target = torch.randint(classes, (19,), device=device)
    logits[0].scatter_(1, target[:, None], -1e4)
    logits[2].scatter_(1, target[:, None], -1e4)
    got = result_of(iw.iw_cross_entropy, logits.flatten(0, 1), target, 3, reduction="sum")
    alone = result_of(iw.iw_cross_entropy, logits[1], target, 1, reduction="sum")
    assert (got.dlogits.view(3, 19, -1)[[0, 2]] == 0).all()
    assert got.weights.tolist() == [[0.0] * 19, [1.0] * 19, [0.0] * 19]
    torch.testing.assert_close(got.dlogits.view(3, 19, -1)[1], alone.dlogits)
    torch.testing.assert_close(got.bound, alone.bound - math.log(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [10, 100, 1000])
def test_small_differences_of_half_precision_logits(backend, device, classes, dtype):
    """Samples that differ by one step in one logit: the difference of their float32 log-likelihoods, 1e-5 of them, is kept."""
    logits = torch.randn(classes, device=device).to(dtype).repeat(2, 1)
    logits[1, 3] = logits[1, 3] * (1 + 2 * torch.finfo(dtype).eps)
    assert logits[1, 3] != logits[0, 3]
    target = torch.tensor([7], device=device)
    log_p = iw.iw_cross_entropy(logits, target, 2, return_stats=True)[1].log_p[:, 0]
    expected = logits.double().log_softmax(1)[:, 7]
    assert log_p.dtype == torch.float32
    torch.testing.assert_close((log_p[1] - log_p[0]).double(), expected[1] - expected[0], rtol=0, atol=2e-6)


def test_one_class(backend, device):
    """Whatever the logits: l = 0, loss 0, gradient 0 (with smoothing up to the rounding of (1 - e) + e, over 105 positions)."""
    logits = 100 * torch.randn(3 * 35, 1, 3, device=device)
    for kind in (torch.zeros(35, 3, dtype=torch.int64, device=device), torch.ones(35, 1, 3, device=device)):
        assert (result_of(iw.iw_cross_entropy, logits, kind, 3).dlogits == 0).all()
        loss, log_p, weights, _, dlogits = result_of(iw.iw_cross_entropy, logits, kind, 3, label_smoothing=0.1)
        assert loss == 0 and (log_p == 0).all() and (dlogits.abs() <= 2**-23 / 105).all()
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / 3))


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_many_samples(backend, device, alpha):
    logits, target = torch.randn(257 * 3, 10, device=device), torch.tensor([1, 0, 9], device=device)
    assert_equals_naive(result_of(iw.iw_cross_entropy, logits, target, 257, alpha=alpha), logits, target, 257, alpha=alpha)


def test_ignored_example_among_others(backend, device):
    logits, target = torch.randn(3 * 5, 10, 7, device=device), torch.randint(10, (5, 7), device=device)
    target[2] = -100
    got = result_of(iw.iw_cross_entropy, logits, target, 3)
    assert_equals_naive(got, logits, target, 3)
    assert got.log_p[:, 2].tolist() == [0.0] * 3 and got.bound[2] == 0
    assert (got.dlogits.unflatten(0, (3, 5))[:, 2] == 0).all()
    torch.testing.assert_close(got.weights[:, 2], torch.full((3,), 1 / 3, device=device))


@pytest.mark.parametrize("classes", [5, 100])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("wrong", [-1, 5, 100, 2**40, -(2**40)])
def test_target_out_of_range(backend, device, wrong, weighted, classes):
    if device.type != "cpu":
        pytest.skip("a device assert, after which the process is done with its device")
    if 0 <= wrong < classes:
        wrong = classes
    logits, target = torch.randn(2 * 3, classes, 4, requires_grad=True), torch.zeros(3, 4, dtype=torch.int64)
    target[1, 2] = wrong
    model, options = logits * 1, {"weight": torch.rand(classes)} if weighted else {}
    before = model.detach().clone()
    for inplace in (False, True):
        with pytest.raises(ValueError, match=rf"target: .*\[0, {classes}\).* got {wrong} in example 1"):
            iw.iw_cross_entropy(model, target, 2, ignore_index=-7, inplace=inplace, **options)
        assert torch.equal(model, before), "something was computed"


def call(rows=6, target=(3,), samples=2, logits=None, **options):
    """A call that is right, but for what is given: 6 rows of 5 classes, for 2 samples of 3 examples."""
    logits = torch.randn(rows, 5) if logits is None else logits
    target = torch.zeros(target, dtype=torch.int64) if isinstance(target, tuple) else target
    return iw.iw_cross_entropy(logits, target, samples, **options)


BAD = {
    "float-indices": (ValueError, {"target": torch.zeros(3)}, "target: expected shape .batch, 5., got .3,.*class indices are int64"),
    "classes-last": (
        ValueError,
        {"logits": torch.zeros(6, 4, 5), "target": (3, 4)},
        "target: expected shape .batch, 5., got .3, 4. for logits .6, 4, 5.. Classes are dimension 1",
    ),
    "eval": (ValueError, {"rows": 3}, "logits: expected 2 samples [*] 3 targets = 6 rows, got 3.*eval mode.*batch_dim=1"),
    "repeated-targets": (ValueError, {"target": (6,)}, "expected 2 samples [*] 6 targets = 12 rows, got 6.*targets were repeated"),
    "second-expansion": (ValueError, {"rows": 12}, "got 12.*samples.2 = 4 rows for each target.*convert one module that holds both"),
    "other-samples": (ValueError, {"rows": 15}, "got 15.*5 rows for each target: the model drew another number of samples"),
    "targets-repeated-for-one-sample": (ValueError, {"samples": 1, "rows": 3, "target": (12,)}, "got 3.*4 targets for each row.*repeated"),
    "loss-in-eval": (
        ValueError,
        {"samples": 1, "rows": 12},
        "expected 1 samples .*got 12.*4 rows for each target: the model is in training",
    ),
    "no-rows": (ValueError, {"rows": 0}, "got 0. Batches must match"),
    "no-targets": (ValueError, {"target": (0,)}, "0 targets = 0 rows, got 6. Batches must match"),
    "no-multiple": (ValueError, {"rows": 7}, "got 7.*no multiple"),
    "samples-0": (ValueError, {"samples": 0}, "samples: .*>= 1, got 0"),
    "samples-negative": (ValueError, {"samples": -2}, "samples: .*>= 1, got -2"),
    "samples-float": (TypeError, {"samples": 2.0}, "samples: expected an int, got float"),
    "samples-bool": (TypeError, {"samples": True, "rows": 3}, "samples: expected an int, got bool"),
    "logits-list": (TypeError, {"logits": [[1.0]]}, "logits: expected a tensor, got list"),
    "target-list": (TypeError, {"target": [0, 1, 2]}, "target: expected a tensor, got list"),
    "logits-int": (TypeError, {"logits": torch.zeros(6, 5, dtype=torch.int64)}, "logits: expected float32.*got torch.int64"),
    "logits-complex": (TypeError, {"logits": torch.zeros(6, 5, dtype=torch.complex64)}, "logits: .*got torch.complex64"),
    "target-int32": (TypeError, {"target": torch.zeros(3, dtype=torch.int32)}, "target: .*int64.*got torch.int32"),
    "target-bool": (TypeError, {"target": torch.zeros(3, dtype=torch.bool)}, "target: .*got torch.bool"),
    "target-device": (ValueError, {"target": torch.zeros(3, dtype=torch.int64, device="meta")}, "target: .*logits' device cpu, got meta"),
    "target-grad": (ValueError, {"target": torch.zeros(3, 5, requires_grad=True)}, "target: .*require grad"),
    "logits-1d": (ValueError, {"logits": torch.zeros(6)}, r"logits: .*got shape \(6,\)"),
    "no-classes": (ValueError, {"logits": torch.zeros(6, 0)}, r"logits: .*one class, got shape \(6, 0\)"),
    "target-0d": (ValueError, {"target": ()}, r"target: expected shape \(batch,\), got \(\)"),
    "target-2d": (ValueError, {"target": (3, 1)}, r"target: expected shape \(batch,\), got \(3, 1\)"),
    "target-positions": (ValueError, {"logits": torch.zeros(6, 5, 4, 2), "target": (3, 8)}, r"target: .*\(batch, 4, 2\), got \(3, 8\)"),
    "probability-classes": (ValueError, {"target": torch.zeros(3, 4)}, r"target: expected shape \(batch, 5\), got \(3, 4\)"),
    "weight-shape": (ValueError, {"weight": torch.ones(4)}, r"weight: expected shape \(5,\), got \(4,\)"),
    "weight-list": (TypeError, {"weight": [1.0] * 5}, "weight: expected a tensor, got list"),
    "weight-device": (ValueError, {"weight": torch.ones(5, device="meta")}, "weight: .*device cpu, got meta"),
    "weight-grad": (ValueError, {"weight": torch.ones(5, requires_grad=True)}, "weight: .*does not require grad"),
    "example-weight-shape": (ValueError, {"example_weight": torch.ones(6)}, r"example_weight: expected shape \(3,\), got \(6,\)"),
    "example-weight-grad": (ValueError, {"example_weight": torch.ones(3, requires_grad=True)}, "example_weight: .*require grad"),
    "normalizer-shape": (ValueError, {"normalizer": torch.ones(2)}, r"normalizer: .*one element, got shape \(2,\)"),
    "normalizer-negative": (ValueError, {"normalizer": -3}, "normalizer: expected a number >= 0, .*got -3"),
    "normalizer-nan": (ValueError, {"normalizer": NAN}, "normalizer: expected a number >= 0, .*got nan"),
    "normalizer-text": (TypeError, {"normalizer": "3"}, "normalizer: expected a number, got str"),
    "normalizer-of-a-sum": (
        ValueError,
        {"normalizer": 3.0, "reduction": "sum"},
        r"normalizer: expected None unless reduction is .mean., got one with .sum.",
    ),
    "reduction": (ValueError, {"reduction": "avg"}, "reduction: .*'none', 'mean' or 'sum', got 'avg'"),
    "level": (ValueError, {"level": "token"}, "level: .*'example' or 'position', got 'token'"),
    "smoothing-negative": (ValueError, {"label_smoothing": -0.1}, "label_smoothing: .*got -0.1"),
    "smoothing-large": (ValueError, {"label_smoothing": 1.1}, "label_smoothing: .*got 1.1"),
    "smoothing-none": (TypeError, {"label_smoothing": None}, "label_smoothing: .*got NoneType"),
    "alpha-negative": (ValueError, {"alpha": -1e-9}, "alpha: .*>= 0 or inf, got -1e-09"),
    "alpha-nan": (ValueError, {"alpha": NAN}, "alpha: .*got nan"),
    "alpha-text": (TypeError, {"alpha": "1"}, "alpha: .*got str"),
    "ignore-none": (TypeError, {"ignore_index": None}, "ignore_index: .*got NoneType"),
}


@pytest.mark.parametrize(("error", "wrong", "message"), BAD.values(), ids=BAD.keys())
def test_refused(backend, error, wrong, message):
    """Named: the argument, what was expected and what came."""
    device = torch.device("cpu") if backend == "cpu" else None
    if device is None and backend != "reference":
        pytest.skip("the checks are the same on every device")
    with pytest.raises(error, match=message):
        call(**wrong)


def test_the_right_call_is_not_refused():
    assert call().shape == () and call(rows=10, samples=2, target=(5,)).shape == ()


@pytest.mark.parametrize(("samples", "error"), [(0, ValueError), (-1, ValueError), (2.5, TypeError)])
def test_module_refuses_at_once(samples, error):
    with pytest.raises(error, match="samples"):
        iw.IWCrossEntropyLoss(samples)


def test_missing_backend():
    with pytest.raises(ValueError, match=r"name: expected one of reference, .*got 'tpu'"):
        iw.set_backend("tpu")
    for name, built in iw.backend_info()["built"].items():
        if not built:
            with pytest.raises(RuntimeError, match=f"{name}.*pip install"):
                iw.set_backend(name)


def test_naive_truth_is_torch():
    """The loop that all of this is held to, against torch itself where both have an answer."""
    logits, target = torch.randn(5, 10, 7, dtype=torch.float64, requires_grad=True), torch.randint(10, (5, 7))
    target[1, :3] = -100
    for options in ({}, {"label_smoothing": 0.2, "weight": torch.rand(10, dtype=torch.float64)}):
        expected = F.cross_entropy(logits, target, **options)
        got = naive_loss(logits, target, 1, **options)
        torch.testing.assert_close(got.loss, expected.detach())
        torch.testing.assert_close(got.dlogits, torch.autograd.grad(expected, logits)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_gradient_larger_than_caches(backend, device, dtype, smoothing):
    """A gradient that goes past the caches on its way to memory is the one of the batch's parts, which do not.

    Bit for bit on the CPU. On a GPU rows of a part begin at other addresses, so other threads add up other classes.
    """
    samples, classes = 2, 1003  # odd rows: vectors begin anywhere
    batch = 25 * 2**20 // (samples * classes * dtype.itemsize)
    if backend == "reference" and dtype != torch.float32:
        pytest.skip("one type shows that the parts make up the whole")
    z = torch.randn(samples, batch, classes, device=device).to(dtype)
    target = torch.randint(classes, (batch,), device=device)
    target[: 2 * 64] = torch.arange(2 * 64, device=device) % 64  # labels in the first vectors, and in the last
    target[2 * 64 : 4 * 64] = classes - 1 - torch.arange(2 * 64, device=device) % 64
    target[-3] = -100

    def gradient(first, last):
        part = z[:, first:last].flatten(0, 1).requires_grad_()
        loss = iw.iw_cross_entropy(part, target[first:last], samples, reduction="sum", label_smoothing=smoothing)
        return torch.autograd.grad(loss, part)[0].unflatten(0, (samples, -1))

    whole = gradient(0, batch)
    for first in (0, 64, 128, 192, 256, 1000, batch - 64):
        part = gradient(first, first + 64)
        # sums of 1003 terms in another order, and in 16 bits a last bit that is rounded the other way
        rtol = 1e-10 if dtype == torch.float64 else max(1e-4, 2 * torch.finfo(dtype).eps)
        close = {"rtol": 0, "atol": 0} if device.type == "cpu" else {"rtol": rtol, "atol": 1e-6}
        torch.testing.assert_close(whole[:, first : first + 64], part, **close, msg=lambda text, at=first: f"{at}: {text}")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_second_derivative_in_silence(backend, device, reduction):
    """However it is asked for: by named inputs, of the network or of the upstream gradient, or of everything."""
    w, a = torch.randn(3, 5, device=device, requires_grad=True), torch.tensor(2.0, device=device, requires_grad=True)
    x, target = torch.randn(8, 3, device=device), torch.randint(5, (4,), device=device)
    for inputs in (w, a, None):
        loss = iw.iw_cross_entropy(torch.relu(x @ w), target, 2, reduction=reduction) * a
        (first,) = torch.autograd.grad(loss.sum(), w, create_graph=True)
        with pytest.raises(RuntimeError, match="iw_cross_entropy has no second derivative"):
            first.sum().backward() if inputs is None else torch.autograd.grad(first.sum(), inputs)
