"""Swapping the noise of a model, in place, and making its training forward draw S noise samples by itself."""

import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils._pytree import tree_leaves, tree_map

from ..checks import as_arguments
from ..layers.context import current, is_evaluating, outside_of_contexts, sampling
from . import axis as sample_axis
from . import class_swap
from .axis_outputs import check_not_later
from .axis_rules import AxisRules
from .class_swap import Behaviour
from .functional_dropout import Call, FunctionalDropout, Watch, _model_forward_is
from .one_by_one import OneByOne, blamed, loop, reason_of
from .pass_state import RandomState, Snapshot
from .swaps import SWAPS, draws, idle_modules, original_class, rate_of, swap, unreached_modules, unswap
from .verify import Verification, verify_conversion

_CONVERSION = "_iw_conversion"  # on a converted model
Model = TypeVar("Model", bound=nn.Module)
_FORWARD = "_iw_forward"  # on one that had a forward of its own, beside its class'


def convert(
    model: Model,
    samples: int,
    *,
    expand: str = "axis",
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    batch_norm: str = "per_sample",
    batch_dim: int | None = None,
    one_by_one: Sequence[str] = (),
    strict: bool = False,
    verify: bool = True,
) -> Model:
    """Swaps every noise layer of a model for its IW form, in place, catches its functional dropout, and lets the model open its own
    sampling context: in training ``model(x)`` of B rows returns S*B rows, sample-major; in eval mode nothing changes.

    Layers keep their identity (references, hooks, names and the state_dict stay valid); the model can be deep-copied, pickled and
    compiled. An ``iw.sampling`` context around the model rules over its seed, sample ids and number of samples. ``F.dropout`` and its
    family are noise of the context during the training forward. :func:`audit` says what was found.

    Args:
        model: any module with at least one dropout layer or one call of functional dropout.
        samples: S.
        expand: how one example becomes S.
            "axis": samples live in a dimension that the model cannot see. Each is what a forward of that sample alone computes,
            whatever the model makes of its rows; what no noise has touched is computed once.
            "first": rows [S*B, ...] from the first noise layer of each branch on. Less Python for each operation, so quicker for
            small networks, and right only where the model treats rows alike: a path around all noise, or rows that meet, do not fit.
            "input": rows [S*B, ...] from the model's inputs on: every tensor argument with the first one's number of rows.
            a submodule's name: rows from that submodule's inputs on. A noise layer called before it raises.
        example_inputs: a tensor, a sequence of positional arguments or a mapping of keyword arguments. The converted model is run on
            them and compared with its samples alone (see ``verify``). At least two examples, unlike each other, show most.
        batch_norm: what BatchNorm layers (SyncBatchNorm and subclasses too) normalise over in training.
            "per_sample": the B rows of each sample, and running statistics as S successive updates: what a loop over samples does.
            "frozen": the running statistics, and none are written.
            "joint": all S*B rows, one update; with rows ("first", "input", a name).
        batch_dim: the dimension that holds the rows: 1 for time-major models (nn.Transformer's and nn.LSTM's default). None takes that of a
            context around the model, or 0.
        one_by_one: names of submodules that are called once for each sample instead of on the axis ("" is the model): those that draw a
            number for a whole call or branch on values. Where a run shows that one has to be, it is added, with a warning.
        strict: raise where noise is not reached, instead of warning.
        verify: with ``example_inputs``, run S samples together and three of them alone, in training mode and under one seed, and
            compare the outputs. The model, its buffers, gradients and all random generators are as before afterwards. Rows without
            ``example_inputs`` are compared so in the first training forward.

    Returns:
        The model.

    Raises:
        ValueError: samples < 1, a model that is converted already or shows no noise on ``example_inputs``, an unknown submodule's name, a
            BatchNorm that ``batch_norm`` does not suit, outputs that differ from those of the samples alone, with ``strict`` noise that is
            not reached.

    Warns:
        UserWarning: the model draws noise that is not reached (inside other libraries' kernels, by torch.rand, ...), parts of it are
            called once for each sample, or it draws NumPy's or Python's random numbers: here with ``example_inputs``, else in the first
            training forward.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
        >>> model = iw.convert(model, samples=5, example_inputs=torch.randn(2, 4))
        >>> model(torch.ones(2, 4)).shape, model.eval()(torch.ones(2, 4)).shape
        (torch.Size([10, 3]), torch.Size([2, 3]))
    """
    check_convertible(model, expand, batch_norm, one_by_one)
    context = sampling(samples, batch_dim=batch_dim or 0)
    samples, batch_dim = context.samples, None if batch_dim is None else context.batch_dim
    conversion = install(model, samples, expand, batch_norm, batch_dim, one_by_one, strict, verify)
    try:
        if example_inputs is not None:
            args, kwargs = as_arguments(example_inputs)
            conversion.learn(verify_conversion(model, samples, args, kwargs, compare=verify), model)
        random = any(call.kind == "random" for call in conversion.calls)  # which may have skipped the noise
        if example_inputs is not None and not (conversion.has_noise or random or any(draws(module) for module in model.modules())):
            raise ValueError(
                "model: expected noise, at least one of "
                + ", ".join(c.__name__ for c in SWAPS)
                + " or a call of functional dropout; found none in its modules, and none in a run on example_inputs"
                + "".join(f". {idle}" for idle in idle_modules(model))
            )
        if conversion.looked and (alike := conversion.samples_alike(model)):
            warnings.warn(f"iw.convert: {alike}", stacklevel=2)
    except (ValueError, RuntimeError):
        revert(model)
        raise
    return model


