"""What a recipe says: its data, model and optimiser. One module a recipe; the names in ``RECIPES`` are the modules."""

import importlib
from argparse import Namespace, _ArgumentGroup
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

RECIPES = ("digits", "mnist1d", "mnist5k", "chars", "cifar_wrn")


class Missing(Exception):
    """Data that is not there, or not whole. Its message names the file and says what to do; the tool ends with it."""


class Data(NamedTuple):
    """What is learnt and on what it is measured.

    ``train[indices]`` and ``test[indices]`` are (x, y) of the examples of a list of indices, as tensors on the CPU (a TensorDataset of
    two tensors is one). The targets y are class numbers, [B] or [B, T].
    """

    train: Dataset
    test: Dataset
    classes: int


def unchanged(x: Tensor, train: bool) -> Tensor:
    return x


class Recipe(Protocol):
    """A module of this folder. Its docstring's first line is its line in ``--list``."""

    #: Defaults of the tool's options: samples, alpha, rate (lists), batch, epochs, ... (see recipes.options).
    DEFAULTS: dict[str, Any]
    #: Those of them that ``--quick`` changes.
    QUICK: dict[str, Any]
    #: On the device, in the step: normalises examples and, in training, augments them by torch's default generator. Optional.
    prepare: Callable[[Tensor, bool], Tensor]

    def add_options(self, group: _ArgumentGroup) -> None:
        """Adds the recipe's own options."""

    def load(self, settings: Namespace) -> Data:
        """Reads or makes the data. Raises :class:`Missing`."""

    def build(self, settings: Namespace, data: Data) -> nn.Module:
        """A model of plain torch, its dropout of rate ``settings.rate``; called after torch.manual_seed. Logits are [B, C] or [B, C, T]."""

    def optimizer(self, settings: Namespace, model: nn.Module, steps: int) -> tuple[Optimizer, LRScheduler | None]:
        """The optimiser, and a schedule that goes on by one at each of the run's ``steps``."""


def find(name: str) -> Any:
    """The recipe's module, with what is optional filled in."""
    module = importlib.import_module(f"recipes.{name}")
    if not hasattr(module, "prepare"):
        module.prepare = unchanged
    return module
