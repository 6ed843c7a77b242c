"""Gaussian noise, multiplicative or additive: S standard normal numbers for each element, made where they are used, never stored.

``gaussian`` applies them and ``gaussian_sum`` is the gradient of a multiplication (and each is the other's second derivative); an
addition's gradient needs no noise. Saved for backward: the address, nothing that grows with the tensor.
"""

import torch
from torch import Tensor

from .. import backend
from . import transforms
from .noise import ADDRESS, Rows, Unit, fake_rows, fake_sum


def _derivative(gradients, others, _):
    *address, std, multiply, expand = others
    if not multiply:
        dy, samples = *gradients, address[2]
        return dy.unflatten(1, (samples, -1)).sum(1) if expand else dy
    if expand:
        return torch.ops.iwsgd_graph.gaussian_sum(*gradients, *address, std)
    return torch.ops.iwsgd_graph.gaussian(*gradients, *address, std, True, False)


def _derivative_of_sum(gradients, address_and_std, _):
    return torch.ops.iwsgd_graph.gaussian(*gradients, *address_and_std, True, True)


def _vmap(info, dims, x, origin, sample_ids, samples, stream, first, positions, share, std, multiply, expand):
    def run(x, _, expand, std, *address):
        return torch.ops.iwsgd_graph.gaussian(x, *address, std, multiply, expand)

    arguments = (x, Rows(1, False), expand, std, origin, sample_ids, samples, stream, first, positions, share)
    return transforms.merged(Multiply, info.batch_size, (dims[0], None, None, None, dims[1], dims[2], *[None] * 5), arguments, run)


backend.define("gaussian", f"(Tensor x, {ADDRESS}, float std, bool multiply, bool expand) -> Tensor", fake_rows, _derivative, vmap=_vmap)
backend.define("gaussian_sum", f"(Tensor dy, {ADDRESS}, float std) -> Tensor", fake_sum, _derivative_of_sum)


def _merge(lanes, dims, x, rows, expand, std, origin, sample_ids, samples, *address):
    x, ids, total, expand = transforms.merge_rows(lanes, rows.batch_dim, x, dims[0], sample_ids, dims[5], samples, expand)
    return (x, rows, expand, std, origin, ids, total, *address), rows.batch_dim


class Multiply(torch.autograd.Function):
    """y = x * (1 + std * z), [K*B, ...] from x [B, ...] where ``expand``, else row by row."""

    ORIGIN, merge = 4, staticmethod(_merge)

    @staticmethod
    def forward(ctx, *arguments) -> Tensor:
        Multiply.save(ctx, *arguments)
        return Multiply.compute(*arguments)

    @staticmethod
    def compute(x: Tensor, rows: Rows, expand: bool, std: float, origin: Tensor, sample_ids: Tensor | None, *address: int) -> Tensor:
        y = backend.op("gaussian", x.device)(rows.flatten(x), origin, sample_ids, *address, std, True, expand)
        return rows.unflatten(y, x.shape)

    @staticmethod
    def save(ctx, x, rows, expand, std, origin, sample_ids, *address) -> None:
        ctx.save_for_backward(origin, sample_ids)
        ctx.rows, ctx.expand, ctx.std, ctx.address = rows, expand, std, address

    @staticmethod
    def backward(ctx, dy: Tensor):
        address = (ctx.std, *ctx.saved_tensors, *ctx.address)
        # MultiplySum undoes an expansion; without one, Multiply is its own transpose
        if ctx.expand and not transforms.active():
            dx = MultiplySum.apply(dy, ctx.rows, *address)
        else:
            dx = backend.apply(Multiply, dy, ctx.rows, False, *address)
            dx = ctx.rows.summed(dx, ctx.address[0]) if ctx.expand else dx
        return dx, *[None] * (5 + len(ctx.address))

    @staticmethod
    def tangent(dx: Tensor, *arguments) -> Tensor:
        return backend.apply(Multiply, dx, *arguments)


class MultiplySum(torch.autograd.Function):
    """dx = sum over samples of (1 + std * z) * dy, [B, ...] from dy [K*B, ...]: the transpose of an expanding :class:`Multiply`."""

    @staticmethod
    def forward(ctx, dy: Tensor, rows: Rows, std: float, origin: Tensor, sample_ids: Tensor | None, *address: int) -> Tensor:
        ctx.save_for_backward(origin, sample_ids)
        ctx.rows, ctx.std, ctx.address = rows, std, address
        dx = backend.op("gaussian_sum", dy.device)(rows.flatten(dy), origin, sample_ids, *address, std)
        return rows.unflatten(dx, dy.shape)

    @staticmethod
    def backward(ctx, dx: Tensor):
        origin, sample_ids = ctx.saved_tensors
        dy = Multiply.apply(dx, ctx.rows, True, ctx.std, origin, sample_ids, *ctx.address)
        return dy, *[None] * (4 + len(ctx.address))


class Add(torch.autograd.Function):
    """y = x + std * z, [K*B, ...] from x [B, ...] where ``expand``, else row by row. dx = sum over samples of dy: plain torch."""

    ORIGIN, merge = 4, staticmethod(_merge)

    @staticmethod
    def forward(ctx, *arguments) -> Tensor:
        Add.save(ctx, *arguments)
        return Add.compute(*arguments)

    @staticmethod
    def compute(x: Tensor, rows: Rows, expand: bool, std: float, origin: Tensor, sample_ids: Tensor | None, *address: int) -> Tensor:
        y = backend.op("gaussian", x.device)(rows.flatten(x), origin, sample_ids, *address, std, False, expand)
        return rows.unflatten(y, x.shape)

    @staticmethod
    def save(ctx, x, rows, expand, std, origin, sample_ids, samples, *_) -> None:
        ctx.rows, ctx.samples = rows, samples if expand else None

    @staticmethod
    def backward(ctx, dy: Tensor):
        # torch adds up 16-bit types in float32
        return dy if ctx.samples is None else ctx.rows.summed(dy, ctx.samples), *[None] * 10

    @staticmethod
    def tangent(dx: Tensor, rows, expand, std, origin, sample_ids, samples, *_) -> Tensor:
        k = rows.batch_dim
        return dx.unsqueeze(k).expand(*dx.shape[:k], samples, *dx.shape[k:]).flatten(k, k + 1) if expand else dx.clone()


def gaussian(
    x: Tensor,
    std: float,
    multiply: bool,
    *,
    samples: int,
    origin: Tensor,
    sample_ids: Tensor | None,
    stream: int,
    first_example: int,
    expand: bool,
    batch_dim: int,
    logical: bool = False,
    unit: Unit = "element",
) -> Tensor:
    """Gaussian noise at a given address; arguments are taken as valid (see ``functional`` for the public forms, and ``noise``)."""
    if std == 0 and (not expand or samples == 1):
        return x
    rows = Rows(batch_dim, False) if logical and unit == "element" else Rows.of(x, batch_dim)
    address = (samples, stream, first_example, *rows.positions(x.shape, unit))
    return backend.apply(Multiply if multiply else Add, x, rows, expand, float(std), origin, sample_ids, *address)


def gaussian_std(p: float) -> float:
    """The standard deviation of dropout's noise, whose mean is 1: sqrt(p / (1 - p))."""
    return (p / (1 - p)) ** 0.5
