"""Dropout by function calls: caught during the training forward of a converted model, and drawn as a layer would draw it."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.overrides import TorchFunctionMode, resolve_name

from ..backend import PACKAGE
from ..layers.attention import scaled_dot_product_attention
from ..layers.checkpoint import _Replayed, mend_running_checkpoint
from ..layers.context import current
from ..layers.dropout import IWAlphaDropout, IWDropout, IWDropout1d, IWDropout2d, IWDropout3d, IWFeatureAlphaDropout


@dataclass(frozen=True)
class Call:
    """A function call by which a training forward drew noise.

    Attributes:
        module: name of the innermost module in whose forward the call was; "" is the model.
        function: name of the function.
        p: its probability, where it has one.
        place: file:line.
        kind: "replaced": drawn by the context. "dropout" and "random": drawn by torch, so that no replay repeats it.
    """

    module: str
    function: str
    p: float | None
    place: str
    kind: str

    def __str__(self) -> str:
        p = "" if self.p is None else f"(p={self.p})"
        return f"{self.function}{p} in {self.module or 'the model'}, {self.place}"


class FeatureDropout(IWDropout2d):
    """``torch.feature_dropout``: whole channels, of any shape, are dropped."""

    dims, expected, namesake = (2, 3, 4, 5), "[B, C, ...]", "torch.feature_dropout"


# Functions that are replaced: the layer that draws instead, and the default of ``training``.
LAYERS: dict[Callable, tuple[Callable, bool]] = {
    F.dropout: (IWDropout, True),
    F.dropout1d: (IWDropout1d, True),
    F.dropout2d: (IWDropout2d, True),
    F.dropout3d: (IWDropout3d, True),
    torch.dropout: (IWDropout, True),
    torch.feature_dropout: (FeatureDropout, True),
    F.alpha_dropout: (IWAlphaDropout, False),
    F.feature_alpha_dropout: (IWFeatureAlphaDropout, False),
    torch.alpha_dropout: (IWAlphaDropout, True),
    torch.feature_alpha_dropout: (IWFeatureAlphaDropout, True),
}
IN_PLACE = {
    torch.dropout_: torch.dropout,
    torch.feature_dropout_: torch.feature_dropout,
    torch.alpha_dropout_: torch.alpha_dropout,
    torch.feature_alpha_dropout_: torch.feature_alpha_dropout,
}
ATTENTION = F.scaled_dot_product_attention

# Functions with dropout inside that are not replaced: (position and name of p, position, name and default of the argument that turns
# dropout on).
UNREACHED: dict[Callable, tuple[int, str, int, str, bool]] = {
    F.multi_head_attention_forward: (10, "dropout_p", 13, "training", True),
    torch.native_dropout: (1, "p", 2, "train", True),
}
RECURRENT = frozenset([torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu])

# Functions that draw other random numbers: these are no function of seed and sample, so that no replay repeats them.
RANDOM: frozenset[Callable] = frozenset(
    [
        *(torch.bernoulli, torch.multinomial, torch.normal, torch.poisson, torch.rand, torch.rand_like, torch.randint, torch.randint_like),
        *(torch.randn, torch.randn_like, torch.randperm, torch.rrelu, F.rrelu, F.gumbel_softmax),
        *(getattr(Tensor, name) for name in ("bernoulli", "bernoulli_", "multinomial", "cauchy_", "exponential_", "geometric_")),
        *(getattr(Tensor, name) for name in ("log_normal_", "normal_", "random_", "uniform_")),
    ]
)


_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks

# Files of this package whose frames stand between a user's call and the Watch.
_CATCHING = (__name__, f"{__package__}.axis_rules")


@dataclass
class Watch:
    """Notes the noise that a model draws while it runs.

    Attributes:
        names: names of the model's modules, by id.
        calls: the calls that drew noise, in order, each once.
        asks: the line at which the forward asked for the values of a tensor, or None.
        ran: True once a forward ran under this watch; a compiled one does not.
    """

    names: dict[int, str]
    calls: dict[Call, None] = field(default_factory=dict)
    asks: str | None = None
    ran: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> "Watch":
        return cls({id(module): name for name, module in model.named_modules()})

    def add(self, function: str, p: float | None, kind: str) -> None:
        place = self.place()
        if place is not None:
            self.calls[Call(place[0], function, p, place[1], kind)] = None

    def place(self) -> tuple[str, str] | None:
        """(name of the innermost module that is running, line of the call); None where this package's own noise made the call.

        Only the frames of the running forwards tell the line of the user's model.
        """
        frame, line = sys._getframe(2), None
        while frame is not None:
            package, module = frame.f_globals.get("__name__", ""), frame.f_locals.get("self")
            mine = package.startswith(PACKAGE + ".")
            if mine and line is None and package not in _CATCHING:
                return None
            if line is None and not mine and not package.startswith("torch."):
                line = f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
            if isinstance(module, nn.Module) and id(module) in self.names:
                return self.names[id(module)], line or f"{type(module).__name__}.forward"
            frame = frame.f_back
        return "", line or "?"


class FunctionalDropout(TorchFunctionMode):
    """The mode in which functional dropout is noise of the sampling context; a converted model's forward enters it."""

    def __init__(self, watch: Watch | None = None):
        super().__init__()
        self.watch = watch
        self.around = None if is_compiling() else _top_hooks(False)  # hooks of a checkpoint around the whole model

    def unwatched(self) -> "FunctionalDropout":
        """The same mode without a watch, for a recompute."""
        return type(self)()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not is_compiling() and _top_hooks(False) is not None:
            mend_running_checkpoint(self, self.around)
        if is_compiling() and func is Tensor.unflatten:
            func = (
                torch.unflatten
            )  # the method calls Python's super(), which torch.compile does not trace; nor does it trace this in a dict
        handler = _HANDLERS.get(func)
        if handler is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        return handler(self, func, args, kwargs or {})

    def _draw_in_place(self, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        return self._draw(func, args, kwargs, IN_PLACE[func], True)

    def _draw(self, func: Callable, args: tuple, kwargs: dict, form: Callable | None = None, in_place: bool = False) -> Tensor:
        layer, training = LAYERS[form or func]
        x = _argument(args, kwargs, 0, "input", None)
        p = _argument(args, kwargs, 1, "p", 0.5)
        training = _argument(args, kwargs, 2, "train" if "train" in kwargs else "training", training)
        context = current()
        if context is None or not (training or context.evaluating):
            return func(*args, **kwargs)
        if p != 0:
            _check_not_recomputed(func)
        if self.watch is not None:
            self.watch.add(resolve_name(func), p, "replaced")
        y = layer(p)(x)
        if (in_place or _argument(args, kwargs, 3, "inplace", False)) and y.shape == x.shape:
            return self._written(x, y)  # the caller may read x; where rows expand, x cannot hold the result
        return y

    def _written(self, x: Tensor, y: Tensor) -> Tensor:
        return x.copy_(y)

    def _attend(self, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        p = _argument(args, kwargs, 4, "dropout_p", 0.0)
        context = current()
        if context is None:
            return ATTENTION(*args, **kwargs)
        if p != 0:
            _check_not_recomputed(ATTENTION)
            if self.watch is not None:
                self.watch.add(resolve_name(ATTENTION), p, "replaced")
        return scaled_dot_product_attention(*args, **kwargs)  # p = 0 too: B rows and S*B rows may meet

    def _ask(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        asked_by = sys._getframe(2).f_globals.get("__name__", "")
        if self.watch is not None and not asked_by.startswith("torch."):  # (torch's own layers ask for the values of masks)
            self.watch.asks = self.watch.asks or (self.watch.place() or ("", None))[1]
        return func(*args, **kwargs)

    def _note(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if self.watch is not None:
            p = probability(func, args, kwargs)
            if p:
                self.watch.add(resolve_name(func), p, "dropout")
            elif func in RANDOM and (func not in (torch.rrelu, F.rrelu) or _argument(args, kwargs, 3, "training", False)):
                self.watch.add(resolve_name(func), None, "random")
        return func(*args, **kwargs)


_HANDLERS: dict[Callable, Callable] = {
    **dict.fromkeys((*RANDOM, *UNREACHED, *RECURRENT), FunctionalDropout._note),
    **dict.fromkeys(LAYERS, FunctionalDropout._draw),
    **dict.fromkeys(IN_PLACE, FunctionalDropout._draw_in_place),
    ATTENTION: FunctionalDropout._attend,
    **dict.fromkeys((getattr(Tensor, n) for n in ("__bool__", "item", "tolist", "__int__", "__float__")), FunctionalDropout._ask),
}


def _check_not_recomputed(func: Callable) -> None:
    """Raises inside the forward of an autograd Function that computes a gradient: a reentrant checkpoint or a reversible network.

    Its backward calls the same functions again outside of the model's forward, where functional dropout is torch's and would draw other
    noise in silence. Only the frames tell that a Function's forward is running.
    """
    if is_compiling() or torch.is_grad_enabled():  # a Function's forward runs without grad
        return
    frame = sys._getframe(2)
    # Beyond the converted model's own frames, a Function holds the whole model, and calls it again as a whole.
    while frame is not None and frame.f_globals.get("__name__") != f"{__package__}.converted":
        names = frame.f_code.co_varnames[:1]
        first = frame.f_locals.get(names[0]) if names and frame.f_code.co_name == "forward" else None
        ours = isinstance(frame.f_locals.get("run_function"), _Replayed)  # iw.checkpoint's reentrant form draws the same noise again
        if isinstance(first, torch.autograd.function.FunctionCtx) and any(first.needs_input_grad) and not ours:
            raise RuntimeError(
                f"{resolve_name(func)} is noise of a converted model here, inside of an autograd Function (a reentrant checkpoint, a "
                "reversible block), whose backward would draw other noise. Use iw.checkpoint(function, *args), or torch's checkpoint with "
                "use_reentrant=False; or draw the noise outside of the Function."
            )
        frame = frame.f_back


def probability(func: Callable, args: tuple, kwargs: dict) -> float:
    """The probability with which a call of UNREACHED or RECURRENT drops; 0 where it drops nothing."""
    if func in RECURRENT:  # its numbers are has_biases, layers, dropout, train, ..., behind tensors that differ between two forms
        _, layers, p, training, *_ = (v for v in args if isinstance(v, bool | int | float))
        return p if training and layers > 1 else 0.0
    if func not in UNREACHED:
        return 0.0
    position, name, at, switch, default = UNREACHED[func]
    return _argument(args, kwargs, position, name, 0.0) if _argument(args, kwargs, at, switch, default) else 0.0


def _argument(args: tuple, kwargs: dict, position: int, name: str, default: Any) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)
