"""Registers, spills, stack and shared memory of every CUDA kernel, without a GPU.

    python tools/ptxas_report.py [--arch 80 90 100 120] [csrc/cuda/noise.cu ...]

Compiles each file with all warnings as errors and reads what ptxas says (-Xptxas -v). tests/test_cuda_build.py uses it.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("80", "90", "100", "120")
FLAGS = ["-O3", "-std=c++17", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "--expt-relaxed-constexpr"]
STRICT = ["-Werror", "all-warnings", "-Xcompiler", "-fPIC,-Wall,-Wextra", "-Xptxas", "-v"]


class Kernel(NamedTuple):
    name: str  # demangled, without its parameters
    arch: str
    registers: int
    spill_bytes: int  # stores and loads
    stack_bytes: int
    shared_bytes: int  # static


def find_nvcc() -> str | None:
    """The nvcc that setup.py would take: of CUDA_HOME, of /usr/local/cuda, or the one on the PATH."""
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def compile_kernels(source: Path, arch: str, out: Path | None = None, host: bool = True) -> list[Kernel]:
    """Compiles one .cu for one architecture and reports its kernels.

    Args:
        out: where the object file goes.
        host: compile what runs on the host, too; without it ``out`` is a cubin, in a third of the time for a small file.

    Raises:
        RuntimeError: it does not compile, or not without warnings; the message is the compiler's.
    """
    from torch.utils import cpp_extension

    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("no nvcc: set CUDA_HOME to a CUDA toolkit")
    includes = [word for path in cpp_extension.include_paths() for word in ("-isystem", path)]  # torch's own warnings are not ours
    with tempfile.TemporaryDirectory() as folder:
        out = out or Path(folder) / "kernels.o"
        target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-c" if host else "-cubin", str(source), "-o", str(out)]
        done = subprocess.run([nvcc, *FLAGS, *STRICT, *includes, *target], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{source.name} for sm_{arch}:\n{done.stdout}{done.stderr}")
    return parse(done.stdout + done.stderr)


def parse(report: str) -> list[Kernel]:
    """The kernels in what ptxas -v printed."""
    kernels = []
    for part in re.split(r"(?=ptxas info\s*: Compiling entry function)", report)[1:]:
        name, arch = re.search(r"entry function '(.*)' for 'sm_(\w+)'", part).groups()
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        stack, stores, loads = map(int, frame.groups())
        shared = re.search(r"(\d+) bytes smem", part)
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        kernels.append(Kernel(readable(name), arch, registers, stores + loads, stack, int(shared[1]) if shared else 0))
    return kernels


def readable(name: str) -> str:
    """A mangled name as it is written, without namespaces and parameters."""
    if name.startswith("_Z") and shutil.which("c++filt"):
        name = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    name = name.replace("(anonymous namespace)::", "").replace("iwsgd::", "").removeprefix("void ")
    return re.sub(r">\(.*$", ">", name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sources", nargs="*", type=Path, default=sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES)
    arguments = parser.parse_args()
    print(f"{'arch':>5} {'registers':>9} {'spills':>6} {'stack':>5} {'shared':>6}  kernel")
    spills = 0
    for source in arguments.sources:
        for arch in arguments.arch:
            for k in sorted(compile_kernels(source, arch)):
                print(f"{k.arch:>5} {k.registers:>9} {k.spill_bytes:>6} {k.stack_bytes:>5} {k.shared_bytes:>6}  {k.name}")
                spills += k.spill_bytes
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
