"""How the noise kernels cut a call into programs: plain functions of sizes, which need no GPU. Dropout and real-valued noise share them.

x [O, B, I] is taken as lines: rows (o, b), or parts of rows whose elements share one draw. A program has a tile of BLOCK_R lines by BLOCK_I
elements; it goes through the noise samples, reading x once, so that memory sees x read once and every output written once.
"""

from typing import NamedTuple

from .device import Device, divide_up, power_of_two

GROUPS, LINE, ELEMENTS = 0, 1, 2  # what a call of the generator serves: neighbours of its group, a whole line, one element


class Lines(NamedTuple):
    form: int
    count: int
    per_row: int
    width: int  # elements of a line
    wraps: bool  # positions come again within one example


class Tiles(NamedTuple):
    block_r: int
    block_i: int
    warps: int
    column_blocks: int
    blocks: int
    parts: int  # the noise samples in this many
    part: int  # of so many each
    programs: int


def lines_of(outer: int, examples: int, inner: int, positions: int, share: int, group: int) -> Lines:
    """The lines of x [O, B, I] whose element (o, i) has position ((o * I + i) // share) % positions, of ``group`` to a Philox call."""
    rows, numel = outer * examples, outer * inner
    wraps = numel > positions * share
    if positions == 1:
        return Lines(LINE, rows, 1, inner, False)
    starts = outer == 1 or inner % group == 0
    ends = positions % group == 0 or numel <= positions
    if share == 1 and starts and ends:
        return Lines(GROUPS, rows, 1, inner, wraps)
    if share > 1 and outer == 1 and inner % share == 0:
        return Lines(LINE, rows * (inner // share), inner // share, share, wraps)
    return Lines(ELEMENTS, rows, 1, inner, wraps)


def tiles_of(lines: Lines, samples: int, group: int, device: Device, divide_samples: bool) -> Tiles:
    """One call of the generator a thread and sample, in 8 warps, or fewer where lines are few and short."""
    block_i = max(group, min(power_of_two(lines.width), 256 * group))
    block_r = max(1, min(256 * group // block_i, power_of_two(lines.count)))
    threads = block_r * block_i // group
    column_blocks = divide_up(lines.width, block_i)
    blocks = column_blocks * divide_up(lines.count, block_r)
    parts = 1
    if divide_samples and blocks:
        # The samples are parted where the lines alone do not fill the device; at least two each share what they have in common.
        parts = max(1, min(device.multiprocessors * 2048 // (blocks * threads), samples // 2, 64))
    part = divide_up(samples, parts)
    parts = divide_up(samples, part)
    return Tiles(block_r, block_i, min(8, max(1, threads // 32)), column_blocks, blocks, parts, part, blocks * parts)


def ahead_of(lines: Lines, samples: int, group: int, element_bytes: int, align: int) -> int:
    """Samples whose elements a thread reads before it uses the first of them: up to 64 bytes of 4 samples.

    NOTE [Ahead] A multiprocessor of an H100 has to have about 40 KB under way for nine tenths of the memory's speed. 32 warps whose threads
    ask for 64 bytes before they wait have 64 KB. ptxas does not see to it: it puts each read behind the generator's rounds of the sample
    before. Elements that are read by less than 8 bytes stay as they are: each wants an address of its own, and registers run out.
    """
    if lines.form == ELEMENTS or align * element_bytes < 8:
        return 1
    return max(1, min(4, 64 // (group * element_bytes), power_of_two(samples)))
