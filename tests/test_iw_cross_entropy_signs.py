"""The loss op under weights of any sign, rewards and advantages among them, weights that cancel, and infinite ones."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracle.naive_loss import assert_equals_naive, naive_loss, result_of
from torch import nn

import iwsgd_ext as iw

SIZES = {
    "columns": (3, 5, 10, ()),
    "rows": (3, 5, 70, ()),
    "image": (2, 3, 10, (2, 3)),
    "long": (2, 2, 70, (9,)),
    "chunks": (2, 3, 2500, ()),
}
KINDS = ["labels", "smoothed", "probabilities"]


def data(device, size, kind="labels", dtype=torch.float64):
    samples, batch, classes, positions = SIZES[size]
    logits = torch.randn(samples * batch, classes, *positions, device=device, dtype=dtype)
    if kind == "probabilities":
        return logits, torch.randn(batch, classes, *positions, device=device, dtype=dtype), samples, {}
    return logits, torch.randint(classes, (batch, *positions), device=device), samples, {"label_smoothing": 0.1 * (kind == "smoothed")}


def check(logits, target, samples, **options):
    assert_equals_naive(result_of(iw.iw_cross_entropy, logits, target, samples, **options), logits, target, samples, **options)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, math.inf])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_rewards_of_positions(backend, device, size, kind, alpha):
    """Each position has a reward of its own and a log-likelihood of its own; those of probabilities add up to any sign, too."""
    logits, target, samples, options = data(device, size, kind)
    rewards = torch.randn(target.shape[0], *logits.shape[2:], device=device, dtype=torch.float64)
    rewards.view(-1)[0] = 0
    for reduction in ("sum", "none"):
        check(logits, target, samples, example_weight=rewards, level="position", reduction=reduction, alpha=alpha, **options)
    check(logits, target, samples, example_weight=rewards, level="position", normalizer=3.0, alpha=alpha, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_rewards_in_lower_precision(backend, device, size, dtype):
    logits, target, samples, _ = data(device, size, dtype=dtype)
    rewards = torch.randn(target.shape, device=device)
    check(logits, target, samples, example_weight=rewards, level="position", reduction="sum")


@pytest.mark.parametrize("level", ["example", "position"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_negative_weights(backend, device, size, kind, level):
    """Of examples, in any mixture; and of all classes, or of all positions of an example, whose mean is then negative."""
    logits, target, samples, options = data(device, size, kind)
    if kind == "probabilities":
        target = target.softmax(1)
    of_examples = torch.randn(target.shape[0], device=device, dtype=torch.float64)
    for weights in (
        {"example_weight": of_examples},
        {"weight": -torch.rand(logits.shape[1], device=device, dtype=torch.float64) - 0.1},
        {"example_weight": of_examples.view(-1, *[1] * (logits.dim() - 2)).expand(target.shape[0], *logits.shape[2:])},
    ):
        check(logits, target, samples, reduction="sum", level=level, **weights, **options)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_one_sample_is_torch(backend, device, size, kind, reduction):
    """Class weights of both signs. With one sample there is nothing to share, so that positions of both signs are fine at either level."""
    logits, target, _, options = data(device, size, kind)
    logits, options = logits[: target.shape[0]], {**options, "reduction": reduction}
    weight = torch.randn(logits.shape[1], device=device, dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    expected = F.cross_entropy(leaf, target, weight, **options)
    (dexpected,) = torch.autograd.grad(expected.sum(), leaf)
    for level in ("example", "position"):
        value = expected.flatten(1).sum(1) if reduction == "none" and level == "example" and logits.dim() > 2 else expected
        loss, _, _, _, dlogits = result_of(iw.iw_cross_entropy, logits, target, 1, weight=weight, level=level, **options)
        torch.testing.assert_close((loss, dlogits), (value.detach(), dexpected))


def test_the_case_of_the_definition(backend, device):
    logits, target = torch.tensor([[2.0, 0.0, 0.0]], device=device), torch.tensor([0], device=device)
    loss = iw.iw_cross_entropy(logits, target, 1, weight=torch.tensor([-1.0, 1, 1], device=device), reduction="sum")
    torch.testing.assert_close(loss, torch.tensor(-0.2395, device=device), rtol=0, atol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("size", ["image", "long"])
def test_positions_of_both_signs(device, size, alpha):
    """They share no importance weights, which the plain mean over samples, and one sample, do not ask of them."""
    logits, target, samples, _ = data(device, size)
    rewards = torch.ones(target.shape, device=device, dtype=torch.float64)
    rewards.view(len(target), -1)[1, 0] = -0.5
    rows = logits[: len(target)]
    check(rows, target, 1, example_weight=rewards, reduction="sum")
    if alpha == 0:
        return check(logits, target, samples, example_weight=rewards, reduction="sum", alpha=0.0)
    if device.type != "cpu":
        pytest.skip("an assertion on a GPU ends the process")
    for backend in ("cpu", "reference"):
        if not iw.backend_info()["built"][backend]:
            continue
        before = iw.backend_info()["forced"]
        iw.set_backend(backend)
        try:
            with pytest.raises(ValueError, match=r"positions of one sign in example 1.*level='position', with reduction"):
                iw.iw_cross_entropy(logits, target, samples, example_weight=rewards, reduction="sum")
            with pytest.raises(ValueError, match="positions of one sign"):
                iw.IWCrossEntropyLoss(samples, reduction="sum").log_likelihood(rows, {"target": target, "example_weight": rewards}, 1)
        finally:
            iw.set_backend(before)


@pytest.mark.parametrize("size", SIZES)
def test_terms_that_cancel(backend, device, size):
    """Probabilities that add up to 0 and are not 0 have no log-likelihood: refused where that costs no wait, else NaN."""
    logits, target, samples, _ = data(device, size, "probabilities")
    target = torch.zeros_like(target)
    target[0, 0], target[0, 1] = 1, -1
    if backend in ("cpu", "reference") and device.type == "cpu":
        for level in ("example", "position"):
            with pytest.raises(ValueError, match=r"do not cancel in example 0.*add up to 0"):
                iw.iw_cross_entropy(logits, target, samples, level=level)
    else:
        loss = iw.iw_cross_entropy(logits, target, samples, level="position", reduction="none")
        assert loss[0].isnan().all() and not loss[1:].any()
    target[0, :2] = 0  # nothing at all: no weight
    assert iw.iw_cross_entropy(logits, target, samples).item() == 0


def test_weights_that_cancel_in_the_mean(backend, device):
    """A mean over weights that are not 0 and add up to 0 is a division by 0, as in torch, and not the 0 of nothing that counts."""
    for dtype in (torch.float64, torch.float32, torch.float16):
        logits, target = torch.randn(4, 5, device=device, dtype=dtype), torch.tensor([0, 1, 0, 1], device=device)
        weight = torch.tensor([1.0, -1, 0, 0, 0], device=device)
        assert not F.cross_entropy(logits.float(), target, weight).isfinite()
        loss, _, _, _, dlogits = result_of(iw.iw_cross_entropy, logits, target, 1, weight=weight)
        assert not loss.isfinite() and not dlogits.isfinite().any()
        assert iw.iw_cross_entropy(logits, target, 1, weight=weight * 0).item() == 0
        log_p, outer, denominator = iw.IWCrossEntropyLoss(1, weight=weight).log_likelihood(logits, target, 1)
        assert not (-(outer * log_p).sum() / denominator).isfinite()


@pytest.mark.parametrize("level", ["example", "position"])
@pytest.mark.parametrize("positions", [(), (3,)], ids=str)
def test_the_mean_takes_no_rewards(device, level, positions):
    """Their sum may be anything: where it is negative, a mean over it would lower the likelihoods that are rewarded."""
    logits, target = torch.randn(2 * 4, 5, *positions, device=device), torch.randint(5, (4, *positions), device=device)
    rewards, criterion = -torch.rand(4, *positions, device=device) - 0.1, iw.IWCrossEntropyLoss(2, level=level)
    if device.type == "cpu":
        for call in (
            lambda: criterion(logits, target, example_weight=rewards),
            lambda: criterion.log_likelihood(logits, {"target": target, "example_weight": rewards}, 2),
            lambda: torch.func.grad(lambda z: criterion(z, target, example_weight=rewards))(logits),
        ):
            with pytest.raises(ValueError, match=r"example_weight: expected none below 0 .*reduction='sum', or normalizer="):
                call()
    check(logits, target, 2, level=level, example_weight=rewards, normalizer=target.numel())
    check(logits, target, 2, level=level, example_weight=rewards.relu(), reduction="mean")


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("classes", [10, 70])
def test_infinite_class_weight(backend, device, classes, reduction):
    """Infinity and NaN as torch's; a class of infinite weight that nobody has changes nothing."""
    logits, target = torch.randn(6, classes, device=device), torch.tensor([0, 1, 2, 3, 4, 5], device=device)
    weight = torch.ones(classes, device=device)
    for infinite in (2, classes - 1):
        weight[infinite] = math.inf
        leaf = logits.clone().requires_grad_()
        expected = F.cross_entropy(leaf, target, weight, reduction=reduction)
        (dexpected,) = torch.autograd.grad(expected.sum(), leaf)
        loss, _, _, _, dlogits = result_of(iw.iw_cross_entropy, logits, target, 1, weight=weight, reduction=reduction)
        torch.testing.assert_close((loss, dlogits), (expected.detach(), dexpected), equal_nan=True)
        log_p, outer, denominator = iw.IWCrossEntropyLoss(1, weight=weight, reduction=reduction).log_likelihood(logits, target, 1)
        cost = -(outer * log_p[0]) / denominator
        torch.testing.assert_close(cost if reduction == "none" else cost.sum(), expected.detach(), equal_nan=True)
        weight[infinite] = 1


