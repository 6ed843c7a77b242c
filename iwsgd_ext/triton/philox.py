"""The generator and the rule that turns random bits into a mask, for every Triton kernel: csrc/philox.h and csrc/noise.h again.

key     = the 64-bit seed
counter = (group, example, sample, stream)    uint32 words, each given as such: a 64-bit counter would be another generator
"""

import triton
import triton.language as tl

M0 = tl.constexpr(0xD2511F53)
M1 = tl.constexpr(0xCD9E8D57)
W0 = tl.constexpr(0x9E3779B9)
W1 = tl.constexpr(0xBB67AE85)
ROUNDS = tl.constexpr(10)
GROUP = tl.constexpr(8)  # elements of one call where an element takes a field of 16 bits


@triton.jit
def philox(group, example, sample, stream, seed):
    """Philox4x32-10: four uint32 words of each counter; the counter's words are uint32 and broadcast together, seed is int64.

    A product of 64 bits gives both halves at once. What does not depend on the sample (NOTE [Shared rounds] in noise_kernels.cuh)
    the compiler moves out of a loop over samples by itself.
    """
    k0 = seed.to(tl.uint64).to(tl.uint32)
    k1 = (seed.to(tl.uint64) >> 32).to(tl.uint32)
    c0, c1, c2, c3 = group, example, sample, stream
    for _ in tl.static_range(ROUNDS):
        p0 = c0.to(tl.uint64) * M0
        p1 = c2.to(tl.uint64) * M1
        c0, c1, c2, c3 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32), (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + W0).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + W1).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def keep(field, threshold):
    """The mask rule: a field of 16 bits, as an int32, keeps its element where it is not below the threshold."""
    return field >= threshold


@triton.jit
def field_of(w0, w1, w2, w3, j):
    """Field j (0 .. 7, an int32) of each call's words: bits 16*(j%2) .. +16 of word j//2, as an int32."""
    low = tl.where(j < 2, w0, w1)
    high = tl.where(j < 6, w2, w3)
    word = tl.where(j < 4, low, high)
    return ((word >> (16 * (j % 2)).to(tl.uint32)) & 0xFFFF).to(tl.int32)


@triton.jit
def fields(w0, w1, w2, w3):
    """All fields of words [..., G] in order, int32 [..., 8 * G]."""
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return tl.interleave(words & 0xFFFF, words >> 16).to(tl.int32)
