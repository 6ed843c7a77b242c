"""Dropout without a stored mask, as Triton's low-memory tutorial has it: a peer of the noise op. Imported only where triton is."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def seeded_dropout_kernel(x_ptr, y_ptr, n, p, seed, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # 32 bits: with more, the generator would be another, slower one
    inside = at < n
    x = tl.load(x_ptr + at, mask=inside)
    keep = tl.rand(seed, at) > p  # one call of the generator for each element
    tl.store(y_ptr + at, tl.where(keep, x / (1 - p), 0.0), mask=inside)


def seeded_dropout(x: Tensor, p: float, seed: int) -> Tensor:
    y = torch.empty_like(x)
    block = 1024
    seeded_dropout_kernel[(triton.cdiv(x.numel(), block),)](x, y, x.numel(), p, seed, BLOCK=block)
    return y
