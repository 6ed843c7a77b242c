"""Builds iwsgd_ext from source.

Two shared libraries, found by folder so that no list of sources has to be kept in step with CMakeLists.txt:

    iwsgd_ext/_ops*.so   csrc/cpu/*.cpp, and csrc/cuda/*.cu where CUDA is on: the operators, on torch's stable ABI. One
                         binary for every Python and every torch from 2.10 on; loaded with torch.ops.load_library.
    iwsgd_ext/_info*.so  csrc/python/*.cpp: a pybind11 module with build information and raw Philox words.

Environment:

    IWSGD_CUDA=1|0        compile the CUDA kernels, or do not; by default they are where torch has CUDA and an nvcc that fits it is found
    TORCH_CUDA_ARCH_LIST  their architectures, as in torch: "9.0", "8.0;9.0+PTX", ... (default "8.0;9.0;10.0+PTX;12.0", as far as this nvcc
                          has them, and those of the machine's GPUs)
    CUDA_HOME             the CUDA toolkit (else /usr/local/cuda, else where nvcc is on the PATH)
    IWSGD_NATIVE=0        compile nothing: a pure Python install that runs on the reference backend
    CXX                   the C++ compiler
    MAX_JOBS              compile jobs at a time

What was asked for and cannot be built is an error of one sentence; what was not asked for is left out, and said on stderr.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

try:
    import setuptools
except ImportError:
    sys.exit("iwsgd_ext is built with setuptools, and this Python has none: python -m pip install setuptools")

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


def check_setuptools() -> None:
    """pip does not look at pyproject.toml's bound without build isolation, and an older setuptools does not understand the file."""
    least = re.search(r"setuptools>=(\d+)", (ROOT / "pyproject.toml").read_text())[1]
    has = setuptools.__version__
    if int(has.split(".")[0]) < int(least):
        install = f"python -m pip install 'setuptools>={least}'"
        sys.exit(f"iwsgd_ext is built with setuptools {least} or later, and this Python has {has}: {install}")


def switch(name: str) -> str:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        sys.exit(f"{name}: expected 1, 0 or nothing, got {value!r}")
    return value


def compiler() -> str | None:
    given = os.environ.get("CXX", "").strip()
    if given and shutil.which(shlex.split(given)[0]) is None:
        sys.exit(f"CXX: expected a C++ compiler on the PATH, got {given!r}")
    return given or next((name for name in (["cl"] if WINDOWS else ["c++", "g++", "clang++"]) if shutil.which(name)), None)


def cuda_home() -> str | None:
    given, nvcc = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    homes = [given] if given else ["/usr/local/cuda", nvcc and str(Path(nvcc).resolve().parent.parent)]
    return next((home for home in homes if home and Path(home, "bin", "nvcc").exists()), None)


def cuda_toolkit(torch, cpp_extension) -> str | None:
    """The CUDA toolkit to build with, or None to build without. (CMakeLists.txt asks for it, too.)"""
    asked = switch("IWSGD_CUDA")
    if asked == "0" or not (asked or torch.version.cuda):
        return None
    home, given = cuda_home(), os.environ.get("CUDA_HOME")
    if home is None:
        why = f"CUDA_HOME is {given!r}, which has no bin/nvcc" if given else "no nvcc was found"
        why += ": set CUDA_HOME to a CUDA toolkit"
    else:
        refusal = refused(home, cpp_extension)
        if not refusal:
            return home
        why = f"torch does not take {home}/bin/nvcc ({refusal}): set CUDA_HOME to a toolkit that fits"
    if asked:
        sys.exit(f"IWSGD_CUDA=1, but {why}")
    print(f"iwsgd_ext: building without CUDA kernels, because {why}", file=sys.stderr)
    return None


def refused(home: str, cpp_extension) -> str:
    """The reason why torch's build would stop, or "": an nvcc of another major version than torch's CUDA, or a C++ compiler that the nvcc
    does not take."""
    cpp_extension.CUDA_HOME = home  # torch looks for one only where it has CUDA itself
    compiler = cpp_extension.get_cxx_compiler()
    try:
        cpp_extension._check_cuda_version(compiler, cpp_extension.get_compiler_abi_compatibility_and_version(compiler)[1])
    except RuntimeError as error:
        text, *versions = error.args
        return "it is of CUDA {}, torch of CUDA {}".format(*versions) if versions else text.split(". ")[0]
    return ""


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


