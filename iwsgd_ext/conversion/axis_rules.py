"""Rules for torch's functions on the sample axis, where torch's own batching is wrong, is slow, or loses autocast's dtype.

A rule gets a call's arguments, of which some are noisy tensors (see axis.py), and computes with their memory, below the axis.

    rows        linear, convolutions, pooling, attention: the K*B rows of all samples go through one ordinary call (bit-equal to a call for
                each sample, autocast included)
    recurrent   the fused kernels, packed sequences too: likewise
    batch_norm  statistics of each sample; running statistics as K successive updates
    each        functions whose batching gives other values than a call for each sample: called once for each sample
    in place    noisy values written into a shared tensor: it becomes a noisy one before
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor
from torch._functorch.autograd_function import custom_function_call
from torch.compiler import is_compiling
from torch.utils._pytree import tree_leaves, tree_map

from ..backend import PACKAGE
from ..layers.context import current
from .axis import SampleAxis, memory_of
from .batch_norm import READ, normalize_samples
from .functional_dropout import FunctionalDropout, Watch, probability
from .one_by_one import NotOnAxis, one_by_one


class AxisRules(FunctionalDropout):
    """The mode that is active while a converted model runs on its axis: the rules, and functional dropout as noise of the context."""

    def __init__(self, watch: Watch | None = None, model: nn.Module | None = None, inputs: Sequence[Any] = (), kept: Sequence[Tensor] = ()):
        super().__init__(watch)
        self.model, self.inputs, self.kept = model, inputs, kept
        # memory of a widened tensor -> (its values [K, ...], the base of its older views, where that begins in memory)
        self.widened: dict[int, tuple[Tensor, Tensor, int]] = {}

    def unwatched(self) -> "AxisRules":
        return AxisRules(None, self.model, self.inputs, self.kept)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not is_compiling():
            rule = RULES.get(func)
            if rule is None and kwargs and kwargs.get("out") is not None:
                rule = _write
        else:
            rule = _batch_norm if func in _BATCH_NORMS else None
        context = current()
        axis = context.axis if context is not None else None
        if axis is not None:
            if rule is not None:
                y = rule(self, axis, func, args, kwargs or {})
                if y is not NotImplemented:
                    return y
            if (axis.statistics or axis.written) and func not in _READ_NO_VALUES and not is_compiling():
                read = axis.reads(args, kwargs)
                if read is not None:
                    y = super().__torch_function__(func, types, args, kwargs)
                    if func in IN_PLACE or not isinstance(y, Tensor) or axis.holds(y) or memory_of(y) != read:  # no view
                        raise NotOnAxis(READ) if read in axis.written else RuntimeError(READ)
                    return y
            if self.widened and not is_compiling():
                self._widen_views(axis, tree_leaves((args, kwargs)))
        return super().__torch_function__(func, types, args, kwargs)

    def _written(self, x: Tensor, y: Tensor) -> Tensor:
        axis = current().axis
        if axis is not None and axis.holds(y) and not axis.holds(x):
            self.widen(axis, x)
        return x.copy_(y)

    def widen(self, axis: SampleAxis, x: Tensor) -> None:
        """Makes a shared tensor noisy, with its values for every sample; it stays the same object. NOTE [Views of widened tensors]"""
        base, memory = x if x._base is None else x._base, memory_of(x)
        self._check_not_shared(memory)
        wide = _copies(axis, base)
        if memory is None or wide.stride()[1:] != base.stride():
            raise RuntimeError("noisy values are written in place into a tensor whose layout in memory cannot be repeated for each sample")
        offset, was = base.storage_offset(), axis.wrap(wide)
        if x is not base:
            _swap_for_view(axis, x, wide, offset)
        torch.utils.swap_tensors(base, was)  # now ``was`` is the base of the older views; held here, its memory is not used again
        self.widened[memory] = wide, was, offset

    def _widen_views(self, axis: SampleAxis, tensors: Iterable[Any]) -> None:
        for x in tensors:
            if not isinstance(x, Tensor) or is_batchedtensor(x):
                continue
            wide, base, start = self.widened.get(memory_of(x), (None, None, 0))
            if wide is None:
                continue
            if x.dtype != wide.dtype:
                raise RuntimeError("noisy values were written in place into a tensor that is read as another type")
            _swap_for_view(axis, x, wide if x._base is base else wide.detach(), start)  # detached where x is an alias without a gradient

    def _check_not_shared(self, memory: int) -> None:
        """Raises for memory that the forwards of all samples read: a forward of one sample must not change it for the next."""
        named = () if self.model is None else (*self.model.named_buffers(), *self.model.named_parameters())
        shared = (("an input", self.inputs), ("an attribute of a module", self.kept))
        for words, v in (*((words, v) for words, tensors in shared for v in tensors), *((repr(name), v) for name, v in named)):
            if isinstance(v, Tensor) and memory_of(v) == memory:
                raise RuntimeError(f"noisy values are written in place into {words}, which all noise samples share")


def _swap_for_view(axis: SampleAxis, x: Tensor, wide: Tensor, start: int) -> None:
    """Makes x, a view of memory that began at ``start``, the same view of ``wide``, which holds that memory for each sample."""
    view = wide.as_strided((axis.samples, *x.shape), (wide.stride(0), *x.stride()), x.storage_offset() - start)
    torch.utils.swap_tensors(x, axis.wrap(view))


# NOTE [Views of widened tensors]
# A view shares memory with its base, so when noisy values are written into one of them, all of them become noisy. Existing views cannot be
# listed. But the next function that is called with one sees it, and makes it a view of the memory that holds all samples.


def _copies(axis: SampleAxis, x: Tensor) -> Tensor:
    """[K, ...], with each sample laid out in memory as x is."""
    wide = x.unsqueeze(0).expand(axis.samples, *x.shape)
    return wide.clone(memory_format=torch.preserve_format) if x.is_contiguous() else torch.stack([x.clone() for _ in range(axis.samples)])


def by_rows(axis: SampleAxis, function: Callable[[Tensor], Tensor], x: Tensor, d: int) -> Tensor:
    """function(rows), where rows are the samples in dimension ``d`` of x joined with its first dimension, in the order of memory: the
    function treats all rows alike."""
    d = d if d == 1 else 0
    x = x if d == 1 else x.movedim(d, 0)
    with axis.below():
        return axis.wrap(function(x.flatten(0, 1)).unflatten(0, x.shape[:2]), d)


def _linear(rules, axis: SampleAxis, func, args, kwargs):
    x, weight, bias = args if len(args) == 3 and not kwargs else _arguments(("input", "weight", "bias"), args, kwargs).values()
    if axis.holds(weight) or axis.holds(bias):
        return _each_under_autocast(rules, axis, func, args, kwargs)
    if not axis.holds(x):
        return NotImplemented
    x, d = axis.unwrap(x)
    if d == x.dim() - 1:
        x, d = x.movedim(d, 0), 0
    with axis.below():
        return axis.wrap(func(x, weight, bias), d)


def _rowwise(dims: int) -> Callable:
    """The rule for functions of one tensor of rows, of ``dims`` dimensions, or one less where it is one row; no other may be noisy."""

    def rule(_, axis: SampleAxis, func, args, kwargs):
        x = args[0] if args else kwargs.get("input")
        if not args or not axis.holds(x) or any(axis.holds(v) for v in tree_leaves((args[1:], kwargs))):
            return NotImplemented
        if x.dim() not in (dims - 1, dims):
            return NotImplemented
        one_row = x.dim() == dims - 1
        x, d = axis.unwrap(x)
        if not one_row:
            return by_rows(axis, lambda rows: func(rows, *args[1:], **kwargs), x, d)
        with axis.below():
            return axis.wrap(func(x.movedim(d, 0), *args[1:], **kwargs))

    return rule


def _attention(_, axis: SampleAxis, func, args, kwargs):
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = _arguments(names, args, kwargs)
    tensors = [given[name] for name in names[:4]]
    if given["dropout_p"] or not any(axis.holds(v) for v in tensors) or tensors[0].dim() < 3:
        return NotImplemented
    dims = tensors[0].dim()
    if any(v.dim() != dims for v in tensors[1:3]):
        return NotImplemented
    batch = max(v.shape[0] for v in tensors[:3])
    with axis.below():
        for name, v in zip(names[:4], tensors, strict=True):
            if v is None or (name == "attn_mask" and not axis.holds(v) and (v.dim() < dims or v.shape[0] == 1)):
                continue
            x, d = axis.unwrap(v)
            x = x.movedim(d, 0) if d is not None else x.expand(axis.samples, *x.shape)
            x = x[(slice(None), *[None] * (dims + 1 - x.dim()))]  # a mask may have fewer dimensions
            given[name] = x.expand(axis.samples, batch, *x.shape[2:]).flatten(0, 1)
        return axis.wrap(func(**given).unflatten(0, (axis.samples, batch)))


def _addmm(_, axis: SampleAxis, func, args, kwargs):
    if len(args) < 3 or not axis.holds(args[1]) or any(axis.holds(v) for v in (args[0], args[2])) or args[0].dim() > 1:
        return NotImplemented
    return by_rows(axis, lambda rows: func(args[0], rows, *args[2:], **kwargs), *axis.unwrap(args[1]))


def _beside(axis: SampleAxis, x: Tensor, at: int) -> Tensor:
    """The memory of x with the samples in dimension ``at``; a shared x is expanded there."""
    x, d = axis.unwrap(x)
    return x.movedim(d, at) if d is not None else x.unsqueeze(at).expand(*x.shape[:at], axis.samples, *x.shape[at:])


# Samples go behind the dimension of examples: in a packed sequence the first entries of each step are those that go on, and stay first.
def _recurrent(_, axis: SampleAxis, func, args, kwargs):
    packed = isinstance(args[3], list | tuple)  # (data, batch_sizes, states, weights, ...), else (x, states, weights, ...)
    x, sizes, states, weights, rest = (args[0], args[1], *args[2:4], args[4:]) if packed else (args[0], None, *args[1:3], args[3:])
    if not any(axis.holds(v) for v in tree_leaves((x, states, weights))):
        return NotImplemented
    if any(axis.holds(v) for v in tree_leaves(weights)) or kwargs:
        return NotImplemented
    if axis.randomness == "same" and probability(func, args, kwargs):
        return one_by_one(None, func, args, kwargs, current())  # in a verification torch's own dropout is to be as in a sample alone
    batch_first = not packed and rest[-1]
    rows = 0 if packed or batch_first else 1
    with axis.below():
        x = _beside(axis, x, rows + 1).flatten(rows, rows + 1)
        states = tree_map(lambda v: _beside(axis, v, 2).flatten(1, 2).contiguous(), states)
        first = (x, sizes * axis.samples, states) if packed else (x, states)
        out, *finals = func(*first, weights, *rest)
        out = axis.wrap(out.unflatten(rows, (-1, axis.samples)), rows + 1)
        return out, *(axis.wrap(v.unflatten(1, (-1, axis.samples)), 2) for v in finals)


def _cell(_, axis: SampleAxis, func, args, kwargs):
    x, states, *weights = args
    if not any(axis.holds(v) for v in tree_leaves((x, states))) or any(axis.holds(v) for v in weights) or x.dim() != 2 or kwargs:
        return NotImplemented
    with axis.below():
        x, states = tree_map(lambda v: _beside(axis, v, 0).flatten(0, 1), (x, states))
        return tree_map(lambda v: axis.wrap(v.unflatten(0, (axis.samples, -1))), func(x, states, *weights))


def _narrow(_, axis: SampleAxis, func, args, kwargs):
    if len(args) < 3:
        return NotImplemented
    x, dim, start, *rest = args
    if not isinstance(start, Tensor) or axis.holds(start):
        return NotImplemented
    return func(x, dim, int(start), *rest, **kwargs)  # torch's batching has no rule for a start that is a tensor


def _pack(_, axis: SampleAxis, func, args, kwargs):
    x, lengths, batch_first = args
    if not axis.holds(x) or axis.holds(lengths):
        return NotImplemented
    with axis.below():
        data, sizes = func(_beside(axis, x, 2), lengths, batch_first)
        return axis.wrap(data, 1), sizes


def _pad(_, axis: SampleAxis, func, args, kwargs):
    data, sizes, batch_first, value, length = args
    if not axis.holds(data):
        return NotImplemented
    with axis.below():
        out, lengths = func(_beside(axis, data, 1), sizes, batch_first, value, length)
        return axis.wrap(out, 2), lengths


def _batch_norm(_, axis: SampleAxis, func, args, kwargs):
    return normalize_samples(current(), _arguments(_BATCH_NORMS[func], args, kwargs), lambda: func(*args, **kwargs))


def _write(rules: AxisRules, axis: SampleAxis, func, args, kwargs):
    """The rule for writes: a tensor becomes noisy before noisy values are written into it."""
    x = kwargs["out"] if kwargs.get("out") is not None else args[0] if args else None
    if isinstance(x, Tensor) and not axis.holds(x):
        drawn = func in RANDOM_IN_PLACE and axis.randomness == "different"
        if drawn or any(axis.holds(v) for v in tree_leaves((args[1:], kwargs))):
            rules.widen(axis, x)
    return NotImplemented


def _gradient_attribute(_, axis: SampleAxis, func, args, kwargs):
    """``requires_grad`` and the like, which torch's batching hides from the model.

    They stay hidden from torch.distributed and torch.utils.checkpoint: FSDP's hooks see whole passes and must not act on the tensors of
    one sample, and a nested checkpoint detaches tensors that require grad, which would lose the gradient of a noisy one in its recompute.
    Only the caller's frame tells who asks.
    """
    frame = sys._getframe(2)
    while frame.f_globals.get("__name__", "").startswith(f"{PACKAGE}."):  # another of these modes
        frame = frame.f_back
    if not axis.holds(args[0]) or frame.f_globals.get("__name__", "").startswith(("torch.distributed.", "torch.utils.checkpoint")):
        return NotImplemented
    return func(axis.unwrap(args[0])[0])


def _register_hook(_, axis: SampleAxis, func, args, kwargs):
    x, hook = args
    if not axis.holds(x):
        return func(x, partial(_looks_on, hook))
    x, d = axis.unwrap(x)

    def of_samples(gradient: Tensor) -> Tensor | None:
        with axis.again():
            changed = hook(axis.wrap(gradient, d))
        return None if changed is None else _beside(axis, changed, d)

    return func(x, of_samples)


def _looks_on(hook: Callable, gradient: Tensor) -> None:
    """Calls a hook of a shared tensor, whose gradient is the sum over the noise samples. Raises where the hook changes it."""
    if hook(gradient) is not None:
        raise RuntimeError(
            "A hook changes the gradient of a tensor that no noise has touched, where it is the sum over the noise samples of a converted "
            "model, and not one sample's. iw.convert(..., one_by_one=[name of the module that registers it]) gives it each sample's."
        )


def _embedding(_, axis: SampleAxis, func, args, kwargs):
    by_frequency = _arguments(("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"), args, kwargs)
    if not by_frequency["scale_grad_by_freq"] or not axis.holds(by_frequency["input"]):
        return NotImplemented
    return one_by_one(None, func, args, kwargs, current())  # frequencies are those of one sample


def _select_scatter(_, axis: SampleAxis, func, args, kwargs):
    x, src, dim, index = _arguments(("input", "src", "dim", "index"), args, kwargs).values()
    if not axis.holds(src):
        return NotImplemented
    index %= x.shape[dim]  # torch's batching gives another gradient than for one sample
    return torch.slice_scatter(x, src.unsqueeze(dim), dim, index, index + 1)


def _as_strided_in_place(_, axis: SampleAxis, func, args, kwargs):
    if axis.holds(args[0]):
        raise RuntimeError("the sizes and strides of a noisy tensor are set in place")
    return NotImplemented


def _each(_, axis: SampleAxis, func, args, kwargs):
    """The rule for functions that are called once for each sample."""
    return one_by_one(None, func, args, kwargs, current()) if any(axis.holds(v) for v in tree_leaves((args, kwargs))) else NotImplemented


def _each_number(rules, axis: SampleAxis, func, args, kwargs):
    """The rule for functions in which torch's batching takes a noisy number (of no dimension) for a tensor of one dimension."""
    tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
    numbers = any(v.dim() == 0 and axis.holds(v) for v in tensors)
    alone = len(tensors) == 1 or func in _OF_NUMBERS or len({v.dtype for v in tensors}) > 1
    return _each(rules, axis, func, args, kwargs) if numbers and alone else NotImplemented