@pytest.mark.parametrize("classes", [10, 70])
def test_a_log_likelihood_of_infinity(backend, device, classes):
    """A negative term on a class of logit -infinity. One sample is torch's, value and gradient; of several those alone have weight."""
    logits, target = torch.randn(6, classes, device=device), torch.zeros(2, classes, device=device)
    target[:, 0], target[:, 1], target[:, 2] = 0.9, 0.3, -0.2
    logits[:4, 2] = -math.inf
    leaf = logits[:2].clone().requires_grad_()
    expected = F.cross_entropy(leaf, target)
    loss, _, weights, bound, dlogits = result_of(iw.iw_cross_entropy, logits[:2], target, 1)
    assert loss == expected == -math.inf and bound.tolist() == [math.inf] * 2 and weights.tolist() == [[1.0, 1.0]]
    torch.testing.assert_close(dlogits, torch.autograd.grad(expected, leaf)[0])
    for alpha, shares in ((0.5, [0.5, 0.5, 0.0]), (1.0, [0.5, 0.5, 0.0]), (math.inf, [1.0, 0.0, 0.0])):
        _, _, weights, bound, dlogits = result_of(iw.iw_cross_entropy, logits, target, 3, alpha=alpha)
        assert weights[:, 0].tolist() == shares and bound.tolist() == [math.inf] * 2
        assert dlogits.isfinite().all() and not dlogits[4:].any()


