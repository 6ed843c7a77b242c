"""The sampling context: it gives layers inside it the address of their noise, and says where one example becomes S rows."""

import copy
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backend import constant_in_graphs
from ..checks import as_int, as_part, as_sample_ids, as_samples
from ..ops import transforms
from ..ops.address import Address, Place, Unit, draw_origin, make_origin
from ..ops.noise import Rule, noise

# torch.compile takes an integer that it reaches from a global for a constant, so it would compile a block anew for each stream. This marks
# the contexts' counters as dynamic: one graph serves all streams.
_DYNAMIC = r".*_stack\.contexts\[.*\]\.stream"
if _DYNAMIC not in torch.compiler.config.dynamic_sources:
    torch.compiler.config.dynamic_sources = ",".join(filter(None, (torch.compiler.config.dynamic_sources, _DYNAMIC)))


# torch's messages for sums and concatenations of tensors that do not fit.
_TWO_SIZES = re.compile(r"size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\)|Expected size (\d+) but got size (\d+)")
NO_TASK = -1  # the number of the backward pass where none is running


class _Stack(threading.local):
    def __init__(self) -> None:
        self.contexts: list[sampling] = []
        self.task = NO_TASK  # the backward pass in which a recompute has set these contexts
        self.suspended: list[tuple] = []  # for each recompute, the contexts and the task before it, and the block to leave


_stack = _Stack()
_drawn_in_context: weakref.WeakSet[nn.Module | Callable] = weakref.WeakSet()  # layers that a context gave noise; NOTE [Recompute]


class Moment(NamedTuple):
    """The attributes of a context that change while it is open."""

    stream: int
    expand: str
    batch: int | None
    batch_dim: int
    samples: int
    sample_ids: Tensor | None
    axis: Any
    logical: bool
    drawn: bool  # True once the seed is drawn


