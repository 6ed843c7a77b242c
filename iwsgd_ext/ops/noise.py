"""The noise op: S dropout masks for each example, made where they are used from the address of each element, never stored.

``noise`` multiplies, ``noise_sum`` is its gradient (and each is the other's second derivative), ``noise_out`` writes into a
given tensor. Saved for backward: the address, nothing that grows with the tensor.
"""

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import backend, reference
from . import transforms

# What shares one draw: nothing, a channel, a whole example, or what has the same last index (a feature at all positions).
Unit = Literal["element", "channel", "row", "feature"]

ADDRESS = "Tensor origin, Tensor? sample_ids, SymInt samples, SymInt stream, SymInt first_example, SymInt positions, SymInt share"
_LAW = "int threshold, Tensor? thresholds, float scale"
# Inside of an autograd Function torch 2.11 compiles x.transpose_() to a gradient of zeros, in silence; 2.13 does it right.
TRANSPOSITION_LOSES_GRADIENT = torch.__version__ < "2.13"
torch.library.define("iwsgd_ext::draw_origin", "(int call, *, Device device) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


def fake_rows(x, origin, sample_ids, samples, *arguments):
    """What noise makes of fake rows x [O, B, I]; the last of the arguments says whether it expands them."""
    return x.new_empty(x.shape[0], x.shape[1] * samples if arguments[-1] else x.shape[1], x.shape[2])


def fake_sum(dy, origin, sample_ids, samples, *_):
    return dy.new_empty(dy.shape[0], dy.shape[1] // samples, dy.shape[2])


def _derivative(gradients, others, _):
    *address_and_law, _, _, expand = others
    if expand:
        return torch.ops.iwsgd_graph.noise_sum(*gradients, *address_and_law)
    return torch.ops.iwsgd_graph.noise(*gradients, *address_and_law, 0.0, 0.0, False)


def _derivative_of_sum(gradients, address_and_law, _):
    return torch.ops.iwsgd_graph.noise(*gradients, *address_and_law, 0.0, 0.0, True)


def _vmap(info, dims, x, origin, sample_ids, samples, stream, first, positions, share, threshold, thresholds, scale, shift, fill, expand):
    def run(x, _, expand, origin, sample_ids, thresholds, *call):
        *address, threshold, scale, shift, fill = call
        return torch.ops.iwsgd_graph.noise(x, origin, sample_ids, *address, threshold, thresholds, scale, shift, fill, expand)

    call = (samples, stream, first, positions, share, threshold, scale, shift, fill)
    arguments = (x, Rows(1, False), expand, origin, sample_ids, thresholds, *call)
    dims = (dims[0], None, None, dims[1], dims[2], dims[9], *[None] * len(call))
    return transforms.merged(Noise, info.batch_size, dims, arguments, run)


_SCHEMA = f"(Tensor x, {ADDRESS}, {_LAW}, float shift, float fill, bool expand) -> Tensor"
backend.define("noise", _SCHEMA, fake_rows, _derivative, vmap=_vmap)
backend.define("noise_sum", f"(Tensor dy, {ADDRESS}, {_LAW}) -> Tensor", fake_sum, _derivative_of_sum)
backend.define("noise_out", f"(Tensor x, {ADDRESS}, {_LAW}, float shift, float fill, bool expand, Tensor(a!) out) -> ()", lambda *_: None)


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
    """Whether the compiler may compute in backward again what it does not know to be cheap: a draw would give another seed there."""
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
        return x.permute(order).reshape(_product(sizes[:at]), sizes[at], _product(sizes[at + 1 :]))

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
        return y.unflatten(self.batch_dim, (samples, -1)).sum(self.batch_dim)

    def positions(self, shape: torch.Size, unit: Unit) -> tuple[int, int]:
        """(positions, share): element i of an example's memory order has noise position (i // share) % positions."""
        inside = [d for d in self.order(len(shape)) if d != self.batch_dim]
        numel = _product(shape[d] for d in inside)
        if unit == "element":
            return numel, 1
        if unit == "row":
            return 1, max(numel, 1)
        if unit == "feature":  # of row-major memory whose last dimension does not hold the rows
            return shape[-1], 1
        channel = 1 if self.batch_dim == 0 else 0
        return shape[channel], max(_product(shape[d] for d in inside[inside.index(channel) + 1 :]), 1)


class Law(NamedTuple):
    """What Bernoulli noise makes of an element: scale * x + shift where it is kept, ``fill`` where it is dropped.

    It is dropped where its 16-bit field is less than the threshold: the call's, or in ``thresholds`` (int32 [R, positions]) its
    position's own.
    """

    threshold: int
    thresholds: Tensor | None
    scale: float
    shift: float  # no default: the compiler takes a default for a value that may change
    fill: float


def dropout_law(p: float) -> Law:
    """Dropped elements are 0, kept ones are divided by the probability that the threshold really keeps."""
    threshold = _threshold_of(p)
    return Law(threshold, None, reference.keep_scale(threshold), 0.0, 0.0)


def alpha_law(p: float) -> Law:
    """Alpha dropout (Klambauer et al. 2017, section 3): dropped elements take SELU's limit at minus infinity, then an affine map gives
    mean 0 and variance 1 back to what had them."""
    threshold = _threshold_of(p)
    if threshold in (0, reference.FIELD_RANGE):  # torch's own conventions: the identity, and zeros
        return dropout_law(p)
    q, limit = 1 - threshold / reference.FIELD_RANGE, -1.7580993408473766
    scale = (q + limit**2 * q * (1 - q)) ** -0.5
    shift = -scale * limit * (1 - q)
    return Law(threshold, None, scale, shift, scale * limit + shift)


def rates_law(p: Tensor, x: Tensor, rows: Rows, unit: Unit, examples: int) -> Law:
    """Dropout where each element has its own probability, with p as :func:`iwsgd_ext.functional.dropout` takes it."""
    if not p.is_floating_point():
        raise TypeError(f"p: expected a floating-point tensor, got {p.dtype}")
    if p.requires_grad:
        raise ValueError("p: expected a tensor that does not require grad: a mask has no derivative by its rate; p.detach() says so")
    inside = [d for d in rows.order(x.dim()) if d != rows.batch_dim]
    drawn = inside if unit == "element" else [] if unit == "row" else [1 if rows.batch_dim == 0 else 0]
    fits = [{1, x.shape[d], examples} if d == rows.batch_dim else {1, x.shape[d]} if d in drawn else {1} for d in range(x.dim())]
    values = p.to(device=x.device, dtype=torch.float64)
    values = values[(None,) * (x.dim() - p.dim())] if p.dim() <= x.dim() else values
    if p.dim() > x.dim() or any(values.shape[d] not in fits[d] for d in range(x.dim())):
        raise ValueError(f"p: expected a shape that broadcasts to what is drawn ({unit}) of {tuple(x.shape)}, got {tuple(p.shape)}")
    if torch.compiler.is_compiling():
        torch._assert_async(((values >= 0) & (values <= 1)).all(), "p: expected probabilities in [0, 1]")
    else:
        check_rates(transforms.plain(values))
    shape = [x.shape[d] if d in drawn else values.shape[d] for d in range(x.dim())]
    values = values.expand(shape).permute(rows.batch_dim, *inside).reshape(shape[rows.batch_dim], _product(shape[d] for d in drawn))
    # Contiguous, as the kernels read them: a product keeps the memory order of p.
    return Law(0, (values * reference.FIELD_RANGE + 0.5).floor().to(torch.int32).contiguous(), 1.0, 0.0, 0.0)


def check_rates(values: Tensor) -> None:
    """Raises where a probability is none. On a GPU without a wait."""
    valid = ((values >= 0) & (values <= 1)).all()
    if values.device.type != "cpu":
        torch._assert_async(valid, "p: expected probabilities in [0, 1]")
    elif not valid:
        raise ValueError(f"p: expected probabilities in [0, 1], got values from {values.min().item()} to {values.max().item()}")


def _threshold_of(p: float) -> int:
    """The 16-bit threshold of a dropout probability: floor(p * 65536 + 0.5), so that the effective p is off by 2^-17 at most."""
    return int(float(p) * reference.FIELD_RANGE + 0.5)


def _is_dense(x: Tensor, order: Sequence[int]) -> bool:
    """Whether memory holds x without gaps, its dimensions from outermost to innermost in the given order."""
    stride = 1
    for d in reversed(order):
        if x.shape[d] != 1:
            if x.stride(d) != stride:
                return False
            stride = stride * x.shape[d]
    return True


def _product(sizes) -> int:
    n = 1
    for size in sizes:
        n = n * size
    return n


class Noise(torch.autograd.Function):
    """y = keep ? scale * x + shift : fill, [K*B, ...] from x [B, ...] where ``expand``, else row by row.

    call: samples, stream, first_example, positions, share; threshold, scale, shift, fill. (Flat, as the compiler wants it.)
    """

    ORIGIN = 3

    @staticmethod
    def forward(ctx, *arguments) -> Tensor:
        Noise.save(ctx, *arguments)
        return Noise.compute(*arguments)

    @staticmethod
    def compute(x: Tensor, rows: Rows, expand: bool, origin: Tensor, sample_ids: Tensor | None, thresholds: Tensor | None, *call) -> Tensor:
        *address, threshold, scale, shift, fill = call
        op = backend.op("noise", x.device)
        y = op(rows.flatten(x), origin, sample_ids, *address, threshold, thresholds, scale, shift, fill, expand)
        return rows.unflatten(y, x.shape)

    @staticmethod
    def save(ctx, x, rows, expand, origin, sample_ids, thresholds, *call) -> None:
        ctx.save_for_backward(origin, sample_ids, thresholds)
        ctx.rows, ctx.expand, ctx.call = rows, expand, call

    @staticmethod
    def backward(ctx, dy: Tensor):
        linear = (*ctx.call[:-2], 0.0, 0.0)  # the derivative of an affine map
        # noise_sum undoes an expansion; without one, noise is its own transpose
        if ctx.expand and not transforms.active():
            dx = NoiseSum.apply(dy, ctx.rows, *ctx.saved_tensors, *linear)
        else:
            dx = backend.apply(Noise, dy, ctx.rows, False, *ctx.saved_tensors, *linear)
            dx = ctx.rows.summed(dx, ctx.call[0]) if ctx.expand else dx
        return dx, *[None] * (5 + len(linear))

    @staticmethod
    def tangent(dx: Tensor, rows, expand, origin, sample_ids, thresholds, *call) -> Tensor:
        return backend.apply(Noise, dx, rows, expand, origin, sample_ids, thresholds, *call[:-2], 0.0, 0.0)

    @staticmethod
    def merge(lanes, dims, x, rows, expand, origin, sample_ids, thresholds, samples, *call):
        k = rows.batch_dim
        if dims[5] is not None and dims[0] is None:  # rates of each lane: so has x
            x, dims = x.expand(lanes, *x.shape), (0, *dims[1:])
        examples = 1
        if thresholds is not None:
            x_rows = [n for d, n in enumerate(x.shape) if d != dims[0]][k]
            examples = x_rows // (1 if expand else samples)
        x, ids, total, wide = transforms.merge_rows(lanes, k, x, dims[0], sample_ids, dims[4], samples, expand)
        if thresholds is not None and not wide:
            thresholds = _merged_thresholds(thresholds, dims[5], lanes, samples, examples)
        return (x, rows, wide, origin, ids, thresholds, total, *call), k


def _merged_thresholds(thresholds: Tensor, dim: int | None, lanes: int, samples: int, examples: int) -> Tensor:
    """int32 [lanes * K * B, positions] of each lane's [1, B or K * B, positions]; one row, or one for each example, serves all."""
    rows = thresholds.shape[0] if dim is None else thresholds.movedim(dim, 0).shape[1]
    if dim is None and rows in (1, examples):
        return thresholds
    each = thresholds.expand(lanes, *thresholds.shape) if dim is None else thresholds.movedim(dim, 0)
    if rows != samples * examples:
        each = each.expand(lanes, examples, -1).repeat(1, samples, 1)
    return each.flatten(0, 1).contiguous()


class NoiseSum(torch.autograd.Function):
    """dx = sum over samples of keep * scale * dy, [B, ...] from dy [K*B, ...]: the transpose of an expanding :class:`Noise`."""

    @staticmethod
    def forward(ctx, dy: Tensor, rows: Rows, origin: Tensor, sample_ids: Tensor | None, thresholds: Tensor | None, *call):
        ctx.save_for_backward(origin, sample_ids, thresholds)
        ctx.rows, ctx.call = rows, call
        *address, threshold, scale, _, _ = call
        dx = backend.op("noise_sum", dy.device)(rows.flatten(dy), origin, sample_ids, *address, threshold, thresholds, scale)
        return rows.unflatten(dx, dy.shape)

    @staticmethod
    def backward(ctx, dx: Tensor):
        return Noise.apply(dx, ctx.rows, True, *ctx.saved_tensors, *ctx.call), *[None] * (4 + len(ctx.call))


def noise(
    x: Tensor,
    law: Law | Tensor,
    unit: Unit,
    *,
    samples: int,
    origin: Tensor,
    sample_ids: Tensor | None,
    stream: int,
    first_example: int,
    expand: bool,
    batch_dim: int,
    logical: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Bernoulli noise at a given address, its law or each element's dropout probability given; other arguments are taken as valid (see
    ``functional`` for the public forms). ``logical``: positions are row-major indices, whatever the order in memory."""
    rows = Rows(batch_dim, False) if logical and unit == "element" else Rows.of(x, batch_dim)
    if isinstance(law, Tensor):
        law = rates_law(law, x, rows, unit, x.shape[batch_dim] // (1 if expand else samples))
    if law.threshold == 0 and law.thresholds is None and out is None and (not expand or samples == 1):
        return x
    address = (samples, stream, first_example, *rows.positions(x.shape, unit))
    if out is None:
        threshold, thresholds, *affine = law
        return backend.apply(Noise, x, rows, expand, origin, sample_ids, thresholds, *address, threshold, *affine)
    backend.op("noise_out", x.device)(rows.flatten(x), origin, sample_ids, *address, *law, expand, rows.flatten(out))
    torch.autograd.graph.increment_version(out)
    return out