def ops_library(cpp_extension, cuda: str | None) -> setuptools.Extension:
    sources = sorted(glob("csrc/cpu/*.cpp"))
    compile_args = {"cxx": [*CXX_FLAGS, f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]}
    link_args = ["-Wl,-s"] if sys.platform == "linux" else []
    libraries, library_dirs = ["torch", "torch_cpu", "c10"], cpp_extension.library_paths()
    if cuda:
        sources += sorted(glob("csrc/cuda/*.cu"))
        compile_args["cxx"].append("-DIWSGD_WITH_CUDA")
        compile_args["nvcc"] = ["-O3", "-std=c++17", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "--expt-relaxed-constexpr"]
        library_dirs = [*library_dirs, f"{cuda}/lib64"]
        # torch's CUDA shims are weak symbols, resolved by libtorch.so, through which a torch with CUDA brings its CUDA library along.
        # Nothing else is needed of it: where the compiler asks the linker for --as-needed, as Debian's and Ubuntu's do, it would be left
        # out, and each shim be a null pointer. These words stand behind the libraries, so it is named again. The CUDA runtime comes along.
        link_args += ["-Wl,--no-as-needed", "-ltorch", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return setuptools.Extension(
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


def info_module(cpp_extension, torch_version: str, architectures: str) -> setuptools.Extension:
    try:
        import pybind11

        include = pybind11.get_include()
    except ImportError:
        include = cpp_extension.include_paths()[0]  # torch carries a copy
    return setuptools.Extension(
        "iwsgd_ext._info",
        sorted(glob("csrc/python/*.cpp")),
        include_dirs=[include],
        define_macros=[("IWSGD_TORCH_VERSION", f'"{torch_version}"'), ("IWSGD_CUDA_ARCHITECTURES", f'"{architectures}"')],
        extra_compile_args={"cxx": CXX_FLAGS},
        depends=HEADERS,
        optional=True,  # needs Python's headers; the operators do not
        language="c++",
    )


def build() -> dict:
    if {"sdist", "egg_info", "clean", "dist_info"} & set(sys.argv[1:]):
        return {}
    from setuptools.command.build import build as Build

    class CleanBuild(Build):
        def run(self):
            # a wheel takes all that lies here, also what an earlier build left
            for stale in Path(self.build_lib, "iwsgd_ext").glob("*"):
                if stale.suffix in (".so", ".dll", ".pyd"):
                    stale.unlink()
            super().run()

    commands = {"build": CleanBuild}
    with_cuda = switch("IWSGD_CUDA") == "1"
    if switch("IWSGD_NATIVE") == "0":
        if with_cuda:
            sys.exit("IWSGD_CUDA=1 and IWSGD_NATIVE=0 contradict each other: unset one")
        return {"cmdclass": commands}
    found = compiler()
    if found is None:
        if with_cuda:
            sys.exit("IWSGD_CUDA=1, but no C++ compiler was found: install one, or name it by CXX")
        print(
            "iwsgd_ext: no C++ compiler was found: installing without native kernels (the slower reference backend runs)", file=sys.stderr
        )
        return {"cmdclass": commands}
    os.environ["CXX"] = found  # else torch takes c++, and setuptools links with what Python was built with: neither need be here
    torch, cpp_extension = torch_tools()

    class BuildNative(cpp_extension.BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            self.force = True  # without ninja a library of other settings would pass for up to date

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
    cuda, architectures = cuda_toolkit(torch, cpp_extension), ""
    if cuda:
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures = cuda_architectures(torch, cuda)
    modules = [ops_library(cpp_extension, cuda), info_module(cpp_extension, torch.__version__, architectures)]
    return {"ext_modules": modules, "cmdclass": {**commands, "build_ext": BuildNative}}


if __name__ == "__main__":
    check_setuptools()
    setuptools.setup(**build())
