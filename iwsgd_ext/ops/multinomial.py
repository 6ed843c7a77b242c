"""Multinomial dropout: the factor of a feature is how often it came up in a number of draws, over how often it does on average.

The op gives counts, from the address alone; their use is plain torch, and backward draws them again.
"""

import torch
from torch import Tensor

from .. import backend
from . import transforms
from .address import Place

WORD = 2**32


def _fake(origin, sample_ids, samples, stream, first_example, examples, bounds, draws):
    return bounds.new_empty(samples, examples, bounds.shape[-1], dtype=torch.int32)


def _vmap(info, dims, origin, sample_ids, samples, stream, first_example, examples, bounds, draws):
    lanes, op = info.batch_size, torch.ops.iwsgd_graph.multinomial
    if dims[0] is not None:
        each = [
            [v if d is None else v.select(d, i) for v, d in ((origin, dims[0]), (sample_ids, dims[1]), (bounds, dims[6]))]
            for i in range(lanes)
        ]
        return torch.stack([op(o, s, samples, stream, first_example, examples, b, draws) for o, s, b in each]), 0
    ids = transforms.merge_ids(lanes, sample_ids, dims[1], samples, origin.device)
    bounds = _merged_bounds(bounds, dims[6], lanes, samples)
    return op(origin, ids, lanes * samples, stream, first_example, examples, bounds, draws).unflatten(0, (lanes, samples)), 0


def _merged_bounds(bounds: Tensor, dim: int | None, lanes: int, samples: int) -> Tensor:
    """int64 [F], or [lanes * K, F] of each lane's [F] or [K, F]."""
    if dim is None:
        return bounds if bounds.dim() == 1 else bounds.repeat(lanes, 1)
    bounds = bounds.movedim(dim, 0)
    bounds = bounds[:, None].expand(lanes, samples, -1) if bounds.dim() == 2 else bounds
    return bounds.flatten(0, 1).contiguous()


backend.define(
    "multinomial",
    "(Tensor origin, Tensor? sample_ids, SymInt samples, SymInt stream, SymInt first_example, SymInt examples, Tensor bounds, int draws) "
    "-> Tensor",
    _fake,
    vmap=_vmap,
)


def bounds_of(probabilities: Tensor) -> Tensor:
    """Probabilities [..., F], of any sum, summed up and times 2^32: int64 [..., F], the last 2^32.

    The sums are of integers, so that every device and every number of threads has the same.
    """
    features = probabilities.shape[-1]
    p = probabilities.detach().double()
    p = torch.where(p.amax(-1, keepdim=True) > 0, p, torch.ones_like(p))  # nothing is likely: everything is as likely
    # p of the largest p, in as many bits as leave their sum exact in a float64
    parts = (p / p.amax(-1, keepdim=True) * 2.0 ** (52 - features.bit_length())).round().long()
    total = parts.cumsum(-1)
    return (total.double() / total[..., -1:].double() * WORD).long()


def uniform_bounds(features: int, device: torch.device) -> Tensor:
    """:func:`bounds_of` equal probabilities, int64 [features]."""
    if torch.compiler.is_compiling() and features < 2**20:
        # inductor counts an integer arange in 32 bits, whatever it is multiplied by (torch 2.13): in doubles, which hold these exactly
        words = torch.arange(1, features + 1, device=device, dtype=torch.float64) * WORD
        q = (words / features).ceil()
        q = q - ((q - 1) * features >= words).double()
        return (q + (q * features < words).double()).long()
    return (torch.arange(1, features + 1, device=device) * WORD + features - 1) // features


def root_mean_squares(x: Tensor) -> Tensor:
    """Evolutional dropout's probabilities (Li, Gong and Yang 2016) up to their sum: of each feature over the rows of one sample.

    Args:
        x: [K, B, F].

    Returns:
        float64 [K, F].
    """
    return x.detach().double().square().mean(1).sqrt()


def one_example(x: Tensor, batch_dim: int) -> torch.Size:
    """The shape of one row of x."""
    return x.shape[:batch_dim] + x.shape[batch_dim + 1 :]


