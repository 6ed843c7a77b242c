"""What a model is worth on the test examples: error, likelihood, calibration; with noise on, the bound."""

from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import iwsgd_ext as iw

ENSEMBLE = 16  # noise samples of the ensemble that every method is measured by
BINS = 15  # of the calibration error, as in Guo et al. 2017


def autocast(settings: Namespace):
    if settings.amp == "off":
        return nullcontext()
    return torch.autocast(torch.device(settings.device).type, getattr(torch, settings.amp))


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], settings: Namespace) -> dict[str, float]:
    """Noise off, one pass. error: % of the targets; nll: mean -log p(y | x) in nats; ece: expected calibration error in %.

    ece = sum over bins of (targets in the bin / all) |accuracy - mean confidence|, 15 bins of equal width of the largest probability.
    Sums are float64 on the device, which is asked once at the end.
    """
    training = model.training
    model.eval()
    sums: Tensor | None = None
    try:
        for x, y in batches:
            with autocast(settings):
                logits = model(x)
            logits = logits.double().movedim(1, -1).flatten(0, -2)
            target = y.flatten()
            confidence, predicted = logits.softmax(-1).max(-1)
            right = (predicted == target).double()
            where = F.one_hot((confidence * BINS).ceil().long().clamp(1, BINS) - 1, BINS).double()
            totals = torch.stack([right.new_full((), target.numel()), right.sum(), F.cross_entropy(logits, target, reduction="sum")])
            found = torch.cat([totals, right @ where - confidence @ where])
            sums = found if sums is None else sums + found
    finally:
        model.train(training)
    if sums is None:
        raise ValueError("batches: expected at least one")
    targets, right, nll, *off = sums.tolist()
    return {"error": 100 * (1 - right / targets), "nll": nll / targets, "ece": 100 * sum(map(abs, off)) / targets}


def noisy(model: nn.Module, batches: Callable[[], Iterable[tuple[Tensor, Tensor]]], settings: Namespace) -> dict[str, float]:
    """Noise on, BatchNorm by its running statistics.

    test_bound: the bound with the training's S noise samples (Noh et al. 2017, eq 4), in nats a unit: an example, or at level "position" a
    position; test_mean_log_p: the same with one sample. ensemble_nll: -log of the probability averaged over 16 noise samples, in nats a
    target, whatever S was.
    """

    def curve(samples: int, level: str) -> Tensor:
        with autocast(settings):
            return iw.bound_curve(model, batches(), samples, loss_fn=iw.IWCrossEntropyLoss(samples, level=level), seed=0).bound

    of_training = curve(settings.samples, settings.level)
    return {
        "test_bound": of_training[-1].item(),
        "test_mean_log_p": of_training[0].item(),
        "ensemble_nll": -curve(ENSEMBLE, "position")[-1].item(),
    }
