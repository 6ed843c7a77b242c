"""Outputs of a forward, and attributes that it leaves in modules: taken apart into tensors, and put together again with other tensors."""

from collections import deque
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_unflatten

_TABLES = frozenset(vars(nn.Module()))  # the attributes that every module has
_ITEMS = (dict, list, deque)  # torch.compile takes a tuple of types in isinstance, and no union
_CONTAINERS = (*_ITEMS, set)
_SIMPLE = frozenset((bool, int, float, str, type(None), torch.dtype, torch.device))
# The types of values that hold no tensor of a sample.
PLAIN = str | bytes | int | float | complex | type | ModuleType | nn.Module | Callable | torch.dtype | torch.device | torch.Size | None
_NOT_THE_FORWARDS = ("_iw_", "__composable_api_state")  # how attributes of this package and of torch's distributed wrappers begin


class NoisyBuffer(RuntimeError):
    """Raised where a module replaces a buffer by noisy values: it is to be called once for each noise sample."""

    def __init__(self, module: nn.Module, text: str):
        super().__init__(text)
        self.module = module


def check_returned(output: Any) -> None:
    """Raises where a forward's output is of a kind that cannot hold several samples."""
    for v in tree_flatten(output, is_leaf=lambda v: isinstance(v, PackedSequence))[0]:
        check_not_later(v)
        if isinstance(v, PackedSequence):
            raise RuntimeError(
                "a PackedSequence is returned, whose sequences are those of one sample: return its .data, or pad_packed_sequence(...)[0]"
            )
        if isinstance(v, set | frozenset) and any(isinstance(x, Tensor) for x in v):
            raise RuntimeError("a set of tensors is returned: return a list or a tuple, which keep an order")


def check_not_later(output: Any) -> None:
    """Raises where a forward returns an iterator, which would draw noise after the forward, when the sampling context has ended."""
    if isinstance(output, Iterator):
        raise RuntimeError(f"a {type(output).__name__} is returned, which computes when the forward is over: return a list or a tuple")


class Output:
    """A forward's output, of any structure, as a list of tensors.

    Attributes:
        tensors: in an order that is the same for each noise sample.
        leaves: the leaves of the output as a pytree.
    """

    def __init__(self, output: Any, model: nn.Module, look_into: bool = True):
        self.leaves, self.spec = tree_flatten(output)
        self.tensors: list[Tensor] = []
        self.places: list[Callable[[Tensor], None]] = []
        self.after: list[Callable[[], None]] = []  # steps that make tuples anew, once all tensors are replaced
        self.seen: set[int] = set()
        objects = []
        for i, v in enumerate(self.leaves):
            if isinstance(v, Tensor):
                self._found(v, self.leaves, i)
            elif isinstance(v, tuple):
                _check_tuple(v, lambda x: True)
            elif look_into and not isinstance(v, PLAIN):
                objects.append(v)
        if objects:
            own = {id(v) for v in (*model.parameters(), *model.buffers())}
            for v in objects:
                self._look_into(v, lambda x: id(x) not in own)

    def add_attributes(self, model: nn.Module, holds: Callable[[Any], bool]) -> None:
        """Adds the noisy tensors that modules keep as attributes (an auxiliary loss, attention weights): they become rows as outputs do."""
        for module in modules_of(model):
            for key in _kept_by(module):
                self._item(vars(module), key, vars(module)[key], holds, 1)
            for key, v in module._buffers.items():
                if v is not None and holds(v):
                    raise NoisyBuffer(module, f"the buffer {key!r} of a {type(module).__name__} was replaced by noisy values")

    def replaced(self, tensors: list[Tensor]) -> Any:
        """The output, with the given tensors in the places of its own."""
        for place, x in zip(self.places, tensors, strict=True):
            place(x)
        for step in self.after:
            step()
        return tree_unflatten(self.leaves, self.spec)

    def _found(self, x: Tensor, holder: Any, key: Any) -> None:
        self.tensors.append(x)
        self.places.append(lambda y: _set(holder, key, y))

    def _look_into(self, v: Any, wanted: Callable[[Tensor], bool], depth: int = 0) -> None:
        """Finds the tensors in an object that is no pytree: a cache, a distribution, a dataclass."""
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
        elif not isinstance(v, PLAIN):
            self._look_into(v, wanted, depth)


def _check_tuple(v: tuple, wanted: Callable[[Tensor], bool]) -> None:
    """Raises where a tuple that holds tensors of one sample is of a class of its own, which cannot be made anew from other tensors."""
    if any(isinstance(x, Tensor) and wanted(x) for x in tree_flatten(list(v))[0]):
        raise RuntimeError(f"a {type(v).__name__} holds tensors, a tuple of a class of its own: take a plain or a named tuple")


def _set(holder: Any, key: Any, x: Any) -> None:
    if isinstance(holder, _ITEMS):
        holder[key] = x
    else:
        object.__setattr__(holder, key, x)


def modules_of(model: nn.Module) -> list[nn.Module]:
    """``model.modules()``, in another order: each forward needs it, and torch's generators, one for each level, cost more."""
    found, seen = [model], {model}
    for module in found:
        for inner in module._modules.values():
            if inner is not None and inner not in seen:
                seen.add(inner)
                found.append(inner)
    return found


class Attributes:
    """The attributes of a module and of those inside it, compared before and after each of several calls.

    A call for one noise sample may put a tensor there (an auxiliary loss); after all calls the attribute holds all samples.
    """

    def __init__(self, module: nn.Module | None):
        self.modules = [] if module is None else modules_of(module)
        self.seen = self._now()

    def _now(self) -> list[dict[str, Any]]:
        return [{key: vars(m)[key] for key in _kept_by(m)} for m in self.modules]

    def taken(self) -> dict[tuple[int, str], Any]:
        """The attributes that the last call has set, by (index of the module, name)."""
        before, self.seen = self.seen, self._now()
        pairs = enumerate(zip(before, self.seen, strict=True))
        return {(i, key): v for i, (old, new) in pairs for key, v in new.items() if old.get(key) is not v}

    def contents(self) -> list[list[Any]]:
        """Each list, dict or set among the attributes, followed by its items; for :func:`changed`."""
        containers = [v for m in self.modules for key, v in vars(m).items() if isinstance(v, _CONTAINERS) and key not in _TABLES]
        return [[v, *(v.values() if isinstance(v, dict) else v)] for v in containers]

    def put(self, taken: list[dict[tuple[int, str], Any]], together: Callable[[list[Tensor]], Tensor]) -> None:
        """Sets the attributes that every call has set to the values of all samples, which ``together`` makes one tensor. An attribute that
        the first call alone has set (a table, made once) stays.

        Raises:
            ValueError: the calls have set different attributes.
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
                tensors = [together(list(of_samples)) for of_samples in zip(*(o.tensors for o in each), strict=True)]
                vars(self.modules[i])[key] = each[-1].replaced(tensors)


def changed(before: list[list[Any]], now: list[list[Any]]) -> bool:
    """True where a container of ``before`` has other items now."""
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
