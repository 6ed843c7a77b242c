"""The training tool's command line: combinations, errors that name file and option, tables and logs."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from recipe_runs import never, one, settings_of, silent

import iwsgd_ext as iw
import recipes
from recipes.__main__ import main
from recipes.files import write_json
from recipes.options import arms, method, parse
from recipes.recipe import UserError, find

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.one_process


def test_evaluation_with_noise_is_that_of_the_library(tmp_path):
    run, data = one(tmp_path, "--samples", "3", "--rate", "0.5", "--steps", "2", "--test-batch", "2000")
    metrics = run.train(data, never, silent)["metrics"]
    x, y = data.test[list(range(len(data.test)))]
    log_p = iw.predict(run.model, x, 16, seed=0)[torch.arange(len(y)), y]
    assert metrics["ensemble_nll"] == pytest.approx(-log_p.mean().item(), rel=1e-5)
    log_p = iw.predict(run.model, x, 3, seed=0)[torch.arange(len(y)), y]
    assert metrics["test_bound"] == pytest.approx(log_p.mean().item(), rel=1e-5)
    assert metrics["test_mean_log_p"] < metrics["test_bound"]


def call(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run([sys.executable, "-m", "recipes", *arguments], env=environment, text=True, capture_output=True, **options)


def test_arms_are_all_combinations_without_repetition(tmp_path):
    found = arms(settings_of(tmp_path, "--samples", "1", "4", "--alpha", "0", "1", "inf", "--rate", "0.1", "0.5"))
    assert [(a.rate, a.samples, a.alpha) for a in found] == [
        (p, s, a) for p in (0.1, 0.5) for s, a in ((1, 1.0), (4, 0.0), (4, 1.0), (4, float("inf")))
    ]
    assert len({a.folder for a in found}) == len(found)
    assert [method(1, 0.5), method(4, 1.0), method(4, 0.0), method(4, float("inf")), method(4, 0.5)] == [
        "dropout (S=1)", "IWSGD S=4", "mean S=4", "best sample S=4", "alpha=0.5 S=4",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--samples", "0"), "--samples: expected a number of at least 1, got 0"),
        (("--rate", "1"), "--rate: expected a dropout rate, at least 0 and under 1, got 1"),
        (("--alpha", "-1"), "--alpha: expected"),
        (("--accumulate", "3"), "--accumulate: expected a divisor of --batch 50, got 3"),
        (("--keep", "2"), "--keep: only with --strategy resampled"),
        (("--chunk", "2"), "--chunk: only with --strategy streamed or resampled"),
        (("--batch-norm", "joint", "--expand", "axis"), "--batch-norm joint: all samples must be rows of one pass"),
        (("--epochs", "nan"), "--epochs: expected a number above 0"),
        (("--device", "cuda:7"), "--device cuda:7: "),
        (("--strategy", "fast"), "--strategy: invalid choice"),
    ],
    ids=lambda v: v[0] if isinstance(v, tuple) else "",
)
def test_wrong_options_are_named(options, told, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        settings_of(tmp_path, *options)
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_the_table_and_what_goes_on(tmp_path, capsys):
    """A command, then the same with more seeds: what is finished is read, not run again."""
    arguments = [
        "digits",
        "--samples",
        "1",
        "2",
        "--rate",
        "0.3",
        "0.5",
        "--steps",
        "6",
        "--out",
        str(tmp_path / "out"),
        "--no-tensorboard",
    ]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "IWSGD S=2" in text and "summary.json" in text
    assert main(arguments) == 1 and "--resume" in capsys.readouterr().err
    changed = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("seed-0/result.json")}
    assert len(changed) == 4
    assert main([*arguments, "--seeds", "2", "--resume", "--jobs", "2"]) == 0
    assert changed == {p: p.stat().st_mtime_ns for p in changed}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["command"].endswith("--jobs 2") and len(summary["arms"]) == 4 and set(summary["arms"][0]["runs"]) == {"0", "1"}
    errors = [run["metrics"]["error"] for run in summary["arms"][0]["runs"].values()]
    mean, spread = sum(errors) / 2, abs(errors[0] - errors[1]) / 2**0.5
    cell = f"{mean:.2f} ({spread:.2f})"
    for name in ("summary.txt", "summary.md"):
        assert cell in (tmp_path / "out" / name).read_text()
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_list_and_help():
    shown = call("--list")
    assert shown.returncode == 0 and [line.split()[0] for line in shown.stdout.splitlines()] == [
        "digits", "mnist1d", "mnist5k", "chars", "cifar_wrn",
    ]  # fmt: skip
    assert "--resume" in call("--help").stdout
    text = call("digits", "--help").stdout
    assert "--train-images" in text and "(default: 0.3 0.5 0.7)" in text
    wrong = call("digit")
    assert wrong.returncode == 2 and "no recipe of the name 'digit'" in wrong.stderr


def test_tensorboard_has_what_the_log_has(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(["digits", "--samples", "2", "--rate", "0.5", "--steps", "12", "--evaluate-every", "1", "--out", str(tmp_path)]) == 0
    folder = next(tmp_path.glob("S2*/seed-0"))
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    lines = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()]
    column = lines[0].index("nll")
    assert [(e.step, pytest.approx(e.value, rel=1e-5)) for e in events.Scalars("nll")] == [(int(v[0]), float(v[column])) for v in lines[1:]]
    assert {"bound", "ess", "entropy", "examples_per_second"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_a_run_that_diverged_leaves_a_table_of_the_others(odd, tmp_path, capsys):
    """NaN is null and infinity text in result.json; neither has a standard deviation."""
    options = ("--samples", "2", "--rate", "0.3", "0.5", "--steps", "2", "--seeds", "2", "--no-tensorboard")
    arguments = ["digits", *options, "--out", str(tmp_path)]
    assert main(arguments) == 0
    path = tmp_path / "S2-alpha1-p0.3" / "seed-1" / "result.json"
    result = json.loads(path.read_text())
    result["metrics"] |= {"nll": odd, "ensemble_nll": odd}
    write_json(path, result)
    assert main([*arguments, "--resume"]) == 0
    assert capsys.readouterr().out.count(" diverged") == 2
    assert f",{odd}," in (tmp_path / "runs.csv").read_text() and (tmp_path / "figure.png").exists()


def test_a_run_that_diverges_is_told(tmp_path, capsys, monkeypatch):
    infinite = dict.fromkeys(("test_bound", "test_mean_log_p"), float("-inf")) | {"ensemble_nll": float("inf")}
    monkeypatch.setattr("recipes.evaluate.noisy", lambda *_: infinite)
    monkeypatch.setattr("recipes.evaluate.evaluate", lambda *_: {"error": 90.0, "nll": float("inf"), "ece": float("nan")})
    assert main(["digits", "--samples", "2", "--rate", "0.3", "--steps", "2", "--out", str(tmp_path), "--no-tensorboard"]) == 0
    assert "nll inf" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"settings": []}', '{"settings": {}, "metrics": null}'])
def test_a_result_of_something_else_is_named(text, tmp_path):
    run, _ = one(tmp_path, "--steps", "2")
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(UserError, match=r"result\.json: expected a file that this tool wrote, got other JSON\. Remove it"):
        run.result()


def test_a_chunk_above_one_combination_has_all_its_samples(tmp_path):
    options = ("--samples", "1", "4", "--strategy", "streamed", "--chunk", "3", "--rate", "0.3", "--steps", "2", "--no-tensorboard")
    assert main(["digits", *options, "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--strategy", "resampled", "--level", "position"), "--strategy resampled: only with --level example"),
        (("--epochs", "1e308"), "--epochs: expected a number above 0 and under 1e9"),
        (("--evaluate-every", "1e308"), "--evaluate-every: expected a number above 0 and under 1e9"),
        (("--acc", "2"), "unrecognized arguments: --acc 2"),
    ],
    ids=lambda v: v[0] if isinstance(v, tuple) else "",
)
def test_options_that_ended_in_a_traceback(options, told, tmp_path, capsys):
    test_wrong_options_are_named(options, told, tmp_path, capsys)


def test_minus_zero_is_zero(tmp_path):
    assert len(arms(settings_of(tmp_path, "--samples", "2", "--alpha", "0", "-0.0", "--rate", "0.3"))) == 1


def test_a_folder_with_brackets_is_told_as_it_is(tmp_path, capsys):
    out = tmp_path / "[red]a :x: [/b]"
    assert main(["digits", "--samples", "2", "--rate", "0.3", "--steps", "2", "--out", str(out), "--no-tensorboard"]) == 0
    assert "[red]a :x: [/b]: summary.txt" in capsys.readouterr().out.replace("\n", "")


def test_interrupt_while_the_data_is_read(tmp_path, capsys, monkeypatch):
    def load(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(find("digits"), "load", load)
    assert main(["digits", "--out", str(tmp_path), "--no-tensorboard"]) == 130
    assert capsys.readouterr().err == "Stopped.\n"


def test_the_recipe_of_the_documentation(tmp_path, monkeypatch, capsys):
    """The page's module, as it stands there, trains."""
    (block,) = re.findall(
        r"^```python\n(# recipes/mine\.py\n.*?)^```", (ROOT / "docs" / "recipes.md").read_text(), re.MULTILINE | re.DOTALL
    )
    (tmp_path / "mine.py").write_text(block)
    monkeypatch.setattr(recipes, "__path__", [*recipes.__path__, str(tmp_path)])
    assert main(["mine"]) == 2 and "no recipe of the name 'mine'" in capsys.readouterr().err
    monkeypatch.setattr("recipes.__main__.RECIPES", ("mine",))
    assert main(["mine", "--out", str(tmp_path / "out"), "--no-tensorboard"]) == 0
    assert "IWSGD S=8" in capsys.readouterr().out


