"""Swapping the noise layers of a model, in place, and making its training forward draw S noise samples by itself."""

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map

from .batch_norm import swapped_class, to_swap
from .dropout import IWDropout, IWDropout1d, IWDropout2d, IWDropout3d, _Dropout
from .sampling import current, sampling

SWAPS = {nn.Dropout: IWDropout, nn.Dropout1d: IWDropout1d, nn.Dropout2d: IWDropout2d, nn.Dropout3d: IWDropout3d}
_SWAPPED_FROM = "_iw_swapped_from"  # on a swapped layer: the class to give back
_CONVERSION = "_iw_conversion"  # on a converted model


def convert(
    model: nn.Module,
    samples: int,
    *,
    expand: str = "auto",
    example_inputs: Tensor | Sequence[Any] | None = None,
    expand_args: Sequence[int | str] | None = None,
    batch_norm: str = "joint",
) -> nn.Module:
    """Swaps every nn.Dropout, Dropout1d, Dropout2d and Dropout3d of a model for its IW form, in place, and lets the model open its own
    sampling context: in training ``model(x)`` of B rows returns S*B rows, sample-major; in eval mode nothing changes.

    Layers keep their identity (references, hooks, names and the state_dict stay valid); the model can be deep-copied, pickled and
    compiled. An ``iw.sampling`` context around the model rules over its seed, sample ids and number of samples.

    Args:
        model: any module with at least one dropout layer.
        samples: S.
        expand: where one row becomes S rows.
            "first": at the first noise layer that each branch meets, so that the trunk before it is computed once. A path that goes
            round all noise and joins later does not fit; it needs "input".
            "input": at the model's inputs, always right: every tensor argument with the first one's number of rows is expanded.
            a submodule's name: at that submodule's inputs. A noise layer called before it raises.
            "auto": a dry run on fake tensors of ``example_inputs`` takes "first" where shapes fit, else "input"; without example inputs,
            "input". The dry run proves that shapes fit, not that rows mean the same: a model that mixes examples (say, attention over
            the batch) fits and is still wrong under any expansion.
        example_inputs: a tensor or a sequence of positional arguments, for "auto".
        expand_args: with "input" or a name, which arguments to expand instead: positions and keyword names.
        batch_norm: what BatchNorm layers (SyncBatchNorm and subclasses too) normalise over in training.
            "joint": all S*B rows, as torch's layer does when it meets them.
            "per_sample": the B rows of each sample, and running statistics as S successive updates, also where the trunk is shared: what
            a loop over samples does.
            "frozen": the running statistics, and none are written.

    Returns:
        The model.

    Raises:
        ValueError: samples < 1, a model that is converted already or has no noise layer, an unknown submodule's name, a BatchNorm that
            ``batch_norm`` does not suit.

    Warns:
        UserWarning: the model holds dropout that swapping modules does not reach (attention's, recurrent layers', alpha dropout).

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
        >>> model = iw.convert(model, samples=5, example_inputs=torch.ones(2, 4))
        >>> model(torch.ones(2, 4)).shape, model.eval()(torch.ones(2, 4)).shape
        (torch.Size([10, 3]), torch.Size([2, 3]))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    sampling(samples)  # checks it
    for name, module in model.named_modules():
        if hasattr(module, _CONVERSION):
            raise ValueError(f"model: expected one that is not converted, but {name or 'it'} is; iw.revert(model) undoes it")
    modules = list(model.modules())
    if not any(type(m) in SWAPS or isinstance(m, _Dropout) for m in modules):
        raise ValueError("model: expected at least one of " + ", ".join(c.__name__ for c in SWAPS) + ", found none in its modules")
    names = {name for name, _ in model.named_modules() if name}
    if expand not in ("auto", "first", "input") and expand not in names:
        raise ValueError(f"expand: expected 'auto', 'first', 'input' or a submodule's name, got {expand!r}")
    normalizations = to_swap(model, batch_norm)
    unreached = _unreached(model)
    if unreached:
        warnings.warn("iw.convert leaves this dropout as it is, one mask for all samples: " + "; ".join(unreached), stacklevel=2)
    for module in modules:
        if type(module) in SWAPS:
            _swap(module, SWAPS[type(module)])
            module.batch_dim = None
    for module in normalizations:
        _swap(module, swapped_class(batch_norm, type(module)))
    reason = "asked for"
    if expand == "auto":
        expand, reason = _choose_expansion(model, samples, example_inputs)
    _install(model, Conversion(samples, expand, tuple(expand_args) if expand_args is not None else None, batch_norm, reason))
    return model


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
    for module in model.modules():
        original = module.__dict__.pop(_SWAPPED_FROM, None)
        if original is not None:
            module.__dict__.pop("batch_dim", None)
            module.__class__ = original
        _remove_hooks(module)
    delattr(model, _CONVERSION)
    return model


class Conversion:
    """What a converted model knows: its number of samples and where it expands. Its methods are the model's hooks."""

    def __init__(self, samples: int, expand: str, expand_args: tuple[int | str, ...] | None, batch_norm: str, reason: str):
        self.samples = samples
        self.expand = expand
        self.expand_args = expand_args
        self.batch_norm = batch_norm
        self.reason = reason

    def enter(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before the forward: opens a context, or takes part in the one around it with this model's place of expansion."""
        if not model.training:
            return None
        context = current()
        if context is None:
            context = sampling(self.samples)
            context.own = True
            if not torch.compiler.is_compiling():
                context.frame = sys._getframe(1)
            context.__enter__()
        context.converted.append((self, context.expand, context.batch))
        context.batch = None
        context.expand = {"first": "first", "input": "none"}.get(self.expand, "later")
        return self.expand_inputs(model, args, kwargs) if self.expand == "input" else None

    def leave(self, model: nn.Module, args: tuple, output: Any) -> None:
        """After the forward, also one that raised."""
        context = current()
        if context is None or not context.converted or context.converted[-1][0] is not self:
            return
        _, context.expand, context.batch = context.converted.pop()
        if context.own and not context.converted:
            context.frame = None
            context.__exit__(None, None, None)

    def expand_inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Repeats the rows of a module's arguments sample-major."""
        context = current()
        if not module.training or context is None:
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


def _swap(module: nn.Module, to: type[nn.Module]) -> None:
    setattr(module, _SWAPPED_FROM, type(module))
    module.__class__ = to


def _install(model: nn.Module, conversion: Conversion) -> None:
    setattr(model, _CONVERSION, conversion)
    if conversion.expand not in ("first", "input"):
        model.get_submodule(conversion.expand).register_forward_pre_hook(conversion.expand_inputs, with_kwargs=True)
    model.register_forward_pre_hook(conversion.enter, prepend=True, with_kwargs=True)
    model.register_forward_hook(conversion.leave, always_call=True)


def _remove_hooks(module: nn.Module) -> None:
    hooks = (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, module._forward_hooks, module._forward_hooks_always_called)
    ours = {
        key
        for table in (module._forward_pre_hooks, module._forward_hooks)
        for key, hook in table.items()
        if isinstance(getattr(hook, "__self__", None), Conversion)
    }
    for table in hooks:
        for key in ours:
            table.pop(key, None)


def _unreached(model: nn.Module) -> list[str]:
    found = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.modules.dropout._DropoutNd) and type(module) not in SWAPS and not isinstance(module, _Dropout):
            found.append(f"{name} ({kind})")
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout > 0:
            found.append(f"{name} ({kind}, dropout={module.dropout})")
    return found


