"""The ops under torch's function transforms: torch.func.grad, vjp, jvp, and vmap, whose lanes are more samples of one call.

A converted model runs under a vmap of its own, over its noise samples (:mod:`iwsgd_ext.conversion.axis`); users have others.

An autograd Function of this package is ``compute(*arguments)``, ``save(ctx, *arguments)`` and ``backward(ctx, dy)``, and for the transforms

    merge(lanes, dims, *arguments) -> (arguments, dim)   one call that does what ``lanes`` calls would; ``dims`` says where each argument
                                                         holds lanes (None: nowhere), ``dim`` of the result holds lanes * rows
    tangent(dx, *arguments)                              the directional derivative
    ORIGIN                                               which argument is the noise's origin
"""

import functools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    _add_batch_dim,
    _unwrap_batched,
    get_interpreter_stack,
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    maybe_get_level,
    peek_interpreter_stack,
    pop_dynamic_layer_stack,
    push_dynamic_layer_stack,
)

from .. import backend

SAME_NOISE = (
    "Noise inside of torch.vmap: its lanes have one address, so that all would draw the same. Give each lane its own, in a context that is "
    "opened inside: iw.sampling(S, seed=0, first_example=i), where vmap maps i = torch.arange(...) (or sample_ids)."
)


class Below:
    """A block that computes below the innermost transform. (A class: torch's own is a generator, which takes several times as long.)"""

    __slots__ = ("transform",)

    def __enter__(self) -> None:
        self.transform = pop_dynamic_layer_stack()

    def __exit__(self, *_) -> None:
        push_dynamic_layer_stack(self.transform)


def active() -> bool:
    """Whether a transform runs, eager."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def apply(function: type[torch.autograd.Function], arguments: tuple) -> Tensor:
    """``function`` inside of a transform."""
    interpreter = peek_interpreter_stack()
    if interpreter.key() != TransformType.Vmap:
        return _form_of(function).apply(*arguments)
    # By hand: torch's own road for Functions under vmap costs five times as much.
    level = interpreter.level()
    values, dims = zip(*[_unwrapped(v, level) if isinstance(v, Tensor) else (v, None) for v in arguments], strict=True)
    with Below():
        if all(d is None for d in dims):
            return backend.apply(function, *values)
        lanes = next(v.shape[d] for v, d in zip(values, dims, strict=True) if d is not None)
        y, dim = merged(function, lanes, dims, values)
    return _add_batch_dim(y, dim, level)


def merged(function, lanes: int, dims: tuple, values: tuple, run: Callable | None = None) -> tuple[Tensor, int]:
    """The result of all lanes, and the dimension that holds them. ``run`` takes the merged arguments; None calls the Function."""
    run = run or partial(backend.apply, function)
    if dims[function.ORIGIN] is not None:  # seeds or examples of their own: nothing that one call knows
        each = [[v if d is None else v.select(d, lane) for v, d in zip(values, dims, strict=True)] for lane in range(lanes)]
        return torch.stack([run(*arguments) for arguments in each]), 0
    arguments, dim = function.merge(lanes, dims, *values)
    y = run(*arguments)
    return y.view(*y.shape[:dim], lanes, y.shape[dim] // lanes, *y.shape[dim + 1 :]), dim


def merge_rows(
    lanes: int, k: int, x: Tensor, dx: int | None, ids: Tensor | None, di: int | None, samples: int, expand: bool
) -> tuple[Tensor, Tensor, int, bool]:
    """(x, sample ids, their number, expand) of the one call; its rows, in dimension ``k``, are lane by lane those of the lanes' calls."""
    ids = merge_ids(lanes, ids, di, samples, x.device)
    if dx is None and (expand or samples == 1):
        return x, ids, lanes * samples, True
    if dx is None:
        x, dx = x.expand(lanes, *x.shape), 0
    x = x if dx == k else x.movedim(dx, k)
    if expand and samples > 1:
        x = x.unsqueeze(k + 1).expand(*x.shape[: k + 1], samples, *x.shape[k + 1 :]).flatten(k + 1, k + 2)
    return x.flatten(k, k + 1), ids, lanes * samples, False


def merge_ids(lanes: int, ids: Tensor | None, di: int | None, samples: int, device: torch.device) -> Tensor:
    """The ids of all lanes' samples, lane by lane; the same ones in each where they hold no lanes."""
    if di is not None:
        return (ids if di == 0 else ids.movedim(di, 0)).flatten(0, 1)
    ids = torch.arange(samples, device=device) if ids is None else ids
    return ids.repeat(lanes, *[1] * (ids.dim() - 1))


def check_noise_of_lanes(x: Tensor | None, origin: Tensor, sample_ids: Tensor | None) -> None:
    """Raises where lanes of x, in the innermost vmap that has any, would draw one noise. Without x: lanes of a vmap around the call."""
    stack = get_interpreter_stack() or ()
    for interpreter in reversed(stack if x is not None else stack[-1:]):
        if interpreter.key() == TransformType.Vmap and (x is None or _is_mapped(x, interpreter.level())):
            if not any(_is_mapped(v, interpreter.level()) for v in (origin, sample_ids)):
                raise RuntimeError(SAME_NOISE)
            return


def check_seed_of_lanes() -> None:
    """Raises inside of a vmap, where a seed that is drawn would be one for all lanes."""
    if any(interpreter.key() == TransformType.Vmap for interpreter in get_interpreter_stack() or ()):
        raise RuntimeError(SAME_NOISE)


def _is_mapped(x: Tensor | None, level: int) -> bool:
    """Whether x holds lanes of that level, whatever other transforms have wrapped it."""
    while x is not None and is_functorch_wrapped_tensor(x):
        if is_batchedtensor(x) and maybe_get_level(x) == level:
            return True
        x = get_unwrapped(x)
    return False


def plain(x: Tensor) -> Tensor:
    """x with all lanes, and without a gradient: for checks of values."""
    while is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    return x.detach()


def _unwrapped(x: Tensor, level: int) -> tuple[Tensor, int | None]:
    return _unwrap_batched(x, level) if is_batchedtensor(x) and maybe_get_level(x) == level else (x, None)


@functools.cache
def _form_of(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The Function as transforms want it: its forward takes no context."""

    def vmap(info, dims, *arguments):
        dims = tuple(d if isinstance(v, Tensor) else None for v, d in zip(arguments, dims, strict=True))  # a tuple has one for each item
        return merged(function, info.batch_size, dims, arguments)

    def jvp(ctx, dx, *_):
        return function.tangent(dx, *ctx.arguments)

    def setup_context(ctx, inputs, output):
        function.save(ctx, *inputs)
        ctx.arguments = inputs[1:]

    names = {"forward": function.compute, "setup_context": setup_context, "vmap": vmap, "jvp": jvp}
    return type(function.__name__, (function,), {name: staticmethod(f) for name, f in names.items()})
