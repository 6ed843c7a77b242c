"""make gpu-first and make gpu-second without a GPU: every stage at work, with a stub in the place of each command.

The stub succeeds, fails, hangs or dies as it is told, and the whole run is killed at several moments; each time what is in the output
folder must tell everything until then.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
PLANS = {
    "first": ["machine", "build", "clusters", "exercise", "timing", "profile", "memcheck", "racecheck", "synccheck", "streams-and-graphs"],
    "second": ["machine", "build", "exercise", "timing", "tests-native", "large", "initcheck", "exercise-triton"],
}
MOST_PRINTED, MOST_FILES, MOST_BYTES = 12_000, 8, 16 << 20  # what is sure to be seen of a run elsewhere

# Takes the place of every command: name of the stage, then the command's words. What a program would leave behind until it fails, hangs
# or dies, it leaves behind, too.
STUB = r"""
import json, os, signal, sys, time
sys.path.insert(0, os.environ["REHEARSAL_TOOLS"])
import gpu_cases
stage, *words = sys.argv[1:]
how, line = json.loads(os.environ["REHEARSAL"]).get(stage, "succeed"), " ".join(words)
if "i['triton']" in line:  # whether Triton is there at all: it is
    how = "succeed"
ncu = '''==PROF== Connected
"ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio"
"","","nsecond","byte",""
"0","void iw_cross_entropy_fwd_kernel<bf16>(int)","358,016","536,870,912","1.25"'''
answers = {
    "nvidia-smi": "580.1, 1980 MHz, 2619 MHz, 40",
    "--version": "Cuda compilation tools",
    "rev-parse": "abc1234",
    "get_device_properties": json.dumps({"torch": "2.11", "gpu": "a card", "capability": "9.0", "memory": "79 GiB"}),
    "backend_info": "built for sm_90",
    "clusters.cu": "compiled",
    "/clusters": "KB 2 4 8 16\n227 66 33 16 8",
    "ncu --": ncu,
}
print("at work", flush=True)
if "gpu_exercise.py" in line or "pytest" in line:
    of = words[words.index("--family") + 1] if "--family" in words else "test_a.py::test"
    begun = gpu_cases.begun()
    print("first case: it")
    for i in range(400 if how == "flood" else 3):
        if f"{of} {i}" in begun:
            continue
        gpu_cases.write(f"{of} {i}", "began")
        if i == 1 and how in ("hang", "die"):
            break
        bad = how in ("fail", "flood") and i > 0
        gpu_cases.write(f"{of} {i}", "failed" if bad else "passed", f"AssertionError: {stage} is wrong " + "x" * 500 * bad)
    if "compute-sanitizer" in line and how in ("succeed", "fail"):
        print(f"========= Invalid __global__ write\n========= ERROR SUMMARY: {int(how == 'fail')} errors")
if "gpu_timing.py" in line and "--once" not in line:
    with open(words[words.index("--out") + 1], "a") as file:
        for case in ("copy", "loss C=1000", "copy at the end"):
            print(json.dumps({"case": case, "began": True}), file=file, flush=True)
            if case != "copy" and how in ("hang", "die"):
                break
            row = {"bytes": 1, "us": 358.0, "least_us": 350.0, "most_us": 400.0, "bytes_per_s": 3e12, "of_copy": 0.987, "host_us": 80}
            row = {"failed": "RuntimeError: no room"} if case == "loss C=1000" and how == "fail" else row
            print(json.dumps({"case": case, **row}), file=file, flush=True)
if "nvcc" in words[0] and "-o" in words:
    open(words[words.index("-o") + 1], "w")
if how == "hang":
    with open(os.environ["REHEARSAL_PIDS"], "a") as file:
        print(os.getpid(), file=file)
    time.sleep(600)
if how == "die":
    os.kill(os.getpid(), signal.SIGSEGV)
if how == "flood":
    for i in range(3000):
        print("a line of a log that is long " * 12)
print(next((answer for key, answer in answers.items() if key in line), ""))
if "gpu_exercise.py" in line:
    print("3 cases of it")
