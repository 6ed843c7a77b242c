"""The noise op at a given address, on every backend and instruction set, against the loops of naive.py."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import naive

import iwsgd_ext as iw
from iwsgd_ext import functional as F

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FORMS = {"element": F.dropout, "channel": F.dropout2d, "row": F.drop_path}
P = 0.3  # neither a power of two nor a multiple of 1/65536: its rounded form and its scale show


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal to the bit (so -0 is not 0), any NaN equal to any other."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    got, nan = got.detach().cpu(), want.isnan()
    assert torch.equal(got.isnan(), nan)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[want.element_size()]
    bits = [torch.where(nan, torch.zeros_like(v), v).contiguous().view(integer) for v in (got, want)]
    assert torch.equal(*bits)


def check(x: torch.Tensor, p: float = P, unit: str = "element", form=None, **address) -> torch.Tensor:
    y = (form or FORMS[unit])(x, p, **address)
    ints = {k: v.item() if isinstance(v, torch.Tensor) and k != "sample_ids" else v for k, v in address.items()}
    assert_same_bits(y, naive.naive_noise(x, p, unit=unit, **ints))
    return y


SIZES = [
    pytest.param((3, 1), id="one-element"),
    pytest.param((5, 7), id="less-than-a-group"),
    pytest.param((4, 63), id="one-less-than-a-word-of-bits"),
    pytest.param((2, 64), id="one-word-of-bits"),
    pytest.param((3, 5, 13), id="one-more-than-a-word"),
    pytest.param((3, 500), id="odd-500"),
    pytest.param((2, 1000), id="odd-1000"),
    pytest.param((2, 4097), id="one-more-than-a-chunk"),
    pytest.param((1, 3, 50, 57), id="image-8550"),
    pytest.param((3, 20011), id="many-chunks-and-threads"),
]
SAMPLES = [pytest.param(1, id="S1"), pytest.param(3, id="S3"), pytest.param(9, id="S9-more-than-side-by-side")]


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("samples", SAMPLES)
class TestSizes:
    def test_expanding(self, device, backend, shape, samples):
        check(torch.randn(shape, device=device), samples=samples, seed=11, stream=3)

    def test_expanded(self, device, backend, shape, samples):
        check(torch.randn(samples * shape[0], *shape[1:], device=device), samples=samples, seed=-11, stream=4, expand=False)


LAYOUTS = [
    pytest.param(lambda d: torch.randn(3, 6, 5, 7, device=d).to(memory_format=torch.channels_last), 0, id="channels_last"),
    pytest.param(lambda d: torch.randn(2, 5, 3, 4, 3, device=d).to(memory_format=torch.channels_last_3d), 0, id="channels_last_3d"),
    pytest.param(lambda d: torch.randn(3, 63, 9, 8, device=d).to(memory_format=torch.channels_last), 0, id="channels_last-long"),
    pytest.param(lambda d: torch.randn(3, 1, 5, 7, device=d).to(memory_format=torch.channels_last), 0, id="both-orders"),
    pytest.param(lambda d: torch.randn(3, 6, 5, 7, device=d).to(memory_format=torch.channels_last), 1, id="channels_last-batch_dim1"),
    pytest.param(lambda d: torch.randn(7, 5, 6, 3, device=d).transpose(0, 3), 0, id="transposed"),
    pytest.param(lambda d: torch.randn(5, 130, device=d)[:, ::2], 0, id="strided"),
    pytest.param(lambda d: torch.randn(4, 1, 70, device=d).expand(4, 3, 70), 0, id="broadcast"),
    pytest.param(lambda d: torch.randn(9, device=d)[1:], 0, id="no-features-odd-storage-offset"),
    pytest.param(lambda d: torch.randn(700, device=d)[1:631].view(3, 210), 0, id="odd-storage-offset"),
    pytest.param(lambda d: torch.randn(5, 3, 13, device=d), 1, id="time-major-13-inner"),
    pytest.param(lambda d: torch.randn(9, 3, 100, device=d), 1, id="time-major-100-inner"),
    pytest.param(lambda d: torch.randn(2, 3, 5001, device=d), 1, id="time-major-chunks"),
    pytest.param(lambda d: torch.randn(33, 2, device=d), 1, id="rows-innermost"),
    pytest.param(lambda d: torch.randn(4, 3, 5, 6, device=d), 2, id="rows-third"),
    pytest.param(lambda d: torch.randn(4, 3, 5, 6, device=d).transpose(0, 1), -2, id="rows-third-from-the-end"),
    pytest.param(lambda d: torch.randn(0, 7, device=d), 0, id="no-examples"),
    pytest.param(lambda d: torch.randn(3, 0, 5, device=d), 0, id="no-elements"),
    pytest.param(lambda d: torch.randn(0, 3, device=d), 1, id="no-time-steps"),
]


@pytest.mark.parametrize(("make", "batch_dim"), LAYOUTS)
class TestLayouts:
    def test_expanding(self, device, backend, make, batch_dim):
        x = make(device)
        check(x, samples=2, seed=5, batch_dim=batch_dim % x.dim())
        assert_same_bits(
            F.dropout(x, P, samples=2, seed=5, batch_dim=batch_dim), F.dropout(x, P, samples=2, seed=5, batch_dim=batch_dim % x.dim())
        )

    def test_expanded(self, device, backend, make, batch_dim):
        x = make(device)
        x = x.movedim(batch_dim, 0)
        x = torch.cat([x, x + 1, x + 2]).movedim(0, batch_dim)
        check(x, samples=3, seed=5, expand=False, batch_dim=batch_dim % x.dim())

    def test_rows(self, device, backend, make, batch_dim):
        x = make(device)
        check(x, unit="row", samples=5, seed=6, batch_dim=batch_dim % x.dim())

    def test_result_keeps_channels_last(self, device, backend, make, batch_dim):
        x = make(device)
        y = F.dropout(x, P, samples=2, seed=5, batch_dim=batch_dim)
        assert naive.in_channels_last_order(y) == naive.in_channels_last_order(x)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["dense", "channels_last"])
@pytest.mark.parametrize("shape", [(3, 5, 3, 5), (2, 63, 9, 7), (2, 9, 63, 67), (1, 500, 1, 1)], ids=str)
def test_channels(device, backend, shape, memory_format):
    """Channels that are shorter and longer than a word of bits and than a chunk."""
    x = torch.randn(shape, device=device).to(memory_format=memory_format)
    check(x, 0.5, unit="channel", samples=3, seed=1)
    check(torch.cat([x] * 3).contiguous(memory_format=memory_format), 0.5, unit="channel", samples=3, seed=1, expand=False)


def test_channels_of_other_dimensions(device, backend):
    check(torch.randn(3, 6, 11, device=device), unit="channel", form=F.dropout1d, samples=2, seed=1)
    x = torch.randn(3, 6, 2, 3, 4, device=device)
    check(x, unit="channel", form=F.dropout3d, samples=2, seed=1)
    check(x.to(memory_format=torch.channels_last_3d), unit="channel", form=F.dropout3d, samples=2, seed=1)
    check(torch.randn(6, 3, 11, device=device), unit="channel", form=F.dropout1d, samples=2, seed=1, batch_dim=1)


BIG = 2**32
ADDRESSES = [
    pytest.param({"seed": 2**64 - 1}, id="seed-all-ones"),
    pytest.param({"seed": -(2**63)}, id="seed-smallest"),
    pytest.param({"seed": 2**32}, id="seed-high-word"),
    pytest.param({"seed": 1, "stream": BIG - 1}, id="stream-last"),
    pytest.param({"seed": 1, "stream": BIG + 5}, id="stream-wraps"),
    pytest.param({"seed": 1, "stream": -1}, id="stream-negative"),
    pytest.param({"seed": 1, "first_example": BIG - 2}, id="examples-wrap-inside-the-batch"),
    pytest.param({"seed": 1, "first_example": 3 * BIG + 7}, id="first_example-wraps"),
    pytest.param({"seed": 1, "first_example": -3}, id="first_example-negative"),
    pytest.param({"seed": 1, "sample_ids": [7, 0, 7]}, id="ids-repeated"),
    pytest.param({"seed": 1, "sample_ids": [BIG - 1, BIG + 4, -2]}, id="ids-wrap"),
    pytest.param({"seed": 1, "sample_ids": torch.tensor([5, 3, 1])}, id="ids-tensor"),
    pytest.param({"seed": 1, "sample_ids": torch.arange(10)[::4]}, id="ids-strided"),
    pytest.param({"seed": 1, "sample_ids": torch.randint(0, 50, (3, 4), generator=torch.Generator().manual_seed(0))}, id="ids-per-example"),
    pytest.param({"seed": 1, "sample_ids": torch.arange(12).view(4, 3).t()}, id="ids-per-example-transposed"),
    pytest.param({"seed": torch.tensor(-4), "stream": torch.tensor([BIG - 1]), "first_example": torch.tensor(BIG - 1)}, id="tensors"),
    pytest.param({"seed": 3, "stream": torch.tensor(2), "first_example": 5}, id="ints-and-tensors"),
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses(device, backend, address):
    x = torch.randn(4, 77, device=device)
    check(x, samples=3, **address)
    check(torch.cat([x, -x, 2 * x]), samples=3, expand=False, **address)


@pytest.mark.parametrize("unit", FORMS)
def test_splitting_the_batch_and_the_samples_changes_nothing(device, backend, unit):
    """One call draws what parts of the batch, chunks of the samples, and single samples draw."""
    x = torch.randn(5, 9, 3, 7, device=device)
    form = partial(FORMS[unit], p=P, seed=8, stream=2)
    whole = form(x, samples=7).unflatten(0, (7, 5))
    parts = torch.cat([form(x[:2], samples=7).unflatten(0, (7, 2)), form(x[2:], samples=7, first_example=2).unflatten(0, (7, 3))], 1)
    assert torch.equal(parts, whole)
    chunks = torch.cat([form(x, samples=4), form(x, samples=3, sample_ids=[4, 5, 6])]).unflatten(0, (7, 5))
    assert torch.equal(chunks, whole)
    assert torch.equal(form(x, samples=1, sample_ids=[5]), whole[5])
    chosen = torch.tensor([[3, 1, 0, 6, 2]])
    assert torch.equal(form(x, samples=1, sample_ids=chosen), torch.stack([whole[s, b] for b, s in enumerate(chosen[0].tolist())]))


@pytest.mark.slow
@pytest.mark.parametrize("form", [F.dropout, F.alpha_dropout], ids=["dropout", "alpha"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_output_larger_than_caches(device, backend, dtype, form):
    """Outputs that go past the caches on their way to memory are those of the batch's parts, which do not, bit for bit."""
    if backend == "reference" and dtype != torch.float32:
        pytest.skip("one type shows that the parts make up the whole")
    samples, features = 9, 5000  # rows begin at the start of a line, or within one
    batch = 97 * 2**20 // (samples * features * dtype.itemsize)
    x = torch.randn(batch, features, device=device).to(dtype)
    whole = form(x, P, samples=samples, seed=3).view(samples, batch, features)
    for first in range(0, batch, 100):
        part = form(x[first : first + 100], P, samples=samples, seed=3, first_example=first)
        assert torch.equal(whole[:, first : first + 100].flatten(0, 1), part), first


