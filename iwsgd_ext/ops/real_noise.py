"""Real-valued noise, multiplicative or additive: S numbers of a law for each element, made where they are used, never stored.

``real_noise`` applies them and ``real_noise_sum`` is the gradient of a multiplication (and each is the other's second derivative); an
addition's gradient needs no noise. Saved for backward: the address, nothing that grows with the tensor.
"""

from typing import Literal

import torch
from torch import Tensor

from .. import backend
from . import transforms
from .address import ADDRESS, Place, Rows, Unit, fake_rows, fake_sum

# The law of z, of mean 0 and standard deviation 1; an op takes its number in this order (csrc/real_noise.h).
Law = Literal["normal", "laplace", "uniform"]
LAWS: tuple[Law, ...] = ("normal", "laplace", "uniform")


def _derivative(gradients, others, _):
    *address, law, std, multiply, expand = others
    if not multiply:
        dy, samples = *gradients, address[2]
        return dy.reshape(dy.shape[0], samples, dy.shape[1] // samples, dy.shape[2]).sum(1) if expand else dy
    if expand:
        return torch.ops.iwsgd_graph.real_noise_sum(*gradients, *address, law, std)
    return torch.ops.iwsgd_graph.real_noise(*gradients, *address, law, std, True, False)


def _derivative_of_sum(gradients, address_and_law, _):
    return torch.ops.iwsgd_graph.real_noise(*gradients, *address_and_law, True, True)


def _vmap(info, dims, x, origin, sample_ids, samples, stream, first, positions, share, law, std, multiply, expand):
    def run(x, _, expand, law, std, multiply, *address):
        return torch.ops.iwsgd_graph.real_noise(x, *address, law, std, multiply, expand)

    address = (origin, sample_ids, samples, stream, first, positions, share)
    dims = (dims[0], *[None] * 5, dims[1], dims[2], *[None] * 5)
    return transforms.merged(RealNoise, info.batch_size, dims, (x, Rows(1, False), expand, law, std, multiply, *address), run)


_LAW = "int law, float std"
backend.define("real_noise", f"(Tensor x, {ADDRESS}, {_LAW}, bool multiply, bool expand) -> Tensor", fake_rows, _derivative, vmap=_vmap)
backend.define("real_noise_sum", f"(Tensor dy, {ADDRESS}, {_LAW}) -> Tensor", fake_sum, _derivative_of_sum)


class RealNoise(torch.autograd.Function):
    """y = x * (1 + std * z) where ``multiply``, else x + std * z: [K*B, ...] from x [B, ...] where ``expand``, else row by row."""

    ORIGIN = 6

    @staticmethod
    def forward(ctx, *arguments) -> Tensor:
        RealNoise.save(ctx, *arguments)
        return RealNoise.compute(*arguments)

    @staticmethod
    def compute(x: Tensor, rows: Rows, expand: bool, law: int, std: float, multiply: bool, *address) -> Tensor:
        y = backend.op("real_noise", x.device)(rows.flatten(x), *address, law, std, multiply, expand)
        return rows.unflatten(y, x.shape)

    @staticmethod
    def save(ctx, x, rows, expand, law, std, multiply, origin, sample_ids, *address) -> None:
        if multiply:
            ctx.save_for_backward(origin, sample_ids)
        ctx.rows, ctx.expand, ctx.law, ctx.multiply, ctx.address = rows, expand, (law, std), multiply, address

    @staticmethod
    def backward(ctx, dy: Tensor):
        if not ctx.multiply:  # torch adds up 16-bit types in float32
            dx = ctx.rows.summed(dy, ctx.address[0]) if ctx.expand else dy
        elif ctx.expand and not transforms.active():
            dx = RealNoiseSum.apply(dy, ctx.rows, *ctx.law, *ctx.saved_tensors, *ctx.address)
        else:  # without an expansion a multiplication is its own transpose
            dx = backend.apply(RealNoise, dy, ctx.rows, False, *ctx.law, True, *ctx.saved_tensors, *ctx.address)
            dx = ctx.rows.summed(dx, ctx.address[0]) if ctx.expand else dx
        return dx, *[None] * (7 + len(ctx.address))

    @staticmethod
    def tangent(dx: Tensor, rows, expand, law, std, multiply, origin, sample_ids, samples, *address) -> Tensor:
        if multiply:
            return backend.apply(RealNoise, dx, rows, expand, law, std, True, origin, sample_ids, samples, *address)
        k = rows.batch_dim
        return dx.unsqueeze(k).expand(*dx.shape[:k], samples, *dx.shape[k:]).flatten(k, k + 1) if expand else dx.clone()

    @staticmethod
    def merge(lanes, dims, x, rows, expand, law, std, multiply, origin, sample_ids, samples, *address):
        x, ids, total, expand = transforms.merge_rows(lanes, rows.batch_dim, x, dims[0], sample_ids, dims[7], samples, expand)
        return (x, rows, expand, law, std, multiply, origin, ids, total, *address), rows.batch_dim


class RealNoiseSum(torch.autograd.Function):
    """dx = sum over samples of (1 + std * z) * dy, [B, ...] from dy [K*B, ...]: the transpose of an expanding, multiplying
    :class:`RealNoise`."""

    @staticmethod
    def forward(ctx, dy: Tensor, rows: Rows, law: int, std: float, origin: Tensor, sample_ids: Tensor | None, *address: int) -> Tensor:
        ctx.save_for_backward(origin, sample_ids)
        ctx.rows, ctx.law, ctx.address = rows, (law, std), address
        dx = backend.op("real_noise_sum", dy.device)(rows.flatten(dy), origin, sample_ids, *address, law, std)
        return rows.unflatten(dx, dy.shape)

    @staticmethod
    def backward(ctx, dx: Tensor):
        dy = RealNoise.apply(dx, ctx.rows, True, *ctx.law, True, *ctx.saved_tensors, *ctx.address)
        return dy, *[None] * (5 + len(ctx.address))


def real_noise(x: Tensor, law: Law, std: float, multiply: bool, place: Place, unit: Unit = "element") -> Tensor:
    """Noise of a law at a given place. Arguments are taken as valid (``functional`` has the public forms)."""
    address, expand, *_ = place
    if std == 0 and (not expand or address.samples == 1):
        return x
    rows = place.rows(x, unit)
    positions = rows.positions(x.shape, unit)
    return backend.apply(RealNoise, x, rows, expand, LAWS.index(law), float(std), multiply, *address, *positions)


def dropout_std(p: float) -> float:
    """The standard deviation of dropout's noise, whose mean is 1: sqrt(p / (1 - p))."""
    return (p / (1 - p)) ** 0.5
