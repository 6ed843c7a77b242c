"""The op of real-valued noise: S normal numbers z for each element of x [B, F], result [S*B, F]; additive x + z, multiplicative x (1 + z).
The gradient of additive noise is the sum over the samples and needs no z, that of multiplicative noise is a sum of products with 1 + z.

Bytes are counted as in bench/noise.py. No peer is known whose kernel makes normal numbers without storing them.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from iwsgd_ext.functional import gaussian_dropout, gaussian_noise

from .case import BASELINE, Case, Grid, Variant, backends, on_backend
from .noise import FUSED, Count, Form, Inputs, limit, of_backend, rounding, variant_of

P = 0.5  # whose multiplicative noise has the standard deviation sqrt(p / (1 - p)) = 1, as the additive one here


class Kind(NamedTuple):
    """One form of the noise: in plain torch, in this library, and the bytes that each way of it moves."""

    plain: Callable[[Tensor], Tensor]
    own: Callable[..., Tensor]
    loop: Count
    expanded: Count
    compiled: Count
    vmap: Count
    multiply: bool

    def numbers(self, y: Tensor, x: Tensor) -> Tensor:
        """The z of an output, in double."""
        return y.double() / x.double() - 1 if self.multiply else y.double() - x.double()


# One sample in eager torch, additive: z is written; two tensors are read and the sum is written. Multiplicative: between these 1 is
# added to z (read, written). The product's gradient: dy and factor are read, the product is written. Then S - 1 additions of two tensors.
# The expanded batch repeats x (one read, S written), and its gradient sums S tensors. Under vmap x is not repeated: the last operation
# reads it once. A compiler joins all operations of a pass in one kernel at the best, and keeps z for a product's gradient.
ADDITIVE = Kind(
    lambda x: x + torch.randn_like(x),
    lambda x, samples: gaussian_noise(x, 1.0, samples=samples, seed=7),
    loop=Count(lambda n, e, S: 4 * S * n * e, lambda n, e, S: 3 * (S - 1) * n * e),
    expanded=Count(lambda n, e, S: (1 + S) * n * e + 4 * S * n * e, lambda n, e, S: (S > 1) * (S + 1) * n * e),
    compiled=FUSED,
    vmap=Count(lambda n, e, S: 3 * S * n * e + n * e, lambda n, e, S: (S + 1) * n * e),
    multiply=False,
)
MULTIPLICATIVE = Kind(
    lambda x: x * (1 + torch.randn_like(x)),
    lambda x, samples: gaussian_dropout(x, P, samples=samples, seed=7),
    loop=Count(lambda n, e, S: 6 * S * n * e, lambda n, e, S: 3 * S * n * e + 3 * (S - 1) * n * e),
    expanded=Count(lambda n, e, S: (1 + S) * n * e + 6 * S * n * e, lambda n, e, S: 3 * S * n * e + (S > 1) * (S + 1) * n * e),
    compiled=Count(FUSED.forward, lambda n, e, S: 2 * S * n * e + n * e),
    vmap=Count(lambda n, e, S: 5 * S * n * e + n * e, lambda n, e, S: 3 * S * n * e + (S + 1) * n * e),
    multiply=True,
)
KINDS = {"additive": ADDITIVE, "multiplicative": MULTIPLICATIVE}


def loop(kind: Kind, i: Inputs) -> Form:
    return lambda x: [kind.plain(x) for _ in range(i.samples)]


def expanded(kind: Kind, i: Inputs) -> Form:
    return lambda x: kind.plain(x.repeat(i.samples, 1))


def compiled(kind: Kind, i: Inputs) -> Form:
    # A graph that is differentiated more than once must not give its buffers away.
    with torch._functorch.config.patch(donated_buffer=False):
        form = torch.compile(expanded(kind, i))
        form(i.x)
    return form


def vmapped(kind: Kind, i: Inputs) -> Form:
    each = torch.arange(i.samples, device=i.x.device)
    return lambda x: torch.vmap(lambda _: kind.plain(x), randomness="different")(each).flatten(0, 1)


def fused(kind: Kind, i: Inputs) -> Form:
    return lambda x: kind.own(x, i.samples)


def _far(x: Tensor) -> Tensor:
    """Elements that are not near 0. A product with the others does not show its factor in the few digits of 16 bits."""
    return x.detach().abs() > 0.1


def check_numbers(kind: Kind, y: Tensor, i: Inputs) -> None:
    """z has the first, second and fourth moments of normal numbers, 0, 1 and 3, and two samples do not correlate: within 6 sigma."""
    with torch.no_grad():
        far = _far(i.x)
        z = [kind.numbers(of_sample[far], i.x[far]) for of_sample in y.view(i.samples, *i.x.shape)]
        n = i.samples * len(z[0])
        for power, moment, variance in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
            mean = sum((v**power).sum().item() for v in z) / n
            sigma = math.sqrt(variance / n)
            assert abs(mean - moment) < 6 * sigma, f"mean of z^{power} is {mean:.5f}, expected {moment} +- {6 * sigma:.5f}"
        if i.samples > 1:
            both, sigma = (z[0] * z[-1]).mean().item(), 1 / math.sqrt(len(z[0]))
            assert abs(both) < 6 * sigma, f"two samples correlate by {both:.5f}, expected 0 +- {6 * sigma:.5f}"


def check_sum(kind: Kind, dx: Tensor, y: Tensor, i: Inputs) -> None:
    """dx is the sum of dy over the samples, of multiplicative noise times the factor that the output shows."""
    dy = i.dy.view(i.samples, *i.x.shape).double()
    far = _far(i.x)
    terms = dy * (1 + kind.numbers(y.detach().view_as(dy), i.x.detach())) if kind.multiply else dy
    budget = i.samples * torch.finfo(dx.dtype).eps * terms.abs().sum(0)[far].max().item()  # a loop adds up in the inputs' precision
    torch.testing.assert_close(dx.double()[far], terms.sum(0)[far], rtol=0.0, atol=max(budget, rounding(dx.dtype)))


def providers(device: torch.device, kind: Kind) -> dict[str, Callable[[Inputs], Variant]]:
    def of(make: Callable[[Kind, Inputs], Form], count: Count | None) -> Callable[[Inputs], Variant]:
        numbers, gradient = (lambda y, i: check_numbers(kind, y, i)), (lambda dx, y, i: check_sum(kind, dx, y, i))
        return variant_of(lambda i: make(kind, i), count, numbers, gradient)

    found = {
        BASELINE: of(loop, kind.loop),
        "expanded batch": of(expanded, kind.expanded),
        "expanded batch, torch.compile": of(compiled, kind.compiled),
        "torch.func.vmap": of(vmapped, kind.vmap),
    }
    for name in backends(device):
        found[f"iw {name}"] = on_backend(name, of(fused, of_backend(name, FUSED)))
    found["limit: no noise"] = limit
    return found


def cases(grid: Grid) -> Iterator[Case]:
    gpu = grid.device.type == "cuda"
    batch, features = (16384, 4096) if gpu else (64, 4096) if grid.quick else (1024, 4096)
    own = (torch.bfloat16, torch.float32) if gpu else (torch.float32, torch.bfloat16)
    dtypes = grid.dtypes_or(*(own[:1] if grid.quick else own))
    sweep = grid.samples_or(*((8,) if grid.quick else (8, 1, 64)))
    for dtype, samples, work, (name, kind) in itertools.product(dtypes, sweep, ("forward", "backward"), KINDS.items()):
        n, e = batch * features, torch.finfo(dtype).bits // 8
        yield Case(
            level="op",
            op="real_noise",
            size=f"{batch}x{features}, {name}",
            work=work,
            samples=samples,
            batch=batch,
            dtype=dtype,
            device=grid.device,
            rank=35 if dtype == dtypes[0] and samples == sweep[0] else 55,
            setup=Inputs.of,
            providers=providers(grid.device, kind),
            need=8 * n * e * (samples + 1),
            fewest_bytes=n * e * (1 + samples),
        )
