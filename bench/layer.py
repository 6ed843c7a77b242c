"""The layer level: Dropout -> Linear -> loss head on features h [B, F], forward and backward, the gradient of h included."""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import iwsgd_ext as iw

from . import models, peers, training
from .case import Case, Grid, Skip, Variant, backends, on_backend

FEATURES = {"cpu": 512, "cuda": 4096}


def setup(case: Case) -> training.Inputs:
    features = FEATURES[case.device.type]
    half = case.dtype != torch.float32
    if half and case.device.type == "cpu":
        raise Skip("the layer in 16 bits is measured on a GPU: a CPU's matrix product decides it")

    def batch(rows: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(rows, features, device=case.device)
        return x, torch.randint(case.classes, (rows,), device=case.device)

    x, y = batch(case.batch)
    model = models.head(features, case.classes).to(case.device)
    return training.Inputs(model, x, y, batch(case.samples * case.batch), case.samples, case.dtype if half else None, step=False)


def with_peer(find: Callable[[torch.device], peers.LinearRows]) -> Callable[[nn.Module, training.Inputs], training.Backward]:
    """The expanded batch, with a peer's product and cross-entropy in one, which never holds the logits of all rows."""

    def make(model: nn.Module, i: training.Inputs) -> training.Backward:
        cross_entropy, dropout, linear = find(i.x.device), model[0], model[1]

        def backward(x: Tensor, y: Tensor) -> Tensor:
            h = dropout(training.repeat(x, i.samples))
            dtype = i.autocast or h.dtype
            weight, bias = linear.weight.to(dtype), linear.bias.to(dtype)
            log_p = -cross_entropy(h.to(dtype), weight, bias, training.repeat(y, i.samples)).view(i.samples, -1)
            loss = -(torch.logsumexp(log_p.float(), 0) - math.log(i.samples)).sum() / y.numel()
            loss.backward()
            return loss

        return backward

    return make


def by_hand(model: nn.Module, i: training.Inputs) -> training.Backward:
    """The library's ops by hand, without conversion: what a user writes in a head of their own."""
    dropout, linear = iw.IWDropout(model[0].p), model[1]
    model[0] = dropout

    def backward(x: Tensor, y: Tensor) -> Tensor:
        with iw.sampling(i.samples):
            loss = iw.iw_cross_entropy(F.linear(dropout(x), linear.weight, linear.bias), y, i.samples, inplace=True)
        loss.backward()
        return loss

    return backward


def providers(device: torch.device, quick: bool) -> dict[str, Callable[[training.Inputs], Variant]]:
    native = backends(device)[1]
    found = training.providers(native, compiled=not quick)
    for name in backends(device):
        if name != native:
            found[f"iw {name}"] = on_backend(name, training.provider(training.converted(), "each sample"))
    found[f"iw {native}, by hand, inplace=True"] = on_backend(native, training.provider(by_hand, "each sample"))
    for name, find in (
        ("F.linear_cross_entropy", peers.torch_linear),
        ("Liger fused linear", peers.liger_linear),
        ("cut-cross-entropy", peers.cut_cross_entropy),
        ("QuACK linear", peers.quack_linear),
    ):
        found[f"{name}, expanded batch"] = training.provider(with_peer(find), "joint")
    return found


def cases(grid: Grid) -> Iterator[Case]:
    gpu = grid.device.type == "cuda"
    features = FEATURES[grid.device.type]
    sizes = grid.classes_or(*((1000, 32000, 128256) if gpu else (1000,) if grid.quick else (1000, 10, 16000)))
    for dtype in grid.dtypes_or(*((torch.bfloat16,) if gpu else (torch.float32,))):
        for classes in sizes:
            batch = (4096 if classes <= 4096 else 512) if gpu else (256 if classes <= 1000 else 32)
            for samples in grid.samples_or(*((8,) if grid.quick else (8, 1, 64) if classes == sizes[0] else (8,))):
                yield Case(
                    level="layer",
                    op="head",
                    size=f"{batch}x{features}x{classes}",
                    work="forward+backward",
                    samples=samples,
                    batch=batch,
                    classes=classes,
                    dtype=dtype,
                    device=grid.device,
                    rank=20 if samples == 8 and classes == sizes[0] else 45,
                    setup=setup,
                    providers=providers(grid.device, grid.quick),
                    need=samples * batch * 4 * (6 * classes + 8 * features),
                    flush=False,
                )
