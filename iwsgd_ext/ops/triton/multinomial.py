"""Multinomial noise in Triton: how often each feature is drawn, by csrc/multinomial.h's rule."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .address import sample_of, words_of_row
from .device import divide_up, power_of_two
from .launch import guard, launch
from .philox import philox

DRAWS = 4  # of one call of the generator


@triton.jit
def feature_of(word, bounds, F, steps):
    """The first feature whose bound, int64 ascending to 2^32, is above the word. steps: how often F is halved until one is left."""
    low = tl.zeros(word.shape, tl.int32)
    high = low + (F - 1)
    for _ in range(0, steps):
        middle = (low + high) // 2
        above = tl.load(bounds + middle) > word.to(tl.int64)
        low, high = tl.where(above, low, middle + 1), tl.where(above, middle, high)
    return low


@triton.jit(do_not_specialize=["stream", "first_example"])
def multinomial_kernel(
    counts,  # [K, B, F], zeros
    origin,  # [3]
    sample_ids,  # [K] or [K, B], or None
    bounds,  # [F] or [K, F]
    B, F, draws, steps, call_blocks, bounds_stride, stream, first_example,
    PER_EXAMPLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of calls for one row (s, b). Counts are integers: the order in which they are added does not show."""
    row = tl.cast(tl.program_id(0) // call_blocks, tl.int64)
    s, b = row // B, row % B
    seed, the_stream, example = words_of_row(origin, stream, first_example, b)
    call = (tl.program_id(0) % call_blocks) * BLOCK + tl.arange(0, BLOCK)
    sample = sample_of(sample_ids, s, b, B, b < B, PER_EXAMPLE)
    words = philox(call.to(tl.uint32), example, sample, the_stream, seed)
    for j in tl.static_range(4):
        feature = feature_of(words[j], bounds + s * bounds_stride, F, steps)
        tl.atomic_add(counts + row * F + feature, 1, mask=call * 4 + j < draws, sem="relaxed")


def multinomial_triton(
    origin: Tensor,
    sample_ids: Tensor | None,
    samples: int,
    stream: int,
    first_example: int,
    examples: int,
    bounds: Tensor,  # int64 [F] or [K, F]
    draws: int,
) -> Tensor:
    """Counts int32 [K, B, F] of ``draws`` draws: the op."""
    F = bounds.shape[-1]
    counts = torch.zeros(samples, examples, F, dtype=torch.int32, device=bounds.device)
    calls = divide_up(draws, DRAWS)
    block = min(256, max(32, power_of_two(calls)))
    call_blocks = divide_up(calls, block)
    values = {"counts": counts, "origin": origin, "sample_ids": sample_ids, "bounds": bounds.contiguous(), "B": examples, "F": F}
    values |= {"draws": draws, "steps": max(F - 1, 0).bit_length(), "call_blocks": call_blocks, "stream": stream}
    values |= {"bounds_stride": F if bounds.dim() == 2 else 0, "first_example": first_example, "BLOCK": block}
    values |= {"PER_EXAMPLE": sample_ids is not None and sample_ids.dim() == 2}
    with guard(bounds):
        launch(multinomial_kernel, samples * examples * call_blocks if F else 0, block // 32, values)
    return counts


OPS = {"multinomial": multinomial_triton}
