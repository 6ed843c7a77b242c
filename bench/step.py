"""Whole training steps (forward, backward, SGD with momentum) of real architectures, smaller ones on a CPU, for every provider.

Equal compute is the provider "plain dropout, S*B examples": the same rows through the network. Equal time is computed from the sweep over
S (see ``summary``): how many noise samples a provider affords in the time that the naive loop takes for eight.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import models, strategies, training
from .case import Case, Grid, Skip, backends


class Architecture(NamedTuple):
    """A model of a size, and its data: images [3, 32, 32] and the like, or tokens of a length."""

    size: str
    make: Callable[[], nn.Module]
    batch: int
    classes: int
    shape: tuple[int, ...] = (3, 32, 32)
    tokens: bool = False
    quick: bool = False  # measured by --quick too
    expand: str = "first"  # of the library's rows: "input" where a path goes round the first dropout
    rows: int = 0  # bytes that a row takes in training, roughly

    def data(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.tokens:
            return tuple(torch.randint(self.classes, (rows, *self.shape), device=device) for _ in range(2))
        return torch.randn(rows, *self.shape, device=device), torch.randint(self.classes, (rows,), device=device)


MIB = 1 << 20
BATCH_NORM = {"WRN", "shared trunk", "VGG"}
CPU = {
    "MLP": Architecture("784-1024-1024-10", lambda: models.mlp(784, 1024, 10), 64, 10, (784,), quick=True, rows=MIB // 16),
    "small MLP": Architecture("64-256-256-10", lambda: models.mlp(64, 256, 10), 50, 10, (64,), quick=True, rows=MIB // 64),
    "WRN": Architecture("WRN-10-1", lambda: models.wide_resnet(10, 1, 10), 16, 10, quick=True, expand="input", rows=4 * MIB),
    "shared trunk": Architecture("6 convolutions", lambda: models.shared_trunk(16, (2, 2, 2), 10), 32, 10, quick=True, rows=2 * MIB),
    "skip path": Architecture("256x8", lambda: models.SkipPath(256, 8, 10), 256, 10, (256,), expand="input", rows=MIB // 32),
    "deep MLP": Architecture("512x6, noise at the input", strategies.network, 128, 10, (512,), rows=MIB // 16),
    "wide MLP": Architecture("1024x6, noise at the input", lambda: strategies.network(1024), 1024, 10, (1024,), rows=MIB // 8),
    "VGG": Architecture("width 16", lambda: models.vgg(16, (2, 2, 2), 10), 16, 10, rows=2 * MIB),
    "ViT": Architecture("128x4, 64 patches", lambda: models.VisionTransformer(32, 4, 128, 4, 4, 10), 8, 10, rows=4 * MIB),
    "GPT-2": Architecture("128x2, 64 tokens", lambda: models.GPT2(1000, 64, 128, 2, 4), 4, 1000, (64,), True, rows=4 * MIB),
    "LSTM": Architecture("128x2, 32 tokens", lambda: models.LSTM(1000, 128), 8, 1000, (32,), True, rows=2 * MIB),
}
GPU = {
    "MLP": Architecture("784-4096-4096-10", lambda: models.mlp(784, 4096, 10), 1024, 10, (784,), quick=True, rows=MIB // 4),
    "WRN": Architecture("WRN-28-10", lambda: models.wide_resnet(28, 10, 10), 32, 10, quick=True, expand="input", rows=160 * MIB),
    "shared trunk": Architecture("7 convolutions", lambda: models.shared_trunk(64, (2, 2, 3), 100), 256, 100, quick=True, rows=24 * MIB),
    "skip path": Architecture("4096x8", lambda: models.SkipPath(4096, 8, 10), 512, 10, (4096,), expand="input", rows=MIB // 2),
    "deep MLP": Architecture("4096x6, noise at the input", lambda: strategies.network(4096), 512, 10, (4096,), rows=MIB // 2),
    "VGG": Architecture("VGG-16", lambda: models.vgg(64, (2, 2, 3, 3, 3), 10), 128, 10, rows=32 * MIB),
    "ViT": Architecture("ViT-S/16", lambda: models.VisionTransformer(224, 16, 384, 12, 6, 1000), 32, 1000, (3, 224, 224), rows=64 * MIB),
    "GPT-2": Architecture("GPT-2-small", lambda: models.GPT2(50257, 1024, 768, 12, 12), 2, 50257, (1024,), True, rows=1536 * MIB),
    "LSTM": Architecture("650x2, 35 tokens", lambda: models.LSTM(10000, 650), 64, 10000, (35,), True, rows=8 * MIB),
}


def setup(architecture: Architecture) -> Callable[[Case], training.Inputs]:
    def inputs(case: Case) -> training.Inputs:
        half = case.dtype != torch.float32
        if half and case.device.type == "cpu":
            raise Skip("training in 16 bits is measured on a GPU: a CPU's matrix product decides it")
        x, y = architecture.data(case.batch, case.device)
        more = architecture.data(case.samples * case.batch, case.device)
        model = architecture.make().to(case.device).train()
        return training.Inputs(model, x, y, more, case.samples, case.dtype if half else None, architecture.expand)

    return inputs


def cases(grid: Grid) -> Iterator[Case]:
    gpu = grid.device.type == "cuda"
    native = backends(grid.device)[1]
    every = grid.samples_or(8)
    sweep = grid.samples_or(*(() if grid.quick else (1, 2, 4, 16, 32, 64)))
    for dtype in grid.dtypes_or(*((torch.bfloat16,) if gpu else (torch.float32,))):
        for order, (name, a) in enumerate((GPU if gpu else CPU).items()):
            if grid.quick and not a.quick:
                continue

            def case(samples: int, batch: int, rank: int, few: bool, name=name, a=a, dtype=dtype) -> Case:
                return Case(
                    level="step",
                    op=name,
                    size=f"{a.size}, B={batch}",
                    work="step",
                    samples=samples,
                    batch=batch,
                    classes=a.classes,
                    dtype=dtype,
                    device=grid.device,
                    rank=rank,
                    setup=setup(a),
                    providers=training.providers(native, few=few, compiled=not grid.quick, expand=a.expand, batch_norm=name in BATCH_NORM),
                    need=samples * batch * a.rows,
                    flush=False,
                )

            for samples in every:
                yield case(samples, a.batch, 15 + 2 * order, few=name == "wide MLP")
            if name in ("MLP", "shared trunk", "deep MLP"):
                for samples in sweep:
                    if samples not in every:
                        yield case(samples, a.batch, 50, few=True)
            if name == "MLP" and not grid.quick:
                for factor in (0.25, 4, 16):
                    yield case(every[0], int(factor * a.batch), 55, few=True)
