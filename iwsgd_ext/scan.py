"""Reading the code of a model's forwards for function calls that draw noise: a heuristic, for where no run has shown them."""

import builtins
import dis
import functools
import inspect
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import resolve_name

from .functional_dropout import ATTENTION, IN_PLACE, LAYERS, RANDOM, RANDOM_METHODS, RECURRENT, UNREACHED, Call

_KINDS = {
    **dict.fromkeys((*LAYERS, *IN_PLACE, ATTENTION), "replaced"),
    **dict.fromkeys((*UNREACHED, *RECURRENT), "dropout"),
    **dict.fromkeys(RANDOM, "random"),
}


def scan(model: nn.Module) -> list[Call]:
    """The noise functions that the forwards of a model's modules name, in their own code or in functions that they call by name.

    A function that is reached otherwise (through an object, a list, compiled code) is not found, and one that is found may never be
    called. torch's own modules and this package's are known and not read.
    """
    found: dict[Call, None] = {}
    of_class: dict[type, list[tuple[str, str, str]]] = {}
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__module__.startswith(("torch.", __package__ + ".")):
            continue
        if kind not in of_class:
            of_class[kind] = list(_Reader(kind).read())
        held = [v for v in vars(module).values() if isinstance(v, FunctionType | functools.partial | MethodType) or _kind(v)]
        for function, place, what in (*of_class[kind], *(hit for v in held for hit in _Reader(kind).read(v))):
            found[Call(name, function, None, place, what)] = None
    return list(found)


def _kind(thing: Any) -> str | None:
    try:
        return _KINDS.get(thing)
    except TypeError:  # not hashable
        return None


class _Reader:
    """Follows names from the forward of a class to functions of torch, through Python functions that are not torch's."""

    def __init__(self, of: type[nn.Module]):
        self.of = of
        self.seen: set[CodeType] = set()
        self.place = f"{of.__name__}"

    def read(self, start: Any = None) -> Iterator[tuple[str, str, str]]:
        if start is not None:
            yield from self._follow(start)
        else:
            yield from self._method("forward")

    def _method(self, name: str) -> Iterator[tuple[str, str, str]]:
        """Every definition of a method: one may call another by super()."""
        for base in self.of.__mro__:
            method = inspect.getattr_static(base, name, None) if name in vars(base) else None
            if isinstance(method, property):
                method = method.fget
            yield from self._follow(getattr(method, "__func__", method), own=True)

    def _follow(self, thing: Any, own: bool = False) -> Iterator[tuple[str, str, str]]:
        what = _kind(thing)
        if what is not None:
            yield resolve_name(thing) or thing.__name__, self.place, what
        elif isinstance(thing, functools.partial):
            yield from self._follow(thing.func)
        elif isinstance(thing, MethodType):
            yield from self._follow(thing.__func__)
        elif isinstance(thing, FunctionType):
            module = thing.__module__ or ""
            allowed = not module.startswith(("torch.", __package__ + ".")) or (own and module == "torch.nn.modules.dropout")
            if allowed and thing.__code__ not in self.seen:
                yield from self._code(thing.__code__, thing)
                for inside in (getattr(thing, "__wrapped__", None), *(_cell(c) for c in thing.__closure__ or ())):
                    yield from self._follow(inside)  # what a decorator has wrapped
        elif isinstance(thing, type) and issubclass(thing, torch.autograd.Function) and not thing.__module__.startswith("torch."):
            yield from self._follow(getattr(thing, "forward", None))
        elif isinstance(thing, type) and issubclass(thing, nn.modules.dropout._DropoutNd):
            yield f"{thing.__name__} built in forward", self.place, "replaced"
        elif isinstance(thing, Mapping) and len(thing) <= 100:  # a table of functions
            for value in thing.values():
                if isinstance(value, FunctionType | functools.partial):
                    yield from self._follow(value)

    def _code(self, code: CodeType, function: FunctionType) -> Iterator[tuple[str, str, str]]:
        self.seen.add(code)
        names, thing = {**vars(builtins), **function.__globals__}, None
        closure = dict(zip(function.__code__.co_freevars, map(_cell, function.__closure__ or ()), strict=False))
        first = code.co_varnames[:1]
        for instruction in dis.get_instructions(code):
            op, value, before = instruction.opname, instruction.argval, thing
            line = instruction.positions.lineno if hasattr(instruction, "positions") else instruction.starts_line
            self.place = f"{code.co_filename.rsplit('/', 1)[-1]}:{line}" if line else self.place
            if op in ("PUSH_NULL", "CACHE", "PRECALL", "EXTENDED_ARG"):
                continue
            thing = None
            if op in ("LOAD_GLOBAL", "LOAD_NAME"):
                thing = names.get(value)
            elif op == "LOAD_DEREF":
                thing = closure.get(value)
            elif op.startswith("LOAD_FAST"):
                thing = _SELF if (value[-1:] if isinstance(value, tuple) else (value,)) == first == ("self",) else None
            elif op in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
                if before is _SELF or op == "LOAD_SUPER_ATTR":
                    yield from self._method(value)
                elif isinstance(before, ModuleType | type):
                    thing = getattr(before, value, None)
                elif before is None and value in RANDOM_METHODS:
                    yield f"torch.Tensor.{value}", self.place, "random"
            if thing is not None and thing is not _SELF:
                yield from self._follow(thing)
        for inner in code.co_consts:
            if isinstance(inner, CodeType) and inner not in self.seen:
                yield from self._code(inner, function)


def _cell(cell) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


_SELF = object()
