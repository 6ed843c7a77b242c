// The ops of real-valued noise as torch calls them, for any device: tensors to a RealNoise and back. Device::forward<T>(call, x, y, tensor)
// and Device::backward<T>(call, dy, dx, tensor) compute, on the device that the tensor is on.
#pragma once
#include <type_traits>

#include "address_op.h"
#include "real_noise.h"

namespace iwsgd {

inline Law law_of(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number <= static_cast<int64_t>(Law::uniform), "law: expected the number of a law");
  return static_cast<Law>(number);
}

template <class Device>
struct RealNoiseOp {
  static Tensor real_noise(Tensor x, Tensor origin, std::optional<Tensor> sample_ids, int64_t samples, int64_t stream,
                           int64_t first_example, int64_t positions, int64_t share, int64_t law, double std, bool multiply, bool expand) {
    x = torch::stable::contiguous(x);
    Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1) * (expand ? samples : 1), x.size(2)});
    const RealNoise call{call_of(x, origin, sample_ids, samples, stream, first_example, positions, share, expand), law_of(law), std,
                         multiply};
    dispatch_floating(x, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      Device::template forward<T>(call, data<T>(x), mutable_data<T>(y), x);
    });
    return y;
  }

  static Tensor real_noise_sum(Tensor dy, Tensor origin, std::optional<Tensor> sample_ids, int64_t samples, int64_t stream,
                               int64_t first_example, int64_t positions, int64_t share, int64_t law, double std) {
    dy = torch::stable::contiguous(dy);
    Tensor dx = torch::stable::new_empty(dy, {dy.size(0), dy.size(1) / samples, dy.size(2)});
    const RealNoise call{sum_of(dy, origin, sample_ids, samples, stream, first_example, positions, share), law_of(law), std, true};
    dispatch_floating(dy, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      Device::template backward<T>(call, data<T>(dy), mutable_data<T>(dx), dy);
    });
    return dx;
  }
};

}  // namespace iwsgd