class sampling:
    """``with iw.sampling(S):`` noise layers inside draw S noise samples for each example (Noh et al. 2017, eq 1), in training.

    One context is one draw of the noise of every layer: sample s is the same s through the depth of the network. Noise is a pure
    function of (seed, stream, sample, example, position), and each noise call takes the next stream. Contexts belong to a thread. They
    nest, and the innermost one gives the noise. A context ends with its block, also by an exception, and is entered once: make a new one
    for each block. asyncio tasks share their thread, so that no other task may run inside of a block: do not ``await`` there.

    Args:
        samples: S, noise samples for each example in this pass.
        seed: an int repeats its noise in every new context; None draws one from torch's default generator of the first noise call's
            device (so that ``torch.manual_seed`` decides). The seed stays on the device.
        sample_ids: ids of the samples, int64 [S] or [S, B] or a sequence of S ints, instead of 0 .. S-1: sample 5 replayed alone is
            ``sampling(1, seed=seed, sample_ids=[5])``.
        first_example: id of the batch's first example, an int or an int64 tensor of one element. None is 0, or rank * B where
            torch.distributed is initialised: ranks with equal seeds then draw the noise that one process draws for the whole batch.
        expand: "first": the first noise call fixes B; every noise layer turns B rows into S*B and keeps S*B rows as they are.
            "none": rows were expanded outside, so that every number of rows must be a multiple of S.
        batch_dim: the dimension that holds the rows, for layers whose own ``batch_dim`` is None.

    Raises:
        ValueError, TypeError: an argument is not as above.
        RuntimeError: the context is entered a second time, or used by another asyncio task.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), iw.IWDropout(0.5), torch.nn.Linear(8, 3))
        >>> with iw.sampling(5, seed=0):
        ...     logits = model(torch.ones(2, 4))
        >>> logits.shape
        torch.Size([10, 3])
    """

    def __init__(
        self,
        samples: int,
        *,
        seed: int | Tensor | None = None,
        sample_ids: Tensor | Sequence[int] | None = None,
        first_example: int | Tensor | None = None,
        expand: str = "first",
        batch_dim: int = 0,
    ):
        samples = as_samples(samples)
        seed, first_example = (None if v is None else as_part(name, v) for name, v in (("seed", seed), ("first_example", first_example)))
        if expand not in ("first", "none"):
            raise ValueError(f"expand: expected 'first' or 'none' (see iw.convert for the others), got {expand!r}")
        self.samples = samples
        self.sample_ids = as_sample_ids(sample_ids, samples) if sample_ids is not None else None
        self.first_example = first_example % 2**32 if isinstance(first_example, int) else first_example
        self.expand = expand
        self.batch_dim = as_int("batch_dim", batch_dim)
        self.stream = 0
        self.watch: Any = None  # the Watch of a verification or an evaluation, which notes the calls that draw noise
        self.batch: int | None = None  # B, fixed by the first noise call
        self.entered = False
        self.task = NO_TASK  # the backward pass inside which it was entered
        self.owner = 0  # the asyncio task that entered it, by its id; 0 outside of any
        self.evaluating = False  # True where noise is on in eval mode
        # On a sample axis, torch's own random numbers differ between samples, as between passes. A verification sets "same".
        self.torch_noise = "different"
        self.scalar_output = False  # True once a converted model inside has returned a number for each sample
        self.cumulative = False  # True inside of a BatchNorm whose running statistics are averages over all batches
        # True in a converted model: noise positions follow the logical order of elements, as torch may lay a tensor out in memory in
        # another way on the sample axis than in a pass of one sample.
        self.logical = False
        self.axis = None  # the SampleAxis on which the forward of a converted model runs
        # An int becomes a tensor here, outside of compiled code, where each new int would compile the graph anew.
        self._seed = make_origin(seed, 0, 0, torch.device("cpu")) if seed is not None else None
        self._origin: Tensor | None = None
        self._replayed_origin: Tensor | None = None

    def __enter__(self) -> "sampling":
        if self.entered:
            raise RuntimeError(
                "iw.sampling: this context was entered before, and one context is one draw of the noise of every layer: make a new one for "
                "each block, `with iw.sampling(samples, seed=...):`"
            )
        self.entered, self.owner = True, running_task()
        self.task = graph_task()
        _stack.contexts.append(self)
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        _stack.contexts.remove(self)
        if error is not None:
            self.explain(error)

    def explain(self, error: BaseException | None) -> None:
        """Adds a note to an error of torch's that names B and S*B rows. (Python prints the note with the error, from 3.11 on.)"""
        if self.batch is None or self.samples == 1 or not isinstance(error, RuntimeError) or not hasattr(error, "add_note"):
            return
        rows, sizes = self.samples * self.batch, _TWO_SIZES.search(str(error))
        noted = any(note.startswith("iw.sampling: ") for note in getattr(error, "__notes__", ()))
        if self.expand == "first" and sizes and {self.batch, rows} == {int(n) for n in sizes.groups() if n} and not noted:
            error.add_note(
                f"iw.sampling: the first noise on each path made {rows} rows ({self.samples} samples) of {self.batch}. A path around all "
                f"noise, as in x + drop(f(x)), still has {self.batch} rows. Convert such a model: iw.convert(model, samples) keeps samples "
                "apart on an axis of their own, and expand='input' makes the rows in front of all paths."
            )

    def moment(self) -> "Moment":
        """The state of this context now, for :meth:`again`."""
        state = [*(getattr(self, name) for name in Moment._fields[:-1]), self._origin is not None]
        return Moment(*state)

    def again(self, moment: Moment) -> "sampling":
        """A copy of this context that draws its noise as from that moment on."""
        context = copy.copy(self)
        context.entered, context.owner = False, running_task()
        vars(context).update(zip(Moment._fields[:-1], moment[:-1], strict=True))
        if not moment.drawn:
            context._origin, context._replayed_origin = None, self._origin
        return context

    def origin_for(self, inputs: Iterable[Any], model: nn.Module) -> Tensor:
        """The seed; draws it first where it is not yet drawn, on the device of the first tensor among inputs and parameters."""
        if self._origin is None:
            tensors = (v for v in chain(inputs, model.parameters(), model.buffers()) if isinstance(v, Tensor))
            on = next(tensors, None)
            return self._origin_on(on.device if on is not None else torch.device("cpu"))
        return self._origin

    def changed(self, **attributes: Any) -> "_Changed":
        """A block in which attributes of this context have other values."""
        return _Changed(self, attributes)

    def on_axis(self, sample_ids: Tensor, axis: Any) -> AbstractContextManager[None]:
        """The context on a sample axis: of one noise sample, as the model sees it, whose id is a noisy tensor."""
        return self.changed(samples=1, sample_ids=sample_ids, expand="none", axis=axis)

    def below(self) -> AbstractContextManager[None]:
        """The context below the axis, for a module that is called once for each noise sample."""
        return self.changed(axis=None, sample_ids=self.sample_ids)

    def place(self, x: Tensor, batch_dim: int | None) -> Place:
        """The address of one layer's call, whatever its noise, and ``expand``, True where x has B rows. Takes the next stream."""
        batch_dim = self.batch_dim if batch_dim is None else batch_dim
        if not -x.dim() <= batch_dim < x.dim():
            raise ValueError(f"batch_dim: expected a dimension of the input in [{-x.dim()}, {x.dim()}), got {batch_dim}")
        batch_dim %= x.dim()
        rows = x.shape[batch_dim]
        expand, examples = self._expansion(rows)
        origin = self._origin_on(x.device)
        stream, self.stream = self.stream, self.stream + 1
        ids = self.sample_ids
        if ids is not None:
            if ids.device != x.device:
                ids = self.sample_ids = ids.to(x.device)
            if ids.dim() == 2 and ids.shape[1] != examples:
                rows, rest = divmod(examples, max(ids.shape[1], 1))
                hint = f"; the noise got {rows} rows of each example (flattened tokens, two inputs in one batch), which these ids do not "
                hint += "tell apart: give ids [samples], or take a strategy of iw.backward other than 'resampled'"
                got = f"{tuple(ids.shape)}{hint if rows > 1 and not rest else ''}"
                raise ValueError(f"sample_ids: expected [{self.samples}, {examples}] for {examples} examples, got {got}")
        if transforms.active() and not (self.axis is not None and self.axis.holds(x)):  # on the axis each sample has its own id
            transforms.check_noise_of_lanes(x, origin, ids)
        first = self.first_example
        first = _rank() * examples if first is None else 0 if isinstance(first, Tensor) else first
        return Place(Address(origin, ids, self.samples, stream, first), expand, batch_dim, self.logical)

    def place_weight(self, weight: Tensor) -> Place:
        """The same for noise on a weight, one mask for each sample: ``weight`` [1, ...] is the only example, with id 0 on all ranks."""
        ids = self.sample_ids if self.sample_ids is None else self.sample_ids.to(weight.device)
        if ids is not None and ids.dim() == 2:
            raise ValueError(
                f"sample_ids: expected [{self.samples}] where weights are noisy, as all examples share a sample's, got {tuple(ids.shape)}"
            )
        origin = self._origin_on(weight.device)
        if isinstance(self.first_example, Tensor):
            origin = torch.cat([origin[:2], origin.new_zeros(1)])
        if transforms.active():
            transforms.check_noise_of_lanes(None, origin, ids)
        stream, self.stream = self.stream, self.stream + 1
        return Place(Address(origin, ids, self.samples, stream, 0), True, 0)

    def examples(self, rows: int) -> int:
        """B, for an input of ``rows`` rows; for layers of several inputs, of which some may be expanded."""
        return self._expansion(rows)[1]

    def _expansion(self, rows: int) -> tuple[bool, int]:
        """(True where a tensor of ``rows`` rows is to be expanded, B)."""
        samples = self.samples
        if self.expand == "later":
            raise ValueError(
                "A noise layer was called before the submodule at which this model expands; convert with expand='first' or 'input'"
            )
        if self.expand == "none":
            if rows % samples != 0:
                raise ValueError(
                    f"A noise layer met {rows} rows, which is no multiple of samples={samples}: where rows are expanded outside of the "
                    "layers, every tensor must have samples * batch rows. If rows are not in the first dimension (time first), give "
                    "batch_dim; if rows are no examples (the nodes of a graph), iw.convert(model, samples) keeps samples apart."
                )
            return False, rows // samples
        if self.batch is None:
            self.batch = rows
        if rows == self.batch:
            return True, rows
        if rows == samples * self.batch:
            return False, self.batch
        raise ValueError(
            f"A noise layer met {rows} rows, but in this context the batch is {self.batch} and samples={samples}, so it can be "
            f"{self.batch} (to be expanded) or {samples * self.batch} (expanded already). Each batch needs a context of its own. "
            "If rows are not in the first dimension (time first), give batch_dim. If the model changes its rows between noise layers "
            "(the nodes of a graph, flattened tokens), iw.convert(model, samples) keeps samples on an axis of their own."
        )

    def _origin_on(self, device: torch.device) -> Tensor:
        origin = self._origin
        if origin is None or origin.device != device:
            if origin is not None:
                origin = origin.to(device)  # a model on several devices has one seed
            elif self._seed is None:
                if transforms.active():
                    transforms.check_seed_of_lanes()
                origin = draw_origin(device)
                if self._replayed_origin is not None:  # a replay draws all the same, so that the generator goes on as in the forward
                    origin = self._replayed_origin.to(device)
            else:
                origin = self._seed.to(device, non_blocking=True)
            if self._origin is None and isinstance(self.first_example, Tensor):
                origin = torch.cat([origin[:2], self.first_example.detach().to(device).reshape(1)])
            self._origin = origin
        return origin


