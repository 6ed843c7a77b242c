"""Everything that needs a GPU: build, exercise of every kernel, timing, memory and race checks, tests, benchmarks, and a report of it.

    make gpu-first  [OUT=dir] [PYTHON=python3.12]     what to know of new kernels, in 210 seconds
    make gpu-second [OUT=dir] [PYTHON=python3.12]     the tests of mended ones, in 240 seconds
    make gpu        [OUT=dir] [PYTHON=python3.12]     everything, in 8 minutes
    or: python tools/gpu.py [first|second|full] [--out dir] [--minutes 8] [--only STAGE ...]

Works with the Python that runs it: builds the kernels in place for the card that is there, and fetches nothing. Each stage has a
time limit; what follows a failure still runs. What was found is in dir at any moment, whatever ends the run (tools/gpu_run.py), in a
few files, so that they can be sent as they are; the last that is printed is a summary of it. The exit code is 0 where no stage failed, 1
where one did, 2 without a GPU.
"""

import argparse
import csv
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gpu_cases
from gpu_run import ROOT, Cases, Failed, Run, Session, Skipped, Stage, exit_at, read_cases, run_stages, side_by_side

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
    facts = run.session.facts["machine"] = {}
    for name, words in {"driver": ["nvidia-smi"], "nvcc": [nvcc(), "--version"], "commit": ["git", "rev-parse", "--short", "HEAD"]}.items():
        if shutil.which(words[0]):
            query = ["--query-gpu=driver_version,clocks.sm,clocks.mem,temperature.gpu", "--format=csv,noheader"] if name == "driver" else []
            answer = [line for line in run.command(*words, *query)[1].splitlines() if line.strip()]
            facts[name] = answer[-1] if answer else "no answer"
    code, output = run.python("-c", MACHINE)
    if code != 0:
        raise Failed(f"{sys.executable} cannot import torch: choose another Python (make gpu PYTHON=...)")
    facts.update(json.loads(output.splitlines()[-1]))
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
    code, output = run.python("setup.py", "build_ext", "--inplace", "--force", environment=settings)
    if code != 0:
        errors = [line for line in output.splitlines() if "error" in line.lower()]
        raise Failed("\n".join(["the kernels do not compile", *errors[:12]]))
    code, output = run.python("-c", "import iwsgd_ext as iw; i = iw.backend_info(); print(i['build']); assert i['built']['cuda'], i")
    if code != 0:
        raise Failed("built, but the library does not load, or holds no CUDA kernels")
    return output.splitlines()[-1]


def clusters(run: Run) -> str:
    """How many clusters run at once: where they have no room, the loss takes another plan."""
    capability = run.session.facts["machine"]["capability"]
    if float(capability) < 9:
        raise Skipped(f"there are no clusters on sm_{capability.replace('.', '')}")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "clusters"
        code, _ = run.command(nvcc(), "-std=c++17", f"-arch=sm_{capability.replace('.', '')}", "-o", program, "tools/gpu_clusters.cu")
        if code != 0:
            raise Failed("tools/gpu_clusters.cu does not compile")
        code, output = run.command(program)
    if code != 0:
        raise Failed(f"ended with code {code}\n{output}")
    return f"a table, below\n{output}"


FAMILIES = ("noise", "real_noise", "multinomial", "loss", "scale")  # of tools/gpu_exercise.py, a process each
RESTARTS = 4


def cases_of(run: Run) -> Cases:
    return read_cases(run.session.out / "cases.jsonl", run.name)


def to_cases(run: Run) -> dict[str, str]:
    """Environment variables by which tests and the exercise write down their cases (tools/gpu_cases.py)."""
    return {"IWSGD_CASES": str(run.session.out / "cases.jsonl"), "IWSGD_STAGE": run.name}


