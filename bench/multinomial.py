"""The multinomial op: k draws of features for each row of x [B, F] and each of S samples, result x n / (k q) [S*B, F], n their counts.

Bytes are counted as in bench/noise.py, for n = B*F inputs and d = B*k draws. Of torch.multinomial only the draws that it writes are
counted, and not its cumulative sums. No peer is known. torch.func.vmap is left out because it cannot add to the counts in place; out of
place it does what the expanded batch does, and more.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from iwsgd_ext.functional import multinomial_dropout

from .case import BASELINE, Case, Grid, Variant, backends, on_backend
from .noise import Count, Form, Inputs, limit, of_backend, rounding, variant_of


class Kind(NamedTuple):
    """Probabilities of the features, up to their sum; None where all are alike."""

    weights: Callable[[int], Tensor] | None

    def probabilities(self, features: int, device: torch.device) -> Tensor:
        """float64 [F], of sum 1."""
        w = torch.ones(features) if self.weights is None else self.weights(features)
        return (w.double() / w.double().sum()).to(device)


KINDS = {"uniform": Kind(None), "weighted": Kind(lambda features: 1.0 + torch.arange(features) % 4)}
INDEX = 8  # bytes of a drawn feature


def draws_of(features: int) -> int:
    """As many as dropout with p = 1/2 keeps."""
    return features // 2


def _plain(draws: int) -> Callable[[int, int, int], int]:
    # draws written and read; counts written as zeros, what is added to them left out; times a factor by feature (read, written); times x
    # (two read, one written)
    return lambda n, e, S: S * (2 * INDEX * draws + 6 * n * e)


def counts(features: int, draws: int) -> dict[str, Count]:
    """Bytes of each form, from its inputs of n = B*F elements."""

    def d(n: int) -> int:
        return n // features * draws

    def of_library(n: int, e: int, S: int) -> int:
        # counts of 4 bytes written; read, factors written; x and factors read, products written; factors compared (read, a byte written);
        # the choice (that byte and the products read, results written). In float32, to and from which 16 bits are converted.
        w = max(e, 4)
        return S * n * (4 + 4 + w + w + w + w + 1 + 1 + w + w) + n * e + (e < 4) * (n * w + S * n * (w + e) + n * w)

    def of_librarys_gradient(n: int, e: int, S: int) -> int:
        w = max(e, 4)  # as forward, with dy in the place of x; then summed over the samples
        return S * n * (4 + 4 + w + w + w + w + w + 1 + 1 + w + w) + (S > 1) * (S + 1) * n * w + (e < 4) * (S * n * (e + w) + n * (w + e))

    return {
        "loop": Count(lambda n, e, S: _plain(d(n))(n, e, S), lambda n, e, S: 3 * S * n * e + 3 * (S - 1) * n * e),
        "expanded": Count(
            lambda n, e, S: (1 + S) * n * e + _plain(d(n))(n, e, S), lambda n, e, S: 3 * S * n * e + (S > 1) * (S + 1) * n * e
        ),
        # at the least, zeros and one kernel behind the counts; for the gradient the counts are kept
        "compiled": Count(lambda n, e, S: 2 * S * n * e + n * e + S * n * e, lambda n, e, S: 2 * S * n * e + n * e),
        "library": Count(of_library, of_librarys_gradient),
    }


def _draw(kind: Kind, rows: int, features: int, draws: int, q: Tensor) -> Tensor:
    """Features drawn with replacement, int64 [rows, k]."""
    if kind.weights is None:
        return torch.randint(features, (rows, draws), device=q.device)
    return torch.multinomial(q.expand(rows, features), draws, replacement=True)


def plain(kind: Kind, i: Inputs) -> Callable[[Tensor], Tensor]:
    """One noise for each row of x, in plain torch."""
    features = i.x.shape[1]
    draws, q = draws_of(features), kind.probabilities(features, i.x.device)
    scale, q = (1 / (draws * q)).to(i.x.dtype), q.float()
    one = torch.ones((), device=i.x.device, dtype=i.x.dtype)

    def form(x: Tensor) -> Tensor:
        index = _draw(kind, x.shape[0], features, draws, q)
        n = torch.zeros(x.shape, device=x.device, dtype=x.dtype).scatter_add_(1, index, one.expand(index.shape))
        return x * (n * scale)

    return form


def loop(kind: Kind, i: Inputs) -> Form:
    form = plain(kind, i)
    return lambda x: [form(x) for _ in range(i.samples)]


def expanded(kind: Kind, i: Inputs) -> Form:
    form = plain(kind, i)
    return lambda x: form(x.repeat(i.samples, 1))


def compiled(kind: Kind, i: Inputs) -> Form:
    # A graph that is differentiated more than once must not give its buffers away.
    with torch._functorch.config.patch(donated_buffer=False):
        form = torch.compile(expanded(kind, i))
        form(i.x)
    return form


def fused(kind: Kind, i: Inputs) -> Form:
    features = i.x.shape[1]
    q = None if kind.weights is None else kind.probabilities(features, i.x.device)
    return lambda x: multinomial_dropout(x, q, draws_of(features), samples=i.samples, seed=7)


def _factors(kind: Kind, y: Tensor, i: Inputs) -> tuple[Tensor, Tensor]:
    """(counts [S, B, F], the factor of one count [F]) that an output shows, in double."""
    features = i.x.shape[1]
    scale = 1 / (draws_of(features) * kind.probabilities(features, i.x.device))
    return (y.detach().double().view(i.samples, *i.x.shape) / (i.x.detach().double() * scale)).round(), scale


def _relative(kind: Kind, features: int, dtype: torch.dtype) -> float:
    """How far a factor may be off: by rounding, and where 1 / q is that of a probability in steps of 2^-32, as the library's is."""
    return rounding(dtype) + 2**-31 / kind.probabilities(features, torch.device("cpu")).min().item()


