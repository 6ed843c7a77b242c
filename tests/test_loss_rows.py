"""The losses read off an output's rows how many noise samples it holds, so that a script need not switch their mode."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import iwsgd_ext as iw

S, B, C = 3, 4, 5
LOSSES = {
    "cross-entropy": lambda **options: iw.IWCrossEntropyLoss(S, **options),
    "criterion": lambda **options: iw.IWLoss(nn.CrossEntropyLoss(reduction="none"), S, **options),
}


@pytest.fixture(params=LOSSES)
def make(request):
    return LOSSES[request.param]


@pytest.fixture
def target(device):
    return torch.randint(C, (B,), device=device)


def test_rows_say_how_many_samples(make, target, device):
    """S*B rows are S samples, B rows one; in training mode and in eval mode."""
    logits = torch.randn(S * B, C, device=device)
    for criterion in (make(), make().eval()):
        torch.testing.assert_close(criterion(logits, target), iw.iw_cross_entropy(logits, target, S))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # there is nothing to say of an output that nobody trains on
            torch.testing.assert_close(criterion(logits[:B], target), F.cross_entropy(logits[:B], target))


def test_ctc_has_its_rows_second(device):
    outputs = torch.randn(7, S * B, C, device=device).log_softmax(2)
    targets = torch.randint(1, C, (B, 3)), torch.full((B,), 7), torch.full((B,), 3)
    criterion, inner = iw.IWLoss(nn.CTCLoss(reduction="none"), S), nn.CTCLoss(reduction="none")
    torch.testing.assert_close(criterion(outputs[:, :B], *targets), inner(outputs[:, :B], *targets).mean())
    assert criterion(outputs, *targets) != criterion(outputs[:, :B], *targets)


@pytest.mark.parametrize("rows", [0, 1, 2 * B, S * B + 1, S * S * B])
def test_other_rows_are_refused(make, target, device, rows):
    with pytest.raises(ValueError, match=f"expected {S} samples . {B} targets = {S * B} rows, got {rows}"):
        make()(torch.randn(rows, C, device=device), target)


def test_one_row_for_each_target_in_training_is_told(make, target, device):
    """A model that was not converted, or targets that were repeated, train on the loss of one sample."""
    logits = torch.randn(S * B, C, device=device, requires_grad=True)
    for rows, labels in ((logits[:B], target), (logits, target.repeat(S))):
        with pytest.warns(UserWarning, match=f"one row for each target, although samples={S}.*targets were repeated.*not converted"):
            make()(rows, labels).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make().eval()(logits[:B], target)
        with torch.no_grad():
            make()(logits[:B], target)
        iw.IWCrossEntropyLoss(1)(logits[:B], target)


def test_a_model_that_draws_samples_may_be_evaluated_with_gradients(make, target, device):
    """One row for each target is an evaluation then, with no_grad or without."""
    logits, criterion = torch.randn(S * B, C, device=device, requires_grad=True), make()
    criterion(logits, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(logits[:B], target)


def test_observers_see_training_alone(make, target, device):
    logits, seen, criterion = torch.randn(S * B, C, device=device), [], make()
    criterion.observers.append(seen.append)
    criterion(logits, target)
    criterion(logits[:B], target)
    criterion.eval()(logits, target)
    assert len(seen) == 1 and seen[0].log_p.shape == (S, B)


def test_statistics_of_either(make, target, device):
    logits, criterion = torch.randn(S * B, C, device=device), make(return_stats=True)
    assert criterion(logits, target)[1].weights.shape == (S, B)
    assert criterion(logits[:B], target)[1].weights.shape == (1, B)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "class_dim"), [((C,), 1), ((C, 2, 3), 1), ((2, C), -1)], ids=str)
def test_log_predictive(device, shape, class_dim, dtype):
    """The log of the mean probability, of S*B rows and of B."""
    logits = torch.randn(S * B, *shape, device=device, dtype=dtype)
    got = iw.log_predictive(logits, B, class_dim=class_dim)
    p = logits.double().softmax(class_dim)
    expected = torch.stack([p[s * B : (s + 1) * B] for s in range(S)]).mean(0).log()
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(iw.log_predictive(logits[:B], B, class_dim=class_dim).double(), p[:B].log(), rtol=1e-5, atol=1e-5)


def test_log_predictive_is_predict(device):
    model = iw.convert(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, C)), S, example_inputs=torch.ones(B, 6)).to(device)
    x = torch.randn(B, 6, device=device)
    with iw.sampling(S, seed=2):
        logits = model(x)
    torch.testing.assert_close(iw.log_predictive(logits, B), iw.predict(model, x, samples=S, seed=2))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "logits: expected a multiple of batch=5 rows, got 12 rows", lambda: iw.log_predictive(torch.randn(12, 3), 5)),
        (ValueError, "logits: expected a multiple of batch=0 rows, got 12 rows", lambda: iw.log_predictive(torch.randn(12, 3), 0)),
        (ValueError, "logits: expected logits of two classes or more", lambda: iw.log_predictive(torch.randn(12, 1), 4)),
        (TypeError, "logits: expected a floating-point tensor, got torch.int64", lambda: iw.log_predictive(torch.ones(12, 3).long(), 4)),
        (TypeError, "batch: expected an int, got Tensor", lambda: iw.log_predictive(torch.randn(12, 3), torch.ones(4))),
    ],
    ids=range(5),
)
def test_log_predictive_refuses(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_outputs_that_are_no_tensor():
    """S is that of any tensor in them that has the rows; without one, the loss's mode decides."""
    normal = torch.distributions.Normal
    criterion = iw.IWLoss(lambda output, target: -output.log_prob(target), S)
    x, y = torch.zeros(S * B, 2), torch.randn(B, 2)
    assert criterion(normal(x, x + 1), y).isfinite()
    torch.testing.assert_close(criterion.eval()(normal(x[:B], x[:B] + 1), y), -normal(0.0, 1.0).log_prob(y).sum(1).mean())
    of_parts = iw.IWLoss(
        lambda output, target: F.gaussian_nll_loss(output[1], target, output[0].exp().expand_as(output[1]), reduction="none"), S
    )
    assert of_parts((torch.zeros(B), torch.randn(S * B, B)), torch.randn(B, B)).isfinite()


def test_a_training_step_is_no_evaluation():
    """iw.backward refuses the rows of a model that draws no samples."""
    model = nn.Sequential(nn.Linear(6, C), nn.Dropout(0.5))
    with pytest.raises(ValueError, match=f"outputs: expected {S} samples . {B} targets"):
        iw.backward(model, iw.IWCrossEntropyLoss(S), torch.randn(B, 6), torch.randint(C, (B,)), samples=S)
