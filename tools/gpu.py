"""Everything that needs a GPU, by one command: build, tests, memory and race checks, benchmarks, and a report of it.

    make gpu [OUT=dir] [PYTHON=python3.12]            or: python tools/gpu.py [--out dir] [--minutes 8] [--only STAGE ...]

Works with the Python that runs it: builds the kernels in place for the card that is there, and fetches nothing. Each stage has a
time limit and a log; what follows a failure still runs. dir then holds report.md, results.json, the benchmarks' pictures and
logs.tar.gz: a few files, so that they can be sent as they are. The exit code is 0 where no stage failed, 1 where one did, 2
without a GPU.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = 2
MOST_PICTURES = 4


class Failed(Exception):
    """A stage did not do what it is for; the message says what was seen."""


class Skipped(Exception):
    """A stage cannot run here; the message says why."""


@dataclass
class Stage:
    """A step of the run.

    ``work(run)`` does it and returns what is worth a line in the table; it raises Failed or Skipped. Stages of one group that
    follow one another run side by side. ``needs``: a stage without which this one makes no sense.
    """

    name: str
    seconds: float  # its limit
    work: Callable[["Run"], str]
    group: str | None = None
    needs: str | None = None


@dataclass
class Result:
    name: str
    status: str  # ok, failed, skipped
    text: str
    seconds: float


@dataclass
class Session:
    """A run of all stages: where it writes, when it must be over, and what has come out so far."""

    out: Path
    logs: Path
    deadline: float  # of time.monotonic()
    results: list[Result] = field(default_factory=list)
    facts: dict = field(default_factory=dict)  # of the machine, and what stages found: for results.json
    running: set[subprocess.Popen] = field(default_factory=set)

    def result(self, name: str) -> Result | None:
        return next((r for r in self.results if r.name == name), None)

    def stop(self, *_) -> None:
        """Ends what runs and starts nothing more; the report is still written."""
        self.deadline = time.monotonic()
        for process in list(self.running):
            _kill(process)


@dataclass
class Run:
    """One stage at work: its commands write to its log and are stopped when its time is over."""

    session: Session
    name: str
    end: float

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def log(self) -> Path:
        return self.session.logs / f"{self.name}.log"

    def command(self, *words: object, environment: dict[str, str] | None = None, log: Path | None = None) -> tuple[int, str]:
        """Exit code and output of a command in the checkout's root. Raises Failed where the stage's time runs out."""
        log = log or self.log
        log.parent.mkdir(parents=True, exist_ok=True)
        started = log.stat().st_size if log.exists() else 0
        with log.open("a") as file:
            print("$", *words, file=file, flush=True)
            begin = file.tell()
            # A group of its own, so that what it starts can be stopped with it.
            process = subprocess.Popen(
                [str(word) for word in words],
                cwd=ROOT,
                env={**os.environ, **_environment(), **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.session.running.add(process)
            try:
                code = process.wait(timeout=max(self.left, 0.1))
            except subprocess.TimeoutExpired:
                raise Failed("stopped at its time limit") from None
            finally:
                _kill(process)
                self.session.running.discard(process)
        return code, log.read_bytes()[max(begin, started) :].decode(errors="replace")

    def python(self, *words: object, **options) -> tuple[int, str]:
        return self.command(sys.executable, *words, **options)


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _environment() -> dict[str, str]:
    # ninja is a program beside Python, which need not be on the PATH; cuBLAS is deterministic, as the tests ask, with this only
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {"PATH": path, "PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


# ---- the run ----


def run_stages(stages: list[Stage], session: Session, say: Callable[[str], None] = print) -> int:
    """Runs them all, whatever fails, writing the report after each; returns the exit code."""
    for folder in (session.logs, session.out):
        folder.mkdir(parents=True, exist_ok=True)
    for stale in ("report.md", "results.json", "logs.tar.gz", "bench.html"):
        (session.out / stale).unlink(missing_ok=True)
    waiting = list(stages)
    while waiting:
        together = [waiting.pop(0)]
        while waiting and together[0].group and waiting[0].group == together[0].group:
            together.append(waiting.pop(0))
        say(f"{', '.join(s.name for s in together)} ...")
        with ThreadPoolExecutor(len(together)) as pool:
            for result in pool.map(lambda stage: _run_stage(stage, session), together):
                session.results.append(result)
                say(f"  {result.name}: {result.status}, {result.seconds:.0f} s{': ' + result.text if result.text else ''}")
        write_report(session)
    say(table(session.results))
    say(f"written to {session.out}")
    if session.facts.get("no_gpu"):
        return NO_GPU
    return int(any(r.status == "failed" for r in session.results))


def _run_stage(stage: Stage, session: Session) -> Result:
    begin = time.monotonic()
    needed = session.result(stage.needs) if stage.needs else None
    status, text = "ok", ""
    try:
        if needed is not None and needed.status != "ok":
            raise Skipped(f"{needed.name} {'was skipped' if needed.status == 'skipped' else 'failed'}")
        if session.deadline - begin < 5:
            raise Skipped("no time was left")
        text = stage.work(Run(session, stage.name, min(begin + stage.seconds, session.deadline)))
    except Skipped as why:
        status, text = "skipped", str(why)
    except Failed as why:
        status, text = "failed", str(why)
    except Exception as error:  # a mistake in a stage must not hide what the others find
        status, text = "failed", f"{type(error).__name__}: {error}"
    return Result(stage.name, status, text, time.monotonic() - begin)


def table(results: list[Result]) -> str:
    width = max((len(r.name) for r in results), default=0)
    lines = [f"{'stage':<{width}}  {'result':<7}  {'time':>5}  "]
    lines += [f"{r.name:<{width}}  {r.status:<7}  {r.seconds:>3.0f} s  {r.text.splitlines()[0] if r.text else ''}" for r in results]
    return "\n".join(line.rstrip() for line in lines)


def write_report(session: Session) -> None:
    """report.md, results.json and logs.tar.gz, as far as the run has come."""
    results = [vars(r) for r in session.results]
    (session.out / "results.json").write_text(json.dumps({**session.facts, "stages": results}, indent=1, default=str) + "\n")
    lines = ["# GPU run", ""]
    lines += [f"- {key}: {value}" for key, value in session.facts.get("machine", {}).items()]
    lines += ["", "| stage | result | seconds | |", "|---|---|---:|---|"]
    for r in session.results:
        first = r.text.splitlines()[0].replace("|", "\\|") if r.text else ""
        lines.append(f"| {r.name} | {'**failed**' if r.status == 'failed' else r.status} | {r.seconds:.0f} | {first} |")
    for r in session.results:
        log = session.logs / f"{r.name}.log"
        if r.status == "failed":
            tail = log.read_text(errors="replace").splitlines()[-40:] if log.exists() else []
            lines += ["", f"## {r.name} failed", "", r.text, "", "```", *tail, "```"]
        elif len(r.text.splitlines()) > 1:
            lines += ["", f"## {r.name}", "", *r.text.splitlines()[1:]]
    pictures = sorted(p.name for p in session.out.iterdir() if p.suffix in (".png", ".svg"))
    lines += ["", *(f"![{Path(name).stem}]({name})" for name in pictures)]
    (session.out / "report.md").write_text("\n".join(lines) + "\n")
    with tarfile.open(session.out / "logs.tar.gz", "w:gz") as archive:
        archive.add(session.logs, "logs")


# ---- the stages ----

MACHINE = """
import json, os, platform, torch
facts = {"python": platform.python_version(), "torch": torch.__version__, "torch's CUDA": torch.version.cuda, "cores": os.cpu_count()}
if torch.cuda.is_available():
    p, (free, total) = torch.cuda.get_device_properties(0), torch.cuda.mem_get_info(0)
    facts["gpu"], facts["capability"] = p.name, f"{p.major}.{p.minor}"
    facts["multiprocessors"], facts["gpus"] = p.multi_processor_count, torch.cuda.device_count()
    facts["memory"] = f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} free"
    facts["second level cache"] = f"{getattr(p, 'L2_cache_size', 0) / 2**20:.0f} MiB"
