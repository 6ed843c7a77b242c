"""Runs of recipes for the tests: one in a folder of its own, what it leaves, and whether two left the same bits."""

import torch

from recipes.files import load
from recipes.options import arms, parse
from recipes.recipe import find
from recipes.run import Run

never, silent = (lambda: False), (lambda step, of, line: None)


def settings_of(tmp_path, *options, recipe="digits"):
    return parse(recipe, ["--out", str(tmp_path), "--no-tensorboard", *options])


def one(tmp_path, *options, seed=0, recipe="digits"):
    """A run of the first combination, in ``tmp_path`` itself, and the data."""
    settings = settings_of(tmp_path, *options, recipe=recipe)
    return Run(arms(settings)[0], seed, tmp_path), find(recipe).load(settings)


def ended(folder):
    """What a run leaves, without times: its log, its result, and the last checkpoint."""
    state = load(folder / "last.pt", "cpu")
    state = {k: v for k, v in state.items() if k not in ("seconds", "timed", "logs")}
    return (folder / "log.csv").read_bytes(), (folder / "result.json").read_bytes(), state


def assert_same(found, expected):
    """Nested values, bit for bit."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    else:
        assert found == expected
