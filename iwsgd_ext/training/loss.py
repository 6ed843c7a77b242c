"""The loss op as a module, and its parts for the strategies: log-likelihoods, outer weights and denominator."""

from typing import Any

from torch import Tensor

from .. import reference
from ..checks import as_arguments, check_loss_options
from ..ops.iw_cross_entropy import Level, Reduction, arguments_of, denominator_of, iw_cross_entropy, position_weights_of, with_positions
from ..reference import LossArguments
from ..stats import IWStats
from .likelihood import _IWLoss

_OP_OPTIONS = ("ignore_index", "reduction", "label_smoothing", "lse_square_scale", "alpha", "level")
_OPTIONS = (*_OP_OPTIONS, "inplace", "process_group", "return_stats")


class IWCrossEntropyLoss(_IWLoss):
    """Importance weighted cross-entropy (Noh et al. 2017, eq 4) as a module; see :func:`iw_cross_entropy` for the formula and the options.

    S is read off the rows: S*B in training, and B as a model in eval mode returns them, which are one sample's. Other numbers raise, and
    the loss's own mode plays no part.

    Args:
        samples: S, the number of noise samples of each example in training.
        **options: as :func:`iw_cross_entropy`. They are attributes and may be changed: each call reads and checks them.

    ``observers`` is a list of functions that are called with the :class:`IWStats` of each training forward (see :class:`StatsLogger`).

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> criterion = iw.IWCrossEntropyLoss(samples=4, label_smoothing=0.1)
        >>> criterion(torch.randn(4 * 8, 10), torch.randint(10, (8,))).shape
        torch.Size([])
        >>> criterion(torch.randn(8, 10), torch.randint(10, (8,))).shape  # of a model in eval mode
        torch.Size([])
    """

    def __init__(
        self,
        samples: int,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        lse_square_scale: float = 0.0,
        alpha: float = 1.0,
        level: Level = "example",
        inplace: bool = False,
        process_group: Any = None,
        return_stats: bool = False,
    ):
        super().__init__(samples, alpha, return_stats)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.lse_square_scale = lse_square_scale
        self.level = level
        self.inplace = inplace
        self.process_group = process_group
        self.check_options()

    def check_options(self) -> None:
        super().check_options()
        check_loss_options(self.ignore_index, self.reduction, self.label_smoothing, self.lse_square_scale, self.alpha, self.level)

    def forward(
        self, logits: Tensor, target: Tensor, *, example_weight: Tensor | None = None, normalizer: float | Tensor | None = None
    ) -> Tensor | tuple[Tensor, IWStats]:
        options = {name: getattr(self, name) for name in _OPTIONS}
        options |= {"weight": self.weight, "example_weight": example_weight, "normalizer": normalizer}
        samples = self._samples_of(logits, 0, len(target)) if isinstance(target, Tensor) and target.dim() else self.samples
        if samples != self.samples or not self.training:
            options["process_group"] = None
        if not self._observed(samples):
            return iw_cross_entropy(logits, target, samples, **options)
        return self._tell(*iw_cross_entropy(logits, target, samples, **(options | {"return_stats": True})))

    def log_likelihood(self, outputs: Tensor, targets: Any, samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """The terms of the loss: loss = -sum(outer * L) / denominator with L the bound of log_p (see :func:`iw_logmeanexp`). Where
        there is a ``lse_square_scale``, :meth:`penalty` / denominator is added, the mean of it over passes of equal K.

        Args:
            outputs: logits [K*B, C, ...]; log_p has one derivative with respect to them.
            targets: the target, or a dict of what the loss takes after the logits: target, example_weight, normalizer.
            samples: K, whatever ``self.samples`` is.

        Returns:
            log_p [K, units], outer weight [units] and denominator [] (1 but for reduction "mean"). A unit is an example, or at level
            "position" a position.
        """
        self.check_options()
        args, named = as_arguments(targets)
        return self._log_likelihood(outputs, samples, *args, **named)

    def penalty(self, outputs: Tensor, targets: Any, samples: int) -> Tensor:
        """The term of ``lse_square_scale`` in the loss, before the denominator, []: the sum of lse_square_scale / K |example weight| lse^2
        over the rows that are not ignored. In plain torch.

        Args:
            outputs, targets, samples: as :meth:`log_likelihood` takes them.
        """
        args, named = as_arguments(targets)
        lse, strength = reference.log_sum_exp(with_positions(outputs), self._arguments(outputs, samples, *args, **named)[0])
        return (strength * lse.square()).sum() / samples

    def _arguments(self, logits, samples, target, *, example_weight=None, normalizer=None) -> tuple[LossArguments, dict[str, Any]]:
        """The op's arguments, and the options that they are made of."""
        options = {name: getattr(self, name) for name in _OP_OPTIONS} | {"weight": self.weight}
        return arguments_of(logits, target, samples, example_weight=example_weight, normalizer=normalizer, **options), options

    def _log_likelihood(self, logits, samples, target, *, example_weight=None, normalizer=None):
        a, options = self._arguments(logits, samples, target, example_weight=example_weight, normalizer=normalizer)
        samples, of_positions = a.samples, example_weight if a.position_weight is not None else None
        rows, of_positions = (None if x is None else x.expand(samples, *x.shape).flatten(0, 1) for x in (target, of_positions))
        # Every row for itself, as an example with one sample: its cost is -outer * log p.
        cost = iw_cross_entropy(logits, rows, 1, example_weight=of_positions, **(options | {"reduction": "none", "lse_square_scale": 0.0}))
        c, counted = position_weights_of(a, cost.dtype)
        if not a.per_position and self.samples > 1 and self.alpha != 0:
            reference.check_signs(c)
        outer = c.flatten() if a.per_position else c.sum(1) / counted.sum(1).clamp(min=1)
        log_p = reference.unit_log_likelihood(0 - cost.view(samples, -1), outer)
        if a.example_weight is not None:
            outer = outer * (a.example_weight.repeat_interleave(counted.shape[1]) if a.per_position else a.example_weight)
        return log_p, outer, denominator_of(a, cost.dtype) if self.reduction == "mean" else outer.new_ones(())

    def extra_repr(self) -> str:
        return f"samples={self.samples}, " + ", ".join(f"{name}={getattr(self, name)!r}" for name in _OPTIONS)
