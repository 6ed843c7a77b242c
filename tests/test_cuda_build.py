"""The CUDA kernels without a GPU: they compile, spill nothing, and come along in a library that loads on any torch."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiled_kernels import MARKS, OLDEST, ROOT, SOURCES, compile_kernels, ptxas_report

import gpu_exercise  # isort: skip, compiled_kernels shows the way to tools/

OPS = {
    "real_noise.cu": ("real_noise", "real_noise_sum"),
    "iw_cross_entropy_registers.cu": (),  # launched by the one below
    "iw_cross_entropy.cu": ("iw_cross_entropy", "iw_cross_entropy_", "iw_cross_entropy_scale_"),
    "multinomial.cu": ("multinomial",),
    "noise.cu": ("noise", "noise_out", "noise_sum"),
}

pytestmark = MARKS


@pytest.mark.parametrize("arch", ptxas_report.ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_compile_without_warnings_and_spill_nothing(source, arch):
    kernels = compile_kernels(source, arch)
    assert {k.arch for k in kernels} == {arch}
    assert kernels
    assert {k.name: (k.spill_bytes, k.stack_bytes) for k in kernels if k.spill_bytes or k.stack_bytes} == {}
    assert all(k.shared_bytes <= 48 * 1024 for k in kernels)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_compile_for_the_oldest_architecture(source):
    kernels = compile_kernels(source, OLDEST)
    assert {k.name for k in kernels} == {k.name for k in compile_kernels(source, "80")}
    assert all(k.spill_bytes <= (1024 if "registers" in k.name else 128) for k in kernels)  # of the logits that those hold


def test_driver_of_the_checks_names_what_is_compiled():
    """What tools/gpu_exercise.py looks for on a GPU, against the kernels in the object files."""
    compiled = {re.sub("<.*", "", kernel.name) for source in SOURCES for kernel in compile_kernels(source, "90")}
    assert compiled == gpu_exercise.kernels("cuda")


def test_noise_kernels_leave_room_for_warps():
    """What a multiprocessor's 65536 registers allow: half its warps where accesses are wide in 16-bit types, a quarter elsewhere."""
    for kernel in compile_kernels(ROOT / "csrc" / "cuda" / "noise.cu", "90"):
        fast = re.search(r"noise_(fwd|bwd)_kernel<(bf16|fp16), 8, true", kernel.name)
        assert kernel.registers <= (64 if fast else 128), kernel


def test_report_is_read_right():
    """Numbers of a report by hand, spills among them: a parser that finds none would let every spill pass."""
    report = """
ptxas info    : Compiling entry function '_ZN5iwsgd1fIfLi4EEEvPKf' for 'sm_90'
ptxas info    : Function properties for _ZN5iwsgd1fIfLi4EEEvPKf
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1024 bytes smem, 380 bytes cmem[0]
ptxas info    : Compiling entry function 'plain' for 'sm_80'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, 380 bytes cmem[0]
"""
    first, second = ptxas_report.parse(report)
    assert first[1:] == ("90", 255, 20, 16, 1024)
    assert second == ("plain", "80", 32, 0, 0, 0)


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A folder to import iwsgd_ext with CUDA kernels from: the checkout, if it is built so, else a copy built here for sm_90."""
    if torch._C._dispatch_has_kernel_for_dispatch_key("iwsgd_ext::noise", "CUDA"):
        return ROOT
    folder = tmp_path_factory.mktemp("build")
    for name in ("csrc", "iwsgd_ext"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    environment = {**os.environ, "IWSGD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"  # ninja
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_library_with_cuda_loads_and_registers_its_kernels(package):
    """On a torch with or without CUDA: a fresh process, as a user's."""
    program = f"""
import torch, iwsgd_ext as iw
assert iw.__file__.startswith({str(package)!r}), iw.__file__
for op in {[op for source in SOURCES for op in OPS.get(source.name, ())]!r}:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("iwsgd_ext::" + op, "CUDA"), op
info = iw.backend_info()
assert info["built"]["cpu"], info
assert info["build"]["cuda_architectures"], info
x = torch.ones(4, 24)
y = iw.functional.dropout(x, 0.5, samples=3, seed=7)
iw.set_backend("reference")
assert torch.equal(y, iw.functional.dropout(x, 0.5, samples=3, seed=7)), "the CPU's kernels beside them"
"""
    environment = {**os.environ, "PYTHONPATH": str(package)}
    done = subprocess.run([sys.executable, "-c", program], cwd=package, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf to read the library with")
def test_library_brings_torch_cuda_along(package):
    """Through libtorch.so alone a torch with CUDA resolves the weak shims; without it the first call on a GPU jumps to address 0."""
    done = subprocess.run(["readelf", "-d", package / "iwsgd_ext" / "_ops.so"], capture_output=True, text=True, check=True)
    assert "[libtorch.so]" in done.stdout, done.stdout


FAILED_CALL = """
#include <cstdlib>
#include <cstring>
#include <utility>
#include "cuda/common.cuh"
cudaError_t last = cudaErrorInvalidValue;  // as the CUDA runtime keeps it
extern "C" cudaError_t cudaGetLastError() { return std::exchange(last, cudaSuccess); }
extern "C" AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** text) {
  *text = error == 0 ? nullptr : strdup("as torch says");
  return 0;
}
extern "C" void torch_c10_cuda_free_error_msg(char* text) { free(text); }
int main() {
  iwsgd::check(cudaSuccess);
  if (last == cudaSuccess) return 1;  // not this call's
  try {
    iwsgd::check(cudaErrorInvalidValue);
    return 2;
  } catch (const std::runtime_error& error) {
    if (strcmp(error.what(), "as torch says") != 0) return 3;
  }
  try {
    iwsgd::check(cudaErrorNoKernelImageForDevice);
    return 5;
  } catch (const std::runtime_error& error) {
    if (strstr(error.what(), "TORCH_CUDA_ARCH_LIST") == nullptr) return 6;
  }
  return cudaGetLastError() == cudaSuccess ? 0 : 4;
}
"""


def test_a_failed_call_is_not_the_next_launchs_error(tmp_path):
    """With functions in the place of the CUDA runtime's and torch's."""
    from torch.utils import cpp_extension

    (tmp_path / "failed.cpp").write_text(FAILED_CALL)
    cuda = Path(ptxas_report.find_nvcc()).resolve().parent.parent
    includes = [word for path in (cuda / "include", *cpp_extension.include_paths()) for word in ("-isystem", path)]
    words = ["g++", "-std=c++17", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-I", ROOT / "csrc", *includes]
    done = subprocess.run([*words, tmp_path / "failed.cpp", "-o", tmp_path / "failed"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert subprocess.run([tmp_path / "failed"]).returncode == 0


def test_every_cuda_file_is_looked_at():
    """Each .cu has its operators in OPS, so that the test above asks for their registration."""
    assert {path.name for path in SOURCES} == set(OPS)
