"""Swapping the noise of a model, in place, and making its training forward draw S noise samples by itself."""

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from .dry_run import DryRun, as_arguments, dry_run
from .functional_dropout import Call, FunctionalDropout, Watch
from .sampling import current, sampling
from .scan import scan
from .swaps import SWAPS, draws, original_class, swap, unreached_modules, unswap

_CONVERSION = "_iw_conversion"  # on a converted model


def convert(
    model: nn.Module,
    samples: int,
    *,
    expand: str = "auto",
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    expand_args: Sequence[int | str] | None = None,
    batch_norm: str = "joint",
    batch_dim: int | None = None,
    strict: bool = False,
) -> nn.Module:
    """Swaps every noise layer of a model for its IW form, in place, catches its functional dropout, and lets the model open its own
    sampling context: in training ``model(x)`` of B rows returns S*B rows, sample-major; in eval mode nothing changes.

    Layers keep their identity (references, hooks, names and the state_dict stay valid); the model can be deep-copied, pickled and
    compiled. An ``iw.sampling`` context around the model rules over its seed, sample ids and number of samples. ``F.dropout`` and its
    family are noise of the context during the training forward. :func:`audit` says what was found.

    Args:
        model: any module with at least one dropout layer or one call of functional dropout.
        samples: S.
        expand: where one row becomes S rows.
            "first": at the first noise layer that each branch meets, so that the trunk before it is computed once. A path that goes
            round all noise and joins later does not fit; it needs "input".
            "input": at the model's inputs, before all: every tensor argument with the first one's number of rows is expanded.
            a submodule's name: at that submodule's inputs. A noise layer called before it raises.
            "auto": dry runs on fake tensors of ``example_inputs`` take "first" where shapes fit, else the innermost module around the
            first noise at whose inputs they fit, else "input"; without example inputs, "input". Shapes fit only where as many rows
            expand as the inputs have; flattened tokens take "first" if asked. A model that mixes the rows of a batch (in-batch
            contrast, graph neighbours) is wrong under any expansion; the dry run looks for that, too.
        example_inputs: a tensor, a sequence of positional arguments or a mapping of keyword arguments, for a dry run: it chooses
            "auto" and finds every functional dropout. Without them the first training forward outside of torch.compile looks.
        expand_args: with "input" or a name, which arguments to expand instead: positions and keyword names.
        batch_norm: what BatchNorm layers (SyncBatchNorm and subclasses too) normalise over in training.
            "joint": all S*B rows, as torch's layer does when it meets them.
            "per_sample": the B rows of each sample, and running statistics as S successive updates, also where the trunk is shared: what
            a loop over samples does.
            "frozen": the running statistics, and none are written.
        batch_dim: the dimension that holds the rows: 1 for time-major models (nn.Transformer's and nn.LSTM's default). None takes that of a
            context around the model, or 0.
        strict: raise where noise is not reached, instead of warning.

    Returns:
        The model.

    Raises:
        ValueError: samples < 1, a model that is converted already or has no noise, an unknown submodule's name, a BatchNorm that
            ``batch_norm`` does not suit, with ``strict`` noise that is not reached.

    Warns:
        UserWarning: the model draws noise that is not reached (inside other libraries' kernels, by torch.rand, ...), here where it is
            known, else in the first training forward. Or a dry run on ``example_inputs`` shows something against the place of expansion,
            or that rows of the batch meet.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
        >>> model = iw.convert(model, samples=5, example_inputs=torch.ones(2, 4))
        >>> model(torch.ones(2, 4)).shape, model.eval()(torch.ones(2, 4)).shape
        (torch.Size([10, 3]), torch.Size([2, 3]))
    """
    check_convertible(model, expand)
    sampling(samples, batch_dim=batch_dim or 0)  # checks them
    conversion = install(model, samples, expand, example_inputs, expand_args, batch_norm, batch_dim, strict)
    try:
        noisy = any(draws(module) for module in model.modules())
        if not noisy and not any(call.kind == "replaced" for call in (*conversion.calls, *conversion.suspected)):
            raise ValueError(
                "model: expected noise, at least one of "
                + ", ".join(c.__name__ for c in SWAPS)
                + " or a call of functional dropout; found "
                "none in its modules" + ("" if conversion.unverified else ", and none in a dry run")
            )
        unreached = conversion.unreached(model)
        if unreached and strict:
            raise ValueError("strict=True: this noise is not reached: " + "; ".join(unreached))
    except ValueError:
        revert(model)
        raise
    if unreached:
        warnings.warn(NOT_REACHED + "; ".join(unreached), stacklevel=2)
    for doubt in (conversion.doubt, conversion.mixing and MIXING + conversion.mixing):
        if doubt:
            warnings.warn(f"example_inputs: {doubt}", stacklevel=2)
    return model


