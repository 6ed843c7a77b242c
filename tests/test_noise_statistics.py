"""The noise as random numbers: rates and independence. Bounds are six standard deviations: 2e-9 a comparison, less than 1e-6 in all."""

import itertools

import pytest
import torch

from iwsgd_ext import functional as F

SIGMAS = 6


def kept(device, p, rows=64, columns=4001, **address) -> torch.Tensor:
    return F.dropout(torch.ones(rows, columns, device=device), p, **{"samples": 1, "seed": 0, **address}) != 0


def assert_independent(a: torch.Tensor, b: torch.Tensor, p: float = 0.5) -> None:
    """Two masks agree as often as independent ones of the same rate: p^2 + (1-p)^2."""
    agree = p * p + (1 - p) * (1 - p)
    n = a.numel()
    assert abs((a == b).double().mean().item() - agree) <= SIGMAS * (agree * (1 - agree) / n) ** 0.5


@pytest.mark.parametrize("p", [0.001, 0.1, 0.3, 0.5, 0.9])
def test_keep_rate(device, backend, p):
    for seed in range(8):
        mask = kept(device, p, seed=seed)
        assert abs(mask.double().mean().item() - (1 - p)) <= SIGMAS * (p * (1 - p) / mask.numel()) ** 0.5 + 2**-17


def test_each_element_has_the_rate_over_seeds_of_rows(device, backend):
    """No position, example or field of a word is favoured: 4096 draws of each of 64 positions."""
    mask = kept(device, 0.3, rows=4096, columns=64).double()
    assert ((mask.mean(0) - 0.7).abs() <= SIGMAS * (0.3 * 0.7 / 4096) ** 0.5).all()
    assert ((mask.mean(1) - 0.7).abs() <= SIGMAS * (0.3 * 0.7 / 64) ** 0.5 + 0.15).all()


def test_activations_are_unbiased(device, backend):
    """The mean of noisy ones is 1, also where p is far from a multiple of 1/65536."""
    for p in (2**-16 * 1.4, 0.3, 0.99):
        y = F.dropout(torch.ones(64, 4001, device=device, dtype=torch.float64), p, seed=3)
        variance = p / (1 - p) * 1.01 + 1e-9
        assert abs(y.mean().item() - 1) <= SIGMAS * (variance / y.numel()) ** 0.5


def test_independent_addresses(device, backend):
    """Samples, streams, examples, seeds: each pair of neighbours, and of powers of two."""
    base = kept(device, 0.5, rows=16)
    steps = (1, 2, 16, 256, 65536, 2**31)
    for step in steps:
        assert_independent(base, kept(device, 0.5, rows=16, sample_ids=[step]))
        assert_independent(base, kept(device, 0.5, rows=16, stream=step))
        assert_independent(base, kept(device, 0.5, rows=16, first_example=step))
        assert_independent(base, kept(device, 0.5, rows=16, seed=step))
    assert_independent(base, kept(device, 0.5, rows=16, seed=2**32))
    address = [{"sample_ids": [1]}, {"stream": 1}, {"first_example": 1}, {"seed": 1}]
    for one, other in itertools.combinations(address, 2):
        assert_independent(kept(device, 0.5, rows=1, columns=100_000, **one), kept(device, 0.5, rows=1, columns=100_000, **other))


def test_independent_neighbours(device, backend):
    """Elements of one word, of one group, of neighbouring groups, far apart; at a rate where low bits count too."""
    for p in (0.5, 0.3):
        mask = kept(device, p)
        for step in (1, 2, 4, 7, 8, 9, 16, 64, 2048):
            assert_independent(mask[:, :-step], mask[:, step:], p)


def test_pairs_of_samples_of_one_call(device, backend):
    masks = (F.dropout(torch.ones(4, 4001, device=device), 0.5, samples=8, seed=1) != 0).unflatten(0, (8, 4))
    for one, other in itertools.combinations(range(8), 2):
        assert_independent(masks[one], masks[other])


def test_fields_are_uniform(device, backend):
    """Keep rates at neighbouring thresholds differ by what they should: no value of the 16-bit fields is missing or doubled in bulk."""
    x = torch.ones(64, 4000, device=device)
    rates = [(F.dropout(x, t / 32, seed=5) == 0).double().mean().item() for t in range(1, 32)]
    for low, high in itertools.pairwise(rates):
        assert abs((high - low) - 1 / 32) <= SIGMAS * (1 / 32 / x.numel()) ** 0.5