print(json.dumps(facts))
"""


def machine(run: Run) -> str:
    code, output = run.python("-c", MACHINE)
    facts = run.session.facts["machine"] = json.loads(output.splitlines()[-1]) if code == 0 else {}
    if code != 0:
        raise Failed(f"{sys.executable} cannot import torch: choose another Python (make gpu PYTHON=...)")
    for name, words in {"driver": ["nvidia-smi"], "nvcc": [nvcc(), "--version"], "commit": ["git", "rev-parse", "--short", "HEAD"]}.items():
        if shutil.which(words[0]):
            query = ["--query-gpu=driver_version,clocks.sm,clocks.mem,temperature.gpu", "--format=csv,noheader"] if name == "driver" else []
            answer = [line for line in run.command(*words, *query)[1].splitlines() if line.strip()]
            facts[name] = answer[-1] if answer else "no answer"
    if "gpu" not in facts:
        run.session.facts["no_gpu"] = True
        raise Failed("torch sees no CUDA GPU: " + ("this torch is built without CUDA" if not facts["torch's CUDA"] else "see nvidia-smi"))
    return f"{facts['gpu']}, sm_{facts['capability'].replace('.', '')}, {facts['memory']}; torch {facts['torch']}"


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return f"{home}/bin/nvcc" if Path(home, "bin", "nvcc").exists() else "nvcc"


def build(run: Run) -> str:
    capability = run.session.facts["machine"]["capability"]
    settings = {"IWSGD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": capability, "MAX_JOBS": str(os.cpu_count())}
    code, _ = run.python("setup.py", "build_ext", "--inplace", "--force", environment=settings)
    if code != 0:
        raise Failed("the kernels do not compile; the log's end follows")
    code, output = run.python("-c", "import iwsgd_ext as iw; i = iw.backend_info(); print(i['build']); assert i['built']['cuda'], i")
    if code != 0:
        raise Failed("built, but the library does not load, or holds no CUDA kernels")
    return output.splitlines()[-1]


OWN_STAGES = ("test_cuda_run.py", "test_cuda_large.py")  # of tests/
TEST_SHARDS = max(1, (os.cpu_count() or 1) - 6)  # processes; the other stages of the group need about a core each


def tests(run: Run) -> str:
    """The whole suite on the GPU, its cases dealt out to processes that run side by side."""
    run.session.facts["tests"] = {}
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"--ignore=tests/{name}" for name in OWN_STAGES)]
    return _pytest(run, words, TEST_SHARDS)


def own_tests(name: str) -> Callable[[Run], str]:
    return lambda run: _pytest(run, ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{name}"], 1)


def _pytest(run: Run, words: list[str], shards: int) -> str:
    def shard(i: int) -> int:
        xml = run.session.logs / f"{run.name}-{i}.xml"
        settings = {"IWSGD_TEST_DEVICE": "cuda", "IWSGD_TEST_SHARD": f"{i}/{shards}"}
        settings |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # the processes fill the cores
        log = run.log if shards == 1 else run.session.logs / f"{run.name}-{i}.log"
        try:
            return run.python(*words, f"--junitxml={xml}", environment=settings, log=log)[0]
        except Failed:
            return -1

    with ThreadPoolExecutor(shards) as pool:
        codes = list(pool.map(shard, range(shards)))
    counts, failures = read_junit(sorted(run.session.logs.glob(f"{run.name}-*.xml")))
    run.session.facts[run.name] = {**counts, "failures": failures}
    text = f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped"
    # 5: a shard without cases. A process that died or was stopped leaves no counts.
    if any(code not in (0, 1, 5) for code in codes):
        raise Failed(f"{text}; {sum(c not in (0, 1, 5) for c in codes)} of {shards} processes were stopped or died (codes {codes})")
    if failures:
        raise Failed("\n".join([text, *(f"- {name}: {message}" for name, message in failures[:30])]))
    if counts["passed"] == 0:
        raise Failed(f"{text}: nothing was tested")
    return text


def read_junit(files: list[Path]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Counts of cases by outcome, and (name, first line of the message) of each that failed."""
    from xml.etree import ElementTree

    counts, failures = {"passed": 0, "failed": 0, "skipped": 0}, []
    for file in files:
        for case in ElementTree.parse(file).iter("testcase"):
            wrong = [*case.findall("failure"), *case.findall("error")]
            outcome = "failed" if wrong else "skipped" if case.findall("skipped") else "passed"
            counts[outcome] += 1
            if wrong:
                message = (wrong[0].get("message") or wrong[0].text or "").strip().splitlines()
                failures.append((f"{case.get('classname')}.{case.get('name')}", message[0][:200] if message else ""))
    return counts, failures