MIXING = (
    "rows of the batch meet in this model, so that, wherever they expand, those of one sample meet those of another; "
    "iw.backward(..., strategy='loop'), or 'streamed', keeps samples apart (and where it is an argument that has as many rows by chance, "
    "expand_args names the others): "
)
NOT_REACHED = "iw.convert leaves this noise as it is, drawn by torch, no function of seed and sample, repeated by no replay: "


def revert(model: nn.Module) -> nn.Module:
    """Undoes :func:`convert`, in place: torch's own layers are back and the hooks are gone.

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
    unswap(model)
    _remove_hooks(model)
    delattr(model, _CONVERSION)
    return model


def conversion_of(model: nn.Module) -> "Conversion | None":
    """What a converted model knows, or None."""
    return getattr(model, _CONVERSION, None)


def check_convertible(model: nn.Module, expand: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if hasattr(module, _CONVERSION):
            raise ValueError(f"model: expected one that is not converted, but {repr(name) if name else 'it'} is; iw.revert undoes it")
        if original_class(module) is not None:
            raise ValueError(
                f"model: expected one that is not converted, but {repr(name) if name else 'it'} was swapped by the conversion of a model "
                "around this one, which expands the rows for all its parts; iw.revert(that model) undoes it"
            )
    if expand not in ("auto", "first", "input") and expand not in {name for name, _ in model.named_modules() if name}:
        raise ValueError(f"expand: expected 'auto', 'first', 'input' or a submodule's name, got {expand!r}")


def install(model, samples, expand, example_inputs, expand_args, batch_norm, batch_dim, strict) -> "Conversion":
    """Swaps, hooks, and the dry runs: a converted model, whatever was found. Nothing has changed where it raises."""
    swap(model, batch_norm)
    conversion = Conversion(samples, expand, tuple(expand_args) if expand_args is not None else None, batch_norm, batch_dim, strict)
    setattr(model, _CONVERSION, conversion)
    conversion.suspected = scan(model)
    if example_inputs is not None:
        args, kwargs = as_arguments(example_inputs)
        run = _choose_expansion(model, conversion, args, kwargs) if expand == "auto" else _try(model, conversion, expand, args, kwargs)
        if expand != "auto" and run.wrong:
            conversion.reason = f"asked for, but {run.wrong}"
            if not run.asks_values:
                advice = "" if expand == "input" else "; 'auto' looks for a place that fits"
                conversion.doubt = f"with expand={expand!r}, {run.wrong}{advice}"
        conversion.mixing = run.mixing
        conversion.learn(run.calls, run.error)
    elif expand == "auto":
        conversion.expand, conversion.reason = "input", "no example_inputs to try 'first' with"
    _hook(model, conversion)
    return conversion


def _choose_expansion(model: nn.Module, conversion: "Conversion", args: tuple, kwargs: dict) -> DryRun:
    """The latest place where shapes fit: the first noise itself, a module around it, the model's input."""
    run = _try(model, conversion, "first", args, kwargs)
    if run.fits:
        conversion.reason = "shapes fit"
        return run
    reason = f"'first' does not fit: {run.trouble}"
    if run.first_noise is None:
        reason = f"no noise was drawn{f' before {run.error}' if run.error else ''}"
    if run.first_noise is None and run.error and not run.asks_values:
        conversion.doubt = f"the model stops on them before any noise ({run.error}); expand='input' is taken"
    elif not run.wrong and run.other_rows:
        conversion.doubt = f"expand='input' is taken; {run.other_rows}"
    around = (run.first_noise or "").split(".")
    for depth in range(len(around) - 1, 0, -1):
        name = ".".join(around[:depth])
        if _is_in_encoder_layer(model, name):
            continue
        run = _try(model, conversion, name, args, kwargs)
        if run.fits:
            conversion.reason = f"{reason}; from the inputs of {name!r} on shapes fit"
            return run
    run = _try(model, conversion, "input", args, kwargs)
    conversion.reason = reason if run.fits or run.first_noise is None else f"{reason}; with 'input', {run.trouble}"
    if run.first_noise is not None and run.wrong and not run.asks_values:
        conversion.doubt = f"no place fits, expand='input' is taken: {conversion.reason}"
    return run


