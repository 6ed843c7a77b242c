"""A run that is killed and goes on ends with the same bits; what is whole stays whole."""

import fcntl
import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from recipe_runs import assert_same, ended, never, one, silent

from recipes.files import Log, load, owned, save, write
from recipes.recipe import UserError
from recipes.run import Batches, Stopped, mixed
from recipes.sweep import prepare_process

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.one_process


def train(folder, options, seed, pipe, recipe="digits"):
    """In a process of its own: tells each step."""
    run, data = one(Path(folder), *options, seed=seed, recipe=recipe)
    prepare_process(run.settings)
    run.train(data, never, lambda step, of, line: pipe.send(step))
    pipe.send("done")


OFTEN = ("--steps", "64", "--evaluate-every", "1.5")
SMALL_WRN = ("--synthetic", "--depth", "10", "--widen", "1", "--batch", "4", "--steps", "24", "--evaluate-every", "0.1")
KINDS = {
    "importance weights": ("digits", 20, ("--samples", "4", "--rate", "0.5", *OFTEN)),
    "streamed": ("digits", 4, ("--samples", "4", "--strategy", "streamed", "--chunk", "3", "--alpha", "0.5", *OFTEN)),
    "resampled": ("digits", 4, ("--samples", "4", "--strategy", "resampled", *OFTEN)),
    "parts of a batch, on the axis": ("digits", 4, ("--samples", "2", "--accumulate", "5", "--expand", "axis", *OFTEN)),
    "one sample, 16 bits": ("digits", 4, ("--samples", "1", "--amp", "bfloat16", *OFTEN)),
    # Running statistics, augmentation, a schedule that drops the momentum, processes that read data.
    "WRN": ("cifar_wrn", 2, ("--samples", "2", "--workers", "1", *SMALL_WRN)),
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


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) if kind == "WRN" else kind for kind in KINDS])
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


def test_the_best_checkpoint_in_the_place_of_the_last(tmp_path):
    """As the message about a torn checkpoint advises: the run goes on from there, and ends as it did."""
    options = ("--samples", "2", "--rate", "0.1", "--steps", "300", "--evaluate-every", "4")
    run, data = one(tmp_path, *options)
    run.train(data, never, silent)
    expected, step = ended(tmp_path), load(tmp_path / "best.pt", "cpu")["step"]
    assert 0 < step < 300
    (tmp_path / "last.pt").write_bytes((tmp_path / "best.pt").read_bytes())
    again, _ = one(tmp_path, *options)
    again.train(data, never, silent)
    for a, b in zip(ended(tmp_path), expected, strict=True):
        assert_same(a, b)
