"""tools/gpu.py with stages made for it: what fails, hangs or is left out, and what is then reported; no GPU takes part."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.insert(0, str(TOOLS))
import gpu_exercise  # noqa: E402
import gpu_run  # noqa: E402

spec = importlib.util.spec_from_file_location("iwsgd_gpu_tool", TOOLS / "gpu.py")
gpu = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


@pytest.fixture
def session(tmp_path):
    return gpu.Session(tmp_path / "out", time.monotonic() + 60)


def says(text: str, code: int = 0):
    """A stage that runs a program, which prints the text and ends with the code."""

    def work(run):
        ended, output = run.python("-c", f"import sys; print({text!r}); sys.exit({code})")
        if ended:
            raise gpu.Failed(f"ended with {ended}")
        return output.strip()

    return work


def hangs(run):
    run.python("-c", "import subprocess, sys, time; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])")


def skips(run):
    raise gpu.Skipped("there is none")


def breaks(run):
    return [][0]


def outcome(session):
    return {r.name: (r.status, r.text) for r in session.results.values()}


def test_all_is_well(session):
    printed = []
    stages = [gpu.Stage("one", 20, says("first\nline of a table")), gpu.Stage("two", 20, skips)]
    assert gpu.run_stages(stages, session, printed.append) == 0
    assert outcome(session) == {"one": ("ok", "first\nline of a table"), "two": ("skipped", "there is none")}
    assert sorted(p.name for p in session.out.iterdir()) == ["log.txt", "report.md", "results.json"]
    report = (session.out / "report.md").read_text()
    for text in (report, printed[-1]):
        table = text.split("```")[1].strip().splitlines()
        assert table[0].split() == ["stage", "result", "time"]
        assert [line.split()[:2] for line in table[1:]] == [["one", "ok"], ["two", "skipped"]]
        assert "line of a table" in text
    assert printed[:2] == ["one: ok, 0 s: first\nline of a table", "two: skipped, 0 s: there is none"]
    log = (session.out / "log.txt").read_text().splitlines()
    assert len(log) == 3 and all(re.match(r" *\d+\.\d one \| ", line) for line in log) and log[1].endswith("| first")


def test_what_follows_a_failure_still_runs(session):
    stages = [
        gpu.Stage("fails", 20, says("the reason\n", 3)),
        gpu.Stage("breaks", 20, breaks),
        gpu.Stage("on it", 20, says("never"), needs="fails"),
        gpu.Stage("on that", 20, says("never"), needs="on it"),
        gpu.Stage("last", 20, says("done")),
    ]
    assert gpu.run_stages(stages, session, lambda line: None) == 1
    assert outcome(session) == {
        "fails": ("failed", "ended with 3"),
        "breaks": ("failed", "IndexError: list index out of range"),
        "on it": ("skipped", "fails failed"),
        "on that": ("skipped", "on it was skipped"),
        "last": ("ok", "done"),
    }
    assert "the reason" in (session.out / "report.md").read_text(), "the end of the log"
    saved = json.loads((session.out / "results.json").read_text())["stages"]
    assert [s["status"] for s in saved] == ["failed", "failed", "skipped", "skipped", "ok"]


def test_a_stage_that_hangs_is_stopped_with_all_it_started(session):
    begin = time.monotonic()
    assert gpu.run_stages([gpu.Stage("hangs", 1, hangs), gpu.Stage("last", 20, says("done"))], session, lambda line: None) == 1
    assert outcome(session) == {"hangs": ("failed", "stopped at its time limit"), "last": ("ok", "done")}
    assert time.monotonic() - begin < 40
    assert not session.running


def test_the_time_for_everything_runs_out(session):
    session.deadline = time.monotonic() + 6
    stages = [gpu.Stage("hangs", 100, hangs), gpu.Stage("last", 20, says("never"))]
    assert gpu.run_stages(stages, session, lambda line: None) == 1
    assert outcome(session) == {"hangs": ("failed", "stopped at its time limit"), "last": ("skipped", "no time was left")}


def test_a_group_runs_side_by_side(session):
    """Each of two waits for a file that the other makes."""

    def meets(mine, other):
        def work(run):
            (session.out / mine).touch()
            while not (session.out / other).exists():
                if run.left < 0:
                    raise gpu.Failed("alone")
                time.sleep(0.01)
            return "met"

        return work

    stages = [gpu.Stage("a", 10, meets("a", "b"), "pair"), gpu.Stage("b", 10, meets("b", "a"), "pair"), gpu.Stage("c", 20, says("after"))]
    assert gpu.run_stages(stages, session, lambda line: None) == 0
    assert list(session.results) == ["a", "b", "c"]


def test_stopped_from_outside_still_reports(session):
    def stops(run):
        session.stop()
        return "stopped"

    assert gpu.run_stages([gpu.Stage("one", 9, stops), gpu.Stage("two", 9, says("never"))], session, lambda line: None) == 0
    assert outcome(session)["two"] == ("skipped", "no time was left")
    assert (session.out / "report.md").exists()


def test_what_is_there_when_a_stage_begins(session):
    """Results of those before it, and the names of those that run and wait."""
    seen = []

    def looks(run):
        seen.extend((s["name"], s["status"]) for s in json.loads((session.out / "results.json").read_text())["stages"])
        seen.append((session.out / "report.md").read_text())

    stages = [gpu.Stage("one", 9, says("done")), gpu.Stage("two", 9, looks), gpu.Stage("three", 9, says("later"))]
    gpu.run_stages(stages, session, lambda line: None)
    assert seen[:3] == [("one", "ok"), ("two", "running"), ("three", "waiting")]
    assert re.search(r"^one +ok +\d+ s  done$", seen[3], re.MULTILINE)


def test_a_stage_that_never_returns_is_left_alone(session, monkeypatch):
    """Not a command, which can be stopped, but the stage itself. One that ends side by side with it is still told apart."""
    monkeypatch.setattr(gpu_run, "GRACE", 0.2)
    stages = [gpu.Stage("stuck", 0.3, lambda run: time.sleep(20), "pair"), gpu.Stage("fine", 0.3, lambda run: "done", "pair")]
    begin = time.monotonic()
    assert gpu.run_stages([*stages, gpu.Stage("last", 9, says("done"))], session, lambda line: None) == 1
    assert outcome(session)["stuck"] == ("failed", "did not end at its time limit")
    assert outcome(session)["fine"] == outcome(session)["last"] == ("ok", "done")
    assert time.monotonic() - begin < 10


def test_what_a_command_leaves_running_is_ended(session, tmp_path):
    """A process in the background, which holds the output open."""
    program = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print(p.pid)"
    pids = []

    def work(run):
        pids.append(int(run.python("-c", program)[1]))
        return "done"

    assert gpu.run_stages([gpu.Stage("one", 30, work)], session, lambda line: None) == 0
    status = Path(f"/proc/{pids[0]}/status")
    for _ in range(100):
        if not status.exists() or "State:\tZ" in status.read_text():
            break
        time.sleep(0.05)
    else:
        raise AssertionError("it still runs")


SUITE = """
import os, time
import pytest
@pytest.mark.parametrize("i", range(6))
def test_passes(i): pass
def test_fails(): assert False, "as it must"
@pytest.mark.skip(reason="there is no such thing")
def test_skipped(): pass
@pytest.mark.skip(reason="there is no such thing")
def test_skipped_too(): pass
@pytest.fixture
def broken():
    yield
    raise RuntimeError("CUDA error")
