"""setup.py on sources made for it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

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
