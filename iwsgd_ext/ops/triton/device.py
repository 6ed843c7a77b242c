"""Facts of a device that the plans of the Triton kernels use. Neither a GPU nor triton is needed to import it."""

import functools
import math
from typing import NamedTuple

import torch


class Device(NamedTuple):
    capability: int  # 80, 90, 100: the compute capability's digits, or those of the nearest one below that a table has
    multiprocessors: int
    cache: int  # bytes of the second level cache


# A plan for a device that is not there: of compilation ahead of time, and of the interpreter, which has no multiprocessors.
KNOWN = {80: Device(80, 108, 40 << 20), 90: Device(90, 132, 50 << 20), 100: Device(100, 148, 126 << 20)}


def nearest(capability: int) -> int:
    """The entry of a table for this compute capability: the nearest one below it, or the first."""
    return max((known for known in KNOWN if known <= capability), default=min(KNOWN))


@functools.cache
def _of_index(kind: str, index: int) -> Device:
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(index)
        capability = 10 * properties.major + properties.minor if torch.version.hip is None else min(KNOWN)
        return Device(nearest(capability), properties.multi_processor_count, properties.L2_cache_size)
    return KNOWN[min(KNOWN)]


def device_of(x: torch.Tensor) -> Device:
    return _of_index(x.device.type, x.device.index or 0)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def divide_up(n: int, d: int) -> int:
    return -(-n // d)


def alignment(element_bytes: int, *numbers: int) -> int:
    """The number of elements, a power of two of 16 bytes at most, that divides all numbers. NOTE [Alignment].

    NOTE [Alignment] Triton knows that an integer argument is a multiple of 16, and of nothing less. Row lengths and strides go to the
    kernels divided by this number, ALIGN, which is multiplied back where the compiler sees it: rows of 1000 bfloat16 classes are then
    read 16 bytes at a time.
    """
    return math.gcd(16 // element_bytes, *numbers)
