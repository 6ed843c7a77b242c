"""Classes made on the fly: a behaviour before a module's own class, so that the module stays the object that it is."""

import functools

from torch import nn


class Behaviour:
    """What is put before a class. Subclasses define ``forward``, or a ``forward_of(original)`` that makes one."""

    original: type[nn.Module]
    prefix = ""  # of the made class' name

    def __reduce_ex__(self, protocol):
        # Pickle finds no class that is made on the fly: it gets what the class is made of.
        made, behaviours = type(self), []
        while "original" in vars(made):
            behaviours.append(made.__bases__[0])
            made = made.original
        return _new, (made, *reversed(behaviours)), *super().__reduce_ex__(protocol)[2:]

    @classmethod
    def forward_of(cls, original: type[nn.Module]) -> dict:
        """What the made class defines, beside what it inherits."""
        return {}


@functools.cache
def behaving(behaviour: type[Behaviour], original: type[nn.Module]) -> type[nn.Module]:
    """The class of modules of class ``original`` with a behaviour before it; under the original's name, as users' code reads it."""
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__, "original": original}
    return type(f"{behaviour.prefix}{original.__name__}", (behaviour, original), names | behaviour.forward_of(original))


def _new(original: type[nn.Module], *behaviours: type[Behaviour]) -> nn.Module:
    for behaviour in behaviours:
        original = behaving(behaviour, original)
    return original.__new__(original)


def has(module: nn.Module, behaviour: type[Behaviour]) -> bool:
    """Whether the outermost behaviour of a module is this one."""
    return type(module).__bases__[:1] == (behaviour,)


def put(module: nn.Module, behaviour: type[Behaviour]) -> None:
    module.__class__ = behaving(behaviour, type(module))


def take(module: nn.Module) -> None:
    module.__class__ = type(module).original
