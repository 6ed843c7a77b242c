"""Overhead of a call on the host, in microseconds: tensors so small that nothing else takes time. The baseline is torch's way, S times."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import iwsgd_ext as iw
from iwsgd_ext.functional import dropout

from . import iw_cross_entropy, training
from .case import BASELINE, Case, Grid, Variant, backends, on_backend

ROWS, WIDTH = 2, 8


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
                f"iw {native}": on_backend(native, training.provider(training.batched, "joint")),
            },
        ),
    }
    for samples in grid.samples_or(1, 8):
        for op, (setup, providers) in ops.items():
            yield Case(
                level="host",
                op=op,
                size=f"{ROWS}x{WIDTH}",
                work="forward+backward",
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
