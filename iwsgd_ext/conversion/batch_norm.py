"""Batch normalisation under noise samples: the layers that ``iw.convert(batch_norm=...)`` puts in the place of a model's own.

"joint"       torch's layers, unchanged: one set of statistics over all K*B rows.
"per_sample"  statistics over the B rows of each sample, and running statistics as K successive updates: the loop over samples.
"frozen"      the running statistics normalise in training, too, and are not written.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from ..layers.context import check_not_recomputed, current, sampling
from ..ops import transforms
from .axis import all_samples, memory_of
from .class_swap import Behaviour, behaving
from .one_by_one import NotOnAxis, one_by_one


class _BatchNormMode(Behaviour):
    """A mode as a class that stands before the model's own (nn.BatchNorm2d, nn.SyncBatchNorm, a subclass with an activation, ...)."""

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
        # All samples share these rows, so K updates with one statistic are one longer step. From r, one update goes to
        # r + m (statistic - r), and K updates to r + (1 - (1-m)^K) (statistic - r); where running statistics are the average over all n
        # batches so far, to r + K / (n+K) (statistic - r).
        before = self.running_mean.clone(), self.running_var.clone()
        y = forward(x)
        m, k = self.momentum, context.samples
        if m is not None:
            further = (1.0 - (1.0 - m) ** k) / m - 1.0 if m else 0.0
        else:
            n = 0 if self.num_batches_tracked is None else self.num_batches_tracked.double() - 1.0
            further = k * (n + 1) / (n + k) - 1.0
        for running, old in zip((self.running_mean, self.running_var), before, strict=True):
            running.data.add_((running - old) * further)  # NOTE [Running statistics by .data]
        if isinstance(self, _BatchNorm) and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(k - 1)
        return y

    def _on_axis(self, forward, x: Tensor, context: sampling) -> Tensor:
        if isinstance(self, _InstanceNorm):
            return one_by_one(self, forward, (x,), {}, context)
        count, compiling = self.num_batches_tracked, torch.compiler.is_compiling()
        if self.momentum is None and (compiling or context.axis.level == 0):
            raise RuntimeError(
                "torch.compile: a BatchNorm with momentum=None reads its number of batches, which breaks the graph inside of a converted "
                "model. Give it a momentum, or run the model eagerly."
            )
        before = None if compiling else _version(count)
        with context.changed(cumulative=self.momentum is None):
            y = forward(x)
        if count is None or not self.track_running_stats or (before is not None and _version(count) == before):
            return y  # it has no count, or is of a subclass that does not count
        if compiling or self.momentum is None:
            count.add_(context.axis.samples - 1)
        else:
            context.axis.count(count)
        return y


# NOTE [Running statistics by .data]
# torch's op writes running statistics without counting a version: autograd saves them, but the backward of a batch's statistics reads none
# of their values. A write by .data counts no version either; any other write would make backward raise.


def _version(count: Tensor | None) -> int | None:
    with torch._C.DisableTorchFunction():
        return None if count is None or count.is_inference() else count._version