def exercised(run: Run, before: Callable[[int], list], *words: object, **environment: str) -> list[tuple[int, str] | Failed]:
    """tools/gpu_exercise.py, each family's process behind the words before(number). One that dies is started again behind the case."""

    def family(number: int) -> tuple[int, str]:
        together, outputs = ["tools/gpu_exercise.py", "--family", FAMILIES[number], *words], []
        settings = {**to_cases(run), "OMP_NUM_THREADS": "2", **environment}
        for _ in range(RESTARTS):
            code, output = run.command(*before(number), sys.executable, *together, environment=settings)
            outputs.append(output)
            if " cases of " in output or "first case: " not in output:  # its last line and its first
                break
        return code, "".join(outputs)

    return side_by_side([lambda number=number: family(number) for number in range(len(FAMILIES))])


def judged(run: Run, ends: list[tuple[int, str] | Failed], why: list[str]) -> str:
    """The verdict on a stage by its cases and the ends of its processes; ``why``: other failures."""
    found = cases_of(run)
    run.session.facts[run.name] = {"passed": found.passed, "failures": found.failed, "skipped": found.skipped}
    why += sorted({str(end) for end in ends if isinstance(end, Failed)})
    lost = sum(not isinstance(end, Failed) and " cases of " not in end[1] for end in ends)
    why += [f"{lost} of {len(ends)} processes died"] * bool(lost)
    first = "; ".join([str(found), *why])
    if why or found.failed or found.unfinished or not found.passed:
        raise Failed("\n".join([first, *found.lines(8)]))
    return "\n".join([first, *found.lines()])


def exercise(run: Run) -> str:
    """Every CUDA kernel in every regime, against plain torch; and that every one of them was launched."""
    return judged(run, exercised(run, lambda number: [], "--kernels", "--patience", 20, "--backend", "cuda"), [])


def triton_exercise(run: Run) -> str:
    """The same of Triton's kernels, in one dtype: others are compiled by its tests."""
    _require_triton(run)
    words = ["--kernels", "--backend", "triton", "--dtype", "bfloat16"]
    return judged(run, exercised(run, lambda number: [], *words, TORCHINDUCTOR_COMPILE_THREADS="1"), [])


def _require_triton(run: Run) -> None:
    code, output = run.python("-c", "import iwsgd_ext as iw; i = iw.backend_info(); print(i['triton']); assert i['built']['triton']")
    if code != 0:
        raise Skipped(next(iter(output.splitlines()), "iwsgd_ext does not load"))


def timing(run: Run) -> str:
    """Graph replays of every kernel, nothing else running."""
    file, why = run.session.out / "timing.jsonl", ""
    try:
        for _ in range(RESTARTS):
            before = len(gpu_cases.read(file))
            code, _ = run.python("tools/gpu_timing.py", "--out", file)
            rows = gpu_cases.read(file)
            if code == 0 or any(row["case"] == "copy at the end" and "us" in row for row in rows) or len(rows) == before:
                break
        bad = sum("failed" in row or "wrong" in row for row in rows)
        why = f"{bad} failed or wrong" if bad else f"ended with code {code}" if code else ""
    except Failed as stopped:
        why = str(stopped)
    rows = gpu_cases.read(file)
    run.session.facts["timing"] = [row for row in rows if "began" not in row]
    text = "\n".join([f"{sum('us' in row for row in rows)} cases{'; ' if why else ''}{why}", *timing_table(rows)])
    if why:
        raise Failed(text)
    return text


def timing_table(rows: list[dict]) -> list[str]:
    """One line a case: microseconds (median, least and most of the blocks), GB/s, of the copy bandwidth, the host's microseconds."""
    lines = [f"{'case':<24} {'us':>8} {'least':>8} {'most':>8} {'GB/s':>6} {'of copy':>7} {'host us':>7}"]
    ended = {row["case"] for row in rows if "began" not in row}
    for row in rows:
        if "us" in row:
            of_copy = f"{row['of_copy']:.3f}" if row.get("of_copy") else ""
            line = f"{row['case']:<24} {row['us']:>8.1f} {row['least_us']:>8.1f} {row['most_us']:>8.1f} {row['bytes_per_s'] / 1e9:>6.0f}"
            line += f" {of_copy:>7} {row.get('host_us', 0):>7.0f}"
            lines.append(line + "".join(f"  {name.upper()}: {row[name][:160]}" for name in ("wrong", "eager") if name in row))
        elif "failed" in row:
            lines.append(f"{row['case']:<24} FAILED: {row['failed'][:200]}")
        elif row["case"] not in ended:
            lines.append(f"{row['case']:<24} began and did not end")
    return lines


