"""The C++ test of the CUDA loss kernels finds what is wrong in them without a GPU: one planted fault of each kind."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "plant_faults.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.machine_code,
    pytest.mark.one_process,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]


def test_faults_of_each_kind_are_found():
    ran = subprocess.run([sys.executable, TOOL, "--each-kind"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " 0 not found" in ran.stdout
    assert ran.stdout.count("    found: ") >= 5, ran.stdout  # of kinds
