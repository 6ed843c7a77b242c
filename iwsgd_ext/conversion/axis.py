"""The sample axis: a model's forward for all noise samples at once, in a dimension that the model cannot see.

The forward runs once, under torch's batching (on which torch.vmap is built). To the model it is an ordinary forward of one noise sample:
shapes, rows and positions are those of B examples. Below the axis a tensor that noise has touched has one dimension more, of K samples;
it is called noisy here. A tensor that no noise has touched is shared by all samples and computed once. A noise layer reads its input once
and writes all samples in one kernel call (:mod:`iwsgd_ext.ops.transforms`).

Functions that torch's batching cannot do, or does slowly, have rules (axis_rules.py). Code that has no rule, because it asks for values
(``.item()``, ``if tensor:``) or draws one number for all samples, runs below the axis: the module that holds it is called once for each
noise sample (one_by_one.py).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import (
    _add_batch_dim,
    _remove_batch_dim,
    _unwrap_batched,
    _vmap_decrement_nesting,
    _vmap_increment_nesting,
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    maybe_get_level,
    peek_interpreter_stack,
)
from torch.nn.modules.batchnorm import _NormBase

from ..layers.context import sampling
from ..ops.transforms import Below
from .axis_outputs import Output, check_returned, modules_of


class SampleAxis:
    """The sample axis of one forward.

    Attributes:
        ids: ids of the noise samples, int64 [K] or [K, B], as memory holds them.
        samples: K, the number of noise samples in this forward.
        level: the number by which torch's batching knows this axis; 0 under torch.compile.
        randomness: "different" or "same": torch's own random numbers, in the samples.
    """

    def __init__(self, ids: Tensor, level: int, randomness: str):
        self.ids, self.samples, self.level, self.randomness = ids, ids.shape[0], level, randomness
        self.statistics: set[int] = set()  # memory of running statistics that BatchNorm layers of the model may update
        self.apply: Callable[[list], None] | None = None  # the function that applies the updates of running statistics
        self.begin()

    def begin(self) -> None:
        """Clears the notes of a run, before it and before a recompute of a part of it."""
        self.written: set[int] = set()  # memory of state that was written so far: in a loop, the next sample would read other values there
        self.below_axis: set[int] = set()  # memory of the state of modules that were called once for each sample
        self.counts: dict[int, tuple[Tensor, int]] = {}  # counts of batches, and by how many one sample advances each
        self.updates: list = []  # updates of running statistics: applied at the end of the run, sample by sample

    def holds(self, v: Any) -> bool:
        """True where ``v`` is a noisy tensor: one that has a value for each sample of this axis."""
        return isinstance(v, Tensor) and is_batchedtensor(v) and maybe_get_level(v) == self.level

    def unwrap(self, v: Any) -> tuple[Any, int | None]:
        """(a noisy tensor as memory holds it, its dimension of samples), or (v, None) for any other value."""
        return _unwrap_batched(v, self.level) if self.holds(v) else (v, None)

    def wrap(self, x: Tensor, dim: int = 0) -> Tensor:
        """The noisy tensor whose memory is x, with the samples in dimension ``dim``."""
        return _add_batch_dim(x, dim, self.level)

    def is_covered(self) -> bool:
        """True inside of another transform (torch.func.grad, vmap) that the model has started on the axis."""
        if self.level == 0:
            raise RuntimeError(
                "torch.compile left its graph inside of a converted model's forward, and the function called there needs the whole graph: "
                "fullgraph=True shows where, or run the model eagerly."
            )
        return peek_interpreter_stack().level() != self.level

    def below(self) -> Below:
        """A block that computes with the tensors that :meth:`unwrap` gives, out of sight of torch's batching."""
        return Below()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Enters the axis once more, for a recompute after its run; noisy tensors that the run has left are valid inside."""
        self.begin()  # a run that failed has not cleared its notes
        level = _vmap_increment_nesting(self.samples, self.randomness)
        try:
            if level != self.level:
                raise RuntimeError(
                    "A part of a converted model is computed again inside of a torch.func transform, not on its sample axis."
                )
            yield
        finally:
            _vmap_decrement_nesting()
            self.end()

    def reads(self, args: tuple, kwargs: dict | None) -> int | None:
        """The memory of the first argument that is state of the model (in :attr:`statistics` or :attr:`written`), or None."""
        for v in chain(args, kwargs.values()) if kwargs else args:
            for x in v if isinstance(v, list | tuple) else (v,):
                if isinstance(x, Tensor) and not is_batchedtensor(x):
                    memory = memory_of(x)
                    if memory in self.statistics or memory in self.written:
                        return memory
        return None

    def count(self, batches: Tensor) -> None:
        """Notes that a layer has counted one batch; the end of the run counts it for the other samples."""
        self.counts[id(batches)] = batches, self.counts.get(id(batches), (batches, 0))[1] + 1

    def end(self) -> None:
        """Writes counts and running statistics, after a run."""
        updates, counts = self.updates, list(self.counts.values())
        self.begin()
        if counts:
            tensors, calls = zip(*counts, strict=True)
            torch._foreach_add_(tensors, [n * (self.samples - 1) for n in calls])  # each call has counted one
        if updates:
            self.apply(updates)


def memory_of(x: Tensor) -> int | None:
    """The identity of a tensor's memory: the same for views of one another, and for aliases (``detach``, ``data``)."""
    with torch._C.DisableTorchFunction():  # the axis' rules would take this for a read of x
        while is_functorch_wrapped_tensor(x):
            x = get_unwrapped(x)
        return x.untyped_storage()._cdata if x.layout == torch.strided else None


