"""The bound of any likelihood: iw_logmeanexp and IWLoss over torch's criteria, against loops and against the loss op."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracle.naive_loss import bound_of, weights_of
from torch import nn

import iwsgd_ext as iw
from iwsgd_ext import reference

ALPHAS = pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.3, 1.0, 2.0, math.inf])


def naive_bound(log_p, alpha):
    """[B] from log_p [S, B], in float64, one example at a time."""
    l = log_p.cpu().double()
    return torch.stack([bound_of(list(column), alpha) for column in l.unbind(1)])


def test_by_hand(device):
    """Likelihoods 1/4 and 3/4: mean 1/2, mean square 5/16, best 3/4, geometric mean sqrt(3)/4; its gradient 1/4, 3/4."""
    log_p = torch.tensor([[0.25], [0.75]], device=device).log().requires_grad_()
    expected = {1.0: 1 / 2, 2.0: math.sqrt(5 / 16), math.inf: 3 / 4, 0.0: math.sqrt(3) / 4}
    for alpha, likelihood in expected.items():
        torch.testing.assert_close(iw.iw_logmeanexp(log_p, 2, alpha).exp().cpu(), torch.tensor([likelihood]))
    (weights,) = torch.autograd.grad(iw.iw_logmeanexp(log_p, 2).sum(), log_p)
    torch.testing.assert_close(weights.cpu(), torch.tensor([[0.25], [0.75]]))


@ALPHAS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("samples", "batch"), [(1, 5), (2, 63), (8, 35), (63, 1)], ids=str)
def test_against_the_loop(device, samples, batch, dtype, alpha):
    """Value and gradient, from [S, B] and from [S*B]; half precision is raised to float32 before anything is computed."""
    log_p = (4 * torch.randn(samples, batch, device=device)).to(dtype).requires_grad_()
    bound = iw.iw_logmeanexp(log_p, samples, alpha)
    assert bound.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(iw.iw_logmeanexp(log_p.flatten(), samples, alpha), bound)
    # 12 units of float32 rounding of l, which is below 20
    tolerance = 1e-11 if dtype is torch.float64 and alpha != 1e-6 else 3e-9 if dtype is torch.float64 else 3e-5
    torch.testing.assert_close(bound.detach().cpu().double(), naive_bound(log_p.detach(), alpha), rtol=0, atol=tolerance)
    (weights,) = torch.autograd.grad(bound.sum(), log_p)
    expected = torch.stack([torch.stack(weights_of(list(c), alpha)) for c in log_p.detach().cpu().double().unbind(1)], 1)
    tolerance = max(2 * torch.finfo(dtype).eps, 3e-11 if dtype is torch.float64 else 1e-5)
    torch.testing.assert_close(weights.cpu().double(), expected, rtol=0, atol=tolerance)


@ALPHAS
def test_derivatives(device, alpha):
    """First and second derivatives by differences in float64; alpha = 1e-6 would need differences finer than float64 has."""
    log_p = torch.randn(3, 5, device=device, dtype=torch.float64, requires_grad=True)

    def bound(x):
        return iw.iw_logmeanexp(x, 3, alpha)

    assert torch.autograd.gradcheck(bound, log_p)
    if alpha not in (0.0, math.inf):  # those are linear: their second derivative is zero, see below
        assert torch.autograd.gradgradcheck(bound, log_p, atol=1e-6)


def test_second_derivative_by_hand(device):
    """d2L / dl_s dl_r = alpha (w_s [s = r] - w_s w_r); third derivatives exist too."""
    log_p = torch.tensor([0.25, 0.75], device=device, dtype=torch.float64).log().requires_grad_()
    for alpha in (1.0, 2.0):
        w = torch.softmax(alpha * log_p.detach(), 0)
        hessian = torch.autograd.functional.hessian(lambda x, a=alpha: iw.iw_logmeanexp(x, 2, a).sum(), log_p)
        torch.testing.assert_close(hessian, alpha * (w.diag() - w[:, None] * w))
    (first,) = torch.autograd.grad(iw.iw_logmeanexp(log_p, 2).sum(), log_p, create_graph=True)
    (second,) = torch.autograd.grad(first[0], log_p, create_graph=True)
    (third,) = torch.autograd.grad(second[0], log_p)
    assert third.abs().sum() > 0.01


@ALPHAS
@pytest.mark.parametrize("samples", [1, 3])
def test_equals_the_loss_op(backend, device, samples, alpha):
    """-iw_logmeanexp of cross-entropies is iw_cross_entropy, value and gradient."""
    logits, target = torch.randn(samples * 7, 10, device=device, dtype=torch.float64), torch.randint(10, (7,), device=device)
    logits.requires_grad_()
    log_p = -F.cross_entropy(logits, target.repeat(samples), reduction="none")
    composed, op = -iw.iw_logmeanexp(log_p, samples, alpha).mean(), iw.iw_cross_entropy(logits, target, samples, alpha=alpha)
    torch.testing.assert_close(op, composed, rtol=0, atol=1e-9)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (op, composed)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0, math.inf])
def test_infinite_log_likelihoods(device, alpha):
    """One of -inf has weight 0; all of -inf give -inf and equal weights; NaN stays NaN."""
    log_p = torch.tensor([[-math.inf, -math.inf, math.nan, 0.0], [-1.0, -math.inf, 0.0, 1e30]], device=device, requires_grad=True)
    bound = iw.iw_logmeanexp(log_p, 2, alpha)
    assert bound[1] == -math.inf and bound[2].isnan() and bound[3] == 1e30
    torch.testing.assert_close(bound[0].item(), -1.0 - (0 if alpha == math.inf else math.log(2) / alpha))
    for b, expected in ((0, [0.0, 1.0]), (1, [0.5, 0.5]), (3, [0.0, 1.0])):
        (weights,) = torch.autograd.grad(bound[b], log_p, retain_graph=True)
        assert weights[:, b].tolist() == expected


@pytest.mark.parametrize(
    ("alpha", "weights"), [(0.0, [1 / 3] * 3), (0.3, [0.5, 0.0, 0.5]), (1.0, [0.5, 0.0, 0.5]), (math.inf, [1.0, 0.0, 0.0])]
)
def test_certain_samples(device, alpha, weights):
    """Log-likelihoods of +infinity, which densities have: so is the bound, and they alone share the weight. Others are as without them."""
    l = torch.tensor([[math.inf, 1.0], [0.0, 2.0], [math.inf, 3.0]], device=device, requires_grad=True)
    bound = iw.iw_logmeanexp(l, 3, alpha)
    (dl,) = torch.autograd.grad(bound.sum(), l)
    assert bound[0] == math.inf and dl[:, 0].tolist() == pytest.approx(weights)
    torch.testing.assert_close(bound[1], bound_of(l[:, 1].unbind(), alpha))
    torch.testing.assert_close(dl, reference.importance_weights(l.detach(), alpha))
    of_impossible = iw.iw_logmeanexp(torch.tensor([math.inf, -math.inf], device=device), 2, alpha)
    assert of_impossible.isnan() if alpha == 0 else of_impossible == math.inf


@pytest.mark.parametrize(
    ("error", "log_p", "samples", "alpha", "message"),
    [
        (TypeError, torch.zeros(6, dtype=torch.int64), 2, 1.0, "log_p: .*got torch.int64"),
        (ValueError, torch.zeros(6), 0, 1.0, "samples: .*got 0"),
        (ValueError, torch.zeros(6), 2, -1.0, "alpha: .*got -1.0"),
        (ValueError, torch.zeros(6), 2, math.nan, "alpha: .*got nan"),
        (ValueError, torch.zeros(7), 2, 1.0, r"log_p: .*S=2, got \(7,\)"),
        (ValueError, torch.zeros(3, 2), 2, 1.0, r"log_p: expected \[2, B\].*got \(3, 2\)$"),
        (ValueError, torch.zeros(6, 1), 2, 1.0, r"log_p: expected \[2, B\] or \[2\*B\].*got \(6, 1\).*squeeze\(1\)"),
        (ValueError, torch.zeros(2, 3, 1), 2, 1.0, r"log_p: .*got \(2, 3, 1\)"),
        (ValueError, torch.zeros(()), 2, 1.0, r"log_p: .*got \(\)"),
    ],
    ids=["int", "samples", "alpha", "alpha-nan", "rows", "order", "column", "dims", "scalar"],
)
def test_logmeanexp_refuses(error, log_p, samples, alpha, message):
    with pytest.raises(error, match=message):
        iw.iw_logmeanexp(log_p, samples, alpha)


# A criterion, its outputs of one row, and its targets of one example; every row of an output has the same elements.
CRITERIA = {
    "bernoulli": (nn.BCEWithLogitsLoss(reduction="none"), (5,), [lambda b: torch.rand(b, 5)]),
    "bernoulli-weighted": (nn.BCEWithLogitsLoss(reduction="none", pos_weight=torch.rand(5)), (4, 5), [lambda b: torch.rand(b, 4, 5)]),
    "gaussian": (nn.GaussianNLLLoss(reduction="none"), (5,), [lambda b: torch.randn(b, 5), lambda b: 0.5 + torch.rand(b, 5)]),
    "poisson": (nn.PoissonNLLLoss(reduction="none"), (3, 2), [lambda b: torch.randint(4, (b, 3, 2)).float()]),
    "categorical": (nn.CrossEntropyLoss(reduction="none"), (5, 3), [lambda b: torch.randint(5, (b, 3))]),
    "function": (lambda output, target: (output - target).square(), (), [lambda b: torch.randn(b)]),
}


def naive_iw_loss(criterion, output, targets, samples, alpha):
    """The mean over examples of minus the bound; the criterion is called on one row at a time."""
    batch = targets[0].shape[0]
    loss = 0
    for b in range(batch):
        l = [-criterion(output[s * batch + b][None], *(t[b][None] for t in targets)).sum() for s in range(samples)]
        loss = loss - bound_of(l, alpha) / batch
    return loss


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, math.inf])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
def test_criteria(device, criterion, samples, alpha):
    """Value and gradient, of the output and of a target that takes part (the variance of a Gaussian)."""
    criterion, shape, targets = CRITERIA[criterion]
    criterion = copy.deepcopy(criterion).to(device).double() if isinstance(criterion, nn.Module) else criterion
    output = torch.randn(samples * 7, *shape, device=device, dtype=torch.float64, requires_grad=True)
    targets = [make(7).to(device) for make in targets]
    targets = [t.double() if t.is_floating_point() else t for t in targets]
    leaves = [output, *(t.requires_grad_() for t in targets[1:])]
    loss, expected = iw.IWLoss(criterion, samples, alpha)(output, *targets), naive_iw_loss(criterion, output, targets, samples, alpha)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_ctc(device, alpha):
    """CTCLoss has its rows in the second dimension of its input and lengths beside its targets; they are repeated alike."""
    samples, batch, time, classes = 3, 5, 12, 6
    log_probs = torch.randn(time, samples * batch, classes, device=device, dtype=torch.float64).log_softmax(2).requires_grad_()
    target = torch.randint(1, classes, (batch, 4), device=device)
    lengths, target_lengths = torch.full((batch,), time), torch.tensor([4, 3, 2, 4, 1])
    criterion = nn.CTCLoss(reduction="none")
    loss = iw.IWLoss(criterion, samples, alpha)(log_probs, target, lengths, target_lengths)
    expected = 0
    for b in range(batch):
        l = [
            -criterion(log_probs[:, s * batch + b][:, None], target[b : b + 1], lengths[b : b + 1], target_lengths[b : b + 1]).sum()
            for s in range(samples)
        ]
        expected = expected - bound_of(l, alpha) / batch
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, log_probs), torch.autograd.grad(expected, log_probs))


def test_loss_module(device):
    """eval takes one row for each target, copies and pickles are equal, targets that are no tensors are passed on."""
    criterion = iw.IWLoss(nn.BCEWithLogitsLoss(reduction="none"), samples=3, alpha=0.5)
    output, target = torch.randn(21, 5, device=device), torch.rand(7, 5, device=device)
    for copied in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(copied(output, target), criterion(output, target))
    expected = F.binary_cross_entropy_with_logits(output[:7], target, reduction="none").sum(1).mean()
    torch.testing.assert_close(criterion.eval()(output[:7], target), expected)
    assert "samples=3" in repr(criterion) and "alpha=0.5" in repr(criterion)
    scaled = iw.IWLoss(lambda output, target, k: k * (output - target).square(), samples=3)
    torch.testing.assert_close(scaled(output, target, 2.0), scaled(output, target, torch.tensor(2.0, device=device)))
    log_p, outer, denominator = scaled.log_likelihood(output, (target, 2.0), 3)
    assert outer.tolist() == [1.0] * 7 and denominator == 7
    torch.testing.assert_close(log_p, -2 * (output.view(3, 7, 5) - target).square().sum(2))


def test_bfloat16_output(device):
    """Costs of low precision are added up in float32: over 4097 elements bfloat16 would stop growing at 256."""
    output, target = torch.ones(2, 4097, device=device, dtype=torch.bfloat16), torch.zeros(1, 4097, device=device, dtype=torch.bfloat16)
    loss = iw.IWLoss(lambda output, target: (output - target).abs(), samples=2)(output, target)
    assert loss.dtype == torch.float32 and loss == 4097


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: iw.IWLoss(nn.BCEWithLogitsLoss(), samples=2), "criterion: expected reduction='none', got 'mean'"),
        (lambda: iw.IWLoss(nn.MSELoss(reduction="none"), samples=0), "samples: .*got 0"),
        (lambda: iw.IWLoss(nn.MSELoss(reduction="none"), samples=2, alpha=-1.0), "alpha: .*got -1.0"),
        (
            lambda: iw.IWLoss(lambda o, t: (o - t).sum(), samples=2)(torch.zeros(6, 5), torch.zeros(3, 5)),
            "criterion: .*6 rows, got one number",
        ),
        (
            lambda: iw.IWLoss(lambda o, t: o.abs(), samples=2)(torch.zeros(9, 5), torch.zeros(3, 5)),
            "criterion's costs: expected 2 samples .* 3 targets = 6 rows, got 9.*3 rows for each target",
        ),
        (lambda: iw.IWLoss(nn.MSELoss(reduction="none"), samples=2)(torch.zeros(6, 5), 1.0), "targets: .*at least one tensor"),
        (
            lambda: iw.IWLoss(nn.L1Loss(reduction="none"), samples=2).log_likelihood(torch.zeros(3, 5), torch.zeros(3, 5), 2),
            r"outputs: expected 2 samples \* 3 targets = 6 rows, got 3.*eval",
        ),
        (
            lambda: iw.IWLoss(nn.BCEWithLogitsLoss(reduction="none"), samples=2).log_likelihood(torch.zeros(6, 5), torch.zeros(6, 5), 2),
            r"outputs: expected 2 samples \* 6 targets = 12 rows, got 6.*repeated",
        ),
        (
            lambda: iw.IWLoss(nn.PoissonNLLLoss(reduction="none"), samples=2)(torch.zeros(6, 1), torch.zeros(3)),
            r"targets: expected the outputs' dimensions \(6, 1\), got \(6,\) .*costs \(6, 6\)",
        ),
        (
            lambda: iw.IWLoss(nn.PoissonNLLLoss(reduction="none"), samples=2)(torch.zeros(6), torch.zeros(3, 1)),
            r"targets: expected the outputs' dimensions \(6,\), got \(6, 1\) .*costs \(6, 6\)",
        ),
        (
            lambda: iw.IWLoss(nn.BCEWithLogitsLoss(reduction="none"), samples=2)(torch.zeros(12, 5), torch.zeros(3, 5)),
            r"outputs: expected 2 samples \* 3 targets = 6 rows, got 12.*samples\^2 = 4 rows",
        ),
        (  # torch's own words where the rows are right
            lambda: iw.IWLoss(nn.BCEWithLogitsLoss(reduction="none"), samples=2)(torch.zeros(6, 5), torch.zeros(3)),
            r"^Target size \(torch.Size\(\[6\]\)\) must be the same",
        ),
    ],
    ids=range(12),
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_loss_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("criterion", "message"),
    [(nn.MSELoss, r"got the class; make one: MSELoss\(reduction='none'\)"), (3, "criterion: expected a module or function .*, got int")],
    ids=["class", "number"],
)
def test_loss_refuses_criterion(criterion, message):
    with pytest.raises(TypeError, match=message):
        iw.IWLoss(criterion, samples=2)


def test_adaptive_softmax(device):
    """Its output is the log-likelihood of each row; the loss beside it is a mean."""
    module = nn.AdaptiveLogSoftmaxWithLoss(8, 20, [5, 10]).to(device).double()
    features, target = torch.randn(3 * 4, 8, device=device, dtype=torch.float64, requires_grad=True), torch.randint(20, (4,), device=device)
    loss = iw.IWLoss(module, samples=3)(features, target)
    expected = -iw.iw_logmeanexp(module.log_prob(features).gather(1, target.repeat(3)[:, None])[:, 0], 3).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, features)[0] for x in (loss, expected)))


def test_a_criterion_that_returns_no_tensor():
    with pytest.raises(TypeError, match="criterion: expected one that returns a tensor of costs, got tuple"):
        iw.IWLoss(lambda z, y: (z, y), samples=2)(torch.zeros(6, 1), torch.zeros(3, 1))


def test_costs_larger_than_outputs(device):
    """A criterion may have more costs than outputs: only rows against rows are refused. Each of 4 rows has a mean, and 3 observations."""
    mean = torch.randn(2 * 2, 1, device=device, dtype=torch.float64)
    observed = torch.randn(2, 3, device=device, dtype=torch.float64)
    loss = iw.IWLoss(lambda output, target: (output - target).square(), samples=2)(mean, observed)
    want = 0.0
    for b in range(2):
        l = [-sum((mean[s * 2 + b, 0].item() - v) ** 2 for v in observed[b].tolist()) for s in range(2)]
        want -= math.log((math.exp(l[0]) + math.exp(l[1])) / 2) / 2
    assert loss.item() == pytest.approx(want, rel=1e-12)
