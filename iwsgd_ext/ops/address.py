"""The address of noise: what a call's noise is a function of, how its tensor's elements are numbered, and the random origin of a seed."""

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import backend

# The elements that share one draw: none, those of a channel, of a whole row, or of the same last index (a feature at all positions).
Unit = Literal["element", "channel", "row", "feature"]

ADDRESS = "Tensor origin, Tensor? sample_ids, SymInt samples, SymInt stream, SymInt first_example, SymInt positions, SymInt share"
# Inside of an autograd Function torch 2.11 compiles x.transpose_() to a gradient of zeros, in silence; 2.13 does it right.
TRANSPOSITION_LOSES_GRADIENT = torch.__version__ < "2.13"
torch.library.define("iwsgd_ext::draw_origin", "(int call, *, Device device) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


def fake_rows(x, origin, sample_ids, samples, *arguments):
    """The result of noise on fake rows x [O, B, I]; the last argument is ``expand``."""
    return x.new_empty(x.shape[0], x.shape[1] * samples if arguments[-1] else x.shape[1], x.shape[2])


def fake_sum(dy, origin, sample_ids, samples, *_):
    return dy.new_empty(dy.shape[0], dy.shape[1] // samples, dy.shape[2])


@torch.library.register_fake("iwsgd_ext::draw_origin")
def _(call, *, device):
    return torch.empty(3, dtype=torch.int64, device=device)


def _draw_origin(call: int, *, device: torch.device) -> Tensor:
    origin = torch.zeros(3, dtype=torch.int64, device=device)
    origin[:1].random_(-(2**63), None)
    return origin


torch.library.impl("iwsgd_ext::draw_origin", "CompositeExplicitAutograd", _draw_origin)


def draw_origin(device: torch.device) -> Tensor:
    """A new origin int64 [3] = (seed, 0, 0), its seed from torch's default generator of the device.

    Under torch.compile the draw is one opaque op: a compiler's own random numbers differ from eager ones for the same
    torch.manual_seed, and masks must not. Its number keeps the compiler from taking two draws for one: it merges equal calls of any op
    that it does not know to be random.
    """
    if not torch.compiler.is_compiling():
        return _draw_origin(0, device=device)
    if _draws_are_recomputed():
        return _draw_outside(device)
    return torch.ops.iwsgd_ext.draw_origin(_number_of_call(), device=device)


@backend.constant_in_graphs
def _draws_are_recomputed() -> bool:
    """True where the compiler may compute any op again in backward: a draw would give another seed there."""
    config = torch._functorch.config
    return config.activation_memory_budget < 1 or config.aggressive_recomputation or not config.ban_recompute_not_in_allowlist


def _draw_outside(device: torch.device) -> Tensor:
    return _draw_origin(0, device=device)


# As torch.compiler.disable marks a function; see constant_in_graphs.
_draw_outside._torchdynamo_disable = True
_draw_outside._torchdynamo_disable_msg = (
    "iwsgd_ext: the seed of this noise is drawn outside of the graph, as the compiler's settings (activation_memory_budget below 1, "
    "aggressive_recomputation, or ban_recompute_not_in_allowlist=False) would draw another one in backward. To keep one graph, give the "
    "seed: iw.sampling(S, seed=...)."
)

_calls = itertools.count()


@backend.constant_in_graphs
def _number_of_call() -> int:
    return next(_calls)  # once for each call in a graph, when it is traced


def make_origin(seed: int | Tensor, stream: int | Tensor, first_example: int | Tensor, device: torch.device) -> Tensor:
    """The origin int64 [3] of a given address, whose parts are ints or int64 tensors of one element."""
    if isinstance(seed, int) and isinstance(stream, int) and isinstance(first_example, int):
        signed = [(v + 2**63) % 2**64 - 2**63 for v in (seed, stream, first_example)]
        if device.type == "cpu":
            return torch.tensor(signed, dtype=torch.int64, device="cpu")
        # Filled by the device: a copy from the host would wait for it, and cannot be captured in a CUDA graph.
        origin = torch.zeros(3, dtype=torch.int64, device=device)
        for i, value in enumerate(signed):
            if value:
                origin[i].fill_(value)
        return origin
    parts = (make_origin(v, 0, 0, device)[0] if isinstance(v, int) else v.to(device).reshape(()) for v in (seed, stream, first_example))
    return torch.stack(list(parts))


class Address(NamedTuple):
    """The address of one call: its noise is a function of this and of each element's example and position. (csrc/address.h)"""

    origin: Tensor  # int64 [3]: seed, stream, first example
    sample_ids: Tensor | None  # int64 [K] or [K, B]; None is 0 .. K-1
    samples: int  # K
    stream: int  # added to the origin's, and so is the next
    first_example: int


class Place(NamedTuple):
    """One call of noise, whatever its rule: the address, and where the rows of its input are."""

    address: Address
    expand: bool  # x has B rows, to become K*B; else it has K*B
    batch_dim: int
    logical: bool = False  # positions are row-major indices, whatever the order in memory

    def rows(self, x: Tensor, unit: Unit = "element") -> "Rows":
        return Rows(self.batch_dim, False) if self.logical and unit == "element" else Rows.of(x, self.batch_dim)


class Rows(NamedTuple):
    """How a tensor's memory maps to [O, B, I], and back: the dimension of its rows, and whether it is channels_last."""

    batch_dim: int
    channels_last: bool

    @classmethod
    def of(cls, x: Tensor, batch_dim: int) -> "Rows":
        # By strides where torch does not say at once: torch 2.11 takes no tensor of dynamic sizes for channels_last.
        if x.dim() not in (4, 5) or x.is_contiguous() or _is_dense(x, range(x.dim())):
            return cls(batch_dim, False)
        return cls(batch_dim, _is_dense(x, (0, *range(2, x.dim()), 1)))

    def order(self, dim: int) -> list[int]:
        """The dimensions of a tensor from outermost to innermost in memory."""
        return [0, *range(2, dim), 1] if self.channels_last else list(range(dim))

    def flatten(self, x: Tensor) -> Tensor:
        """x as [O, B, I] (a copy where x's memory is not in that order)."""
        if self.batch_dim == 0 and not self.channels_last:
            return x.reshape(1, x.shape[0], -1) if x.numel() else x.reshape(1, x.shape[0], x.shape[1:].numel())
        order = self.order(x.dim())
        sizes, at = [x.shape[d] for d in order], order.index(self.batch_dim)
        return x.permute(order).reshape(product(sizes[:at]), sizes[at], product(sizes[at + 1 :]))

    def unflatten(self, y: Tensor, shape: torch.Size) -> Tensor:
        """[O, R, I], fresh and contiguous, as a tensor of ``shape``, whose rows' dimension becomes R.

        Not a view of it: what an autograd Function returns may then be written in place (a ReLU behind a dropout).
        """
        sizes = [y.shape[1] if d == self.batch_dim else shape[d] for d in self.order(len(shape))]
        y = torch.ops.aten._unsafe_view.default(y, sizes)
        if self.channels_last and TRANSPOSITION_LOSES_GRADIENT and torch.compiler.is_compiling():
            return y.movedim(-1, 1).clone()  # keeps the order in memory, at the price of a copy
        if self.channels_last:
            for d in range(len(shape) - 1, 1, -1):
                y.transpose_(d, d - 1)  # the channels from the last place to the second
        return y

    def summed(self, y: Tensor, samples: int) -> Tensor:
        """The sum over the samples of K*B rows."""
        k = self.batch_dim  # reshape: torch has no batching rule for unflatten beneath autograd (is_grads_batched)
        return y.reshape(*y.shape[:k], samples, y.shape[k] // samples, *y.shape[k + 1 :]).sum(k)

    def positions(self, shape: torch.Size, unit: Unit) -> tuple[int, int]:
        """(positions, share): element i of an example's memory order has noise position (i // share) % positions."""
        inside = [d for d in self.order(len(shape)) if d != self.batch_dim]
        numel = product(shape[d] for d in inside)
        if unit == "element":
            return numel, 1
        if unit == "row":
            return 1, max(numel, 1)
        if unit == "feature":  # of row-major memory whose last dimension does not hold the rows
            return shape[-1], 1
        channel = 1 if self.batch_dim == 0 else 0
        return shape[channel], max(product(shape[d] for d in inside[inside.index(channel) + 1 :]), 1)


def _is_dense(x: Tensor, order: Sequence[int]) -> bool:
    """True where memory holds x without gaps, its dimensions from outermost to innermost in the given order."""
    stride = 1
    for d in reversed(order):
        if x.shape[d] != 1:
            if x.stride(d) != stride:
                return False
            stride = stride * x.shape[d]
    return True


def product(sizes) -> int:
    n = 1
    for size in sizes:
        n = n * size
    return n
