"""The op of real-valued noise at a given address, on every backend and instruction set, against the loops of naive.py."""

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
from iwsgd_ext.ops.address import Address, Place, make_origin
from iwsgd_ext.ops.real_noise import real_noise

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
P, STD = 0.3, (0.3 / 0.7) ** 0.5  # of Gaussian dropout, which has the same noise as all others
# name -> function of (x, std), law, whether it multiplies
FORMS = {
    "gaussian dropout": (lambda x, std, **address: F.gaussian_dropout(x, std**2 / (1 + std**2), **address), "normal", True),
    "gaussian": (F.gaussian_noise, "normal", False),
    "laplace factors": (partial(F.laplace_noise, multiply=True), "laplace", True),
    "laplace": (F.laplace_noise, "laplace", False),
    "uniform factors": (partial(F.uniform_noise, multiply=True), "uniform", True),
    "uniform": (F.uniform_noise, "uniform", False),
}
TOLERANCE = 5e-5  # of a number, on every backend


def assert_noise(y: torch.Tensor, x: torch.Tensor, form: str, std: float, **address) -> None:
    """y is x * (1 + std z), or x + std z, with z within TOLERANCE (1e-13 in float64), and two roundings of x's dtype's accumulation."""
    samples, expand, batch_dim = address["samples"], address.get("expand", True), address.get("batch_dim", 0)
    _, law, multiply = FORMS[form]
    z = naive.naive_numbers(x, law, **address)
    wide = x.detach().cpu().double()
    wide = torch.cat([wide] * samples, batch_dim) if expand else wide
    want = wide * (1 + std * z) if multiply else wide + std * z
    assert y.dtype == x.dtype
    assert y.shape == want.shape
    tolerance = 1e-13 if x.dtype == torch.float64 else TOLERANCE
    acc = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    noise = std * (wide.abs() if multiply else torch.ones_like(wide))
    bound = tolerance * noise + torch.finfo(x.dtype).eps / 2 * want.abs() + 4 * acc * (wide.abs() + noise * (1 + z.abs()))
    error = (y.detach().cpu().double() - want).abs()
    assert bool((error <= bound + torch.finfo(x.dtype).tiny).all()), f"{error.max()}, {(error / bound).max()} of what is allowed"


def check(x: torch.Tensor, form: str = "gaussian dropout", **address) -> torch.Tensor:
    y = FORMS[form][0](x, STD, **address)
    ints = {k: v.item() if isinstance(v, torch.Tensor) and k != "sample_ids" else v for k, v in address.items()}
    assert_noise(y, x, form, STD, **ints)
    return y


