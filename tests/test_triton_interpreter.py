"""Triton's kernels of noise on the CPU, by its interpreter: against the header's generator and the loops of naive.py.

A process interprets or compiles, from its start: TRITON_INTERPRET=1 python -m pytest tests/test_triton_interpreter*.py, which
test_triton.py does. Interpreted programs are slow, so sizes are small; blocks are made small with them.
"""

import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional
from oracle import naive
from test_noise import assert_same_bits
from test_philox import KNOWN, SEEDS, signed

import iwsgd_ext as iw
from iwsgd_ext import functional as F
from iwsgd_ext import reference

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a process must be started with TRITON_INTERPRET=1 to interpret (test_triton.py does)", allow_module_level=True)
pytest.importorskip("triton")

import triton
import triton.language as tl

from iwsgd_ext.ops.triton import device as devices
from iwsgd_ext.ops.triton import noise as noise_op
from iwsgd_ext.ops.triton import noise_plan, philox
from iwsgd_ext.ops.triton import real_noise as real_noise_op

try:
    from iwsgd_ext import _info as info
except ImportError:
    info = None
DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def _on_triton():
    iw.set_backend("triton")
    yield
    iw.set_backend(None)


# ---- the generator and the mask rule, against csrc/philox.h and csrc/noise.h ----


@triton.jit
def words_kernel(counters, words, seed, N: tl.constexpr):
    i = tl.arange(0, N)
    counter = [tl.load(counters + 4 * i + j).to(tl.uint32) for j in tl.static_range(4)]
    w0, w1, w2, w3 = philox.philox(counter[0], counter[1], counter[2], counter[3], tl.load(seed))
    tl.store(words + 4 * i, w0.to(tl.int64))
    tl.store(words + 4 * i + 1, w1.to(tl.int64))
    tl.store(words + 4 * i + 2, w2.to(tl.int64))
    tl.store(words + 4 * i + 3, w3.to(tl.int64))


