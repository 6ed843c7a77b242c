// Real-valued noise on the CPU: x [O, B, I] -> y [O, K*B, I], x * (1 + std z) or x + std z with z of each element's address, none of it
// stored. x is read from memory once: its chunks stay in the cache over the K samples. The numbers are what costs.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../dtypes.h"
#include "../real_noise.h"
#define ISA_KERNELS "real_noise_kernels.h"
#include "for_each_isa.h"

#include "../real_noise_op.h"
#include "chunks.h"

namespace iwsgd {
namespace {

constexpr int64_t kGrainElements = 8192;  // below this a second thread costs more than it brings

struct Cpu {
  template <class T>
  static void forward(const RealNoise& call, const T* x, T* y, const Tensor&) {
    with_law(call.law, [&](auto law) {
      for_each_chunk(call, baseline::kChunk, kGrainElements, [&](int64_t o, int64_t b, int64_t begin, int64_t end) {
        IWSGD_ISA_CALL(real_noise_chunk, law, call, o, b, begin, end, x, y);
      });
    });
  }
  template <class T>
  static void backward(const RealNoise& call, const T* dy, T* dx, const Tensor&) {
    with_law(call.law, [&](auto law) {
      for_each_chunk(call, baseline::kChunk, kGrainElements, [&](int64_t o, int64_t b, int64_t begin, int64_t end) {
        IWSGD_ISA_CALL(real_noise_sum_chunk, law, call, o, b, begin, end, dy, dx);
      });
    });
  }
};

}  // namespace
}  // namespace iwsgd

STABLE_TORCH_LIBRARY_IMPL(iwsgd_ext, CPU, m) {
  m.impl("real_noise", TORCH_BOX(&iwsgd::RealNoiseOp<iwsgd::Cpu>::real_noise));
  m.impl("real_noise_sum", TORCH_BOX(&iwsgd::RealNoiseOp<iwsgd::Cpu>::real_noise_sum));
}
