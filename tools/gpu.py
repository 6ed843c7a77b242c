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
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu_run import ROOT, Failed, Run, Session, Skipped, Stage, run_stages

MOST_PICTURES = 4

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
TRITON = "cuda-triton"  # in the names of the cases that run on it: tests/conftest.py
TEST_SHARDS = max(2, (os.cpu_count() or 1) - 6)  # processes; the other stages of the group need about a core each
TRITON_SHARDS = TEST_SHARDS // 2


def tests(run: Run) -> str:
    """The whole suite on the GPU, but for Triton's cases, dealt out to processes that run side by side."""
    words = ["-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", f"not {TRITON}", *(f"--ignore=tests/{name}" for name in OWN_STAGES)]
    return _pytest(run, words, TEST_SHARDS - TRITON_SHARDS)


def triton_tests(run: Run) -> str:
    """The cases of every backend, on Triton: apart, because compiling a kernel for each kind of call may take all the time there is."""
    _require_triton(run)
    return _pytest(run, ["-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", TRITON], TRITON_SHARDS)


def _require_triton(run: Run) -> None:
    code, output = run.python("-c", "import iwsgd_ext as iw; i = iw.backend_info(); print(i['triton']); assert i['built']['triton']")
    if code != 0:
        raise Skipped(next(iter(output.splitlines()), "iwsgd_ext does not load"))


def own_tests(name: str) -> Callable[[Run], str]:
    return lambda run: _pytest(run, ["-m", "pytest", "-v", "-p", "no:cacheprovider", f"tests/{name}"], 1)


def _pytest(run: Run, words: list[str], shards: int) -> str:
    logs = [run.log if shards == 1 else run.session.logs / f"{run.name}-{i}.log" for i in range(shards)]

    def shard(i: int) -> int:
        xml = run.session.logs / f"{run.name}-{i}.xml"
        settings = {"IWSGD_TEST_DEVICE": "cuda", "IWSGD_TEST_SHARD": f"{i}/{shards}"}
        settings |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # the processes fill the cores
        try:
            return run.python(*words, f"--junitxml={xml}", environment=settings, log=logs[i])[0]
        except Failed:
            return -1

    with ThreadPoolExecutor(shards) as pool:
        codes = list(pool.map(shard, range(shards)))
    counts, failures = read_junit(sorted(run.session.logs.glob(f"{run.name}-*.xml")))
    run.session.facts[run.name] = {**counts, "failures": failures}
    text = f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped"
    # 5: a shard without cases. A process that died or was stopped leaves no counts, but, by -v, the name of its case.
    stopped = [log for log, code in zip(logs, codes, strict=True) if code not in (0, 1, 5)]
    listed = [f"- {name}: {message}" for name, message in failures[:30]]
    if stopped:
        cases = [[line.strip() for line in log.read_text(errors="replace").splitlines() if "::" in line] for log in stopped]
        first = f"{text}; {len(stopped)} of {shards} processes were stopped or died (codes {codes}), in:"
        raise Failed("\n".join([first, *(f"- {of[-1]}" for of in cases if of), *listed]))
    if failures:
        raise Failed("\n".join([text, *listed]))
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
    return _coverage(run, "cuda")


def triton_coverage(run: Run) -> str:
    """The same of Triton's kernels, in one dtype: others are compiled by its tests."""
    _require_triton(run)
    return _coverage(run, "triton", "--dtype", "bfloat16")


def _coverage(run: Run, *backend: str) -> str:
    code, output = run.python("tools/gpu_exercise.py", "--kernels", "--backend", *backend)
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
    words = [ncu, "--clock-control", "none", "--csv", "--metrics", PROFILE_METRICS]
    words += ["--kernel-name", "regex:iw_cross_entropy|noise|gaussian|multinomial"]
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
    Stage("tests-triton", 200, triton_tests, group="checks", needs="build"),
    Stage("streams-and-graphs", 120, own_tests("test_cuda_run.py"), group="checks", needs="build"),
    Stage("memcheck", 200, sanitizer("memcheck"), group="checks", needs="build"),
    Stage("racecheck", 200, sanitizer("racecheck"), group="checks", needs="build"),
    Stage("initcheck", 200, sanitizer("initcheck"), group="checks", needs="build"),
    Stage("every-kernel", 60, coverage, group="checks", needs="build"),
    Stage("every-kernel-triton", 150, triton_coverage, group="checks", needs="build"),
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