def _each_under_autocast(rules, axis: SampleAxis, func, args, kwargs):
    """The rule for functions that torch's batching replaces by others, which autocast computes in another type."""
    return _each(rules, axis, func, args, kwargs) if torch.is_autocast_enabled(axis.ids.device.type) else NotImplemented


def _saved_inputs(_, axis: SampleAxis, func, args, kwargs):
    """torch 2.11's checkpoint saves its arguments through an autograd Function without a rule for batching: it is called below the axis."""
    function, *arguments = args
    if function.__module__ != "torch.utils.checkpoint":
        return NotImplemented
    with axis.below():
        return function.apply(*arguments)


def _requires_grad(_, axis: SampleAxis, func, args, kwargs):
    x, *rest = args
    with axis.below():  # torch's transforms refuse it
        func(axis.unwrap(x)[0], *rest, **kwargs)
    return x


def _arguments(names: tuple[str, ...], args: tuple, kwargs: dict) -> dict[str, Any]:
    """A call's arguments by name; None (False, 0.0) where one is not given."""
    defaults = {"dropout_p": 0.0, "is_causal": False, "enable_gqa": False, "training": False, "momentum": 0.1, "eps": 1e-5}
    return {name: defaults.get(name) for name in names} | dict(zip(names, args, strict=False)) | kwargs


