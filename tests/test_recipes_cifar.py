"""The recipe of CIFAR: network, archives, augmentation and schedule, each against what its published source has."""

import copy
import csv
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import struct
import tarfile
from argparse import ArgumentParser, Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import iwsgd_ext as iw
from recipes import cifar, cifar_wrn
from recipes.recipe import Missing
from recipes.wide_resnet import WideBlock, wide_resnet


def settings(*arguments: str, **values) -> Namespace:
    """The recipe's own options, and those of the tool's that it reads."""
    parser = ArgumentParser()
    cifar_wrn.add_options(parser.add_argument_group("cifar_wrn alone"))
    defaults = {**cifar_wrn.DEFAULTS, "steps": None, "data": Path("data"), **values}
    return Namespace(**defaults, **vars(parser.parse_args(arguments)))


# The network

PARAMETERS = {  # by depth and width, for 10 and 100 classes
    (10, 1): (77_850, 83_700),
    (10, 2): (303_706, 315_316),
    (10, 4): (1_198_810, 1_221_940),
    (16, 1): (175_066, 180_916),
    (16, 2): (691_674, 703_284),
    (16, 4): (2_748_890, 2_772_020),
    (16, 8): (10_961_370, 11_007_540),
    (22, 8): (17_158_106, 17_204_276),
    (28, 1): (369_498, 375_348),
    (28, 2): (1_467_610, 1_479_220),
    (28, 4): (5_849_050, 5_872_180),
    (28, 10): (36_479_194, 36_536_884),
    (40, 1): (563_930, 569_780),
    (40, 2): (2_243_546, 2_255_156),
    (40, 4): (8_949_210, 8_972_340),
    (40, 10): (55_841_754, 55_899_444),
}
DROPOUTS = {10: 3, 16: 6, 22: 9, 28: 12, 40: 18}


@pytest.mark.parametrize(("depth", "widen"), PARAMETERS, ids=lambda value: str(value))
def test_numbers_of_parameters_and_dropouts(depth, widen):
    for classes, expected in zip((10, 100), PARAMETERS[depth, widen], strict=True):
        with torch.device("meta"):
            model = wide_resnet(depth, widen, classes, 0.4)
        assert sum(p.numel() for p in model.parameters()) == expected
        drops = [m for m in model.modules() if isinstance(m, nn.Dropout)]
        assert [m.p for m in drops] == [0.4] * DROPOUTS[depth]
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert len(convolutions) == depth - 3 + (3 if widen > 1 else 2)  # WRN-28-10: 1 + 24 + 3
        assert all(m.bias is None for m in convolutions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((12, 1, 10, 0.3), r"depth: expected 6n \+ 4 .*, got 12"),
        ((4, 1, 10, 0.3), "depth: .*, got 4"),
        ((10, 0, 10, 0.3), "widen: expected at least 1, got 0"),
        ((10, 1, 0, 0.3), "classes: expected at least 1, got 0"),
        ((10, 1, 10, 0.3, 0), "channels: expected at least 1, got 0"),
    ],
)
def test_arguments_that_no_network_has(arguments, message):
    with pytest.raises(ValueError, match=message):
        wide_resnet(*arguments)


@pytest.mark.parametrize("size", [32, 45], ids=["as CIFAR's", "odd"])
def test_shapes_and_strides(size):
    model, seen = wide_resnet(16, 2, 10, 0.3), []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, x, y: seen.append((m.kernel_size[0], m.stride[0], x[0].shape[1], *y.shape[1:])))
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 10)
    half = (size + 1) // 2
    quarter = (half + 1) // 2
    expected = [(3, 1, 3, 16, size, size)]
    for inputs, outputs, stride, side in ((16, 32, 1, size), (32, 64, 2, half), (64, 128, 2, quarter)):
        first = (3, stride, inputs, outputs, side, side)
        expected += [first, (3, 1, outputs, outputs, side, side), (1, stride, inputs, outputs, side, side)]
        expected += [(3, 1, outputs, outputs, side, side)] * 2
    assert seen == expected


def functional(model: nn.Module, depth: int, x: torch.Tensor) -> torch.Tensor:
    """The published network in training mode, from the parameters alone; its dropout is left out."""
    values = list(model.parameters())

    def norm_relu(x, gamma, beta):
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        return ((x - mean) / (var + 1e-5).sqrt() * gamma.view(1, -1, 1, 1) + beta.view(1, -1, 1, 1)).clamp(min=0)

    x = F.conv2d(x, values.pop(0), padding=1)
    for group in range(3):
        for block in range((depth - 4) // 6):
            stride = 2 if group and not block else 1
            gamma1, beta1, conv1, gamma2, beta2, conv2 = (values.pop(0) for _ in range(6))
            o = norm_relu(x, gamma1, beta1)
            shortcut = F.conv2d(o, values.pop(0), stride=stride) if conv1.shape[0] != conv1.shape[1] else x
            x = F.conv2d(norm_relu(F.conv2d(o, conv1, stride=stride, padding=1), gamma2, beta2), conv2, padding=1) + shortcut
    gamma, beta, weight, bias = values
    return norm_relu(x, gamma, beta).mean((2, 3)) @ weight.T + bias


@pytest.mark.parametrize("widen", [1, 2], ids=["no projection in the first group", "three projections"])
def test_network_against_its_formula(widen):
    """A projection takes the input after BatchNorm and ReLU, an identity the raw one."""
    model = wide_resnet(16, widen, 7, 0.0).double()
    nn.init.normal_(model[-1].bias)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.bias)
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model(x), functional(model, 16, x), rtol=1e-9, atol=1e-9)
    blocks = [m for m in model if isinstance(m, WideBlock)]
    projected = [k for k, block in enumerate(blocks) if isinstance(block.shortcut, nn.Conv2d)]
    assert projected == ([0, 2, 4] if widen > 1 else [2, 4])


