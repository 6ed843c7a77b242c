"""The noise op: S dropout masks for each example, made where they are used from the address of each element, never stored.

``noise`` multiplies, ``noise_sum`` is its gradient (and each is the other's second derivative), ``noise_out`` writes into a
given tensor. Saved for backward: the address, nothing that grows with the tensor.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import backend, reference
from . import transforms
from .address import ADDRESS, Place, Rows, Unit, fake_rows, fake_sum, product

_RULE = "int threshold, Tensor? thresholds, float scale"


def _derivative(gradients, others, _):
    *address_and_rule, _, _, expand = others
    if expand:
        return torch.ops.iwsgd_graph.noise_sum(*gradients, *address_and_rule)
    return torch.ops.iwsgd_graph.noise(*gradients, *address_and_rule, 0.0, 0.0, False)


def _derivative_of_sum(gradients, address_and_rule, _):
    return torch.ops.iwsgd_graph.noise(*gradients, *address_and_rule, 0.0, 0.0, True)


def _vmap(info, dims, x, origin, sample_ids, samples, stream, first, positions, share, threshold, thresholds, scale, shift, fill, expand):
    def run(x, _, expand, origin, sample_ids, thresholds, *call):
        *address, threshold, scale, shift, fill = call
        return torch.ops.iwsgd_graph.noise(x, origin, sample_ids, *address, threshold, thresholds, scale, shift, fill, expand)

    call = (samples, stream, first, positions, share, threshold, scale, shift, fill)
    arguments = (x, Rows(1, False), expand, origin, sample_ids, thresholds, *call)
    dims = (dims[0], None, None, dims[1], dims[2], dims[9], *[None] * len(call))
    return transforms.merged(Noise, info.batch_size, dims, arguments, run)


_SCHEMA = f"(Tensor x, {ADDRESS}, {_RULE}, float shift, float fill, bool expand) -> Tensor"
backend.define("noise", _SCHEMA, fake_rows, _derivative, vmap=_vmap)
backend.define("noise_sum", f"(Tensor dy, {ADDRESS}, {_RULE}) -> Tensor", fake_sum, _derivative_of_sum)
backend.define("noise_out", f"(Tensor x, {ADDRESS}, {_RULE}, float shift, float fill, bool expand, Tensor(a!) out) -> ()", lambda *_: None)


class Rule(NamedTuple):
    """The rule of Bernoulli noise: an element becomes scale * x + shift where it is kept, ``fill`` where it is dropped.

    It is dropped where its 16-bit field is less than the threshold: the call's, or in ``thresholds`` (int32 [R, positions]) its
    position's own.
    """

    threshold: int
    thresholds: Tensor | None
    scale: float
    shift: float  # no default: the compiler takes a default for a value that may change
    fill: float


def dropout_rule(p: float) -> Rule:
    """Dropped elements are 0, kept ones are divided by the probability that the threshold really keeps."""
    threshold = _threshold_of(p)
    return Rule(threshold, None, reference.keep_scale(threshold), 0.0, 0.0)


def alpha_rule(p: float) -> Rule:
    """Alpha dropout (Klambauer et al. 2017, section 3): dropped elements take SELU's limit at minus infinity, then an affine map gives
    mean 0 and variance 1 back to what had them."""
    threshold = _threshold_of(p)
    if threshold in (0, reference.FIELD_RANGE):  # torch's own conventions: the identity, and zeros
        return dropout_rule(p)
    q, limit = 1 - threshold / reference.FIELD_RANGE, -1.7580993408473766
    scale = (q + limit**2 * q * (1 - q)) ** -0.5
    shift = -scale * limit * (1 - q)
    return Rule(threshold, None, scale, shift, scale * limit + shift)


def rates_rule(p: Tensor, x: Tensor, rows: Rows, unit: Unit, examples: int) -> Rule:
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
    values = values.expand(shape).permute(rows.batch_dim, *inside).reshape(shape[rows.batch_dim], product(shape[d] for d in drawn))
    # Contiguous, as the kernels read them: a product keeps the memory order of p.
    return Rule(0, (values * reference.FIELD_RANGE + 0.5).floor().to(torch.int32).contiguous(), 1.0, 0.0, 0.0)


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


def noise(x: Tensor, rule: Rule | Tensor, unit: Unit, place: Place, out: Tensor | None = None) -> Tensor:
    """Bernoulli noise at a given place, by a rule or by each element's dropout probability. Arguments are taken as valid (``functional``
    has the public forms)."""
    (origin, sample_ids, *call), expand, *_ = place
    samples, rows = call[0], place.rows(x, unit)
    if isinstance(rule, Tensor):
        rule = rates_rule(rule, x, rows, unit, x.shape[place.batch_dim] // (1 if expand else samples))
    if rule.threshold == 0 and rule.thresholds is None and out is None and (not expand or samples == 1):
        return x
    call += rows.positions(x.shape, unit)
    if out is None:
        threshold, thresholds, *affine = rule
        return backend.apply(Noise, x, rows, expand, origin, sample_ids, thresholds, *call, threshold, *affine)
    backend.op("noise_out", x.device)(rows.flatten(x), origin, sample_ids, *call, *rule, expand, rows.flatten(out))
    torch.autograd.graph.increment_version(out)
    return out