SIZES = [
    pytest.param((3, 1), id="one-element"),
    pytest.param((5, 3), id="less-than-a-group"),
    pytest.param((4, 31), id="one-less-than-a-block"),
    pytest.param((2, 32), id="one-block"),
    pytest.param((3, 3, 11), id="one-more-than-a-block"),
    pytest.param((3, 63), id="odd-63"),
    pytest.param((3, 500), id="odd-500"),
    pytest.param((2, 2049), id="one-more-than-a-chunk"),
    pytest.param((1, 3, 50, 57), id="image-8550"),
    pytest.param((3, 10007), id="many-chunks-and-threads"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SIZES)
class TestSizes:
    def test_expanding(self, device, backend, shape, form):
        for samples in (1, 3):
            check(torch.randn(shape, device=device), form, samples=samples, seed=11, stream=3)

    def test_expanded(self, device, backend, shape, form):
        check(torch.randn(3 * shape[0], *shape[1:], device=device), form, samples=3, seed=-11, stream=4, expand=False)


LAYOUTS = [
    pytest.param(lambda d: torch.randn(3, 6, 5, 7, device=d).to(memory_format=torch.channels_last), 0, id="channels_last"),
    pytest.param(lambda d: torch.randn(2, 5, 3, 4, 3, device=d).to(memory_format=torch.channels_last_3d), 0, id="channels_last_3d"),
    pytest.param(lambda d: torch.randn(3, 6, 5, 7, device=d).to(memory_format=torch.channels_last), 1, id="channels_last-batch_dim1"),
    pytest.param(lambda d: torch.randn(7, 5, 6, 3, device=d).transpose(0, 3), 0, id="transposed"),
    pytest.param(lambda d: torch.randn(5, 130, device=d)[:, ::2], 0, id="strided"),
    pytest.param(lambda d: torch.randn(4, 1, 70, device=d).expand(4, 3, 70), 0, id="broadcast"),
    pytest.param(lambda d: torch.randn(9, device=d)[1:], 0, id="no-features-odd-storage-offset"),
    pytest.param(lambda d: torch.randn(700, device=d)[1:631].view(3, 210), 0, id="odd-storage-offset"),
    pytest.param(lambda d: torch.randn(5, 3, 13, device=d), 1, id="time-major-13-inner"),
    pytest.param(lambda d: torch.randn(9, 3, 100, device=d), 1, id="time-major-100-inner"),
    pytest.param(lambda d: torch.randn(2, 3, 2501, device=d), 1, id="time-major-chunks"),
    pytest.param(lambda d: torch.randn(33, 2, device=d), 1, id="rows-innermost"),
    pytest.param(lambda d: torch.randn(4, 3, 5, 6, device=d), 2, id="rows-third"),
    pytest.param(lambda d: torch.randn(0, 7, device=d), 0, id="no-examples"),
    pytest.param(lambda d: torch.randn(3, 0, 5, device=d), 0, id="no-elements"),
    pytest.param(lambda d: torch.randn(0, 3, device=d), 1, id="no-time-steps"),
]


@pytest.mark.parametrize(("make", "batch_dim"), LAYOUTS)
class TestLayouts:
    def test_expanding(self, device, backend, make, batch_dim):
        x = make(device)
        y = check(x, samples=2, seed=5, batch_dim=batch_dim)
        assert torch.equal(y, F.gaussian_dropout(x, P, samples=2, seed=5, batch_dim=batch_dim - x.dim()))
        assert naive.in_channels_last_order(y) == naive.in_channels_last_order(x)

    def test_expanded(self, device, backend, make, batch_dim):
        x = make(device).movedim(batch_dim, 0)
        x = torch.cat([x, x + 1, x + 2]).movedim(0, batch_dim)
        check(x, "uniform", samples=3, seed=5, expand=False, batch_dim=batch_dim)


UNITS = [pytest.param((3, 5, 3, 5), id="short"), pytest.param((2, 63, 9, 7), id="63-channels"), pytest.param((1, 9, 63, 67), id="long")]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["dense", "channels_last"])
@pytest.mark.parametrize("shape", UNITS)
@pytest.mark.parametrize("unit", ["channel", "row"])
@pytest.mark.parametrize("batch_dim", [0, 2])
def test_units_that_share_a_draw(device, backend, shape, memory_format, unit, batch_dim):
    """Not offered by a layer, but what the op's positions and shares are for."""
    x = torch.randn(shape, device=device).to(memory_format=memory_format)
    address = Address(make_origin(3, 1, 0, torch.device(device)), None, 2, 2, 4)
    for form in ("gaussian dropout", "laplace factors", "uniform factors"):
        y = real_noise(x, FORMS[form][1], STD, True, Place(address, True, batch_dim), unit)
        assert_noise(y, x, form, STD, samples=2, batch_dim=batch_dim, seed=3, stream=3, first_example=4, unit=unit)


