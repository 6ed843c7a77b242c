"""What a forward returns or leaves behind, taken apart into tensors and put together again."""

from collections import deque
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_unflatten

_TABLES = frozenset(vars(nn.Module()))  # a module's own attributes
_ITEMS = (dict, list, deque)  # a tuple, which the compiler takes
_CONTAINERS = (*_ITEMS, set)
_SIMPLE = frozenset((bool, int, float, str, type(None), torch.dtype, torch.device))
_PLAIN = str | bytes | int | float | complex | type | ModuleType | nn.Module | Callable | torch.dtype | torch.device | torch.Size | None
_NOT_THE_FORWARDS = ("_iw_", "__composable_api_state")  # attributes of this package, and of torch's distributed wrappers


class LanesInBuffer(RuntimeError):
    """A module's buffer would hold lanes. It is to be called once for each noise sample."""

    def __init__(self, module: nn.Module, text: str):
        super().__init__(text)
        self.module = module


def check_returned(output: Any) -> None:
    """Raises where a forward's output cannot hold the rows of several samples."""
    for v in tree_flatten(output, is_leaf=lambda v: isinstance(v, PackedSequence))[0]:
        check_not_later(v)
        if isinstance(v, PackedSequence):
            raise RuntimeError(
                "a PackedSequence is returned, whose sequences are those of one sample: return its .data, or pad_packed_sequence(...)[0]"
            )
        if isinstance(v, set | frozenset) and any(isinstance(x, Tensor) for x in v):
            raise RuntimeError("a set of tensors is returned: return a list or a tuple, which keep an order")


def check_not_later(output: Any) -> None:
    """Raises where a forward returns what computes after it, when the context of its noise is over."""
    if isinstance(output, Iterator):
        raise RuntimeError(f"a {type(output).__name__} is returned, which computes when the forward is over: return a list or a tuple")


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
            elif isinstance(v, tuple):
                _check_tuple(v, lambda x: True)
            elif look_into and not isinstance(v, _PLAIN):
                objects.append(v)
        if objects:
            own = {id(v) for v in (*model.parameters(), *model.buffers())}
            for v in objects:
                self._look_into(v, lambda x: id(x) not in own)

    def add_attributes(self, model: nn.Module, holds: Callable[[Any], bool]) -> None:
        """Tensors with lanes that modules keep: an attribute (an auxiliary loss, attention weights) becomes rows as an output does."""
        for module in modules_of(model):
            for key in _kept_by(module):
                self._item(vars(module), key, vars(module)[key], holds, 1)
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
        if id(v) in self.seen or depth > 12:
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
            if isinstance(v, set | frozenset) and any(isinstance(x, Tensor) and wanted(x) for x in v):
                raise RuntimeError("a set holds tensors of one sample: take a list or a tuple, which keep an order")
            return
        for key, inner in items:
            self._item(v, key, inner, wanted, depth + 1)

    def _item(self, holder: Any, key: Any, v: Any, wanted: Callable[[Tensor], bool], depth: int) -> None:
        if isinstance(v, Tensor):
            if wanted(v):
                self._found(v, holder, key)
        elif isinstance(v, tuple) and not isinstance(v, torch.Size):
            leaves, spec = tree_flatten(v)
            if spec.is_leaf():
                return _check_tuple(v, wanted)
            before = len(self.tensors)
            for i, inner in enumerate(leaves):
                self._item(leaves, i, inner, wanted, depth + 1)
            if len(self.tensors) > before:
                self.after.append(lambda: _set(holder, key, tree_unflatten(leaves, spec)))
        elif not isinstance(v, _PLAIN):
            self._look_into(v, wanted, depth)


def _check_tuple(v: tuple, wanted: Callable[[Tensor], bool]) -> None:
    """Raises where a tuple of a class of its own, which nobody else can make anew, holds tensors of one sample."""
    if any(isinstance(x, Tensor) and wanted(x) for x in tree_flatten(list(v))[0]):
        raise RuntimeError(f"a {type(v).__name__} holds tensors, a tuple of a class of its own: take a plain or a named tuple")


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
    """What modules keep as attributes, looked at after each of several calls: a call of one sample may put something else there."""

    def __init__(self, module: nn.Module | None):
        self.modules = [] if module is None else modules_of(module)
        self.seen = self._now()

    def _now(self) -> list[dict[str, Any]]:
        return [{key: vars(m)[key] for key in _kept_by(m)} for m in self.modules]

    def taken(self) -> dict[tuple[int, str], Any]:
        """What the last call has put there."""
        before, self.seen = self.seen, self._now()
        pairs = enumerate(zip(before, self.seen, strict=True))
        return {(i, key): v for i, (old, new) in pairs for key, v in new.items() if old.get(key) is not v}

    def contents(self) -> list[list[Any]]:
        """Of the containers there: what a call changes in place differs from what it was."""
        containers = [v for m in self.modules for key, v in vars(m).items() if isinstance(v, _CONTAINERS) and key not in _TABLES]
        return [[v, *(v.values() if isinstance(v, dict) else v)] for v in containers]

    def put(self, taken: list[dict[tuple[int, str], Any]], together: Callable[[list[Tensor]], Tensor]) -> None:
        """Attributes that every call has put there hold all samples; what the first alone has put there (a table, made once) stays.

        Raises:
            ValueError: samples leave different attributes.
        """
        for i, key in {place: None for found in taken for place in found}:
            values = [found[i, key] for found in taken if (i, key) in found]
            if len(values) < len(taken):
                if len(values) > 1 or (i, key) not in taken[0]:
                    raise ValueError(f"samples leave another attribute {key!r}")
                continue
            each = [Output(v, self.modules[i]) for v in values]
            if len({len(o.tensors) for o in each}) > 1:
                raise ValueError(f"samples leave other tensors in the attribute {key!r}")
            if each[0].tensors:
                tensors = [together(list(of_lanes)) for of_lanes in zip(*(o.tensors for o in each), strict=True)]
                vars(self.modules[i])[key] = each[-1].replaced(tensors)


def changed(before: list[list[Any]], now: list[list[Any]]) -> bool:
    """Whether containers that were there before hold other things now."""
    held = {id(v[0]): v for v in before}
    return any(
        len(v) != len(held[id(v[0])]) or any(a is not b for a, b in zip(v, held[id(v[0])], strict=True)) for v in now if id(v[0]) in held
    )


def _kept_by(module: nn.Module) -> list[str]:
    """The attributes of a module in which a forward may leave tensors."""
    own = vars(module)
    return [key for key in sorted(own.keys() - _TABLES) if not _is_simple(own[key]) and not key.startswith(_NOT_THE_FORWARDS)]


def _is_simple(v: Any) -> bool:
    if type(v) in (tuple, list):
        return _SIMPLE.issuperset(map(type, v))
    if type(v) is dict:
        return _SIMPLE.issuperset(map(type, v.values()))
    return type(v) in _SIMPLE