@triton.jit
def keep_kernel(address, neighbours, single, threshold, N: tl.constexpr):
    """Keep bits of 8 N positions from address = (seed, group, example, sample, stream), as a group's eight and one by one."""
    group = tl.load(address + 1).to(tl.uint32)
    word2, word3, word4 = (tl.load(address + j).to(tl.uint32) for j in tl.static_range(2, 5))
    w0, w1, w2, w3 = philox.philox(group + tl.arange(0, N).to(tl.uint32), word2, word3, word4, tl.load(address))
    tl.store(neighbours + tl.arange(0, 8 * N), philox.keep(philox.fields(w0, w1, w2, w3), threshold).to(tl.int8))
    position = tl.arange(0, 8 * N)
    w0, w1, w2, w3 = philox.philox(group + (position // 8).to(tl.uint32), word2, word3, word4, tl.load(address))
    tl.store(single + position, philox.keep(philox.field_of(w0, w1, w2, w3, position % 8), threshold).to(tl.int8))


def words_of(counters: np.ndarray, seed: int) -> np.ndarray:
    words = torch.empty(len(counters), 4, dtype=torch.int64)
    words_kernel[(1,)](torch.from_numpy(counters.astype(np.int64)), words, torch.tensor(signed(seed)), len(counters))
    return words.numpy()


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    assert tuple(words_of(np.array([counter]), key)[0].tolist()) == words


@pytest.mark.skipif(info is None, reason="no native build")
def test_words_are_the_headers():
    counters = np.random.default_rng(0).integers(0, 2**32, (512, 4), dtype=np.uint32)
    for seed in SEEDS:
        np.testing.assert_array_equal(words_of(counters, seed), info.philox(counters, seed % 2**64))


@pytest.mark.skipif(info is None, reason="no native build")
@pytest.mark.parametrize("group", [0, 2**31 - 3, 2**32 - 3], ids=hex)
def test_masks_are_the_headers(group):
    """Both ways in which kernels take fields, at thresholds around every sign bit and at both ends."""
    for threshold in (1, 255, 32767, 32768, 32769, 65535):
        want = info.keep_bytes("baseline", 2**63 + 5, 2**32 - 1, 2**31, 7, group, 64, threshold)
        want = np.unpackbits(want, bitorder="little")
        neighbours, single = torch.empty(512, dtype=torch.int8), torch.empty(512, dtype=torch.int8)
        keep_kernel[(1,)](torch.tensor([signed(2**63 + 5), group, 2**32 - 1, 2**31, 7]), neighbours, single, threshold, 64)
        np.testing.assert_array_equal(neighbours.numpy(), want)
        np.testing.assert_array_equal(single.numpy(), want)


# ---- noise ----

CALLS = {
    # name: (shape, unit, batch_dim, the form of noise_plan.py and whether positions wrap)
    "elements": ((3, 63), "element", 0, (noise_plan.GROUPS, False)),
    "several-blocks": ((2, 4099), "element", 0, (noise_plan.GROUPS, False)),
    "time-major-groups": ((5, 3, 16), "element", 1, (noise_plan.GROUPS, False)),
    "time-major-odd": ((5, 3, 7), "element", 1, (noise_plan.ELEMENTS, False)),
    "channels": ((3, 5, 7, 7), "channel", 0, (noise_plan.LINE, False)),
    "channels-of-one": ((3, 5, 1, 1), "channel", 0, (noise_plan.GROUPS, False)),
    "rows": ((5, 77), "row", 0, (noise_plan.LINE, False)),
    "time-major-rows": ((5, 3, 7), "row", 1, (noise_plan.LINE, False)),
    "time-major-channels": ((6, 3, 5, 3), "channel", 1, (noise_plan.ELEMENTS, False)),
}
FORMS = {"element": F.dropout, "channel": F.dropout2d, "row": F.drop_path}
ADDRESSES = {
    "plain": {"seed": 11, "stream": 3},
    "wraps": {"seed": -(2**63), "stream": 2**32 - 1, "first_example": 2**32 - 2, "sample_ids": [2**32 - 1, 2**32 + 4, -2]},
    "tensors": {"seed": torch.tensor(-4), "stream": torch.tensor([7]), "first_example": torch.tensor(2**32 - 1)},
}


def lines_of_call(shape, unit, batch_dim):
    x = torch.empty(shape)
    rows = noise_op_rows(x, batch_dim)
    flat = rows.flatten(x)
    positions, share = rows.positions(x.shape, unit)
    return noise_plan.lines_of(*flat.shape, positions, share, 8)


def noise_op_rows(x, batch_dim):
    from iwsgd_ext.ops.address import Rows

    return Rows.of(x, batch_dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("expand", [True, False], ids=["expand", "rows"])
@pytest.mark.parametrize("call", CALLS)
def test_noise(call, expand, dtype):
    shape, unit, batch_dim, form = CALLS[call]
    lines = lines_of_call(shape, unit, batch_dim)
    assert (lines.form, lines.wraps) == form, "another form than the case is for"
    x = torch.randn(shape)
    x = (x if expand else torch.cat([x, -x, 2 * x], batch_dim)).to(dtype)
    for given in ADDRESSES.values() if call == "elements" else [ADDRESSES["wraps"]]:
        got = FORMS[unit](x, 0.3, samples=3, expand=expand, batch_dim=batch_dim, **given)
        ints = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        assert_same_bits(got, naive.naive_noise(x, 0.3, samples=3, expand=expand, batch_dim=batch_dim, unit=unit, **ints))


def test_channels_last_is_one_position_after_another():
    x = torch.randn(2, 9, 3, 5).to(memory_format=torch.channels_last)
    assert_same_bits(F.dropout2d(x, 0.5, samples=2, seed=1), naive.naive_noise(x, 0.5, samples=2, seed=1, unit="channel"))
    x = torch.randn(2, 16, 3, 5).to(memory_format=torch.channels_last)  # whole groups that come again: positions wrap
    assert_same_bits(F.dropout2d(x, 0.5, samples=2, seed=1), naive.naive_noise(x, 0.5, samples=2, seed=1, unit="channel"))


STRIDED = {
    "every second": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "transposed": lambda x: x.t().contiguous().t(),
    "expanded": lambda x: x[:1].expand_as(x),
    "a number": lambda x: x[:1, :1].expand_as(x),
    "backwards in memory": lambda x: x.flip(1).flip(1)[:, 3:],
}


@pytest.mark.parametrize("form", ["dropout", "alpha_dropout", "drop_path", "gaussian_dropout", "gaussian_noise"])
@pytest.mark.parametrize("layout", STRIDED)
def test_strides(layout, form):
    """Input and gradient that are laid out in memory in any way give what contiguous ones give."""
    x = STRIDED[layout](torch.randn(4, 10))
    for expand in (True, False):
        results = []
        for of in (lambda v: v, torch.Tensor.contiguous):
            leaf = of(x).requires_grad_()
            y = getattr(F, form)(leaf, 0.4, samples=2, seed=3, expand=expand)
            dy = (
                STRIDED[layout](torch.linspace(-1, 1, y.shape[0] * 10).view(-1, 10))
                if layout != "backwards in memory"
                else y.detach().sin()
            )
            results += [(y.detach(), *torch.autograd.grad(y, leaf, of(dy)))]
        for got, expected in zip(*results, strict=True):
            assert_same_bits(got, expected)


def test_sample_ids_by_example():
    x, ids = torch.randn(4, 77), torch.randint(0, 50, (3, 4))
    for expand in (True, False):
        y = x if expand else torch.cat([x, -x, 2 * x])
        got = F.dropout(y, 0.3, samples=3, seed=1, sample_ids=ids, expand=expand)
        assert_same_bits(got, naive.naive_noise(y, 0.3, samples=3, seed=1, sample_ids=ids, expand=expand))


def test_many_samples_in_parts():
    """Few lines: the samples are divided among programs, unevenly."""
    x = torch.randn(1, 24)
    tiles = noise_plan.tiles_of(lines_of_call((1, 24), "element", 0), 7, 8, devices.KNOWN[80], True)
    assert tiles.parts > 1 and tiles.parts * tiles.part > 7
    assert_same_bits(F.dropout(x, 0.3, samples=7, seed=5), naive.naive_noise(x, 0.3, samples=7, seed=5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype):
    special = [math.nan, math.inf, -math.inf, torch.finfo(dtype).max, -0.0, 0.0, -1.0, torch.finfo(dtype).tiny / 4]
    x = torch.tensor(special * 9, dtype=torch.float64).to(dtype)[None]
    for p in (0.0, 0.5, 1.0):
        assert_same_bits(F.dropout(x, p, samples=3, seed=2), naive.naive_noise(x, p, samples=3, seed=2))


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_gradient_sums_over_samples(call, dtype):
    shape, unit, batch_dim, _ = CALLS[call]
    x = torch.randn(shape).to(dtype).requires_grad_()
    given = {"samples": 3, "seed": 9, "stream": 2, "batch_dim": batch_dim}
    y = FORMS[unit](x, 0.3, **given)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    keep = naive.naive_keep(x, 0.3, unit=unit, **given)
    kept = torch.where(keep, dy.double(), 0.0) * naive.effective_scale(0.3)
    want, size = (sum(v.tensor_split(3, batch_dim)) for v in (kept, kept.abs()))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    assert ((dx.double() - want).abs() <= torch.finfo(dtype).eps / 2 * want.abs() + 5 * torch.finfo(acc).eps * size).all()


LAWS = {"features": (63,), "examples": (3, 1), "elements": (3, 63)}


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("law", LAWS)
def test_own_rates_are_the_references(law, dtype):
    """Forward to the bit, backward to the rounding of a sum."""
    p = torch.rand(LAWS[law], dtype=torch.float64)
    p.view(-1)[:3] = torch.tensor([0.0, 1.0, 2**-16])
    x = torch.randn(3, 63).to(dtype).requires_grad_()
    results = []
    for name in ("triton", "reference"):
        iw.set_backend(name)
        y = F.dropout(x, p, samples=2, seed=5)
        results.append((y.detach(), *torch.autograd.grad(y, x, torch.linspace(-1, 1, y.numel()).view_as(y).to(dtype))))
    assert_same_bits(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_affine_law_is_the_references(dtype):
    """scale * x + shift where kept, fill where dropped, as alpha dropout has it; each channel its own threshold."""
    x, origin = torch.randn(1, 4, 5 * 9).to(dtype), torch.tensor([3, 1, 2])
    thresholds = torch.randint(0, 65537, (8, 5), dtype=torch.int32)
    for given in ((20000, None, 1.7, 0.3, -1.1), (0, thresholds, 1.0, 0.3, -1.1), (0, thresholds[:4], 1.0, 0.0, 2.0)):
        arguments = (x, origin, None, 2, 7, 1, 5, 9, *given, True)
        assert_same_bits(torch.ops.iwsgd_triton.noise(*arguments), reference.noise(*arguments))


def sparse(tmp_path, elements: int, dtype=np.float16) -> torch.Tensor:
    """Memory of which only what is touched exists."""
    return torch.from_numpy(np.memmap(tmp_path / "sparse", dtype=dtype, mode="w+", shape=(elements,)))


def test_noise_past_two_to_the_31(tmp_path):
    """One program of a call whose second sample begins 2^31 elements after its first."""
    B, I = 2**28, 8
    y, x = sparse(tmp_path, 2**31 + 4096), torch.randn(256, I).half()
    address = (torch.tensor([5, 0, 0]), None, 2, 0, 0, I, 1, 30000, None, reference.keep_scale(30000))
    values, tiles = noise_op._values(x[:1].expand(B, I)[None], B, address, True)
    values |= {"x": x, "y": y, "EXPAND": True, "SHIFTED": False, "shift": 0, "fill": 0, "part": 2, "lines": 256}
    assert tiles.block_r == 256
    noise_op.launch(noise_op.noise_fwd_kernel, 1, 8, values)
    got = torch.stack([y[:2048], y[2**31 : 2**31 + 2048]]).view(2 * 256, I)
    assert_same_bits(got, reference.noise(x[None], *address, 0.0, 0.0, True)[0])


# ---- real-valued and multinomial noise ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("law", naive.LAWS)
@pytest.mark.parametrize("call", [name for name in CALLS if CALLS[name][1] == "element" or name == "time-major-rows"])
def test_real_noise(call, law, dtype):
    """Multiplied, added, and the gradient of the first, to 5e-5 of the numbers of the definition; exactly so in float64."""
    shape, unit, batch_dim, _ = CALLS[call]
    x = torch.randn(shape, dtype=dtype)
    given = {"samples": 3, "seed": 2**63 + 3, "stream": 2**32 - 1, "first_example": 2**32 - 2, "sample_ids": [9, 0, -2]}
    flat = noise_op_rows(x, batch_dim)
    address = (torch.tensor([signed(2**63 + 3), 0, 0]), torch.tensor([9, 0, -2]), 3, 2**32 - 1, 2**32 - 2, *flat.positions(x.shape, unit))
    z, number = naive.naive_numbers(x, law, batch_dim=batch_dim, unit=unit, **given), list(naive.LAWS).index(law)
    tolerance = 1e-12 if dtype == torch.float64 else 5e-5 * 4
    for expand in (True, False):
        y = x if expand else torch.cat([x, 0 * x, 2 * x], batch_dim)
        rows = torch.cat([x] * 3, batch_dim).double() if expand else y.double()
        for multiply in (True, False):
            got = torch.ops.iwsgd_triton.real_noise(flat.flatten(y), *address, number, 0.7, multiply, expand)
            want = rows * (1 + 0.7 * z) if multiply else rows + 0.7 * z
            torch.testing.assert_close(flat.unflatten(got, y.shape).double(), want, rtol=1e-6, atol=tolerance)
    dy = torch.randn_like(rows).to(dtype)
    dx = flat.unflatten(torch.ops.iwsgd_triton.real_noise_sum(flat.flatten(dy), *address, number, 0.7), dy.shape)
    want = sum((dy.double() * (1 + 0.7 * z)).tensor_split(3, batch_dim))
    torch.testing.assert_close(dx.double(), want, rtol=1e-6, atol=3 * tolerance)


def test_numbers_of_the_ends():
    """The words for which logarithms and quarter turns are delicate: no infinity, within 5e-6 of the definition."""
    ends = [0, 1, 2**23, 2**24 - 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2**9, 2**32 - 129, 2**32 - 2, 2**32 - 1]
    ends += [i * 2**29 + j for i in range(1, 8) for j in (-1, 0, 1)]
    a, b = (v.flatten() for v in torch.meshgrid(torch.tensor(ends), torch.tensor(ends), indexing="ij"))
    radius, angle = (-2 * ((a.double() + 0.5) / 2**32).log()).sqrt(), 2 * math.pi * ((b.double() + 0.5) / 2**32)
    for dtype, tolerance in ((torch.float32, 5e-6), (torch.float64, 1e-14)):
        x, y = torch.empty(1024, dtype=dtype), torch.empty(1024, dtype=dtype)
        one_word = [[torch.tensor([law([int(word)])[0] for word in words]) for words in (a, b)] for law in (naive.laplace, naive.uniform)]
        for law, wanted in enumerate([(radius * angle.cos(), radius * angle.sin()), *one_word]):
            pair_kernel[(1,)](a, b, x, y, len(a), law, tl.float32 if dtype == torch.float32 else tl.float64)
            for got, want in zip((x, y), wanted, strict=True):
                assert (got[: len(a)].double() - want).abs().max() < tolerance, law


@triton.jit
def pair_kernel(a, b, x, y, N, LAW: tl.constexpr, ACC: tl.constexpr):
    i = tl.arange(0, 1024)
    first, second = (tl.load(words + i, i < N, 0).to(tl.uint32) for words in (a, b))
    z0, z1 = real_noise_op.number_pair(first, second, LAW, ACC)
    tl.store(x + i, z0, i < N)
    tl.store(y + i, z1, i < N)


@pytest.mark.parametrize("features", [1, 5, 64, 1000])
def test_multinomial(features):
    """Counts of equal and of very unequal probabilities, for each sample its own too, to the last draw."""
    origin, ids = torch.tensor([-7, 3, 2**32 - 1]), torch.tensor([[4, 0], [2**32 - 1, 7]])
    edges = (torch.rand(2, features).pow(8).double().cumsum(1) * 2**32).long() + 1
    edges = (edges.double() / edges[:, -1:] * 2**32).long()
    for bounds, draws in ((edges[0], 1), (edges[0], 41), (edges, 7)):
        got = torch.ops.iwsgd_triton.multinomial(origin, ids, 2, 5, 0, 2, bounds, draws)
        for s, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
            row = bounds.expand(2, features)[s].tolist()
            want = naive.counts(-7, 8, int(ids[s, b]), 2**32 - 1 + b, row, draws)
            np.testing.assert_array_equal(got[s, b].numpy(), want)


# ---- with the loss ----


def test_compiled_is_eager():
    """The ops are opaque to the compiler, which has fake forms of them: one graph, the same bits."""

    def step(x, y, seed):
        z = F.dropout(x.sin(), 0.4, samples=2, seed=seed)
        return iw.iw_cross_entropy(z, y, 2)

    x, y, seed = torch.randn(3, 12), torch.tensor([1, 0, 11]), torch.tensor(5)
    results = []
    for f in (step, torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)):
        leaf = x.clone().requires_grad_()
        loss = f(leaf, y, seed)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_opcheck():
    x, origin = torch.randn(1, 3, 5), torch.tensor([3, 0, 0])
    address, law = (origin, None, 2, 1, 0, 5, 1), (20000, None, 1.5)
    torch.library.opcheck(torch.ops.iwsgd_triton.noise, (x, *address, *law, 0.0, 0.0, True))
    torch.library.opcheck(torch.ops.iwsgd_triton.noise_sum, (torch.randn(1, 6, 5), *address, *law))
    given = (torch.randn(6, 5, 2), *iw.reference.LossArguments(torch.randint(5, (3, 2)), 2))
    torch.library.opcheck(torch.ops.iwsgd_triton.iw_cross_entropy, (*given, True))
    torch.library.opcheck(torch.ops.iwsgd_triton.iw_cross_entropy_, given)
