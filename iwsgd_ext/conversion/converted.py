"""A converted model: the noise that runs have shown, and the training forward that draws S noise samples."""

import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..layers.context import current, is_evaluating, outside_of_contexts, sampling
from . import axis as sample_axis
from . import class_swap
from .axis_outputs import check_not_later
from .axis_rules import AxisRules
from .class_swap import Behaviour
from .functional_dropout import Call, FunctionalDropout, Watch
from .one_by_one import OneByOne, blamed, loop, reason_of
from .pass_state import RandomState, Snapshot
from .swaps import draws, idle_modules, rate_of, unreached_modules
from .verify import Verification, verify_conversion

CONVERSION = "_iw_conversion"  # the attribute of a converted model that holds its Conversion
FORWARD = "_iw_forward"  # the attribute that keeps a forward which the model had beside its class'
_first_watch = threading.RLock()
NOT_REACHED = "iw.convert leaves this noise as it is: it is no function of seed and sample, and no replay repeats it: "
SCALAR_OUTPUT = (
    "the model returns a number for each noise sample. If this is a loss that it computes from labels, the samples in it have no "
    "importance weights: leave the labels out, and give the model's logits to iw.IWCrossEntropyLoss (Hugging Face's Trainer: "
    "compute_loss_func)"
)


def conversion_of(model: nn.Module) -> "Conversion | None":
    """The Conversion of a converted model, or None."""
    return getattr(model, CONVERSION, None)


class Converted(Behaviour):
    """Makes the training forward of a model one under S noise samples."""

    @classmethod
    def forward_of(cls, original: type[nn.Module]) -> dict:
        @functools.wraps(original.forward)  # Hugging Face's Trainer reads its signature
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            own = vars(self).get(FORWARD) or functools.partial(original.forward, self)
            conversion = vars(self).get(CONVERSION)  # a slice of a converted nn.Sequential has none
            return own(*args, **kwargs) if conversion is None else conversion.forward(self, own, args, kwargs)

        return {"forward": forward}


