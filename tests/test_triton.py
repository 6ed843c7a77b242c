"""When the Triton backend is chosen, what is said where it cannot be, and its kernels in the interpreter, in processes of their own."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_backend import python

import iwsgd_ext as iw
from iwsgd_ext import backend

ROOT = Path(iw.__file__).parent.parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton")


def _interpreter_fails() -> bool:
    """Triton 3.6 makes Python numbers of arrays of one element, which NumPy 2.5 refuses."""
    version = lambda name: tuple(int(v) for v in importlib.metadata.version(name).split(".")[:2])  # noqa: E731
    return importlib.util.find_spec("triton") is not None and version("triton") < (3, 7) and version("numpy") >= (2, 5)


INTERPRET = {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}


@pytest.fixture(autouse=True)
def _restored():
    before = backend._forced
    yield
    backend._forced = before


class TestChoice:
    """Which backend is taken for a device, for every set of those that are there."""

    @pytest.mark.parametrize(
        ("there", "kind", "chosen"),
        [
            ({"cpu", "cuda", "triton"}, "cuda", "cuda"),
            ({"cpu", "triton"}, "cuda", "triton"),
            ({"cpu"}, "cuda", "reference"),
            ({"cpu", "triton"}, "cpu", "cpu"),
            ({"triton"}, "cpu", "reference"),
            ({"triton"}, "xpu", "reference"),
            ({"cpu", "cuda", "triton"}, "meta", "reference"),
        ],
    )
    def test_automatic(self, monkeypatch, there, kind, chosen):
        monkeypatch.setattr(backend, "_built", {name: name in there | {"reference"} for name in backend.NAMES})
        iw.set_backend(None)
        assert backend.backend_of(torch.device(kind)) == chosen
        if kind in ("cpu", "cuda"):
            assert iw.backend_info()[kind].startswith(f"{chosen}: ")

    @pytest.mark.parametrize("kind", ["cuda", "xpu"])
    def test_asked_for(self, monkeypatch, kind):
        monkeypatch.setitem(backend._built, "triton", True)
        iw.set_backend("triton")
        assert backend.backend_of(torch.device(kind)) == "triton"

    def test_cpu_tensors_outside_the_interpreter(self, monkeypatch):
        monkeypatch.setitem(backend._built, "triton", True)
        monkeypatch.setattr(backend, "_interpreting", False)
        iw.set_backend("triton")
        with pytest.raises(RuntimeError, match=r"backend 'triton' .* tensor is on cpu, .* start Python with TRITON_INTERPRET=1"):
            iw.functional.dropout(torch.ones(3, 4), 0.5, seed=1)
        with pytest.raises(RuntimeError, match=r"backend 'triton' .* tensor is on cpu"):
            iw.iw_cross_entropy(torch.ones(4, 3), torch.tensor([0, 1]), 2)

    def test_ops_have_one_schema(self):
        """Every backend's form of an op takes the same arguments."""
        for name in backend._ops:
            ours, tritons = (str(getattr(getattr(torch.ops, space), name).default._schema) for space in backend.NAMESPACES)
            assert ours.removeprefix("iwsgd_ext::") == tritons.removeprefix("iwsgd_triton::")
            # The reference scales a gradient by torch's own product.
            assert name == "iw_cross_entropy_scale_" or callable(getattr(iw.reference, name))


@pytest.mark.slow
class TestMissing:
    """Each in a process of its own, with a stand-in for triton or without any."""

    def said(self, tmp_path, files: dict[str, str], code: str = "", **environment) -> str:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
        code += "\nimport iwsgd_ext as iw\nprint(iw.backend_info()['triton'])\niw.set_backend('triton')"
        run = python(code, ROOT, PYTHONPATH=path, **environment)
        assert run.returncode == 1 and "RuntimeError: backend 'triton' is not there" in run.stderr, run.stderr
        return run.stdout

    def test_not_installed(self, tmp_path):
        said = self.said(tmp_path, {}, "import importlib.util as u; u.find_spec = lambda n, f=u.find_spec: None if n == 'triton' else f(n)")
        assert "pip install triton" in said

    def test_broken(self, tmp_path):
        assert "could not be imported: OSError: no such library" in self.said(
            tmp_path, {"triton/__init__.py": "raise OSError('no such library')"}
        )

    def test_too_old(self, tmp_path):
        files = {"triton/__init__.py": "__version__ = '3.1.0'"}
        assert "triton 3.1.0 is too old: expected 3.6 or later; pip install --upgrade triton" in self.said(tmp_path, files)

    @needs_triton
    def test_interpret_set_too_late(self, tmp_path):
        late = "import os; os.environ.pop('TRITON_INTERPRET', None); import triton; os.environ['TRITON_INTERPRET'] = '1'"
        assert "TRITON_INTERPRET is set, but was unset when triton was imported: give it" in self.said(tmp_path, {}, late)
        late = "import os; os.environ['TRITON_INTERPRET'] = '1'; import triton; del os.environ['TRITON_INTERPRET']"
        assert "TRITON_INTERPRET is unset, but was set when triton was imported: give it" in self.said(tmp_path, {}, late)


@needs_triton
@pytest.mark.skipif(_interpreter_fails(), reason="Triton 3.6 cannot interpret beside NumPy 2.5 or later")
class TestInterpreter:
    FILES = ("tests/test_triton_interpreter.py", "tests/test_triton_interpreter_loss.py")

    def test_environment(self):
        """IWSGD_BACKEND=triton on CPU tensors, in a process that interprets, with the noise of any other backend."""
        code = "import torch, iwsgd_ext as iw; print(iw.backend_info()['cpu']); "
        code += "print(iw.functional.dropout(torch.arange(1.0, 9.0)[None], 0.5, samples=2, seed=3).tolist())"
        run = python(code, ROOT, IWSGD_BACKEND="triton", **INTERPRET)
        assert run.returncode == 0, run.stderr
        first, second = run.stdout.splitlines()
        assert first == "triton: asked for by IWSGD_BACKEND or set_backend"
        assert second == str(iw.functional.dropout(torch.arange(1.0, 9.0)[None], 0.5, samples=2, seed=3).tolist())

    def run(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", *arguments]
        done = subprocess.run(command, env={**os.environ, **INTERPRET}, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
        assert " passed" in done.stdout

    def test_generator_and_a_case_of_each_kernel(self):
        """The words and masks of csrc/philox.h; one call of noise and gradient; the loss in each of its three forms."""
        chosen = "known_answers or headers or test_noise[elements-expand-torch.float32] or gradient_sums and rows and float32 and not time"
        self.run(*self.FILES, "-k", f"{chosen} or test_loss[digits-labels")

    @pytest.mark.slow
    def test_kernels(self):
        self.run(*self.FILES)

    @pytest.mark.slow
    def test_some_of_the_tests_of_every_backend(self):
        """What all backends are held to, where it is small; but for bfloat16, which the interpreter rounds wrongly."""
        noise = "test_channels or odd-63 or Values and one_rounding and float16 or splitting or test_opcheck"
        loss = "by_hand or several and smoothed or first_of_equals"
        self.run("tests/test_noise.py", "tests/test_noise_gradient.py", "-k", f"cpu-triton and not bfloat16 and ({noise})")
        files = ("tests/test_iw_cross_entropy.py", "tests/test_iw_cross_entropy_options.py")
        self.run(*files, "-k", f"cpu-triton and not bfloat16 and ({loss})")
