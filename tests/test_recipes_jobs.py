"""Runs in processes of their own: the same bits, and nothing left behind when one of them, or the tool, is stopped or killed."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from recipe_runs import assert_same, ended, one, silent

from recipes.__main__ import main
from recipes.files import load
from recipes.recipe import UserError
from recipes.run import Stopped

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.one_process, pytest.mark.slow]


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


def begin_two(out):
    """The tool with two workers, once both have begun their runs."""
    options = ("--samples", "2", "3", "--rate", "0.5", "--steps", "1000000", "--jobs", "2", "--no-tensorboard")
    arguments = ["digits", *options, "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command, pipes = [sys.executable, "-m", "recipes", *arguments], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, env=environment, text=True, **pipes, start_new_session=True)
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
@pytest.mark.parametrize("who", ["tool", "last run"])
def test_no_process_is_left_of_a_killed_one(who, tmp_path):
    """kill -9 of the tool, or of one of two runs, as the kernel does when memory is short: the other keeps a checkpoint and ends."""
    process, begun = begin_two(tmp_path)
    try:
        wait_for(begun)
        workers = sorted(workers_of(process.pid))
        os.kill(process.pid if who == "tool" else workers[-1], signal.SIGKILL)
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


@pytest.mark.parametrize("asked", [True, False])
def test_a_process_that_reads_data_ends(asked, tmp_path, monkeypatch):
    """SIGTERM to all processes of the tool ends it before the tool has finished its step."""
    run, data = one(tmp_path, "--samples", "2", "--steps", "4")

    def advance(x, y):
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")

    monkeypatch.setattr(run, "advance", advance)
    with pytest.raises(Stopped if asked else UserError, match=None if asked else r"--workers: DataLoader worker \(pid\(s\) 7\)"):
        run.train(data, lambda: asked, silent)
