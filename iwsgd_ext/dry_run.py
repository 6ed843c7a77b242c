"""A training forward on fake tensors: what shapes come out, where the first noise is drawn, which calls draw noise. Nothing is computed."""

import contextlib
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from .functional_dropout import Call, Watch
from .sampling import sampling


@dataclass
class DryRun:
    """What a dry run has shown."""

    samples: int  # S of the run, whatever the model's own is
    calls: list[Call]
    error: str | None = None  # where the run stopped
    asks_values: bool = False  # it stopped as the forward asks for values, which fake tensors have not
    misfit: str | None = None  # what is wrong with the output's rows
    first_noise: str | None = None  # the module that drew the first noise
    other_rows: str | None = None  # shapes fit, but what expands are not the rows of the inputs

    @property
    def wrong(self) -> str | None:
        """Why the run does not show that the model works."""
        wrong = self.misfit or self.error
        return f"in a dry run of {self.samples} samples, {wrong}" if wrong else None

    @property
    def fits(self) -> bool:
        return self.first_noise is not None and self.wrong is None and self.other_rows is None


class _Recorded(sampling):
    """A context that remembers who drew first, and how many rows one sample had there."""

    def __init__(self, samples: int, watch: Watch):
        super().__init__(samples)
        self.watch, self.first_noise, self.expanded = watch, None, None

    def _expansion(self, rows: int) -> tuple[bool, int]:
        if self.first_noise is not None:
            return super()._expansion(rows)
        self.first_noise = self.watch.innermost()
        result = super()._expansion(rows)
        self.expanded = self.batch
        return result


class _Below(TorchDispatchMode):
    """What happens below Python's functions: random numbers (scripted functions, operators called by torch.ops), and a misfit that has
    no shape: an index made for S*B rows, into B of them (fake tensors have no values that could be out of range)."""

    def __init__(self, watch: Watch, batch: int | None, samples: int):
        super().__init__()
        self.watch, self.batch, self.rows = watch, batch, (batch or 0) * samples
        self.misfit: str | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in func.tags and not self.watch.seen:
            self.watch.add(str(func), None, "random")
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten._unsafe_index.Tensor):
            x, indices = args[:2]
            if any(i is not None and n == self.batch and self.rows in i.shape for n, i in zip(x.shape, indices, strict=False)):
                self.misfit = f"{self.batch} rows are indexed by {self.rows}"
        return func(*args, **(kwargs or {}))


def as_arguments(example_inputs: Any) -> tuple[tuple, dict]:
    """Positional and keyword arguments from what a user gave."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def dry_run(model: nn.Module, batch_dim: int | None, args: tuple, kwargs: dict) -> DryRun:
    """Runs a converted model in training mode, with at least two rows, and as many samples as no size of the inputs is a multiple of:
    rows that are not expanded must not pass for such that are. The model is as before afterwards."""
    watch = Watch.of(model)
    dim = batch_dim or 0
    sizes = [n for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor) for n in v.shape]
    samples = next(prime for prime in (7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47) if all(n % prime for n in sizes) or prime == 47)
    run = DryRun(samples, [])
    with _untouched(model), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        model.train()
        context = _Recorded(samples, watch)
        try:
            rows = next((v.shape[dim] for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor) and v.dim() > dim), None)

            def to_fake(v: Any) -> Any:
                if not isinstance(v, Tensor):
                    return v
                if rows == 1 and v.dim() > dim and v.shape[dim] == 1:
                    v = v.expand(*v.shape[:dim], 3, *v.shape[dim + 1 :])  # one row would broadcast where it does not fit
                return fake.from_tensor(v)

            state = {k: fake.from_tensor(v) for k, v in (*model.named_parameters(), *model.named_buffers())}
            args, kwargs = tree_map(to_fake, (args, kwargs))
            batch = 3 if rows == 1 else rows
            with context, _Below(watch, batch, samples) as below:
                output = torch.func.functional_call(model, state, args, kwargs)
            sizes = [v.shape[dim] for v in tree_flatten(output)[0] if isinstance(v, Tensor) and v.dim() > dim]
            wrong = [n for n in sizes if n != samples * batch] if batch is not None else []
            if wrong:
                run.misfit = f"an output has {wrong[0]} rows instead of {samples} * {batch}"
            elif not sizes:
                run.misfit = "the output holds no tensor that is seen"
            else:
                run.misfit = below.misfit
            if context.expanded not in (None, batch):
                run.other_rows = (
                    f"{context.expanded} rows would expand where the inputs have {batch}; expand='first' is right if each input's rows "
                    "follow one another there (as flattened tokens do), and wrong if inputs do (two views in one batch)"
                )
        except Exception as error:  # whatever a model raises where shapes do not fit, or where it asks for values
            text = str(error).splitlines()[0] if str(error) else ""
            run.asks_values = isinstance(error, DataDependentOutputException | DynamicOutputShapeException)
            run.error = f"{type(error).__name__}: {shorten(text, 200, placeholder=' ...')}"
    run.calls, run.first_noise = list(watch.calls), context.first_noise
    return run


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Puts back what a forward may leave on modules (flags, buffers, caches, counters) and in generators."""
    tables = ("_parameters", "_buffers", "_modules")
    before = [(m, dict(vars(m)), {name: dict(vars(m)[name]) for name in tables if name in vars(m)}) for m in model.modules()]
    state, logger = random.getstate(), logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it reports each shape that does not fit
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        logger.setLevel(level)
        random.setstate(state)
        for module, attributes, contents in before:
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in contents.items():
                attributes[name].clear()
                attributes[name].update(content)
