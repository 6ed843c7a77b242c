"""A training forward on fake tensors: what shapes come out, where the first noise is drawn, which calls draw noise. Nothing is computed."""

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from .functional_dropout import Call, Watch
from .sampling import sampling


@dataclass
class DryRun:
    """What a dry run has shown."""

    calls: list[Call]
    error: str | None = None  # where the run stopped
    misfit: str | None = None  # what is wrong with the output's rows
    first_noise: str | None = None  # the module that drew the first noise

    @property
    def fits(self) -> bool:
        return self.first_noise is not None and self.error is None and self.misfit is None


class _Recorded(sampling):
    """A context that remembers who drew first."""

    def __init__(self, samples: int, watch: Watch):
        super().__init__(samples)
        self.watch, self.first_noise = watch, None

    def _expansion(self, rows: int) -> tuple[bool, int]:
        if self.first_noise is None:
            self.first_noise = self.watch.innermost()
        return super()._expansion(rows)


class _Randomness(TorchDispatchMode):
    """Random numbers below Python's functions: of scripted functions, of operators called by torch.ops."""

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in func.tags and not self.watch.seen:
            self.watch.add(str(func), None, "random")
        return func(*args, **(kwargs or {}))


def as_arguments(example_inputs: Any) -> tuple[tuple, dict]:
    """Positional and keyword arguments from what a user gave."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def dry_run(model: nn.Module, samples: int, batch_dim: int | None, args: tuple, kwargs: dict) -> DryRun:
    """Runs a converted model in training mode, with at least two samples and two rows; it is as before afterwards."""
    watch = Watch.of(model)
    run = DryRun([])
    dim = batch_dim or 0
    samples = max(samples, 2)  # one sample would fit everywhere
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
            with context, _Randomness(watch):
                output = torch.func.functional_call(model, state, args, kwargs)
            sizes = [v.shape[dim] for v in tree_flatten(output)[0] if isinstance(v, Tensor) and v.dim() > dim]
            batch = 3 if rows == 1 else rows
            wrong = [n for n in sizes if n != samples * batch] if batch is not None else []
            if wrong:
                run.misfit = f"an output has {wrong[0]} rows instead of {samples} * {batch}"
            elif not sizes:
                run.misfit = "the output holds no tensor that is seen"
        except Exception as error:  # whatever a model raises where shapes do not fit, or where it asks for values
            run.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    run.calls, run.first_noise = list(watch.calls), context.first_noise
    return run


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Puts back what a forward may leave on modules (flags, buffers, caches, counters) and in generators."""
    tables = ("_parameters", "_buffers", "_modules")
    before = [(m, dict(vars(m)), {name: dict(vars(m)[name]) for name in tables if name in vars(m)}) for m in model.modules()]
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(state)
        for module, attributes, contents in before:
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in contents.items():
                attributes[name].clear()
                attributes[name].update(content)