def all_samples(axis: SampleAxis, x: Tensor) -> Tensor:
    """[K, ...] as memory holds it, of a noisy tensor x or a shared one."""
    if torch.compiler.is_compiling():
        return torch.ops.iwsgd_graph.all_samples(x, axis.samples)
    x, d = axis.unwrap(x)
    return x.unsqueeze(0).expand(axis.samples, *x.shape) if d is None else x.movedim(d, 0)


torch.library.define("iwsgd_graph::all_samples", "(Tensor x, int samples) -> Tensor")
torch.library.impl("iwsgd_graph::all_samples", "CompositeExplicitAutograd", lambda x, samples: x.repeat(samples, *[1] * x.dim()))
torch.library.register_fake("iwsgd_graph::all_samples", lambda x, samples: x.new_empty(samples, *x.shape))
torch.library.register_vmap("iwsgd_graph::all_samples", lambda info, dims, x, samples: (x.movedim(dims[0], 0).clone(), None))


def run(model: nn.Module, forward: Callable, args: tuple, kwargs: dict, context: sampling, mode: Any, batch_dim: int, batch: int | None):
    """The output of one call ``forward(*args, **kwargs)`` for all of the context's K samples, with K times the rows, sample-major.

    Rows are in dimension ``batch_dim`` of an output. Where that dimension does not have ``batch`` entries, they are in the first one that
    has and is not the last, else in dimension 0. A scalar becomes [K].
    """
    ids = context.sample_ids
    if ids is None:
        ids = torch.arange(context.samples, device=context._origin.device)
    if torch.compiler.is_compiling():
        tensors, output = _traced(model, forward, args, kwargs, context, mode, ids)
    else:
        tensors, output = _eager(model, forward, args, kwargs, context, mode, ids)
    context.scalar_output = any(x.dim() == 1 and x.requires_grad for x in tensors)
    return output.replaced([rows(x, batch_dim, batch) for x in tensors])


def _eager(model, forward, args, kwargs, context: sampling, mode, ids: Tensor) -> tuple[list[Tensor], Output]:
    """The steps of torch.vmap, for outputs of any structure, and with less Python around them."""
    level = _vmap_increment_nesting(ids.shape[0], context.torch_noise)
    try:
        axis = SampleAxis(ids, level, context.torch_noise)
        for module in modules_of(model):
            if isinstance(module, _NormBase) and module.training and module.running_mean is not None:
                axis.statistics |= {memory_of(module.running_mean), memory_of(module.running_var)}
        with context.on_axis(axis.wrap(ids).unsqueeze(0), axis), mode:
            returned = forward(*args, **kwargs)
            check_returned(returned)
            output = Output(returned, model)
        output.add_attributes(model, axis.holds)
        tensors = [_remove_batch_dim(x, level, axis.samples, 0) for x in output.tensors]
    finally:
        _vmap_decrement_nesting()
    axis.end()
    return tensors, output


def _traced(model, forward, args, kwargs, context: sampling, mode, ids: Tensor) -> tuple[list[Tensor], Output]:
    """The same by torch.vmap, which torch.compile can trace."""
    outputs = []
    axis = SampleAxis(ids, 0, context.torch_noise)

    def of_sample(sample_id: Tensor) -> tuple[Tensor, ...]:
        with context.on_axis(sample_id.unsqueeze(0), axis), mode:
            outputs.append(Output(forward(*args, **kwargs), model, look_into=False))
        return tuple(outputs[0].tensors)

    tensors = list(torch.vmap(of_sample, randomness=context.torch_noise)(ids))
    axis.end()
    return tensors, outputs[0]


def rows(x: Tensor, batch_dim: int, batch: int | None) -> Tensor:
    """[K * B, ...] of x [K, B, ...]."""
    if x.dim() == 1:
        return x
    sizes = x.shape[1:]
    dim = batch_dim if batch_dim >= 0 else batch_dim + len(sizes)
    if dim == 1 and len(sizes) == 2 and sizes[0] == sizes[1] == batch:
        raise ValueError(
            f"batch_dim={batch_dim}: the model returns {tuple(sizes)} for a batch of {batch}: are these examples by classes, or times by "
            "examples? Return another shape (times by examples by 1, say), or take another batch size"
        )
    if dim >= len(sizes) or sizes[dim] != batch:
        # Not the last of several dimensions: an output flattened over positions may have as many classes as there are examples.
        first = sizes[: max(1, len(sizes) - 1)]
        dim = next((d for d, n in enumerate(first) if n == batch), dim if dim < len(sizes) and batch_dim == 0 else 0)
    sizes = [*sizes[:dim], x.shape[0] * sizes[dim], *sizes[dim + 1 :]]
    # Not a view: FSDP takes no views from a module, and users write into outputs.
    return torch.ops.aten._unsafe_view.default(x.movedim(0, dim).contiguous(), sizes)
