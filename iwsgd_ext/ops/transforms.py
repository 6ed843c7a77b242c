"""The ops under torch's function transforms: torch.func.grad, vjp, jvp and vmap.

torch.vmap calls a function once for all elements of a batch. One of these elements, and the function's call for it, is a lane. Here the
calls of an op in all lanes are merged into one call with more samples. A converted model runs under a vmap over its noise samples
(:mod:`iwsgd_ext.conversion.axis`), where a lane is a noise sample; users may map over other things.

An autograd Function of this package has ``compute(*arguments)``, ``save(ctx, *arguments)`` and ``backward(ctx, dy)``, and for transforms

    merge(lanes, dims, *arguments) -> (arguments, dim)   the arguments of one call for all lanes: ``dims`` are the arguments' dimensions of
                                                         lanes (None: the argument is the same in all), and dimension ``dim`` of the
                                                         result has lanes * rows entries
    tangent(dx, *arguments)                              the directional derivative
    ORIGIN                                               the index of the argument that is the noise's origin
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
    "Noise inside of torch.vmap: all its lanes have the same address, and would draw the same noise. Give each lane its own address, in a "
    "context that is opened inside: iw.sampling(S, seed=0, first_example=i), where vmap maps i = torch.arange(...) (or sample_ids)."
)


class Below:
    """A block that computes below the innermost transform. (A class, as torch's own generator takes several times as long.)"""

    __slots__ = ("transform",)

    def __enter__(self) -> None:
        self.transform = pop_dynamic_layer_stack()

    def __exit__(self, *_) -> None:
        push_dynamic_layer_stack(self.transform)


def active() -> bool:
    """True inside of a transform that runs eagerly."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def apply(function: type[torch.autograd.Function], arguments: tuple) -> Tensor:
    """The result of ``function`` inside of a transform."""
    interpreter = peek_interpreter_stack()
    if interpreter.key() != TransformType.Vmap:
        return _form_of(function).apply(*arguments)
    # Done by hand, as torch's own code for Functions under vmap costs five times as much.
    level = interpreter.level()
    values, dims = zip(*[_unwrapped(v, level) if isinstance(v, Tensor) else (v, None) for v in arguments], strict=True)
    with Below():
        if all(d is None for d in dims):
            return backend.apply(function, *values)
        lanes = next(v.shape[d] for v, d in zip(values, dims, strict=True) if d is not None)
        y, dim = merged(function, lanes, dims, values)
    return _add_batch_dim(y, dim, level)


def merged(function, lanes: int, dims: tuple, values: tuple, run: Callable | None = None) -> tuple[Tensor, int]:
    """(the result of all lanes, its dimension of lanes). ``run`` takes the merged arguments; None calls the Function."""
    run = run or partial(backend.apply, function)
    if dims[function.ORIGIN] is not None:  # one call has one seed and one first example: lanes with others are called one by one
        each = [[v if d is None else v.select(d, lane) for v, d in zip(values, dims, strict=True)] for lane in range(lanes)]
        return torch.stack([run(*arguments) for arguments in each]), 0
    arguments, dim = function.merge(lanes, dims, *values)
    y = run(*arguments)
    return y.view(*y.shape[:dim], lanes, y.shape[dim] // lanes, *y.shape[dim + 1 :]), dim


def merge_rows(
    lanes: int, k: int, x: Tensor, dx: int | None, ids: Tensor | None, di: int | None, samples: int, expand: bool
) -> tuple[Tensor, Tensor, int, bool]:
    """(x, sample ids, their number, expand) of the one call. Its rows, in dimension ``k``, are those of the lanes' calls, lane by lane."""
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
    """The ids of all lanes' samples, lane by lane; ``di`` is their dimension of lanes, None where all lanes have the same ids."""
    if di is not None:
        return (ids if di == 0 else ids.movedim(di, 0)).flatten(0, 1)
    ids = torch.arange(samples, device=device) if ids is None else ids
    return ids.repeat(lanes, *[1] * (ids.dim() - 1))


def check_noise_of_lanes(x: Tensor | None, origin: Tensor, sample_ids: Tensor | None) -> None:
    """Raises where the lanes of x, in the innermost vmap over x, would draw the same noise. Without x, the lanes of the vmap around the
    call are meant."""
    stack = get_interpreter_stack() or ()
    for interpreter in reversed(stack if x is not None else stack[-1:]):
        if interpreter.key() == TransformType.Vmap and (x is None or _is_mapped(x, interpreter.level())):
            if not any(_is_mapped(v, interpreter.level()) for v in (origin, sample_ids)):
                raise RuntimeError(SAME_NOISE)
            return


def check_seed_of_lanes() -> None:
    """Raises inside of a vmap, where all lanes would get the same drawn seed."""
    if any(interpreter.key() == TransformType.Vmap for interpreter in get_interpreter_stack() or ()):
        raise RuntimeError(SAME_NOISE)


def _is_mapped(x: Tensor | None, level: int) -> bool:
    """True where x holds lanes of that level, below any wrappers of other transforms."""
    while x is not None and is_functorch_wrapped_tensor(x):
        if is_batchedtensor(x) and maybe_get_level(x) == level:
            return True
        x = get_unwrapped(x)
    return False


def plain(x: Tensor) -> Tensor:
    """The memory of x, with all lanes and without a gradient: for checks of values."""
    while is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    return x.detach()


def _unwrapped(x: Tensor, level: int) -> tuple[Tensor, int | None]:
    return _unwrap_batched(x, level) if is_batchedtensor(x) and maybe_get_level(x) == level else (x, None)


@functools.cache
def _form_of(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The Function in the form that transforms take: ``forward`` has no ``ctx``, and ``setup_context`` saves."""

    def vmap(info, dims, *arguments):
        dims = tuple(d if isinstance(v, Tensor) else None for v, d in zip(arguments, dims, strict=True))  # (a tuple has a tuple of dims)
        return merged(function, info.batch_size, dims, arguments)

    def jvp(ctx, dx, *_):
        return function.tangent(dx, *ctx.arguments)

    def setup_context(ctx, inputs, output):
        function.save(ctx, *inputs)
        ctx.arguments = inputs[1:]

    names = {"forward": function.compute, "setup_context": setup_context, "vmap": vmap, "jvp": jvp}
    return type(function.__name__, (function,), {name: staticmethod(f) for name, f in names.items()})
