"""Dropout noise in Triton: x [O, B, I] -> y [O, K*B, I], an independent mask for every noise sample, none of them stored.

Forward and backward are one tile of lines each (noise_plan.py), which draws the same fields by the same helper.
"""

import triton
import triton.language as tl
from torch import Tensor

from .address import IN_GROUPS, address_values, call_and_part, position_of, read_ahead, sample_of, tile_of, words_of_row
from .launch import float_bits, guard, launch, number, quotient, wide
from .noise_plan import Tiles
from .philox import GROUP, field_of, fields, keep, philox

EXACT = ["stream", "first_example", "threshold", "scale", "shift", "fill"]  # arguments of which no value is special to the compiler


@triton.jit
def fields_of(group, field, example, sample, stream, seed, FORM: tl.constexpr):
    """The field of each element, in the upper half of a word: [R, I], or [R, 1] where a line shares one."""
    w0, w1, w2, w3 = philox(group, example, sample, stream, seed)
    return fields(w0, w1, w2, w3) if FORM == IN_GROUPS else field_of(w0, w1, w2, w3, field)


@triton.jit
def threshold_of(thresholds, threshold, position, b, s, there, row_stride, sample_stride):
    """The call's threshold, or each position's own."""
    if thresholds is not None:
        threshold = tl.load(thresholds + tl.cast(s, tl.int64) * sample_stride + b * row_stride + position, there, 0)
    return threshold


@triton.jit
def factor_of(threshold, ACC: tl.constexpr):
    """The factor of a kept element that has its own threshold, beside the call's scale: 65536 / (65536 - threshold)."""
    left, whole = tl.maximum(65536 - threshold, 1).to(ACC), tl.full((), 65536.0, ACC)
    return quotient(whole, left, ACC)


