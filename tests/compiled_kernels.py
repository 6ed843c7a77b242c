"""Every .cu, compiled once for each architecture, for the test files that read what came out."""

import functools
import itertools
import os
import shutil
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import ptxas_report  # noqa: E402
import sass_report  # noqa: E402

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
OLDEST = "75"  # Turing: of few registers for each thread, so that some spill
ARCHITECTURES = (*ptxas_report.ARCHITECTURES, OLDEST)
MARKS = [
    pytest.mark.slow,
    pytest.mark.machine_code,
    pytest.mark.one_process("compiled_kernels"),
    pytest.mark.skipif(ptxas_report.find_nvcc() is None, reason="no nvcc: not in CUDA_HOME, /usr/local/cuda or on the PATH"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, which nvcc needs"),
]


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


def _object(source: Path, arch: str) -> Path:
    return Path(_folder().name) / f"{source.stem}.{arch}.o"


@functools.cache
def _compilation(source: Path, arch: str) -> Future:
    return _pool().submit(ptxas_report.compile_kernels, source, arch, _object(source, arch), host=arch == "90")  # of the host once


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())


def compile_kernels(source: Path, arch: str) -> list[ptxas_report.Kernel]:
    """What ptxas says about a file's kernels; every file is compiled side by side on the machine's cores."""
    for each in itertools.product(SOURCES, ARCHITECTURES):
        _compilation(*each)
    return _compilation(source, arch).result()


@functools.cache
def disassemble(name: str, arch: str = "90") -> list[sass_report.Kernel]:
    """The machine code of the kernels of csrc/cuda/<name>.cu."""
    source = ROOT / "csrc" / "cuda" / f"{name}.cu"
    _compilation(source, arch).result()
    return sass_report.disassemble(_object(source, arch))
