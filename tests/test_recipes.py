"""The training tool: a run that is killed and goes on ends with the same bits; what is whole stays whole; errors name file and option."""

import fcntl
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("sklearn")

import iwsgd_ext as iw
from recipes.__main__ import main
from recipes.files import Log, load, owned, save, write, write_json
from recipes.options import arms, method, parse
from recipes.recipe import UserError, find
from recipes.run import Batches, Run, Stopped, mixed
from recipes.sweep import prepare_process

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.one_process
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


def train(folder, options, seed, pipe, recipe="digits"):
    """In a process of its own: tells each step."""
    run, data = one(Path(folder), *options, seed=seed, recipe=recipe)
    prepare_process(run.settings)
    run.train(data, never, lambda step, of, line: pipe.send(step))
    pipe.send("done")


OFTEN = ("--steps", "64", "--evaluate-every", "1.5")
SMALL_WRN = ("--synthetic", "--depth", "10", "--widen", "1", "--batch", "4", "--steps", "24", "--evaluate-every", "0.05")
KINDS = {
    "importance weights": ("digits", 20, ("--samples", "4", "--rate", "0.5", *OFTEN)),
    "streamed": ("digits", 4, ("--samples", "4", "--strategy", "streamed", "--chunk", "3", "--alpha", "0.5", *OFTEN)),
    "resampled": ("digits", 4, ("--samples", "4", "--strategy", "resampled", *OFTEN)),
    "parts of a batch, on the axis": ("digits", 4, ("--samples", "2", "--accumulate", "5", "--expand", "axis", *OFTEN)),
    "one sample, 16 bits": ("digits", 4, ("--samples", "1", "--amp", "bfloat16", *OFTEN)),
    # Running statistics, augmentation, a schedule that drops the momentum, processes that read data.
    "WRN": ("cifar_wrn", 3, ("--samples", "2", "--workers", "1", *SMALL_WRN)),
}


