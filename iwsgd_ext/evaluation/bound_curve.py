"""The bound against the number of noise samples, to see how many are worth their cost."""

import math
from collections.abc import Iterable
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import as_samples, check, check_alpha
from ..training.loss import IWCrossEntropyLoss
from . import plots
from .passes import examples_of, noisy_evaluation, origin_of, passes_of
from .subsets import subset_means


class BoundCurve(NamedTuple):
    """The bound (Noh et al. 2017, eq 4) against the number of noise samples; prints as a table, and ``plot()`` draws it.

    Attributes:
        samples: 1 .. S, int64 [S].
        bound: mean bound with that many samples, in nats for each unit (an example, or a position), float64 [S].
        standard_error: standard error of ``bound`` over units, float64 [S]. The bounds of one curve share examples and samples, so that
            the errors of differences between them are smaller than this.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> curve = iw.BoundCurve(torch.tensor([1, 2]), torch.tensor([-1.5, -1.25]), torch.tensor([0.1, 0.1]))
        >>> print(curve)
         samples        bound   std. error
               1      -1.5000       0.1000
               2      -1.2500       0.1000
    """

    samples: Tensor
    bound: Tensor
    standard_error: Tensor

    def __str__(self) -> str:
        rows = zip(*(column.tolist() for column in self), strict=True)
        return "\n".join([f"{'samples':>8}{'bound':>13}{'std. error':>13}", *(f"{s:8d}{b:13.4f}{e:13.4f}" for s, b, e in rows)])

    def plot(self, ax: Any = None) -> Any:
        """Draws it, see :func:`iwsgd_ext.plots.bound`."""
        return plots.bound(self, ax)


def bound_curve(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    samples: int,
    *,
    loss_fn: Any = None,
    chunk: int | None = None,
    seed: int | Tensor | None = None,
    progress: bool = False,
) -> BoundCurve:
    """The bound with 1, 2, .. S noise samples (Noh et al. 2017, eq 4), all from one draw of S.

        bound[k] = sum_b c[b] mean over subsets A of k samples of L_A[b] / sum_b c[b],    L_A = (1/alpha) log mean_{s in A} exp(alpha l[s])

    The mean over all subsets is computed exactly (a U-statistic). So the curve never falls (eq 6, for one draw), and is an unbiased
    estimate for each k. Noise is on, all else is in eval mode, as in :func:`predict`.

    Args:
        model: a converted model, or any with noise layers of this package.
        batches: pairs (inputs of the model, targets of the loss); e.g. a DataLoader. Examples are numbered through all batches, and each
            has noise of its own.
        samples: S.
        loss_fn: an object with ``log_likelihood(outputs, targets, samples) -> (log_p [K, units], outer weight [units], denominator)``, as
            IWCrossEntropyLoss and IWLoss are; its ``alpha``, if it has one, is the bound's. None is IWCrossEntropyLoss, whatever the
            model was trained with.
        chunk: samples of one pass, to save memory.
        seed: an int or an int64 tensor of one element; None draws one.
        progress: True shows a bar over the batches; needs the package rich.

    Returns:
        :class:`BoundCurve`, on the CPU.

    Raises:
        ValueError, TypeError: an argument is not as above; there is no batch; all weights are zero.

    Warns:
        UserWarning: as :func:`predict`.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> from torch import nn
        >>> model = iw.convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)), samples=5)
        >>> data = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(4)]
        >>> curve = iw.bound_curve(model, data, samples=8)
        >>> bool((curve.bound.diff() >= 0).all())
        True
    """
    samples = as_samples(samples)
    own = loss_fn is None
    loss_fn = IWCrossEntropyLoss(samples) if own else copy(loss_fn) if isinstance(loss_fn, IWCrossEntropyLoss) else loss_fn
    if isinstance(loss_fn, IWCrossEntropyLoss):
        loss_fn.samples = samples
    if not hasattr(loss_fn, "log_likelihood"):
        raise TypeError(f"loss_fn: expected IWCrossEntropyLoss, IWLoss or an object with log_likelihood, got {type(loss_fn).__name__}")
    alpha = getattr(loss_fn, "alpha", 1.0)
    check_alpha(alpha)
    curves: list[Tensor] = []
    weights: list[Tensor] = []
    first = 0
    with noisy_evaluation(model):
        for batch in _with_bar(batches) if progress else batches:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                got = type(batch).__name__ + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
                raise TypeError(
                    f"batches: expected pairs (inputs, targets), as a DataLoader or [(x, y)] gives, got {got}; several inputs of a model "
                    "are one tuple or dict"
                )
            inputs, targets = batch
            if own and isinstance(targets, Tensor) and targets.is_floating_point() and targets.dim() > 1:
                sums = targets.detach().sum(1)
                expected = "class indices, or probabilities that sum to 1 (give loss_fn, the loss of this model, for other targets)"
                check(torch.allclose(sums, torch.ones_like(sums), atol=1e-2), "batches", f"targets that are {expected}", "other numbers")
            if seed is None:
                seed = origin_of(model, inputs, None)[:1]
            passes = passes_of(model, inputs, samples, chunk, seed, first, warn=not curves)
            parts = [loss_fn.log_likelihood(outputs, targets, k) for k, outputs in passes]
            curves.append(subset_means(torch.cat([log_p for log_p, _, _ in parts]), alpha).cpu())
            weights.append(parts[0][1].double().cpu())
            first += examples_of(model, inputs)
    if not curves:
        raise ValueError("batches: expected at least one, got none")
    curve, weight = torch.cat(curves, 1), torch.cat(weights)  # [S, units], [units]
    check(bool(((weight >= 0) & weight.isfinite()).all()), "batches", "finite weights that are not negative, to average over", "others")
    counted = weight > 0
    curve, weight = curve[:, counted], weight[counted]
    if not weight.numel():
        raise ValueError("batches: expected an example that counts, got none of a weight above 0")
    mean = ((curve * weight).sum(1) / weight.sum()).cummax(0).values  # cummax removes falls by rounding
    n = weight.numel()
    spread = ((curve - mean[:, None]) * weight).square().sum(1) * (n / (n - 1) if n > 1 else math.nan)
    return BoundCurve(torch.arange(1, samples + 1, device="cpu"), mean, spread.sqrt() / weight.sum())


def _with_bar(batches: Iterable) -> Iterable:
    try:
        from rich.progress import track
    except ImportError as error:
        raise ImportError("progress=True needs the package rich: pip install rich") from error
    return track(batches, description="bound")
