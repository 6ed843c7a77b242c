"""Which layer takes the place of which: by class, so that a swapped layer stays the object that it was."""

import torch
from torch import Tensor, nn

from ..layers.attention import IWMultiheadAttention
from ..layers.drop_connect import IWDropConnect
from ..layers.dropout import (
    IWAdaptiveDropout,
    IWAlphaDropout,
    IWDropout,
    IWDropout1d,
    IWDropout2d,
    IWDropout3d,
    IWDropPath,
    IWFeatureAlphaDropout,
    _Dropout,
)
from ..layers.multinomial import IWMultinomialDropout
from ..layers.real_noise import IWGaussianDropout, _RealNoise
from ..layers.recurrent import IWGRU, IWLSTM, IWRNN
from .batch_norm import swapped_class
from .batch_norm import to_swap as batch_norms_to_swap
from .pass_state import RandomState


class _NamedRate(IWDropPath):
    """Stochastic depth whose probability goes by the name that timm and Hugging Face give it, and is read anew in each call."""

    @property
    def p(self) -> float:
        return self.drop_prob or 0.0


SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Dropout: IWDropout,
    nn.Dropout1d: IWDropout1d,
    nn.Dropout2d: IWDropout2d,
    nn.Dropout3d: IWDropout3d,
    nn.AlphaDropout: IWAlphaDropout,
    nn.FeatureAlphaDropout: IWFeatureAlphaDropout,
    nn.MultiheadAttention: IWMultiheadAttention,
    nn.LSTM: IWLSTM,
    nn.GRU: IWGRU,
    nn.RNN: IWRNN,
}
_SWAPPED_FROM = "_iw_swapped_from"  # on a swapped layer: the class to give back


def swapped_to(module: nn.Module) -> type[nn.Module] | None:
    """The noise layer that takes a module's place, or None."""
    kind = type(module)
    if kind in SWAPS:
        return SWAPS[kind]
    # Stochastic depth of other libraries goes by these names.
    if kind.__name__.endswith("DropPath") and hasattr(module, "drop_prob") and not isinstance(module, IWDropPath):
        return _NamedRate if _drops_rows(module, "drop_prob") else None
    if kind.__name__ == "StochasticDepth" and hasattr(module, "p"):
        return IWDropPath if _drops_rows(module, "p") else None
    return None


def _drops_rows(module: nn.Module, rate: str) -> bool:
    """Whether, tried on rows of ones, a module drops each or keeps it and divides it by 1 - p, and is the identity in eval mode."""
    if [*module.parameters(), *module.buffers()] or rate not in vars(module):
        return False
    given, random, tried = dict(vars(module)), RandomState(torch.device("cpu")), []
    for shape in ((64, 6), (64, 3, 2), (64, 3, 2, 2)):
        try:
            tried.append(_drops_rows_of(module, torch.ones(shape, device="cpu"), rate))
        except Exception:  # it takes other shapes
            continue
        finally:
            vars(module).clear()
            vars(module).update(given)
            random.restore()
    return bool(tried) and all(tried)


def _drops_rows_of(module: nn.Module, ones: Tensor, rate: str) -> bool:
    vars(module).update({rate: 0.75, "training": True})
    y = module.forward(ones)
    rows = y.flatten(1)[:, :1]
    vars(module)["training"] = False
    dropped = torch.equal(y.flatten(1), rows.expand(-1, y[0].numel())) and rows.unique().tolist() == [0.0, 4.0]
    return dropped and torch.equal(module.forward(ones), ones)


def swap(model: nn.Module, batch_norm: str) -> None:
    """Swaps every noise layer, and the batch normalisations where ``batch_norm`` says so. Raises before it changes anything."""
    changes = [(module, to) for module in model.modules() if (to := swapped_to(module)) is not None]
    changes += [(module, swapped_class(batch_norm, type(module))) for module in batch_norms_to_swap(model, batch_norm)]
    for module, to in changes:
        setattr(module, _SWAPPED_FROM, type(module))
        if issubclass(to, _Dropout) and "batch_dim" not in vars(module):
            module.batch_dim = None
        module.__class__ = to


def unswap(model: nn.Module) -> None:
    """Gives back the classes."""
    for module in model.modules():
        original = vars(module).pop(_SWAPPED_FROM, None)
        if original is not None:
            vars(module).pop("batch_dim", None)
            module.__class__ = original


def original_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that a swapped module had, or None."""
    return vars(module).get(_SWAPPED_FROM)


def draws(module: nn.Module) -> bool:
    """Whether a module is a layer that draws noise of the context. (Attention and recurrent layers without dropout are swapped too: they
    have to do where rows of B and of S*B meet.)"""
    if isinstance(module, IWMultiheadAttention | IWLSTM | IWGRU | IWRNN):
        return module.dropout > 0 and getattr(module, "num_layers", 2) > 1
    return isinstance(module, _Dropout | IWDropConnect | IWGaussianDropout | _RealNoise | IWMultinomialDropout)


def rate_of(module: nn.Module) -> float | None:
    """How much noise a layer that draws is set to, 0 for none; None where each call says."""
    if isinstance(module, IWAdaptiveDropout):
        return None
    return next(getattr(module, name) for name in ("p", "std", "dropout") if hasattr(module, name))


def idle_modules(model: nn.Module) -> list[str]:
    """The modules that could draw noise and do not, each with the reason."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers == 1:
            why = f"one layer, and its dropout={module.dropout} stands between layers: nn.Dropout behind it is noise"
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout == 0:
            why = "dropout=0"
        elif draws(module) and rate_of(module) == 0:
            why = "its rate is 0"
        else:
            continue
        found.append(f"{name or 'the model'} ({(original_class(module) or type(module)).__name__}): {why}")
    return found


def unreached_modules(model: nn.Module) -> list[tuple[str, str, float | None]]:
    """(name, class, p) of the modules whose dropout is inside, where neither a swap nor a caught call gets."""
    found = []
    for name, module in model.named_modules():
        kind, p = type(module).__name__, getattr(module, "p", getattr(module, "drop_prob", getattr(module, "dropout", None)))
        if draws(module) or original_class(module) is not None or swapped_to(module) is not None:
            continue
        inside = isinstance(module, nn.MultiheadAttention) or (isinstance(module, nn.RNNBase) and module.num_layers > 1)
        depth = kind == "StochasticDepth" or (kind.endswith("DropPath") and hasattr(module, "drop_prob"))
        if (inside or depth) and p:
            why = ", which on rows of ones does not drop rows and divide the others by 1 - p, as iw.IWDropPath does" if depth else ""
            found.append((name, kind + why, p))
        elif kind == "RecursiveScriptModule" and "dropout" in getattr(module, "original_name", "").lower():
            found.append((name, f"scripted {module.original_name}", None))
    return found