def test_time_major_draws_what_batch_first_draws(device, backend):
    x = torch.randn(6, 5, 9, device=device)
    batch_first = F.dropout(x.transpose(0, 1).contiguous(), P, samples=3, seed=4)
    assert torch.equal(F.dropout(x, P, samples=3, seed=4, batch_dim=1), batch_first.transpose(0, 1))


def test_flattened_positions_are_examples_of_their_own(device, backend):
    """[B*T, F] has example b*T + t: a part of such a batch takes first_example * T."""
    x = torch.randn(4, 5, 9, device=device)
    whole = F.dropout(x.flatten(0, 1), P, samples=2, seed=4).unflatten(0, (2, 4, 5))
    part = F.dropout(x[3:].flatten(0, 1), P, samples=2, seed=4, first_example=3 * 5).unflatten(0, (2, 1, 5))
    assert torch.equal(part, whole[:, 3:])
    assert not torch.equal(whole, F.dropout(x, P, samples=2, seed=4).unflatten(0, (2, 4)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestValues:
    @pytest.mark.parametrize("p", [2**-16, 0.1, 0.3, 0.5, 0.7, 1 - 2**-16])
    def test_one_rounding(self, device, backend, dtype, p):
        """9% of elements were wrong where a compiler turned the selection round; every scale, whole vectors and tails."""
        for n in (1, 17, 64, 500, 4999):
            check((torch.randn(3, n, device=device) * 3).to(dtype), p, samples=3, seed=n)
            check((torch.randn(9, n, device=device) * 3).to(dtype), p, samples=3, seed=n, expand=False)

    def test_special_values(self, device, backend, dtype):
        """Dropped NaN, inf and -x become +0; kept ones stay what they are, large ones overflow, small ones stay denormal."""
        special = [float("nan"), float("inf"), -float("inf"), torch.finfo(dtype).max, -torch.finfo(dtype).max, -0.0, 0.0, -1.0]
        special += [torch.finfo(dtype).tiny, torch.finfo(dtype).tiny / 4]
        x = torch.tensor(special * 53, dtype=torch.float64).to(dtype).to(device)[None]
        y = check(x, 0.5, samples=4, seed=2)
        assert torch.isnan(y).any()
        check(torch.cat([x] * 4), 0.5, samples=4, seed=2, expand=False)
        check(x.view(1, 10, 53, 1), 0.5, unit="channel", samples=4, seed=2)

    def test_p_zero_is_the_identity(self, device, backend, dtype):
        x = torch.tensor([[float("nan"), -0.0, 1.5, float("inf")]], dtype=dtype, device=device)
        assert_same_bits(F.dropout(x, 0.0, samples=3, seed=0), torch.cat([x] * 3).cpu())
        assert_same_bits(F.dropout(x, 0.0, samples=1, seed=0), x.cpu())
        assert_same_bits(F.dropout(x, 2**-18, samples=2, seed=0), torch.cat([x] * 2).cpu())

    def test_p_one_gives_zeros(self, device, backend, dtype):
        x = torch.tensor([[float("nan"), -0.0, 1.5, -float("inf")] * 20], dtype=dtype, device=device, requires_grad=True)
        for p in (1.0, 1 - 2**-18):
            for unit, shape in (("element", (1, 80)), ("row", (1, 80)), ("channel", (1, 4, 4, 5))):
                y = FORMS[unit](x.view(shape), p, samples=3, seed=0)
                assert_same_bits(y, torch.zeros_like(y).cpu())
                (dx,) = torch.autograd.grad(y, x, torch.full_like(y, float("inf")))
                assert_same_bits(dx, torch.zeros_like(x).cpu())


def test_p_is_rounded_to_16_bits(device, backend):
    """A kept element of ones is 1/(1 - effective p): within 2^-17 of p, a multiple of 2^-16."""
    x = torch.ones(4096, 1, dtype=torch.float64, device=device)
    for p in [i / 50 for i in range(1, 50)] + [2**-17, 3 * 2**-17, 1 / 3, 1e-4]:
        scale = F.dropout(x, p, seed=1).max().item()
        effective = 1 - 1 / scale
        assert abs(effective - p) <= 2**-17 + 1e-12
        assert abs(effective * 65536 - round(effective * 65536)) < 1e-6


class TestOut:
    @pytest.mark.parametrize(("make", "batch_dim"), LAYOUTS)
    def test_result_is_written(self, device, backend, make, batch_dim):
        x = make(device)
        want = F.dropout(x, P, samples=3, seed=3, batch_dim=batch_dim)
        order = torch.contiguous_format
        if naive.in_channels_last_order(x):
            order = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        out = torch.empty(want.shape, device=device, memory_format=order)
        version = out._version
        assert F.dropout(x, P, samples=3, seed=3, batch_dim=batch_dim, out=out) is out
        assert_same_bits(out, want.cpu())
        assert out._version > version

    @pytest.mark.parametrize("p", [0.0, 1.0])
    def test_ends_of_p(self, device, backend, p):
        x, out = torch.randn(3, 63, device=device), torch.empty(3, 63, device=device)
        F.dropout(x, p, seed=3, out=out)
        assert torch.equal(out, x * (1 - p))

    def test_bad(self, device, backend):
        x = torch.randn(3, 6, 4, 5, device=device)
        call = partial(F.dropout, samples=2, seed=0)
        with pytest.raises(ValueError, match="out: expected a call that needs no gradient"):
            call(x.clone().requires_grad_(), out=torch.empty(6, 6, 4, 5, device=device))
        with pytest.raises(ValueError, match=r"out: expected \[6, 6, 4, 5\] torch.float32 .*, got \[3, 6, 4, 5\]"):
            call(x, out=torch.empty_like(x))
        with pytest.raises(ValueError, match=r"out: expected .*float32.*, got .*float64"):
            call(x, out=torch.empty(6, 6, 4, 5, device=device, dtype=torch.float64))
        with pytest.raises(ValueError, match="out: expected a tensor that is contiguous"):
            call(x, out=torch.empty(6, 6, 4, 10, device=device)[..., ::2])
        with pytest.raises(ValueError, match="out: expected a tensor that is channels_last"):
            call(x.to(memory_format=torch.channels_last), out=torch.empty(6, 6, 4, 5, device=device))


@pytest.mark.skipif("IWSGD_ISA" not in os.environ, reason="for the next test")
def test_instruction_set_in_use():
    assert iw.backend_info()["build"]["isa"] == os.environ["IWSGD_ISA"]


WITH_ISA = (
    "test_instruction_set_in_use or cpu-native and (TestSizes or TestLayouts or TestValues or test_channels or test_rates or test_alpha)"
)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """Values and layouts of the native backend, again, on each instruction set: a process chooses one for good."""
    build = iw.backend_info()["build"]
    if not isinstance(build, dict) or isa not in build["machine_isas"]:
        pytest.skip(f"no {isa} here")
    environment = {**os.environ, "IWSGD_ISA": isa, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        WITH_ISA,
        __file__,
        str(Path(__file__).with_name("test_noise_laws.py")),
    ]
    run = subprocess.run(command, env=environment, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]


@given(st.data())
def test_any_call(device, backend, data):
    """Shapes, layouts, units, addresses and probabilities together."""
    dim = data.draw(st.integers(1, 5), "dim")
    shape = data.draw(st.lists(st.integers(0, 9), min_size=dim, max_size=dim).map(tuple), "shape")
    batch_dim = data.draw(st.integers(0, dim - 1), "batch_dim")
    order = data.draw(st.permutations(range(dim)), "order")
    samples = data.draw(st.integers(1, 4), "samples")
    unit = data.draw(st.sampled_from(["element", "row"] + (["channel"] if dim == 4 else [])), "unit")
    expand = data.draw(st.booleans(), "expand")
    if not expand:
        shape = (*shape[:batch_dim], shape[batch_dim] * samples, *shape[batch_dim + 1 :])
    x = torch.randn([shape[d] for d in order], device=device).permute([order.index(d) for d in range(dim)])
    check(
        x.to(data.draw(st.sampled_from(DTYPES), "dtype")),
        data.draw(st.floats(0, 1), "p"),
        unit,
        samples=samples,
        seed=data.draw(st.integers(-(2**63), 2**64 - 1), "seed"),
        stream=data.draw(st.integers(0, 2**33), "stream"),
        first_example=data.draw(st.integers(0, 2**33), "first_example"),
        sample_ids=data.draw(st.lists(st.integers(0, 2**33), min_size=samples, max_size=samples), "sample_ids"),
        expand=expand,
        batch_dim=batch_dim,
    )


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads):
    """Work is cut by chunks of examples, whatever the threads that take them: outputs and gradients are the same bits."""
    forms = {
        "dropout": lambda x: F.dropout(x, 0.3, samples=4, seed=5),
        "channels": lambda x: F.dropout1d(x[:, :, None].expand(-1, -1, 3), 0.3, samples=4, seed=5),
        "rates": lambda x: F.dropout(x, torch.linspace(0, 1, 5001), samples=4, seed=5),
        "alpha": lambda x: F.alpha_dropout(x, 0.3, samples=4, seed=5),
        "gaussian": lambda x: F.gaussian_dropout(x, 0.3, samples=4, seed=5),
        "multinomial": lambda x: F.multinomial_dropout(x, None, 2000, samples=4, seed=5),
    }
    x = torch.randn(23, 5001, requires_grad=True)
    before = torch.get_num_threads()
    try:
        for name, form in forms.items():
            results = []
            for n in (1, threads):
                torch.set_num_threads(n)
                y = form(x)
                results.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), name
    finally:
        torch.set_num_threads(before)
