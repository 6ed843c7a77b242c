"""CIFAR-10 and CIFAR-100 with wide residual networks (the paper's 5.1: Table 1 and Figure 2).

The network, its initial values, augmentation, optimiser and schedule are those of the published code of wide residual networks. With
--protocol authors also what the authors of IWSGD changed in it: four micro-batches of 32 images with all their samples as rows, over which
BatchNorm normalises together, and one order of the examples for all seeds; trainings with one sample keep one batch of 128.
"""

import math
from argparse import ArgumentTypeError, Namespace
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from . import cifar
from .recipe import Data, OptionGroup
from .wide_resnet import wide_resnet

DEFAULTS = {"samples": [8], "alpha": [1.0], "rate": [0.3], "batch": 128, "epochs": 200.0, "seeds": 3}
QUICK = {"synthetic": True, "depth": 10, "widen": 1, "samples": [1, 4], "batch": 16, "epochs": 6.0, "seeds": 1}

# Of 0..255, and by the published code the same for both sets.
MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
PADDING = 4
# The learning rate drops at the start of epochs 60, 120 and 160, counted from 1: after so many of 200.
DROPS, EPOCHS, FACTOR = (59, 119, 159), 200, 0.2
SYNTHETIC_SEED = 0  # one set of images for all seeds, as with real ones
RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def add_options(group: OptionGroup) -> None:
    group.add_argument(
        "--dataset", choices=tuple(cifar.ARCHIVES), default="cifar10", help="read from --data: its archive, or that extracted"
    )
    group.add_argument("--depth", type=depth, default=28, help="layers, 6n + 4")
    group.add_argument("--widen", type=widen, default=10, help="factor of the number of channels")
    group.add_argument("--synthetic", action="store_true", help="512 made images in the place of the data, to try the recipe")
    group.add_argument("--any-archive", action="store_true", help="an archive of your own in the same format: MD5s are not compared")
    group.add_argument("--protocol", choices=("baseline", "authors"), default="baseline", help="what of IWSGD's published code is followed")
    experiment = group.add_mutually_exclusive_group()
    experiment.add_argument(
        "--table1",
        dest="experiment",
        action="store_const",
        const="table1",
        help="the trainings of the paper's Table 1, which has its own samples and alpha",
    )
    experiment.add_argument(
        "--figure2",
        dest="experiment",
        action="store_const",
        const="figure2",
        help="the trainings of the paper's Figure 2, which has its own samples, alpha and rates",
    )


def depth(text: str) -> int:
    value = int(text)
    if value < 10 or value % 6 != 4:
        raise ArgumentTypeError(f"expected 6n + 4 with n of at least 1 (10, 16, 22, 28, ...), got {text}")
    return value


def widen(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return value


def load(settings: Namespace) -> Data:
    spec = cifar.ARCHIVES[settings.dataset]
    if settings.synthetic:
        return cifar.synthetic(spec.classes, SYNTHETIC_SEED)
    return cifar.load(settings.data, settings.dataset, settings.any_archive)


def facts(settings: Namespace) -> dict[str, Any]:
    spec = cifar.ARCHIVES[settings.dataset]
    if settings.synthetic:
        return {"data": f"made, {spec.classes} classes", "data_seed": SYNTHETIC_SEED}
    return {"data": spec.file, "data_md5": "not compared" if settings.any_archive else spec.md5}


def build(settings: Namespace, data: Data) -> nn.Module:
    return wide_resnet(settings.depth, settings.widen, data.classes, settings.rate)


def prepare(x: Tensor, train: bool) -> Tensor:
    """uint8 [B, 3, H, W] to normalised floats; in training each image is flipped or not, and moved by up to 4 pixels each way."""
    if train:
        flip = torch.rand(len(x), device=x.device) < 0.5
        top, left = torch.randint(2 * PADDING + 1, (2, len(x)), device=x.device)
        x = augment(x, flip, top, left)
    mean, std = _mean_std(x.device)
    return (x.float() - mean) / std


@cache
def _mean_std(device: torch.device) -> tuple[Tensor, ...]:
    """On the device once: in each step they would be copied there, and the host would wait for it."""
    return tuple(torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))


