"""Builds iwsgd_ext from source.

Two shared libraries, found by folder so that no list of sources has to be kept in step with CMakeLists.txt:

    iwsgd_ext/_ops*.so   csrc/cpu/*.cpp, and csrc/cuda/*.cu where CUDA is on: the operators, on torch's stable ABI. One
                         binary for every Python and every torch from 2.10 on; loaded with torch.ops.load_library.
    iwsgd_ext/_info*.so  csrc/python/*.cpp: a pybind11 module with build information and raw Philox words.

Environment:

    IWSGD_CUDA=1|0        compile the CUDA kernels, or do not; by default they are where torch itself has CUDA
    TORCH_CUDA_ARCH_LIST  their architectures, as in torch: "9.0", "8.0;9.0+PTX", ... (default "8.0;9.0;10.0+PTX;12.0", as far as this nvcc
                          has them, and those of the machine's GPUs)
    CUDA_HOME             the CUDA toolkit (else /usr/local/cuda, else where nvcc is on the PATH)
    IWSGD_NATIVE=0        compile nothing: a pure Python install that runs on the reference backend
    MAX_JOBS              compile jobs at a time
"""

import os
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent.resolve()
STABLE_ABI = "0x020a000000000000ULL"  # torch 2.10
CUDA_ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")
WINDOWS = sys.platform == "win32"
# g++ 12 takes the undefined registers of AVX-512 intrinsics for uninitialized variables
CXX_FLAGS = ["-O3", "-std=c++17", "-g0", "-fvisibility=hidden", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True))


def torch_tools():
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        sys.exit(
            "iwsgd_ext builds against the torch that is installed, and this Python has none. Install torch first, then:\n"
            "    pip install --no-build-isolation ."
        )
    return torch, cpp_extension


def have_compiler() -> bool:
    # distutils falls back on the compiler that Python was built with, which need not be on this machine
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++", "cl"]
    return any(shutil.which(name) for name in names)


def cuda_home() -> str | None:
    nvcc = shutil.which("nvcc")
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and str(Path(nvcc).resolve().parent.parent)):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return home
    return None


def want_cuda(torch) -> bool:
    asked = os.environ.get("IWSGD_CUDA", "")
    if asked not in ("", "0", "1"):
        sys.exit(f"IWSGD_CUDA: expected 1, 0 or nothing, got {asked!r}")
    if asked == "0" or not glob("csrc/cuda/*.cu"):
        if asked == "1":
            sys.exit("IWSGD_CUDA=1: this version has no CUDA kernels yet (csrc/cuda holds no .cu); build without it")
        return False
    if cuda_home() is None:
        if asked == "1":
            sys.exit("IWSGD_CUDA=1, but no nvcc: set CUDA_HOME to a CUDA toolkit")
        if torch.version.cuda:
            print("iwsgd_ext: torch has CUDA but no nvcc was found (CUDA_HOME is unset): building without CUDA kernels", file=sys.stderr)
        return False
    return asked == "1" or torch.version.cuda is not None


def cuda_architectures(torch, home: str) -> str:
    """TORCH_CUDA_ARCH_LIST, or what runs on GPUs of today and this machine. (CMakeLists.txt asks for it, too.)

    Machine code for one architecture runs on later ones of the same first number. Others that are later take the PTX of 10.0.
    """
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if given:
        return re.sub(r"[\s;]+", ";", given)
    known = subprocess.run([f"{home}/bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    chosen = [v for v in CUDA_ARCHITECTURES if f"compute_{v.replace('.', '')}" in known]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(i)
        runs = any(v.split(".")[0] == str(major) and int(v.split(".")[1]) <= minor for v in chosen)
        if not runs and f"compute_{major}{minor}" in known:
            chosen.append(f"{major}.{minor}")
    forward = "10.0" if "10.0" in chosen else chosen[-1]
    return ";".join(f"{v}+PTX" if v == forward else v for v in chosen)


def ops_library(torch, cpp_extension) -> Extension:
    sources = sorted(glob("csrc/cpu/*.cpp"))
    compile_args = {"cxx": [*CXX_FLAGS, f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]}
    link_args = ["-Wl,-s"] if sys.platform == "linux" else []
    libraries, library_dirs = ["torch", "torch_cpu", "c10"], cpp_extension.library_paths()
    if want_cuda(torch):
        home = cuda_home()
        cpp_extension.CUDA_HOME = home  # cpp_extension knows it only where torch itself has CUDA
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_architectures(torch, home)
        sources += sorted(glob("csrc/cuda/*.cu"))
        compile_args["cxx"].append("-DIWSGD_WITH_CUDA")
        compile_args["nvcc"] = ["-O3", "-std=c++17", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "--expt-relaxed-constexpr"]
        library_dirs = [*library_dirs, f"{home}/lib64"]
        # torch's CUDA shims are weak symbols, resolved by libtorch.so, through which a torch with CUDA brings its CUDA library along.
        # Nothing else is needed of it: where the compiler asks the linker for --as-needed, as Debian's and Ubuntu's do, it would be left
        # out, and each shim be a null pointer. These words stand behind the libraries, so it is named again. The CUDA runtime comes along.
        link_args += ["-Wl,--no-as-needed", "-ltorch", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return Extension(
        "iwsgd_ext._ops",
        sources,
        include_dirs=cpp_extension.include_paths(),
        library_dirs=library_dirs,
        libraries=libraries,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
        depends=HEADERS,
        language="c++",
    )


def info_module(torch, cpp_extension) -> Extension:
    try:
        import pybind11

        include = pybind11.get_include()
    except ImportError:
        include = cpp_extension.include_paths()[0]  # torch carries a copy
    cuda = want_cuda(torch)
    arch = cuda_architectures(torch, cuda_home()) if cuda else ""
    return Extension(
        "iwsgd_ext._info",
        sorted(glob("csrc/python/*.cpp")),
        include_dirs=[include],
        define_macros=[("IWSGD_TORCH_VERSION", f'"{torch.__version__}"'), ("IWSGD_CUDA_ARCHITECTURES", f'"{arch}"')],
        extra_compile_args={"cxx": CXX_FLAGS},
        depends=HEADERS,
        optional=True,  # needs Python's headers; the operators do not
        language="c++",
    )


def build() -> dict:
    if {"sdist", "egg_info", "clean", "dist_info"} & set(sys.argv[1:]):
        return {}
    if os.environ.get("IWSGD_NATIVE", "1") == "0":
        return {}
    if not have_compiler():
        print("iwsgd_ext: no C++ compiler found: installing without native kernels (the slower reference backend runs)", file=sys.stderr)
        return {}
    torch, cpp_extension = torch_tools()

    class Build(cpp_extension.BuildExtension):
        def get_ext_filename(self, name):
            # the operators hold no Python code: their file name must not tie them to one Python
            if name.split(".")[-1] == "_ops":
                return os.path.join(*name.split(".")) + (".dll" if WINDOWS else ".so")
            return super().get_ext_filename(name)

        def build_extension(self, ext):
            try:
                super().build_extension(ext)
            except RuntimeError:  # of torch, where ninja fails; setuptools knows its own errors alone
                if not ext.optional:
                    raise
                print(f"iwsgd_ext: building without {ext.name}, which does not compile here", file=sys.stderr)

        def get_export_symbols(self, ext):
            return ext.export_symbols  # no PyInit_ in the operators

    os.chdir(ROOT)
    return {"ext_modules": [ops_library(torch, cpp_extension), info_module(torch, cpp_extension)], "cmdclass": {"build_ext": Build}}


if __name__ == "__main__":
    setup(**build())
