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
from torch.utils._pytree import tree_flatten, tree_map

from .functional_dropout import Call, Watch
from .row_flow import RowFlow
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
    mixing: str | None = None  # where rows meet those of other examples

    @property
    def wrong(self) -> str | None:
        """Why the run does not show that the model works."""
        wrong = self.misfit or self.error
        return f"in a dry run of {self.samples} samples, {wrong}" if wrong else None

    @property
    def trouble(self) -> str | None:
        """Why another place may be better."""
        return self.wrong or self.other_rows or (f"rows of the batch meet: {self.mixing}" if self.mixing else None)

    @property
    def fits(self) -> bool:
        return self.first_noise is not None and not self.trouble


class _Recorded(sampling):
    """A context that remembers who drew first, and how many rows one sample had there; and that tells noise from what is not."""

    def __init__(self, samples: int, watch: Watch):
        super().__init__(samples)
        self.watch, self.first_noise, self.expanded = watch, None, None
        self.flow: RowFlow | None = None

    def place(self, x: Tensor, batch_dim: int | None) -> dict:
        address = super().place(x, batch_dim)
        if address["expand"] and x in self.flow.noisy:
            self.flow.misfit = f"noise meets {x.shape[address['batch_dim']]} rows that were made of those of all samples"
        return address

    def _origin_on(self, device: torch.device) -> Tensor:
        origin = super()._origin_on(device)
        self.flow.noisy[origin] = True  # all that noise is made of
        return origin

    def _expansion(self, rows: int) -> tuple[bool, int]:
        if self.first_noise is not None:
            return super()._expansion(rows)
        self.first_noise = self.watch.innermost()
        result = super()._expansion(rows)
        self.expanded = self.batch
        return result


def as_arguments(example_inputs: Any) -> tuple[tuple, dict]:
    """Positional and keyword arguments from what a user gave."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def dry_run(model: nn.Module, batch_dim: int | None, args: tuple, kwargs: dict) -> DryRun:
    """Runs a converted model in training mode, with at least two rows, and as many samples as no size of the inputs and parameters is a
    multiple of: rows that are not expanded must not pass for such that are. The model is as before afterwards."""
    watch = Watch.of(model)
    dim = batch_dim or 0
    tensors = (*tree_flatten((args, kwargs))[0], *model.parameters(), *model.buffers())
    sizes = {n for v in tensors if isinstance(v, Tensor) for n in v.shape}
    samples = next(prime for prime in (53, 59, 61, 67, 71, 73, 79, 83, 89, 97) if all(n % prime for n in sizes) or prime == 97)
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
            context.flow = RowFlow(watch, batch, samples, (args, kwargs))
            with context, context.flow:
                output = torch.func.functional_call(model, state, args, kwargs)
            outputs = [v for v in tree_flatten(output)[0] if isinstance(v, Tensor) and v.dim() > dim]
            # Rows may be elsewhere in one: states of recurrent layers have them in the second dimension.
            wrong = [v.shape[dim] for v in outputs if samples * batch not in v.shape] if batch is not None else []
            if wrong:
                run.misfit = f"an output has {wrong[0]} rows instead of {samples} * {batch}"
            elif not outputs:
                run.misfit = "the output holds no tensor that is seen"
            else:
                run.misfit = context.flow.misfit
            run.mixing = context.flow.mixing
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
