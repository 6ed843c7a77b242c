"""Plants faults in copies of the CUDA loss kernels, and reports which of them the C++ test finds without a GPU.

    python tools/plant_faults.py [--list] [--only WORD] [--each-kind] [--jobs 2] [--sources DIR] [--test FILE]

A fault is one synchronisation that is missing or weaker, or one exchange with a wrong partner. It is found where the test fails, aborts
or does not end in time. A line of a kernel whose comment says "not before the line above" is moved there, too. Ends with 1 if a fault is
not found that HARMLESS does not explain.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TEST = "cuda_iw_cross_entropy.cpp"
FLAGS = ["-std=c++17", "-O1", "-DIWSGD_FEW_CASES", "-w"]
SEEN = ["-DIWSGD_SEES_ACCESSES", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"]
SECONDS = 240  # of one test, which takes 40 of one core

# Calls that are left out whole, and calls whose last argument becomes another; {} is what it was.
REMOVED = ("sync", "sync_warp", "sync_cluster", "wait_grid", "finish_copies", "commit_copies", "wait_copies", "wait_arrivals")
# A swap by half the distance never reaches the other half; a distance of 1 becomes the thread itself.
WRONG = {"swap": "({}) / 2", "shuffle": "({}) ^ 1", "init_arrivals": "({}) + 1", "expect_bytes": "({}) - 4"}
CALL = re.compile(rf"\bblock\.(?:template )?({'|'.join(sorted((*REMOVED, *WRONG), key=len, reverse=True))})(?:<([^<>]*)>)?\(")
LATER = "not before the line above"

# (file, kind, line above, line) -> why nothing can go wrong; lines without their indentation.
HARMLESS: dict[tuple[str, str, str, str], str] = {}


class Fault(NamedTuple):
    path: Path  # of the header, relative to csrc
    line: int  # from 1
    kind: str
    above: str  # the line before, and the line, as they were
    text: str
    source: str  # the header with the fault

    def __str__(self) -> str:
        return f"{self.path.name}:{self.line}: {self.kind}: {self.text}"

    def harmless(self) -> str | None:
        return HARMLESS.get((self.path.name, self.kind, self.above, self.text))


def closing(source: str, opened: int) -> tuple[int, int]:
    """Where the bracket at `opened` closes, and where its last argument begins."""
    depth, last = 0, opened + 1
    for at in range(opened, len(source)):
        if source[at] in "([{":
            depth += 1
        elif source[at] in ")]}":
            depth -= 1
            if depth == 0:
                return at, last
        elif source[at] == "," and depth == 1:
            last = at + 1
    raise ValueError(f"no bracket closes the one in {source[opened : opened + 60]!r}")


def faults_in(path: Path, source: str) -> Iterator[Fault]:
    lines = source.split("\n")

    def fault(at: int, kind: str, changed: str) -> Fault:
        line = source.count("\n", 0, at)
        return Fault(path, line + 1, kind, lines[line - 1].strip(), lines[line].strip(), changed)

    for call in CALL.finditer(source):
        name, count = call.groups()
        if "//" in source[source.rfind("\n", 0, call.start()) + 1 : call.start()]:
            continue
        end, last = closing(source, call.end() - 1)
        before, behind = source[: call.start()], source[end + 1 :]
        if name in REMOVED:
            yield fault(call.start(), f"no {name}", before + "static_cast<void>(0)" + behind)
        if name == "wait_copies":
            yield fault(call.start(), "a group too few waited for", before + f"block.template wait_copies<({count}) + 1>()" + behind)
        if name in WRONG:
            wrong = " " + WRONG[name].format(source[last:end].strip())
            yield fault(call.start(), f"wrong {name}", source[:last] + wrong + source[end:])
    for i, line in enumerate(lines):
        if LATER in line:
            moved = [*lines[: i - 1], line, lines[i - 1], *lines[i + 1 :]]
            yield Fault(path, i + 1, "a line early", lines[i - 1].strip(), line.strip(), "\n".join(moved))


def all_faults(csrc: Path) -> list[Fault]:
    headers = sorted(path for path in (csrc / "cuda").glob("iw_cross_entropy_*.cuh") if "struct DeviceBlock" not in path.read_text())
    return [fault for path in headers for fault in faults_in(path.relative_to(csrc), path.read_text())]


def compiler_takes_sanitizer(folder: Path) -> bool:
    (folder / "empty.cpp").write_text("int main() {}\n")
    return subprocess.run(["g++", *SEEN, "-c", "empty.cpp", "-o", "empty.o"], cwd=folder, capture_output=True).returncode == 0


def run_with(fault: Fault | None, csrc: Path, test: str) -> str | None:
    """How the test found the fault, or None if it passed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("cuda", "test", "."):
            (folder / "csrc" / part).mkdir(parents=True, exist_ok=True)
            for path in (csrc / part).iterdir():
                if path.suffix in (".h", ".cuh") or path.name == test:
                    shutil.copy(path, folder / "csrc" / part)
        if fault is not None:
            (folder / "csrc" / fault.path).write_text(fault.source)
        seen = SEEN if compiler_takes_sanitizer(folder) else []
        compiled = ["g++", *FLAGS, *seen, "-c", f"csrc/test/{test}", "-o", "test.o"]
        build = subprocess.run(compiled, cwd=folder, capture_output=True, text=True)
        if build.returncode != 0:
            raise RuntimeError(f"{fault} does not compile:\n{build.stderr[-3000:]}")
        subprocess.run(["g++", "test.o", "-o", "test"], cwd=folder, check=True)  # without the sanitizer's own library
        try:
            ran = subprocess.run(["./test"], cwd=folder, capture_output=True, text=True, errors="replace", timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return "no end"
        if ran.returncode == 0:
            return None
        words = {"a race": "race", "wait at different barriers": "deadlock", "the order of the threads": "order", ": not ": "wrong result"}
        ways = [way for word, way in words.items() if word in ran.stderr]
        return ", ".join(ways) or (ran.stderr.strip().split("\n")[0] or f"exit status {ran.returncode}")[:80]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--list", action="store_true", help="only list the faults")
    parser.add_argument("--only", default="", help="faults whose description contains this")
    parser.add_argument("--each-kind", action="store_true", help="the first fault of each kind that is not harmless")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--sources", type=Path, default=ROOT / "csrc", help="another csrc")
    parser.add_argument("--test", default=TEST, help="file of csrc/test")
    arguments = parser.parse_args()
    faults = [fault for fault in all_faults(arguments.sources) if arguments.only in str(fault)]
    if arguments.each_kind:
        faults = list({fault.kind: fault for fault in reversed(faults) if fault.harmless() is None}.values())[::-1]
    if arguments.list:
        print(*faults, sep="\n")
        return 0
    missed = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        tried = pool.map(lambda fault: run_with(fault, arguments.sources, arguments.test), [None, *faults])
        if way := next(tried):
            print(f"the test fails without a fault: {way}")
            pool.shutdown(cancel_futures=True)
            return 1
        for fault, way in zip(faults, tried, strict=True):
            why = fault.harmless()
            missed += way is None and why is None
            print(f"{fault}\n    {f'found: {way}' if way else f'harmless: {why}' if why else 'NOT FOUND'}", flush=True)
    print(f"{len(faults)} faults, {missed} not found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
