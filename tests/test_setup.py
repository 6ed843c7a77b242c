"""setup.py and the Makefile, on sources and with tools made for it."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils import cpp_extension

import iwsgd_ext

ROOT = Path(__file__).resolve().parent.parent


needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


def sources(folder: Path) -> Path:
    """A small package of the same form: one empty file for the operators, one for the module."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CMakeLists.txt"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("csrc/cpu/ops.cpp", "csrc/python/info.cpp", "iwsgd_ext/__init__.py", "iwsgd_ext/ops/triton/__init__.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "iwsgd_ext" / "__init__.py").write_text('__version__ = "1.2.3"\n')
    return folder


def setup(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja
    environment = {**os.environ, "IWSGD_CUDA": "0", "IWSGD_NATIVE": "1", "PATH": path, **environment}
    return subprocess.run([sys.executable, "setup.py", *command], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@needs_compiler
def test_operators_are_built_without_pythons_headers(tmp_path):
    """The module that needs them is left out, and says so."""
    sources(tmp_path)
    (tmp_path / "csrc" / "python" / "info.cpp").write_text("#include <Python-of-nowhere.h>\n")
    done = setup(tmp_path, "build_ext", "--inplace")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "iwsgd_ext" / "_ops.so").exists()
    assert "building without iwsgd_ext._info" in done.stderr


def binaries_of_wheel(folder: Path) -> set[str]:
    (wheel,) = (folder / "dist").glob("iwsgd_ext-1.2.3-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "iwsgd_ext/py.typed" in archive.namelist()
        return {name for name in archive.namelist() if name.endswith((".so", ".dll"))}


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("native", ["0", "1"])
def test_wheel_holds_what_was_built(tmp_path, native):
    """Of files that lay about none: built in place, for another Python, by an earlier version, or named by its list of sources."""
    sources(tmp_path)
    (tmp_path / "iwsgd_ext" / "py.typed").touch()
    platform = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    for name in ("iwsgd_ext/_ops.so", "iwsgd_ext/_info.cpython-39-x86_64-linux-gnu.so", f"build/{platform}/iwsgd_ext/_old.so"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("stale")
    shutil.copytree(tmp_path / "build" / platform, tmp_path / "build" / "lib")
    (tmp_path / "iwsgd_ext.egg-info").mkdir()
    (tmp_path / "iwsgd_ext.egg-info" / "SOURCES.txt").write_text("setup.py\niwsgd_ext/_ops.so\n")
    done = setup(tmp_path, "bdist_wheel", IWSGD_NATIVE=native)
    assert done.returncode == 0, done.stdout + done.stderr
    built = {"iwsgd_ext/_ops.so", f"iwsgd_ext/_info{sysconfig.get_config_var('EXT_SUFFIX')}"}
    assert binaries_of_wheel(tmp_path) == (built if native == "1" else set())
    assert (tmp_path / "iwsgd_ext" / "_ops.so").read_text() == "stale", "what is in the checkout is left alone"


def test_source_distribution_can_be_built_from(tmp_path):
    """It holds all that a build reads, and no binary."""
    for name in ("csrc", "iwsgd_ext"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "*.dll", "__pycache__"))
    (tmp_path / "iwsgd_ext" / "_ops.so").write_text("stale")
    needed = {str(path.relative_to(tmp_path)) for folder in ("csrc", "iwsgd_ext") for path in (tmp_path / folder).rglob("*.*")}
    needed -= {"iwsgd_ext/_ops.so"}
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CMakeLists.txt"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path / name)
        needed.add(name)
    done = setup(tmp_path, "sdist")
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    assert needed - held == set()
    assert not [name for name in held if name.endswith((".so", ".dll", ".pyc"))]


def test_setuptools_that_is_too_old(tmp_path):
    """Said in one sentence, before setuptools looks at pyproject.toml, which it would not understand."""
    sources(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "setuptools.py").write_text("__version__ = '65.5.0'\nExtension = setup = None")
    done = setup(tmp_path, "build_ext", "--inplace", PYTHONPATH=str(tmp_path / "old"))
    assert done.returncode == 1
    assert done.stderr == (
        "iwsgd_ext is built with setuptools 77 or later, and this Python has 65.5.0: python -m pip install 'setuptools>=77'\n"
    )
    (tmp_path / "old" / "setuptools.py").write_text("raise ImportError")
    done = setup(tmp_path, "build_ext", "--inplace", PYTHONPATH=str(tmp_path / "old"))
    assert done.returncode == 1
    assert done.stderr == "iwsgd_ext is built with setuptools, and this Python has none: python -m pip install setuptools\n"


def test_the_version_stands_once(tmp_path):
    """In the package, where the build and the benchmarks read it."""
    assert setup(sources(tmp_path), "--version").stdout.split()[-1] == "1.2.3"
    assert re.fullmatch(r"\d+\.\d+\.\d+", iwsgd_ext.__version__)
    assert f"[{iwsgd_ext.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture
def environment():
    """The functions of tools/setup_env.py."""
    return runpy.run_path(str(ROOT / "tools" / "setup_env.py"))


def test_set_up_reads_the_lists_of_pyproject(environment):
    """What the build, the tests and the lint take, and none of the lists beside them."""
    assert environment["listed"]("requires")[0].startswith("setuptools>=")
    assert {"pytest", "triton>=3.6; sys_platform == 'linux'"} <= set(environment["listed"]("test"))
    assert [environment["name_of"](r) for r in environment["listed"]("lint")] == ["ruff", "mypy", "clang-format"]
    assert all("==" in r for r in environment["listed"]("lint")), "a linter's next release must not fail a check that passed"


@pytest.mark.parametrize(
    ("requirement", "has", "fetched"),
    [
        ("ruff==0.17.6", "0.17.6", False),
        ("ruff==0.17.6", "0.17.10", True),
        ("setuptools>=77", "77.0.3", False),
        ("setuptools>=77", "9.5", True),
        ("triton>=3.6; sys_platform == 'linux'", "3.10.0", False),
        ("rich", "1", False),
        ("rich", None, True),
    ],
)
def test_what_set_up_fetches(environment, requirement, has, fetched):
    missing = environment["missing"]
    missing.__globals__["versions"] = lambda python, names: {} if has is None else dict.fromkeys(names, has)
    assert missing([requirement]) == [requirement] * fetched


@pytest.fixture
def program(monkeypatch):
    """setup.py's functions, in an environment without its variables."""
    for name in ("IWSGD_CUDA", "IWSGD_NATIVE", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["setup.py", "build_ext"])
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"CXX": "g++-99"}, "CXX: expected a C++ compiler on the PATH, got 'g++-99'"),
        ({"CXX": "g++-99 -m64", "IWSGD_CUDA": "0"}, "CXX: expected a C++ compiler on the PATH, got 'g++-99 -m64'"),
        ({"PATH": "", "IWSGD_CUDA": "1"}, "IWSGD_CUDA=1, but no C++ compiler was found: install one, or name it by CXX"),
        ({"IWSGD_NATIVE": "0", "IWSGD_CUDA": "1"}, "IWSGD_CUDA=1 and IWSGD_NATIVE=0 contradict each other: unset one"),
        ({"IWSGD_NATIVE": "no"}, "IWSGD_NATIVE: expected 1, 0 or nothing, got 'no'"),
        ({"IWSGD_CUDA": "yes"}, "IWSGD_CUDA: expected 1, 0 or nothing, got 'yes'"),
    ],
)
def test_what_cannot_be_built_as_asked(program, monkeypatch, environment, said):
    """One sentence, and no installation of something else."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        program["build"]()
    assert str(stopped.value) == said


def test_no_compiler_and_nothing_asked(program, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert "ext_modules" not in program["build"]()
    said = "iwsgd_ext: no C++ compiler was found: installing without native kernels (the slower reference backend runs)\n"
    assert capsys.readouterr().err == said


def test_the_compiler_that_is_there_is_used(program, monkeypatch, tmp_path):
    """torch takes c++ where CXX does not name another."""
    (tmp_path / "clang++").write_text("#!/bin/sh\n")
    (tmp_path / "clang++").chmod(0o755)
    monkeypatch.chdir(ROOT)
    for name, value in {"PATH": str(tmp_path), "CXX": "", "IWSGD_CUDA": "0"}.items():
        monkeypatch.setenv(name, value)
    assert len(program["build"]()["ext_modules"]) == 2
    assert os.environ["CXX"] == cpp_extension.get_cxx_compiler() == "clang++"


def toolkit(folder: Path, version: str, architectures: str = "80 90") -> Path:
    """A stand-in for a CUDA toolkit."""
    tool = folder / "bin" / "nvcc"
    tool.parent.mkdir()
    listed = " ".join(f"compute_{a}" for a in architectures.split())
    tool.write_text(f"#!/bin/sh\ncase $1 in --version) echo 'release {version}, V{version}.131';; *) printf '%s\\n' {listed};; esac\n")
    tool.chmod(0o755)
    return folder


@needs_compiler
class TestCudaToolkit:
    """Which toolkit a build takes, and what is said where it takes none."""

    def chosen(self, program, monkeypatch, torch_cuda, **environment) -> str | None:
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        return program["cuda_toolkit"](torch, cpp_extension)

    @pytest.mark.parametrize(
        ("torch_cuda", "asked", "taken"),
        [("13.0", "", True), ("13.0", "1", True), ("13.0", "0", False), (None, "", False), (None, "1", True), (None, "0", False)],
    )
    def test_where_it_fits(self, program, monkeypatch, tmp_path, capsys, torch_cuda, asked, taken):
        home = toolkit(tmp_path, "13.2")  # another minor version
        got = self.chosen(program, monkeypatch, torch_cuda, IWSGD_CUDA=asked, CUDA_HOME=home)
        assert got == (str(home) if taken else None)
        assert "iwsgd_ext: " not in capsys.readouterr().err

    def refused(self, program, monkeypatch, capsys, why, **environment):
        """In a build as by default, and where CUDA is asked for."""
        assert self.chosen(program, monkeypatch, "13.0", **environment) is None
        assert capsys.readouterr().err == f"iwsgd_ext: building without CUDA kernels, because {why}\n"
        with pytest.raises(SystemExit) as stopped:
            self.chosen(program, monkeypatch, "13.0", IWSGD_CUDA="1", **environment)
        assert str(stopped.value) == f"IWSGD_CUDA=1, but {why}"

    def test_another_major_version(self, program, monkeypatch, tmp_path, capsys):
        home = toolkit(tmp_path, "12.4")
        why = f"torch does not take {home}/bin/nvcc (it is of CUDA 12.4, torch of CUDA 13.0): set CUDA_HOME to a toolkit that fits"
        self.refused(program, monkeypatch, capsys, why, CUDA_HOME=home)

    def test_whatever_else_torch_refuses(self, program, monkeypatch, tmp_path, capsys):
        def check(name, version):
            raise RuntimeError("The current installed version of c++ (99.1) is greater than that. Please make sure to use another.")

        monkeypatch.setattr(cpp_extension, "_check_cuda_version", check)
        home = toolkit(tmp_path, "13.0")
        why = f"torch does not take {home}/bin/nvcc (The current installed version of c++ (99.1) is greater than that)"
        self.refused(program, monkeypatch, capsys, f"{why}: set CUDA_HOME to a toolkit that fits", CUDA_HOME=home)

    def test_no_nvcc(self, program, monkeypatch, tmp_path, capsys):
        why = f"CUDA_HOME is {str(tmp_path)!r}, which has no bin/nvcc: set CUDA_HOME to a CUDA toolkit"
        self.refused(program, monkeypatch, capsys, why, CUDA_HOME=tmp_path)
        monkeypatch.delenv("CUDA_HOME")
        monkeypatch.delenv("IWSGD_CUDA")
        monkeypatch.setitem(program["cuda_toolkit"].__globals__, "cuda_home", lambda: None)
        self.refused(program, monkeypatch, capsys, "no nvcc was found: set CUDA_HOME to a CUDA toolkit")


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
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if given is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    cuda = SimpleNamespace(is_available=lambda: bool(gpus), device_count=lambda: len(gpus), get_device_capability=gpus.__getitem__)
    architectures = runpy.run_path(str(ROOT / "setup.py"))["cuda_architectures"]
    assert architectures(SimpleNamespace(cuda=cuda), str(toolkit(tmp_path, "13.0", nvcc))) == want


TOOL = """#!/bin/sh
name=$(basename "$0")
echo "$PWD|$PYTHONPATH|$name $*" >> "$LOG"
case "$name $1" in
  *tools/setup_env.py) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "cmake -S") case "$*" in *"-DPython_EXECUTABLE=$PWD/.venv/bin/python "*) ;; *) exit 1 ;; esac && mkdir -p "$4" ;;
