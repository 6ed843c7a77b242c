"""Overhead of a call on the host, in microseconds: tensors so small that nothing else takes time. The baseline is torch's way, S times.

"32 operations" is a forward behind one dropout: what a provider takes beyond one ordinary pass, over 32, is its overhead per operation.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import iwsgd_ext as iw
from iwsgd_ext.functional import dropout

from . import iw_cross_entropy, training
from .case import BASELINE, Case, Grid, Variant, backends, on_backend

ROWS, WIDTH = 2, 8
OPERATIONS = 32


def noise(make: Callable[[int], Callable[[Tensor], Tensor]]) -> Callable[[Case], Variant]:
    """Dropout with p = 1/2 of x [2, 8], forward and backward."""

    def provider(case: Case) -> Variant:
        forward = make(case.samples)
        x = torch.randn(ROWS, WIDTH, device=case.device, requires_grad=True)
        ones = torch.ones(case.samples * ROWS, WIDTH, device=case.device)

        def run():
            y = forward(x)
            return y, torch.autograd.grad(y, x, ones)[0]

        def check():
            y, dx = run()
            scale = (y.view(case.samples, ROWS, WIDTH) != 0) * 2.0
            torch.testing.assert_close(y.view_as(scale), x * scale)
            torch.testing.assert_close(dx, scale.sum(0))

        return Variant(run, check)

    return provider


def loop(samples: int) -> Callable[[Tensor], Tensor]:
    layer = nn.Dropout(0.5)
    return lambda x: torch.cat([layer(x) for _ in range(samples)]) if samples > 1 else layer(x)


def layer(samples: int) -> Callable[[Tensor], Tensor]:
    swapped = iw.IWDropout(0.5)

    def forward(x: Tensor) -> Tensor:
        with iw.sampling(samples):
            return swapped(x)

    return forward


def functional(samples: int) -> Callable[[Tensor], Tensor]:
    return lambda x: dropout(x, 0.5, samples=samples, seed=7)


def network(case: Case) -> training.Inputs:
    x, y = torch.randn(ROWS, WIDTH, device=case.device), torch.randint(WIDTH, (ROWS,), device=case.device)
    hidden = [layer for _ in range(2) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(0.5))]
    model = nn.Sequential(*hidden, nn.Linear(WIDTH, WIDTH)).to(case.device)
    return training.Inputs(model, x, y, (x, y), case.samples, step=False)


def operations(case: Case) -> training.Inputs:
    """A dropout, and operations in a chain on what it makes: half of them linear, half by element."""
    layers: list[nn.Module] = [nn.Dropout(0.5)]
    for _ in range(OPERATIONS // 2):
        linear = nn.Linear(WIDTH, WIDTH)
        nn.init.orthogonal_(linear.weight)  # so that noise is still seen at the end
        layers += [linear, nn.LeakyReLU(0.5)]
    model, x = nn.Sequential(*layers).to(case.device), torch.randn(ROWS, WIDTH, device=case.device)
    return training.Inputs(model, x, torch.zeros(ROWS, dtype=torch.int64), (x, x), case.samples)


Forward = Callable[[nn.Module, int], Callable[[Tensor], Tensor]]  # model, S -> its training forward


def forward(make: Forward, samples: int | None = None) -> Callable[[training.Inputs], Variant]:
    """A training forward, without the backward: rows [S*B, ...] of a model's output; S is ``samples`` or the inputs'."""

    def provider(i: training.Inputs) -> Variant:
        s = samples or i.samples
        run = make(copy.deepcopy(i.model), s)

        def check():
            model = copy.deepcopy(i.model)
            again, drawn = make(model, s), training.record(model)
            y = again(i.x)
            (masks,) = drawn.values()
            h = torch.where(torch.cat(masks), 2 * training.repeat(i.x, s), 0)
            torch.testing.assert_close(y, i.model[1:](h))

        return Variant(lambda: run(i.x), check)

    return provider


def passes(model: nn.Module, samples: int) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.cat([model(x) for _ in range(samples)]) if samples > 1 else model(x)


def logits(case: Case) -> iw_cross_entropy.Inputs:
    z = torch.randn(case.samples * ROWS, WIDTH, device=case.device, requires_grad=True)
    return iw_cross_entropy.Inputs(z, torch.randint(WIDTH, (ROWS,), device=case.device), case.samples, gradient=True)


def cases(grid: Grid) -> Iterator[Case]:
    native = backends(grid.device)[1]
    loss = iw_cross_entropy.providers(grid.device, gradient=True)
    ops: dict[str, tuple[Callable[[Case], Any], dict]] = {
        "noise": (
            lambda case: case,
            {
                BASELINE: noise(loop),
                f"iw {native}, layer": on_backend(native, noise(layer)),
                f"iw {native}, functional": on_backend(native, noise(functional)),
            },
        ),
        "iw_cross_entropy": (logits, {name: loss[name] for name in (BASELINE, "expanded batch", f"iw {native}")}),
        "MLP": (
            network,
            {
                BASELINE: training.provider(training.loop, "each sample"),
                "expanded batch": training.provider(training.expanded, "joint"),
                f"iw {native}": on_backend(native, training.provider(training.converted(), "each sample")),
                f"iw {native}, rows": on_backend(native, training.provider(training.rows(), "each sample")),
            },
        ),
        f"{OPERATIONS} operations": (
            operations,
            {
                BASELINE: forward(passes),
                "plain dropout, one sample": forward(passes, samples=1),
                f"iw {native}": on_backend(native, forward(iw.convert)),
                f"iw {native}, rows": on_backend(native, forward(functools.partial(iw.convert, expand="first", verify=False))),
            },
        ),
    }
    for samples in grid.samples_or(1, 8):
        for op, (setup, providers) in ops.items():
            yield Case(
                level="host",
                op=op,
                size=f"{ROWS}x{WIDTH}",
                work="forward" if setup is operations else "forward+backward",
                samples=samples,
                batch=ROWS,
                classes=WIDTH,
                dtype=torch.float32,
                device=grid.device,
                rank=30,
                setup=setup,
                providers=providers,
                inner=50,
                flush=False,
            )