BIG = 2**32
ADDRESSES = [
    pytest.param({"seed": 2**64 - 1}, id="seed-all-ones"),
    pytest.param({"seed": 2**32}, id="seed-high-word"),
    pytest.param({"seed": 1, "stream": BIG - 1}, id="stream-last"),
    pytest.param({"seed": 1, "stream": -1}, id="stream-negative"),
    pytest.param({"seed": 1, "first_example": BIG - 2}, id="examples-wrap-inside-the-batch"),
    pytest.param({"seed": 1, "sample_ids": [7, 0, 7]}, id="ids-repeated"),
    pytest.param({"seed": 1, "sample_ids": [BIG - 1, BIG + 4, -2]}, id="ids-wrap"),
    pytest.param({"seed": 1, "sample_ids": torch.arange(12).view(4, 3).t()}, id="ids-per-example-transposed"),
    pytest.param({"seed": torch.tensor(-4), "stream": torch.tensor([BIG - 1]), "first_example": torch.tensor(BIG - 1)}, id="tensors"),
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses(device, backend, address):
    x = torch.randn(4, 77, device=device)
    check(x, samples=3, **address)
    check(torch.cat([x, -x, 2 * x]), "laplace", samples=3, expand=False, **address)


@pytest.mark.parametrize("form", FORMS)
def test_splitting_the_batch_and_the_samples_changes_nothing(device, backend, form):
    """One call draws what parts of the batch, chunks of the samples, and single samples draw, to the bit."""
    x = torch.randn(5, 9, 3, 7, device=device)
    form = partial(FORMS[form][0], std=STD, seed=8, stream=2)
    whole = form(x, samples=7).unflatten(0, (7, 5))
    parts = torch.cat([form(x[:2], samples=7).unflatten(0, (7, 2)), form(x[2:], samples=7, first_example=2).unflatten(0, (7, 3))], 1)
    assert torch.equal(parts, whole)
    chunks = torch.cat([form(x, samples=4), form(x, samples=3, sample_ids=[4, 5, 6])]).unflatten(0, (7, 5))
    assert torch.equal(chunks, whole)
    assert torch.equal(form(x, samples=1, sample_ids=[5]), whole[5])


def test_time_major_draws_what_batch_first_draws(device, backend):
    x = torch.randn(6, 5, 9, device=device)
    batch_first = F.gaussian_noise(x.transpose(0, 1).contiguous(), samples=3, seed=4)
    torch.testing.assert_close(F.gaussian_noise(x, samples=3, seed=4, batch_dim=1), batch_first.transpose(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
class TestValues:
    def test_rounding(self, device, backend, dtype, form):
        for n in (1, 17, 64, 500, 4999):
            check((torch.randn(3, n, device=device) * 3).to(dtype), form, samples=3, seed=n)
            check((torch.randn(9, n, device=device) * 3).to(dtype), form, samples=3, seed=n, expand=False)

    def test_no_noise_is_the_identity(self, device, backend, dtype, form):
        x = torch.tensor([[-0.0, 1.5, float("inf"), -2.0, 1.0]], dtype=dtype, device=device)
        for samples in (1, 3):
            assert torch.equal(FORMS[form][0](x, 0.0, samples=samples, seed=0), torch.cat([x] * samples))

    def test_special_values(self, device, backend, dtype, form):
        """NaN and infinities stay with their elements; what is finite stays finite."""
        x = torch.ones(1, 4000, dtype=dtype, device=device)
        x[:, 7::50], x[:, 9::50], x[:, 11::50] = float("nan"), float("inf"), 0.0
        y = FORMS[form][0](x, 1.0, samples=3, seed=2)
        assert torch.equal(y.isnan(), x.isnan().expand(3, -1))
        assert torch.equal(y.isinf(), x.isinf().expand(3, -1))


@pytest.mark.slow
def test_extreme_words(device, backend):
    """The largest and the smallest of 64 million numbers: right where a short formula gives an infinity, 0, or a coarse step. (Of 16
    million on the reference, which is slow, and has no short formula.)"""
    n = 1 << 22
    for seed in range(1 if backend == "reference" else 4):
        z = F.gaussian_noise(torch.zeros(4, n, device=device), seed=seed).cpu().double().numpy()
        assert abs(z).max() < 6.8
        for example in range(4):
            want = naive.normals(seed, 0, 0, example, n)
            assert abs(z[example] - want).max() <= TOLERANCE


@pytest.mark.skipif("IWSGD_ISA" not in os.environ, reason="for the next test")
def test_instruction_set_in_use():
    assert iw.backend_info()["build"]["isa"] == os.environ["IWSGD_ISA"]


WITH_ISA = "test_instruction_set_in_use or cpu-native and (TestSizes or TestLayouts or TestValues or test_units or test_extreme)"


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """Values and layouts of the native backend, again, on each instruction set: a process chooses one for good."""
    build = iw.backend_info()["build"]
    if not isinstance(build, dict) or isa not in build["machine_isas"]:
        pytest.skip(f"no {isa} here")
    environment = {**os.environ, "IWSGD_ISA": isa, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", WITH_ISA, __file__]
    run = subprocess.run(command, env=environment, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]


@given(st.data())
def test_any_call(device, backend, data):
    """Shapes, layouts, addresses and forms together."""
    dim = data.draw(st.integers(1, 5), "dim")
    shape = data.draw(st.lists(st.integers(0, 9), min_size=dim, max_size=dim).map(tuple), "shape")
    batch_dim = data.draw(st.integers(0, dim - 1), "batch_dim")
    order = data.draw(st.permutations(range(dim)), "order")
    samples = data.draw(st.integers(1, 4), "samples")
    expand = data.draw(st.booleans(), "expand")
    if not expand:
        shape = (*shape[:batch_dim], shape[batch_dim] * samples, *shape[batch_dim + 1 :])
    x = torch.randn([shape[d] for d in order], device=device).permute([order.index(d) for d in range(dim)])
    check(
        x.to(data.draw(st.sampled_from(DTYPES), "dtype")),
        data.draw(st.sampled_from(list(FORMS)), "form"),
        samples=samples,
        seed=data.draw(st.integers(-(2**63), 2**64 - 1), "seed"),
        stream=data.draw(st.integers(0, 2**33), "stream"),
        first_example=data.draw(st.integers(0, 2**33), "first_example"),
        sample_ids=data.draw(st.lists(st.integers(0, 2**33), min_size=samples, max_size=samples), "sample_ids"),
        expand=expand,
        batch_dim=batch_dim,
    )


LAYERS = [
    pytest.param(partial(iw.IWGaussianDropout, P), "gaussian dropout", id="IWGaussianDropout"),
    pytest.param(partial(iw.IWGaussianNoise, STD), "gaussian", id="IWGaussianNoise"),
    pytest.param(partial(iw.IWGaussianNoise, STD, multiply=True), "gaussian dropout", id="IWGaussianNoise-multiply"),
    pytest.param(partial(iw.IWLaplaceNoise, STD), "laplace", id="IWLaplaceNoise"),
    pytest.param(partial(iw.IWUniformNoise, STD, multiply=True), "uniform factors", id="IWUniformNoise-multiply"),
]


@pytest.mark.parametrize(("layer", "form"), LAYERS)
class TestLayers:
    def test_noise_of_a_context(self, device, backend, layer, form):
        """The first call expands, the second takes the next stream of expanded rows; eval draws none."""
        x = torch.randn(4, 63, device=device)
        with iw.sampling(3, seed=5, first_example=7) as context:
            assert layer().eval()(x) is x
            y = layer()(x)
            z = layer()(y)
        assert context.stream == 2
        assert_noise(y, x, form, STD, samples=3, seed=5, first_example=7)
        assert_noise(z, y, form, STD, samples=3, seed=5, first_example=7, stream=1, expand=False)

    def test_alone_is_one_fresh_sample(self, device, backend, layer, form):
        x = torch.ones(4, 63, device=device)
        torch.manual_seed(3)
        one, other = layer()(x), layer()(x)
        torch.manual_seed(3)
        assert torch.equal(layer()(x), one)
        assert one.shape == x.shape
        assert not torch.equal(one, other)

    def test_batch_dim(self, device, backend, layer, form):
        x = torch.randn(6, 4, 9, device=device)
        with iw.sampling(3, seed=5):
            y = layer(batch_dim=1)(x)
        assert_noise(y, x, form, STD, samples=3, seed=5, batch_dim=1)

    def test_state_and_repr(self, layer, form):
        assert not layer().state_dict()
        assert not list(layer().parameters())
        name = layer.func.__name__
        more = ", multiply=True" if "multiply" in layer.keywords else ""
        assert repr(layer()) == (f"{name}(p=0.3)" if name == "IWGaussianDropout" else f"{name}(std={STD}{more})")
        assert repr(layer(batch_dim=1)).endswith(", batch_dim=1)")

    def test_bad_input(self, layer, form):
        name = layer.func.__name__
        with pytest.raises(TypeError, match=f"input of {name}: expected float32, .*, got torch.int64"):
            layer()(torch.ones(3, 4, dtype=torch.int64))
        with pytest.raises(ValueError, match=f"input of {name}: expected at least one dimension"):
            layer()(torch.tensor(1.0))


BAD = [
    (iw.IWGaussianDropout, 1.0, ValueError, r"p: expected a probability in \[0, 1\), got 1.0"),
    (iw.IWGaussianDropout, -0.1, ValueError, r"p: expected a probability in \[0, 1\], got -0.1"),
    (iw.IWGaussianDropout, float("nan"), ValueError, r"p: expected a probability in \[0, 1\], got nan"),
    (iw.IWGaussianDropout, "0.5", TypeError, "p: expected a number"),
    (iw.IWGaussianNoise, -1.0, ValueError, "std: expected a finite number >= 0, got -1.0"),
    (iw.IWGaussianNoise, float("inf"), ValueError, "std: expected a finite number >= 0, got inf"),
    (iw.IWGaussianNoise, float("nan"), ValueError, "std: expected a finite number >= 0, got nan"),
    (iw.IWGaussianNoise, None, TypeError, "std: expected a number, got NoneType"),
    (iw.IWLaplaceNoise, -1.0, ValueError, "std: expected a finite number >= 0, got -1.0"),
    (iw.IWUniformNoise, float("inf"), ValueError, "std: expected a finite number >= 0, got inf"),
]


@pytest.mark.parametrize(("layer", "value", "error", "message"), BAD)
def test_bad_noise(layer, value, error, message):
    forms = {iw.IWGaussianDropout: F.gaussian_dropout, iw.IWLaplaceNoise: F.laplace_noise, iw.IWUniformNoise: F.uniform_noise}
    form = forms.get(layer, F.gaussian_noise)
    for call in (layer, lambda v: form(torch.ones(2, 3), v, seed=0)):
        with pytest.raises(error, match=message):
            call(value)


@pytest.mark.parametrize("value", ["no", None, 1])
def test_bad_multiply(value):
    for call in (iw.IWLaplaceNoise, lambda std, multiply: F.uniform_noise(torch.ones(2, 3), std, multiply=multiply, seed=0)):
        with pytest.raises(TypeError, match="multiply: expected True or False, got"):
            call(0.5, multiply=value)


BAD_ARGUMENTS = [
    (TypeError, "x: expected float32, .* or float16, got torch.int64", {"x": torch.ones(2, 3, dtype=torch.int64)}),
    (ValueError, "x: expected .*, got 0-D", {"x": torch.tensor(1.0)}),
    (ValueError, "samples: expected an integer >= 1, got 0", {"samples": 0}),
    (TypeError, "seed: expected an int or an int64 tensor of one element, got float", {"seed": 1.0}),
    (ValueError, r"batch_dim: expected a dimension of x in \[-2, 2\), got 2", {"batch_dim": 2}),
    (ValueError, "divisible by samples=4 where expand=False, got 6 rows", {"samples": 4, "expand": False}),
    (ValueError, r"sample_ids: expected \[2, 6\], got \(2, 5\)", {"sample_ids": torch.ones(2, 5, dtype=torch.int64)}),
]


@pytest.mark.parametrize(("error", "message", "change"), BAD_ARGUMENTS)
@pytest.mark.parametrize("form", FORMS)
def test_bad_arguments(form, error, message, change):
    with pytest.raises(error, match=message):
        FORMS[form][0](**{"x": torch.ones(6, 3), "std": 0.5, "samples": 2, "seed": 0, **change})