def test_breaks_at_its_end(broken): pass
def test_dies(): os._exit(3)
"""


def suite(tmp_path, text: str) -> Path:
    folder = tmp_path / "suite"
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_suite.py").write_text(text)
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_cases_are_counted_whatever_ends_the_process(session, tmp_path, workers):
    """Each case once; the one that a process died in by its name. Under pytest-xdist the cases behind it still run."""
    if workers > 1:
        pytest.importorskip("xdist")
    folder = suite(tmp_path, SUITE + "def test_the_last(): pass\n")
    work = gpu.tests("-c", folder / "pytest.ini", folder, workers=workers)
    assert gpu.run_stages([gpu.Stage("tests", 120, work)], session, lambda line: None) == 1
    first, *lines = session.results["tests"].text.splitlines()
    failed = {re.match(r"- (?:began and did not end: )?\S*::(\w+)", line)[1]: line for line in lines if "::" in line}
    assert set(failed) == {"test_fails", "test_breaks_at_its_end", "test_dies"}
    assert "AssertionError: as it must" in failed["test_fails"]
    assert "in its teardown: RuntimeError: CUDA error" in failed["test_breaks_at_its_end"]
    assert "- skipped: 2 there is no such thing" in lines
    if workers > 1:
        assert first.startswith("8 passed, 3 failed, 2 skipped") and "crashed" in failed["test_dies"]
    else:
        assert first == "7 passed, 2 failed, 2 skipped; pytest ended with code 3" and "did not end" in failed["test_dies"]


def test_a_failure_is_in_the_file_before_the_tests_end(session, tmp_path):
    """With its text: the stage is stopped while the next case runs, and pytest never prints what it has found."""
    folder = suite(tmp_path, "import time\ndef test_fails():\n    number = 3\n    assert number == 4\ndef test_hangs(): time.sleep(60)\n")
    work = gpu.tests("-c", folder / "pytest.ini", folder)

    def until_it_hangs(run):
        stage, file = threading.Thread(target=lambda: found.append(end(run)), daemon=True), session.out / "cases.jsonl"
        stage.start()
        while "test_hangs" not in (file.read_text() if file.exists() else ""):
            time.sleep(0.02)
        session.stop()
        stage.join()
        raise gpu.Failed(found[0])

    def end(run):
        try:
            return work(run)
        except gpu.Failed as why:
            return str(why)

    found = []
    gpu.run_stages([gpu.Stage("tests", 60, until_it_hangs)], session, lambda line: None)
    lines = session.results["tests"].text.splitlines()
    assert lines[0].startswith("0 passed, 1 failed, 0 skipped"), lines
    assert "assert 3 == 4" in lines[1] and lines[2].startswith("- began and did not end") and lines[2].endswith("::test_hangs"), lines
    assert "assert number == 4" in (session.out / "cases.jsonl").read_text()


def test_a_lost_cuda_context_ends_the_process(tmp_path):
    """By conftest.py, with a device whose every wait fails behind the second case: no later case can pass or fail there."""
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (tmp_path / "test_four.py").write_text(
        """