def tool(name: str) -> str:
    """A program of the CUDA toolkit, on the PATH or beside nvcc."""
    found = shutil.which(name) or str(Path(nvcc()).parent / name)
    if not Path(found).exists():
        raise Skipped(f"no {name} on the PATH or beside nvcc")
    return found


FIRST_PORT = 49152  # sanitizers that run side by side must not listen on one another's
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


def sanitizer(name: str) -> Callable[[Run], str]:
    def check(run: Run) -> str:
        words = [tool("compute-sanitizer"), "--tool", name, "--error-exitcode", "9", "--print-limit", "20", "--report-api-errors", "no"]
        words += ["--launch-timeout", "120", "--target-processes", "application-only"]
        if name != "initcheck":  # which must see torch's kernels write, too
            words += ["--kernel-name", "kns=iwsgd"]
        port = FIRST_PORT + 100 * SANITIZERS.index(name)
        # Without torch's cache each tensor is an allocation of its own, whose end the tool knows.
        ends = exercised(
            run,
            lambda number: [*words, "--port", port + 20 * number],
            *("--dtype", "bfloat16", "float32", "--patience", 100),
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )
        output = "\n".join(end[1] for end in ends if not isinstance(end, Failed))
        if "Device not supported" in output or "Unable to find injection library" in output:
            raise Skipped("compute-sanitizer does not support this machine's driver")
        summaries = [line.strip("= ") for line in output.splitlines() if "SUMMARY" in line]
        bad = [line for line in summaries if any(int(number) for number in re.findall(r"(\d+) (?:error|hazard)", line))]
        reports = [line for line in output.splitlines() if line.startswith("=====") and "SUMMARY" not in line and "COMPUTE-SAN" not in line]
        why = [*bad, *(["a process left no summary"] if len(summaries) < len(FAMILIES) else [])]
        try:
            return f"{judged(run, ends, why)}; {'; '.join(dict.fromkeys(summaries))}"
        except Failed as failed:
            raise Failed("\n".join([str(failed), *reports[:24]])) from None

    return check


TRITON = "cuda-triton"  # in the names of the cases that run on it: tests/conftest.py
NATIVE = "cuda-native"  # on the CUDA kernels
OTHERS = (
    "--ignore=tests/test_cuda_run.py",
    "--ignore=tests/test_cuda_large.py",
    "--ignore=tests/test_cuda_build.py",
)  # not on a GPU, or apart
WORKERS = max(2, (os.cpu_count() or 1) - 6)  # the other stages of the group need about a core each


def tests(*words: object, workers: int = 1, seconds: int = 60) -> Callable[[Run], str]:
    """Cases of the tests on the GPU. A worker that hangs or loses its CUDA context ends, and pytest-xdist starts another."""

    def check(run: Run) -> str:
        # not loadgroup: pytest-xdist 3.8 then waits for ever when a worker has died
        more = ["-n", workers, "--dist", "worksteal", "--max-worker-restart", 50] if workers > 1 and installed("xdist") else []
        more += [f"--timeout={seconds}", "--timeout-method=thread"] if installed("pytest_timeout") else []
        settings = {**to_cases(run), "IWSGD_TEST_DEVICE": "cuda", "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        quiet = ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", "gpu_cases"]
        try:
            code, _ = run.python("-m", "pytest", *quiet, *more, *words, environment=settings)
            why = [] if code in (0, 1) else ["there was no case"] if code == 5 else [f"pytest ended with code {code}"]
        except Failed as stopped:
            why = [str(stopped)]
        return judged(run, [], why)

    return check