def test_dropout_is_between_the_convolutions():
    block = WideBlock(4, 4, 1, 0.5)
    nn.init.normal_(block.norm2.bias)
    x, order = torch.randn(2, 4, 6, 6), []
    for name, module in block.named_children():
        module.register_forward_hook(lambda m, i, o, name=name: order.append((name, i[0].detach().clone(), o.detach().clone())))
    block(x)
    assert [name for name, _, _ in order] == ["norm1", "conv1", "norm2", "dropout", "conv2", "shortcut"]
    _, conv1, norm2, dropout, conv2, shortcut = order
    assert torch.equal(conv1[1], order[0][2].relu())
    assert torch.equal(norm2[1], conv1[2])
    assert torch.equal(dropout[1], norm2[2].relu())
    assert torch.equal(conv2[1], dropout[2])
    assert torch.equal(shortcut[1], x)
    kept = dropout[2] != 0
    assert 0.3 < kept[dropout[1] > 0].float().mean() < 0.7 and torch.equal(dropout[2][kept], 2 * dropout[1][kept])


def test_initial_values():
    model = wide_resnet(16, 4, 100, 0.3)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            std = math.sqrt(2 / (layer.kernel_size[0] ** 2 * layer.in_channels))
            w = layer.weight.detach() / std
            error = 5 / math.sqrt(w.numel())
            assert abs(w.mean()) < error and abs(w.std() - 1) < error
            assert abs((w.abs() > 2).double().mean() - 0.0455) < error / 4  # a normal law's part beyond two standard deviations
        elif isinstance(layer, nn.BatchNorm2d):
            assert not layer.bias.any() and layer.eps == 1e-5 and layer.momentum == 0.1
            assert 0 <= layer.weight.min() < 0.3 and 0.7 < layer.weight.max() <= 1
    gamma = torch.cat([m.weight.detach() for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
    assert abs(gamma.mean() - 0.5) < 0.03 and abs(gamma.std() - 12**-0.5) < 0.02
    head = model[-1]
    bound = 1 / math.sqrt(256)
    assert 0.99 * bound < head.weight.abs().max() <= bound and abs(head.weight.std() - bound / 3**0.5) < 0.01 * bound
    assert not head.bias.any()


@pytest.mark.parametrize(
    ("expand", "batch_norm", "updates"), [("axis", "per_sample", 3), ("input", "joint", 1)], ids=["baseline", "authors"]
)
def test_both_protocols_convert_the_network(expand, batch_norm, updates):
    model, x = wide_resnet(10, 1, 5, 0.3), torch.randn(4, 3, 8, 8)
    model = iw.convert(model, 3, expand=expand, batch_norm=batch_norm, example_inputs=x if batch_norm == "per_sample" else None)
    before = model[-5].num_batches_tracked.item()
    logits = model.train()(x)
    assert logits.shape == (12, 5) and not torch.equal(logits[:4], logits[4:8])
    assert model[-5].num_batches_tracked.item() - before == updates


# The archives

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


def check_data(data, dataset: str) -> None:
    assert data.classes == {"cifar10": 10, "cifar100": 100}[dataset]
    for part in ("train", "test"):
        x, y = getattr(data, part).tensors
        x_expected, y_expected = expected(dataset, part)
        assert x.dtype == torch.uint8 and torch.equal(x, x_expected)
        assert y.dtype == torch.int64 and torch.equal(y, y_expected)
    x, y = data.train[[2, 0]]
    assert x.shape == (2, 3, 32, 32) and torch.equal(y, expected(dataset, "train")[1][[2, 0]])


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("form", [archive, extracted], ids=["archive", "extracted"])
@pytest.mark.parametrize("dataset", DATASETS)
def test_reads_what_was_written(tmp_path, dataset, form, writer):
    form(tmp_path, dataset, pickled(dataset, writer))
    check_data(cifar.load(tmp_path, dataset, any_archive=True), dataset)
    options = settings("--dataset", dataset, "--any-archive", data=tmp_path)
    check_data(cifar_wrn.load(options), dataset)
    assert cifar_wrn.facts(options)["data_md5"] == "not compared"
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted(
        [cifar.ARCHIVES[dataset].file] if form is archive else [cifar.ARCHIVES[dataset].folder, *pickled(dataset)]
    ), "nothing is extracted"


def test_python_2_pickles_are_what_they_say():
    """The opcodes of the official files: no other test would see it if this file wrote Python 3's."""
    content = pickled("cifar10")["data_batch_1"]
    assert content.startswith(b"\x80\x02}q\x00(U\x0bbatch_label") and b"T\x00\x24\x00\x00" in content  # 3 * 3072 bytes by BINSTRING
    assert b"X" + struct.pack("<i", 4) + b"data" not in content


def digest(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


@pytest.fixture(params=DATASETS)
def official(request, tmp_path, monkeypatch):
    """The test's archive with its MD5s in the place of the official ones."""
    members = pickled(request.param)
    spec, path = cifar.ARCHIVES[request.param], archive(tmp_path, request.param, members)
    parts = {part: {name: digest(members[name]) for name in getattr(spec, part)} for part in ("train", "test", "meta")}
    monkeypatch.setitem(cifar.ARCHIVES, request.param, spec._replace(md5=digest(path.read_bytes()), **parts))
    return request.param, path, members


def test_md5s_that_agree(official, tmp_path):
    dataset, path, members = official
    check_data(cifar.load(tmp_path, dataset), dataset)
    assert cifar_wrn.facts(settings("--dataset", dataset))["data_md5"] == digest(path.read_bytes())
    path.unlink()
    extracted(tmp_path, dataset, members)
    check_data(cifar.load(tmp_path, dataset), dataset)


def test_md5_of_the_archive(official, tmp_path):
    dataset, path, _ = official
    content = path.read_bytes()
    for changed in (content[:-1], content + b"\0", content[:500] + bytes([content[500] ^ 1]) + content[501:]):
        path.write_bytes(changed)
        with pytest.raises(Missing, match=f"{path.name}: MD5 expected {digest(content)}, got {digest(changed)}.*--any-archive"):
            cifar.load(tmp_path, dataset)


def test_md5_of_each_member(official, tmp_path, monkeypatch):
    dataset, path, members = official
    folder = extracted(tmp_path, dataset, members)
    for name, content in members.items():
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
        said = f"{name}: MD5 expected {digest(content)}, got {digest(flipped)}"
        archive(tmp_path, dataset, {**members, name: flipped})
        with monkeypatch.context() as patch:
            patch.setitem(cifar.ARCHIVES, dataset, cifar.ARCHIVES[dataset]._replace(md5=digest(path.read_bytes())))
            with pytest.raises(Missing, match=f"{path.name}, member {said}"):
                cifar.load(tmp_path, dataset)
        path.unlink()
        (folder / name).write_bytes(flipped)
        with pytest.raises(Missing, match=said):
            cifar.load(tmp_path, dataset)
        (folder / name).write_bytes(content)


def test_official_md5s():
    """As the page and the loaders of other libraries have them; the digits of all in one digest, against a slip of the editor's."""
    assert cifar.ARCHIVES["cifar10"].md5 == "c58f30108f718f92721af3b95e74349a"
    assert cifar.ARCHIVES["cifar100"].md5 == "eb9058c3a382ffc7106e4002c42a8d85"
    digits = "".join(md5 for spec in cifar.ARCHIVES.values() for md5 in (spec.md5, *spec.members.values()))
    assert hashlib.sha256(digits.encode()).hexdigest() == "311c4ee9cd6949d4f1aa180882ea1ffaaac43d9d61b2a7b5f5815c5114670477"


@pytest.mark.parametrize("dataset", DATASETS)
def test_nothing_there(tmp_path, dataset):
    spec = cifar.ARCHIVES[dataset]
    with pytest.raises(
        Missing, match=rf"{spec.file}: there is no such file in {tmp_path}, .*{spec.folder}.*python version.*Toronto.*{spec.md5}"
    ):
        cifar.load(tmp_path, dataset)
    with pytest.raises(Missing, match="there is no such file in"):
        cifar.load(tmp_path / "nowhere", dataset)


def test_another_version_is_there(tmp_path):
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"")
    (tmp_path / "cifar-100-python").mkdir()
    found = r"There is cifar-10-binary.tar.gz \(CIFAR-10, binary version\), cifar-100-python \(CIFAR-100, python version\)"
    with pytest.raises(Missing, match=found):
        cifar.load(tmp_path, "cifar10")


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_member_is_not_there(tmp_path, dataset):
    members = pickled(dataset)
    folder = extracted(tmp_path, dataset, members)
    for name in members:
        (folder / name).rename(tmp_path / "away")
        with pytest.raises(Missing, match=f"{folder / name}: could not be read"):
            cifar.load(tmp_path, dataset, any_archive=True)
        (tmp_path / "away").rename(folder / name)
        path = archive(tmp_path, dataset, {k: v for k, v in members.items() if k != name})
        with pytest.raises(Missing, match=f"{path.name}: it has no member {folder.name}/{name}"):
            cifar.load(tmp_path, dataset, any_archive=True)
        path.unlink()
    path = archive(tmp_path, dataset, members)
    with tarfile.open(path, "w:gz") as tar:  # links in the place of files
        for name in members:
            link = tarfile.TarInfo(f"{folder.name}/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, str(folder / name)
            tar.addfile(link)
    with pytest.raises(Missing, match="it has no member"):
        cifar.load(tmp_path, dataset, any_archive=True)


@pytest.mark.parametrize("cut", [0, 1, 9, 200, 0.3, 0.6, 0.9, -600, -9, -8, -1], ids=str)
@pytest.mark.parametrize("dataset", DATASETS)
def test_a_truncated_archive(tmp_path, dataset, cut):
    path = archive(tmp_path, dataset, pickled(dataset))
    content = path.read_bytes()
    path.write_bytes(content[: int(cut * len(content)) if isinstance(cut, float) else cut])
    with pytest.raises(Missing, match=rf"{path.name}: not a whole tar.gz archive .*again"):
        cifar.load(tmp_path, dataset, any_archive=True)
    with pytest.raises(Missing, match=rf"{path.name}: MD5 expected"):
        cifar.load(tmp_path, dataset)


def test_a_truncated_tar_in_a_whole_gz(tmp_path):
    path = archive(tmp_path, "cifar10", pickled("cifar10"))
    content = gzip.decompress(path.read_bytes())
    for part in (0.2, 0.5, 0.7):
        path.write_bytes(gzip.compress(content[: int(part * len(content))]))
        with pytest.raises(Missing, match=f"{path.name}: "):
            cifar.load(tmp_path, "cifar10", any_archive=True)


def test_a_flipped_byte_of_the_archive(tmp_path):
    """Without MD5s: gzip's checksum sees it, at the stream's end, or deflate or tar before."""
    path = archive(tmp_path, "cifar10", pickled("cifar10"))
    content = path.read_bytes()
    for place in [*range(40, len(content), len(content) // 40), len(content) - 6]:  # from 40 on: before it is the name
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        with pytest.raises(Missing, match=path.name):
            cifar.load(tmp_path, "cifar10", any_archive=True)


@pytest.mark.parametrize(
    ("dataset", "folder", "said"),
    [
        ("cifar10", "cifar-10-batches-bin", "CIFAR-10, binary version"),
        ("cifar10", "cifar-10-batches-mat", "CIFAR-10, Matlab version"),
        ("cifar10", "cifar-100-python", "CIFAR-100, python version"),
        ("cifar100", "cifar-100-binary", "CIFAR-100, binary version"),
        ("cifar100", "cifar-10-batches-py", "CIFAR-10, python version"),
    ],
)
@pytest.mark.parametrize("any_archive", [False, True])
def test_an_archive_of_another_version(tmp_path, dataset, folder, said, any_archive):
    path = archive(tmp_path, dataset, {"train.bin": b"\0" * 3074}, folder)
    with pytest.raises(Missing, match=f"{path.name}: .*It holds {said}"):
        cifar.load(tmp_path, dataset, any_archive)


def test_members_in_another_folder(tmp_path):
    """The names train, test and meta are not CIFAR's alone."""
    path = archive(tmp_path, "cifar100", pickled("cifar100"), "letters")
    with pytest.raises(
        Missing, match=f"{path.name}: it has no member cifar-100-python/train, cifar-100-python/test, cifar-100-python/meta"
    ):
        cifar.load(tmp_path, "cifar100", any_archive=True)


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("posix.system", lambda mark: pickle.dumps({"data": Evil(os.system, f"touch {mark}")})),
        ("posix.system", lambda mark: pickle.dumps({"data": Evil(os.system, f"touch {mark}")}, 2)),
        ("os.system", lambda mark: b"\x80\x02cos\nsystem\nU" + bytes([len(f"touch {mark}")]) + f"touch {mark}".encode() + b"\x85R."),
        ("os.system", lambda mark: b"(S'touch " + str(mark).encode() + b"'\nios\nsystem\n."),
        ("_?io.open", lambda mark: pickle.dumps([Evil(open, str(mark), "w")])),
        ("builtins.eval", lambda mark: pickle.dumps(Evil(eval, f"open({str(mark)!r}, 'w')"))),
        ("numpy.ndarray.tofile", lambda mark: b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93)R."),
        ("numpy.core.multiarray.scalar", lambda mark: b"\x80\x02cnumpy.core.multiarray\nscalar\n)R."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("form", [archive, extracted], ids=["archive", "extracted"])
def test_a_pickle_that_calls_something_else(tmp_path, form, name, make):
    mark = tmp_path / "it ran".replace(" ", "_")
    form(tmp_path, "cifar10", {**pickled("cifar10"), "data_batch_3": make(mark)})
    with pytest.raises(Missing, match=rf"data_batch_3: .*it asks for {name}, which was refused"):
        cifar.load(tmp_path, "cifar10", any_archive=True)
    assert not mark.exists()


def test_stand_ins_take_no_other_codec_and_no_other_class():
    with pytest.raises(Missing, match="encoding expected latin1, got 'rot13'"):
        cifar._unpickled("here", b"\x80\x02c_codecs\nencode\nX\x01\0\0\0bX\x05\0\0\0rot13\x86R.")
    made = cifar._unpickled("here", pickle.dumps({"a": np.zeros((2, 2), object)}))["a"]
    assert type(made) is cifar._Array and made.type.code == "O8"


def changed(dataset: str, name: str, **values) -> dict[str, bytes]:
    """The members, one of them with other values; None leaves a key out."""
    made = contents(dataset)[name] | {k.encode(): v for k, v in values.items()}
    return {**pickled(dataset), name: python2_pickle({k: v for k, v in made.items() if v is not None})}


RAW = np.zeros((3, 3072), np.uint8)
WRONG = {
    "no data": ("data_batch_1", {"data": None}, "expected the key 'data', got 'batch_label', 'filenames', 'labels'"),
    "no labels": ("data_batch_1", {"labels": None, "fine_labels": [1, 2, 3]}, "expected the key 'labels', got .*'fine_labels'"),
    "a list for data": ("data_batch_1", {"data": [1, 2]}, "'data' expected a numpy array, got list"),
    "floats": ("data_batch_1", {"data": Py2Array(RAW, code=b"f8")}, r"'data' expected an array of type uint8 \(u1\), got f8"),
    "signed": ("data_batch_1", {"data": Py2Array(RAW, code=b"i1")}, r"type uint8 \(u1\), got i1"),
    "narrow": ("data_batch_1", {"data": Py2Array(RAW[:, 1:])}, r"expected the shape \(images, 3072\), got \(3, 3071\)"),
    "as images": ("data_batch_1", {"data": Py2Array(RAW.reshape(3, 3, 32, 32))}, r"got \(3, 3, 32, 32\)"),
    "empty": ("data_batch_1", {"data": Py2Array(RAW[:0]), "labels": []}, r"got \(0, 3072\)"),
    "a shape of other numbers": ("data_batch_1", {"data": Py2Array(RAW, shape=(3.0, 3072))}, r"got \(3.0, 3072\)"),
    "bytes too few": ("data_batch_1", {"data": Py2Array(RAW, raw=bytes(9000))}, "expected 9216 bytes .*got 9000 bytes"),
    "no bytes": ("data_batch_1", {"data": Py2Array(RAW, raw=7)}, "expected 9216 bytes .*got int"),
    "labels too few": ("data_batch_1", {"labels": [1, 2]}, "'labels' expected 3 labels, one for each image, got 2"),
    "a label of 10": ("data_batch_1", {"labels": [1, 10, 2]}, "'labels' expected 0 to 9, got 10"),
    "a label of -1": ("data_batch_1", {"labels": [1, -1, 2]}, "'labels' expected 0 to 9, got -1"),
    "true for a label": ("data_batch_1", {"labels": [1, True, 2]}, "'labels' expected a list of ints, got a list with bool, int"),
    "a float for a label": ("test_batch", {"labels": [1, 1.0, 2]}, "'labels' expected a list of ints, got a list with float, int"),
    "a tuple of labels": ("test_batch", {"labels": (1, 2, 3)}, "'labels' expected a list of ints, got tuple"),
    "an array of labels": ("test_batch", {"labels": Py2Array(RAW)}, "'labels' expected a list of ints, got an array"),
    "nine classes": ("batches.meta", {"label_names": [b"a"] * 9}, "'label_names' expected a list of 10 names, got 9"),
    "no classes": ("batches.meta", {"label_names": None}, "expected the key 'label_names'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_member_of_another_content(tmp_path, case):
    name, values, said = WRONG[case]
    archive(tmp_path, "cifar10", changed("cifar10", name, **values))
    with pytest.raises(Missing, match=rf"member {name}: {'.*' + said}"):
        cifar.load(tmp_path, "cifar10", any_archive=True)


def test_labels_of_cifar_100_end_at_99(tmp_path):
    archive(tmp_path, "cifar100", changed("cifar100", "test", fine_labels=[0, 99, 5, 100]))
    with pytest.raises(Missing, match="member test: 'fine_labels' expected 0 to 99, got 100"):
        cifar.load(tmp_path, "cifar100", any_archive=True)


def test_a_damaged_member(tmp_path):
    """Any damage: cut anywhere, no pickle, no dict. It is refused, and if not seen it must be where the format holds free values."""
    members = pickled("cifar10")
    folder, whole = extracted(tmp_path, "cifar10", members), members["data_batch_2"]
    for content in (b"", b"no pickle", b"\x1f\x8b" + bytes(50), *(whole[:n] for n in range(1, len(whole), 97)), whole[:-1]):
        (folder / "data_batch_2").write_bytes(content)
        with pytest.raises(Missing, match="data_batch_2: not a batch of CIFAR's python version"):
            cifar.load(tmp_path, "cifar10", any_archive=True)
    (folder / "data_batch_2").write_bytes(python2_pickle([1, 2]))
    with pytest.raises(Missing, match="data_batch_2: expected a dict, got list"):
        cifar.load(tmp_path, "cifar10", any_archive=True)
    structure = [k for k in range(len(whole)) if not whole.find(b"T\0\x0c") + 5 <= k < whole.find(b"T\0\x0c") + 5 + 3072]
    for place in structure:
        (folder / "data_batch_2").write_bytes(whole[:place] + bytes([whole[place] ^ 0x21]) + whole[place + 1 :])
        try:
            cifar.load(tmp_path, "cifar10", any_archive=True)
        except Missing as error:
            assert "data_batch_2: " in str(error)


def test_arrays_by_columns(tmp_path):
    """An array that numpy wrote in Fortran's order."""
    members, data = pickled("cifar10"), text(contents("cifar10")["test_batch"])
    for protocol in (2, 4, 5):
        members["test_batch"] = pickle.dumps({**data, "data": np.asfortranarray(data["data"])}, protocol)
        archive(tmp_path, "cifar10", members)
        check_data(cifar.load(tmp_path, "cifar10", any_archive=True), "cifar10")


def test_a_dataset_of_another_name(tmp_path):
    with pytest.raises(ValueError, match="dataset: expected cifar10 or cifar100, got 'svhn'"):
        cifar.load(tmp_path, "svhn")


@pytest.mark.parametrize(("dataset", "least"), [("cifar10", 0.8), ("cifar100", 0.3)])
def test_synthetic_images(dataset, least):
    data = cifar_wrn.load(settings("--dataset", dataset, "--synthetic"))
    again, other = cifar.synthetic(data.classes, cifar_wrn.SYNTHETIC_SEED), cifar.synthetic(data.classes, 1)
    (x, y), (x_test, y_test) = data.train.tensors, data.test.tensors
    assert x.shape == (512, 3, 32, 32) and x_test.shape == (256, 3, 32, 32) and x.dtype == torch.uint8 and y.dtype == torch.int64
    assert torch.equal(x, again.train.tensors[0]) and not torch.equal(x, other.train.tensors[0])
    counts = torch.bincount(y, minlength=data.classes)
    assert len(counts) == data.classes and counts.max() - counts.min() <= 1
    assert ((x == 0) | (x == 255)).float().mean() < 0.02, "clipped"
    means = torch.stack([x[y == c].float().mean(0) for c in range(data.classes)])
    nearest = torch.cdist(x_test.float().flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == y_test).float().mean() > least, "the classes differ"
    assert cifar_wrn.facts(settings("--synthetic"))["data"] == "made, 10 classes"


# Augmentation


def one_by_one(x: torch.Tensor, flip: torch.Tensor, top: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Flip, pad and crop, image by image, in torch's own functions."""
    out = []
    for image, f, i, j in zip(x, flip.tolist(), top.tolist(), left.tolist(), strict=True):
        image = image.flip(2) if f else image
        padded = F.pad(image[None].float(), (4, 4, 4, 4), mode="reflect")[0]
        out.append(padded[:, i : i + x.shape[2], j : j + x.shape[3]])
    return torch.stack(out)


@pytest.mark.parametrize("size", [(32, 32), (5, 9)], ids=["as CIFAR's", "the least, not square"])
def test_augmentation_at_every_offset(device, size):
    flip, top, left = (v.flatten() for v in torch.meshgrid(*map(torch.arange, (2, 9, 9)), indexing="ij"))
    flip = flip == 1
    x = torch.randint(0, 256, (162, 3, *size), dtype=torch.uint8)
    got = cifar_wrn.augment(*(v.to(device) for v in (x, flip, top, left)))
    assert got.dtype == torch.uint8 and torch.equal(got.cpu().float(), one_by_one(x, flip, top, left))
    with pytest.raises(ValueError, match="x: expected images larger than 4 pixels each way, got 4 x"):
        cifar_wrn.augment(x[:, :, :4], flip, top, left)


def test_training_images(device):
    """What is drawn is torch's default generator's; flip, crop and normalisation are those of the loop."""
    x = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    torch.manual_seed(3)
    got = cifar_wrn.prepare(x.to(device), True)
    torch.manual_seed(3)
    flip = (torch.rand(40, device=device) < 0.5).cpu()
    top, left = torch.randint(9, (2, 40), device=device).cpu()
    mean, std = torch.tensor([125.3, 123.0, 113.9]).view(3, 1, 1), torch.tensor([63.0, 62.1, 66.7]).view(3, 1, 1)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.cpu(), (one_by_one(x, flip, top, left) - mean) / std, rtol=1e-6, atol=1e-6)
    torch.manual_seed(4)
    assert not torch.equal(got, cifar_wrn.prepare(x.to(device), True))


def test_every_offset_and_flip_occurs(device):
    """Each image tells its own: its pixels are their row and column."""
    place = torch.arange(32, dtype=torch.uint8)
    image = torch.stack([place[:, None].expand(32, 32), place[None].expand(32, 32), torch.zeros(32, 32, dtype=torch.uint8)])
    out = cifar_wrn.prepare(image.to(device).expand(8100, 3, 32, 32), True).cpu()
    rows = (out[:, 0, 12:14, 12] * 63.0 + 125.3).round().int()  # the middle: never of the border
    columns = (out[:, 1, 12, 12:14] * 62.1 + 123.0).round().int()
    flipped = columns[:, 1] < columns[:, 0]
    top = rows[:, 0] - 12 + 4
    left = torch.where(flipped, 31 - columns[:, 0], columns[:, 0]) - 12 + 4
    seen = Counter(zip(flipped.tolist(), top.tolist(), left.tolist(), strict=True))
    assert sorted(seen) == [(f, i, j) for f in (False, True) for i in range(9) for j in range(9)]
    assert min(seen.values()) > 15 and max(seen.values()) < 100  # 50 each, with a standard deviation of 7
    assert abs(flipped.float().mean() - 0.5) < 0.03


def test_test_images(device):
    x = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    state = torch.get_rng_state()
    got = cifar_wrn.prepare(x.to(device), False).cpu().double()
    assert torch.equal(state, torch.get_rng_state()), "nothing is drawn"
    for channel, (mean, std) in enumerate(zip((125.3, 123.0, 113.9), (63.0, 62.1, 66.7), strict=True)):
        torch.testing.assert_close(got[:, channel], (x[:, channel].double() - mean) / std, rtol=1e-5, atol=1e-6)


# Optimiser and schedule


def quadratic(steps: int):
    """A small problem, with the recipe's optimiser: the gradient differs from step to step."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    return model, *cifar_wrn.optimizer(settings(), model, steps)


def a_step(model, optimizer, schedule, k: int) -> float:
    lr = optimizer.param_groups[0]["lr"]
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
    optimizer.zero_grad()
    (0.1 * model(x).square().sum()).backward()
    optimizer.step()
    schedule.step()
    return lr


def test_learning_rates_of_200_epochs():
    model, optimizer, schedule = quadratic(200 * 4)
    lrs = [a_step(model, optimizer, schedule, k) for k in range(800)]
    for k, lr in enumerate(lrs):
        epoch = k // 4 + 1
        assert lr == pytest.approx(0.1 * 0.2 ** sum(epoch >= drop for drop in (60, 120, 160)), rel=1e-12), (epoch, k)
    assert lrs[235] == pytest.approx(0.1) and lrs[236] == pytest.approx(0.02)  # 59 epochs of 4 steps, from 0


@pytest.mark.parametrize(("steps", "drops"), [(10, (3, 6, 8)), (1, ()), (2, (1,)), (25, (8, 15, 20)), (78000, (23010, 46410, 62010))])
def test_drops_of_other_lengths(steps, drops):
    """At the same part of the training, never before its first step."""
    schedule = quadratic(steps)[2]
    assert tuple(k for k in schedule.drops if k < steps) == drops
    assert schedule.get_last_lr() == [0.1]


def test_optimizer_against_its_formula():
    """Nesterov's momentum as Torch7 has it, weight decay on all, and a momentum that begins anew at each drop."""
    steps, (model, optimizer, schedule) = 30, quadratic(30)
    assert optimizer.defaults["dampening"] == 0
    w = [p.detach().clone() for p in model.parameters()]
    v = [torch.zeros_like(p) for p in w]
    for k in range(steps):
        lr = 0.1 * 0.2 ** sum(k >= drop for drop in (9, 18, 24))
        if k in (9, 18, 24):
            v = [torch.zeros_like(p) for p in w]
        x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
        out = x @ w[0].T + w[1]
        for i, grad in enumerate((0.2 * out.T @ x, 0.2 * out.sum(0))):
            grad = grad + 5e-4 * w[i]
            v[i] = 0.9 * v[i] + grad
            w[i] = w[i] - lr * (grad + 0.9 * v[i])
        a_step(model, optimizer, schedule, k)
        for p, expected in zip(model.parameters(), w, strict=True):
            torch.testing.assert_close(p.detach(), expected, rtol=1e-10, atol=1e-12)
        assert bool(optimizer.state) == (k + 1 not in (9, 18, 24)), "no buffers left after a drop"


def test_all_parameters_decay():
    model = wide_resnet(10, 1, 10, 0.3)
    sgd, _ = cifar_wrn.optimizer(settings(), model, 10)
    (group,) = sgd.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    assert (group["weight_decay"], group["momentum"], group["nesterov"], group["lr"]) == (5e-4, 0.9, True, 0.1)


@pytest.mark.parametrize("order", ["optimizer first", "schedule first", "schedule made last"])
def test_a_state_goes_on_with_the_same_bits(order):
    steps = 20  # drops at 6, 12, 16
    for stop in (1, 5, 6, 7, 12, 16, 19):
        model, optimizer, schedule = quadratic(steps)
        for k in range(stop):
            a_step(model, optimizer, schedule, k)
        file = io.BytesIO()
        torch.save([copy.deepcopy(part.state_dict()) for part in (model, optimizer, schedule)], file)
        lrs = [a_step(model, optimizer, schedule, k) for k in range(stop, steps)]
        file.seek(0)
        states = torch.load(file, weights_only=True)
        resumed, optimizer2, schedule2 = quadratic(steps)
        resumed.load_state_dict(states[0])
        if order == "schedule first":
            schedule2.load_state_dict(states[2])
        optimizer2.load_state_dict(states[1])
        if order == "schedule made last":
            schedule2 = cifar_wrn.Drops(optimizer2, steps)
        if order != "schedule first":
            schedule2.load_state_dict(states[2])
        assert schedule2.state_dict() == states[2] and not (stop in (6, 12, 16) and optimizer2.state)
        assert [a_step(resumed, optimizer2, schedule2, k) for k in range(stop, steps)] == lrs
        for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b)


# What the recipe asks of the tool


def test_protocols():
    assert cifar_wrn.protocol(settings()) == {}
    asked = cifar_wrn.protocol(settings("--protocol", "authors"))
    assert asked == {"batch": 128, "accumulate": 4, "batch_norm": "joint", "expand": "input", "order_seed": 0}


def test_defaults_are_the_papers():
    model = cifar_wrn.build(settings("--depth", "10", "--widen", "2", rate=0.3), cifar.synthetic(100, 0))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[10, 2][1]
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.3}
    made = settings()
    assert (made.depth, made.widen, made.batch, made.epochs, made.samples, made.rate) == (28, 10, 128, 200, [8], [0.3])
    for wrong in (["--depth", "12"], ["--widen", "0"], ["--depth", "x"]):
        with pytest.raises(SystemExit):
            settings(*wrong)


@pytest.mark.parametrize("protocol", ["baseline", "authors"])
def test_arms_of_table_1(protocol):
    arms = cifar_wrn.arms(settings("--table1", "--protocol", protocol, rate=[0.5]))
    seen = {arm["label"]: (arm["samples"], arm["alpha"], arm.get("epochs"), arm.get("accumulate")) for arm in arms}
    one = 1 if protocol == "authors" else None  # the baseline's script has no micro-batches
    assert seen == {
        "dropout, 4x iterations": (1, 1.0, 800, one),
        "dropout": (1, 1.0, None, one),
        "IWSGD S=4": (4, 1.0, None, None),
        "IWSGD S=8": (8, 1.0, None, None),
        "mean S=4": (4, 0.0, None, None),
        "mean S=8": (8, 0.0, None, None),
        "IWSGD S=4, epochs / 4": (4, 1.0, 50, None),
        "IWSGD S=8, epochs / 8": (8, 1.0, 25, None),
    }
    assert len(arms) == 8 and all(arm["rate"] == 0.5 for arm in arms)
    assert len(cifar_wrn.table1(settings(rate=[0.3, 0.5]))) == 16


def test_arms_by_steps():
    """A training asked for in steps has its length multiplied in steps: epochs would not count."""
    arms = {arm["label"]: arm for arm in cifar_wrn.table1(settings(steps=100))}
    assert arms["dropout, 4x iterations"]["steps"] == 400 and arms["IWSGD S=8, steps / 8"]["steps"] == 13
    assert not any("epochs" in arm for arm in arms.values())


def test_arms_of_figure_2():
    arms = cifar_wrn.arms(settings("--figure2"))
    assert sorted((a["samples"], a["rate"]) for a in arms) == [(s, k / 10) for s in (1, 4, 8) for k in range(1, 9)]
    assert Counter(a["label"] for a in arms) == {"dropout": 8, "IWSGD S=4": 8, "IWSGD S=8": 8}
    assert all(a["alpha"] == 1.0 for a in arms)


def test_arms_of_a_sweep():
    """The tool combines the options by itself, but for the authors' baseline, which has one batch and no micro-batches."""
    assert cifar_wrn.arms(settings(samples=[1, 4])) == []
    arms = cifar_wrn.arms(settings("--protocol", "authors", samples=[1, 4], alpha=[0.0, 1.0]))
    assert [(a["samples"], a["alpha"], a.get("accumulate")) for a in arms] == [(1, 1.0, 1)] * 2 + [(4, 0.0, None), (4, 1.0, None)]


# Through the tool


def train(tmp_path, *arguments: str) -> dict:
    pytest.importorskip("rich")
    from recipes.__main__ import main

    small = ["--depth", "10", "--widen", "1", "--seeds", "1", "--no-tensorboard", "--out", str(tmp_path / "out")]
    assert main(["cifar_wrn", *small, *arguments]) == 0
    return json.loads((tmp_path / "out" / "summary.json").read_text())


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_training_from_a_small_archive(dataset, tmp_path):
    archive(tmp_path, dataset, pickled(dataset))
    own = ["--dataset", dataset, "--any-archive", "--data", str(tmp_path), "--batch", "4", "--epochs", "2", "--samples", "2"]
    summary = train(tmp_path, *own)
    (run,) = summary["arms"][0]["runs"].values()
    assert run["parameters"] == PARAMETERS[10, 1][dataset == "cifar100"]
    assert summary["facts"] == {"data": cifar.ARCHIVES[dataset].file, "data_md5": "not compared"}
    log = list(csv.DictReader((tmp_path / "out").glob("S2-*/seed-0/log.csv").__next__().open()))
    assert [line["epoch"] for line in log] == ["1", "2"] and all(math.isfinite(float(line["nll"])) for line in log)


def test_an_official_archive_is_asked_for(tmp_path, capsys):
    from recipes.__main__ import main

    archive(tmp_path, "cifar10", pickled("cifar10"))
    assert main(["cifar_wrn", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--no-tensorboard"]) == 1
    assert "MD5 expected c58f30108f718f92721af3b95e74349a" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_table_1_through_the_tool(tmp_path):
    archive(tmp_path, "cifar10", pickled("cifar10"))
    summary = train(tmp_path, "--any-archive", "--data", str(tmp_path), "--batch", "4", "--steps", "2", "--table1")
    assert [arm["label"] for arm in summary["arms"]] == [
        *("dropout", "dropout, 4x iterations", "IWSGD S=4", "IWSGD S=8", "mean S=4", "mean S=8", "IWSGD S=4, steps / 4"),
        "IWSGD S=8, steps / 8",
    ]
    assert len(list((tmp_path / "out").glob("*/seed-0/result.json"))) == 8


@pytest.mark.slow
def test_the_authors_protocol_through_the_tool(tmp_path, capsys):
    """Four micro-batches of 32 images with their samples as rows: BatchNorm has updated its statistics four times a step, and once for
    the baseline; all seeds have one order of the examples.
    """
    train(tmp_path, "--synthetic", "--protocol", "authors", "--samples", "1", "2", "--steps", "1")
    for folder, updates in (("S1-*", 1), ("S2-*", 4)):
        state = torch.load(next((tmp_path / "out").glob(f"{folder}/seed-0/last.pt")), weights_only=True)
        assert {int(v) for k, v in state["model"].items() if k.endswith("num_batches_tracked")} == {updates}
    with pytest.raises(SystemExit):
        train(tmp_path, "--synthetic", "--protocol", "authors", "--batch", "64")
    assert "--batch: cifar_wrn's own options ask for 128, got 64" in capsys.readouterr().err