def normalize_samples(context: sampling, arguments: dict, call: Callable[[], Tensor]) -> Tensor:
    """F.batch_norm with the statistics of each sample; running statistics are those after K successive updates, in the samples' order."""
    axis, x, mean = context.axis, arguments["input"], arguments["running_mean"]
    if axis is None or mean is None:
        return call().to(x.dtype)
    compiling = torch.compiler.is_compiling()
    if not arguments["training"]:
        if not compiling and memory_of(mean) in axis.statistics | axis.written:
            raise NotOnAxis(READ)
        if compiling or not axis.holds(x) or any(axis.holds(v) for v in (arguments["weight"], arguments["bias"])):
            return call()
        x, d = axis.unwrap(x)
        with axis.below():
            rows = x.movedim(d, 0).flatten(0, 1)
            y = F.batch_norm(rows, mean, *(arguments[n] for n in ("running_var", "weight", "bias")), False, eps=arguments["eps"])
            return axis.wrap(y.unflatten(0, (axis.samples, -1)))
    F._verify_batch_size(x.size())
    momentum, running = arguments["momentum"], (mean, arguments["running_var"])
    if not compiling:
        memory = {memory_of(v) for v in running}
        if memory & axis.below_axis:
            raise NotOnAxis("running statistics are updated on the axis and by a module that is called once for each noise sample")
        axis.written |= memory
    y, *statistics = _normalized(axis, x, arguments["weight"], arguments["bias"], arguments["eps"], mean.dtype)
    # Update s goes from r to r + f[s] (statistic[s] - r), f the momentum, or, of an average over all batches so far, 1 / their number.
    average = context.cumulative and momentum > 0
    factors = [1 / (1 / momentum + s) if average else momentum for s in range(axis.samples)]
    axis.apply = _apply
    axis.updates += [_Update(*pair, factors, average) for pair in zip(running, statistics, strict=True)]
    return y


READ = "state that a forward writes (running statistics, a buffer) is read in the same forward, and each sample would have its own"


class _Update(NamedTuple):
    """The update of a running statistic by one call of a layer."""

    running: Tensor
    statistic: Tensor  # [K, C], or [C] where all samples have the same
    factors: list[float]  # for each sample, the share by which the running statistic moves towards the sample's
    average: bool  # True where the running statistic is the average over all batches so far, in which their order does not count


@torch.no_grad()
def _apply(updates: list[_Update]) -> None:
    """The updates of all calls of a run, sample by sample, in one step."""
    running, kept, added = [], [], []
    for calls in _by_statistic(updates):
        samples, weights, rest = len(calls[0].factors), [[0.0] * len(u.factors) for u in calls], 1.0
        order = [(i, s) for s in range(samples) for i in range(len(calls))]
        if any(u.average for u in calls):
            if not all(u.average for u in calls) or any(
                abs(1 / u.factors[0] - (1 / calls[0].factors[0] + i * samples)) > 1e-6 for i, u in enumerate(calls)
            ):
                raise NotOnAxis("layers of another momentum, or another count of batches, share running statistics")
            order.sort()
        for i, s in reversed(order):
            weights[i][s] = calls[i].factors[s] * rest
            rest *= 1 - calls[i].factors[s]
        parts = [_weighted(u.statistic, w) for u, w in zip(calls, weights, strict=True)]
        running.append(calls[0].running.data)  # NOTE [Running statistics by .data]
        kept.append(rest)
        added.append(sum(parts[1:], start=parts[0]).to(running[-1].dtype))
    if transforms.active():  # a user's vmap, which has no rule for torch._foreach functions
        for r, k, a in zip(running, kept, added, strict=True):
            r.mul_(k).add_(a)
    else:
        torch._foreach_mul_(running, kept)
        torch._foreach_add_(running, added)


def _by_statistic(updates: list[_Update]) -> list[list[_Update]]:
    """The updates grouped by running statistic, in the order of the calls."""
    if torch.compiler.is_compiling():
        return [
            [v for v in updates if v.running is u.running]
            for i, u in enumerate(updates)
            if not any(v.running is u.running for v in updates[:i])
        ]
    groups: dict[tuple, list[_Update]] = {}
    for u in updates:
        x = transforms.plain(u.running)
        groups.setdefault((memory_of(x), x.storage_offset(), x.shape, x.stride()), []).append(u)
    return list(groups.values())


def _weighted(statistic: Tensor, weights: list[float]) -> Tensor:
    # (Not a matrix product, which autocast would compute in 16 bits.)
    return statistic * sum(weights) if statistic.dim() == 1 else (statistic * statistic.new_tensor(weights)[:, None]).sum(0)


