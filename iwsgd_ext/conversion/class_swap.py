"""Classes made at run time: a behaviour is put before a module's own class, so that the module stays the same object."""

import functools

from torch import nn


class Behaviour:
    """A class that is put before a module's own. Subclasses define ``forward``, or a ``forward_of(original)`` that makes one.

    Attributes:
        original: the module's own class, on the class that is made.
        prefix: of the name of the class that is made.
    """

    original: type[nn.Module]
    prefix = ""

    def __reduce_ex__(self, protocol):
        # Pickle cannot find a class that is made at run time: it gets the classes that it is made of.
        made, behaviours = type(self), []
        while "original" in vars(made):
            behaviours.append(made.__bases__[0])
            made = made.original
        return _new, (made, *reversed(behaviours)), *super().__reduce_ex__(protocol)[2:]

    @classmethod
    def forward_of(cls, original: type[nn.Module]) -> dict:
        """The attributes that the made class defines itself."""
        return {}


@functools.cache
def behaving(behaviour: type[Behaviour], original: type[nn.Module]) -> type[nn.Module]:
    """The class with a behaviour before ``original``; it has the original's name, which users' code may read."""
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__, "original": original}
    return type(f"{behaviour.prefix}{original.__name__}", (behaviour, original), names | behaviour.forward_of(original))


def _new(original: type[nn.Module], *behaviours: type[Behaviour]) -> nn.Module:
    for behaviour in behaviours:
        original = behaving(behaviour, original)
    return original.__new__(original)


def has(module: nn.Module, behaviour: type[Behaviour]) -> bool:
    """True where this is the outermost behaviour of a module."""
    return type(module).__bases__[:1] == (behaviour,)


def put(module: nn.Module, behaviour: type[Behaviour]) -> None:
    module.__class__ = behaving(behaviour, type(module))


def take(module: nn.Module) -> None:
    module.__class__ = type(module).original