_first_look = threading.RLock()
NOT_REACHED = "iw.convert leaves this noise as it is, no function of seed and sample, repeated by no replay: "
SCALAR_OUTPUT = (
    "the model returns a number for each noise sample. If that is a loss which it computes from labels, samples have no importance weights "
    "in it: leave the labels out, and give its logits to iw.IWCrossEntropyLoss (Hugging Face's Trainer: compute_loss_func)"
)


def revert(model: Model) -> Model:
    """Undoes :func:`convert`, in place: torch's own layers are back.

    Example:
        >>> import iwsgd_ext as iw
        >>> from torch import nn
        >>> iw.revert(iw.convert(nn.Sequential(nn.Dropout(0.5)), samples=2))
        Sequential(
          (0): Dropout(p=0.5, inplace=False)
        )
    """
    if not hasattr(model, _CONVERSION):
        raise ValueError("model: expected a converted one (iw.convert), got one that is not")
    if not class_swap.has(model, Converted):
        raise ValueError(f"model: expected one whose class iw.convert has set, but something has made it a {type(model).__name__} since")
    conversion: Conversion = getattr(model, _CONVERSION)
    conversion.remove_hooks(model)
    for name in list(conversion.one_by_one):
        conversion.run_on_axis(model, name)
    unswap(model)
    class_swap.take(model)
    delattr(model, _CONVERSION)
    if _FORWARD in vars(model):
        vars(model)["forward"] = vars(model).pop(_FORWARD)
    return model


def conversion_of(model: nn.Module) -> "Conversion | None":
    """What a converted model knows, or None."""
    return getattr(model, _CONVERSION, None)


