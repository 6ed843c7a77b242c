"""iw.backward: what it refuses, and in which words."""

import pytest
import torch
from torch import nn

import iwsgd_ext as iw
from iwsgd_ext.layers.context import current

B = 5
MODEL = iw.convert(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)), 2, expand="first")
X, Y = torch.zeros(B, 6), torch.zeros(B, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"strategy": "streaming"}, "strategy: expected one of batched, streamed, resampled, loop, got 'streaming'"),
        (ValueError, {"strategy": None}, "strategy: .*got None"),
        (ValueError, {"samples": 0}, "samples: .*got 0"),
        (TypeError, {"samples": 2.0}, "samples: expected an int, got float"),
        (ValueError, {"strategy": "streamed", "chunk": 5}, r"chunk: expected a number of samples in 1 .. samples=4, got 5"),
        (ValueError, {"strategy": "resampled", "chunk": 0}, "chunk: .*got 0"),
        (TypeError, {"strategy": "streamed", "chunk": 2.0}, "chunk: expected an int, got float"),
        (ValueError, {"chunk": 2}, "chunk: expected None with strategy='batched', got 2"),
        (ValueError, {"strategy": "loop", "chunk": 1}, "chunk: expected None with strategy='loop'"),
        (ValueError, {"strategy": "streamed", "keep": 2}, "keep: expected 1 with strategy='streamed', got 2"),
        (ValueError, {"strategy": "resampled", "keep": 0}, "keep: expected an integer >= 1, got 0"),
        (TypeError, {"strategy": "resampled", "keep": True}, "keep: expected an int, got bool"),
        (TypeError, {"strategy": "resampled", "keep": None}, "keep: expected an int, got NoneType"),
        (TypeError, {"seed": 1.0}, "seed: expected an int"),
        (TypeError, {"first_example": "0"}, "first_example: expected an int"),
        (TypeError, {"grad_scale": "2"}, "grad_scale: expected a number, got str"),
        (ValueError, {"grad_scale": torch.ones(2)}, r"grad_scale: expected a tensor of one element, got shape \(2,\)"),
        (TypeError, {"loss_fn": nn.CrossEntropyLoss()}, "loss_fn: expected IWCrossEntropyLoss, .*got CrossEntropyLoss"),
        (ValueError, {"loss_fn": iw.IWCrossEntropyLoss(4, reduction="none")}, "loss_fn: expected reduction 'mean' or 'sum'"),
        (ValueError, {"loss_fn": iw.IWCrossEntropyLoss(4, process_group="a group")}, "loss_fn: expected process_group=None"),
        (ValueError, {"targets": Y[:3]}, "outputs: expected 4 samples"),
        (TypeError, {"targets": (Y, Y)}, "argument"),
        (TypeError, {"targets": {"target": Y, "alpha": 0.0}}, "alpha"),
        (TypeError, {"targets": {"target": Y, "alpha": 0.0}, "strategy": "streamed"}, "alpha"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else None,
)
def test_refuses(error, options, message):
    arguments = {"model": MODEL, "loss_fn": iw.IWCrossEntropyLoss(4), "inputs": X, "targets": Y, "samples": 4, **options}
    with pytest.raises(error, match=message):
        iw.backward(**arguments)
    assert current() is None


@pytest.mark.parametrize("terms", [lambda log_p: log_p, lambda log_p: (log_p, log_p[0]), lambda log_p: [log_p, log_p[0], 1]])
def test_refuses_what_is_no_triple(terms):
    class Loss:
        def log_likelihood(self, outputs, targets, samples):
            return terms(outputs.sum(1).view(samples, -1))

    with pytest.raises(TypeError, match="loss_fn: expected log_likelihood to return"):
        iw.backward(MODEL, Loss(), X, Y, samples=4)


@pytest.mark.parametrize(
    "terms", [lambda log_p: (log_p.flatten(), log_p[0], 1), lambda log_p: (log_p, log_p, 1), lambda log_p: (log_p[:1], log_p[0], 1)]
)
def test_refuses_wrong_shapes(terms):
    class Loss:
        def log_likelihood(self, outputs, targets, samples):
            return terms(outputs.sum(1).view(samples, -1))

    with pytest.raises(ValueError, match=r"log_p \[4, units\] and outer weight \[units\], got \("):
        iw.backward(MODEL, Loss(), X, Y, samples=4)


class Tempered(iw.IWCrossEntropyLoss):
    def log_likelihood(self, outputs, targets, samples):
        return super().log_likelihood(outputs / 4, targets, samples)


class TemperedWithPenalty(Tempered):
    def penalty(self, outputs, targets, samples):
        return super().penalty(outputs / 4, targets, samples)


@pytest.mark.parametrize("strategy", ["batched", "streamed"])
def test_refuses_a_penalty_of_other_logits(strategy):
    """A class whose logits are not the model's outputs says so for both terms of the loss."""
    with pytest.raises(ValueError, match=r"lse_square_scale: expected 0, or a class that overrides penalty, too.*got Tempered"):
        iw.backward(MODEL, Tempered(4, lse_square_scale=0.1), X, Y, samples=4, strategy=strategy)
    loss = iw.backward(MODEL, TemperedWithPenalty(4, lse_square_scale=0.1), X, Y, samples=4, strategy=strategy, seed=1)
    with iw.sampling(4, seed=1):
        outputs = MODEL(X)
    torch.testing.assert_close(loss, iw.iw_cross_entropy(outputs / 4, Y, 4, lse_square_scale=0.1).detach())


def test_refuses_an_open_context():
    with iw.sampling(4), pytest.raises(ValueError, match="opens its own sampling context"):
        iw.backward(MODEL, iw.IWCrossEntropyLoss(4), X, Y, samples=4)


def test_refuses_a_loss_of_positions_where_examples_are_drawn():
    model = iw.convert(nn.Sequential(nn.Dropout(0.5), nn.Conv1d(3, 4, 1)), 2, expand="first")
    target = torch.zeros(B, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match="level='example'"):
        iw.backward(model, iw.IWCrossEntropyLoss(4, level="position"), torch.ones(B, 3, 6), target, samples=4, strategy="resampled")


def test_refuses_to_draw_samples_of_rows_that_are_no_examples():
    """Two tokens of each example in the rows: the noise has ids for examples, and rows are twice as many."""

    class Tokens(nn.Sequential):
        def forward(self, x):
            return super().forward(x.unflatten(1, (2, 3)).flatten(0, 1)).unflatten(0, (-1, 2)).sum(1)

    model = iw.convert(Tokens(nn.Dropout(0.5), nn.Linear(3, 3)), 2)
    with pytest.raises(ValueError, match=r"sample_ids: .* 2 rows of each example .* do not tell apart: .* other than 'resampled'"):
        iw.backward(model, iw.IWCrossEntropyLoss(4), X, Y, samples=4, strategy="resampled")


@pytest.mark.parametrize("strategy", ["loop", "streamed", "resampled"])
def test_refuses_inputs_changed_in_place(strategy):
    class InPlace(nn.Sequential):
        def forward(self, x):
            return super().forward(x.mul_(2.0))

    model = InPlace(nn.Linear(6, 8), iw.IWDropout(0.5), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=f"inputs: strategy='{strategy}' reads them again"):
        iw.backward(model, iw.IWCrossEntropyLoss(4), X.clone(), Y, samples=4, strategy=strategy)
