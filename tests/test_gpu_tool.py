"""tools/gpu.py with stages made for it: what fails, hangs or is left out, and what is then reported; no GPU takes part."""

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
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
    return gpu.Session(tmp_path / "out", tmp_path / "logs", time.monotonic() + 60)


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
    return {r.name: (r.status, r.text) for r in session.results}


def test_all_is_well(session):
    printed = []
    stages = [gpu.Stage("one", 20, says("first\nline of a table")), gpu.Stage("two", 20, skips)]
    assert gpu.run_stages(stages, session, printed.append) == 0
    assert outcome(session) == {"one": ("ok", "first\nline of a table"), "two": ("skipped", "there is none")}
    assert sorted(p.name for p in session.out.iterdir()) == ["logs.tar.gz", "report.md", "results.json"]
    report = (session.out / "report.md").read_text()
    assert "| one | ok |" in report and "| two | skipped |" in report and "line of a table" in report
    table = printed[-2].splitlines()
    assert table[0].split() == ["stage", "result", "time"]
    assert [line.split()[:2] for line in table[1:]] == [["one", "ok"], ["two", "skipped"]]
    with tarfile.open(session.out / "logs.tar.gz") as archive:
        assert "logs/one.log" in archive.getnames()


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
    assert [r.name for r in session.results] == ["a", "b", "c"]


def test_stopped_from_outside_still_reports(session):
    def stops(run):
        session.stop()
        return "stopped"

    assert gpu.run_stages([gpu.Stage("one", 9, stops), gpu.Stage("two", 9, says("never"))], session, lambda line: None) == 0
    assert outcome(session)["two"] == ("skipped", "no time was left")
    assert (session.out / "report.md").exists()


def test_tests_are_read_from_every_process(session, tmp_path, monkeypatch):
    """Two shards of a file with a case that passes, one that fails, and one that is left out: each case runs once."""
    folder = tmp_path / "suite"
    folder.mkdir()
    conftest = (Path(__file__).parent / "conftest.py").read_text()
    (folder / "conftest.py").write_text(conftest)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = one_process\n")
    (folder / "test_three.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert False, 'as it must'\n@pytest.mark.skip\ndef test_c(): pass\n"
    )
    work = lambda run: gpu._pytest(run, ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", folder / "pytest.ini", folder], 2)  # noqa: E731
    assert gpu.run_stages([gpu.Stage("tests", 120, work)], session, lambda line: None) == 1
    assert session.results[0].text.splitlines()[0] == "1 passed, 1 failed, 1 skipped"
    assert "test_b: AssertionError: as it must" in session.results[0].text
    assert session.facts["tests"]["failures"][0][0].endswith("test_b")


def test_a_process_of_the_tests_that_dies_is_a_failure(session, tmp_path):
    (tmp_path / "test_dies.py").write_text("import os\ndef test_lives(): pass\ndef test_dies(): os._exit(3)\n")
    work = lambda run: gpu._pytest(run, ["-m", "pytest", "-v", "-c", "/dev/null", "--rootdir", tmp_path, tmp_path], 1)  # noqa: E731
    assert gpu.run_stages([gpu.Stage("tests", 60, work)], session, lambda line: None) == 1
    assert "1 of 1 processes were stopped or died (codes [3])" in session.results[0].text
    assert session.results[0].text.splitlines()[-1].endswith("::test_dies"), "where it was"


def test_without_a_gpu(tmp_path):
    """A message that says so, and an exit code of its own."""
    command = [sys.executable, str(TOOLS / "gpu.py"), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "torch sees no CUDA GPU" in done.stdout
    stages = json.loads((tmp_path / "out" / "results.json").read_text())["stages"]
    assert [s["name"] for s in stages] == [s.name for s in gpu.STAGES]
    assert {s["status"] for s in stages[1:]} == {"skipped"}


BENCH = """
import json, pathlib, sys
if "--help" in sys.argv:
    print("--device --out --minutes")
elif sys.argv[1] == "show":
    print("| what | ratio |")
else:
    out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
    out.mkdir(parents=True)
    (out / "results.json").write_text(json.dumps({"goals": [0.93]}))
    (out / "report.html").write_text("<p>")
    for name in "abcdefgh":
        (out / f"{name}.png").touch()
"""


@pytest.mark.parametrize(("program", "status"), [(BENCH, "ok"), ("import sys; sys.exit('--help' not in sys.argv)", "skipped")])
def test_benchmarks_come_along(session, tmp_path, monkeypatch, program, status):
    """Their numbers, table and page, and no more than a few pictures."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__main__.py").write_text(program)
    monkeypatch.delenv("PYTHONPATH", raising=False)  # that of make test has the real benchmarks
    monkeypatch.setattr(gpu_run, "ROOT", tmp_path)
    gpu.run_stages([gpu.Stage("bench", 50, gpu.bench)], session, lambda line: None)
    assert session.results[0].status == status, session.results[0].text
    if status == "ok":
        assert json.loads((session.out / "results.json").read_text())["bench"] == {"goals": [0.93]}
        assert "| what | ratio |" in (session.out / "report.md").read_text()
        names = {p.name for p in session.out.iterdir()}
        assert {"bench.html", "a.png"} <= names and len(names) <= 8


def test_unknown_stage(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "tests", "speed"])
    assert "got speed" in capsys.readouterr().err


def test_time_limits_fit():
    """Machine, build and the slowest check leave the benchmarks three minutes of the eight."""
    limits = {s.name: s for s in gpu.STAGES}
    checks = max(s.seconds for s in gpu.STAGES if s.group == "checks")
    assert limits["machine"].seconds + limits["build"].seconds + checks <= 480 - 60
    assert {s.needs for s in gpu.STAGES} - {None} <= set(limits)


def test_driver_of_the_checks():
    """It agrees with plain PyTorch on the CPU too."""
    environment = {**os.environ, "PYTHONPATH": str(TOOLS.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOLS / "gpu_exercise.py"), "--device", "cpu", "--dtype", "float32", "bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "scale cases agree" in done.stdout, done.stdout + done.stderr


def test_driver_of_the_checks_knows_every_kernel():
    """Each kernel of the sources is launched by one of its parts, which on a GPU the stages every-kernel see."""
    found = {name: gpu_exercise.kernels(name) for name in ("cuda", "triton")}
    sources = [source.read_text() for source in gpu_exercise.SOURCES["cuda"]]
    assert len(found["cuda"]) == sum(source.count("__global__") for source in sources)
    launched = [kernel for claimed in gpu_exercise.EXERCISES.values() for kernel in claimed]
    assert sorted(launched) == sorted(found["cuda"] | found["triton"])


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