def check_convertible(model: nn.Module, expand: str, batch_norm: str, one_by_one: Sequence[str]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("model: expected one of Python code, got a scripted one; convert it before torch.jit.script")
    names = {name for name, _ in model.named_modules() if name}
    for name, module in model.named_modules():
        if hasattr(module, _CONVERSION):
            raise ValueError(f"model: expected one that is not converted, but {repr(name) if name else 'it'} is; iw.revert undoes it")
        if original_class(module) is not None:
            raise ValueError(
                f"model: expected one that is not converted, but {repr(name) if name else 'it'} was swapped by the conversion of a model "
                "around this one, which expands the rows for all its parts; iw.revert(that model) undoes it"
            )
        lazy: Any = module
        if isinstance(module, LazyModuleMixin) and lazy.has_uninitialized_params():
            raise ValueError(f"model: expected initialised parameters, but {name or 'the model'} is lazy; run the model once before")
    if expand not in ("axis", "first", "input") and expand not in names:
        raise ValueError(f"expand: expected 'axis', 'first', 'input' or a submodule's name, got {expand!r}")
    if expand == "axis" and batch_norm == "joint":
        raise ValueError(
            "batch_norm='joint': expected expand='input', 'first' or a submodule's name, where the rows of all samples are one batch; on "
            "the sample axis no layer sees the rows of another sample"
        )
    for name in (one_by_one,) if isinstance(one_by_one, str) else one_by_one:
        if name and name not in names:
            raise ValueError(f"one_by_one: expected names of submodules, or '' for the model, got {name!r}")
    if one_by_one and expand != "axis":
        raise ValueError(f"one_by_one: expected none where expand={expand!r}, which has no axis")


class Converted(Behaviour):
    """A converted model's training forward runs under S noise samples."""

    @classmethod
    def forward_of(cls, original: type[nn.Module]) -> dict:
        @functools.wraps(original.forward)  # Trainers read its signature
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            own = vars(self).get(_FORWARD) or functools.partial(original.forward, self)
            conversion = vars(self).get(_CONVERSION)  # none on a slice of a converted nn.Sequential
            return own(*args, **kwargs) if conversion is None else conversion.forward(self, own, args, kwargs)

        return {"forward": forward}


def install(model, samples, expand, batch_norm, batch_dim, one_by_one, strict, verify=True) -> "Conversion":
    """Swaps classes: a converted model, whatever was found. Nothing has changed where it raises."""
    swap(model, batch_norm)
    conversion = Conversion(samples, expand, batch_norm, batch_dim, strict, verify)
    vars(model)[_CONVERSION] = conversion
    if "forward" in vars(model):
        vars(model)[_FORWARD] = vars(model).pop("forward")
    class_swap.put(model, Converted)
    for name in (one_by_one,) if isinstance(one_by_one, str) else one_by_one:
        conversion.run_one_by_one(model, name, "asked for")
    if expand not in ("axis", "first", "input"):
        model.get_submodule(expand).register_forward_pre_hook(conversion.expand_inputs, with_kwargs=True)
    return conversion


class Conversion:
    """What a converted model knows: number of samples, how they run, and what runs have shown of its noise."""

    def __init__(self, samples: int, expand: str, batch_norm: str, batch_dim: int | None, strict: bool, verify: bool = True):
        self.samples = samples
        self.expand = expand
        self.batch_norm = batch_norm
        self.batch_dim = batch_dim
        self.strict = strict
        self.verify = verify
        self.one_by_one: dict[str, str] = {}  # submodules that are called once for each sample, and why
        self.calls: list[Call] = []  # functional noise, seen in a run
        self.looked = False  # a training forward has gone through and was looked at
        self.drew = False  # it drew noise of this package
        self.generators: list[str] = []  # that gave it numbers, though no function that is looked for did
        self.verification: Verification | None = None
        self.told_of_scalars = False

    @property
    def has_noise(self) -> bool:
        return self.drew or any(call.kind == "replaced" for call in self.calls)

    def learn(self, verification: Verification, model: nn.Module, compared: bool = True) -> None:
        """Takes what a verification has shown; ``compared``: it was asked for."""
        self.verification = verification
        if verification.error is not None:
            if not compared:
                return  # the forward that follows raises it
            raise ValueError(f"example_inputs: the model stops on them: {verification.text}") from verification.error
        if verification.mismatch is not None:
            raise ValueError(verification.refusal(self.expand, "example_inputs" if compared else "the first training forward"))
        if not compared:
            return
        unreached = self.unreached(model)
        if unreached and self.strict:
            raise ValueError("strict=True: this noise is not reached: " + "; ".join(unreached))
        if unreached:
            warnings.warn(NOT_REACHED + "; ".join(unreached), stacklevel=3)
        self.told_of_scalars = verification.scalar_output
        for note in (*verification.inconclusive, *([SCALAR_OUTPUT] if verification.scalar_output else [])):
            warnings.warn(f"example_inputs: {note}", stacklevel=3)

    def unreached_calls(self, model: nn.Module) -> list[str]:
        """The calls of a run that drew noise by torch, outside of modules that are named anyhow."""
        inside = {name for name, _, _ in unreached_modules(model)}
        return [str(call) for call in self.calls if call.kind != "replaced" and call.module not in inside]

    def unreached(self, model: nn.Module) -> list[str]:
        """The noise that stays torch's, as far as it is known."""
        modules = [f"{name} ({kind}{'' if p is None else f', p={p}'})" for name, kind, p in unreached_modules(model)]
        others = [
            "random numbers of torch's, by no function that is looked for"
            if g == "torch"
            else f"{g}'s random numbers (once for all samples of a pass, and again in each pass of a strategy of several)"
            for g in self.generators
        ]
        return modules + self.unreached_calls(model) + others

    def samples_alike(self, model: nn.Module) -> str | None:
        """Says so if a training forward, which was looked at, drew no noise that is not 0."""
        drawn = any(call.kind != "replaced" or call.p != 0 for call in self.calls) or self.generators
        layers = [module for module in model.modules() if draws(module)]
        by_hand = self.drew and not layers and not self.calls  # by functions of the package
        if drawn or by_hand or (self.drew and any(rate_of(module) != 0 for module in layers)):
            return None
        idle = "".join(f". {reason}" for reason in idle_modules(model))
        return f"a training forward drew no noise, so that all samples are alike{idle}"

    # The forward

    def forward(self, model: nn.Module, own: Callable, args: tuple, kwargs: dict) -> Any:
        """The model's forward in the context around it, or one of its own."""
        if not model.training and not is_evaluating():
            return own(*args, **kwargs)
        context = current()
        if context is None:
            with sampling(self.samples) as context:
                return self._looked_at(model, own, args, kwargs, context)
        return own(*args, **kwargs) if context.axis is not None else self._looked_at(model, own, args, kwargs, context)

    def _looked_at(self, model: nn.Module, own: Callable, args: tuple, kwargs: dict, context: sampling) -> Any:
        """Until a forward has shown what noise the model draws, each looks."""
        compiling = torch.compiler.is_compiling()
        watch = None if compiling else context.watch  # that of a verification or an evaluation
        if watch is not None:
            watch.looks = True
            return self._expanded(model, own, args, kwargs, context, watch)
        if compiling and self.strict and not self.looked and model.training:
            raise RuntimeError(
                "torch.compile: with strict=True somebody has to look at the model's noise first; give iw.convert example_inputs, or "
                "run one training forward before compiling"
            )
        rows = self.expand != "axis"  # which needs no verification
        verify = rows and self.verify and self.verification is None and context.samples > 1
        if compiling and verify and model.training:
            raise RuntimeError(
                "torch.compile: rows were not yet compared with samples alone; give iw.convert example_inputs (or verify=False), or run "
                "one training forward before compiling"
            )
        if compiling or not model.training or (self.looked and not verify):
            output = self._expanded(model, own, args, kwargs, context, None)
            if context.scalar_output and not compiling:
                self._tell_of_scalars(5)
            return output
        with _first_look:  # it puts the model's state back, which no other thread must change meanwhile
            return self._first(model, own, args, kwargs, context, verify)

    def _first(self, model: nn.Module, own: Callable, args: tuple, kwargs: dict, context: sampling, verify: bool) -> Any:
        """A training forward that is looked at."""
        if verify and self.verification is None:
            looked = self.looked
            with outside_of_contexts():
                self.learn(verify_conversion(model, context.samples, args, kwargs), model, compared=False)
            self.looked = looked  # to be told what is not reached
        if self.looked:
            return self._expanded(model, own, args, kwargs, context, None)
        context.origin_for(tree_leaves((args, kwargs)), model)
        watch, first, random = Watch.of(model), context.stream, RandomState.of(model)
        output = self._expanded(model, own, args, kwargs, context, watch)
        self.saw(list(watch.calls), context.stream > first, random.moved())
        unreached = self.unreached(model)
        if unreached and self.strict:
            self.looked = False
            raise RuntimeError("strict=True: this noise is not reached: " + "; ".join(unreached))
        if unreached:
            warnings.warn(NOT_REACHED + "; ".join(unreached), stacklevel=5)
        elif alike := self.samples_alike(model):
            warnings.warn(f"iw.convert: {alike}", stacklevel=5)
        if context.scalar_output:
            self._tell_of_scalars(6)
        return output

    def _tell_of_scalars(self, stacklevel: int) -> None:
        """Once: a later forward may be the first that is given labels."""
        if not self.told_of_scalars:
            self.told_of_scalars = True
            warnings.warn(SCALAR_OUTPUT, stacklevel=stacklevel)

    def saw(self, calls: list[Call], drew: bool, moved: list[str]) -> None:
        """Takes what a training forward has drawn; ``moved``: the generators that gave it numbers."""
        self.calls, self.looked, self.drew = calls, True, drew
        self.generators = [g for g in moved if g != "torch" or not any(call.kind != "replaced" for call in calls)]

    @_model_forward_is
    def _expanded(self, model, own, args, kwargs, context: sampling, watch: Watch | None) -> Any:
        dim = context.batch_dim if self.batch_dim is None else self.batch_dim
        if self.expand != "axis":
            rows = {"first": "first", "input": "none"}.get(self.expand, "later")
            mode = FunctionalDropout(watch)
            with context.changed(expand=rows, batch=None, batch_dim=dim), mode:
                if self.expand == "input":
                    args, kwargs = self._repeated(args, kwargs, context)
                try:
                    output = own(*args, **kwargs)
                except RuntimeError as error:
                    context.explain(error)  # here, where it knows B
                    raise
                if not torch.compiler.is_compiling():
                    check_not_later(output)
                context.scalar_output = any(isinstance(v, Tensor) and v.dim() == 0 and v.requires_grad for v in tree_leaves(output))
                return output
        if context.samples == 1:
            with context.changed(batch=None, batch_dim=dim, logical=True, expand="none"), FunctionalDropout(watch):
                output = own(*args, **kwargs)
                if not torch.compiler.is_compiling():
                    check_not_later(output)
                return output
        with context.changed(batch=None, batch_dim=dim, logical=True):
            return self._on_axis(model, own, args, kwargs, context, watch, dim)

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
        before, stream = None if self.looked else Snapshot(model, inputs), context.stream
        tried: list[Any] = []
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
                if name is None or before is None or any(isinstance(v, Iterator) for v in inputs):  # half used up
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
        if name:
            module = model.get_submodule(name)
            for inner in [n for n in self.one_by_one if n.startswith(f"{name}.")]:
                self.run_on_axis(model, inner)
            class_swap.put(module, OneByOne)
        self.one_by_one[name] = reason

    def run_on_axis(self, model: nn.Module, name: str) -> None:
        if self.one_by_one.pop(name, None) is not None and name:
            class_swap.take(model.get_submodule(name))

    # Rows

    def expand_inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The hook of a submodule at which rows expand."""
        context = current()
        if context is None or not (module.training or context.evaluating):
            return None
        return self._repeated(args, kwargs, context)

    def _repeated(self, args: tuple, kwargs: dict, context: sampling) -> tuple[tuple, dict]:
        """Arguments with their rows repeated sample-major."""
        dim = context.batch_dim
        batch, samples = _batch(tree_leaves((args, kwargs)), dim), context.samples
        if batch is None:
            raise ValueError(f"expand={self.expand!r}: expected a tensor argument whose rows to expand, got none")
        context.expand = "none"
        context.batch = batch if context.batch is None else context.batch

        def repeat(v: Any) -> Any:
            if not _has_rows(v, dim) or v.shape[dim] != context.batch:
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
    "iw.convert: an autograd Function stands in the way of the sample axis. If it is a reentrant checkpoint's, give torch's checkpoint "
    "use_reentrant=False, or call iw.checkpoint(function, *args)."
)
_ADVICE = (
    "iw.convert: if it is the sample axis that this cannot run on, iw.convert(..., one_by_one=[{}]) calls that part once for each noise "
    "sample, and rows (expand='input') or iw.backward(strategy='loop') go without the axis."
)


def _has_rows(v: Any, dim: int) -> bool:
    return isinstance(v, Tensor) and -v.dim() <= dim < v.dim()


def _batch(inputs: Sequence[Any], dim: int) -> int | None:
    """B: the rows of the first tensor that has any."""
    return next((v.shape[dim] for v in inputs if _has_rows(v, dim)), None)
