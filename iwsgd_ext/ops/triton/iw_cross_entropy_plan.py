"""How the loss's Triton kernels cut a call into programs: plain functions of sizes, which need no GPU.

A unit (what has importance weights of its own) is S rows of C logits. Where they fit the registers of one program, it holds the rows
of one or more units from the statistics to the gradient: one read and one write of the logits ("held"). Where a unit is too large for
that but all units under way at a time fit the second level cache, a program goes over its unit twice ("reread"). Otherwise, and where
a unit has several positions, kernels follow each other over all rows ("split"): statistics, weights, gradient.
"""

from typing import NamedTuple

from .device import Device, divide_up, power_of_two

PARTIALS = 32  # partial sums of the denominator
MAX_SAMPLES = 1 << 16  # of one unit: its log-likelihoods are in one program


class Limits(NamedTuple):
    """The limits by which plans are chosen, for one architecture.

    From the registers of the compiled kernels (tests/test_triton_compile.py holds them to no spills), not from times: none of it has
    been measured.
    """

    held_bytes: int  # of a program's logits in float32; a quarter of it in float64, half under soft targets
    held_thread_bytes: int  # of them a thread takes: with fewer, warps repeat what is done once a row more often
    thread_bytes: int  # the same where a unit is read twice
    row_elements: int  # logits of one step over a row
    cache_share: float  # of the second level cache, for units that are read twice


LIMITS = {
    80: Limits(65536, 256, 64, 4096, 0.5),
    90: Limits(65536, 256, 64, 4096, 0.5),
    100: Limits(65536, 256, 64, 2048, 0.5),  # ptxas takes more registers for it, and spills from the sizes above
}
HELD_WARPS = 12  # of a multiprocessor at a time, whose threads have up to 168 registers


class Shape(NamedTuple):
    """Rows (s, g, l): L neighbouring positions of each of G groups, under each of S samples."""

    samples: int
    groups: int
    lanes: int
    classes: int
    shared: bool  # a unit has several positions
    element_bytes: int
    acc_bytes: int
    adjacent: bool  # the classes of a row
    soft: bool  # targets with a part on every class


class Held(NamedTuple):
    block_s: int
    block_l: int
    block_c: int  # of a step: all classes where they are held
    warps: int
    registers: int | None  # the most that the compiler may take
    tiles: int
    programs: int


class Split(NamedTuple):
    block_l: int  # rows of a program
    block_c: int  # classes of a step
    warps: int
    lane_blocks: int
    class_blocks: int


class Weights(NamedTuple):
    block_s: int
    block_l: int
    warps: int
    programs: int


def warps_for(elements: int, per_thread: int) -> int:
    """Warps of 32 threads that take ``per_thread`` elements each, from 1 to 32."""
    return min(32, max(1, power_of_two(divide_up(elements, 32 * per_thread))))


def held_plan(shape: Shape, device: Device) -> Held | None:
    """Units whose rows one program holds; None where they do not fit."""
    limits = LIMITS[device.capability]
    block_s, block_c = power_of_two(shape.samples), power_of_two(shape.classes)
    unit_bytes = block_s * block_c * shape.acc_bytes
    units = shape.groups * shape.lanes
    heavy = (shape.acc_bytes // 4) ** 2 * (2 if shape.soft else 1)
    if shape.shared or units == 0 or unit_bytes > limits.held_bytes // heavy:
        return None
    # Small units are taken together, up to four rows for a thread of a warp, as long as every multiprocessor gets some programs.
    together = max(1, min(32 * limits.held_thread_bytes // unit_bytes, 128 // block_s, power_of_two(shape.lanes)))
    while together > 1 and divide_up(units, together) < 4 * device.multiprocessors:
        together //= 2
    warps = warps_for(unit_bytes * together, limits.held_thread_bytes)
    tiles = shape.groups * divide_up(shape.lanes, together)
    # Every program has as many tiles, or one less.
    rounds = divide_up(tiles, device.multiprocessors * max(1, HELD_WARPS // warps))
    return Held(block_s, together, block_c, warps, None, tiles, divide_up(tiles, rounds))


def reread_plan(shape: Shape, device: Device) -> Held | None:
    """Units that one program reads twice, the second time from the cache; None where it would not hold them, or rows lie apart."""
    limits = LIMITS[device.capability]
    units = shape.groups * shape.lanes
    block_s = power_of_two(shape.samples)
    elements = 8192 if shape.acc_bytes == 4 else 2048
    if shape.shared or units == 0 or not shape.adjacent or block_s > elements // 256:
        return None
    block_c = min(elements // block_s, power_of_two(shape.classes))
    warps = warps_for(block_s * block_c * shape.acc_bytes, limits.thread_bytes)
    unit_bytes = shape.samples * shape.classes * shape.element_bytes
    programs = min(units, device.multiprocessors * min(2, resident(warps)))
    if units < device.multiprocessors or programs * unit_bytes > limits.cache_share * device.cache:
        return None
    # All registers that there are: left alone, ptxas spills some to reach a round number of them.
    return Held(block_s, 1, block_c, warps, min(255, 2048 // warps), units, programs)


def resident(warps: int) -> int:
    """Programs of a multiprocessor at a time, of its 64 warps with 32 registers or half of them with more."""
    return max(1, 32 // warps)


def split_plan(shape: Shape, device: Device) -> Split:
    limits = LIMITS[device.capability]
    elements = limits.row_elements * 4 // shape.acc_bytes
    # Where positions are neighbours in memory, a step takes a line of 128 bytes of them.
    least = 1 if shape.adjacent else min(power_of_two(shape.lanes), 128 // shape.element_bytes)
    block_c = min(power_of_two(shape.classes), elements // least)
    block_l = min(power_of_two(shape.lanes), max(least, min(elements // block_c, 256)))
    # At least as many elements as threads: NOTE [In place].
    block_l = max(block_l, 32 // block_c)
    warps = min(warps_for(block_l * block_c, 16), block_l * block_c // 32)
    return Split(block_l, block_c, warps, divide_up(shape.lanes, block_l), divide_up(shape.classes, block_c))


def weights_plan(samples: int, units: int) -> Weights:
    block_s = power_of_two(samples)
    block_l = max(1, min(1024 // block_s, power_of_two(max(units, 1))))
    return Weights(block_s, block_l, warps_for(block_s * block_l, 8), divide_up(units, block_l))
