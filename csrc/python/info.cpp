// Facts of the build and of the machine, and Philox words as NumPy arrays for those who check the generator by hand.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../dtypes.h"
#include "../noise.h"
#define ISA_KERNELS "noise_kernels.h"
#include "../cpu/for_each_isa.h"

namespace py = pybind11;

namespace {

using iwsgd::Isa;

// words [N, 4] of counters [N, 4]
py::array_t<uint32_t> philox_words(py::array_t<uint32_t, py::array::c_style | py::array::forcecast> counters, uint64_t seed) {
  if (counters.ndim() != 2 || counters.shape(1) != 4) throw py::value_error("counters: expected shape [N, 4]");
  py::array_t<uint32_t> words({counters.shape(0), py::ssize_t(4)});
  auto in = counters.unchecked<2>();
  auto out = words.mutable_unchecked<2>();
  for (py::ssize_t i = 0; i < in.shape(0); ++i) {
    const iwsgd::Words w = iwsgd::philox({in(i, 0), in(i, 1), in(i, 2), in(i, 3)}, seed);
    for (int j = 0; j < 4; ++j) out(i, j) = w.w[j];
  }
  return words;
}

// keep bits, one byte per group, by one instruction set's own code
py::array_t<uint8_t> keep_bytes(const std::string& isa, uint64_t seed, uint32_t example, uint32_t sample, uint32_t stream, int64_t group,
                                int64_t groups, uint32_t threshold) {
  if (groups < 0 || groups % 8 != 0) throw py::value_error("groups: expected a multiple of 8");
  if (threshold >= iwsgd::kFieldRange) throw py::value_error("threshold: expected 0 .. 65535");
  py::array_t<uint8_t> bits(groups);
  const iwsgd::RowAddress row{seed, example, sample, stream};
  const auto found = std::find(std::begin(iwsgd::kIsaNames), std::end(iwsgd::kIsaNames), isa);
  if (found == std::end(iwsgd::kIsaNames)) throw py::value_error("isa: expected baseline, avx2 or avx512, got " + isa);
  const auto which = static_cast<Isa>(found - std::begin(iwsgd::kIsaNames));
  if (which > iwsgd::machine_isa()) throw py::value_error("isa: this machine has no " + isa);
#if defined(IWSGD_X86)
  if (which == Isa::avx512) iwsgd::avx512::keep_bits(bits.mutable_data(), row, group, groups, threshold);
  if (which == Isa::avx2) iwsgd::avx2::keep_bits(bits.mutable_data(), row, group, groups, threshold);
#endif
  if (which == Isa::baseline) iwsgd::baseline::keep_bits(bits.mutable_data(), row, group, groups, threshold);
  return bits;
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "g++ " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["torch"] = IWSGD_TORCH_VERSION;
  info["cuda_architectures"] = IWSGD_CUDA_ARCHITECTURES;
  info["isa"] = iwsgd::kIsaNames[static_cast<int>(iwsgd::best_isa())];
  py::list isas;
  for (int i = 0; i <= static_cast<int>(iwsgd::machine_isa()); ++i) isas.append(iwsgd::kIsaNames[i]);
  info["machine_isas"] = isas;
  return info;
}

}  // namespace

PYBIND11_MODULE(_info, m) {
  m.doc() = "Build information and the random words of iwsgd_ext.";
  m.def("build_info", &build_info, "Compiler, the torch built against, CUDA architectures, and the instruction set in use.");
  m.def("philox", &philox_words, py::arg("counters"), py::arg("seed"),
        "Philox4x32-10: counters [N, 4] uint32 (group, example, sample, stream) -> words [N, 4] uint32.");
  m.def("keep_bytes", &keep_bytes, py::arg("isa"), py::arg("seed"), py::arg("example"), py::arg("sample"), py::arg("stream"),
        py::arg("group"), py::arg("groups"), py::arg("threshold"),
        "Keep bits of `groups` groups (bit j of byte g is element 8*(group+g)+j), computed by the named instruction set.");
}