import pytest, torch
@pytest.fixture(autouse=True, scope="module")
def _device():
    torch.cuda.is_initialized = lambda: True
    torch.cuda.synchronize = lambda: None
def test_a(): pass
def test_b():
    def lost(): raise RuntimeError("an illegal memory access was encountered")
    torch.cuda.synchronize = lost
def test_c(): pass
def test_d(): pass
"""
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_cases", "-c", "/dev/null", "--rootdir", tmp_path, tmp_path]
    path = os.pathsep.join([str(TOOLS), str(TOOLS.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "IWSGD_STAGE": "s", "IWSGD_CASES": str(tmp_path / "cases")}
    environment.pop("PYTEST_XDIST_WORKER", None)  # this process may be one
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 3 and "the CUDA context is lost" in done.stdout, done.stdout
    found = gpu.read_cases(tmp_path / "cases")
    assert found.passed == 2 and len(found.failed) == 1, "b passed, and failed at its end"
    assert found.failed[0][0].endswith("::test_b") and "illegal memory access" in found.failed[0][1]
    assert "test_c" not in (tmp_path / "cases").read_text()


def test_many_long_failures_are_all_named():
    """The processes of a stage write their cases in any order, so that what is cut must not be a case's name."""
    found = gpu.Cases(failed=[(f"exercise: case {i}", "AssertionError: " + "far apart " * 50) for i in range(40)])
    lines = found.lines(characters=2000)
    assert sum(map(len, lines[:30])) <= 2000 and lines[30] == "- and 10 more failures, in cases.jsonl"
    assert all(line.startswith(f"- exercise: case {i}: Assertion") for i, line in enumerate(lines[:30]))
    assert len(gpu.Cases(failed=found.failed[:1]).lines()[0]) == 350


