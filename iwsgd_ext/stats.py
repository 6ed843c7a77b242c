"""Statistics of the noise samples of a loss: log-likelihoods, importance weights, the bound, and a summary of them in ten numbers."""

from typing import NamedTuple

import torch
from torch import Tensor


class IWSummary(NamedTuple):
    """Statistics of one batch under S noise samples (Noh et al. 2017), as tensors without dimensions on its device. Means are over the
    examples (or positions) that count.

    Attributes:
        bound: mean bound L (eq 4), in nats.
        mean_log_p: mean log-likelihood over examples and noise samples, in nats: the objective of dropout training with one sample.
        gap: bound - mean_log_p, never negative: the gain by importance weights.
        ess: mean effective sample size, between 1 (one sample has all the weight) and S (equal weights).
        ess_p05, ess_p50, ess_p95: quantiles of the effective sample size over examples.
        entropy: mean entropy of the weights, in nats, between 0 and log S.
        largest_weight: mean over examples of the largest weight, between 1/S and 1.
        nonfinite: number of log-likelihoods that are infinite or NaN, of all examples, int64. Where it is not 0, other fields may be NaN.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> _, stats = iw.iw_cross_entropy(torch.randn(4 * 8, 10), torch.zeros(8, dtype=torch.int64), samples=4, return_stats=True)
        >>> summary = stats.summary()
        >>> bool(1 <= summary.ess <= 4), bool(summary.gap >= 0)
        (True, True)
    """

    bound: Tensor
    mean_log_p: Tensor
    gap: Tensor
    ess: Tensor
    ess_p05: Tensor
    ess_p50: Tensor
    ess_p95: Tensor
    entropy: Tensor
    largest_weight: Tensor
    nonfinite: Tensor


class IWStats(NamedTuple):
    """Statistics of each example (or position) and noise sample in a loss (Noh et al. 2017); on the logits' device, detached.

    Attributes:
        log_p: [S, B] log-likelihoods l[s, b], or [S, B, d1, ...] at level "position".
        weights: importance weights (eq 8), of the shape of log_p; they sum to one over s.
        bound: [B] (or [B, d1, ...]), the bound L (eq 4) before the outer weight.
        counted: bool, of the shape of bound, or None where all count: False for an example (at level "position", a position) that is
            ignored or has weight 0.
    """

    log_p: Tensor
    weights: Tensor
    bound: Tensor
    counted: Tensor | None = None

    @property
    def ess(self) -> Tensor:
        """Effective sample size 1 / sum_s w^2, between 1 and S, of the shape of ``bound``."""
        return 1 / self.weights.square().sum(0)

    @property
    def mean_log_p(self) -> Tensor:
        """Mean log-likelihood over the noise samples, never above ``bound`` (Jensen), of its shape."""
        return self.log_p.mean(0)

    def summary(self) -> IWSummary:
        """The summary of the examples (or positions) that count, without a wait for the device. Where none counts, means are NaN.

        Returns:
            :class:`IWSummary`.

        Example:
            >>> import torch, iwsgd_ext as iw
            >>> logits, target = torch.zeros(4 * 8, 10), torch.zeros(8, dtype=torch.int64)
            >>> summary = iw.iw_cross_entropy(logits, target, samples=4, return_stats=True)[1].summary()
            >>> float(summary.ess), float(summary.gap), int(summary.nonfinite)
            (4.0, 0.0, 0)
        """
        counted = torch.ones_like(self.bound, dtype=torch.bool) if self.counted is None else self.counted
        n = counted.sum()

        def mean(values: Tensor) -> Tensor:
            return torch.where(counted, values, 0).sum() / n

        ess, bound, mean_log_p = self.ess, mean(self.bound), mean(self.mean_log_p)
        return IWSummary(
            bound=bound,
            mean_log_p=mean_log_p,
            gap=bound - mean_log_p,
            ess=mean(ess),
            **dict(zip(("ess_p05", "ess_p50", "ess_p95"), _quantiles(ess, counted, n, (0.05, 0.5, 0.95)), strict=True)),
            entropy=mean(torch.special.entr(self.weights).sum(0)),
            largest_weight=mean(self.weights.amax(0)),
            nonfinite=(~self.log_p.isfinite()).sum(),
        )


def _quantiles(values: Tensor, counted: Tensor, n: Tensor, levels: tuple[float, ...]) -> list[Tensor]:
    """Quantiles of the n values that count, as torch.quantile (linear interpolation), which takes no more than 2^24 values."""
    if values.numel() == 0:
        return [values.new_full((), float("nan"))] * len(levels)
    ordered, result = torch.where(counted, values, float("nan")).flatten().sort().values, []  # NaN comes last
    for level in levels:
        at = level * (n - 1).clamp(min=0).double()
        low = at.floor()
        places = torch.stack([low, torch.minimum(low + 1, (n - 1).clamp(min=0))]).long()
        first, second = ordered.gather(0, places).unbind()
        result.append(torch.lerp(first, second, (at - low).to(first.dtype)))
    return result