def test_derivatives_of_functions_are_those_of_the_op(device):
    """Under torch.func ignored rows get 0 whatever they hold, and terms that cancel give NaN, not 0."""
    logits = torch.randn(2 * 3, 5, device=device, dtype=torch.float64)
    target = torch.tensor([0, -100, 3], device=device)
    logits[1], logits[4] = math.nan, math.inf
    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(iw.iw_cross_entropy(leaf, target, 2), leaf)
    got = torch.func.grad(lambda z: iw.iw_cross_entropy(z, target, 2))(logits)
    torch.testing.assert_close(got, expected)
    cancelling = torch.tensor([[0.5, -0.5, 0, 0, 0]] * 3, device=device, dtype=torch.float64)
    assert torch.func.grad(lambda z: iw.iw_cross_entropy(z, cancelling, 2))(logits[:1].expand(6, 5))[:, :2].isnan().all()


@pytest.mark.parametrize("strategy", ["batched", "streamed", "loop"])
def test_the_strategies_take_rewards(device, strategy):
    """The gradient of a model under every strategy is that of the loss itself."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 3)).double().to(device)
    x, y = torch.randn(5, 6, device=device, dtype=torch.float64), torch.randint(3, (5,), device=device)
    iw.convert(model, 4, example_inputs=x)
    rewards = torch.tensor([1.0, -2.0, 0.5, -0.1, 0.0], device=device, dtype=torch.float64)
    criterion, targets = iw.IWCrossEntropyLoss(4, reduction="sum"), {"target": y, "example_weight": rewards}
    iw.backward(model, criterion, x, targets, samples=4, seed=3, strategy=strategy)
    with iw.sampling(4, seed=3):
        logits = model(x)
    expected = naive_loss(logits, y, 4, example_weight=rewards, reduction="sum")
    (dweight,) = torch.autograd.grad(logits, model[0].weight, expected.dlogits.to(device))
    torch.testing.assert_close(model[0].weight.grad, dweight)


def test_under_vmap(device):
    """Examples of a vmap: what plain calls give, and NaN for positions of both signs, as transforms cannot raise by values."""
    z, y = torch.randn(4, 6, 3, 2, device=device), torch.randint(3, (4, 2, 2), device=device)
    got = torch.vmap(lambda z, y: iw.iw_cross_entropy(z, y, 3))(z, y)
    torch.testing.assert_close(got, torch.stack([iw.iw_cross_entropy(a, b, 3) for a, b in zip(z, y, strict=True)]))
    rewards = torch.ones(4, 2, 2, device=device)
    rewards[1, 0, 0] = -0.5
    got = torch.vmap(lambda z, y, w: iw.iw_cross_entropy(z, y, 3, example_weight=w, reduction="sum"))(z, y, rewards)
    assert got.isnan().tolist() == [False, True, False, False]
    if device.type == "cpu":
        with pytest.raises(ValueError, match="positions of one sign in example 0"):  # a gradient's values are there
            torch.func.grad(lambda z: iw.iw_cross_entropy(z, y[1], 3, example_weight=rewards[1], reduction="sum"))(z[1])


@pytest.mark.parametrize("strategy", ["batched", "streamed", "loop"])
def test_strategies_refuse_positions_of_both_signs(strategy):
    """Whatever number of samples the loss was made with."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Unflatten(1, (4, 2)))
    iw.convert(model, 3, example_inputs=torch.ones(4, 6))
    criterion = iw.IWCrossEntropyLoss(1, weight=torch.tensor([1.0, -0.5, 2, 3]))
    with pytest.raises(ValueError, match="positions of one sign"):
        iw.backward(model, criterion, torch.randn(4, 6), torch.tensor([[0, 1]] * 4), samples=3, strategy=strategy)


def test_a_bound_curve_takes_no_negative_weights():
    model = iw.convert(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)), 3)
    targets = {"target": torch.tensor([0, 1]), "example_weight": torch.tensor([1.0, -1.0])}
    with pytest.raises(ValueError, match="batches: expected finite weights that are not negative"):
        iw.bound_curve(model, [(torch.randn(2, 6), targets)], 2, loss_fn=iw.IWCrossEntropyLoss(2, reduction="sum"))