class _Changed:
    """A block in which a context has other values of some attributes. (A class: torch 2.11 compiles no generator here.)"""

    def __init__(self, context: sampling, attributes: dict[str, Any]):
        self.context, self.attributes = context, attributes

    def __enter__(self) -> None:
        self.before = {name: getattr(self.context, name) for name in self.attributes}
        for name, value in self.attributes.items():
            setattr(self.context, name, value)

    def __exit__(self, *_) -> None:
        for name, value in self.before.items():
            setattr(self.context, name, value)


def current() -> sampling | None:
    """The innermost context of this thread, or None."""
    contexts = _stack.contexts
    if not contexts:
        return None
    owner = contexts[-1].owner
    if owner and not torch.compiler.is_compiling() and running_task() not in (0, owner):
        raise RuntimeError(
            "iw.sampling: the innermost context of this thread was opened by another asyncio task, which would share its noise: open and "
            "end a context between two awaits, or run each task's steps in a thread of its own (asyncio.to_thread)"
        )
    return contexts[-1]


def is_evaluating() -> bool:
    """True where the innermost context draws noise in models that are in eval mode."""
    contexts = _stack.contexts
    return bool(contexts) and contexts[-1].evaluating


def running_task() -> int:
    """The id of the asyncio task that runs in this thread, or 0."""
    asyncio = None if torch.compiler.is_compiling() else sys.modules.get("asyncio")
    return 0 if asyncio is None or asyncio._get_running_loop() is None else id(asyncio.current_task())


