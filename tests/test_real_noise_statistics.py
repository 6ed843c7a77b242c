"""Real-valued noise as random numbers. Bounds are six standard deviations: 2e-9 a comparison, less than 1e-5 in all of this file."""

import itertools
import math

import pytest
import torch

from iwsgd_ext import functional as F

SIGMAS = 6
ROOT = 2**0.5


def tail_of_laplace(z: torch.Tensor) -> torch.Tensor:
    return 0.5 * torch.exp(-ROOT * z)


# law -> function, moments 1, 2, 3, 4, 6, 8 and 12, distribution function
LAWS = {
    "normal": (F.gaussian_noise, (0, 1, 0, 3, 15, 105, 10395), torch.special.ndtr),
    "laplace": (
        F.laplace_noise,
        (0, 1, 0, *(math.factorial(n) / 2 ** (n // 2) for n in (4, 6, 8, 12))),
        lambda z: torch.where(z < 0, tail_of_laplace(-z), 1 - tail_of_laplace(z)),
    ),
    "uniform": (F.uniform_noise, (0, 1, 0, *(3 ** (n // 2) / (n + 1) for n in (4, 6, 8, 12))), lambda z: (z / 3**0.5 + 1) / 2),
}
of_each_law = pytest.mark.parametrize("law", LAWS)


def numbers(device, rows=64, columns=4001, law="normal", **address) -> torch.Tensor:
    """Numbers of a law, float64 on the CPU."""
    return LAWS[law][0](torch.zeros(rows, columns, device=device), **{"seed": 0, **address}).cpu().double()


def assert_mean(values: torch.Tensor, mean: float, variance: float) -> None:
    assert abs(values.mean().item() - mean) <= SIGMAS * (variance / values.numel()) ** 0.5


def assert_independent(a: torch.Tensor, b: torch.Tensor, law: str = "normal") -> None:
    """Neither the numbers nor their squares go together: the products of a pair are 0 and 1 on average."""
    assert_mean(a * b, 0, 1)
    assert_mean((a.square() - 1) * (b.square() - 1), 0, (LAWS[law][1][3] - 1) ** 2)


@of_each_law
def test_moments(device, backend, law):
    """Moments 1, 2, 3, 4 and 6, whose means vary by the moments of twice that number."""
    one, two, three, four, six, eight, twelve = LAWS[law][1]
    for seed in range(8):
        z = numbers(device, law=law, seed=seed)
        powers = ((1, one, two), (2, two, four - two**2), (3, three, six), (4, four, eight - four**2), (6, six, twelve - six**2))
        for power, mean, variance in powers:
            assert_mean(z**power, mean, variance)


@of_each_law
def test_distribution_function(device, backend, law):
    """The largest distance from the law's distribution function: beyond 3.2 / sqrt(n) in 3e-9 of all trials (Massart's bound)."""
    z = numbers(device, law=law).flatten().sort().values
    n = z.numel()
    cdf = LAWS[law][2](z)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    assert torch.maximum((cdf - steps[:-1]).abs().max(), (steps[1:] - cdf).abs().max()) <= 3.2 / math.sqrt(n)


@pytest.mark.parametrize("law", ["normal", "laplace"])
def test_tails(device, backend, law):
    """As many numbers beyond 3, 4 and -4 as there should be."""
    z = numbers(device, rows=256, law=law)
    for limit in (3.0, 4.0):
        tail = LAWS[law][2](torch.tensor(-limit, dtype=torch.float64)).item()
        for beyond in (z > limit, z < -limit):
            assert abs(beyond.double().mean().item() - tail) <= SIGMAS * (tail / z.numel()) ** 0.5


@of_each_law
def test_each_position_has_the_law(device, backend, law):
    """No element of a group and no example is favoured: 4096 draws of each of 64 positions."""
    z = numbers(device, rows=4096, columns=64, law=law)
    assert (z.mean(0).abs() <= SIGMAS * 4096**-0.5).all()
    assert ((z.square().mean(0) - 1).abs() <= SIGMAS * ((LAWS[law][1][3] - 1) / 4096) ** 0.5).all()


def test_independent_addresses(device, backend):
    """Samples, streams, examples, seeds: each step of powers of two."""
    base = numbers(device, rows=16)
    for step in (1, 2, 16, 256, 65536, 2**31):
        for address in ({"sample_ids": [step]}, {"stream": step}, {"first_example": step}, {"seed": step}):
            assert_independent(base, numbers(device, rows=16, **address))
    assert_independent(base, numbers(device, rows=16, seed=2**32))


@of_each_law
def test_independent_neighbours(device, backend, law):
    """Elements of one pair, of one group, of neighbouring groups, far apart."""
    z = numbers(device, law=law)
    for step in (1, 2, 3, 4, 5, 8, 16, 64, 2048):
        assert_independent(z[:, :-step], z[:, step:], law)


def test_pairs_of_samples_of_one_call(device, backend):
    z = F.gaussian_noise(torch.zeros(4, 4001, device=device), samples=8, seed=1).cpu().double().unflatten(0, (8, 4))
    for one, other in itertools.combinations(range(8), 2):
        assert_independent(z[one], z[other])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_gaussian_dropout_has_the_moments_of_dropout(device, backend, p):
    """Mean 1 and variance p / (1 - p)."""
    y = F.gaussian_dropout(torch.ones(64, 4001, device=device), p, seed=3).cpu().double()
    variance = p / (1 - p)
    assert_mean(y, 1, variance)
    assert_mean((y - 1).square(), variance, 2 * variance**2)
