"""Counts what torch's operators read and write, beneath autograd and vmap: an independent sum for the benchmark's byte formulas."""

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NO_WORK = {
    "empty",
    "empty_like",
    "new_empty",
    "detach",
    "alias",
    "new_full",
    "ones_like",
    "empty_strided",
    "new_empty_strided",
    "_unsafe_view",
}
WRITES_ONLY = {
    "bernoulli_",
    "zero_",
    "fill_",
    "zeros_like",
    "new_zeros",
    "zeros",
    "copy_",
    "randint",
    "randn_like",
}  # their first argument is not read
READS_ONCE = {"repeat", "expand"}


class CountBytes(TorchDispatchMode):
    """Sums the bytes of tensors of at least ``least`` bytes: each argument read, each result written; views move nothing."""

    def __init__(self, least: int):
        super().__init__()
        self.least, self.lines = least, []

    @property
    def bytes(self) -> int:
        return sum(read + written for _, read, written in self.lines)

    def report(self) -> str:
        return "\n".join(f"{name}: {read} read, {written} written" for name, read, written in self.lines)

    def _size(self, tensors) -> int:
        sizes = [t.untyped_storage().nbytes() if 0 in t.stride() else t.numel() * t.element_size() for t in tensors]
        return sum(size for size in sizes if size >= self.least)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name, schema = func._schema.name.split("::")[1], func._schema
        arguments = [a for a in tree_leaves((args, kwargs or {})) if isinstance(a, Tensor)]
        results = [r for r in tree_leaves(out) if isinstance(r, Tensor)]
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if name in NO_WORK or is_view or not (arguments or name in WRITES_ONLY):
            return out
        written = self._size(results)
        if name in WRITES_ONLY:
            arguments = arguments[1:] if name in ("bernoulli_", "copy_") else []
        elif "out" in (kwargs or {}):
            arguments = [a for a in arguments if a is not kwargs["out"]]
        elif name == "scatter_":
            return out  # touches single elements
        elif name in ("gather", "nll_loss_forward"):
            return out
        elif name == "scatter_add_":
            arguments, written = arguments[1:2], 0  # the index; elements that are added to lie in a cache, one by one
        elif name == "nll_loss_backward":
            arguments = []  # zeros are written, and one element of each row
        self.lines.append((name, self._size(arguments), written))
        return out