@pytest.fixture(scope="module")
def processes():
    """Processes that begin in milliseconds: they are forked off one that has imported torch and nothing else runs in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")  # by which the first one finds what it imports
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "torch._dynamo", "sklearn.datasets", "sklearn.model_selection"])
        nothing = context.Process(target=time.sleep, args=(0,))
        nothing.start()
        nothing.join()
    return context


def killed_again_and_again(processes, folder, options, kills, rng, recipe="digits"):
    """Runs to the end, killed ``kills`` times on the way, each time some steps and a moment after the process began."""
    steps_before = []
    for attempt in range(1000):
        ours, theirs = processes.Pipe(duplex=False)
        process = processes.Process(target=train, args=(str(folder), options, 3, theirs, recipe))
        process.start()
        theirs.close()
        wanted, told, seen = rng.randint(1, 4), 0, None
        try:
            while (seen := ours.recv()) != "done":
                told += 1
                if len(steps_before) < kills and told > wanted:
                    time.sleep(rng.uniform(0, 0.01))
                    break
        except EOFError:
            raise AssertionError(f"attempt {attempt}: the run ended by itself") from None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if seen == "done":
            return steps_before
        steps_before.append(seen)
    raise AssertionError("the run came to no end")


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_with_the_same_bits(kind, tmp_path, processes):
    """kill -9 at random moments, of steps, evaluations and writing checkpoints; here a checkpoint is due after each step."""
    recipe, kills, options = KINDS[kind]
    options = (*options, "--checkpoint-every", "0")
    run, data = one(tmp_path / "whole", *options, seed=3, recipe=recipe)
    run.train(data, never, silent)
    steps = killed_again_and_again(processes, tmp_path / "killed", options, kills, random.Random(kind), recipe)
    assert len(steps) == kills and len(set(steps)) > 1
    for a, b in zip(ended(tmp_path / "killed"), ended(tmp_path / "whole"), strict=True):
        assert_same(a, b)
    assert_same(load(tmp_path / "killed" / "best.pt", "cpu")["model"], load(tmp_path / "whole" / "best.pt", "cpu")["model"])


def test_a_checkpoint_some_steps_ago_is_enough(tmp_path):
    """Steps after the checkpoint are run again, and their lines of the log are written again."""
    options = ("--samples", "2", "--steps", "40", "--evaluate-every", "0.5", "--checkpoint-every", "1e9")
    whole, data = one(tmp_path / "whole", *options)
    whole.train(data, never, silent)
    stopping, _ = one(tmp_path / "parts", *options)
    with pytest.raises(Stopped):
        stopping.train(data, lambda: stopping.step == 17, silent)
    assert load(tmp_path / "parts" / "last.pt", "cpu")["step"] == 17

    class Dies(Exception):
        pass

    def die(step, of, line):
        if step == 33:
            raise Dies

    dying, _ = one(tmp_path / "parts", *options)
    with pytest.raises(Dies):
        dying.train(data, never, die)
    assert (tmp_path / "parts" / "log.csv").read_bytes().count(b"\n") == 12  # to step 33, of which the checkpoint knows 17
    again, _ = one(tmp_path / "parts", *options)
    again.train(data, never, silent)
    for a, b in zip(ended(tmp_path / "parts"), ended(tmp_path / "whole"), strict=True):
        assert_same(a, b)


def test_seeds_differ_and_repeat(tmp_path):
    def weights(folder, seed):
        run, data = one(tmp_path / folder, "--samples", "2", "--steps", "3", seed=seed)
        run.train(data, never, silent)
        return load(tmp_path / folder / "last.pt", "cpu")["model"]["0.weight"]

    assert torch.equal(weights("a", 0), weights("b", 0))
    assert not torch.equal(weights("c", 1), weights("a2", 0))


def test_noise_of_a_step_is_its_own(tmp_path):
    """Seeds of all steps and runs differ, so that no two steps share masks."""
    assert len({mixed(seed, 1, step) for seed in range(20) for step in range(500)}) == 10_000
    assert mixed(0, 1) != mixed(1, 0) and 0 <= mixed(3, 1, 7) < 2**63


def test_batches_are_of_the_whole_data_and_go_on_anywhere():
    whole = list(Batches(23, 5, seed=1, start=0, stop=12))
    assert all(len(batch) == 5 for batch in whole)
    for epoch in range(3):
        indices = [i for batch in whole[4 * epoch : 4 * epoch + 4] for i in batch]
        assert len(set(indices)) == 20 and set(indices) <= set(range(23))
    assert whole[:4] != whole[4:8] and whole != list(Batches(23, 5, seed=2, start=0, stop=12))
    for start in range(12):
        assert list(Batches(23, 5, seed=1, start=start, stop=12)) == whole[start:]


def test_other_options_are_refused_by_name(tmp_path):
    run, data = one(tmp_path, "--samples", "2", "--steps", "6", "--checkpoint-every", "0")
    with pytest.raises(Stopped):
        run.train(data, lambda: True, silent)
    before = (tmp_path / "last.pt").read_bytes()
    for options, told in (
        (("--samples", "4", "--steps", "6"), "--samples 2 there, 4 now"),
        (("--samples", "2", "--steps", "7"), "--steps 6 there, 7 now"),
        (("--samples", "2", "--steps", "6", "--alpha", "inf"), "--alpha 1.0 there, inf now"),
        (("--samples", "2", "--steps", "6", "--train-images", "200"), "--train-images 300 there, 200 now"),
    ):
        other, _ = one(tmp_path, *options)
        with pytest.raises(UserError, match=f"last.pt is of another configuration: .*{told}"):
            other.train(data, never, silent)
    other, _ = one(tmp_path, "--samples", "2", "--steps", "6", seed=1)
    with pytest.raises(UserError, match="--seed 0 there, 1 now"):
        other.train(data, never, silent)
    assert (tmp_path / "last.pt").read_bytes() == before


@pytest.mark.parametrize("torn", ["cut", "flipped", "empty", "other"])
def test_a_torn_checkpoint_is_named(torn, tmp_path):
    run, data = one(tmp_path, "--samples", "2", "--steps", "6", "--checkpoint-every", "0")
    with pytest.raises(Stopped):
        run.train(data, lambda: True, silent)
    whole = (tmp_path / "last.pt").read_bytes()
    middle = len(whole) // 2
    if torn == "other":
        torch.save([1, 2], tmp_path / "last.pt")
    else:
        broken = {"cut": whole[:-1000], "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], "empty": b""}
        (tmp_path / "last.pt").write_bytes(broken[torn])
    again, _ = one(tmp_path, "--samples", "2", "--steps", "6")
    with pytest.raises(UserError, match=r"last\.pt: expected a whole checkpoint of this tool .*Remove it .*best\.pt"):
        again.train(data, never, silent)


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"settings": Evil()}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="expected a whole checkpoint"):
        load(tmp_path / "last.pt", "cpu")
    assert not (tmp_path / "evil").exists()


def fill_disk(folder, pipe):
    """Trains, and after some steps has room for small files only, as on a full disk."""
    run, data = one(Path(folder), "--samples", "2", "--steps", "30", "--checkpoint-every", "0")

    def report(step, of, line):
        if step == 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    try:
        run.train(data, never, report)
    except UserError as error:
        pipe.send(str(error))


def test_a_full_disk_loses_nothing(tmp_path, processes):
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=fill_disk, args=(str(tmp_path), theirs))
    process.start()
    theirs.close()
    told = ours.recv()
    process.join()
    assert "last.pt: could not be written (File too large); last.pt is still the one before. Make room" in told
    assert load(tmp_path / "last.pt", "cpu")["step"] == 9 and not list(tmp_path.glob("*.part"))
    run, data = one(tmp_path, "--samples", "2", "--steps", "30", "--checkpoint-every", "0")
    assert run.train(data, never, silent)["metrics"]["error"] > 0


def test_a_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write(path, b"old")

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(UserError, match=r"a\.json: could not be written \(No space left on device\); a\.json is still the one before"):
        write(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_in_use_is_refused(tmp_path, processes):
    with owned(tmp_path), pytest.raises(UserError, match="--out: another run is writing into"), owned(tmp_path):
        pass
    with owned(tmp_path):
        pass


def test_a_shorter_log_than_the_checkpoint_knows(tmp_path):
    log = Log(tmp_path / "log.csv", ("a", "b"))
    log.add({"a": 1, "b": 0.5})
    length = log.length
    log.add({"a": 2})
    assert (tmp_path / "log.csv").read_text() == "a,b\n1,0.5\n2,\n"
    Log(tmp_path / "log.csv", ("a", "b"), length)
    assert (tmp_path / "log.csv").read_text() == "a,b\n1,0.5\n"
    with pytest.raises(UserError, match=r"log\.csv: expected at least the 99 bytes"):
        Log(tmp_path / "log.csv", ("a", "b"), 99)


def test_saved_values_come_back(tmp_path):
    state = {"settings": {"a": 1}, "weights": [torch.arange(3.0)], "none": None, "pair": (1, 2.5)}
    save(tmp_path / "x.pt", state)
    assert_same(load(tmp_path / "x.pt", "cpu"), state)


def test_evaluation_with_noise_is_that_of_the_library(tmp_path):
    run, data = one(tmp_path, "--samples", "3", "--rate", "0.5", "--steps", "2", "--test-batch", "2000")
    metrics = run.train(data, never, silent)["metrics"]
    x, y = data.test[list(range(len(data.test)))]
    log_p = iw.predict(run.model, x, 16, seed=0)[torch.arange(len(y)), y]
    assert metrics["ensemble_nll"] == pytest.approx(-log_p.mean().item(), rel=1e-5)
    log_p = iw.predict(run.model, x, 3, seed=0)[torch.arange(len(y)), y]
    assert metrics["test_bound"] == pytest.approx(log_p.mean().item(), rel=1e-5)
    assert metrics["test_mean_log_p"] < metrics["test_bound"]


# The command line


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


def test_processes_at_a_time_give_the_same_bits(tmp_path):
    arguments = ["digits", "--samples", "2", "--rate", "0.3", "0.5", "--steps", "8", "--no-tensorboard"]
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    assert main([*arguments, "--out", str(tmp_path / "two"), "--jobs", "2"]) == 0
    for folder in (tmp_path / "one").glob("S*/seed-0"):
        twin = tmp_path / "two" / folder.relative_to(tmp_path / "one")
        for a, b in zip(ended(folder), ended(twin), strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_interrupt_keeps_a_checkpoint_and_says_how_to_go_on(jobs, tmp_path):
    arguments = ["digits", "--samples", "2", "3", "--rate", "0.5", "--steps", "100000", "--out", str(tmp_path / "o"), "--jobs", jobs]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "recipes", *arguments, "--no-tensorboard"]
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    running = 1 if jobs == "1" else 2
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "o").glob("*/*/log.csv"))) < running and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of the tool
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert "go on with" in text and "--no-tensorboard --resume" in text and "Traceback" not in text
    states = [load(path, "cpu") for path in (tmp_path / "o").glob("*/*/last.pt")]
    assert len(states) == running and all(0 < state["step"] < 100000 for state in states)


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


# What nobody meant to happen


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_a_run_that_diverged_leaves_a_table_of_the_others(odd, tmp_path, capsys):
    """NaN is null and infinity text in result.json; neither has a standard deviation."""
    arguments = [
        "digits",
        "--samples",
        "2",
        "--rate",
        "0.3",
        "0.5",
        "--steps",
        "2",
        "--seeds",
        "2",
        "--out",
        str(tmp_path),
        "--no-tensorboard",
    ]
    assert main(arguments) == 0
    path = tmp_path / "S2-alpha1-p0.3" / "seed-1" / "result.json"
    result = json.loads(path.read_text())
    result["metrics"] |= {"nll": odd, "test_bound": -odd}
    write_json(path, result)
    assert main([*arguments, "--resume"]) == 0
    assert capsys.readouterr().out.count(" diverged") == 2
    assert f",{odd}," in (tmp_path / "runs.csv").read_text() and (tmp_path / "figure.png").exists()


def test_a_run_that_diverges_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("recipes.evaluate.bound", lambda *_: {"test_bound": float("-inf"), "test_mean_log_p": float("-inf")})
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


def test_the_lock_is_not_that_of_forked_processes(tmp_path):
    """Those that read data live some seconds longer than a tool that was killed."""
    ours, theirs = os.pipe()
    begun, begins = os.pipe()
    with owned(tmp_path):
        child = os.fork()
        if child == 0:
            os.close(theirs)
            os.write(begins, b"x")
            os.read(ours, 1)  # until the test has ended
            os._exit(0)
        os.read(begun, 1)
    with pytest.raises(UserError, match="another run"), owned(tmp_path), owned(tmp_path):
        pass
    lock = os.open(tmp_path / ".lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(lock)
    os.close(theirs)
    os.waitpid(child, 0)
    for end in (ours, begun, begins):
        os.close(end)


@pytest.mark.parametrize("asked", [True, False])
def test_a_process_that_reads_data_ends(asked, tmp_path, monkeypatch):
    """SIGTERM to all processes of the tool ends it before the tool has finished its step."""
    run, data = one(tmp_path, "--samples", "2", "--steps", "4")

    def advance(x, y):
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")

    monkeypatch.setattr(run, "advance", advance)
    with pytest.raises(Stopped if asked else UserError, match=None if asked else r"--workers: DataLoader worker \(pid\(s\) 7\)"):
        run.train(data, lambda: asked, silent)


def begin_two(out):
    """The tool with two workers, once both have begun their runs."""
    arguments = [
        "digits",
        "--samples",
        "2",
        "3",
        "--rate",
        "0.5",
        "--steps",
        "1000000",
        "--jobs",
        "2",
        "--no-tensorboard",
        "--out",
        str(out),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "recipes", *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    return process, lambda: len(list(out.glob("*/*/time.csv"))) == 2


def wait_for(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def workers_of(pid):
    """Processes of the tool's group that are its runs."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            group, command = int((folder / "stat").read_text().rpartition(")")[2].split()[2]), (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if group == pid and b"spawn_main" in command:
            found.append(int(folder.name))
    return found


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@linux
@pytest.mark.parametrize("who", ["tool", "first run", "last run"])
def test_no_process_is_left_of_a_killed_one(who, tmp_path):
    """kill -9 of the tool, or of one of two runs, as the kernel does when memory is short: the other keeps a checkpoint and ends."""
    process, begun = begin_two(tmp_path)
    try:
        wait_for(begun)
        workers = sorted(workers_of(process.pid))
        os.kill({"tool": process.pid, "first run": workers[0], "last run": workers[-1]}[who], signal.SIGKILL)
        text, _ = process.communicate(timeout=60)
        wait_for(lambda: not workers_of(process.pid), 30)
        assert who == "tool" or (process.returncode == 1 and "Traceback" not in text and "was ended from outside" in text), text
        assert list(tmp_path.glob("*/*/last.pt"))
    finally:
        for pid in [process.pid, *workers_of(process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@linux
def test_interrupt_while_the_workers_begin(tmp_path):
    process, _ = begin_two(tmp_path)
    try:
        wait_for(lambda: workers_of(process.pid))
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        text, _ = process.communicate(timeout=60)
        assert process.returncode == 130 and "go on with" in text and "Traceback" not in text, text
    finally:
        for pid in workers_of(process.pid):
            os.kill(pid, signal.SIGKILL)
