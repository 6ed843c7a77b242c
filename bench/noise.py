"""The noise op: S dropout masks on x [B, F], result [S*B, F], and its gradient, the sum over the samples.

Bytes are counted for n = B*F inputs of e bytes: every tensor that an implementation reads or writes as a whole, each time it does.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import iwsgd_ext as iw
from iwsgd_ext.functional import dropout

from . import peers
from .case import BASELINE, Case, Grid, Variant, backends, on_backend

P = 0.5


@dataclass
class Inputs:
    x: Tensor  # [B, F], without zeros
    dy: Tensor  # [S*B, F]
    samples: int
    work: str

    @classmethod
    def of(cls, case: Case) -> "Inputs":
        features = int(case.size.split(",")[0].split("x")[1])
        x = torch.randn(case.batch, features, device=case.device, dtype=case.dtype)
        x = torch.where(x == 0, torch.ones_like(x), x).requires_grad_(case.work == "backward")
        dy = torch.randn(case.samples * case.batch if case.work == "backward" else 0, features, device=case.device, dtype=case.dtype)
        return cls(x, dy, case.samples, case.work)


Form = Callable[[Tensor], Tensor | list[Tensor]]  # x [B, F] -> [S*B, F], or the S tensors of it


class Count(NamedTuple):
    """Bytes of the forward and of the backward pass, from n, e, S."""

    forward: Callable[[int, int, int], int]
    backward: Callable[[int, int, int], int]


# Reads x once, writes the S outputs; backward the other way round. No mask in memory.
FUSED = Count(lambda n, e, S: n * e * (1 + S), lambda n, e, S: n * e * (S + 1))
# torch's dropout on a CPU, times S: noise written; read and written (division); x and noise read, output written. Backward: dy and noise
# read, product written; then S - 1 additions of two tensors.
CPU_LOOP = Count(lambda n, e, S: 6 * S * n * e, lambda n, e, S: 3 * S * n * e + 3 * (S - 1) * n * e)
# On a GPU it is one kernel: x read, output and a mask of one byte an element written.
GPU_LOOP = Count(lambda n, e, S: S * n * (2 * e + 1), lambda n, e, S: S * n * (2 * e + 1) + 3 * (S - 1) * n * e)
# The repetition of x besides (x read, S copies written), and its gradient (S tensors read, one written; nothing to sum for S = 1).
CPU_EXPANDED = Count(lambda n, e, S: (1 + S) * n * e + 6 * S * n * e, lambda n, e, S: 3 * S * n * e + (S > 1) * (S + 1) * n * e)
GPU_EXPANDED = Count(lambda n, e, S: (1 + S) * n * e + S * n * (2 * e + 1), lambda n, e, S: S * n * (2 * e + 1) + (S > 1) * (S + 1) * n * e)
# At the least: repetition and dropout in one kernel, with a mask of one byte an element where a gradient is wanted.
COMPILED = Count(lambda n, e, S: n * e * (1 + S), lambda n, e, S: S * n * (e + 1) + n * e)
# As the loop, but x is not repeated: one read of it by the product. Its gradient is a product and a sum over the samples.
CPU_VMAP = Count(lambda n, e, S: 5 * S * n * e + n * e, lambda n, e, S: 3 * S * n * e + (S + 1) * n * e)
# A copy of x, S times; the sum of S tensors.
COPY = Count(lambda n, e, S: 2 * S * n * e, lambda n, e, S: (S + 1) * n * e)
# A kernel without a stored mask for each sample: reads x, writes y. No backward is timed.
SEEDED = Count(lambda n, e, S: 2 * S * n * e, lambda n, e, S: 0)


def loop(i: Inputs) -> Form:
    return lambda x: [F.dropout(x, P) for _ in range(i.samples)]


def expanded(i: Inputs) -> Form:
    return lambda x: F.dropout(x.repeat(i.samples, 1), P)


def compiled(i: Inputs) -> Form:
    # A graph that is differentiated more than once must not give its buffers away.
    with torch._functorch.config.patch(donated_buffer=False):
        form = torch.compile(expanded(i))
        form(i.x)
    return form


def vmapped(i: Inputs) -> Form:
    each = torch.arange(i.samples, device=i.x.device)
    return lambda x: torch.vmap(lambda _: F.dropout(x, P), randomness="different")(each).flatten(0, 1)


def fused(i: Inputs) -> Form:
    """The layer in its context, as it stands in a model."""
    layer = iw.IWDropout(P)

    def form(x: Tensor) -> Tensor:
        with iw.sampling(i.samples):
            return layer(x)

    return form


def check_noise(y: Tensor, i: Inputs) -> None:
    """Values are 0 or x / (1 - p), the rate of kept ones is 1 - p, and masks of two samples are independent: within 6 sigma."""
    with torch.no_grad():
        y = y.reshape(i.samples, *i.x.shape)
        kept, n = y != 0, i.x.numel()
        for s in range(i.samples):
            expected = torch.where(kept[s], i.x.float() / (1 - P), 0.0)
            torch.testing.assert_close(y[s].float(), expected, rtol=rounding(y.dtype), atol=0.0)
        sigma = math.sqrt(P * (1 - P) / (n * i.samples))
        rate = kept.double().mean().item()
        assert abs(rate - (1 - P)) < 6 * sigma, f"{rate:.5f} of the elements are kept, expected {1 - P} +- {6 * sigma:.5f}"
        if i.samples > 1:
            equal, agree = P**2 + (1 - P) ** 2, (kept[0] == kept[-1]).double().mean().item()
            sigma = math.sqrt(equal * (1 - equal) / n)
            assert abs(agree - equal) < 6 * sigma, f"masks of two samples agree in {agree:.5f}, expected {equal:.5f} +- {6 * sigma:.5f}"


def check_sum(dx: Tensor, y: Tensor, i: Inputs) -> None:
    """dx is the sum over the samples of keep * dy / (1 - p), with the masks that the outputs show."""
    kept = y.detach().reshape(i.samples, *i.x.shape) != 0
    terms = torch.where(kept, i.dy.view(kept.shape).double() / (1 - P), 0.0)
    budget = i.samples * torch.finfo(dx.dtype).eps * terms.abs().sum(0).max().item()  # a loop adds up in the inputs' precision
    torch.testing.assert_close(dx.double(), terms.sum(0), rtol=0.0, atol=budget)


def variant_of(
    make: Callable[[Inputs], Form],
    count: Count | None,
    check_output: Callable[[Tensor, Inputs], None] = check_noise,
    check_gradient: Callable[[Tensor, Tensor, Inputs], None] = check_sum,
) -> Callable[[Inputs], Variant]:
    """A provider from the form of its forward pass; autograd gives the backward pass, of a graph that is made once."""

    def provider(i: Inputs) -> Variant:
        form = make(i)
        size = (i.x.numel(), i.x.element_size(), i.samples)
        if i.work == "forward":

            def forward():
                with torch.no_grad():
                    return form(i.x)

            return Variant(forward, lambda: check_output(joined(forward()), i), count and count.forward(*size), leaves=[i.x])
        y = form(i.x)
        dys = list(i.dy.chunk(i.samples)) if isinstance(y, list) else i.dy.view_as(y)

        def backward():
            return torch.autograd.grad(y, i.x, dys, retain_graph=True)[0]

        def check():
            check_output(joined(y), i)
            check_gradient(backward(), joined(y), i)

        def both():
            y = form(i.x)
            return torch.autograd.grad(y, i.x, dys)

        return Variant(backward, check, count and count.backward(*size), memory=both, leaves=[i.x, i.dy])

    return provider


def of_backend(name: str, count: Count) -> Count | None:
    """The bytes that a backend's kernels move. The reference's are not known: it makes random numbers by many operations of torch."""
    return None if name == "reference" else count


def fused_out(i: Inputs) -> Variant:
    """The library's forward into memory that is there already."""
    out = torch.empty(i.samples * i.x.shape[0], i.x.shape[1], device=i.x.device, dtype=i.x.dtype)

    def forward():
        return dropout(i.x.detach(), P, samples=i.samples, seed=7, out=out)

    return Variant(forward, lambda: check_noise(forward(), i), FUSED.forward(i.x.numel(), i.x.element_size(), i.samples))