@contextmanager
def outside_of_contexts() -> Iterator[None]:
    """A block in which no context is open."""
    contexts, _stack.contexts = _stack.contexts, []
    try:
        yield
    finally:
        _stack.contexts = contexts


# NOTE [Recompute]
# Activation checkpointing calls layers again during backward. By then their context has ended, or its stream has gone on, or (CUDA) the
# thread is another one. torch numbers the backward pass that is running. A context that was entered inside of this pass, or set again by
# iw.checkpoint, is the right one; any other would give other noise. A layer that no context ever gave noise draws from torch's generator,
# whose state torch.utils.checkpoint restores: this is right, too, as it is for nn.Dropout.
def check_not_recomputed(context: sampling | None, layer: nn.Module | Callable | None) -> None:
    """Raises where a layer (a module, or a function that draws noise) is called during backward without the context of its forward."""
    task = graph_task()
    if task == NO_TASK:
        if context is not None and layer is not None and not torch.compiler.is_compiling():
            _drawn_in_context.add(layer)
        return
    if task == _stack.task or (context is not None and context.task == task):
        return
    if context is None and layer is not None and not torch.compiler.is_compiling() and layer not in _drawn_in_context:
        return
    name = f"{type(layer).__name__}({layer.extra_repr()})" if isinstance(layer, nn.Module) else getattr(layer, "__name__", "A noise layer")
    raise RuntimeError(
        f"{name} is computed again during backward (activation checkpointing) without the sampling context of its forward: it would draw "
        "other noise. Use iw.checkpoint(function, *args) instead of torch.utils.checkpoint.checkpoint(function, *args), or give "
        "that use_reentrant=False, context_fn=iw.checkpoint_contexts. A context that is opened inside the function is right, too."
    )


def graph_task() -> int:
    """The number of the backward pass that runs in this thread, or NO_TASK."""
    return _traced_graph_task() if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


@constant_in_graphs
def _traced_graph_task() -> int:
    return torch._C._current_graph_task_id()  # the number at tracing: a forward and a recompute outside of a context are two graphs


def ambient(layer: nn.Module | Callable | None = None) -> sampling:
    """The innermost context; outside of any, a new one of one fresh noise sample, as torch's layer of that name draws."""
    context = current()
    check_not_recomputed(context, layer)
    return sampling(1) if context is None else context


def draw(
    x: Tensor,
    rule: Rule | Tensor,
    unit: Unit,
    batch_dim: int | None,
    layer: nn.Module | Callable,
    check: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """x under a layer's dropout noise: S samples in a context, outside of any one fresh sample. ``check`` raises where x does not suit."""
    if not torch.compiler.is_compiling() and torch._C._len_torch_function_stack():
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None and isinstance(x, Tensor):
            x.dim()  # a converted model's mode sees this call, so that a checkpoint that is running begins before this noise
        with torch._C.DisableTorchFunction():  # a converted model's rules are for the model's functions, not for those of the noise
            return _draw(x, rule, unit, batch_dim, layer, check)
    return _draw(x, rule, unit, batch_dim, layer, check)


def _draw(x, rule, unit, batch_dim, layer, check) -> Tensor:
    if check is not None:
        check(x)
    return noise(x, rule, unit, ambient(layer).place(x, batch_dim))


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
