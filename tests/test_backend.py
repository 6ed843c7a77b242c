"""Which backend runs, what is said of it, and an installation without the native library."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import iwsgd_ext as iw

PACKAGE = Path(iw.__file__).parent
BUILT = iw.backend_info()["built"]


def python(code: str, root: Path = PACKAGE.parent, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a new process that imports the package from ``root``."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("IWSGD_")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=root, env={**keep, "PYTHONPATH": str(root), **environment}, capture_output=True, text=True)


@pytest.fixture(autouse=True)
def _restored():
    before = iw.backend_info()["forced"]
    yield
    iw.set_backend(before)


class TestSetBackend:
    def test_unknown_name(self):
        for name in ("cuda2", "", "CPU"):
            with pytest.raises(ValueError, match="name: expected one of reference, cpu, cuda, triton or None, got"):
                iw.set_backend(name)

    @pytest.mark.parametrize("name", ["cpu", "cuda", "triton"])
    def test_one_that_is_not_built(self, name):
        if BUILT[name]:
            pytest.skip("it is built here")
        with pytest.raises(RuntimeError, match=f"backend '{name}' is not there: .*pip install"):
            iw.set_backend(name)
        assert iw.backend_info()["forced"] is None

    def test_info_says_what_is_forced_and_why(self):
        iw.set_backend("reference")
        info = iw.backend_info()
        assert info["forced"] == "reference"
        assert info["cpu"] == info["cuda"] == "reference: asked for by IWSGD_BACKEND or set_backend"
        iw.set_backend(None)
        info = iw.backend_info()
        assert info["forced"] is None
        for kind in ("cpu", "cuda"):
            instead = "triton" if kind == "cuda" and BUILT["triton"] else "reference"
            assert info[kind].startswith(f"{kind}: built" if BUILT[kind] else f"{instead}: the ")

    def test_forced_backend_runs(self, device, monkeypatch):
        """The reference is called only where it is asked for, if the device's own kernels are built."""
        calls, original = [], iw.reference.noise
        monkeypatch.setattr(iw.reference, "noise", lambda *a: calls.append(1) or original(*a))
        x = torch.ones(3, 63, device=device)
        iw.set_backend("reference")
        slow = iw.functional.dropout(x, 0.5, seed=1)
        assert len(calls) == 1
        iw.set_backend(None)
        fast = iw.functional.dropout(x, 0.5, seed=1)
        assert len(calls) == (2 if iw.backend.backend_of(device) == "reference" else 1)
        assert torch.equal(slow, fast)

    def test_backend_of_another_device(self):
        if not BUILT["cpu"]:
            pytest.skip("no native build")
        iw.set_backend("cpu")
        with pytest.raises(RuntimeError, match="backend 'cpu' was asked for, but the tensor is on meta"):
            iw.functional.dropout(torch.ones(3, 4, device="meta"), 0.5, seed=1)


def test_info_of_the_build():
    info = iw.backend_info()
    assert info["torch"] == torch.__version__
    assert set(info["built"]) == {"reference", "cpu", "cuda", "triton"}
    assert info["built"]["reference"]
    if BUILT["cpu"] and importlib.util.find_spec("iwsgd_ext._info"):
        assert set(info["build"]) == {"compiler", "torch", "cuda_architectures", "isa", "machine_isas"}
        assert info["build"]["isa"] in info["build"]["machine_isas"]
        assert info["build"]["machine_isas"][0] == "baseline"
    else:
        assert info["build"].startswith("not known: " if BUILT["cpu"] else "no native build: ")


def test_info_without_the_module_that_has_it(monkeypatch):
    """The operators need it for nothing."""
    monkeypatch.delattr(iw, "_info", raising=False)
    monkeypatch.setitem(sys.modules, "iwsgd_ext._info", None)
    monkeypatch.setitem(iw.backend._built, "cpu", True)
    info = iw.backend_info()
    assert info["cpu"] == "cpu: built, and the fastest here"
    assert info["build"].startswith("not known: the operators are built, but the module that tells of their build is missing (")
    monkeypatch.setitem(iw.backend._built, "cpu", False)
    assert iw.backend_info()["build"].startswith("no native build: ")


@pytest.mark.parametrize(
    ("torch_has_cuda", "gpu", "said"),
    [
        (False, False, "; not in use: this torch is built without CUDA"),
        (True, False, "; not in use: this torch sees no GPU"),
        (True, True, ", and the fastest here"),
    ],
)
def test_info_of_a_device_that_may_not_be_there(monkeypatch, torch_has_cuda, gpu, said):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: torch_has_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setitem(iw.backend._built, "cuda", True)
    assert iw.backend_info()["cuda"] == f"cuda: built{said}"
    monkeypatch.setitem(iw.backend._built, "cuda", False)
    missing = iw.backend_info()["cuda"]
    assert "the cuda kernels are not in this installation (" in missing and missing.endswith(")" if gpu else said)
    assert not iw.backend_info()["cpu"].endswith(said) or gpu