def check_counts(kind: Kind, y: Tensor, i: Inputs) -> None:
    """Values are x times whole counts over k q; a row's counts add up to k, a feature's over the rows to what its probability says, and
    two samples do not correlate: within 6 sigma.
    """
    with torch.no_grad():
        rows, features = i.x.shape
        draws, q = draws_of(features), kind.probabilities(features, i.x.device)
        n, scale = _factors(kind, y, i)
        torch.testing.assert_close(y.double().view_as(n), i.x.double() * n * scale, rtol=_relative(kind, features, y.dtype), atol=0.0)
        assert n.min().item() >= 0, "a count is negative"
        sums = n.sum(2)
        assert (sums == draws).all(), f"a row has {sums.min():.0f} to {sums.max():.0f} draws, expected {draws}"
        total = draws * rows * i.samples
        off = ((n.sum((0, 1)) - total * q) / (total * q * (1 - q)).sqrt()).abs().max().item()
        assert off < 6, f"a feature is drawn {off:.1f} standard deviations from what its probability says"
        if i.samples > 1:
            a, b = (v - draws * q for v in (n[0], n[-1]))
            both, sigma = ((a * b).sum() / (a.norm() * b.norm())).item(), 1 / math.sqrt(rows * features)
            assert abs(both) < 6 * sigma, f"two samples correlate by {both:.5f}, expected 0 +- {6 * sigma:.5f}"


def check_sum(kind: Kind, dx: Tensor, y: Tensor, i: Inputs) -> None:
    """dx is the sum over the samples of dy times the factor that the output shows."""
    n, scale = _factors(kind, y, i)
    terms = i.dy.view_as(n).double() * n * scale
    # a loop adds up in the inputs' precision
    budget = i.samples * _relative(kind, i.x.shape[1], dx.dtype) * terms.abs().sum(0).max().item()
    torch.testing.assert_close(dx.double(), terms.sum(0), rtol=0.0, atol=budget)


def providers(device: torch.device, kind: Kind, features: int) -> dict[str, Callable[[Inputs], Variant]]:
    moved = counts(features, draws_of(features))

    def of(make: Callable[[Kind, Inputs], Form], count: Count | None) -> Callable[[Inputs], Variant]:
        numbers, gradient = (lambda y, i: check_counts(kind, y, i)), (lambda dx, y, i: check_sum(kind, dx, y, i))
        return variant_of(lambda i: make(kind, i), count, numbers, gradient)

    found = {
        BASELINE: of(loop, moved["loop"]),
        "expanded batch": of(expanded, moved["expanded"]),
        "expanded batch, torch.compile": of(compiled, moved["compiled"]),
    }
    for name in backends(device):
        found[f"iw {name}"] = on_backend(name, of(fused, of_backend(name, moved["library"])))
    found["limit: no noise"] = limit
    return found


def cases(grid: Grid) -> Iterator[Case]:
    gpu = grid.device.type == "cuda"
    batch, features = (16384, 4096) if gpu else (256, 1024)
    dtypes = grid.dtypes_or(torch.bfloat16 if gpu else torch.float32)
    sweep = grid.samples_or(*((8,) if grid.quick else (8, 1, 64)))
    kinds = list(KINDS.items())[: 1 if grid.quick else 2]
    for dtype, samples, work, (name, kind) in itertools.product(dtypes, sweep, ("forward", "backward"), kinds):
        n, e = batch * features, torch.finfo(dtype).bits // 8
        yield Case(
            level="op",
            op="multinomial",
            size=f"{batch}x{features}, {name}",
            work=work,
            samples=samples,
            batch=batch,
            dtype=dtype,
            device=grid.device,
            rank=36 if dtype == dtypes[0] and samples == sweep[0] else 56,
            setup=Inputs.of,
            providers=providers(grid.device, kind, features),
            need=16 * n * e * (samples + 1),
            fewest_bytes=n * e * (1 + samples),
        )