@triton.jit(do_not_specialize=EXACT)
def noise_fwd_kernel(
    x,  # [O, B, I] where EXPAND, else [O, K*B, I]
    y,  # [O, K*B, I]
    origin,  # [3]
    sample_ids,  # [K] or [K, B], or None
    thresholds,  # [R, positions], or None
    K, B, I_units, lines, per_row, width_units, positions, share, column_blocks, blocks, part, row_stride, sample_stride,
    stream, first_example,
    threshold, scale, shift, fill,
    ACC: tl.constexpr, EXPAND: tl.constexpr, SHIFTED: tl.constexpr, PER_EXAMPLE: tl.constexpr, FORM: tl.constexpr,
    WRAPS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    I, width = wide(I_units, ALIGN), wide(width_units, ALIGN)
    pid = tl.program_id(0)
    row, i, inside, start = tile_of(pid % blocks, lines, per_row, width, column_blocks, BLOCK_R, BLOCK_I)
    column = start + tl.arange(0, BLOCK_I)[None, :]
    o, b, there = row // B, row % B, inside & (column < width)
    group, field = call_and_part(o, i, start, column, I, positions, share, GROUP, FORM, WRAPS, BLOCK_I)
    position = position_of(o * I + i + column, positions, share, True)
    seed, the_stream, example = words_of_row(origin, stream, first_example, b)
    scale, shift, fill = number(scale, ACC), number(shift, ACC), number(fill, ACC)
    begin = (pid // blocks) * part
    end = tl.minimum(begin + part, K)
    first = ((o * K + begin) * B + b) * I + i + column  # in y, of the first sample
    source, at = x + first, y + first
    if EXPAND:
        value = tl.load(x + row * I + i + column, there, 0.0).to(ACC)
    for s in range(begin, end, AHEAD):
        if not EXPAND:
            values, source = read_ahead(source, B * I, there, end - s, AHEAD)
        for j in tl.static_range(AHEAD):
            if s + j < end:
                if not EXPAND:
                    value = values[j].to(ACC)
                sample = sample_of(sample_ids, s + j, b, B, inside, PER_EXAMPLE)
                limit = threshold_of(thresholds, threshold, position, b, s + j, there, row_stride, sample_stride)
                factor = scale
                if thresholds is not None:
                    factor = scale * factor_of(limit, ACC)
                kept = value * factor
                if SHIFTED:
                    kept += shift
                mask = keep(fields_of(group, field, example, sample, the_stream, seed, FORM), limit)
                tl.store(at, tl.where(mask, kept, fill).to(y.dtype.element_ty), there)
            at += B * I


@triton.jit(do_not_specialize=EXACT)
def noise_bwd_kernel(
    dy,  # [O, K*B, I]
    dx,  # [O, B, I]
    origin, sample_ids, thresholds,
    K, B, I_units, lines, per_row, width_units, positions, share, column_blocks, row_stride, sample_stride,
    stream, first_example, threshold, scale,
    ACC: tl.constexpr, PER_EXAMPLE: tl.constexpr, FORM: tl.constexpr, WRAPS: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    I, width = wide(I_units, ALIGN), wide(width_units, ALIGN)
    row, i, inside, start = tile_of(tl.program_id(0), lines, per_row, width, column_blocks, BLOCK_R, BLOCK_I)
    column = start + tl.arange(0, BLOCK_I)[None, :]
    o, b, there = row // B, row % B, inside & (column < width)
    group, field = call_and_part(o, i, start, column, I, positions, share, GROUP, FORM, WRAPS, BLOCK_I)
    position = position_of(o * I + i + column, positions, share, True)
    seed, the_stream, example = words_of_row(origin, stream, first_example, b)
    scale = number(scale, ACC)
    at = dy + (o * K * B + b) * I + i + column  # of sample 0
    total = tl.zeros((BLOCK_R, BLOCK_I), ACC)
    for s in range(0, K, AHEAD):
        values, at = read_ahead(at, B * I, there, K - s, AHEAD)
        for j in tl.static_range(AHEAD):
            if s + j < K:
                sample = sample_of(sample_ids, s + j, b, B, inside, PER_EXAMPLE)
                limit = threshold_of(thresholds, threshold, position, b, s + j, there, row_stride, sample_stride)
                mask = keep(fields_of(group, field, example, sample, the_stream, seed, FORM), limit)
                value = values[j].to(ACC)
                if thresholds is not None:
                    value *= factor_of(limit, ACC)
                total = tl.where(mask, total + value, total)
    tl.store(dx + row * I + i + column, (total * scale).to(dx.dtype.element_ty), there)


def _values(x: Tensor, examples: int, arguments: tuple, divide_samples: bool) -> tuple[dict, Tiles]:
    """The arguments that both kernels share, for rows [O, examples, I], and the tiles; arguments: the op's, from origin to scale."""
    *address, threshold, thresholds, scale = arguments
    values, tiles = address_values(x, examples, tuple(address), GROUP.value, divide_samples)
    samples, positions, rows = values["K"], values["positions"], 1 if thresholds is None else thresholds.shape[0]
    strides = {"row_stride": 0 if rows == 1 else positions, "sample_stride": examples * positions if rows == examples * samples else 0}
    if thresholds is not None:
        values["AHEAD"] = 1  # a division for each element takes longer than its memory, and registers
    return values | strides | {"threshold": threshold, "thresholds": thresholds, "scale": float_bits(scale)}, tiles


def noise_fwd_triton(x: Tensor, y: Tensor, address: tuple, shift: float, fill: float, expand: bool) -> None:
    """y = keep * (scale * x + shift) + (1 - keep) * fill; address: the op's arguments from origin to scale."""
    x = x.contiguous()
    rows = x.shape[1] if expand else x.shape[1] // address[2]
    values, tiles = _values(x, rows, address, True)
    values |= {"x": x, "y": y, "EXPAND": expand, "SHIFTED": shift != 0, "shift": float_bits(shift), "fill": float_bits(fill)}
    values |= {"AHEAD": 1} if expand else {}  # nothing is read from sample to sample
    with guard(x):
        launch(noise_fwd_kernel, tiles.programs, tiles.warps, values)


def noise_bwd_triton(dy: Tensor, dx: Tensor, address: tuple) -> None:
    """dx = sum over the samples of keep * scale * dy."""
    dy = dy.contiguous()
    values, tiles = _values(dy, dx.shape[1], address, False)
    with guard(dy):
        launch(noise_bwd_kernel, tiles.programs, tiles.warps, values | {"dy": dy, "dx": dx})


def _noise(x: Tensor, *arguments) -> Tensor:
    *address, shift, fill, expand = arguments
    y = x.new_empty(x.shape[0], x.shape[1] * address[2] if expand else x.shape[1], x.shape[2])
    noise_fwd_triton(x, y, tuple(address), shift, fill, expand)
    return y


def _noise_out(x: Tensor, *arguments) -> None:
    *address, shift, fill, expand, out = arguments
    noise_fwd_triton(x, out, tuple(address), shift, fill, expand)


def _noise_sum(dy: Tensor, *address) -> Tensor:
    dx = dy.new_empty(dy.shape[0], dy.shape[1] // address[2], dy.shape[2])
    noise_bwd_triton(dy, dx, address)
    return dx


OPS = {"noise": _noise, "noise_out": _noise_out, "noise_sum": _noise_sum}
