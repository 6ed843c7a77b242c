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
OptionGroup = _ArgumentGroup  # argparse's group of options, which has no public name


class UserError(Exception):
    """What the user can put right. The message names the file or the option, and says what to do; the tool ends with it alone."""


class Missing(UserError):
    """Data that is not there, or not whole."""


class Data(NamedTuple):
    """What is learnt and on what it is measured.

    ``train[indices]`` and ``test[indices]`` are (x, y) of the examples of a list of indices, as tensors on the CPU (a TensorDataset of
    two tensors is one). The targets y are class numbers, [B] or [B, T].
    """

    train: Dataset
    test: Dataset
    classes: int


class Recipe(Protocol):
    """A module of this folder. Its docstring's first line is its line in ``--list``.

    Everything random is drawn from torch's default generators: the tool seeds them before each step, so that a step is the same
    whatever ran before it.
    """

    def load(self, settings: Namespace) -> Data:
        """Reads or makes the data. Raises :class:`Missing`."""

    def build(self, settings: Namespace, data: Data) -> nn.Module:
        """A model of plain torch, its dropout of rate ``settings.rate``; called after torch.manual_seed. Logits are [B, C] or [B, C, T]."""

    def optimizer(self, settings: Namespace, model: nn.Module, steps: int) -> tuple[Optimizer, LRScheduler | None]:
        """The optimiser, and a schedule that goes on by one at each of the run's ``steps``."""

    #: Optional: defaults of the tool's options by their names: samples, alpha, rate (lists), batch, epochs, ... (see recipes.options).
    DEFAULTS: dict[str, Any]
    #: Optional: those that ``--quick`` changes.
    QUICK: dict[str, Any]
    #: Optional: adds the recipe's own options.
    add_options: Callable[[OptionGroup], None]
    #: Optional: the inputs on the device, normalised and, in training, augmented.
    prepare: Callable[[Tensor, bool], Tensor]
    #: Optional: settings that the recipe's own options imply; others are refused.
    protocol: Callable[[Namespace], dict[str, Any]]
    #: Optional: the arms that the recipe's own options ask for, as settings that differ, with a "label"; none of them: an empty list.
    arms: Callable[[Namespace], list[dict[str, Any]]]
    #: Optional: what identifies the data, for the results.
    facts: Callable[[Namespace], dict[str, Any]]


def find(name: str) -> Any:
    """The recipe's module, with what is optional filled in."""
    module = importlib.import_module(f"recipes.{name}")
    for optional, nothing in (
        ("DEFAULTS", {}),
        ("QUICK", {}),
        ("add_options", lambda group: None),
        ("prepare", lambda x, train: x),
        ("protocol", lambda settings: {}),
        ("arms", lambda settings: []),
        ("facts", lambda settings: {}),
    ):
        if not hasattr(module, optional):
            setattr(module, optional, nothing)
    return module
