"""CIFAR-10 and CIFAR-100, read from the official archives, python version, without extracting them, or from what they extract to."""

import gzip
import hashlib
import pickle
import tarfile
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from .recipe import Data, Missing

PIXELS = 3 * 32 * 32  # of an image, in a row: red, green, blue, each row by row


class Archive(NamedTuple):
    file: str
    md5: str
    folder: str  # that it extracts to, and its members' beginning
    train: dict[str, str]  # members and their MD5
    test: dict[str, str]
    meta: dict[str, str]
    labels: str  # the keys of a batch's labels and of the meta member's names of classes
    names: str
    classes: int

    @property
    def members(self) -> dict[str, str]:
        return {**self.train, **self.test, **self.meta}


ARCHIVES = {
    "cifar10": Archive(
        "cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
        "cifar-10-batches-py",
        {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        {"test_batch": "40351d587109b95175f43aff81a1287e"},
        {"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
        "labels",
        "label_names",
        10,
    ),
    "cifar100": Archive(
        "cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
        "cifar-100-python",
        {"train": "16019d7e3df5f24257cddd939b257f8d"},
        {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        {"meta": "7973b15100ade9c7d40fb424638fde48"},
        "fine_labels",
        "fine_label_names",
        100,
    ),
}
# Of all versions, the names of archives and of the folders in them.
VERSIONS = {
    "cifar-10-python.tar.gz": "CIFAR-10, python version",
    "cifar-10-batches-py": "CIFAR-10, python version",
    "cifar-10-binary.tar.gz": "CIFAR-10, binary version",
    "cifar-10-batches-bin": "CIFAR-10, binary version",
    "cifar-10-matlab.tar.gz": "CIFAR-10, Matlab version",
    "cifar-10-batches-mat": "CIFAR-10, Matlab version",
    "cifar-100-python.tar.gz": "CIFAR-100, python version",
    "cifar-100-python": "CIFAR-100, python version",
    "cifar-100-binary.tar.gz": "CIFAR-100, binary version",
    "cifar-100-binary": "CIFAR-100, binary version",
    "cifar-100-matlab.tar.gz": "CIFAR-100, Matlab version",
    "cifar-100-matlab": "CIFAR-100, Matlab version",
}


def load(root: Path, dataset: str, any_archive: bool = False) -> Data:
    """The images uint8 [N, 3, 32, 32] and classes int64 [N] of ``root``'s archive; where there is none, of the folder it extracts to.

    Args:
        root: the folder of ``cifar-10-python.tar.gz`` or ``cifar-10-batches-py``, for CIFAR-100 of the names in :data:`ARCHIVES`.
        dataset: "cifar10" or "cifar100".
        any_archive: leave out the comparison of MD5s: for an archive of one's own in the same format. All other checks are made.

    Raises:
        Missing: the data is not there, is not whole, or is something else.
    """
    if dataset not in ARCHIVES:
        raise ValueError(f"dataset: expected {' or '.join(ARCHIVES)}, got {dataset!r}")
    spec, root = ARCHIVES[dataset], Path(root)
    file, folder = root / spec.file, root / spec.folder
    if file.exists():
        source, contents = file, _of_archive(file, spec, any_archive)
    elif folder.is_dir():
        source, contents = folder, _of_folder(folder, spec)
    else:
        others = [f"{name} ({version})" for name, version in VERSIONS.items() if (root / name).exists()]
        raise Missing(
            f"{file}: there is no such file in {root.absolute()}, nor the folder {spec.folder}{_hint(others, 'There is')}. Download "
            f"{_wanted(spec)}, into this folder, or give its folder by --data; --synthetic tries the recipe without data"
        )
    batches = {}
    for name, content in contents:
        where = f"{source}, member {name}" if source == file else f"{source / name}"
        if not any_archive:
            _compare(where, hashlib.md5(content, usedforsecurity=False).hexdigest(), spec.members[name], spec)
        values = _unpickled(where, content)
        if name in spec.meta:
            _check_names(where, values, spec)
        else:
            batches[name] = _batch(where, values, spec)
    return Data(_joined(batches, spec.train), _joined(batches, spec.test), spec.classes)


def synthetic(classes: int, seed: int) -> Data:
    """512 training and 256 test images made by a seed, in the same form: to try a training with, not to report.

    Each class has a pattern of low frequency. An image is its class's pattern, a pattern of its own, which hides it, and noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def patterns(count: int) -> Tensor:
        return F.interpolate(torch.randn(count, 3, 4, 4, generator=generator), size=32, mode="bilinear", align_corners=False)

    def images(count: int) -> TensorDataset:
        y = (torch.arange(count) % classes)[torch.randperm(count, generator=generator)]
        noise = torch.randn(count, 3, 32, 32, generator=generator)
        x = 125 + 50 * of_class[y] + 25 * patterns(count) + 25 * noise
        return TensorDataset(x.round().clamp(0, 255).byte(), y)

    of_class = patterns(classes)
    return Data(images(512), images(256), classes)


def _wanted(spec: Archive) -> str:
    return f"{spec.file}, the {VERSIONS[spec.file]} from the CIFAR page of the University of Toronto, MD5 {spec.md5}"


def _hint(found: list[str], words: str) -> str:
    return f". {words} {', '.join(found)}" if found else ""


def _compare(where: str, got: str, expected: str, spec: Archive, hint: str = "") -> None:
    if got != expected:
        raise Missing(
            f"{where}: MD5 expected {expected}, got {got}{hint}. The file is not whole, or another: download {_wanted(spec)}. For an "
            "archive of your own in this format give --any-archive"
        )


def _of_folder(folder: Path, spec: Archive) -> Iterator[tuple[str, bytes]]:
    for name in spec.members:
        try:
            yield name, (folder / name).read_bytes()
        except OSError as error:
            raise Missing(f"{folder / name}: could not be read ({error.strerror}). Extract it again from {_wanted(spec)}") from None


def _of_archive(file: Path, spec: Archive, any_archive: bool) -> Iterator[tuple[str, bytes]]:
    """The members that are wanted, in the archive's order. The stream is read to its end, where gzip has its checksum."""
    if not any_archive:
        try:
            with file.open("rb") as stream:
                digest = hashlib.md5(usedforsecurity=False)
                while piece := stream.read(1 << 20):
                    digest.update(piece)
        except OSError as error:
            raise Missing(f"{file}: could not be read ({error.strerror}). Expected {_wanted(spec)}") from None
        # The MD5 of something else does not say what it is; its first member does.
        hint = "" if digest.hexdigest() == spec.md5 else _hint(_first_folder(file, spec), "It holds")
        _compare(str(file), digest.hexdigest(), spec.md5, spec, hint)
    missing, folders = set(spec.members), set()
    try:
        with gzip.open(file) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    path = PurePosixPath(member.name)
                    folders.add(path.parts[0] if path.parts else "")
                    if len(path.parts) == 2 and path.parts[0] == spec.folder and path.name in missing and member.isfile():
                        missing.remove(path.name)
                        content = tar.extractfile(member).read()
                        if len(content) != member.size:
                            raise EOFError(f"{path.name} ends early")
                        yield path.name, content
            while stream.read(1 << 20):
                pass
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise Missing(f"{file}: not a whole tar.gz archive ({error}). Download {_wanted(spec)}, again") from None
    if missing:
        others = [VERSIONS[name] for name in sorted(folders) if name in VERSIONS and name != spec.folder]
        absent = ", ".join(f"{spec.folder}/{name}" for name in spec.members if name in missing)
        raise Missing(f"{file}: it has no member {absent}{_hint(others, 'It holds')}. Expected {_wanted(spec)}, or the same format")


def _first_folder(file: Path, spec: Archive) -> list[str]:
    try:
        with tarfile.open(file) as tar:
            first = tar.next()
        name = PurePosixPath(first.name).parts[0] if first and PurePosixPath(first.name).parts else ""
    except (tarfile.TarError, zlib.error, EOFError, OSError):
        return []
    return [VERSIONS[name]] if name in VERSIONS and name != spec.folder else []


class _Type:
    """In the place of ``numpy.dtype``: the type's code."""

    def __init__(self, code: Any, *_: Any):
        self.code = code

    def __setstate__(self, _: Any) -> None:
        """Byte order and fields, which bytes do not have."""


class _Array:
    """In the place of ``numpy.ndarray``: what a pickle says of an array. Nothing is made of it before it is checked."""

    shape: Any = None
    type: Any = None
    order: Any = "C"
    raw: Any = None

    def __setstate__(self, state: Any) -> None:
        self.shape, self.type, fortran, self.raw = state[-4:]  # before them a version, which the oldest arrays do not have
        self.order = "F" if fortran else "C"

    def pixels(self, where: str) -> np.ndarray:
        code = self.type.code if isinstance(self.type, _Type) else None
        if code not in ("u1", "|u1", "uint8"):
            raise Missing(f"{where}: 'data' expected an array of type uint8 (u1), got {code}")
        shape = self.shape
        if not (
            isinstance(shape, tuple) and len(shape) == 2 and all(type(n) is int for n in shape) and shape[0] > 0 and shape[1] == PIXELS
        ):
            raise Missing(f"{where}: 'data' expected the shape (images, {PIXELS}), got {shape}")
        raw = self.raw
        if isinstance(raw, str) and (not raw or ord(max(raw)) < 256):  # a str of Python 2 is of bytes
            raw = raw.encode("latin1")
        if not isinstance(raw, bytes | bytearray) or len(raw) != shape[0] * PIXELS:
            got = f"{len(raw)} bytes" if isinstance(raw, bytes | bytearray) else type(raw).__name__
            raise Missing(f"{where}: 'data' expected {shape[0] * PIXELS} bytes for the shape {shape}, got {got}")
        return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if self.order == "F" else "C")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _from_buffer(raw: Any, kind: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.raw, array.type, array.shape, array.order = raw, kind, shape, order
    return array


def _encode(text: str, encoding: str) -> bytes:
    """Python 3 writes bytes this way into a pickle of protocol 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding expected latin1, got {encoding!r}")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Knows the names with which numpy 1 and 2 write an array, each by a stand-in: a pickle from elsewhere runs no code but this file's."""

    KNOWN: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Type,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy.core.numeric", "_frombuffer"): _from_buffer,  # of protocol 5
        ("numpy._core.numeric", "_frombuffer"): _from_buffer,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which was refused: no array needs it")
        return self.KNOWN[module, name]


def _unpickled(where: str, content: bytes) -> dict[Any, Any]:
    try:
        values = _Unpickler(BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle can fail in any instruction, each with its own error
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise Missing(f"{where}: not a batch of CIFAR's python version ({reason}). Get the file again") from None
    if not isinstance(values, dict):
        raise Missing(f"{where}: expected a dict, got {type(values).__name__}")
    return values


def _get(where: str, values: dict[Any, Any], key: str) -> Any:
    if key not in values:
        raise Missing(f"{where}: expected the key {key!r}, got {', '.join(sorted(map(repr, values)))}")
    return values[key]


def _check_names(where: str, values: dict[Any, Any], spec: Archive) -> None:
    names = _get(where, values, spec.names)
    if not isinstance(names, list) or len(names) != spec.classes:
        got = f"{len(names)}" if isinstance(names, list) else type(names).__name__
        raise Missing(f"{where}: {spec.names!r} expected a list of {spec.classes} names, got {got}")


def _batch(where: str, values: dict[Any, Any], spec: Archive) -> tuple[np.ndarray, list[int]]:
    data, labels = _get(where, values, "data"), _get(where, values, spec.labels)
    if not isinstance(data, _Array):
        raise Missing(f"{where}: 'data' expected a numpy array, got {type(data).__name__}")
    data = data.pixels(where)
    if not isinstance(labels, list) or any(type(label) is not int for label in labels):
        raise Missing(f"{where}: {spec.labels!r} expected a list of ints, got {_kinds(labels)}")
    if len(labels) != len(data):
        raise Missing(f"{where}: {spec.labels!r} expected {len(data)} labels, one for each image, got {len(labels)}")
    if wrong := [label for label in labels if not 0 <= label < spec.classes]:
        raise Missing(f"{where}: {spec.labels!r} expected 0 to {spec.classes - 1}, got {wrong[0]}")
    return data, labels


def _kinds(labels: Any) -> str:
    if not isinstance(labels, list):
        return "an array" if isinstance(labels, _Array) else type(labels).__name__
    return f"a list with {', '.join(sorted({type(label).__name__ for label in labels}))}"


def _joined(batches: dict[str, tuple[np.ndarray, list[int]]], names: dict[str, str]) -> TensorDataset:
    x = np.concatenate([batches[name][0] for name in names]).reshape(-1, 3, 32, 32)
    return TensorDataset(torch.from_numpy(x), torch.tensor([label for name in names for label in batches[name][1]]))