def limit(i: Inputs) -> Variant:
    """No noise at all: x copied S times, or S tensors summed, into memory that is there already."""
    n, e, x = i.x.numel(), i.x.element_size(), i.x.detach()
    if i.work == "forward":
        out = torch.empty(i.samples, *x.shape, device=x.device, dtype=x.dtype)

        def copy():
            for y in out:
                y.copy_(x)

        return Variant(copy, lambda: torch.testing.assert_close(out[-1], (copy(), x)[1]), COPY.forward(n, e, i.samples))
    dy, total = i.dy.view(i.samples, *x.shape), torch.empty_like(x)

    def add():
        return torch.sum(dy, 0, out=total)

    def check():
        torch.testing.assert_close(add().double(), dy.double().sum(0), rtol=rounding(x.dtype), atol=rounding(x.dtype) * i.samples)

    return Variant(add, check, COPY.backward(n, e, i.samples))


def joined(y: Tensor | list[Tensor]) -> Tensor:
    return torch.cat(y) if isinstance(y, list) else y


def rounding(dtype: torch.dtype) -> float:
    return 4 * torch.finfo(dtype).eps


def providers(device: torch.device, work: str) -> dict[str, Callable[[Inputs], Variant]]:
    on_cpu = device.type == "cpu"
    found = {
        BASELINE: variant_of(loop, CPU_LOOP if on_cpu else GPU_LOOP),
        "expanded batch": variant_of(expanded, CPU_EXPANDED if on_cpu else GPU_EXPANDED),
        "expanded batch, torch.compile": variant_of(compiled, COMPILED),
        "torch.func.vmap": variant_of(vmapped, CPU_VMAP),
    }
    for name in backends(device):
        found[f"iw {name}"] = on_backend(name, variant_of(fused, of_backend(name, FUSED)))
        if work == "forward" and name != "reference":
            found[f"iw {name}, out="] = on_backend(name, fused_out)
    if work == "forward":
        found["Triton seeded dropout, S calls"] = variant_of(lambda i: peers.seeded_dropout(i.samples, P, i.x.device), SEEDED)
    found["limit: no noise"] = limit
    return found


def cases(grid: Grid) -> Iterator[Case]:
    gpu = grid.device.type == "cuda"
    batch, features = (16384, 4096) if gpu else (256, 4096) if grid.quick else (1024, 4096)
    own = (torch.bfloat16, torch.float32) if gpu else (torch.float32, torch.bfloat16)
    dtypes = grid.dtypes_or(*(own[:1] if grid.quick else own))
    sweep = (8,) if grid.quick else (8, 4, 1, 2, 16, 32, 64)
    for dtype, samples, work in itertools.product(dtypes, grid.samples_or(*sweep), ("forward", "backward")):
        main = dtype == dtypes[0] and samples == grid.samples_or(*sweep)[0]
        n, e = batch * features, torch.finfo(dtype).bits // 8
        yield Case(
            level="op",
            op="noise",
            size=f"{batch}x{features}",
            work=work,
            samples=samples,
            batch=batch,
            dtype=dtype,
            device=grid.device,
            rank=10 if main else 40 if samples == 8 else 60,
            setup=Inputs.of,
            providers=providers(grid.device, work),
            need=8 * n * e * (samples + 1),
            fewest_bytes=n * e * (1 + samples),
        )