def triton_tests(run: Run) -> str:
    """The cases of every backend, on Triton: apart, because compiling a kernel for each kind of call may take all the time there is."""
    _require_triton(run)
    return tests("-k", TRITON, workers=WORKERS // 2)(run)


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def bench(run: Run) -> str:
    if "--device" not in run.python("-m", "bench", "--help")[1]:
        raise Skipped("this version's bench measures the CPU only")
    minutes = max(0.5, (run.left - 20) / 60)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code, _ = run.python("-m", "bench", "--device", "cuda", "--out", folder, "--minutes", f"{minutes:.2f}")
        if (folder / "report.html").exists():  # its pictures are in it
            shutil.copy(folder / "report.html", run.session.out / "bench.html")
        found = folder / "results.json"
        if found.exists():
            run.session.facts["bench"] = json.loads(found.read_text())
        if code != 0:
            raise Failed("the benchmarks ended with an error")
        if not found.exists():
            raise Failed("the benchmarks left no results.json")
        code, shown = run.python("-m", "bench", "show", found, "--markdown")
    return "\n".join([f"{minutes:.1f} minutes", *([shown.strip()] if code == 0 else [])])


STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
STALLS = (
    *(
        "barrier",
        "branch_resolving",
        "dispatch_stall",
        "drain",
        "imc_miss",
        "lg_throttle",
        "long_scoreboard",
        "math_pipe_throttle",
        "membar",
    ),
    *("mio_throttle", "no_instruction", "not_selected", "short_scoreboard", "sleeping", "wait"),
)
COUNTERS = {
    "us": "gpu__time_duration.sum",
    "MB read": "dram__bytes_read.sum",
    "MB written": "dram__bytes_write.sum",
    "issue %": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "warps %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "L2 write sectors, M": "lts__t_sectors_op_write.sum",
    "instructions, M": "smsp__inst_executed.sum",
    "registers": "launch__registers_per_thread",
}
UNITS = {"us": 1e-3, "MB read": 1e-6, "MB written": 1e-6, "L2 write sectors, M": 1e-6, "instructions, M": 1e-6}  # of base units
LAUNCHES = 30  # of which eight are large; the others add up what these leave


def profile(run: Run) -> str:
    """Hardware counters of each kernel at a size that fills the card."""
    words = [tool("ncu"), "--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base", "--launch-count", LAUNCHES]
    words += ["--kernel-name", "regex:noise_|iw_cross_entropy_"]
    # A counter that this version does not know ends ncu before the program begins: then those that all know.
    for metrics in ([*COUNTERS.values(), *map(STALL.format, STALLS)], list(COUNTERS.values())[:3]):
        code, output = run.command(*words, "--metrics", ",".join(metrics), sys.executable, "tools/gpu_timing.py", "--once")
        rows = launches(output)
        if rows:
            break
    if not rows:
        said = [line for line in output.splitlines() if line.startswith("==ERROR==")]
        raise Skipped(f"ncu could not read the counters here (code {code}): {' '.join(said)[:300]}")
    run.session.facts["profile"] = rows
    large = [row for row in rows if row.get(COUNTERS["us"], 0) > 20_000] or rows  # ns
    lines = [
        f"{len(large)} of {len(rows)} launches, {len(metrics)} counters",
        "  ".join(["kernel", "grid", *COUNTERS, "what warps wait for"]),
    ]
    for row in large:
        values = [f"{row[metric] * UNITS.get(name, 1):.4g}" if metric in row else "-" for name, metric in COUNTERS.items()]
        stalls = sorted(((row[STALL.format(s)], s) for s in STALLS if STALL.format(s) in row), reverse=True)
        name = re.search(r"(\w+_kernel)|$", row["kernel"])[0] or row["kernel"][:40]
        lines.append("  ".join([name, row["grid"], *values, " ".join(f"{name} {value:.1f}" for value, name in stalls[:4])]))
    return "\n".join(lines)


def launches(output: str) -> list[dict]:
    """The launches in the output of ncu --csv --page raw, which has a header, a line of units, and a line for each launch, with commas in
    the numbers."""
    rows = list(csv.reader(line for line in output.splitlines() if line.startswith('"')))
    if not rows or "Kernel Name" not in rows[0]:
        return []
    found = []
    for values in rows[1:]:
        row = dict(zip(rows[0], values, strict=False))
        if row.get("ID"):
            numbers = {name: value.replace(",", "") for name, value in row.items() if "__" in name}
            numbers = {k: float(v) for k, v in numbers.items() if re.fullmatch(r"[-+.\deE]+", v)}
            found.append({"kernel": row["Kernel Name"], "grid": row.get("Grid Size", ""), **numbers})
    return found


def resources(run: Run) -> str:
    architecture = run.session.facts["machine"]["capability"].replace(".", "")
    code, output = run.python("tools/ptxas_report.py", "--arch", architecture)
    if code != 0:
        raise Failed("a kernel spills registers, or does not compile without warnings; the log's end follows")
    return f"{len(output.strip().splitlines()) - 1} kernels, no spills"


class Plan(NamedTuple):
    minutes: float  # for the whole process
    stages: list[Stage]


MACHINE_STAGE = Stage("machine", 120, machine)
BUILD = [Stage("build", 150, build, group="build", needs="machine"), Stage("clusters", 60, clusters, group="build", needs="machine")]
EXERCISE = Stage("exercise", 45, exercise, needs="build")
TIMING = Stage("timing", 50, timing, needs="build")
PROFILE = Stage("profile", 45, profile, needs="build")
STREAMS = Stage("streams-and-graphs", 120, tests("tests/test_cuda_run.py", seconds=90), group="checks", needs="build")
LARGE = Stage("large", 150, tests("tests/test_cuda_large.py", seconds=120), group="checks", needs="build")
TRITON_EXERCISE = Stage("exercise-triton", 150, triton_exercise, group="checks", needs="build")
CHECKS = {name: Stage(name, 200, sanitizer(name), group="checks", needs="build") for name in SANITIZERS}

PLANS = {
    "first": Plan(
        3.5,
        [MACHINE_STAGE, *BUILD, EXERCISE, TIMING, PROFILE, *(CHECKS[name] for name in ("memcheck", "racecheck", "synccheck")), STREAMS],
    ),
    "second": Plan(
        4,
        [
            *(MACHINE_STAGE, *BUILD[:1], EXERCISE, TIMING),
            Stage("tests-native", 200, tests("-k", NATIVE, workers=WORKERS), group="checks", needs="build"),
            *(LARGE, CHECKS["initcheck"], TRITON_EXERCISE),
        ],
    ),
    "full": Plan(
        8,
        [
            *(MACHINE_STAGE, *BUILD, EXERCISE, TIMING, PROFILE),
            Stage("tests", 200, tests("-k", f"not {TRITON}", *OTHERS, workers=WORKERS - WORKERS // 2), group="checks", needs="build"),
            Stage("tests-triton", 200, triton_tests, group="checks", needs="build"),
            *(STREAMS, LARGE, *CHECKS.values(), TRITON_EXERCISE),
            Stage("resources", 120, resources, group="checks", needs="build"),
            Stage("bench", 240, bench, needs="build"),
        ],
    ),
}
FINISH = 10.0  # seconds before the end at which the last stage is stopped, so that the summary is printed in time


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", nargs="?", choices=list(PLANS), default="full")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="where the report goes (default build/gpu)")
    parser.add_argument("--minutes", type=float, help="for everything together (default 3.5, 4 or 8, by the plan)")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="only these stages of the plan, and the machine")
    options = parser.parse_args(arguments)
    minutes, stages = PLANS[options.plan]
    unknown = set(options.only) - {s.name for s in stages}
    if unknown:
        parser.error(f"--only: expected stages of {', '.join(s.name for s in stages)}, got {', '.join(sorted(unknown))}")
    stages = [s for s in stages if not options.only or s.name in (*options.only, "machine")]
    seconds = 60 * (options.minutes or minutes)
    finish = min(FINISH, seconds / 4)
    exit_at(seconds - finish / 10)
    session = Session(options.out.resolve(), time.monotonic() + seconds - finish)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, session.stop)
    return run_stages(stages, session)


if __name__ == "__main__":
    sys.exit(main())
