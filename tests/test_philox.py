"""The generator on every code path: Random123's known answers, and each instruction set's keep bits against naive.py."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import naive

from iwsgd_ext import reference

try:
    from iwsgd_ext import _info as info
except ImportError:
    info = None
ISAS = info.build_info()["machine_isas"] if info else []
native = pytest.mark.skipif(info is None, reason="no native build")

# Random123, kat_vectors, philox4x32 10: counter, key, words
KNOWN = [
    pytest.param((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8), id="zeros"),
    pytest.param((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD), id="ones"),
    pytest.param(
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        id="pi",
    ),
]
SEEDS = [0, 1, -1, 7, -(2**63), 2**63 - 1, 0x299F31D0A4093822]


def signed(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
class TestKnownAnswers:
    def test_naive(self, counter, key, words):
        assert naive.philox(counter, key) == words

    def test_naive_fields(self, counter, key, words):
        """The vectorised generator of the masks, through the layout of its fields."""
        group, example, sample, stream = counter
        fields = naive.random_fields(key, stream, sample, example, 8, first_group=group)
        assert fields.tolist() == [half for word in words for half in (word & 0xFFFF, word >> 16)]

    def test_reference(self, device, counter, key, words):
        got = reference.philox(*(torch.tensor([c], device=device) for c in counter), torch.tensor(signed(key), device=device))
        assert got.tolist() == [list(words)]

    @native
    def test_native(self, counter, key, words):
        got = info.philox(np.array([counter], dtype=np.uint32), key)
        assert got.dtype == np.uint32
        assert tuple(got[0].tolist()) == words


def test_reference_and_native_words_for_random_counters(device):
    generator = np.random.default_rng(0)
    counters = generator.integers(0, 2**32, (500, 4), dtype=np.uint32)
    for seed in SEEDS:
        want = np.array([naive.philox(c, seed) for c in counters])
        columns = torch.from_numpy(counters.astype(np.int64)).to(device).unbind(1)
        np.testing.assert_array_equal(reference.philox(*columns, torch.tensor(seed, device=device)).cpu().numpy(), want)
        if info is not None:
            np.testing.assert_array_equal(info.philox(counters, seed % 2**64), want)


def test_reference_fields_are_the_words_as_uint16():
    words = torch.tensor([[0x00020001, 0x00040003, 0x00060005, 0xFFFF0007]])
    assert reference.fields(words).tolist() == [[1, 2, 3, 4, 5, 6, 7, 0xFFFF]]


def keep_bits(isa, seed, example, sample, stream, group, groups, threshold) -> np.ndarray:
    kept = info.keep_bytes(isa, seed % 2**64, example, sample, stream, group, groups, threshold)
    return np.unpackbits(kept, bitorder="little").astype(bool)


@pytest.mark.parametrize("isa", ISAS)
class TestKeepBits:
    @pytest.mark.parametrize("threshold", [1, 2, 255, 32767, 32768, 32769, 65534, 65535])
    def test_thresholds(self, isa, threshold):
        """Around the sign bit of a 16-bit comparison and at both ends; 8000 fields a seed."""
        for seed in SEEDS:
            got = keep_bits(isa, seed, 3, 5, 11, 0, 1000, threshold)
            np.testing.assert_array_equal(got, naive.random_fields(seed, 11, 5, 3, 8000) >= threshold)

    def test_fields_that_equal_the_threshold_are_kept(self, isa):
        """At a field's own value its element is kept, one above it is dropped: 500 fields, each tried as the threshold."""
        fields = naive.random_fields(1, 0, 0, 0, 500)
        for i, field in enumerate(fields.tolist()):
            if 0 < field < 65535:
                assert keep_bits(isa, 1, 0, 0, 0, 0, 64, field)[i]
                assert not keep_bits(isa, 1, 0, 0, 0, 0, 64, field + 1)[i]

    @pytest.mark.parametrize("group", [1, 5, 63, 2**31 - 3, 2**31, 2**32 - 64, 2**32 - 8, 2**32 - 3], ids=hex)
    def test_groups(self, isa, group):
        """Unaligned starts, the sign bit, and the wrap of the 32-bit counter inside a block of eight groups."""
        got = keep_bits(isa, -9, 1, 2, 3, group, 64, 20000)
        np.testing.assert_array_equal(got, naive.random_fields(-9, 3, 2, 1, 512, first_group=group) >= 20000)

    @pytest.mark.parametrize("word", ["example", "sample", "stream"])
    def test_words_of_the_counter_use_all_32_bits(self, isa, word):
        for value in (0x80000000, 0xFFFFFFFF, 0x12345678):
            address = {"example": 0, "sample": 0, "stream": 0, word: value}
            got = keep_bits(isa, 2, **address, group=0, groups=8, threshold=32768)
            np.testing.assert_array_equal(got, naive.naive_mask(2, address["stream"], address["sample"], address["example"], 64, 0.5))

    def test_bad_arguments(self, isa):
        with pytest.raises(ValueError, match="groups: expected a multiple of 8"):
            info.keep_bytes(isa, 0, 0, 0, 0, 0, 12, 1)
        with pytest.raises(ValueError, match=r"threshold: expected 0 \.\. 65535"):
            info.keep_bytes(isa, 0, 0, 0, 0, 0, 8, 65536)


word = st.integers(0, 2**32 - 1)


@native
@given(st.sampled_from(ISAS or [None]), st.integers(0, 2**64 - 1), word, word, word, st.integers(0, 2**32 - 1), st.integers(1, 65535))
def test_keep_bits_of_any_address(isa, seed, example, sample, stream, group, threshold):
    got = keep_bits(isa, seed, example, sample, stream, group, 16, threshold)
    np.testing.assert_array_equal(got, naive.random_fields(seed, stream, sample, example, 128, first_group=group) >= threshold)


@native
def test_unknown_isa():
    with pytest.raises(ValueError, match="isa: expected baseline, avx2 or avx512, got sse9"):
        info.keep_bytes("sse9", 0, 0, 0, 0, 0, 8, 1)