def test_without_a_gpu(tmp_path):
    """A message that says so, and an exit code of its own."""
    command = [sys.executable, str(TOOLS / "gpu.py"), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "torch sees no CUDA GPU" in done.stdout
    stages = json.loads((tmp_path / "out" / "results.json").read_text())["stages"]
    assert [s["name"] for s in stages] == [s.name for s in gpu.PLANS["full"].stages]
    assert {s["status"] for s in stages[1:]} == {"skipped"}


BENCH = """
import json, pathlib, sys
if "--help" in sys.argv:
    print("--device --out --minutes")
elif sys.argv[1] == "show":
    print("| what | ratio |")
else:
    out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps({"ratios": [0.93]}))
    (out / "report.html").write_text("<p>")
    for name in "abcdefgh":
        (out / f"{name}.png").touch()
"""


@pytest.mark.parametrize(("program", "status"), [(BENCH, "ok"), ("import sys; sys.exit('--help' not in sys.argv)", "skipped")])
def test_benchmarks_come_along(session, tmp_path, monkeypatch, program, status):
    """Their numbers, table and page, which holds the pictures."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__main__.py").write_text(program)
    monkeypatch.delenv("PYTHONPATH", raising=False)  # that of make test has the real benchmarks
    monkeypatch.setattr(gpu_run, "ROOT", tmp_path)
    gpu.run_stages([gpu.Stage("bench", 50, gpu.bench)], session, lambda line: None)
    assert session.results["bench"].status == status, session.results["bench"].text
    if status == "ok":
        assert json.loads((session.out / "results.json").read_text())["bench"] == {"ratios": [0.93]}
        assert "| what | ratio |" in (session.out / "report.md").read_text()
        assert {p.name for p in session.out.iterdir()} == {"bench.html", "report.md", "results.json", "log.txt"}


def test_unknown_stage(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "tests", "speed"])
    assert "got speed" in capsys.readouterr().err


@pytest.mark.parametrize("plan", gpu.PLANS)
def test_plans_fit(plan):
    """What a stage needs is before it; machine, build and the slowest check leave the full run's benchmarks two minutes."""
    minutes, stages = gpu.PLANS[plan]
    names = [s.name for s in stages]
    assert len(set(names)) == len(names)
    assert all(s.needs is None or names.index(s.needs) < i for i, s in enumerate(stages))
    assert minutes == {"first": 210 / 60, "second": 240 / 60, "full": 8}[plan]
    if plan == "full":
        limits = {s.name: s.seconds for s in stages}
        likely = 30 + limits["build"] / 2 + limits["timing"] / 2 + max(s.seconds for s in stages if s.group == "checks")
        assert likely <= 480 - 120


def test_driver_of_the_checks():
    """It agrees with plain PyTorch on the CPU too."""
    environment = {**os.environ, "PYTHONPATH": str(TOOLS.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOLS / "gpu_exercise.py"), "--device", "cpu", "--dtype", "float32", "bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "cases of noise, real_noise, multinomial, loss, scale, 0 failed" in done.stdout, (
        done.stdout + done.stderr
    )


def test_driver_of_the_checks_knows_every_kernel():
    """Each kernel of the sources is launched by one of its parts, which on a GPU the stage exercise sees."""
    found = {name: gpu_exercise.kernels(name) for name in ("cuda", "triton")}
    sources = [source.read_text() for source in gpu_exercise.SOURCES["cuda"]]
    assert len(found["cuda"]) == sum(source.count("__global__") for source in sources)
    launched = [kernel for claimed in gpu_exercise.EXERCISES.values() for kernel in claimed]
    assert sorted(launched) == sorted(found["cuda"] | found["triton"])
    assert tuple(gpu_exercise.FAMILIES) == gpu.FAMILIES, "each has a process of its own"


def test_a_kernel_that_is_not_launched_is_missed():
    ran = {"void iwsgd::noise_fwd_kernel<float, 4, true>(int)", "noise_rule_fwd_kernel", "noise_rule_bwd_kernel"}
    assert gpu_exercise.never_launched(["noise"], gpu_exercise.kernels("cuda"), ran) == ["noise_bwd_kernel"]
    assert gpu_exercise.never_launched(["noise"], {"noise_fwd_kernel"}, ran) == [], "of a backend that has no others"
    loss = gpu_exercise.never_launched(["loss"], gpu_exercise.kernels("cuda"), {"iw_cross_entropy_cluster_kernel<float>"})
    assert "iw_cross_entropy_fwd_kernel" in loss and "iw_cross_entropy_cluster_kernel" not in loss


def test_kernels_are_found_in_sources():
    """Also those whose bounds take parentheses, and not what is launched or called."""
    cuda = "template <class T>\n__global__ void __launch_bounds__(kBlock, kBlocks<T>)\n    a_kernel(int x) {}\nb_kernel<<<1, 2>>>(x);\n"
    assert gpu_exercise.declared(cuda + "__global__ void c_kernel(int) {}", "cuda") == {"a_kernel", "c_kernel"}
    assert gpu_exercise.declared("def a_kernel(\n    x):\n    b_kernel(x)\n", "triton") == {"a_kernel"}


def test_cases_of_triton_have_a_stage_of_their_own(tmp_path):
    """By the names that conftest.py gives: each case is in one of the two stages."""
    (tmp_path / "conftest.py").write_text(
        (Path(__file__).parent / "conftest.py").read_text()
        + 'DEVICES = ["cuda"]\nBUILT = {"reference": True, "cuda": True, "triton": True}\n'
    )
    (tmp_path / "test_two.py").write_text("def test_a(backend): pass\ndef test_b(device): pass\ndef test_triton(): pass\n")
    collected = []
    for only in (gpu.TRITON, f"not {gpu.TRITON}"):
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-c", "/dev/null", "--rootdir", tmp_path, "-k", only, tmp_path]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(TOOLS.parent)})
        collected.append({line.split("::")[1] for line in done.stdout.splitlines() if "::" in line})
    assert collected == [
        {"test_a[cuda-triton]"},
        {"test_a[cuda-reference]", "test_a[cuda-native]", "test_b[cuda]", "test_triton"},
    ]


EXERCISE = """
import os, sys, time
import torch
import gpu_exercise
how, device = sys.argv.pop(), torch.device("cpu")
def exercise_noise(cases, dtypes):
    def third():
        if how == "dies": os._exit(9)
        if how == "hangs": time.sleep(60)
        cases._synchronize = broken
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    def broken(): raise RuntimeError("lost")
    cases.run("one", lambda: None)
    def second(): raise AssertionError("1 is not 2")
    cases.run("two", second)
    cases.run("three", third)
    cases.run("four", lambda: None)
gpu_exercise.FAMILIES["noise"] = exercise_noise
sys.argv[1:] = ["--device", "cpu", "--family", "noise", "--patience", "4" if how == "hangs" else "60"]
sys.exit(gpu_exercise.main())
"""


@pytest.mark.parametrize("how", ["loses", "dies", "hangs"])
def test_the_exercise_goes_on_behind_a_case_that_ends_it(session, tmp_path, monkeypatch, how):
    """A case that fails is followed by the next one; a process that ends in a case by another process."""
    (tmp_path / "exercise.py").write_text(EXERCISE)
    monkeypatch.setattr(gpu, "FAMILIES", ("noise",))
    real = gpu.Run.command
    monkeypatch.setattr(gpu.Run, "command", lambda self, *words, **o: real(self, words[0], tmp_path / "exercise.py", how, **o))
    assert gpu.run_stages([gpu.Stage("exercise", 60, gpu.exercise)], session, lambda line: None) == 1
    text = session.results["exercise"].text
    assert text.startswith(f"2 passed, {2 if how == 'loses' else 1} failed"), text
    assert "two: AssertionError: 1 is not 2" in text and "1 of 1 processes died" not in text
    assert ("three: RuntimeError: CUDA error: an illegal" if how == "loses" else "began and did not end: three") in text
    assert (session.out / "log.txt").read_text().count("first case: ") == 2


SANITIZED = """
import sys
words = sys.argv[1:]
if "loss" in words and "--tool memcheck" in " ".join(words):
    print("========= Invalid __global__ write of size 4 bytes\\n=========     at iwsgd::loss_kernel()+0x10")
    print("========= ERROR SUMMARY: 1 error\\n3 cases of it")
    sys.exit(9)
print("========= COMPUTE-SANITIZER\\n========= " + ("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" if "racecheck" in words
      else "ERROR SUMMARY: 0 errors") + "\\n3 cases of it")
"""


def test_sanitizers(session, tmp_path, monkeypatch):
    """What one of them found, and the words that each is given: the library's kernels alone but for initcheck, ports of their own."""
    (tmp_path / "sanitizer.py").write_text(SANITIZED)
    monkeypatch.setattr(gpu, "tool", lambda name: name)
    real, asked = gpu.Run.command, []

    def command(self, *words, **options):
        asked.append((self.name, " ".join(map(str, words))))
        return real(self, sys.executable, tmp_path / "sanitizer.py", *words, **options)

    monkeypatch.setattr(gpu.Run, "command", command)
    monkeypatch.setattr(gpu, "cases_of", lambda run: gpu.Cases(passed=3))
    stages = [dataclasses.replace(gpu.CHECKS[name], needs=None) for name in gpu.SANITIZERS]
    assert gpu.run_stages(stages, session, lambda line: None) == 1
    found = outcome(session)
    assert {name: status for name, (status, _) in found.items()} == {**dict.fromkeys(gpu.SANITIZERS, "ok"), "memcheck": "failed"}
    assert "ERROR SUMMARY: 1 error" in found["memcheck"][1] and "at iwsgd::loss_kernel()+0x10" in found["memcheck"][1]
    assert "0 hazards" in found["racecheck"][1]
    assert len({re.search(r"--port (\d+)", words)[1] for _, words in asked}) == len(asked) == 4 * len(gpu.FAMILIES)
    assert all(("--kernel-name kns=iwsgd" in words) == (name != "initcheck") for name, words in asked)
    assert all(
        f"--tool {name} " in words and "--report-api-errors no" in words and "--launch-timeout 120" in words for name, words in asked
    )
