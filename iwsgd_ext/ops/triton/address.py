"""Where a tile of a noise kernel lies, and the words of its counters: shared by dropout and real-valued noise (noise_plan.py)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import alignment, device_of
from .launch import TYPES
from .noise_plan import GROUPS, LINE, Tiles, ahead_of, lines_of, tiles_of

IN_GROUPS, IN_LINES = tl.constexpr(GROUPS), tl.constexpr(LINE)


@triton.jit
def tile_of(pid, count, per_row, width, column_blocks, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr):
    """A tile's lines [BLOCK_R, 1], as rows and their first elements there; and the first of its elements in a line."""
    line = tl.cast(pid // column_blocks, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    return line // per_row, (line % per_row) * width, line < count, tl.cast(pid % column_blocks, tl.int64) * BLOCK_I


@triton.jit
def read_ahead(at, step, there, left, AHEAD: tl.constexpr):
    """The elements of AHEAD samples at pointers ``at``, of which ``left`` are there, and where the next begin: NOTE [Ahead]."""
    values = ()
    for j in tl.static_range(AHEAD):
        values = values + (tl.load(at, there & (tl.full(there.shape, j, tl.int32) < left), 0.0),)  # noqa: RUF005, which Triton cannot read
        at += step
    return values, at


@triton.jit
def position_of(index, positions, share, WRAPS: tl.constexpr):
    position = index // share
    if WRAPS:
        position = position % positions
    return position


@triton.jit
def sample_of(sample_ids, s, b, B, there, PER_EXAMPLE: tl.constexpr):
    """The id of noise sample s as a counter's word: a scalar, or [R, 1] where examples b [R, 1] have samples of their own."""
    if sample_ids is None:
        sample = tl.cast(s, tl.uint32)
    elif PER_EXAMPLE:
        sample = tl.load(sample_ids + tl.cast(s, tl.int64) * B + b, there, 0).to(tl.uint32)
    else:
        sample = tl.load(sample_ids + s).to(tl.uint32)
    return sample


@triton.jit
def call_and_part(
    o, i, start, column, I, positions, share, SIZE: tl.constexpr, FORM: tl.constexpr, WRAPS: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Of a tile: the counter's group word, for SIZE elements to a call, and which of them an element is (where it is not all in turn)."""
    if FORM == IN_GROUPS:
        first = start + tl.arange(0, BLOCK_I // SIZE)[None, :] * SIZE
        position = position_of(o * I + first, positions, share, WRAPS)
    elif FORM == IN_LINES:
        position = position_of(o * I + i, positions, share, True)
    else:
        position = position_of(o * I + column, positions, share, WRAPS)
    return (position // SIZE).to(tl.uint32), (position % SIZE).to(tl.int32)


@triton.jit
def words_of_row(origin, stream, first_example, b):
    """Seed, and the counter's words of the stream and of examples b."""
    return tl.load(origin), (tl.load(origin + 1) + stream).to(tl.uint32), (tl.load(origin + 2) + first_example + b).to(tl.uint32)


def address_values(x: Tensor, examples: int, address: tuple, size: int, divide_samples: bool) -> tuple[dict, Tiles]:
    """The arguments of noise kernels that say where a call on rows [O, examples, I] is, and its tiles.

    Args:
        address: the op's arguments from origin to share.
        size: elements of one call of the generator.
    """
    origin, sample_ids, samples, stream, first_example, positions, share = address
    outer, _, inner = x.shape
    lines = lines_of(outer, examples, inner, positions, share, size)
    tiles = tiles_of(lines, samples, size, device_of(x), divide_samples)
    align = alignment(x.element_size(), inner, lines.width)
    of_call = {"origin": origin, "sample_ids": sample_ids, "K": samples, "stream": stream, "first_example": first_example}
    of_call |= {"B": examples, "I_units": inner // align, "positions": positions, "share": share}
    of_lines = {"lines": lines.count, "per_row": lines.per_row, "width_units": lines.width // align}
    of_tiles = {"column_blocks": tiles.column_blocks, "blocks": tiles.blocks, "part": tiles.part}
    forms = {"FORM": lines.form, "WRAPS": lines.wraps, "PER_EXAMPLE": sample_ids is not None and sample_ids.dim() == 2, "ALIGN": align}
    forms |= {"BLOCK_R": tiles.block_r, "BLOCK_I": tiles.block_i, "AHEAD": ahead_of(lines, samples, size, x.element_size(), align)}
    forms |= {"ACC": TYPES[torch.promote_types(x.dtype, torch.float32)]}
    return of_call | of_lines | of_tiles | forms, tiles
