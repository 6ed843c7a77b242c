// The noise op on the CPU: x [O, B, I] -> y [O, K*B, I], one independent mask for every noise sample, none of them stored.
//
// x is read once and its K outputs are written while it is in cache: (1 + K) * n * sizeof(T) bytes for n elements of x, and
// as many in backward. Work is cut into chunks of the inner dimension, shared out over torch's threads.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../dtypes.h"
#include "../noise.h"
#define ISA_KERNELS "noise_kernels.h"
#include "for_each_isa.h"

#include "../noise_op.h"
#include "chunks.h"

namespace iwsgd {
namespace {

constexpr int64_t kGrainElements = 32768;  // below this a second thread costs more than it brings

struct Cpu {
  template <class T>
  static void forward(const Noise& call, const T* x, T* y, const Tensor&) {
    const Rule& rule = call.rule;
    for_each_chunk(call, baseline::kChunk, kGrainElements, [&](int64_t o, int64_t b, int64_t begin, int64_t end) {
      if (rule.thresholds != nullptr) {
        IWSGD_ISA_CALL(noise_rule_chunk, call, o, b, begin, end, x, y);
        return;
      }
      const bool identity = rule.threshold == 0 && rule.scale == 1.0 && rule.plain();
      if (!identity && rule.threshold < kFieldRange) {
        IWSGD_ISA_CALL(noise_chunk, call, o, b, begin, end, x, y);
        return;
      }
      for (int64_t s = 0; s < call.samples; ++s) {  // p = 0 is the identity and p = 1 gives zeros, exactly
        T* to = y + call.output_at(o, s, b) + begin;
        if (identity) std::memcpy(to, x + call.input_at(o, s, b) + begin, static_cast<std::size_t>(end - begin) * sizeof(T));
        else std::fill(to, to + (end - begin), from_acc<T>(static_cast<acc_t<T>>(rule.fill)));
      }
    });
  }

  template <class T>
  static void backward(const Noise& call, const T* dy, T* dx, const Tensor&) {
    const bool own = call.rule.thresholds != nullptr;
    if (!own && call.rule.threshold >= kFieldRange) {
      std::memset(static_cast<void*>(dx), 0, call.layout.outer * call.layout.examples * call.layout.inner * sizeof(T));
      return;
    }
    for_each_chunk(call, baseline::kChunk, kGrainElements, [&](int64_t o, int64_t b, int64_t begin, int64_t end) {
      if (own) {
        IWSGD_ISA_CALL(noise_rule_sum_chunk, call, o, b, begin, end, dy, dx);
      } else {
        IWSGD_ISA_CALL(noise_sum_chunk, call, o, b, begin, end, dy, dx);
      }
    });
  }
};

}  // namespace
}  // namespace iwsgd

STABLE_TORCH_LIBRARY_IMPL(iwsgd_ext, CPU, m) {
  m.impl("noise", TORCH_BOX(&iwsgd::NoiseOp<iwsgd::Cpu>::noise));
  m.impl("noise_out", TORCH_BOX(&iwsgd::NoiseOp<iwsgd::Cpu>::noise_out));
  m.impl("noise_sum", TORCH_BOX(&iwsgd::NoiseOp<iwsgd::Cpu>::noise_sum));
}
