"""Modules that are called once for each noise sample, below the sample axis, because they cannot run on it.

Below the axis such a module is called K times, each time as in a forward of one noise sample:

    streams     each call starts with the same stream
    arguments   noisy tensors come in as slices of their memory, so that a write in place is seen afterwards
    results     tensors of the K results are stacked, and so are tensors that the module leaves in its attributes

Some modules cannot be called so, because the result would not be what a forward of each sample alone gives: an argument is an object that
the module may change (a cache), the module writes into a tensor that all samples share, or its results differ between samples in more than
the values of tensors. Then the module around it is called once for each sample instead, and at last the model itself. Where the module has
state that another call or the axis uses in the same forward, only a loop over whole forwards has the right order: :func:`loop` runs then.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..layers.context import current, sampling
from .axis import memory_of, rows
from .axis_outputs import PLAIN, Attributes, NoisyBuffer, Output, changed, check_returned
from .class_swap import Behaviour
from .pass_state import RandomState


class NotOneByOne(RuntimeError):
    """Raised where a module cannot be called once for each noise sample; the module around it may be."""

    def __init__(self, reason: str):
        super().__init__(f"a part of the model cannot be called once for each noise sample by itself: {reason}")


class NotOnAxis(RuntimeError):
    """Raised where only the whole model can be called once for each noise sample."""


class OneByOne(Behaviour):
    """Makes the forward of a module on the axis one call for each noise sample."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        context = current()
        if context is None or context.axis is None:
            return super().forward(*args, **kwargs)
        return one_by_one(self, super().forward, args, kwargs, context)


def one_by_one(module: nn.Module | None, forward: Callable, args: tuple, kwargs: dict, context: sampling) -> Any:
    """The results of ``forward``, called once for each noise sample of the context's axis, stacked."""
    axis = context.axis
    if axis.is_covered():
        raise NotOnAxis("a part that is called once for each noise sample stands inside of a transform of torch.func's")
    leaves, spec = tree_flatten((args, kwargs))
    for v in leaves:
        if not isinstance(v, Tensor | PLAIN):
            raise NotOneByOne(f"an argument is a {type(v).__name__}")
    unwrapped = [axis.unwrap(v) for v in leaves]
    # A recompute of a checkpoint around this takes the context of the first function called in it: call one now, while on the axis.
    axis.ids.dim()
    attributes = Attributes(module)
    contents = attributes.contents()
    with torch._C.DisableTorchFunction():  # versions and memory are no values: the axis' rules must not take this for a read
        shared = [(v, v._version) for v, d in unwrapped if isinstance(v, Tensor) and d is None and not v.is_inference()]
        state = _State(attributes.modules)
        if (state.memory | {memory_of(v) for v, _ in shared}) & (axis.written | (axis.statistics - state.memory)):
            raise NotOnAxis("one part of the forward writes state that another part uses, and each sample would have its own")
    each, kept, streams = [], [], []
    with axis.below(), context.below():
        start, random = context.stream, RandomState(axis.ids.device) if axis.randomness == "same" else None
        for s in range(axis.samples):
            if random is not None:
                random.restore()
            context.stream, context.sample_ids = start, axis.ids[s : s + 1]
            a, k = tree_unflatten([v if d is None else v.select(d, s) for v, d in unwrapped], spec)
            result = forward(*a, **k)
            check_returned(result)
            each.append(tree_flatten(result))
            kept.append(attributes.taken())
            streams.append(context.stream)
        with torch._C.DisableTorchFunction():
            if any(v._version != version for v, version in shared):
                raise NotOneByOne("it writes into an argument that all noise samples share")
            axis.below_axis |= state.memory
            axis.written |= state.written()
        if len(set(streams)) > 1:
            raise NotOneByOne("samples draw noise a different number of times")
        if changed(contents, attributes.contents()):
            raise NotOneByOne("it changes what a list or dict that it keeps holds")
        results = _stacked(each)
    try:
        attributes.put(kept, lambda of_samples: axis.wrap(_stack(of_samples)))
    except ValueError as error:
        raise NotOneByOne(str(error)) from None
    return tree_unflatten([v if same else axis.wrap(v) for v, same in results], each[0][1])


class _State:
    """The tensors through which one call of modules may change the next: buffers, and tensors held as attributes.

    Attributes:
        memory: the memory of these tensors.
    """

    def __init__(self, modules: list[nn.Module]):
        held = [(v, m) for m in modules for v in (*m._buffers.values(), *vars(m).values()) if isinstance(v, Tensor)]
        self.held = [(memory_of(v), v, None if v.is_inference() else v._version, m) for v, m in held]
        self.memory = {memory for memory, *_ in self.held}

    def written(self) -> set[int]:
        """The memory of the tensors that calls have written. (Running statistics, whose writes count no version, are taken for written.)"""
        return {
            memory
            for memory, v, version, m in self.held
            if (version is not None and v._version != version) or (isinstance(m, _NormBase) and m.training and m.running_mean is not None)
        }


def _stacked(each: list[tuple[list, Any]]) -> list[tuple[Any, bool]]:
    """Each leaf of the samples' results: (a tensor [K, ...], False), or (the value that all samples have, True)."""
    first, spec = each[0]
    if any(s != spec for _, s in each):
        raise NotOneByOne("its results differ in structure")
    results = []
    for i, v in enumerate(first):
        of_samples = [leaves[i] for leaves, _ in each]
        if isinstance(v, Tensor):
            results.append((_stack(of_samples), False))
        elif all(_is_same(x, v) for x in of_samples):
            results.append((v, True))
        else:
            raise NotOneByOne(f"a result is a {type(v).__name__}")
    return results


