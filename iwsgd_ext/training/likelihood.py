"""Any likelihood: the bound from log-likelihoods that somebody else computed, and from torch's per-element criteria."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import reference
from ..checks import ONE_ROW, as_arguments, as_samples, check_alpha, check_rows
from ..stats import IWStats


def iw_logmeanexp(log_p: Tensor, samples: int, alpha: float = 1.0) -> Tensor:
    """The bound of any likelihood: L[b] = (1/alpha) (logsumexp_s(alpha log_p[s, b]) - log S) (Noh et al. 2017, eq 4).

    Its gradient is the importance weights softmax_s(alpha log_p) (eq 8); plain torch, any number of derivatives.

    Args:
        log_p: log-likelihoods, [S*B] sample-major or [S, B], floating-point; lower precision than float32 is raised to it.
        samples: S.
        alpha: 1 is IWSGD, 0 the mean over samples, inf the best sample.

    Returns:
        [B], float32 (float64 for float64). Minimise ``-iw_logmeanexp(...).mean()``.

    Raises:
        ValueError: a size that does not fit, alpha < 0.
        TypeError: log_p is not floating-point.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> iw.iw_logmeanexp(torch.log(torch.tensor([[0.2, 0.5], [0.4, 0.5]])), samples=2).exp()
        tensor([0.3000, 0.5000])
    """
    if not log_p.is_floating_point():
        raise TypeError(f"log_p: expected floating-point log-likelihoods, got {log_p.dtype}")
    samples = as_samples(samples)
    check_alpha(alpha)
    if log_p.dim() == 2 and log_p.shape[0] != samples:
        hint = "; one number for each example is wanted, summed over its parts: log_p.sum(1), or log_p.squeeze(1) of one part"
        hint = hint if log_p.shape[0] % samples == 0 else ""
        raise ValueError(f"log_p: expected [{samples}, B] or [{samples}*B] for samples={samples}, got {tuple(log_p.shape)}{hint}")
    if log_p.dim() not in (1, 2) or log_p.shape[0] % samples != 0:
        raise ValueError(f"log_p: expected [S*B] or [S, B] with S={samples}, got {tuple(log_p.shape)}")
    log_p = log_p.to(torch.promote_types(log_p.dtype, torch.float32))
    return reference.logmeanexp(log_p.reshape(samples, -1), alpha)


class _IWLoss(nn.Module):
    """The base of the losses: S, or 1 where a model drew no noise; alpha; the observers of each training forward's statistics."""

    def __init__(self, samples: int, alpha: float, return_stats: bool):
        super().__init__()
        self.samples = as_samples(samples)
        self.alpha = alpha
        self.return_stats = return_stats
        self.observers: list[Callable[[IWStats], None]] = []
        self._told = False  # of one row for each target, or nothing to tell

    def check_options(self) -> None:
        """Raises where an option, which may have changed since, is not as it should be."""
        as_samples(self.samples)
        check_alpha(self.alpha)

    def _samples_of(self, output: Any, dim: int, batch: int) -> int:
        """Noise samples of an output for ``batch`` targets, by its rows: S in training, 1 of a model in eval mode."""
        samples, tensors = as_samples(self.samples), [v for v in tree_leaves(output) if isinstance(v, Tensor) and v.dim() > dim]
        if any(v.shape[dim] == samples * batch for v in tensors) and (batch or self.training):
            self._told = self._told or samples > 1  # a model that has drawn its samples is known to draw them
            return samples
        first = next((v for v in tensors if v.shape[dim] == batch), None)
        if first is None:  # other rows are refused later
            return samples if self.training or isinstance(output, Tensor) else 1
        trains = self.training and first.requires_grad and torch.is_grad_enabled()
        if samples > 1 and trains and not self._told and not torch.compiler.is_compiling():
            self._told = True  # once, also where a trainer's blocks of catch_warnings make Python forget
            warnings.warn(
                f"{type(self).__name__}: there is one row for each target, although samples={self.samples}: this is the loss of one "
                f"sample, right for a model in eval mode. In training, {ONE_ROW}",
                stacklevel=5,  # the call of the loss
            )
        return 1

    def _tell(self, loss: Tensor, stats: IWStats) -> Tensor | tuple[Tensor, IWStats]:
        for observe in self.observers if self._observed(len(stats.log_p)) else ():
            observe(stats)
        return (loss, stats) if self.return_stats else loss

    def _observed(self, samples: int) -> bool:
        """True for a forward in training, whose statistics go to the observers."""
        return bool(self.observers) and self.training and samples == self.samples


