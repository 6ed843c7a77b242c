"""Batch normalisation under S noise samples: what ``iw.convert(batch_norm=...)`` puts in the place of a model's own layers.

"joint"       torch's layers, untouched: one set of statistics over all K*B rows.
"per_sample"  statistics over the B rows of each sample, and running statistics as K successive updates: the loop over samples.
"frozen"      the running statistics normalise in training too, and nothing is written.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from .class_swap import Behaviour, behaving
from .one_by_one import NotOnAxis, one_by_one
from .sample_axis import all_lanes
from .sampling import check_not_recomputed, current, sampling


class _BatchNormMode(Behaviour):
    """A mode as a class before the model's own one (nn.BatchNorm2d, nn.SyncBatchNorm, a subclass with an activation, ...)."""

    mode: str
    prefix = "IW"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, batch_norm={self.mode!r}"


class _PerSample(_BatchNormMode):
    mode = "per_sample"

    def forward(self, x: Tensor) -> Tensor:
        context = current() if self.training else None
        forward = super().forward
        if self.training:
            check_not_recomputed(context, self)
        if context is not None and context.axis is not None:
            return self._on_axis(forward, x, context)
        if context is None or context.samples == 1:
            return forward(x)
        if _is_expanded(context, x.shape[0], type(self).__name__):
            by_sample = x.reshape(context.samples, x.shape[0] // context.samples, *x.shape[1:])
            return torch.cat([forward(rows) for rows in by_sample.unbind()])
        if self.running_mean is None:
            return forward(x)
        # Rows that all samples share: K updates with the same statistics are one step, drawn out. From r, one update goes to
        # r + m (statistic - r), K go to r + (1 - (1-m)^K) (statistic - r); as an average over all n batches so far, to
        # r + K / (n+K) (statistic - r).
        before = self.running_mean.clone(), self.running_var.clone()
        y = forward(x)
        m, k = self.momentum, context.samples
        if m is not None:
            further = (1.0 - (1.0 - m) ** k) / m - 1.0 if m else 0.0
        else:
            n = 0 if self.num_batches_tracked is None else self.num_batches_tracked.double() - 1.0
            further = k * (n + 1) / (n + k) - 1.0
        for running, old in zip((self.running_mean, self.running_var), before, strict=True):
            # By .data, as torch's op writes them: autograd keeps them, but backward of batch statistics reads none of their values.
            running.data.add_((running - old) * further)
        if isinstance(self, _BatchNorm) and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(k - 1)
        return y

    def _on_axis(self, forward, x: Tensor, context: sampling) -> Tensor:
        if isinstance(self, _InstanceNorm):
            return one_by_one(self, forward, (x,), {}, context)
        with context.changed(cumulative=self.momentum is None):
            y = forward(x)
        if self.track_running_stats and self.num_batches_tracked is not None:
            if torch.compiler.is_compiling() or self.momentum is None:
                self.num_batches_tracked.add_(context.axis.samples - 1)
            else:
                context.axis.count(self.num_batches_tracked)
        return y


def normalize_lanes(context: sampling, arguments: dict, call: Callable[[], Tensor]) -> Tensor:
    """F.batch_norm with the statistics of each lane; running statistics are those after K successive updates, in the samples' order."""
    axis, x, mean = context.axis, arguments["input"], arguments["running_mean"]
    if axis is None or mean is None:
        return call().to(x.dtype)
    if not arguments["training"]:
        if id(mean) in axis.pending:
            raise NotOnAxis("running statistics are read in the forward that updates them, where each sample's are others")
        if torch.compiler.is_compiling() or not axis.holds(x) or any(axis.holds(v) for v in (arguments["weight"], arguments["bias"])):
            return call()
        x, d = axis.unwrap(x)
        with axis.below():
            rows = x.movedim(d, 0).flatten(0, 1)
            y = F.batch_norm(rows, mean, *(arguments[n] for n in ("running_var", "weight", "bias")), False, eps=arguments["eps"])
            return axis.wrap(y.unflatten(0, (axis.samples, -1)))
    F._verify_batch_size(x.size())
    momentum, eps, n = arguments["momentum"], arguments["eps"], x.numel() // x.shape[1]
    y, *of_batch = _normalized(axis, x, arguments["weight"], arguments["bias"], momentum, eps)
    with torch.no_grad():
        means, deviations = (_by_sample(axis, v.detach()) for v in of_batch)
        statistics = means, (deviations**-2 - eps) * (n / (n - 1))
        # Update s goes from r to r + f[s] (statistic[s] - r), f the momentum, or, of an average over all batches so far, 1 / their number.
        factors = [1 / (1 / momentum + s) if context.cumulative else momentum for s in range(axis.samples)]
        update = _Update((mean, arguments["running_var"]), statistics, factors)
    if torch.compiler.is_compiling() or context.cumulative:  # an average does not depend on the order
        _Update.apply([[update]])
    else:
        axis.updates.setdefault(id(mean), []).append(update)
        axis.pending |= {id(v) for v in update.running}
    return y


class _Update(NamedTuple):
    """What one call does to running statistics: mean and variance."""

    running: tuple[Tensor, Tensor]
    statistics: tuple[Tensor, Tensor]  # [K, C] of the samples, or [C] where all have the same
    factors: list[float]

    @staticmethod
    @torch.no_grad()
    def apply(by_layer: "Iterable[list[_Update]]") -> None:
        """The updates of each layer's calls, sample by sample, in one step for all statistics."""
        running, kept, added = [], [], []
        for updates in by_layer:
            order = [(i, s) for s in range(len(updates[0].factors)) for i in range(len(updates))]
            weights, rest = [[0.0] * len(u.factors) for u in updates], 1.0
            for i, s in reversed(order):
                weights[i][s] = updates[i].factors[s] * rest
                rest *= 1 - updates[i].factors[s]
            for which, x in enumerate(updates[0].running):
                parts = [_weighted(u.statistics[which], w) for u, w in zip(updates, weights, strict=True)]
                running.append(x)
                kept.append(rest)
                added.append(sum(parts[1:], start=parts[0]).to(x.dtype))
        torch._foreach_mul_(running, kept)
        torch._foreach_add_(running, added)


def _weighted(statistic: Tensor, weights: list[float]) -> Tensor:
    return statistic * sum(weights) if statistic.dim() == 1 else statistic.new_tensor(weights) @ statistic


def _by_sample(axis, x: Tensor) -> Tensor:
    """[K, C] of a tensor with lanes, [C] of one without."""
    return x if not torch.compiler.is_compiling() and not axis.holds(x) else all_lanes(axis, x)


def _normalized(axis, x: Tensor, weight: Tensor | None, bias: Tensor | None, momentum: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, inverse deviation), each with the lanes of x."""
    if torch.compiler.is_compiling() or not axis.holds(x) or axis.holds(weight) or axis.holds(bias):
        y, *of_batch = torch.native_batch_norm(x, weight, bias, None, None, True, momentum, eps)
        return y.to(x.dtype), *of_batch  # torch's batching multiplies by the weight in its own type
    x, d = axis.unwrap(x)
    with axis.below():  # lanes become more channels of one call
        wide = [v if v is None else v.repeat(axis.samples) for v in (weight, bias)]
        channels = x.movedim(d, 1).flatten(1, 2)
        y, *of_batch = torch.native_batch_norm(channels, *wide, None, None, True, momentum, eps)
        return axis.wrap(y.unflatten(1, (axis.samples, -1)), 1), *(axis.wrap(v.unflatten(0, (axis.samples, -1))) for v in of_batch)


class _Frozen(_BatchNormMode):
    mode = "frozen"

    @property
    def training(self) -> bool:
        """Always False: normalising as in eval mode is what "frozen" means. What train() and eval() say is kept for iw.revert."""
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["training"] = mode


_MODES = {"per_sample": _PerSample, "frozen": _Frozen}
MODES = ("joint", *_MODES)


def to_swap(model: nn.Module, mode: str) -> list[nn.Module]:
    """The layers that ``mode`` replaces; raises where it cannot."""
    if mode not in MODES:
        raise ValueError(f"batch_norm: expected one of {MODES}, got {mode!r}")
    found = []
    for name, module in model.named_modules() if mode != "joint" else ():
        if not isinstance(module, _BatchNorm) and not (isinstance(module, _InstanceNorm) and module.track_running_stats):
            continue
        kind = f"{name or 'the model'} ({type(module).__name__})"
        if isinstance(module, LazyModuleMixin):
            raise ValueError(f"batch_norm={mode!r}: expected initialised layers, but {kind} is lazy; run the model once before")
        if mode == "frozen" and module.running_mean is None:
            raise ValueError(f"batch_norm='frozen': expected layers with running statistics, but {kind} tracks none")
        inside = [type(m).__name__ for m in module.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
        if mode == "per_sample" and inside:
            raise ValueError(f"batch_norm='per_sample': expected no noise inside a batch normalisation, but {kind} holds {inside[0]}")
        found.append(module)
    return found


def swapped_class(mode: str, original: type[nn.Module]) -> type[nn.Module]:
    """The class of ``mode`` for layers of the class ``original``."""
    return behaving(_MODES[mode], original)


def _is_expanded(context: sampling, rows: int, kind: str) -> bool:
    """Whether ``rows`` are K*B rows, or B that all samples share."""
    samples, batch = context.samples, context.batch
    if context.expand == "later" or (context.expand == "first" and batch is None):
        return False  # before the first noise
    # Rows may hold positions too where they were expanded outside, but in sample-major order only if rows are outermost.
    if context.expand == "none" and rows % samples == 0 and (context.batch_dim == 0 or batch is None or rows == samples * batch):
        return True
    if context.expand == "first" and rows in (batch, samples * batch):
        return rows != batch
    raise ValueError(
        f"{kind} met {rows} rows, but batch={batch} and samples={samples}: batch_norm='per_sample' needs to tell the samples apart"
    )
