"""Small archives of CIFAR in the official format, with pickles as Python 2 wrote them, for the tests; and the recipe's settings."""

import io
import pickle
import struct
import tarfile
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
import torch

from recipes import cifar, cifar_wrn


def settings(*arguments: str, **values) -> Namespace:
    """The recipe's own options, and those of the tool's that it reads."""
    parser = ArgumentParser()
    cifar_wrn.add_options(parser.add_argument_group("cifar_wrn alone"))
    defaults = {**cifar_wrn.DEFAULTS, "steps": None, "data": Path("data"), **values}
    return Namespace(**defaults, **vars(parser.parse_args(arguments)))


Py2Str = bytes  # what Python 2 calls str


class Py2Array:
    def __init__(self, values: np.ndarray, raw: bytes | None = None, code: Py2Str = b"u1", shape: tuple | None = None):
        self.raw, self.code, self.shape = values.tobytes() if raw is None else raw, code, shape or values.shape


def python2_pickle(value) -> bytes:
    """Protocol 2 as cPickle of Python 2 writes it: each str by SHORT_BINSTRING or BINSTRING, which no Python 3 writes."""
    memo = iter(range(256))

    def put() -> bytes:
        return b"q" + bytes([next(memo)])

    def emit(v) -> bytes:
        if v is None or isinstance(v, bool):
            return {None: b"N", False: b"\x89", True: b"\x88"}[v]
        if isinstance(v, int):
            if 0 <= v < 256:
                return b"K" + bytes([v])
            return b"M" + struct.pack("<H", v) if 0 <= v < 65536 else b"J" + struct.pack("<i", v)
        if isinstance(v, bytes):
            return b"U" + bytes([len(v)]) + v if len(v) < 256 else b"T" + struct.pack("<i", len(v)) + v
        if isinstance(v, float):
            return b"G" + struct.pack(">d", v)
        if isinstance(v, list):
            return b"]" + put() + b"(" + b"".join(map(emit, v)) + b"e"
        if isinstance(v, tuple):
            return b"(" + b"".join(map(emit, v)) + b"t"
        if isinstance(v, dict):
            return b"}" + put() + b"(" + b"".join(emit(k) + emit(x) for k, x in v.items()) + b"u"
        array = (
            b"cnumpy.core.multiarray\n_reconstruct\n" + put() + b"cnumpy\nndarray\n" + put() + b"K\x00\x85" + emit(b"b") + b"\x87R" + put()
        )
        kind = b"cnumpy\ndtype\n" + put() + emit(v.code) + b"K\x00K\x01\x87R" + put()
        kind += b"(K\x03" + emit(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        return array + b"(K\x01" + emit(v.shape) + kind + b"\x89" + emit(v.raw) + b"tb"

    return b"\x80\x02" + emit(value) + b"."


def text(value):
    """The same as Python 3 has it: str in the place of Python 2's str, and numpy's arrays."""
    if isinstance(value, Py2Array):
        return np.frombuffer(value.raw, np.uint8).reshape(value.shape)
    if isinstance(value, dict):
        return {text(k): text(v) for k, v in value.items()}
    if isinstance(value, list):
        return [text(v) for v in value]
    return value.decode("latin1") if isinstance(value, bytes) else value


WRITERS = {"python 2": python2_pickle} | {
    f"python 3, protocol {protocol}": lambda value, protocol=protocol: pickle.dumps(text(value), protocol) for protocol in (2, 4, 5)
}
IMAGES = {
    "cifar10": {"data_batch_1": 3, "data_batch_2": 1, "data_batch_3": 2, "data_batch_4": 1, "data_batch_5": 4, "test_batch": 3},
    "cifar100": {"train": 7, "test": 4},
}
DATASETS = tuple(IMAGES)


def contents(dataset: str) -> dict[str, dict]:
    """What the members hold: few images, all else as in the official files."""
    rng, made = np.random.default_rng(5), {}
    for name, count in IMAGES[dataset].items():
        data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        files = [b"image_%d.png" % k for k in range(count)]
        made[name] = {b"batch_label": b"batch of " + name.encode(), b"data": Py2Array(data), b"filenames": files}
        if dataset == "cifar10":
            made[name][b"labels"] = [int(k) for k in rng.integers(0, 10, count)]
        else:
            made[name] |= {b"fine_labels": [int(k) for k in rng.integers(0, 100, count)], b"coarse_labels": [0] * count}
    if dataset == "cifar10":
        made["batches.meta"] = {b"num_cases_per_batch": 3, b"label_names": [b"class %d" % k for k in range(10)], b"num_vis": 3072}
    else:
        made["meta"] = {b"fine_label_names": [b"class %d" % k for k in range(100)], b"coarse_label_names": [b"group"] * 20}
    return made


def expected(dataset: str, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    key = b"labels" if dataset == "cifar10" else b"fine_labels"
    batches = [v for name, v in contents(dataset).items() if name.startswith({"train": ("data_batch", "train"), "test": "test"}[part])]
    pixels = [list(image) for v in batches for image in np.frombuffer(v[b"data"].raw, np.uint8).reshape(-1, 3, 32, 32)]
    return torch.tensor(np.array(pixels)), torch.tensor([label for v in batches for label in v[key]])


def pickled(dataset: str, writer: str = "python 2") -> dict[str, bytes]:
    return {name: WRITERS[writer](value) for name, value in contents(dataset).items()}


def tar_gz(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def archive(root: Path, dataset: str, members: dict[str, bytes], folder: str | None = None) -> Path:
    spec = cifar.ARCHIVES[dataset]
    folder = folder or spec.folder
    return tar_gz(root / spec.file, {f"{folder}/{name}": content for name, content in {"readme.html": b"<html>", **members}.items()})


def extracted(root: Path, dataset: str, members: dict[str, bytes]) -> Path:
    folder = root / cifar.ARCHIVES[dataset].folder
    folder.mkdir()
    for name, content in members.items():
        (folder / name).write_bytes(content)
    return folder
