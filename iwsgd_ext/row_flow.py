"""What becomes of rows in a dry run: which tensors depend on noise, and whether rows of one example or sample meet those of others."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .functional_dropout import Watch

_aten = torch.ops.aten
# What looks rows up by numbers: where the dimension stands in the arguments, and where the numbers.
_LOOKUPS = {
    _aten.gather.default: (1, 2),
    _aten.index_select.default: (1, 2),
    _aten.index_add.default: (1, 2),
    _aten.index_add_.default: (1, 2),
    _aten.scatter_add.default: (1, 2),
    _aten.scatter_add_.default: (1, 2),
    _aten.scatter_reduce.two: (1, 2),
    _aten.scatter_reduce_.two: (1, 2),
}


class RowFlow(TorchDispatchMode):
    """Looks at every operation of a dry run, below Python's functions. S is a prime that divides no other size: a dimension that it divides
    holds samples.

    Attributes:
        misfit: an index made for S*B rows, into B of them (fake tensors have no values that could be out of range).
        mixing: rows that depend on noise meet those of other examples, and so of other samples, which no expansion keeps apart.
    """

    def __init__(self, watch: Watch, batch: int | None, samples: int, inputs: Any):
        super().__init__()
        self.watch, self.batch, self.samples = watch, batch, samples
        self.misfit: str | None = None
        self.mixing: str | None = None
        self.noisy = WeakIdKeyDictionary()  # tensors that depend on noise
        self.given = WeakIdKeyDictionary()  # integers that the model was given, or has made of such
        for x in tree_leaves(inputs):
            if isinstance(x, Tensor) and not x.is_floating_point():
                self.given[x] = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and not self.watch.seen and _argument(func, args, kwargs, "dropout_p") != 0:
            self.watch.add(str(func), None, "random")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        noisy = [x for x in tensors if x in self.noisy]
        found = self._lookup(func, args) or (self._meeting(func, tensors, noisy) if noisy else None)
        output = func(*args, **kwargs)
        made = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        if noisy:
            found = found or next((f"makes {tuple(x.shape)}" for x in made if len(self._of_samples(x)) > 1), None)
            self.noisy.update((x, True) for x in made)
        if any(x in self.given for x in tensors):
            self.given.update((x, True) for x in made if not x.is_floating_point())
        place = self.watch.place() if found and self.mixing is None else None
        if place is not None:  # not in a layer of this package, which knows its samples
            module, line = place
            self.mixing = f"{func.overloadpacket.__name__} {found} in {module or 'the model'}, {line}"
        return output

    def _of_samples(self, x: Tensor) -> list[int]:
        """The dimensions that hold samples."""
        return [d for d, n in enumerate(x.shape) if n and n % self.samples == 0]

    def _meeting(self, func, tensors: list[Tensor], noisy: list[Tensor]) -> str | None:
        """Noisy rows beside something that was made of them all, as in h - h.mean(0)."""
        if "batch_norm" in func.overloadpacket.__name__:
            return None  # convert has a word of its own on these
        pooled = next((x for x in noisy if not self._of_samples(x)), None)
        if pooled is None or not any(self._of_samples(x) for x in tensors):
            return None
        return f"joins noisy rows with {tuple(pooled.shape)} that was made of all of them"

    def _lookup(self, func, args: tuple) -> str | None:
        """Rows that are looked up by numbers which the model was given: they count the rows of one sample."""
        if func in (_aten.index.Tensor, _aten._unsafe_index.Tensor):
            x, pairs = args[0], [(d, i) for d, i in enumerate(args[1]) if i is not None]
            if any(x.shape[d] == self.batch and (self.batch or 0) * self.samples in i.shape for d, i in pairs):
                self.misfit = f"{self.batch} rows are indexed by {self.batch * self.samples}"
        elif func in _LOOKUPS:
            x, (dim, index) = args[0], _LOOKUPS[func]
            pairs = [(args[dim] % max(x.dim(), 1), args[index])]
        else:
            return None
        if x in self.noisy and any(d in self._of_samples(x) and i in self.given for d, i in pairs):
            return f"looks rows of {tuple(x.shape)} up by numbers that are given"
        return None


def _argument(func, args: tuple, kwargs: dict, name: str) -> Any:
    """An argument of an operator by its name, its default where it is not given; None where there is none of that name."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return args[position] if position < len(args) else kwargs.get(name, argument.default_value)
    return None
