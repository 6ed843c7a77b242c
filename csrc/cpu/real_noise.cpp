// Gaussian noise on the CPU: x [O, B, I] -> y [O, K*B, I], x * (1 + std z) or x + std z with z of each element's address, none of it
// stored. x is read from memory once: its chunks stay in the cache over the K samples. The numbers are what costs.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../dtypes.h"
#include "../gaussian.h"
#define ISA_KERNELS "gaussian_kernels.h"
#include "for_each_isa.h"

#include "../gaussian_op.h"
#include "chunks.h"

namespace iwsgd {
namespace {

constexpr int64_t kGrainElements = 8192;  // below this a second thread costs more than it brings

struct Cpu {
  template <class T>
  static void forward(const Gaussian& call, const T* x, T* y, const Tensor&) {
    for_each_chunk(call.draw, baseline::kChunk, kGrainElements,
                   [&](int64_t o, int64_t b, int64_t begin, int64_t end) { IWSGD_ISA_CALL(gaussian_chunk, call, o, b, begin, end, x, y); });
  }
  template <class T>
  static void backward(const Gaussian& call, const T* dy, T* dx, const Tensor&) {
    for_each_chunk(call.draw, baseline::kChunk, kGrainElements, [&](int64_t o, int64_t b, int64_t begin, int64_t end) {
      IWSGD_ISA_CALL(gaussian_sum_chunk, call, o, b, begin, end, dy, dx);
    });
  }
};

}  // namespace
}  // namespace iwsgd

STABLE_TORCH_LIBRARY_IMPL(iwsgd_ext, CPU, m) {
  m.impl("gaussian", TORCH_BOX(&iwsgd::GaussianOp<iwsgd::Cpu>::gaussian));
  m.impl("gaussian_sum", TORCH_BOX(&iwsgd::GaussianOp<iwsgd::Cpu>::gaussian_sum));
}