sys.exit({"fail": 1, "flood": 1}.get(how, 0))
"""

DRIVER = """
import os, sys
sys.path.insert(0, os.environ["REHEARSAL_TOOLS"])
import gpu, gpu_run
real, stub = gpu_run.Run.command, (sys.executable, "-S", os.environ["REHEARSAL_STUB"])
gpu_run.Run.command = lambda self, *words, **options: real(self, *stub, self.name, *words, **options)
scale = float(os.environ["REHEARSAL_SCALE"])
if scale < 1:  # what is told to hang is stopped soon
    gpu_run.GRACE, gpu_run.LEAST = 0.5, 0.1
    for plan in gpu.PLANS.values():
        for stage in plan.stages:
            if stage.name in os.environ["REHEARSAL"] and stage.seconds >= 45:
                stage.seconds = min(scale * stage.seconds, 2.0)
sys.exit(gpu.main(sys.argv[1:]))
"""


class Rehearsal:
    def __init__(self, folder: Path):
        self.out, self.folder = folder / "out", folder
        for name, text in {"stub.py": STUB, "driver.py": DRIVER, "pids": ""}.items():
            (folder / name).write_text(text)
        (folder / "bin").mkdir()
        for name in ("ncu", "compute-sanitizer", "nvidia-smi", "nvcc"):  # looked for, never run
            (folder / "bin" / name).touch(0o755)

    def start(self, plan: str, how: dict[str, str], *words: str, scale: float = 1.0) -> subprocess.Popen:
        environment = {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "CUDA_HOME": str(self.folder),
            "REHEARSAL": json.dumps(how),
            "REHEARSAL_SCALE": str(scale),
            "REHEARSAL_TOOLS": str(TOOLS),
            "REHEARSAL_STUB": str(self.folder / "stub.py"),
            "REHEARSAL_PIDS": str(self.folder / "pids"),
        }
        command = [sys.executable, str(self.folder / "driver.py"), plan, "--out", str(self.out), *words]
        return subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )

    def run(self, plan: str, how: dict[str, str], *words: str, **options) -> tuple[int, str, dict[str, str]]:
        """Exit code, output, and the status of each stage."""
        process = self.start(plan, how, *words, **options)
        output, _ = process.communicate(timeout=100)
        return process.returncode, output, self.check(output)

    def check(self, output: str) -> dict[str, str]:
        files = [path for path in self.out.rglob("*") if path.is_file()]
        assert len(files) <= MOST_FILES and all(path.parent == self.out for path in files), files
        assert all(path.stat().st_size < MOST_BYTES for path in files)
        stages = json.loads((self.out / "results.json").read_text())["stages"]
        report = (self.out / "report.md").read_text()
        for stage in stages:
            assert f"\n{stage['name']:<10}"[:11] in report and stage["status"] in report
        return {stage["name"]: stage["status"] for stage in stages}

    def read(self, name: str) -> str:
        path = self.out / name
        return path.read_text() if path.exists() else ""


@pytest.fixture
def rehearsal(tmp_path):
    return Rehearsal(tmp_path)


def summary_of(output: str) -> str:
    """What is printed last: it must fit what is sent, and be whole."""
    text = output[-MOST_PRINTED:]
    assert "# GPU run" in text, "it begins within what is sent"
    return text[text.index("# GPU run") :]


@pytest.mark.parametrize("plan", PLANS)
def test_all_is_well(rehearsal, plan):
    code, output, status = rehearsal.run(plan, {})
    assert (code, status) == (0, dict.fromkeys(PLANS[plan], "ok")), output
    text = summary_of(output)
    assert "loss C=1000" in text and "358.0" in text and " 0.987" in text, "the timing"
    assert text.rstrip().endswith(f"written to {rehearsal.out}")
    if plan == "first":
        assert "iw_cross_entropy_fwd_kernel" in text and "barrier 1.2" in text, "ncu's counters"
        assert "227 66 33 16 8" in text, "the clusters"
        for name in ("memcheck", "racecheck", "synccheck"):
            assert f"{name} | $ " in rehearsal.read("log.txt")


@pytest.mark.parametrize("how", ["fail", "die"])
@pytest.mark.parametrize("plan", PLANS)
def test_every_stage_fails_or_dies(rehearsal, plan, how):
    """But for those that all others need; the cases and the timing until then are told."""
    checks = PLANS[plan][2:]
    code, output, status = rehearsal.run(plan, dict.fromkeys(checks, how))
    expected = {"machine": "ok", "build": "ok", **dict.fromkeys(checks, "failed")}
    if "profile" in status:
        expected["profile"] = "ok" if how == "fail" else "skipped"  # ncu's numbers are there, or it could not read them
    assert (code, status) == (1, expected), output
    text = summary_of(output)
    if how == "fail":
        assert "- exercise: noise 1: AssertionError: exercise is wrong" in text and "FAILED: RuntimeError: no room" in text
    else:
        assert "began and did not end: noise 1" in text and "processes died" in text
        assert "loss C=1000              began and did not end" in text
    assert "copy  " in text and "358.0" in text


@pytest.mark.parametrize("plan", PLANS)
def test_every_stage_hangs(rehearsal, plan):
    """Each is stopped with all that it started."""
    checks = PLANS[plan][2:]
    code, output, status = rehearsal.run(plan, dict.fromkeys(checks, "hang"), scale=0.02)
    assert (code, status) == (1, {"machine": "ok", "build": "ok", **dict.fromkeys(checks, "failed")}), output
    text = summary_of(output)
    assert text.count("stopped at its time limit") >= len(checks)
    assert "loss C=1000              began and did not end" in text and "began and did not end: noise 1" in text
    assert not alive(rehearsal)


@pytest.mark.parametrize("stage", ["machine", "build"])
def test_what_all_need_hangs(rehearsal, stage):
    """The time for everything ends it."""
    code, output, status = rehearsal.run("first", {stage: "hang"}, "--minutes", "0.06", scale=0.5)
    assert code == 1 and status[stage] == "failed", output
    assert {status[name] for name in PLANS["first"][3:]} == {"skipped"}
    assert "stopped at its time limit" in summary_of(output)


def test_what_is_printed_and_written_has_bounds(rehearsal):
    """Also where every stage has hundreds of failures, each of them long, and logs without end."""
    code, output, status = rehearsal.run(
        "second", dict.fromkeys(("exercise", "tests-native", "large", "initcheck", "exercise-triton"), "flood")
    )
    assert code == 1 and list(status.values()).count("failed") == 5
    text = summary_of(output)
    assert len(text) < MOST_PRINTED and "## timing" in text and "## Cases that failed" in text
    assert "more failures, in cases.jsonl" in rehearsal.read("report.md")


MOMENTS = [("first", stage) for stage in ("machine", "build", "exercise", "timing", "profile", "memcheck")]


@pytest.mark.parametrize(("plan", "stage"), [*MOMENTS, ("second", "tests-native")])
def test_killed(rehearsal, plan, stage):
    """SIGKILL for the whole group while a stage runs: what ended before it is there, and what it had found."""
    process = rehearsal.start(plan, {stage: "hang"})
    found = {"exercise": "noise 1", "memcheck": "noise 1", "tests-native": "test_a.py::test 1"}.get(stage)
    until = time.monotonic() + 60
    while not (
        f"{stage} | at work" in rehearsal.read("log.txt")
        and (found is None or found in rehearsal.read("cases.jsonl"))
        and (stage != "timing" or "loss C=1000" in rehearsal.read("timing.jsonl"))
        and (rehearsal.folder / "pids").read_text()
    ):
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    status = rehearsal.check(output)
    stages = PLANS[plan]
    before = stages[: stages.index(stage)] if stage != "build" else ["machine"]
    assert [status[name] for name in before] == ["ok"] * len(before) and status[stage] == "running"
    assert all(f"{name}: ok" in output for name in before), "printed at once, too"
    assert all("ok" in line for line in rehearsal.read("report.md").splitlines() if line.split()[:1] == before[-1:] != [])
    for _ in range(200):
        if not alive(rehearsal):
            break
        time.sleep(0.05)
    assert not alive(rehearsal), "no command goes on when the run is over"


def alive(rehearsal: Rehearsal) -> list[int]:
    """Stubs that hang and are still there."""
    found = []
    for pid in (rehearsal.folder / "pids").read_text().split():
        with contextlib.suppress(OSError):
            if "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
                found.append(int(pid))
    return found


def test_a_run_that_is_stuck_ends():
    """Whatever its threads do: the last resort of the time limit."""
    program = f"import sys; sys.path.insert(0, {str(TOOLS)!r}); import gpu_run, time; gpu_run.exit_at(0.3); time.sleep(600)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Timeout" in done.stderr