def augment(x: Tensor, flip: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """Flip, then pad by reflection, then crop at (top, left) of the padded image: all by the pixel each output pixel comes from.

    Args:
        x: [B, C, H, W].
        flip: bool [B].
        top, left: int64 [B], 0 to 8; 4 and 4 leave the image where it is.
    """

    def source(offset: Tensor, size: int) -> Tensor:
        """[B, size]: the place of each crop's pixels in the image that was padded; at its borders it runs back, without them twice."""
        place = offset[:, None] + torch.arange(size, device=x.device) - PADDING
        return size - 1 - (size - 1 - place.abs()).abs()

    height, width = x.shape[2:]
    if min(height, width) <= PADDING:
        raise ValueError(f"x: expected images larger than {PADDING} pixels each way, got {height} x {width}")
    rows, columns = source(top, height), source(left, width)
    columns = torch.where(flip[:, None], width - 1 - columns, columns)
    image, channel = torch.arange(len(x), device=x.device), torch.arange(x.shape[1], device=x.device)
    return x[image[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


class Drops(LRScheduler):
    """Multiplies the learning rate at three steps and forgets the momentum there, as the published code does.

    Args:
        optimizer: whose state is emptied.
        steps: of the training; the drops have in it the places that they have in 200 epochs.
    """

    def __init__(self, optimizer: Optimizer, steps: int):
        # Rounded up: at the earliest after the first step. Exact for whole epochs of a training of 200.
        self.drops = [-(-epochs * steps // EPOCHS) for epochs in DROPS]
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        past = sum(drop <= self.last_epoch for drop in self.drops)
        return [base * FACTOR**past for base in self.base_lrs]

    def step(self, epoch: None = None) -> None:
        super().step()
        if self.last_epoch in self.drops:
            self.optimizer.state.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Sets the learning rate too: a new scheduler has set the first one, maybe after the optimiser's state was loaded."""
        super().load_state_dict(state_dict)
        for group, lr in zip(self.optimizer.param_groups, self.get_last_lr(), strict=True):
            group["lr"] = lr


def optimizer(settings: Namespace, model: nn.Module, steps: int) -> tuple[Optimizer, LRScheduler]:
    # Weight decay is on all parameters, BatchNorm's too: the published code has them in one vector.
    sgd = SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    return sgd, Drops(sgd, steps)


def protocol(settings: Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if settings.protocol == "authors":
        found |= {"batch": 128, "accumulate": 4, "batch_norm": "joint", "expand": "input", "order_seed": 0}
    if settings.experiment:
        found |= {"samples": [1, 4, 8], "alpha": [0.0, 1.0] if settings.experiment == "table1" else [1.0]}
    if settings.experiment == "figure2":
        found["rate"] = list(RATES)
    return found


def arms(settings: Namespace) -> list[dict[str, Any]]:
    if settings.experiment:
        return {"table1": table1, "figure2": figure2}[settings.experiment](settings)
    if settings.protocol == "baseline":
        return []
    swept = product(settings.rate, settings.samples, settings.alpha)
    return [{"rate": p, "alpha": a if s > 1 else 1.0, **_samples(settings, s)} for p, s, a in swept]


def _samples(settings: Namespace, samples: int) -> dict[str, Any]:
    """The authors' script of the baseline has no micro-batches: BatchNorm sees 128 images there, and 32 in IWSGD's."""
    return {"samples": samples, **({"accumulate": 1} if samples == 1 and settings.protocol == "authors" else {})}


def _times(settings: Namespace, factor: float) -> dict[str, Any]:
    """The training's length, multiplied: in the unit in which it was asked for."""
    if getattr(settings, "steps", None):
        return {"steps": max(1, math.ceil(settings.steps * factor))}
    return {"epochs": settings.epochs * factor}


def table1(settings: Namespace) -> list[dict[str, Any]]:
    """The paper's rows, the unweighted ones that it does not have, and IWSGD for the baseline's number of passes over the network."""
    found = []
    for rate in settings.rate:
        one = {"rate": rate, "alpha": 1.0, **_samples(settings, 1)}
        found += [{"label": "dropout", **one}, {"label": "dropout, 4x iterations", **one, **_times(settings, 4)}]
        for name, alpha in (("IWSGD", 1.0), ("mean", 0.0)):
            found += [{"label": f"{name} S={s}", "rate": rate, "alpha": alpha, **_samples(settings, s)} for s in (4, 8)]
        for s in (4, 8):
            equal = _times(settings, 1 / s)
            found.append({"label": f"IWSGD S={s}, {'epochs' if 'epochs' in equal else 'steps'} / {s}", "rate": rate, "alpha": 1.0})
            found[-1] |= {**_samples(settings, s), **equal}
    return found


def figure2(settings: Namespace) -> list[dict[str, Any]]:
    """Test error over the dropout rate, a curve for each number of samples."""
    name = {1: "dropout", 4: "IWSGD S=4", 8: "IWSGD S=8"}
    return [{"label": name[s], "rate": p, "alpha": 1.0, **_samples(settings, s)} for p in RATES for s in name]