def coverage(run: Run) -> str:
    """Whether the driver of the checks launches every kernel there is."""
    code, output = run.python("tools/gpu_exercise.py", "--kernels")
    if code != 0:
        raise Failed(output.strip().splitlines()[-1] if output.strip() else "no output")
    return output.strip().splitlines()[-1]


def sanitizer(tool: str) -> Callable[[Run], str]:
    def check(run: Run) -> str:
        found = next(
            (p for p in (shutil.which("compute-sanitizer"), str(Path(nvcc()).parent / "compute-sanitizer")) if p and Path(p).exists()), None
        )
        if found is None:
            raise Skipped("no compute-sanitizer on the PATH")
        words = [found, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        # Without torch's cache each tensor is an allocation of its own, whose end the tool knows.
        code, output = run.command(*words, sys.executable, "tools/gpu_exercise.py", environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        if "Device not supported" in output or "Unable to find injection library" in output:
            raise Skipped("compute-sanitizer does not support this machine's driver")
        summary = [line.strip("= \n") for line in output.splitlines() if "SUMMARY" in line]
        if code != 0 or not summary:
            raise Failed(summary[-1] if summary else f"ended with code {code} and without a summary")
        return summary[-1]

    return check


def bench(run: Run) -> str:
    if "--device" not in run.python("-m", "bench", "--help")[1]:
        raise Skipped("this version's bench measures the CPU only")
    folder = run.session.logs / "bench"
    minutes = max(0.5, (run.left - 20) / 60)
    code, _ = run.python("-m", "bench", "--device", "cuda", "--out", folder, "--minutes", f"{minutes:.2f}")
    files = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.exists() else []
    for picture in [p for p in files if p.suffix in (".png", ".svg")][:MOST_PICTURES]:
        shutil.copy(picture, run.session.out / picture.name)
    if (folder / "report.html").exists():
        shutil.copy(folder / "report.html", run.session.out / "bench.html")
    found = folder / "results.json"
    if found.exists():
        run.session.facts["bench"] = json.loads(found.read_text())
    if code != 0:
        raise Failed("the benchmarks ended with an error; the log's end follows")
    if not found.exists():
        raise Failed("the benchmarks left no results.json")
    code, shown = run.python("-m", "bench", "show", found, "--markdown")
    return "\n".join([f"{len(files)} files, {minutes:.1f} minutes", *([shown.strip()] if code == 0 else [])])


PROFILE_METRICS = ",".join(
    (
        "gpu__time_duration.sum",
        "dram__bytes.sum",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        "sm__throughput.avg.pct_of_peak_sustained_elapsed",
        "sm__warps_active.avg.pct_of_peak_sustained_active",
        "launch__registers_per_thread",
    )
)


def profile(run: Run) -> str:
    """Hardware counters of each kernel at a size that fills the card."""
    ncu = shutil.which("ncu") or str(Path(nvcc()).parent / "ncu")
    if not Path(ncu).exists():
        raise Skipped("no ncu on the PATH")
    words = [ncu, "--clock-control", "none", "--csv", "--metrics", PROFILE_METRICS, "--kernel-name", "regex:iw_cross_entropy|noise"]
    code, output = run.command(*words, sys.executable, "tools/gpu_exercise.py", "--large")
    rows = [line for line in output.splitlines() if line.startswith('"')]
    if code != 0 or len(rows) < 2:
        raise Skipped("ncu could not read the counters here")
    return f"{len(rows) - 1} readings of {len(PROFILE_METRICS.split(','))} counters, in the log"


def resources(run: Run) -> str:
    architecture = run.session.facts["machine"]["capability"].replace(".", "")
    code, output = run.python("tools/ptxas_report.py", "--arch", architecture)
    if code != 0:
        raise Failed("a kernel spills registers, or does not compile without warnings; the log's end follows")
    return f"{len(output.strip().splitlines()) - 1} kernels, no spills"


STAGES = [
    Stage("machine", 40, machine),
    Stage("build", 150, build, needs="machine"),
    Stage("tests", 200, tests, group="checks", needs="build"),
    Stage("streams-and-graphs", 120, own_tests("test_cuda_run.py"), group="checks", needs="build"),
    Stage("memcheck", 150, sanitizer("memcheck"), group="checks", needs="build"),
    Stage("racecheck", 150, sanitizer("racecheck"), group="checks", needs="build"),
    Stage("initcheck", 150, sanitizer("initcheck"), group="checks", needs="build"),
    Stage("every-kernel", 60, coverage, group="checks", needs="build"),
    Stage("large", 120, own_tests("test_cuda_large.py"), group="checks", needs="build"),
    Stage("resources", 120, resources, group="checks", needs="build"),
    Stage("bench", 240, bench, needs="build"),
    Stage("profile", 60, profile, needs="build"),
]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="where the report goes (default build/gpu)")
    parser.add_argument("--minutes", type=float, default=8, help="for everything together (default 8)")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help=f"only these: {', '.join(s.name for s in STAGES)}")
    options = parser.parse_args(arguments)
    unknown = set(options.only) - {s.name for s in STAGES}
    if unknown:
        parser.error(f"--only: expected stages of {', '.join(s.name for s in STAGES)}, got {', '.join(sorted(unknown))}")
    stages = [s for s in STAGES if not options.only or s.name in (*options.only, "machine")]
    with tempfile.TemporaryDirectory(prefix="iwsgd-gpu-") as logs:
        session = Session(options.out.resolve(), Path(logs), time.monotonic() + 60 * options.minutes)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, session.stop)
        return run_stages(stages, session)


if __name__ == "__main__":
    sys.exit(main())