def own(monkeypatch, **names):
    """A recipe of the name "mine" with the given names in it."""
    module = types.ModuleType("recipes.mine")
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, "recipes.mine", module)
    monkeypatch.setattr("recipes.__main__.RECIPES", ("mine",))


def test_a_default_that_is_no_option_is_named(monkeypatch, capsys):
    own(monkeypatch, DEFAULTS={"epoch": 5})
    assert main(["mine"]) == 1
    assert "recipes/mine.py: expected names of options in DEFAULTS and QUICK, got epoch" in capsys.readouterr().err


def test_a_model_without_noise_is_told(tmp_path, monkeypatch, capsys):
    digits = find("digits")
    own(monkeypatch, load=lambda s: digits.load(settings_of(tmp_path)), build=lambda s, d: nn.Linear(64, 10), optimizer=digits.optimizer)
    assert main(["mine", "--out", str(tmp_path / "out"), "--no-tensorboard"]) == 1
    assert "error: the model of mine: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--table1", "--figure2"], "not allowed with argument"),
        (["--table1", "--samples", "16"], "--samples: cifar_wrn's own options ask for 1 4 8, got 16; leave it out"),
        (["--figure2", "--rate", "0.3"], "--rate: cifar_wrn's own options ask for"),
    ],
)
def test_options_that_an_experiment_has_itself(arguments, told, tmp_path, capsys):
    with pytest.raises(SystemExit):
        settings_of(tmp_path, *arguments, recipe="cifar_wrn")
    assert told in capsys.readouterr().err


def test_folders_of_other_data_and_models_differ():
    def out(recipe, *options):
        return str(parse(recipe, list(options)).out)

    assert out("digits") == "out/digits" and out("mnist1d", "--model", "cnn") == "out/mnist1d-cnn"
    assert out("cifar_wrn", "--table1", "--dataset", "cifar100") == "out/cifar_wrn-cifar100-table1"
    assert out("cifar_wrn", "--quick") == "out/cifar_wrn-depth10-widen1-synthetic"


def test_the_learning_rate_of_the_log_is_that_of_the_step(tmp_path, monkeypatch):
    """The schedule drops after the first of three steps."""
    monkeypatch.setattr("recipes.evaluate.noisy", lambda *_: {})
    run, data = one(tmp_path, "--synthetic", "--depth", "10", "--widen", "1", "--batch", "2", "--steps", "3", recipe="cifar_wrn")
    seen = []
    monitor = run.advance
    run.advance = lambda x, y: (seen.append(run.optimizer.param_groups[0]["lr"]), monitor(x, y))
    run.train(data, never, silent)
    assert float((tmp_path / "log.csv").read_text().splitlines()[-1].split(",")[2]) == pytest.approx(seen[-1]) and seen[0] == 0.1 > seen[-1]