class MultinomialNoise(torch.autograd.Function):
    """y = x * counts / (draws * probability), [K, B, F] from x [1, B, F] (an expansion) or [K, B, F]."""

    ORIGIN = 3

    @staticmethod
    def forward(ctx, *arguments) -> Tensor:
        MultinomialNoise.save(ctx, *arguments)
        return MultinomialNoise.compute(*arguments)

    @staticmethod
    def compute(x: Tensor, bounds: Tensor, draws: int, origin: Tensor, sample_ids: Tensor | None, *address: int) -> Tensor:
        return _of_type(_times(x, _factors(x, bounds, draws, origin, sample_ids, *address)), x.dtype)

    @staticmethod
    def save(ctx, x, bounds, draws, origin, sample_ids, *address) -> None:
        ctx.save_for_backward(bounds, origin, sample_ids)
        ctx.draws, ctx.rows, ctx.address = draws, x.shape[0], address

    @staticmethod
    def backward(ctx, dy: Tensor):
        bounds, origin, sample_ids = ctx.saved_tensors
        wide = dy.to(torch.promote_types(dy.dtype, torch.float32))  # added up there, and rounded once
        if transforms.active():  # as a product by constants
            dx = backend.apply(MultinomialNoise, wide, bounds, ctx.draws, origin, sample_ids, *ctx.address)
        else:  # plain torch, so that it has a derivative of its own
            dx = _times(wide, _factors(wide, bounds, ctx.draws, origin, sample_ids, *ctx.address))
        dx = dx if ctx.rows == dx.shape[0] else dx.sum(0, keepdim=True)
        return _of_type(dx, dy.dtype), *[None] * (4 + len(ctx.address))

    @staticmethod
    def tangent(dx: Tensor, *arguments) -> Tensor:
        return backend.apply(MultinomialNoise, dx, *arguments)

    @staticmethod
    def merge(lanes, dims, x, bounds, draws, origin, sample_ids, samples, *address):
        rows = x.shape[0 if dims[0] != 0 else 1]  # 1 where each lane's x expands
        x, ids, total, _wide = transforms.merge_rows(lanes, 0, x, dims[0], sample_ids, dims[4], samples, rows == 1)
        return (x, _merged_bounds(bounds, dims[1], lanes, samples), draws, origin, ids, total, *address), 0


def _of_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    # A conversion that does nothing, at the end of an autograd Function, is compiled by torch 2.11 to a gradient of zeros, in silence.
    return x if x.dtype == dtype else x.to(dtype)


def _factors(x, bounds, draws, origin, sample_ids, samples, stream, first_example) -> Tensor:
    """counts / (draws * probability) for rows x [1 or K, B, F], [K, B, F] in float32 (float64 for float64)."""
    counts = backend.op("multinomial", x.device)(origin, sample_ids, samples, stream, first_example, x.shape[1], bounds, draws)
    width = bounds.diff(dim=-1, prepend=torch.zeros_like(bounds[..., :1]))
    scale = torch.where(width > 0, WORD / (width.double() * draws), 0.0).to(torch.promote_types(x.dtype, torch.float32))
    return counts * (scale if bounds.dim() == 1 else scale[:, None])


def _times(x: Tensor, factors: Tensor) -> Tensor:
    """x * factors, and 0 where the factor is, whatever x holds."""
    return torch.where(factors == 0, factors.new_zeros(()), x.to(factors.dtype) * factors)


def multinomial_noise(x: Tensor, probabilities: Tensor | str | None, draws: int | float, place: Place) -> Tensor:
    """Multinomial dropout at a given place. Arguments are taken as valid (see ``functional.multinomial_dropout``).

    ``probabilities`` may be "evolutional" (see :func:`root_mean_squares`), ``draws`` a float that is multiplied by the number of features.
    """
    address, expand, batch_dim, *_ = place
    samples = address.samples
    if x.numel() == 0:
        return torch.cat([x] * samples, batch_dim) if expand else x
    moved = x.movedim(batch_dim, 0)
    rows = moved.reshape(1 if expand else samples, -1, moved[0].numel())
    features = rows.shape[2]
    if isinstance(draws, float):
        draws = max(1, round(draws * features))
    if probabilities is None:
        bounds = uniform_bounds(features, x.device)
    elif isinstance(probabilities, Tensor):
        bounds = bounds_of(probabilities.to(x.device).flatten())
    else:
        moments = root_mean_squares(rows)
        bounds = bounds_of(moments[0] if expand else moments)
    y = backend.apply(MultinomialNoise, rows, bounds, draws, *address)
    return y.view(-1, *moved.shape[1:]).movedim(0, batch_dim)