class IWLoss(_IWLoss):
    """Importance weighting around any criterion of torch with ``reduction="none"``: minus the mean over the batch of the bound
    (Noh et al. 2017, eq 4).

        log p(y_b | x_b, noise_s) = - sum over the elements of example b of criterion(output[s*B + b], target[b])

    Targets are repeated sample-major to the outputs' S*B rows. An output of B rows, as a model in eval mode returns it, is one sample's;
    the loss's own mode plays no part.

    Args:
        criterion: a module or function with ``reduction="none"``: BCEWithLogitsLoss, GaussianNLLLoss, PoissonNLLLoss, CTCLoss, ...
        samples: S, noise samples of each example in training.
        alpha: 1 is IWSGD, 0 the mean over samples, inf the best sample.
        return_stats: return (loss, :class:`IWStats`).

    ``observers`` is a list of functions that are called with the :class:`IWStats` of each training forward (see :class:`StatsLogger`).

    Raises:
        ValueError: sizes that do not fit, or that broadcast rows against rows; a criterion that reduces.
        TypeError: a criterion that is a class, or cannot be called.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> criterion = iw.IWLoss(torch.nn.BCEWithLogitsLoss(reduction="none"), samples=4)
        >>> criterion(torch.randn(4 * 8, 5), torch.rand(8, 5)).shape
        torch.Size([])
    """

    def __init__(self, criterion: Any, samples: int, alpha: float = 1.0, *, return_stats: bool = False):
        super().__init__(samples, alpha, return_stats)
        self.check_options()
        if isinstance(criterion, type):
            raise TypeError(f"criterion: expected a module or function, got the class; make one: {criterion.__name__}(reduction='none')")
        if not callable(criterion):
            raise TypeError(f"criterion: expected a module or function with reduction='none', got {type(criterion).__name__}")
        if getattr(criterion, "reduction", "none") != "none":
            raise ValueError(f"criterion: expected reduction='none', got {criterion.reduction!r}: the likelihood of each example is needed")
        self.criterion = criterion

    @property
    def _dim(self) -> int:
        """The dimension of the outputs that holds the rows."""
        return 1 if isinstance(self.criterion, nn.CTCLoss) else 0

    def log_likelihood(self, outputs: Any, targets: Any, samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """The terms of the loss: loss = -sum(outer * L) / denominator with L the bound of log_p (see :func:`iw_logmeanexp`).

        Args:
            outputs: the criterion's first argument, of K*B rows.
            targets: the criterion's next ones: a tensor, a tuple of them, or a dict by name. Tensors of B rows are repeated
                sample-major, B being the rows of the first tensor; anything else is passed on.
            samples: K, whatever ``self.samples`` is.

        Returns:
            log_p [K, B], outer weight [B] (ones) and denominator [] (B).
        """
        self.check_options()
        args, named = as_arguments(targets)
        batch = _batch_of(targets)

        def repeat(t):
            return t.expand(samples, *t.shape).flatten(0, 1) if isinstance(t, Tensor) and t.dim() > 0 and t.shape[0] == batch else t

        rows = samples * batch
        args, named = tuple(map(repeat, args)), {name: repeat(t) for name, t in named.items()}
        try:
            cost = self.criterion(outputs, *args, **named)
        except (IndexError, RuntimeError, ValueError):
            # torch's own message knows nothing of samples; outputs that have the rows somewhere went wrong for another reason
            if isinstance(outputs, Tensor) and outputs.dim() > self._dim and rows not in outputs.shape:
                check_rows("outputs", outputs.shape[self._dim], samples, batch)
            raise
        if isinstance(self.criterion, nn.AdaptiveLogSoftmaxWithLoss):
            cost = -cost.output  # the log-likelihood of each row; its loss is their mean
        if not isinstance(cost, Tensor):
            raise TypeError(f"criterion: expected one that returns a tensor of costs, got {type(cost).__name__}")
        _check_broadcast(outputs, [t for t in tree_leaves((args, named)) if isinstance(t, Tensor)], cost, rows)
        if cost.dim() == 0:
            raise ValueError(
                f"criterion: expected a cost for each element of {samples} samples * {batch} targets = {rows} rows, got one number: it "
                "reduces; the likelihood of each example is needed (reduction='none')"
            )
        check_rows("criterion's costs", cost.shape[0], samples, batch)
        cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
        outer = cost.new_ones(batch)
        return -cost.reshape(samples, batch, -1).sum(-1), outer, cost.new_full((), batch)

    def forward(self, output: Tensor, *targets: Tensor) -> Tensor | tuple[Tensor, IWStats]:
        samples = self._samples_of(output, self._dim, _batch_of(targets))
        log_p, _, _ = self.log_likelihood(output, targets, samples)
        bound = iw_logmeanexp(log_p, samples, self.alpha)
        if not self.return_stats and not self._observed(samples):
            return -bound.mean()
        log_p, counted = log_p.detach(), torch.ones_like(bound, dtype=torch.bool)
        return self._tell(-bound.mean(), IWStats(log_p, reference.importance_weights(log_p, self.alpha), bound.detach(), counted))

    def extra_repr(self) -> str:
        return f"samples={self.samples}, alpha={self.alpha}"


def _batch_of(targets: Any) -> int:
    """B, by the first tensor among the targets."""
    first = next((t for t in tree_leaves(as_arguments(targets)) if isinstance(t, Tensor) and t.dim() > 0), None)
    if first is None:
        raise ValueError("targets: expected at least one tensor with a dimension of examples")
    return first.shape[0]


def _check_broadcast(outputs: Any, targets: list[Tensor], cost: Tensor, rows: int) -> None:
    """Outputs [rows, 1] beside targets [rows] make costs [rows, rows], every output against every target, which some criteria let pass."""
    if not isinstance(outputs, Tensor) or cost.dim() < 2 or rows < 2 or cost.shape[0] != rows or rows not in cost.shape[1:]:
        return
    other = next((t for t in targets if 0 < t.dim() != outputs.dim()), None)
    if other is not None and all(cost.numel() > t.numel() for t in (outputs, *targets)):
        raise ValueError(
            f"targets: expected the outputs' dimensions {tuple(outputs.shape)}, got {tuple(other.shape)} over all samples, and so costs "
            f"{tuple(cost.shape)}, every row against every other; unsqueeze one or squeeze the other"
        )
