"""What the recipes share whose data come with a package: the packages' absence, their versions, and whether the data are the known ones."""

import argparse
import hashlib
from collections.abc import Callable
from importlib import metadata

from .recipe import Missing, OptionGroup


def absent(error: ImportError) -> Missing:
    return Missing(f"{error}: this recipe's data come with a package: pip install 'iwsgd_ext[recipes]'")


def sha256(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def check(what: str, package: str, known: bool) -> None:
    """Refuses other data than those that a recipe's results are about: numbers of two data sets cannot be compared."""
    if not known:
        raise Missing(
            f"{what} of {package} {metadata.version(package)} are other data than this recipe knows, and results would not compare with "
            f"earlier ones: install another version of {package}"
        )


def number(low: int, high: int) -> Callable[[str], int]:
    """The type of an option: a whole number from low to high."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got {text}")
        return int(text)

    return parse


def add_train_images(group: OptionGroup, default: int, images: int, classes: int) -> None:
    """An option for the number of images to learn from; each class needs one in both parts."""
    told = f"images to learn from, of {images}; the rest are for the test"
    group.add_argument("--train-images", type=number(classes, images - classes), default=default, help=told)
