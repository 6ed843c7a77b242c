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

// Calls body(o, b, begin, end) for every chunk of x, in parallel. `samples`: how often each element is touched.
template <class Body>
void for_each_chunk(const Layout& layout, int64_t samples, const Body& body) {
  constexpr int64_t kChunk = baseline::kChunk;
  const int64_t chunks = (layout.inner + kChunk - 1) / kChunk;
  const int64_t work = std::max<int64_t>(1, std::min(layout.inner, kChunk) * samples);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / work);
  torch::stable::parallel_for(0, layout.outer * layout.examples * chunks, grain, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t chunk = task % chunks, row = task / chunks;
      const int64_t begin = chunk * kChunk;
      body(row / layout.examples, row % layout.examples, begin, std::min(layout.inner, begin + kChunk));
    }
  });
}

// Where element 0 of row (o, sample, b) starts in a tensor [O, K*B, I].
int64_t row_start(const Layout& layout, int64_t samples, int64_t o, int64_t sample, int64_t b) {
  return ((o * samples + sample) * layout.examples + b) * layout.inner;
}

template <class T>
void noise_fwd(const T* x, T* y, const CallAddress& address, const Layout& layout, int64_t samples, bool expand, uint32_t threshold) {
  for_each_chunk(layout, samples, [&](int64_t o, int64_t b, int64_t begin, int64_t end) {
    for (int64_t s = 0; s < samples; ++s) {
      const T* from = x + (expand ? row_start(layout, 1, o, 0, b) : row_start(layout, samples, o, s, b)) + begin;
      T* to = y + row_start(layout, samples, o, s, b) + begin;
      const std::size_t bytes = static_cast<std::size_t>(end - begin) * sizeof(T);
      if (threshold == 0)
        std::memcpy(to, from, bytes);
      else if (threshold >= kFieldRange)
        std::memset(static_cast<void*>(to), 0, bytes);
      else
        IWSGD_ISA_CALL(noise_chunk, layout, address.row(s, b, layout.examples), threshold, o, begin, end, from, to);
    }
  });
}

template <class T>
void noise_bwd(const T* dy, T* dx, const CallAddress& address, const Layout& layout, int64_t samples, uint32_t threshold) {
  for_each_chunk(layout, samples, [&](int64_t o, int64_t b, int64_t begin, int64_t end) {
    alignas(64) acc_t<T> sum[baseline::kChunk];
    std::fill(sum, sum + (end - begin), acc_t<T>(0));
    for (int64_t s = 0; s < samples; ++s) {
      const T* from = dy + row_start(layout, samples, o, s, b) + begin;
      IWSGD_ISA_CALL(noise_sum_chunk, layout, address.row(s, b, layout.examples), threshold, o, begin, end, from, sum);
    }
    IWSGD_ISA_CALL(scaled, sum, dx + row_start(layout, 1, o, 0, b) + begin, end - begin, static_cast<acc_t<T>>(keep_scale(threshold)));
  });
}

CallAddress call_address(const Tensor& origin, const std::optional<Tensor>& sample_ids, int64_t stream, int64_t first_example) {
  return {origin.const_data_ptr<int64_t>(), sample_ids ? sample_ids->const_data_ptr<int64_t>() : nullptr,
          sample_ids && sample_ids->dim() == 2, stream, first_example};
}

void noise_into(Tensor x, Tensor out, Tensor origin, std::optional<Tensor> sample_ids, int64_t samples, int64_t stream,
                int64_t first_example, int64_t threshold, int64_t positions, int64_t share, bool expand) {
  x = torch::stable::contiguous(x);
  const Layout layout{x.size(0), expand ? x.size(1) : x.size(1) / samples, x.size(2), positions, share};
  const CallAddress address = call_address(origin, sample_ids, stream, first_example);
  dispatch_floating(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    noise_fwd(data<T>(x), mutable_data<T>(out), address, layout, samples, expand, static_cast<uint32_t>(threshold));
  });
}

Tensor noise_cpu(Tensor x, Tensor origin, std::optional<Tensor> sample_ids, int64_t samples, int64_t stream, int64_t first_example,
                 int64_t threshold, int64_t positions, int64_t share, bool expand) {
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1) * (expand ? samples : 1), x.size(2)});
  noise_into(x, out, origin, sample_ids, samples, stream, first_example, threshold, positions, share, expand);
  return out;
}

void noise_out_cpu(Tensor x, Tensor origin, std::optional<Tensor> sample_ids, int64_t samples, int64_t stream, int64_t first_example,
                   int64_t threshold, int64_t positions, int64_t share, bool expand, Tensor out) {
  noise_into(x, out, origin, sample_ids, samples, stream, first_example, threshold, positions, share, expand);
}

Tensor noise_sum_cpu(Tensor dy, Tensor origin, std::optional<Tensor> sample_ids, int64_t samples, int64_t stream,
                     int64_t first_example, int64_t threshold, int64_t positions, int64_t share) {
  dy = torch::stable::contiguous(dy);
  const int64_t examples = dy.size(1) / samples;
  Tensor dx = torch::stable::new_empty(dy, {dy.size(0), examples, dy.size(2)});
  const Layout layout{dy.size(0), examples, dy.size(2), positions, share};
  const CallAddress address = call_address(origin, sample_ids, stream, first_example);
  dispatch_floating(dy, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    noise_bwd(data<T>(dy), mutable_data<T>(dx), address, layout, samples, static_cast<uint32_t>(threshold));
  });
  return dx;
}

}  // namespace
}  // namespace iwsgd

STABLE_TORCH_LIBRARY_IMPL(iwsgd_ext, CPU, m) {
  m.impl("noise", TORCH_BOX(&iwsgd::noise_cpu));
  m.impl("noise_out", TORCH_BOX(&iwsgd::noise_out_cpu));
  m.impl("noise_sum", TORCH_BOX(&iwsgd::noise_sum_cpu));
}
