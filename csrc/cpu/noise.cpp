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

#include "../stable_torch.h"

namespace iwsgd {
namespace {

constexpr int64_t kGrainElements = 32768;  // below this a second thread costs more than it brings

// Calls body(o, b, begin, end) for every chunk of the examples, in parallel.
template <class Body>
void for_each_chunk(const Draw& draw, const Body& body) {
  constexpr int64_t kChunk = baseline::kChunk;
  const Layout& layout = draw.layout;
  const int64_t chunks = (layout.inner + kChunk - 1) / kChunk;
  const int64_t work = std::max<int64_t>(1, std::min(layout.inner, kChunk) * draw.samples);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / work);
  torch::stable::parallel_for(0, layout.outer * layout.examples * chunks, grain, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t chunk = task % chunks, row = task / chunks;
      const int64_t begin = chunk * kChunk;
      body(row / layout.examples, row % layout.examples, begin, std::min(layout.inner, begin + kChunk));
    }
  });
}

template <class T>
void noise_fwd_cpu(const Draw& draw, const T* x, T* y) {
  for_each_chunk(draw, [&](int64_t o, int64_t b, int64_t begin, int64_t end) {
    if (draw.threshold > 0 && draw.threshold < kFieldRange) {
      IWSGD_ISA_CALL(noise_chunk, draw, o, b, begin, end, x, y);
      return;
    }
    for (int64_t s = 0; s < draw.samples; ++s) {  // p = 0 is the identity and p = 1 gives zeros, exactly
      const std::size_t bytes = static_cast<std::size_t>(end - begin) * sizeof(T);
      T* to = y + draw.row(o, s, b) + begin;
      if (draw.threshold == 0)
        std::memcpy(to, x + draw.input_row(o, s, b) + begin, bytes);
      else
        std::memset(static_cast<void*>(to), 0, bytes);
    }
  });
}

template <class T>
void noise_bwd_cpu(const Draw& draw, const T* dy, T* dx) {
  if (draw.threshold >= kFieldRange) {
    std::memset(static_cast<void*>(dx), 0, draw.layout.outer * draw.layout.examples * draw.layout.inner * sizeof(T));
    return;
  }
  for_each_chunk(draw, [&](int64_t o, int64_t b, int64_t begin, int64_t end) {
    IWSGD_ISA_CALL(noise_sum_chunk, draw, o, b, begin, end, dy, dx);
  });
}

CallAddress call_address(const Tensor& origin, const std::optional<Tensor>& sample_ids, int64_t stream, int64_t first_example) {
  return {origin.const_data_ptr<int64_t>(), sample_ids ? sample_ids->const_data_ptr<int64_t>() : nullptr,
          sample_ids && sample_ids->dim() == 2, stream, first_example};
}

void noise_out(Tensor x, Tensor origin, std::optional<Tensor> sample_ids, int64_t samples, int64_t stream, int64_t first_example,
               int64_t threshold, int64_t positions, int64_t share, bool expand, Tensor out) {
  x = torch::stable::contiguous(x);
  const Draw draw{{x.size(0), expand ? x.size(1) : x.size(1) / samples, x.size(2), positions, share},
                  call_address(origin, sample_ids, stream, first_example),
                  samples,
                  static_cast<uint32_t>(threshold),
                  expand};
  dispatch_floating(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    noise_fwd_cpu(draw, data<T>(x), mutable_data<T>(out));
  });
}

Tensor noise(Tensor x, Tensor origin, std::optional<Tensor> sample_ids, int64_t samples, int64_t stream, int64_t first_example,
             int64_t threshold, int64_t positions, int64_t share, bool expand) {
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1) * (expand ? samples : 1), x.size(2)});
  noise_out(x, origin, sample_ids, samples, stream, first_example, threshold, positions, share, expand, out);
  return out;
}

Tensor noise_sum(Tensor dy, Tensor origin, std::optional<Tensor> sample_ids, int64_t samples, int64_t stream, int64_t first_example,
                 int64_t threshold, int64_t positions, int64_t share) {
  dy = torch::stable::contiguous(dy);
  const int64_t examples = dy.size(1) / samples;
  Tensor dx = torch::stable::new_empty(dy, {dy.size(0), examples, dy.size(2)});
  const Draw draw{{dy.size(0), examples, dy.size(2), positions, share},
                  call_address(origin, sample_ids, stream, first_example),
                  samples,
                  static_cast<uint32_t>(threshold),
                  true};
  dispatch_floating(dy, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    noise_bwd_cpu(draw, data<T>(dy), mutable_data<T>(dx));
  });
  return dx;
}

}  // namespace
}  // namespace iwsgd

STABLE_TORCH_LIBRARY_IMPL(iwsgd_ext, CPU, m) {
  m.impl("noise", TORCH_BOX(&iwsgd::noise));
  m.impl("noise_out", TORCH_BOX(&iwsgd::noise_out));
  m.impl("noise_sum", TORCH_BOX(&iwsgd::noise_sum));
}
