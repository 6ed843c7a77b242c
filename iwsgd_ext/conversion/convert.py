"""``iw.convert`` and ``iw.revert``: the noise of a model is swapped, in place, so that its training forward draws S noise samples."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from ..checks import as_arguments
from ..layers.context import sampling
from . import class_swap
from .converted import CONVERSION, FORWARD, NOT_REACHED, SCALAR_OUTPUT, Conversion, Converted, conversion_of
from .swaps import SWAPS, draws, idle_modules, original_class, swap, unswap
from .verify import Verification, verify_conversion

Model = TypeVar("Model", bound=nn.Module)


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
    """Makes a model's training forward draw S noise samples per example (Noh et al. 2017, eq 4), in place.

    Every noise layer is swapped for its IW form, functional dropout (``F.dropout`` and its family) is caught, and the model opens its own
    sampling context: in training ``model(x)`` of B rows returns S*B rows, sample-major; in eval mode nothing changes. Layers keep their
    identity: references, hooks, names and the state_dict stay valid. The model can be deep-copied, pickled and compiled. An
    ``iw.sampling`` context around the model sets seed, sample ids and number of samples. :func:`audit` lists the noise that was found.

    Args:
        model: any module with at least one dropout layer or one call of functional dropout.
        samples: S.
        expand: how one example becomes S.
            "axis": samples are in a dimension that the model cannot see. Each gets the results of a forward of that sample alone,
            whatever the model does with its rows; tensors that no noise has touched are computed once.
            "first": rows [S*B, ...] from the first noise layer of each branch on. This takes less Python for each operation, so it is
            quicker for small networks. It is right only where the model treats each row by itself and no path goes around all noise.
            "input": rows [S*B, ...] from the model's inputs on: every tensor argument with as many rows as the first one is repeated.
            a submodule's name: rows from that submodule's inputs on. A noise layer called before it raises.
        example_inputs: a tensor, a sequence of positional arguments or a mapping of keyword arguments. The converted model is run on
            them and compared with its samples alone (see ``verify``). At least two examples, unlike each other, show most.
        batch_norm: the rows over which BatchNorm layers (SyncBatchNorm and subclasses too) normalise in training.
            "per_sample": the B rows of each sample; running statistics get S successive updates, as in a loop over samples.
            "frozen": none: the running statistics normalise, and are not written.
            "joint": all S*B rows, with one update; only where samples are rows ("first", "input", a name).
        batch_dim: the dimension that holds the rows: 1 for time-major models (nn.Transformer's and nn.LSTM's default). None takes that of a
            context around the model, or 0.
        one_by_one: names of submodules that are called once for each sample instead of on the axis ("" is the model): those that draw one
            number for a whole call, or branch on values. A submodule for which a run shows this is added, with a warning.
        strict: raise where noise is not reached, instead of warning.
        verify: with ``example_inputs``, run S samples together and three of them alone, in training mode and under one seed, and
            compare the outputs. Afterwards the model, its buffers, gradients and all random generators are as before. With rows and
            without ``example_inputs``, the first training forward is compared in the same way.

    Returns:
        The model.

    Raises:
        ValueError: samples < 1; a model that is converted already or shows no noise on ``example_inputs``; an unknown submodule's name; a
            BatchNorm that ``batch_norm`` does not suit; outputs that differ from those of the samples alone; with ``strict``, noise that is
            not reached.

    Warns:
        UserWarning: the model draws noise that is not reached (inside other libraries' kernels, by torch.rand, ...), parts of it are
            called once for each sample, or it draws NumPy's or Python's random numbers. The warning comes here with ``example_inputs``,
            else in the first training forward.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
        >>> model = iw.convert(model, samples=5, example_inputs=torch.randn(2, 4))
        >>> model(torch.ones(2, 4)).shape, model.eval()(torch.ones(2, 4)).shape
        (torch.Size([10, 3]), torch.Size([2, 3]))
    """
    one_by_one = (one_by_one,) if isinstance(one_by_one, str) else one_by_one
    check_convertible(model, expand, batch_norm, one_by_one)
    context = sampling(samples, batch_dim=batch_dim or 0)  # checks them
    samples, batch_dim = context.samples, None if batch_dim is None else context.batch_dim
    conversion = install(model, Conversion(samples, expand, batch_norm, batch_dim, strict, verify), one_by_one)
    try:
        if example_inputs is not None:
            args, kwargs = as_arguments(example_inputs)
            conversion.verification = run = verify_conversion(model, samples, args, kwargs, compare=verify)
            _report(model, conversion, run)
        if conversion.watched and (alike := conversion.samples_alike(model)):
            warnings.warn(f"iw.convert: {alike}", stacklevel=2)
    except (ValueError, RuntimeError):
        revert(model)
        raise
    return model


def _report(model: nn.Module, conversion: Conversion, run: Verification) -> None:
    """Raises or warns of what the run on example inputs has shown."""
    if run.verdict == "stopped":
        raise ValueError(f"example_inputs: {run.message}") from run.error
    run.check(conversion.expand, "example_inputs")
    unreached = conversion.unreached(model)
    if unreached and conversion.strict:
        raise ValueError("strict=True: this noise is not reached: " + "; ".join(unreached))
    if unreached:
        warnings.warn(NOT_REACHED + "; ".join(unreached), stacklevel=3)
    conversion.told_of_scalars = run.scalar_output
    for note in ([run.message] if run.verdict == "unclear" else []) + ([SCALAR_OUTPUT] if run.scalar_output else []):
        warnings.warn(f"example_inputs: {note}", stacklevel=3)
    random = any(call.kind == "random" for call in conversion.calls)  # on which noise may depend: layer drop
    if not (conversion.has_noise or random or any(draws(module) for module in model.modules())):
        raise ValueError(
            "model: expected noise, at least one of "
            + ", ".join(c.__name__ for c in SWAPS)
            + " or a call of functional dropout; found none in its modules, and none in a run on example_inputs"
            + "".join(f". {idle}" for idle in idle_modules(model))
        )


def revert(model: Model) -> Model:
    """Undoes :func:`convert`, in place: the model has torch's own layers again, which draw one noise sample per example (eq 4 of
    Noh et al. 2017 with S = 1).

    Args:
        model: a converted model.

    Returns:
        The model.

    Raises:
        ValueError: the model is not converted, or its class was changed since.

    Example:
        >>> import iwsgd_ext as iw
        >>> from torch import nn
        >>> iw.revert(iw.convert(nn.Sequential(nn.Dropout(0.5)), samples=2))
        Sequential(
          (0): Dropout(p=0.5, inplace=False)
        )
    """
    conversion = conversion_of(model)
    if conversion is None:
        raise ValueError("model: expected a converted one (iw.convert), got one that is not")
    if not class_swap.has(model, Converted):
        raise ValueError(
            f"model: expected one of the class that iw.convert has set, got one of the class {type(model).__name__}, set since"
        )
    conversion.remove_hooks(model)
    for name in list(conversion.one_by_one):
        conversion.run_on_axis(model, name)
    unswap(model)
    class_swap.take(model)
    delattr(model, CONVERSION)
    if FORWARD in vars(model):
        vars(model)["forward"] = vars(model).pop(FORWARD)
    return model


def check_convertible(model: nn.Module, expand: str, batch_norm: str, one_by_one: Sequence[str]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("model: expected one of Python code, got a scripted one; convert it before torch.jit.script")
    names = {name for name, _ in model.named_modules() if name}
    for name, module in model.named_modules():
        if hasattr(module, CONVERSION):
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
    for name in one_by_one:
        if name and name not in names:
            raise ValueError(f"one_by_one: expected names of submodules, or '' for the model, got {name!r}")
    if one_by_one and expand != "axis":
        raise ValueError(f"one_by_one: expected none where expand={expand!r}, which has no axis")


def install(model: nn.Module, conversion: Conversion, one_by_one: Sequence[str] = ()) -> Conversion:
    """Swaps the classes of a model's layers and its own. Where it raises, nothing has changed."""
    swap(model, conversion.batch_norm)
    vars(model)[CONVERSION] = conversion
    if "forward" in vars(model):
        vars(model)[FORWARD] = vars(model).pop("forward")
    class_swap.put(model, Converted)
    for name in one_by_one:
        conversion.run_one_by_one(model, name, "asked for")
    if conversion.expand not in ("axis", "first", "input"):
        model.get_submodule(conversion.expand).register_forward_pre_hook(conversion.expand_inputs, with_kwargs=True)
    return conversion