@dataclass(eq=False)
class Conversion:
    """The settings of a converted model, the noise that runs have shown, and its training forward.

    Attributes:
        samples, expand, batch_norm, batch_dim, strict, verify: as :func:`iwsgd_ext.convert` was given them.
        one_by_one: names of the submodules that are called once for each sample, with the reason.
        calls: the function calls that drew noise in the forward that was watched.
        watched: True once a training forward was watched (a compiled one is not).
        drew: True where that forward drew noise of this package.
        generators: the generators that gave that forward numbers, through functions that iw.convert does not know.
        verification: the last comparison with samples alone, or None.
        told_of_scalars: True once the warning SCALAR_OUTPUT was given.
    """

    samples: int
    expand: str
    batch_norm: str
    batch_dim: int | None
    strict: bool = False
    verify: bool = True
    one_by_one: dict[str, str] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    watched: bool = False
    drew: bool = False
    generators: list[str] = field(default_factory=list)
    verification: Verification | None = None
    told_of_scalars: bool = False

    @property
    def has_noise(self) -> bool:
        """True where the forward that was watched drew noise of the context."""
        return self.drew or any(call.kind == "replaced" for call in self.calls)

    def unreached(self, model: nn.Module) -> list[str]:
        """The noise that is not drawn by the context, as far as it is known: modules, function calls, generators."""
        found = unreached_modules(model)
        modules = [f"{name} ({kind}{'' if p is None else f', p={p}'})" for name, kind, p in found]
        inside = {name for name, _, _ in found}
        calls = [str(call) for call in self.calls if call.kind != "replaced" and call.module not in inside]
        others = [
            "torch's random numbers, through a function that iw.convert does not know"
            if g == "torch"
            else f"{g}'s random numbers (once for all samples of a pass, and again in each pass of a strategy of several)"
            for g in self.generators
        ]
        return modules + calls + others

    def samples_alike(self, model: nn.Module) -> str | None:
        """A message where the training forward that was watched drew no noise, or only noise of rate 0; else None."""
        drawn = any(call.kind != "replaced" or call.p != 0 for call in self.calls) or self.generators
        layers = [module for module in model.modules() if draws(module)]
        by_hand = self.drew and not layers and not self.calls  # the forward calls functions of this package
        if drawn or by_hand or (self.drew and any(rate_of(module) != 0 for module in layers)):
            return None
        idle = "".join(f". {reason}" for reason in idle_modules(model))
        return f"a training forward drew no noise, so that all samples are alike{idle}"

    def forward(self, model: nn.Module, own: Callable, args: tuple, kwargs: dict) -> Any:
        """The model's output in the sampling context around it, or in a new one."""
        if not model.training and not is_evaluating():
            return own(*args, **kwargs)
        context = current()
        if context is None:
            with sampling(self.samples) as context:
                return self._run(model, own, args, kwargs, context)
        return own(*args, **kwargs) if context.axis is not None else self._run(model, own, args, kwargs, context)

    def _run(self, model: nn.Module, own: Callable, args: tuple, kwargs: dict, context: sampling) -> Any:
        """The output of a forward, which is watched until one has shown the noise that the model draws."""
        compiling = torch.compiler.is_compiling()
        watch = None if compiling else context.watch  # the watch of a verification or of an evaluation
        if watch is not None:
            watch.ran = True
            return self._expanded(model, own, args, kwargs, context, watch)
        if compiling and self.strict and not self.watched and model.training:
            raise RuntimeError(
                "torch.compile: strict=True must see the model's noise in a training forward before; give iw.convert example_inputs, or "
                "run one training forward before compiling"
            )
        rows = self.expand != "axis"  # on the axis samples cannot meet, and need no comparison
        verify = rows and self.verify and self.verification is None and context.samples > 1
        if compiling and verify and model.training:
            raise RuntimeError(
                "torch.compile: rows were not yet compared with samples alone; give iw.convert example_inputs (or verify=False), or run "
                "one training forward before compiling"
            )
        if compiling or not model.training or (self.watched and not verify):
            output = self._expanded(model, own, args, kwargs, context, None)
            if context.scalar_output and not compiling:
                self._tell_of_scalars(5)
            return output
        with _first_watch:  # a first forward may put the model's state back, which no other thread may change meanwhile
            return self._first(model, own, args, kwargs, context, verify)

    def _first(self, model: nn.Module, own: Callable, args: tuple, kwargs: dict, context: sampling, verify: bool) -> Any:
        """The output of a training forward that is watched, and, where ``verify``, compared with samples alone before."""
        if verify and self.verification is None:
            watched = self.watched
            with outside_of_contexts():
                run = verify_conversion(model, context.samples, args, kwargs)
            run.check(self.expand, "the first training forward")  # an error of the model ("stopped") is raised by the forward below
            self.verification, self.watched = run, watched  # as before, so that the forward below warns of noise that is not reached
        if self.watched:
            return self._expanded(model, own, args, kwargs, context, None)
        context.origin_for(tree_leaves((args, kwargs)), model)
        watch, first, random = Watch.of(model), context.stream, RandomState.of(model)
        output = self._expanded(model, own, args, kwargs, context, watch)
        self.saw(list(watch.calls), context.stream > first, random.moved())
        unreached = self.unreached(model)
        if unreached and self.strict:
            self.watched = False
            raise RuntimeError("strict=True: this noise is not reached: " + "; ".join(unreached))
        if unreached:
            warnings.warn(NOT_REACHED + "; ".join(unreached), stacklevel=5)
        elif alike := self.samples_alike(model):
            warnings.warn(f"iw.convert: {alike}", stacklevel=5)
        if context.scalar_output:
            self._tell_of_scalars(6)
        return output

    def _tell_of_scalars(self, stacklevel: int) -> None:
        """Warns once, in the first forward that returns a number: a model may be given labels later."""
        if not self.told_of_scalars:
            self.told_of_scalars = True
            warnings.warn(SCALAR_OUTPUT, stacklevel=stacklevel)

    def saw(self, calls: list[Call], drew: bool, moved: list[str]) -> None:
        """Keeps the noise that a training forward has drawn; ``moved`` are the generators that gave it numbers."""
        self.calls, self.watched, self.drew = calls, True, drew
        self.generators = [g for g in moved if g != "torch" or not any(call.kind != "replaced" for call in calls)]

    def _expanded(self, model, own, args, kwargs, context: sampling, watch: Watch | None) -> Any:
        """The output of all samples."""
        dim = context.batch_dim if self.batch_dim is None else self.batch_dim
        on_axis = self.expand == "axis"
        if on_axis and context.samples > 1:
            with context.changed(batch=None, batch_dim=dim, logical=True):
                return self._on_axis(model, own, args, kwargs, context, watch, dim)
        expand = "none" if on_axis else {"first": "first", "input": "none"}.get(self.expand, "later")
        with context.changed(expand=expand, batch=None, batch_dim=dim, logical=on_axis), FunctionalDropout(watch):
            if self.expand == "input":
                args, kwargs = self._repeated(args, kwargs, context)
            try:
                output = own(*args, **kwargs)
            except RuntimeError as error:
                context.explain(error)  # the context forgets B at the end of the block
                raise
            if not torch.compiler.is_compiling():
                check_not_later(output)
            if not on_axis:
                context.scalar_output = any(isinstance(v, Tensor) and v.dim() == 0 and v.requires_grad for v in tree_leaves(output))
            return output

    def _on_axis(self, model, own, args, kwargs, context: sampling, watch, dim: int) -> Any:
        inputs = tree_leaves((args, kwargs))
        batch = _batch(inputs, dim)
        context.origin_for(inputs, model)
        if torch.compiler.is_compiling():
            if self.one_by_one:
                names = ", ".join(name or "the model itself" for name in self.one_by_one)
                raise RuntimeError(
                    f"torch.compile: parts of this model are called once for each noise sample ({names}), which it does not compile. Run "
                    "the model eagerly, or convert it with rows (expand='input') and compile that."
                )
            return sample_axis.run(model, own, args, kwargs, context, AxisRules(), dim, batch)
        before, stream, tried = None if self.watched else Snapshot(model, inputs), context.stream, []
        while True:
            try:
                if "" in self.one_by_one:
                    output = loop(model, own, args, kwargs, context, FunctionalDropout(watch), dim, batch)
                else:
                    rules = AxisRules(watch, model, inputs, () if before is None else before.kept())
                    output = sample_axis.run(model, own, args, kwargs, context, rules, dim, batch)
                break
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                name = blamed(model, error, self.one_by_one)
                if name is None or before is None or any(isinstance(v, Iterator) for v in inputs):  # an iterator cannot be read again
                    for tried_name in tried:
                        self.run_on_axis(model, tried_name)
                    if name is not None and hasattr(error, "add_note"):
                        error.add_note(_OLD_FUNCTION if "setup_context" in str(error) else _ADVICE.format(repr(name)))
                    raise
                before.restore()
                context.stream = stream
                self.run_one_by_one(model, name, reason_of(error))
                tried.append(name)
        if tried:
            found = "; ".join(f"{name or 'the model itself'} ({self.one_by_one[name]})" for name in tried if name in self.one_by_one)
            warnings.warn(f"iw.convert: called once for each noise sample, as they cannot run on the sample axis: {found}", stacklevel=7)
        return output

    def run_one_by_one(self, model: nn.Module, name: str, reason: str) -> None:
        """Has a submodule called once for each sample, from now on; "" is the model."""
        if name:
            module = model.get_submodule(name)
            for inner in [n for n in self.one_by_one if n.startswith(f"{name}.")]:
                self.run_on_axis(model, inner)
            class_swap.put(module, OneByOne)
        self.one_by_one[name] = reason

    def run_on_axis(self, model: nn.Module, name: str) -> None:
        """Undoes :meth:`run_one_by_one`."""
        if self.one_by_one.pop(name, None) is not None and name:
            class_swap.take(model.get_submodule(name))

    def expand_inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The forward pre-hook of the submodule at which rows expand."""
        context = current()
        if context is None or not (module.training or context.evaluating):
            return None
        return self._repeated(args, kwargs, context)

    def _repeated(self, args: tuple, kwargs: dict, context: sampling) -> tuple[tuple, dict]:
        """The arguments, each tensor with B rows repeated to S*B, sample-major."""
        dim = context.batch_dim
        batch, samples = _batch(tree_leaves((args, kwargs)), dim), context.samples
        if batch is None:
            raise ValueError(f"expand={self.expand!r}: expected a tensor argument whose rows to expand, got none")
        context.expand = "none"
        context.batch = batch if context.batch is None else context.batch

        def repeat(v: Any) -> Any:
            if not has_rows(v, dim) or v.shape[dim] != context.batch:
                return v
            d = dim % v.dim()
            return v.unsqueeze(d).expand(*v.shape[:d], samples, *v.shape[d:]).flatten(d, d + 1)

        return tree_map(repeat, args), tree_map(repeat, kwargs)

    def remove_hooks(self, model: nn.Module) -> None:
        for module in model.modules():
            pre = module._forward_pre_hooks
            for key in [k for k, hook in pre.items() if getattr(hook, "__self__", None) is self]:
                del pre[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


_OLD_FUNCTION = (
    "iw.convert: an autograd Function cannot run on the sample axis. If it is a reentrant checkpoint's, give torch's checkpoint "
    "use_reentrant=False, or call iw.checkpoint(function, *args)."
)
_ADVICE = (
    "iw.convert: if this part cannot run on the sample axis, iw.convert(..., one_by_one=[{}]) calls it once for each noise sample; rows "
    "(expand='input') and iw.backward(strategy='loop') use no axis."
)


def has_rows(v: Any, dim: int) -> bool:
    """True for a tensor that has the dimension ``dim``, of rows."""
    return isinstance(v, Tensor) and -v.dim() <= dim < v.dim()


def _batch(inputs: Sequence[Any], dim: int) -> int | None:
    """B, the number of rows of the first tensor that has any, or None."""
    return next((v.shape[dim] for v in inputs if has_rows(v, dim)), None)
