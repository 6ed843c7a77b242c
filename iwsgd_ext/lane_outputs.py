"""What a forward returns or leaves behind, taken apart into tensors and put together again."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

_TABLES = frozenset(vars(nn.Module()))  # a module's own attributes
_ITEMS = (dict, list, deque)  # a tuple, which the compiler takes
_SIMPLE = frozenset((bool, int, float, str, type(None), torch.dtype, torch.device))
_PLAIN = str | bytes | int | float | complex | type | nn.Module | Callable | torch.dtype | torch.device | torch.Size | None


class LanesInBuffer(RuntimeError):
    """A module's buffer would hold lanes. It is to be called once for each noise sample."""

    def __init__(self, module: nn.Module, text: str):
        super().__init__(text)
        self.module = module


class Output:
    """A forward's output, of any structure.

    Attributes:
        tensors: in an order that is the same for each noise sample.
        leaves: of its pytree.
    """

    def __init__(self, output: Any, model: nn.Module, look_into: bool = True):
        self.leaves, self.spec = tree_flatten(output)
        self.tensors: list[Tensor] = []
        self.places: list[Callable[[Tensor], None]] = []
        self.after: list[Callable[[], None]] = []  # tuples are made anew
        self.seen: set[int] = set()
        objects = []
        for i, v in enumerate(self.leaves):
            if isinstance(v, Tensor):
                self._found(v, self.leaves, i)
            elif look_into and not isinstance(v, _PLAIN):
                objects.append(v)
        if objects:
            own = {id(v) for v in (*model.parameters(), *model.buffers())}
            for v in objects:
                self._look_into(v, lambda x: id(x) not in own)

    def add_attributes(self, model: nn.Module, holds: Callable[[Any], bool]) -> None:
        """Tensors with lanes that modules keep: an attribute (an auxiliary loss, attention weights) becomes rows as an output does."""
        for module in modules_of(model):
            own = vars(module)
            for key in sorted(own.keys() - _TABLES):
                v = own[key]
                simple = _SIMPLE.issuperset(map(type, v)) if type(v) is tuple else type(v) in _SIMPLE
                if not simple and not key.startswith("_iw_"):
                    self._item(own, key, v, holds, 1)
            for key, v in module._buffers.items():
                if v is not None and holds(v):
                    raise LanesInBuffer(module, f"the buffer {key!r} of a {type(module).__name__} was replaced by noisy values")

    def replaced(self, tensors: list[Tensor]) -> Any:
        """The output with other tensors in the places of its own."""
        for place, x in zip(self.places, tensors, strict=True):
            place(x)
        for step in self.after:
            step()
        return tree_unflatten(self.leaves, self.spec)

    def _found(self, x: Tensor, holder: Any, key: Any) -> None:
        self.tensors.append(x)
        self.places.append(lambda y: _set(holder, key, y))

    def _look_into(self, v: Any, wanted: Callable[[Tensor], bool], depth: int = 0) -> None:
        """Containers and objects that are no pytree: caches, distributions, dataclasses."""
        if id(v) in self.seen or depth > 5:
            return
        self.seen.add(id(v))
        if isinstance(v, dict):
            items = list(v.items())
        elif isinstance(v, list | deque):
            items = list(enumerate(v))
        elif hasattr(v, "__dict__"):
            v = vars(v)
            items = list(v.items())
        elif hasattr(type(v), "__slots__"):
            names = [name for kind in type(v).__mro__ for name in getattr(kind, "__slots__", ())]
            items = [(name, getattr(v, name)) for name in names if hasattr(v, name)]
        else:
            return
        for key, inner in items:
            self._item(v, key, inner, wanted, depth + 1)

    def _item(self, holder: Any, key: Any, v: Any, wanted: Callable[[Tensor], bool], depth: int) -> None:
        if isinstance(v, Tensor):
            if wanted(v):
                self._found(v, holder, key)
        elif isinstance(v, tuple) and not isinstance(v, torch.Size):
            leaves, spec = tree_flatten(v)
            before = len(self.tensors)
            for i, inner in enumerate(leaves):
                self._item(leaves, i, inner, wanted, depth + 1)
            if len(self.tensors) > before:
                self.after.append(lambda: _set(holder, key, tree_unflatten(leaves, spec)))
        elif not isinstance(v, _PLAIN):
            self._look_into(v, wanted, depth)


def _set(holder: Any, key: Any, x: Any) -> None:
    if isinstance(holder, _ITEMS):
        holder[key] = x
    else:
        object.__setattr__(holder, key, x)


def modules_of(model: nn.Module) -> list[nn.Module]:
    """``model.modules()``, quicker."""
    found, seen = [model], {model}
    for module in found:
        for inner in module._modules.values():
            if inner is not None and inner not in seen:
                seen.add(inner)
                found.append(inner)
    return found


class Attributes:
    """The tensors that modules hold as attributes, before each of several calls that may put others there."""

    def __init__(self, module: nn.Module | None):
        modules = [] if module is None else modules_of(module)
        self.before = [(m, {key: v for key, v in vars(m).items() if isinstance(v, Tensor)}) for m in modules]

    def taken(self) -> dict[tuple[int, str], Tensor]:
        """Those that a call has put there; what was there before is back."""
        found = {}
        for i, (module, before) in enumerate(self.before):
            new = {key: v for key, v in vars(module).items() if isinstance(v, Tensor) and before.get(key) is not v}
            for key, v in new.items():
                found[i, key] = v
                if key in before:
                    vars(module)[key] = before[key]
                else:
                    del vars(module)[key]
        return found

    def put(self, tensors: dict[tuple[int, str], Tensor]) -> None:
        for (i, key), v in tensors.items():
            vars(self.before[i][0])[key] = v