_READ_NO_VALUES = frozenset(
    [
        custom_function_call,
        Tensor.dim,
        Tensor.size,
        Tensor.numel,
        *(getattr(Tensor, n).__get__ for n in ("shape", "dtype", "device", "is_meta", "requires_grad")),
    ]
)


def _in_place() -> frozenset[Callable]:
    """The functions of torch that write values into their first argument."""
    others = {"requires_grad_", "detach_", "share_memory_", "rename_", "align_as_", "retain_grad"}
    others |= {
        f"{n}_" for n in ("as_strided", "resize", "resize_as", "set", "squeeze", "swapaxes", "swapdims", "t", "transpose", "unsqueeze")
    }
    augmented = ["add", "and", "floordiv", "lshift", "mod", "mul", "or", "pow", "rshift", "sub", "truediv", "xor"]
    names = [n for n in dir(Tensor) if n.endswith("_") and not n.startswith("_") and n not in others]
    names += ["__setitem__", *(f"__i{n}__" for n in augmented)]
    functions = [n for n in dir(torch) if n.endswith("_") and not n.startswith("_") and n not in others]
    return frozenset([*(getattr(Tensor, n) for n in names), *(getattr(torch, n) for n in functions)])


IN_PLACE = _in_place()
RANDOM_IN_PLACE = frozenset(
    getattr(Tensor, n) for n in ("bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_")
)
_BATCH_NORMS = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled"),
}
_OF_NUMBERS = frozenset((torch.index_fill, Tensor.index_fill))
_PROMOTING = (torch.where, Tensor.where, torch.clamp, Tensor.clamp, torch.clip, Tensor.clip)
_PROMOTING += (torch.addcmul, Tensor.addcmul, torch.addcdiv, Tensor.addcdiv)
_CAST = [F.cross_entropy, F.nll_loss, F.l1_loss, F.cosine_embedding_loss, F.group_norm, F.prelu]
_CAST += [getattr(torch, n) for n in ("trace", "mv", "dot", "inner", "addmv", "tensordot", "cdist", "pinverse", "baddbmm", "prelu")]
_CAST += [getattr(Tensor, n) for n in ("trace", "mv", "dot", "inner", "addmv", "pinverse", "baddbmm", "prelu")]
RULES: dict[Callable, Callable] = {
    **dict.fromkeys(IN_PLACE, _write),
    **dict.fromkeys(_CAST, _each_under_autocast),
    **dict.fromkeys((*_OF_NUMBERS, *_PROMOTING, torch.roll, Tensor.roll), _each_number),
    **dict.fromkeys((torch.select_scatter, Tensor.select_scatter), _select_scatter),
    **({F.linear_cross_entropy: _each} if hasattr(F, "linear_cross_entropy") else {}),
    F.linear: _linear,
    **dict.fromkeys((F.conv1d, torch.conv1d, F.conv_transpose1d, torch.conv_transpose1d, F.adaptive_avg_pool1d), _rowwise(3)),
    **dict.fromkeys((F.conv2d, torch.conv2d, F.conv_transpose2d, torch.conv_transpose2d, F.adaptive_avg_pool2d), _rowwise(4)),
    **dict.fromkeys((F.conv3d, torch.conv3d, F.conv_transpose3d, torch.conv_transpose3d, F.adaptive_avg_pool3d), _rowwise(5)),
    F.scaled_dot_product_attention: _attention,
    torch.addmm: _addmm,
    Tensor.as_strided_: _as_strided_in_place,
    F.embedding: _embedding,
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _recurrent),
    **dict.fromkeys((torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell), _cell),
    **dict.fromkeys((torch.narrow, Tensor.narrow), _narrow),
    torch._C._VariableFunctions._pack_padded_sequence: _pack,
    torch._C._VariableFunctions._pad_packed_sequence: _pad,
    **dict.fromkeys(_BATCH_NORMS, _batch_norm),
    **dict.fromkeys((getattr(Tensor, n).__get__ for n in ("requires_grad", "grad_fn", "is_leaf")), _gradient_attribute),
    Tensor.register_hook: _register_hook,
    Tensor.requires_grad_: _requires_grad,
    custom_function_call: _saved_inputs,
}