@pytest.mark.slow
class TestEnvironment:
    def test_backend(self):
        run = python("import iwsgd_ext as iw; print(iw.backend_info()['forced'])", IWSGD_BACKEND="reference")
        assert (run.returncode, run.stdout) == (0, "reference\n"), run.stderr
        run = python("import iwsgd_ext as iw; print(iw.backend_info()['forced'])", IWSGD_BACKEND="")
        assert (run.returncode, run.stdout) == (0, "None\n"), run.stderr

    def test_bad_backend(self):
        run = python("import iwsgd_ext", IWSGD_BACKEND="fast")
        assert run.returncode == 1
        assert "ValueError: IWSGD_BACKEND: expected one of reference, cpu, cuda, triton, got 'fast'" in run.stderr

    @pytest.mark.skipif(not BUILT["cpu"], reason="no native build")
    def test_bad_instruction_set(self):
        """An error at import, not an abort and not another instruction set in silence."""
        run = python("import iwsgd_ext", IWSGD_ISA="avx9")
        assert run.returncode == 1, run.stderr
        assert "IWSGD_ISA: expected one of baseline, avx2, avx512" in run.stderr


LAZY = """
import sys, torch
before = "triton" in sys.modules
import iwsgd_ext as iw
from iwsgd_ext import backend
cuda = torch.device("cuda")
logits = iw.functional.dropout(torch.ones(4, 3, requires_grad=True), 0.5, samples=2, seed=1)
iw.iw_cross_entropy(logits, torch.tensor([0, 1, 2, 0]), 2).backward()
assert ("triton" in sys.modules) == before, "imported by a program that does not use it"
assert backend._built["triton"] is None
backend._built["cuda"] = False
"""
ON_FIRST_USE = {
    "asked for": "iw.set_backend('triton')",
    "information": "assert iw.backend_info()['built']['triton'] is True",
    "chosen": "assert backend.backend_of(cuda) == 'triton'",
    "chosen in a graph": """
@torch.compile(fullgraph=True, backend="aot_eager")
def f(x):
    return x + backend.NAMES.index(backend.backend_of(cuda))
assert f(torch.zeros(1)) == 3
""",
    "called by name": """
arguments = (torch.tensor([3, 0, 0]), None, 2, 1, 0, 5, 1, 20000, None, 1.5)
assert torch.ops.iwsgd_triton.noise_sum(torch.ones(0, 6, 5), *arguments).shape == (0, 3, 5)
""",
}


@pytest.mark.slow
@pytest.mark.skipif(not BUILT["triton"], reason="triton is not installed")
@pytest.mark.parametrize("use", ON_FIRST_USE.values(), ids=ON_FIRST_USE)
def test_triton_is_imported_on_first_use(use):
    run = python(f"{LAZY}{use}\nassert 'triton' in sys.modules and backend._built['triton']")
    assert run.returncode == 0, run.stderr


def test_sources_that_stand_in_front_of_an_installation(tmp_path):
    """In a checkout Python takes its folder for the package: the report says so, and not that the package should be installed again."""
    shutil.copytree(PACKAGE, tmp_path / "iwsgd_ext", ignore=shutil.ignore_patterns("*.so", "*.dll", "__pycache__"))
    (tmp_path / "setup.py").touch()
    run = python("import iwsgd_ext; print(iwsgd_ext.backend_info()['cpu'])", tmp_path)
    assert f"Python has imported the sources in {tmp_path}, not what pip installed" in run.stdout, run.stderr


WITHOUT_NATIVE = """
import torch, iwsgd_ext as iw
from torch import nn
info = iw.backend_info()
assert not info["built"]["cpu"] and info["build"].startswith("no native build"), info
assert "the cpu kernels are not in this installation" in info["cpu"] and "C++ compiler" in info["cpu"], info
model = iw.convert(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)), samples=3)
loss = iw.IWCrossEntropyLoss(samples=3)(model(torch.randn(5, 4)), torch.tensor([0, 1, 2, 0, 1]))
loss.backward()
assert model[0].weight.grad.abs().sum() > 0
print(iw.functional.dropout(torch.arange(1.0, 64.0)[None], 0.5, samples=2, seed=3).tolist())
try:
    iw.set_backend("cpu")
except RuntimeError as error:
    assert "pip install" in str(error)
else:
    raise AssertionError("set_backend('cpu') found a backend")
"""


@pytest.mark.slow
def test_installation_without_the_native_library(tmp_path):
    """Everything runs on the reference, with the same noise, and it says why."""
    shutil.copytree(PACKAGE, tmp_path / "iwsgd_ext", ignore=shutil.ignore_patterns("*.so", "*.dll", "__pycache__"))
    run = python(WITHOUT_NATIVE, tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(iw.functional.dropout(torch.arange(1.0, 64.0)[None], 0.5, samples=2, seed=3).tolist())


@pytest.mark.slow
def test_library_that_cannot_be_loaded(tmp_path):
    """A broken file (another platform's, a half-copied one) is named, and the reference runs."""
    shutil.copytree(PACKAGE, tmp_path / "iwsgd_ext", ignore=shutil.ignore_patterns("*.so", "*.dll", "__pycache__"))
    (tmp_path / "iwsgd_ext" / "_ops.so").write_bytes(b"not a library")
    run = python("import iwsgd_ext as iw; print(iw.backend_info()['cpu'])", tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("reference: the cpu kernels are not in this installation (_ops.so could not be loaded")