def _is_same(x: Any, v: Any) -> bool:
    return x is v or (type(x) is type(v) and isinstance(v, str | int | float) and x == v)


def _stack(tensors: list[Tensor]) -> Tensor:
    """torch.stack, with each sample laid out in memory as the first tensor is."""
    x = tensors[0]
    if any(v.shape != x.shape for v in tensors):
        raise NotOneByOne("its results differ in shape")
    if x.is_contiguous() or x.dim() < 2:
        return torch.stack(tensors)
    order = sorted(range(x.dim()), key=lambda d: -x.stride(d))
    back = sorted(range(x.dim()), key=order.__getitem__)
    return torch.stack([v.permute(order) for v in tensors]).permute(0, *(1 + d for d in back))


def loop(model: nn.Module, forward: Callable, args: tuple, kwargs: dict, context: sampling, mode: Any, batch_dim: int, batch: int | None):
    """The outputs of a whole model, called once for each noise sample, as :func:`iwsgd_ext.conversion.axis.run` gives them."""
    context.scalar_output = False
    start, streams, outputs, kept, attributes = context.stream, [], [], [], Attributes(model)
    random = RandomState(context._origin.device) if context.torch_noise == "same" else None
    ids = context.sample_ids if context.sample_ids is not None else torch.arange(context.samples, device=context._origin.device)
    given = [(v, v._version) for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor) and not v.is_inference()]
    with mode:
        for s in range(context.samples):
            if random is not None:
                random.restore()
            context.stream = start
            with context.changed(samples=1, sample_ids=ids[s : s + 1], expand="none", batch=None):
                output = forward(*args, **kwargs)
                check_returned(output)
                outputs.append(Output(output, model, look_into=False))
            kept.append(attributes.taken())
            streams.append(context.stream)
            if any(v._version != version for v, version in given):
                raise RuntimeError("The model changes its inputs in place, which its noise samples share: let its forward clone them.")
    context.stream = max(streams)
    first = outputs[0]
    values = [[v for v in o.leaves if isinstance(v, str | int | float)] for o in outputs]
    if any(o.spec != first.spec or len(o.tensors) != len(first.tensors) or v != values[0] for o, v in zip(outputs, values, strict=True)):
        raise RuntimeError(
            "The model returns other values or structures for one noise sample than for another, which cannot be returned together: return "
            "tensors (h.mean() instead of h.mean().item()), or call it for one sample at a time, in iw.sampling(1, sample_ids=[s])."
        )

    def together(outputs: list[Output]) -> list[Tensor]:
        stacked = [_stack(list(of_samples)) for of_samples in zip(*(o.tensors for o in outputs), strict=True)]
        context.scalar_output |= any(x.dim() == 1 and x.requires_grad for x in stacked)
        return [rows(x, batch_dim, batch) for x in stacked]

    try:
        attributes.put(kept, lambda of_samples: rows(_stack(of_samples), batch_dim, batch))
        tensors = together(outputs)
    except (NotOneByOne, ValueError) as error:
        raise RuntimeError(f"The noise samples of this model cannot be returned together: {error}.") from None
    for i, v in enumerate(first.leaves):
        if not isinstance(v, Tensor | PLAIN):  # an object: one for all samples, or a list where these differ (caches, layers left out)
            objects = [o.leaves[i] for o in outputs]
            of_objects = [Output([v], model) for v in objects]
            try:
                first.leaves[i] = of_objects[0].replaced(together(of_objects))[0]
            except (NotOneByOne, ValueError):
                first.leaves[i] = objects
    return first.replaced(tensors)


def blamed(model: nn.Module, error: Exception, called: dict[str, str]) -> str | None:
    """The name of the innermost submodule in which an error of the axis arose, of those that are not ``called`` once for each sample yet;
    "" is the model. None where the error is the model's own: it arose below the axis.

    Only the traceback knows which forwards were running: their frames have the module as ``self``.
    """
    names = {id(module): name for name, module in model.named_modules()}
    path, below, traceback = [""], False, error.__traceback__
    if isinstance(error, NoisyBuffer):
        parts = names[id(error.module)].split(".")
        path += [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
        traceback = None
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code in (one_by_one.__code__, loop.__code__):
            below = True
            break
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and id(module) in names:
            path.append(names[id(module)])
        traceback = traceback.tb_next
    if isinstance(error, NotOnAxis):
        return "" if "" not in called else None
    # "escaped from inside" is torch's message for a noisy tensor below the axis: the module gets it by another way than as an argument.
    if below and not isinstance(error, NotOneByOne) and "escaped from inside" not in str(error):
        return None
    # A module that is called so already did not help: the error arose in a method of it other than forward.
    return next((name for name in reversed(path) if name not in called), None)


_REASONS = {
    "data-dependent control flow": "it asks for the values of a tensor, as in `if tensor:`",
    ".item()": "it asks for the value of a tensor, as `.item()` does",
    "dynamic shape": "a noisy mask or number decides on a shape",
    "setup_context staticmethod": "it calls an autograd Function, or has a full backward hook, which torch.vmap does not take",
    "vmap staticmethod": "it calls an autograd Function without a rule for torch.vmap",
}


def reason_of(error: Exception) -> str:
    """The reason why a module cannot run on the axis, in few words."""
    text = (str(error).splitlines() or [""])[0]
    known = next((words for part, words in _REASONS.items() if part in text), None)
    return known or f"{type(error).__name__}: {text[:160]}"
