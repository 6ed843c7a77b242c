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

    High and low halves apart: of a product of 64 bits Triton's compiler keeps 64 bits, and adds a zero to each upper half. What does
    not depend on the sample (NOTE [Shared rounds] in noise_kernels.cuh) the compiler moves out of a loop over samples by itself.
    """
    k0 = seed.to(tl.uint64).to(tl.uint32)
    k1 = (seed.to(tl.uint64) >> 32).to(tl.uint32)
    m0, m1 = tl.full((), M0, tl.uint32), tl.full((), M1, tl.uint32)
    c0, c1, c2, c3 = group, example, sample, stream
    for _ in tl.static_range(ROUNDS):
        low0, high0 = c0 * m0, tl.umulhi(c0, m0)
        low1, high1 = c2 * m1, tl.umulhi(c2, m1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0.to(tl.uint64) + W0).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + W1).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def keep(field, threshold):
    """The mask rule: a field of 16 bits, in the upper half of a word whose lower half is 0, keeps its element where it is not below the
    threshold, 0 .. 65536. The last is above every field, as the largest word is."""
    threshold = tl.cast(threshold, tl.uint32)
    return field >= tl.where(threshold < 65536, threshold << 16, 0xFFFFFFFF)


@triton.jit
def field_of(w0, w1, w2, w3, j):
    """Field j (0 .. 7, an int32) of each call's words, bits 16*(j%2) .. +16 of word j//2, in the upper half of a word."""
    low = tl.where(j < 2, w0, w1)
    high = tl.where(j < 6, w2, w3)
    word = tl.where(j < 4, low, high)
    return (word << (16 - 16 * (j % 2)).to(tl.uint32)) & 0xFFFF0000


@triton.jit
def fields(w0, w1, w2, w3):
    """All fields of words [..., G] in order, [..., 8 * G], each in the upper half of a word."""
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return tl.interleave(words << 16, words & 0xFFFF0000)