def _normalized(
    axis, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, noisy where x is; mean; unbiased variance). Mean and variance are [K, C], or [C] where no noise has touched x."""
    compiling = torch.compiler.is_compiling()
    if not compiling and axis.is_covered():
        raise NotOnAxis("a BatchNorm runs inside of a transform of torch.func's")
    if compiling or axis.level > 1 or axis.holds(weight) or axis.holds(bias):
        return _normalized_by_torch(axis, x, weight, bias, eps)
    channels, d = x, None
    if axis.holds(x):  # K samples of C channels become K*C channels of one call
        x, d = axis.unwrap(x)
        channels = x.movedim(d, 1).flatten(1, 2)
        weight, bias = (v if v is None else v.repeat(axis.samples) for v in (weight, bias))
    with axis.below():
        # The kernel gives its statistics away only through running ones: a momentum of 1 sets these to them, in a loop's precision.
        found = [torch.zeros(channels.shape[1], dtype=dtype if weight is None else weight.dtype, device=x.device) for _ in range(2)]
        y, *_ = torch.native_batch_norm(channels, weight, bias, *found, True, 1.0, eps)
        if d is None:
            return y, *found
        return axis.wrap(y.unflatten(1, (axis.samples, -1)), 1), *(v.unflatten(0, (axis.samples, -1)) for v in found)


def _normalized_by_torch(axis, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same by torch's own batching, which updates no running statistics."""
    y, mean, deviation = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    with torch.no_grad():
        if x.dtype in (torch.float32, torch.float64):
            n = x.numel() // x.shape[1]
            mean, variance = mean.detach(), (deviation.detach() ** -2 - eps) * (n / (n - 1))
        else:  # torch gives the statistics of 16-bit inputs in 16 bits
            variance, mean = torch.var_mean(x.detach().float(), [0, *range(2, x.dim())])
        # (torch's batching multiplies by the weight in the weight's type: y goes back to that of x.)
        return y.to(x.dtype), all_samples(axis, mean), all_samples(axis, variance)


class _Frozen(_BatchNormMode):
    mode = "frozen"

    @property
    def training(self) -> bool:
        """Always False: a frozen layer normalises as in eval mode. The mode that train() and eval() set is kept for iw.revert."""
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["training"] = mode


_MODES = {"per_sample": _PerSample, "frozen": _Frozen}
MODES = ("joint", *_MODES)


def norm_swapped_to(name: str, module: nn.Module, mode: str) -> type[nn.Module] | None:
    """The class that takes the place of a batch normalisation's under ``mode``, or None; raises where none fits."""
    if mode == "joint" or not (isinstance(module, _BatchNorm) or (isinstance(module, _InstanceNorm) and module.track_running_stats)):
        return None
    kind = f"{name or 'the model'} ({type(module).__name__})"
    if isinstance(module, LazyModuleMixin):
        raise ValueError(f"batch_norm={mode!r}: expected initialised layers, but {kind} is lazy; run the model once before")
    if mode == "frozen" and module.running_mean is None:
        raise ValueError(f"batch_norm='frozen': expected layers with running statistics, but {kind} tracks none")
    inside = [type(m).__name__ for m in module.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    if mode == "per_sample" and inside:
        raise ValueError(f"batch_norm='per_sample': expected no noise inside a batch normalisation, but {kind} holds {inside[0]}")
    return behaving(_MODES[mode], type(module))


def _is_expanded(context: sampling, rows: int, kind: str) -> bool:
    """True for K*B rows, False for B rows that all samples share; raises for other numbers of rows."""
    samples, batch = context.samples, context.batch
    if context.expand == "later" or (context.expand == "first" and batch is None):
        return False  # before the first noise
    # Rows expanded outside may be flattened with positions; they are sample-major only where the rows' dimension is the first.
    if context.expand == "none" and rows % samples == 0 and (context.batch_dim == 0 or batch is None or rows == samples * batch):
        return True
    if context.expand == "first" and rows in (batch, samples * batch):
        return rows != batch
    raise ValueError(
        f"{kind} met {rows} rows, but batch={batch} and samples={samples}: batch_norm='per_sample' needs to tell the samples apart"
    )
