"""Multinomial dropout: counts to the unit against naive.py on every backend, their law, gradients, and behaviour under compilers.

Statistical bounds are six standard deviations: 2e-9 a comparison, less than 1e-6 in all.
"""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from oracle import naive
from torch._dynamo.testing import CompileCounterWithBackend

import iwsgd_ext as iw
from iwsgd_ext import functional as F
from iwsgd_ext.ops.multinomial import bounds_of, uniform_bounds

WORD = 2**32
SIGMAS = 6


def naive_bounds(probabilities: list[float] | None, features: int) -> list[int]:
    """Cumulative probabilities times 2^32, from Python's own integers."""
    if probabilities is None:
        return [-(-(f + 1) * WORD // features) for f in range(features)]
    largest = max(probabilities)
    total = list(itertools.accumulate(round(p / largest * 2.0 ** (52 - features.bit_length())) for p in probabilities))
    return [int(part / total[-1] * WORD) for part in total]


def naive_multinomial(x: torch.Tensor, probabilities, draws: int, **address) -> torch.Tensor:
    """x * n / (draws * q) in float64, one row after another."""
    batch_dim = address.get("batch_dim", 0)
    features = x.numel() // max(x.shape[batch_dim], 1)
    bounds = naive_bounds(probabilities, features)
    width = np.diff([0, *bounds])
    scale = np.where(width > 0, WORD / np.maximum(width, 1) / draws, 0.0)
    shape = [n for d, n in enumerate(x.shape) if d != batch_dim]
    rows = address.get("expand", True)
    samples, examples = address["samples"], x.shape[batch_dim] // (1 if rows else address["samples"])
    ids = address.get("sample_ids") or range(samples)
    factors = [
        naive.counts(address["seed"], address.get("stream", 0), ids[s], address.get("first_example", 0) + b, bounds, draws) * scale
        for s in range(samples)
        for b in range(examples)
    ]
    wide = x.detach().cpu().double()
    wide = torch.cat([wide] * samples, batch_dim) if rows else wide
    return wide * torch.from_numpy(np.stack(factors)).view(-1, *shape).movedim(0, batch_dim)


CASES = [
    pytest.param((4, 1), 3, None, 0, id="one-feature"),
    pytest.param((4, 7), 1, None, 0, id="one-draw"),
    pytest.param((4, 63), 31, None, 0, id="odd-63"),
    pytest.param((3, 500), 1001, None, 0, id="more-draws-than-features"),
    pytest.param((4, 5, 3), 8, None, 1, id="time-major"),
    pytest.param((2, 6, 5, 7), 100, None, 0, id="image"),
    pytest.param((3, 63), 40, "uneven", 0, id="uneven-63"),
    pytest.param((3, 16), 40, "zeros", 0, id="zeros"),
    pytest.param((6, 2, 9), 20, "uneven", 1, id="uneven-time-major"),
    pytest.param((4, 13000), 50, "uneven", 0, id="uneven-13000"),
]


def probabilities_of(kind: str | None, shape, batch_dim: int) -> torch.Tensor | None:
    if kind is None:
        return None
    inside = [n for d, n in enumerate(shape) if d != batch_dim]
    p = torch.rand(inside, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) ** 4
    return torch.where(torch.arange(p.numel()).view(inside) % 3 == 0, 0.0, p) if kind == "zeros" else p


@pytest.mark.parametrize(("shape", "draws", "kind", "batch_dim"), CASES)
@pytest.mark.parametrize("expand", [True, False], ids=["expand", "rows"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values(device, backend, shape, draws, kind, batch_dim, expand, dtype):
    """One rounding of each value; the counts are integers, so that a wrong one is seen."""
    samples, q = (3, probabilities_of(kind, shape, batch_dim))
    x = torch.randn(shape, device=device).to(dtype)
    x = x if expand else torch.cat([x] * samples, batch_dim)
    address = {"samples": samples, "seed": -7, "stream": 2, "first_example": 5, "expand": expand, "batch_dim": batch_dim}
    for sample_ids in (None, [4, 0, 2**32 - 1]):
        y = F.multinomial_dropout(x, q, draws, sample_ids=sample_ids, **address)
        want = naive_multinomial(x, None if q is None else q.flatten().tolist(), draws, sample_ids=sample_ids, **address)
        assert y.dtype == dtype
        assert y.shape == want.shape
        eps = torch.finfo(dtype).eps / 2 + 3 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        assert bool(((y.cpu().double() - want).abs() <= eps * want.abs()).all())


def test_zero_counts_are_zeros_whatever_x_holds(device, backend):
    x = torch.full((2, 8), float("inf"), device=device)
    y = F.multinomial_dropout(x, None, 3, samples=2, seed=0)
    assert set(y.unique().tolist()) == {0.0, float("inf")}


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (3, 0, 2)], ids=str)
def test_no_elements(device, backend, shape):
    x = torch.ones(shape, device=device, requires_grad=True)
    y = F.multinomial_dropout(x, None, 3, samples=2, seed=0)
    assert y.shape == (2 * shape[0], *shape[1:])
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_one_dimension(device, backend):
    """[B]: one feature, which is always drawn."""
    assert torch.equal(F.multinomial_dropout(torch.ones(3, device=device), None, 5, samples=2, seed=0), torch.ones(6, device=device))


def test_layouts(device, backend):
    """Features are counted in row-major order whatever the strides."""
    dense = torch.randn(3, 4, 5, 6, device=device)
    want = F.multinomial_dropout(dense, None, 50, samples=2, seed=1)
    transposed = dense.transpose(1, 3).contiguous().transpose(1, 3)
    for x in (dense.to(memory_format=torch.channels_last), transposed, torch.stack([dense, dense], -1)[..., 0]):
        assert torch.equal(F.multinomial_dropout(x, None, 50, samples=2, seed=1), want)
    moved = F.multinomial_dropout(dense.movedim(0, 2), None, 50, samples=2, seed=1, batch_dim=2)
    assert torch.equal(moved, want.movedim(0, 2))


def test_splitting_the_batch_and_the_samples_changes_nothing(device, backend):
    x = torch.randn(5, 63, device=device)
    form = partial(F.multinomial_dropout, probabilities=torch.rand(63), draws=30, seed=8, stream=2)
    whole = form(x, samples=7).unflatten(0, (7, 5))
    parts = torch.cat([form(x[:2], samples=7).unflatten(0, (7, 2)), form(x[2:], samples=7, first_example=2).unflatten(0, (7, 3))], 1)
    assert torch.equal(parts, whole)
    assert torch.equal(form(x, samples=1, sample_ids=[5]), whole[5])
    chosen = torch.tensor([[3, 1, 0, 6, 2]])
    assert torch.equal(form(x, samples=1, sample_ids=chosen), torch.stack([whole[s, b] for b, s in enumerate(chosen[0].tolist())]))


# ---- bounds ----


def test_bounds(device):
    for features in (1, 2, 3, 63, 500, 4096, 50257):
        want = naive_bounds(None, features)
        assert uniform_bounds(features, device).tolist() == want
        assert want[-1] == WORD
    for p in ([1.0], [0.0, 1.0, 0.0], [1e-30, 1.0], [3.0, 1.0, 2.0], [0.1] * 7, [5e-324, 1e308]):
        assert bounds_of(torch.tensor(p, dtype=torch.float64, device=device)).tolist() == naive_bounds(p, len(p))
    assert bounds_of(torch.tensor([1.0, 1.0, 2.0], device=device)).tolist() == [WORD // 4, WORD // 2, WORD]
    assert bounds_of(torch.zeros(2, 4, device=device)).tolist() == [[WORD // 4, WORD // 2, 3 * WORD // 4, WORD]] * 2
    large = torch.rand(100_000, device=device)
    bounds = bounds_of(large)
    assert bool((bounds.diff() >= 0).all())
    torch.testing.assert_close(bounds.double() / WORD, large.double().cumsum(0) / large.double().sum(), rtol=0, atol=1e-9)


# ---- law ----


def counts(device, features, draws, q=None, **address) -> torch.Tensor:
    """The counts n, float64 on the CPU, [rows, features]."""
    x = torch.ones(address.pop("rows", 4096), features, dtype=torch.float64, device=device)
    y = F.multinomial_dropout(x, q, draws, **{"seed": 0, **address}).cpu()
    share = torch.full((features,), 1 / features, dtype=torch.float64) if q is None else q.double() / q.double().sum()
    return y * draws * share


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "uneven"])
def test_moments(device, backend, uniform):
    """E n = k q, Var n = k q (1 - q), Cov(n_f, n_g) = -k q_f q_g: every feature and every pair; n sums up to k in each row."""
    features, draws = 6, 10
    q = None if uniform else torch.tensor([0.05, 0.1, 0.15, 0.2, 0.22, 0.28])
    p = torch.full((features,), 1 / features, dtype=torch.float64) if uniform else q.double() / q.double().sum()
    n = counts(device, features, draws, q, rows=20000)
    torch.testing.assert_close(n, n.round(), rtol=0, atol=1e-6)  # the share that bounds give is within 2^-31 of p
    assert n.sum(1).round().eq(draws).all()
    variance = draws * p * (1 - p)
    assert ((n.mean(0) - draws * p).abs() <= SIGMAS * (variance / len(n)) ** 0.5).all()
    centred = n - draws * p
    products = centred[:, :, None] * centred[:, None]
    want = torch.diag(draws * p) - draws * p[:, None] * p
    assert ((products.mean(0) - want).abs() <= SIGMAS * (products.var(0) / len(n)) ** 0.5).all()


def test_unbiased(device, backend):
    y = F.multinomial_dropout(torch.ones(64, 4000, dtype=torch.float64, device=device), None, 2000, samples=2, seed=3)
    assert torch.allclose(y.sum(1), torch.full_like(y[:, 0], 4000.0))
    assert ((y.unflatten(1, (40, 100)).mean((0, 2)) - 1).abs() <= SIGMAS * (4000 / 2000 / (128 * 100)) ** 0.5).all()


def test_independent_addresses(device, backend):
    """Counts of different samples, streams, examples and seeds do not go together."""
    features, draws = 400, 200
    address = [{"sample_ids": [1]}, {"stream": 1}, {"first_example": 4096}, {"seed": 1}, {}]
    drawn = [counts(device, features, draws, rows=512, **a) - draws / features for a in address]
    variance = draws / features * (1 - 1 / features)
    for one, other in itertools.combinations(drawn, 2):
        assert abs((one * other).mean().item()) <= SIGMAS * variance / one.numel() ** 0.5
    for step in (1, 3, 64):
        within = (drawn[0][:-step] * drawn[0][step:]).mean().item()
        assert abs(within) <= SIGMAS * variance / drawn[0][step:].numel() ** 0.5


# ---- gradients ----


@pytest.mark.parametrize("expand", [True, False])
def test_gradients(device, backend, expand):
    x = torch.randn(4, 3, 2, device=device, dtype=torch.float64, requires_grad=True)
    q = torch.rand(3, 2, device=device)
    form = partial(F.multinomial_dropout, probabilities=q, draws=5, samples=2, seed=2, expand=expand)
    y = form(x)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    ones = torch.ones_like(x)
    factor = naive_multinomial(ones, q.double().flatten().tolist(), 5, samples=2, seed=2, expand=expand)
    want = dy.cpu() * factor
    torch.testing.assert_close(dx.cpu(), want.unflatten(0, (2, 4)).sum(0) if expand else want, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda v: form(v).pow(2), x)
    assert torch.autograd.gradgradcheck(lambda v: form(v).pow(3), x)


def test_gradient_is_rounded_once(device, backend):
    """16-bit types: the sum over samples in float32."""
    x = torch.randn(4, 63, device=device).bfloat16().requires_grad_()
    y = F.multinomial_dropout(x, None, 100, samples=8, seed=2)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    terms = dy.cpu().double() * naive_multinomial(torch.ones(4, 63), None, 100, samples=8, seed=2)
    want, size = (t.unflatten(0, (8, 4)).sum(0) for t in (terms, terms.abs()))
    assert bool(((dx.cpu().double() - want).abs() <= 2**-8 * want.abs() + 1e-5 * size).all())


def test_kept_for_backward_is_the_address(device, backend):
    """Neither counts nor x: bounds of 8 bytes a feature, and the address."""
    saved = []
    x = torch.randn(100, 50, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        F.multinomial_dropout(x, None, 25, samples=4, seed=0)
    assert sum(t.untyped_storage().nbytes() for t in saved) == 50 * 8 + 24


@pytest.mark.parametrize("expand", [True, False])
def test_written_in_place_by_the_next_layer(device, backend, expand):
    x = torch.randn(4, 9, device=device, requires_grad=True)
    results = []
    for in_place in (False, True):
        y = torch.nn.functional.relu(F.multinomial_dropout(x, None, 5, samples=2, seed=1, expand=expand), inplace=in_place)
        results.append([y, *torch.autograd.grad(y.square().sum(), x)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_opcheck(device, backend):
    if backend == "reference":
        pytest.skip("the reference is plain torch")
    origin = torch.tensor([3, 0, 0], device=device)
    bounds = uniform_bounds(5, device)
    for ids, b in ((None, bounds), (torch.tensor([4, 2], device=device), torch.stack([bounds, bounds]))):
        torch.library.opcheck(torch.ops.iwsgd_ext.multinomial, (origin, ids, 2, 0, 1, 3, b, 7))


def test_meta_device_gives_shapes():
    origin, bounds = torch.empty(3, dtype=torch.int64, device="meta"), torch.empty(7, dtype=torch.int64, device="meta")
    n = torch.ops.iwsgd_ext.multinomial(origin, None, 2, 0, 0, 3, bounds, 5)
    assert n.shape == (2, 3, 7)
    assert n.dtype == torch.int32


def test_compiled_is_eager(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    q = torch.rand(63, device=device)

    def step(x, seed):
        y = F.multinomial_dropout(x * 2, q, 30, samples=3, seed=seed)
        return F.multinomial_dropout(y.sin(), None, 30, samples=3, seed=seed, stream=1, expand=False)

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for seed, batch in ((0, 5), (-7, 2), (2**40, 3)):
        x = torch.randn(batch, 63, device=device)
        torch._dynamo.mark_dynamic(x, 0)
        results = []
        for f in (step, compiled):
            leaf = x.clone().requires_grad_()
            torch._dynamo.mark_dynamic(leaf, 0)
            y = f(leaf, torch.tensor(seed, device=device))
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaf)))
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager, rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1


# ---- the layer ----


BAD = [
    (TypeError, "draws: expected an int, got float", {"draws": 2.0}),
    (ValueError, "draws: expected an integer in 1 .. .*, got 0", {"draws": 0}),
    (ValueError, "draws: expected an integer in 1 .. .*, got 2147483648", {"draws": 2**31}),
    (TypeError, "probabilities: expected a tensor or None, got list", {"probabilities": [0.5, 0.5, 0.0]}),
    (TypeError, "probabilities: expected a floating-point tensor, got torch.int64", {"probabilities": torch.ones(3, dtype=torch.int64)}),
    (ValueError, r"probabilities: expected the shape of one example, \(3,\), got \(4,\)", {"probabilities": torch.ones(4)}),
    (ValueError, "probabilities: expected finite numbers >= 0", {"probabilities": torch.tensor([1.0, -0.1, 1.0])}),
    (
        ValueError,
        "probabilities: expected finite numbers >= 0 that are not all 0",
        {"probabilities": torch.tensor([1.0, float("nan"), 1.0])},
    ),
    (
        ValueError,
        "probabilities: expected finite numbers >= 0 that are not all 0",
        {"probabilities": torch.tensor([1.0, float("inf"), 1.0])},
    ),
    (ValueError, "probabilities: expected finite numbers >= 0", {"probabilities": torch.zeros(3)}),
    (TypeError, "x: expected float32, .* or float16, got torch.int64", {"x": torch.ones(2, 3, dtype=torch.int64)}),
    (ValueError, "x: expected .*, got 0-D", {"x": torch.tensor(1.0)}),
    (ValueError, "samples: expected an integer >= 1, got 0", {"samples": 0}),
    (ValueError, "divisible by samples=4 where expand=False, got 6 rows", {"samples": 4, "expand": False}),
]


@pytest.mark.parametrize(("error", "message", "change"), BAD)
def test_bad_arguments(error, message, change):
    with pytest.raises(error, match=message):
        F.multinomial_dropout(**{"x": torch.ones(6, 3), "probabilities": None, "draws": 2, "samples": 2, "seed": 0, **change})


def test_bad_layers():
    with pytest.raises(ValueError, match=r"p: expected a probability in \[0, 1\), got 1.0"):
        iw.IWMultinomialDropout(1.0)
    with pytest.raises(ValueError, match="probabilities: expected a tensor, None or 'evolutional', got 'uniform'"):
        iw.IWMultinomialDropout(probabilities="uniform")
    with pytest.raises(ValueError, match="probabilities: expected finite numbers"):
        iw.IWMultinomialDropout(probabilities=torch.tensor([-1.0, 2.0]))
    with pytest.raises(ValueError, match=r"probabilities: expected the shape of one example, \(3,\), got \(2,\)"):
        iw.IWMultinomialDropout(probabilities=torch.ones(2))(torch.ones(4, 3))
    with pytest.raises(TypeError, match="input of IWMultinomialDropout: expected float32"):
        iw.IWMultinomialDropout()(torch.ones(4, 3, dtype=torch.int64))
