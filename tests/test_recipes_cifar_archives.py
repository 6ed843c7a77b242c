"""The reader of CIFAR's archives: what was written comes back, and what is not whole, another thing or unsafe is refused."""

import gzip
import hashlib
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch
from cifar_archives import DATASETS, WRITERS, Py2Array, archive, contents, expected, extracted, pickled, python2_pickle, settings, text

from recipes import cifar, cifar_wrn
from recipes.recipe import Missing


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