esac
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_in_a_path_with_spaces(tmp_path):
    """Every target, with stand-ins for the programs that it starts; none may run where nothing changed."""
    tools, checkout, log = tmp_path / "the tools", tmp_path / "it's a check out", tmp_path / "log"
    for folder in (tools, checkout):
        folder.mkdir()
    for name in ("python", "cmake", "ctest"):
        (tools / name).write_text(TOOL)
        (tools / name).chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "setup.py", "tools/setup_env.py", "csrc/cpu/noise.cpp", "iwsgd_ext/__pycache__/a.pyc"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copy if name == "Makefile" else lambda _, path: path.touch())(ROOT / name, checkout / name)
    environment = {"LOG": str(log), "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "CXX": "c++"}  # no variable of an outer make

    def make(*words: str) -> list[str]:
        """The programs that a target starts."""
        log.write_text("")
        command = ["make", f"PYTHON={tools / 'python'}", f"OUT={tmp_path / 'out of it'}", *words]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = [line.split("|") for line in log.read_text().splitlines()]
        assert {part for _, path, _ in lines for part in path.split(os.pathsep)} <= {str(checkout)}
        return [started.strip() for _, _, started in lines]

    built = ["python tools/setup_env.py", "python setup.py build_ext --inplace --force"]
    assert make("help") == []
    assert make("build") == built
    assert make("build") == []
    assert make("setup") == built[:1]
    assert make("setup", "TORCH=torch==2.12.0") == [f"{built[0]} --torch torch==2.12.0"]
    (checkout / "csrc" / "cpu" / "noise.cpp").touch()
    assert "python examples/digits.py --quick" in make("demo-short")
    assert make("demo") == ["python examples/digits.py"]
    assert make("bench") == ["python -m bench"]
    assert make("test-models") == ["python tools/test_models.py"]
    lint = make("lint")
    assert lint[0] == f"{built[0]} lint"
    assert lint[1:3] == ["python -m ruff check .", "python -m ruff format --check ."]
    assert lint[3].endswith("--dry-run -Werror csrc/cpu/noise.cpp")
    assert lint[4:] == ["python -m mypy", "python -m mypy --strict tests/public_names.py"]
    assert make("format")[-1].endswith(" -i csrc/cpu/noise.cpp")
    for target, plan in {"gpu": "full", "gpu-first": "first", "gpu-second": "second"}.items():
        assert make(target) == [f"python tools/gpu.py {plan} --out {tmp_path / 'out of it'}"]
    assert make("test-fast")[-1].startswith("python -m pytest ")
    assert make("test-machine-code")[-1].endswith(" -m machine_code")
    started = [line.split()[0] for line in make("test")]
    assert started == ["python", "python", "cmake", "cmake", "ctest"] if shutil.which("c++") else ["python", "python"]
    make("clean")
    assert not (checkout / "build").exists() and not (checkout / "iwsgd_ext" / "__pycache__").exists()
    make("distclean")
    assert not (checkout / ".venv").exists()
    assert make("build") == built
