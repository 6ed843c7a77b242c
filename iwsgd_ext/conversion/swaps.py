"""The swap of layers: each noise layer's class is replaced by another, so that the layer stays the same object."""

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
from .batch_norm import MODES, norm_swapped_to
from .pass_state import RandomState


class _NamedRate(IWDropPath):
    """Stochastic depth with the probability in ``drop_prob``, as timm and Hugging Face name it, read anew in each call."""

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
_SWAPPED_FROM = "_iw_swapped_from"  # the attribute of a swapped layer that holds its former class


def swapped_to(module: nn.Module) -> type[nn.Module] | None:
    """The class of this package that takes the place of a noise layer's, or None."""
    if type(module) in SWAPS:
        return SWAPS[type(module)]
    rate = _rate_of_depth(module)
    if rate is None or not _drops_rows(module, rate):
        return None
    return IWDropPath if rate == "p" else _NamedRate


def _rate_of_depth(module: nn.Module) -> str | None:
    """The name of the attribute that holds the rate of another library's stochastic depth, which the class name tells; None for others."""
    kind = type(module).__name__
    if isinstance(module, IWDropPath):
        return None
    if kind.endswith("DropPath") and hasattr(module, "drop_prob"):
        return "drop_prob"
    return "p" if kind == "StochasticDepth" else None


def _drops_rows(module: nn.Module, rate: str) -> bool:
    """True where a module is seen to do what IWDropPath does: on rows of ones, in training it drops each row or keeps it and divides it by
    1 - p, and in eval mode it is the identity."""
    if [*module.parameters(), *module.buffers()] or rate not in vars(module):
        return False
    given, random, tried = dict(vars(module)), RandomState(torch.device("cpu")), []
    for shape in ((64, 6), (64, 3, 2), (64, 3, 2, 2)):
        try:
            tried.append(_drops_rows_of(module, torch.ones(shape, device="cpu"), rate))
        except Exception:  # it takes no inputs of this shape
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
    if batch_norm not in MODES:
        raise ValueError(f"batch_norm: expected one of {MODES}, got {batch_norm!r}")
    found = ((module, swapped_to(module) or norm_swapped_to(name, module, batch_norm)) for name, module in model.named_modules())
    for module, to in [(module, to) for module, to in found if to is not None]:
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
    """True for a layer that draws noise of the context. (Attention and recurrent layers without dropout are swapped, too, because B rows
    and S*B rows may meet in them.)"""
    if isinstance(module, IWMultiheadAttention | IWLSTM | IWGRU | IWRNN):
        return module.dropout > 0 and getattr(module, "num_layers", 2) > 1
    return isinstance(module, _Dropout | IWDropConnect | IWGaussianDropout | _RealNoise | IWMultinomialDropout)


def rate_of(module: nn.Module) -> float | None:
    """The rate of a layer that draws noise (a probability, or a standard deviation), 0 for no noise; None where each call gives it."""
    if isinstance(module, IWAdaptiveDropout):
        return None
    return next(getattr(module, name) for name in ("p", "std", "dropout") if hasattr(module, name))


def idle_modules(model: nn.Module) -> list[str]:
    """The modules that could draw noise and draw none, each with the reason."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers == 1:
            why = f"it has one layer, and dropout={module.dropout} acts between layers only; an nn.Dropout behind it is noise"
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout == 0:
            why = "dropout=0"
        elif draws(module) and rate_of(module) == 0:
            why = "its rate is 0"
        else:
            continue
        found.append(f"{name or 'the model'} ({(original_class(module) or type(module)).__name__}): {why}")
    return found


def unreached_modules(model: nn.Module) -> list[tuple[str, str, float | None]]:
    """(name, class, p) of the modules whose dropout is inside, out of reach of a swap and of caught function calls."""
    found = []
    for name, module in model.named_modules():
        kind, p = type(module).__name__, getattr(module, "p", getattr(module, "drop_prob", getattr(module, "dropout", None)))
        if draws(module) or original_class(module) is not None or swapped_to(module) is not None:
            continue
        inside = isinstance(module, nn.MultiheadAttention) or (isinstance(module, nn.RNNBase) and module.num_layers > 1)
        depth = _rate_of_depth(module) is not None
        if (inside or depth) and p:
            why = ", which on rows of ones does not drop rows and divide the others by 1 - p, as iw.IWDropPath does" if depth else ""
            found.append((name, kind + why, p))
        elif kind == "RecursiveScriptModule" and "dropout" in getattr(module, "original_name", "").lower():
            found.append((name, f"scripted {module.original_name}", None))
    return found
