"""MNIST-1D, 4,000 made signals of 40 numbers in ten classes: an MLP, a CNN or a GRU of the published sizes, with dropout."""

import random
from argparse import Namespace
from importlib import metadata

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.data import TensorDataset

from .packaged import absent, check, sha256
from .recipe import Data, OptionGroup

# The published runs have 6,000 steps of 100 signals, 150 epochs; the MLP learns its training set by heart long before.
DEFAULTS = {
    "samples": [1, 4, 8],
    "alpha": [1.0],
    "rate": [0.3, 0.5],
    "batch": 100,
    "epochs": 50,
    "evaluate_every": 5,
    "expand": "first",
}
QUICK = {"samples": [1, 8], "rate": [0.3], "epochs": 5}
CLASSES, LENGTH = 10, 40
LEARNING_RATE = 1e-2
# What the published file has, which the package makes anew: another version of it, or of NumPy or SciPy, may make other signals.
FIRST, LAST = (-0.33200567, -0.47191037, -0.77869708), (0.65987565, 0.87773435, 1.19315184)
COUNTS = (398, 396, 411, 394, 394, 402, 401, 404, 402, 398)  # training signals of each class
LABELS = "4f5f4160c519e3c47f9d3e196c161336fcd32126a9efffe4153d6e7c8b73f963"  # sha256 of all labels, as bytes


def add_options(group: OptionGroup) -> None:
    group.add_argument("--model", choices=MODELS, default="mlp", help="what learns them")


def load(settings: Namespace) -> Data:
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ImportError as error:
        raise absent(error) from None
    python, numpy = random.getstate(), np.random.get_state()
    try:
        made = make_dataset(get_dataset_args())  # seeds Python's and NumPy's generators
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
    check("the signals", "mnist1d", published(made))
    x, y, x_test, y_test = (torch.tensor(made[key]) for key in ("x", "y", "x_test", "y_test"))
    return Data(TensorDataset(x.float(), y.long()), TensorDataset(x_test.float(), y_test.long()), CLASSES)


def published(made: dict) -> bool:
    """Its labels equal those of the published set, and signals at both ends of it do, up to rounding."""
    x, y, x_test, y_test = (np.asarray(made[key]) for key in ("x", "y", "x_test", "y_test"))
    return (
        (x.shape, x_test.shape) == ((4000, LENGTH), (1000, LENGTH))
        and np.allclose(x[0, :3], FIRST, rtol=0, atol=1e-6)
        and np.allclose(x_test[-1, -3:], LAST, rtol=0, atol=1e-6)
        and tuple(np.bincount(y, minlength=CLASSES)) == COUNTS
        and sha256(y.astype(np.uint8).tobytes(), y_test.astype(np.uint8).tobytes()) == LABELS
    )


class MLP(nn.Module):
    """15,210 parameters. Both the second layer and the path around it get what the first dropout has left."""

    def __init__(self, p: float, width: int = 100):
        super().__init__()
        self.layer1, self.layer2, self.head = nn.Linear(LENGTH, width), nn.Linear(width, width), nn.Linear(width, CLASSES)
        self.dropout1, self.dropout2 = nn.Dropout(p), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout1(self.layer1(x).relu())
        return self.head(h + self.dropout2(self.layer2(h).relu()))


def cnn(p: float, channels: int = 25) -> nn.Module:
    """5,210 parameters: signals of 40 numbers become 19, 10 and 5 positions."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, LENGTH))]
    for inputs, kernel in ((1, 5), (channels, 3), (channels, 3)):
        layers += [nn.Conv1d(inputs, channels, kernel, stride=2, padding=1), nn.ReLU(), nn.Dropout(p)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(5 * channels, CLASSES))


class GRU(nn.Module):
    """5,134 parameters. Dropout is on the outputs alone: the input has one number a position, and the signal would go with it."""

    def __init__(self, p: float, width: int = 6):
        super().__init__()
        self.gru = nn.GRU(1, width, batch_first=True, bidirectional=True)
        self.dropout, self.head = nn.Dropout(p), nn.Linear(2 * width * LENGTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.gru(x.unsqueeze(2))[0]).flatten(1))


MODELS = {"mlp": MLP, "cnn": cnn, "gru": GRU}


def build(settings: Namespace, data: Data) -> nn.Module:
    return MODELS[settings.model](settings.rate)


def optimizer(settings: Namespace, model: nn.Module, steps: int) -> tuple[Adam, None]:
    return Adam(model.parameters(), LEARNING_RATE), None


def facts(settings: Namespace) -> dict[str, str]:
    return {"data": f"made by mnist1d {metadata.version('mnist1d')}", "sha256 of the labels": LABELS}
