"""Batch normalisation under S noise samples: what ``iw.convert(batch_norm=...)`` puts in the place of a model's own layers.

"joint"       torch's layers, untouched: one set of statistics over all K*B rows.
"per_sample"  statistics over the B rows of each sample, and running statistics as K successive updates: the loop over samples.
"frozen"      the running statistics normalise in training too, and nothing is written.
"""

import functools

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from .sampling import check_not_recomputed, current, sampling


class _BatchNormMode:
    """A mode as a class before the model's own one (nn.BatchNorm2d, nn.SyncBatchNorm, a subclass with an activation, ...)."""

    mode: str
    original: type[nn.Module]

    def __reduce_ex__(self, protocol):
        # The class is made on the fly, so pickle gets what it is made of.
        return _new, (self.mode, self.original), *super().__reduce_ex__(protocol)[2:]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, batch_norm={self.mode!r}"


class _PerSample(_BatchNormMode):
    mode = "per_sample"

    def forward(self, x: Tensor) -> Tensor:
        context = current() if self.training else None
        forward = super().forward
        if self.training:
            check_not_recomputed(context, self)
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


@functools.cache
def swapped_class(mode: str, original: type[nn.Module]) -> type[nn.Module]:
    """The class of ``mode`` for layers of the class ``original``."""
    return type(f"IW{original.__name__}", (_MODES[mode], original), {"__module__": __name__, "original": original})


def _new(mode: str, original: type[nn.Module]) -> nn.Module:
    made = swapped_class(mode, original)
    return made.__new__(made)


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
