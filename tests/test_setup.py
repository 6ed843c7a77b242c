"""setup.py on sources made for it."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_operators_are_built_without_pythons_headers(tmp_path):
    """The module that needs them is left out, and says so."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("csrc/cpu/ops.cpp", "csrc/python/info.cpp", "iwsgd_ext/__init__.py", "iwsgd_ext/triton/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "csrc" / "python" / "info.cpp").write_text("#include <Python-of-nowhere.h>\n")
    environment = {**os.environ, "IWSGD_CUDA": "0", "IWSGD_NATIVE": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"  # ninja
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "iwsgd_ext" / "_ops.so").exists()
    assert "building without iwsgd_ext._info" in done.stderr


@pytest.mark.parametrize(
    ("given", "nvcc", "gpus", "want"),
    [
        (None, "80 90 100 120", [], "8.0;9.0;10.0+PTX;12.0"),
        (None, "75 80 86 90", [], "8.0;9.0+PTX"),  # a toolkit before CUDA 12.8
        (None, "75 80 89 90 100 120", [(8, 9), (9, 0)], "8.0;9.0;10.0+PTX;12.0"),  # machine code of 8.0 runs on 8.9
        (None, "75 80 90 100 110 120", [(7, 5), (11, 0), (7, 5)], "8.0;9.0;10.0+PTX;12.0;7.5;11.0"),
        (None, "80 90 100 120", [(7, 0)], "8.0;9.0;10.0+PTX;12.0"),  # which this toolkit cannot compile for
        ("9.0 8.0+PTX", "80", [(7, 5)], "9.0;8.0+PTX"),
        ("8.9", "80 89", [], "8.9"),
    ],
)
def test_cuda_architectures(tmp_path, monkeypatch, given, nvcc, gpus, want):
    """With a toolkit of those architectures, on a machine with those GPUs."""
    tool = tmp_path / "bin" / "nvcc"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\nprintf 'compute_%s\\n' " + nvcc + "\n")
    tool.chmod(0o755)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if given is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    cuda = SimpleNamespace(is_available=lambda: bool(gpus), device_count=lambda: len(gpus), get_device_capability=gpus.__getitem__)
    architectures = runpy.run_path(str(ROOT / "setup.py"))["cuda_architectures"]
    assert architectures(SimpleNamespace(cuda=cuda), str(tmp_path)) == want
