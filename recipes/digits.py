"""Scikit-learn's digits, 8x8 pixels: 300 training images, an MLP with dropout. Minutes on a CPU."""

from argparse import Namespace
from importlib import metadata

import numpy as np
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import TensorDataset

from .packaged import absent, add_train_images, check, sha256
from .recipe import Data, OptionGroup

DEFAULTS = {
    "samples": [1, 4, 8],
    "alpha": [1.0],
    "rate": [0.3, 0.5, 0.7],
    "batch": 50,
    "epochs": 50,
    "evaluate_every": 5,
    "expand": "first",
}
QUICK = {"samples": [1, 8], "rate": [0.5], "epochs": 10}
IMAGES, CLASSES, WIDTH = 1797, 10, 256
LEARNING_RATE, MOMENTUM = 0.05, 0.9
SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"  # of the pixels, 0 to 16, and the labels, as bytes


def add_options(group: OptionGroup) -> None:
    add_train_images(group, 300, IMAGES, CLASSES)


def load(settings: Namespace) -> Data:
    """One split for all seeds, with each class's share in both parts."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise absent(error) from None
    x, y = load_digits(return_X_y=True)
    check("the digits", "scikit-learn", sha256(x.astype(np.uint8).tobytes(), y.astype(np.uint8).tobytes()) == SHA256)
    x, x_test, y, y_test = train_test_split(x / 16, y, train_size=settings.train_images, stratify=y, random_state=0)
    train, test = ((torch.tensor(a).float(), torch.tensor(b).long()) for a, b in ((x, y), (x_test, y_test)))
    return Data(TensorDataset(*train), TensorDataset(*test), CLASSES)


def build(settings: Namespace, data: Data) -> nn.Module:
    hidden = [nn.Linear(64, WIDTH), nn.ReLU(), nn.Dropout(settings.rate), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(settings.rate)]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, CLASSES))


def optimizer(settings: Namespace, model: nn.Module, steps: int) -> tuple[SGD, None]:
    return SGD(model.parameters(), LEARNING_RATE, MOMENTUM), None


def facts(settings: Namespace) -> dict[str, str]:
    return {"data": f"digits of scikit-learn {metadata.version('scikit-learn')}", "sha256 of the data": SHA256}
