"""The forward passes of an evaluation: noise is on, all else in eval mode; a pass has some of the noise samples, and all share a seed."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from ..backend import PACKAGE
from ..checks import as_arguments, as_int, as_samples, check
from ..conversion.converted import Converted, conversion_of, has_rows
from ..conversion.functional_dropout import Call, Watch
from ..conversion.one_by_one import OneByOne
from ..layers.context import sampling


@contextmanager
def noisy_evaluation(model: nn.Module) -> Iterator[None]:
    """A block in which noise layers are in training mode and all else in eval mode, without gradients."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    noisy = [module for module in model.modules() if _is_noise_layer(module)]
    conversions = [conversion for module in model.modules() if (conversion := conversion_of(module)) is not None]
    functional = any(conversion.has_noise or not conversion.watched for conversion in conversions)  # a training forward shows it
    if not noisy and not functional:
        raise ValueError("model: expected one with noise layers of this package (iw.convert puts them in), got none")
    # In eval mode torch's encoder layer may take one fused call, which calls no layer inside of it.
    fused = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    before = [(module, vars(module).get("training", module.training)) for module in model.modules()]
    try:
        model.eval()
        for module in (*noisy, *fused):
            module.training = True
        with torch.no_grad():
            yield
    finally:
        for module, training in before:
            module.training = training


def _is_noise_layer(module: nn.Module) -> bool:
    kind = type(module)
    while issubclass(kind, Converted | OneByOne):  # iw.convert has put these before the module's own class
        kind = kind.original
    return any(cls.__module__.startswith(f"{PACKAGE}.layers.") for cls in kind.__mro__)


def passes_of(model: nn.Module, inputs: Any, samples: int, chunk: int | None, seed, first_example, warn: bool):
    """(k, output of k*B rows) of each pass over at most ``chunk`` of the samples, with one seed; ``warn``: warn of noise that is off."""
    samples, chunk = as_samples(samples), None if chunk is None else as_int("chunk", chunk)
    check(chunk is None or 1 <= chunk <= samples, "chunk", f"a number of samples in 1 .. samples={samples}", chunk)
    args, named = as_arguments(inputs)
    batch = examples_of(model, inputs)
    origin = origin_of(model, inputs, seed, first_example)
    chunk = chunk or samples
    for first in range(0, samples, chunk):
        ids = range(first, min(first + chunk, samples))
        context = sampling(len(ids), sample_ids=ids, first_example=first_example)
        context.evaluating = True
        context._origin = origin
        watched = _functional_noise(model) if warn and first == 0 else None
        context.watch = watched and watched[0]
        with context:
            output = model(*args, **named)
        if watched:
            _warn_of_noise_that_is_off(*watched)
        for rows in {v.shape[0] for v in tree_leaves(output) if isinstance(v, Tensor) and v.dim() > 0}:
            if rows % max(len(ids) * batch, 1) != 0:
                raise ValueError(
                    f"model: expected an output of {len(ids)} samples * {batch} examples = {len(ids) * batch} rows (or a multiple), got "
                    f"{rows}; was a noise layer called? The output's rows come first: a module around the model can move them."
                )
        yield len(ids), output


def _functional_noise(model: nn.Module) -> tuple[Watch, list[Call]] | None:
    """(a watch for an evaluation, the calls of functional dropout that a training forward made), or None without such calls."""
    for module in model.modules():
        conversion = conversion_of(module)
        calls = [call for call in conversion.calls if call.kind == "replaced" and call.p] if conversion is not None else []
        if calls:
            return Watch.of(module), calls
    return None


def _warn_of_noise_that_is_off(watch: Watch, trained: list[Call]) -> None:
    drawn = {(call.module, call.function, call.place) for call in watch.calls if call.p}
    missing = [str(call) for call in trained if (call.module, call.function, call.place) not in drawn]
    if missing and watch.ran:
        warnings.warn(
            "in eval mode the model's own code turns off noise of its training, so that this evaluation does not draw it: "
            + "; ".join(missing),
            stacklevel=4,
        )


def examples_of(model: nn.Module, inputs: Any) -> int:
    """The number of examples in a model's inputs."""
    conversion = conversion_of(model)
    dim = conversion.batch_dim or 0 if conversion is not None else 0  # a time-major model has them in dimension 1
    for v in tree_leaves(as_arguments(inputs), is_leaf=lambda v: isinstance(v, PackedSequence)):
        if isinstance(v, PackedSequence):
            return int(v.batch_sizes[0])  # batch_sizes are on the CPU, wherever the data is
        if has_rows(v, dim):
            return v.shape[dim]
    raise ValueError("x: expected at least one tensor with a dimension of examples")


def origin_of(model: nn.Module, inputs: Any, seed, first_example=None) -> Tensor:
    """The seed of a whole evaluation, on the device of its data."""
    return sampling(1, seed=seed, first_example=first_example).origin_for(tree_leaves(as_arguments(inputs)), model)