def _choose_expansion(model: nn.Module, samples: int, example_inputs: Tensor | Sequence[Any] | None) -> tuple[str, str]:
    if example_inputs is None:
        return "input", "no example_inputs to try 'first' with"
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    samples = max(samples, 2)
    training = [(m, m.training) for m in model.modules()]
    model.train()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:

            def to_fake(v: Any) -> Any:
                if not isinstance(v, Tensor):
                    return v
                if v.dim() > 0 and v.shape[0] == 1:
                    v = v.expand(3, *v.shape[1:])  # one row would broadcast where it does not fit
                return fake.from_tensor(v)

            state = {k: fake.from_tensor(v) for k, v in (*model.named_parameters(), *model.named_buffers())}
            inputs = tree_map(to_fake, inputs)
            batch = next(v.shape[0] for v in tree_flatten(inputs)[0] if isinstance(v, Tensor) and v.dim() > 0)
            with sampling(samples) as context:
                output = torch.func.functional_call(model, state, inputs)
            if context.batch is None:
                return "input", "no noise layer was called"
            rows = {v.shape[0] for v in tree_flatten(output)[0] if isinstance(v, Tensor) and v.dim() > 0}
            if rows - {samples * batch}:
                return "input", f"with 'first' an output has {rows} rows instead of {samples} * {batch}"
            return "first", "shapes fit"
    except Exception as error:  # whatever a model raises where shapes do not fit
        return "input", f"'first' does not fit: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        for module, was in training:
            module.training = was