def _is_in_encoder_layer(model: nn.Module, name: str) -> bool:
    """Whether a hook there would cost torch's encoder layer its fast path in eval mode, whose results are other in the last bits."""
    parts = name.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:n])), nn.TransformerEncoderLayer) for n in range(1, len(parts) + 1))


def _try(model: nn.Module, conversion: "Conversion", expand: str, args: tuple, kwargs: dict) -> DryRun:
    conversion.expand = expand
    _hook(model, conversion)
    try:
        return dry_run(model, conversion.batch_dim, args, kwargs)
    finally:
        _remove_hooks(model)


class Conversion:
    """What a converted model knows: number of samples, place of expansion, and what is known of its functional dropout. Its methods are
    the model's hooks."""

    def __init__(
        self,
        samples: int,
        expand: str,
        expand_args: tuple[int | str, ...] | None,
        batch_norm: str,
        batch_dim: int | None,
        strict: bool,
    ):
        self.samples = samples
        self.expand = expand
        self.expand_args = expand_args
        self.batch_norm = batch_norm
        self.batch_dim = batch_dim
        self.strict = strict
        self.reason = "asked for"
        self.suspected: list[Call] = []  # by reading code
        self.calls: list[Call] = []  # by a run
        self.unverified = True  # no run has gone through
        self.stopped: str | None = None  # why the dry run did not go through
        self.doubt: str | None = None  # what a dry run has shown against the place of expansion
        self.mixing: str | None = None  # where rows of the batch meet

    def learn(self, calls: list[Call], error: str | None) -> None:
        """Takes what a run has shown."""
        self.calls, self.stopped, self.unverified = calls, error, error is not None

    @property
    def catches(self) -> bool:
        """Whether functional dropout has to be caught: a run has called it, or the code names it for a road that no run has taken."""
        return any(call.kind != "random" for call in (*self.calls, *self.suspected))

    def unreached_calls(self, model: nn.Module) -> list[str]:
        """The calls of a run that drew noise by torch, outside of modules that are named anyhow."""
        inside = {name for name, _, _ in unreached_modules(model)}
        return [str(call) for call in self.calls if call.kind != "replaced" and call.module not in inside]

    def unreached(self, model: nn.Module) -> list[str]:
        """The noise that stays torch's, as far as it is known."""
        modules = [f"{name} ({kind}{'' if p is None else f', p={p}'})" for name, kind, p in unreached_modules(model)]
        return modules + self.unreached_calls(model)

    def enter(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before the forward: opens a context, or takes part in the one around it with this model's place of expansion."""
        context = current()
        if not _is_noisy(model, context):
            return None
        mode = self._catch(model)
        if context is None:
            context = sampling(self.samples)
            context.own = True
            if not torch.compiler.is_compiling():
                context.frame = sys._getframe(1)
            context.__enter__()
        context.converted.append((self, context.expand, context.batch, context.batch_dim, mode))
        if mode is not None:
            mode.context = context
            mode.__enter__()
        context.batch = None
        if self.batch_dim is not None:
            context.batch_dim = self.batch_dim
        context.expand = {"first": "first", "input": "none"}.get(self.expand, "later")
        return self.expand_inputs(model, args, kwargs) if self.expand == "input" else None

    def leave(self, model: nn.Module, args: tuple, output: Any) -> None:
        """After the forward, also one that raised."""
        context = current()
        if context is None or not context.converted or context.converted[-1][0] is not self:
            if not torch.compiler.is_compiling():
                FunctionalDropout.end_interrupted()  # an exception has ended the context already
            return
        if output is None and not torch.compiler.is_compiling():
            context.explain(sys.exc_info()[1])
        _, context.expand, context.batch, context.batch_dim, mode = context.converted.pop()
        if mode is not None:
            mode.__exit__(None, None, None)
        if context.own and not context.converted:
            context.frame = None
            context.__exit__(None, None, None)
        if mode is None or mode.watch is None or context.watch is not None or output is None:  # None: an exception
            return
        self.learn(list(mode.watch.calls), None)
        unreached = self.unreached_calls(model)
        if unreached and self.strict:
            self.unverified = True
            raise RuntimeError("strict=True: this noise is not reached: " + "; ".join(unreached))
        if unreached:
            warnings.warn(NOT_REACHED + "; ".join(unreached), stacklevel=2)

    def _catch(self, model: nn.Module) -> FunctionalDropout | None:
        """What catches functional dropout where there is, or may be, any. Until a run has shown it, each eager forward looks."""
        compiling = torch.compiler.is_compiling()
        if not compiling:
            FunctionalDropout.end_interrupted()
        elif self.unverified:
            doubts = [str(call) for call in self.suspected if call.kind != "replaced"]
            if doubts or self.strict:
                raise RuntimeError(
                    "torch.compile: nobody knows yet whether this model draws noise that iw.convert does not reach"
                    + (f" ({'; '.join(doubts)})" if doubts else " (strict=True)")
                    + "; give iw.convert example_inputs, or run one training forward before compiling."
                )
        context = current()
        watch = context.watch if context is not None and not compiling else None  # that of a dry run or an evaluation
        if watch is not None:
            watch.looks = True
        if watch is None and self.unverified and model.training and not compiling:
            watch = Watch.of(model)
        return FunctionalDropout(watch) if watch is not None or self.catches else None

    def expand_inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Repeats the rows of a module's arguments sample-major."""
        context = current()
        if context is None or not _is_noisy(module, context):
            return None
        dim = context.batch_dim

        def holds_rows(v: Any) -> bool:
            return isinstance(v, Tensor) and -v.dim() <= dim < v.dim()

        leaves = [v for v in tree_flatten((args, kwargs))[0] if holds_rows(v)]
        if not leaves:
            raise ValueError(f"expand={self.expand!r}: expected a tensor argument whose rows to expand, got none")
        context.expand = "none"
        if context.batch is None:
            context.batch = leaves[0].shape[dim]
        batch, samples = context.batch, context.samples

        def repeat(v: Any) -> Any:
            if not holds_rows(v) or v.shape[dim] != batch:
                return v
            d = dim % v.dim()
            return v.unsqueeze(d).expand(*v.shape[:d], samples, *v.shape[d:]).flatten(d, d + 1)

        if self.expand_args is None:
            return tree_map(repeat, args), tree_map(repeat, kwargs)
        args = tuple(tree_map(repeat, v) if i in self.expand_args else v for i, v in enumerate(args))
        return args, {k: tree_map(repeat, v) if k in self.expand_args else v for k, v in kwargs.items()}


def _is_noisy(module: nn.Module, context: sampling | None) -> bool:
    return module.training or (context is not None and context.evaluating)


def _hook(model: nn.Module, conversion: Conversion) -> None:
    if conversion.expand not in ("first", "input"):
        model.get_submodule(conversion.expand).register_forward_pre_hook(conversion.expand_inputs, with_kwargs=True)
    model.register_forward_pre_hook(conversion.enter, prepend=True, with_kwargs=True)
    model.register_forward_hook(conversion.leave, always_call=True)


def _remove_hooks(model: nn.Module) -> None:
    for module in model.modules():
        pre, after = module._forward_pre_hooks, module._forward_hooks
        ours = {k for table in (pre, after) for k, hook in table.items() if isinstance(getattr(hook, "__self__", None), Conversion)}
        for table in (pre, module._forward_pre_hooks_with_kwargs, after, module._forward_hooks_always_called):
            for key in ours:
                table.pop(key, None)
