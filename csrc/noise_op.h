// The noise ops as torch calls them, for any device: tensors to a Noise and back. Device::forward<T>(call, x, y, tensor) and
// Device::backward<T>(call, dy, dx, tensor) compute, on the device that the tensor is on.
#pragma once
#include <type_traits>

#include "address_op.h"
#include "noise.h"

namespace iwsgd {

template <class Device>
struct NoiseOp {
  static Rule rule_of(int64_t threshold, const std::optional<Tensor>& thresholds, double scale, double shift, double fill) {
    return {static_cast<uint32_t>(threshold),    scale, shift, fill, thresholds ? thresholds->const_data_ptr<int32_t>() : nullptr,
            thresholds ? thresholds->size(0) : 0};
  }

  static void noise_out(Tensor x, Tensor origin, std::optional<Tensor> sample_ids, int64_t samples, int64_t stream, int64_t first_example,
                        int64_t positions, int64_t share, int64_t threshold, std::optional<Tensor> thresholds, double scale, double shift,
                        double fill, bool expand, Tensor out) {
    x = torch::stable::contiguous(x);
    const Noise call{call_of(x, origin, sample_ids, samples, stream, first_example, positions, share, expand),
                     rule_of(threshold, thresholds, scale, shift, fill)};
    dispatch_floating(x, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      Device::template forward<T>(call, data<T>(x), mutable_data<T>(out), x);
    });
  }

  static Tensor noise(Tensor x, Tensor origin, std::optional<Tensor> sample_ids, int64_t samples, int64_t stream, int64_t first_example,
                      int64_t positions, int64_t share, int64_t threshold, std::optional<Tensor> thresholds, double scale, double shift,
                      double fill, bool expand) {
    Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1) * (expand ? samples : 1), x.size(2)});
    noise_out(x, origin, sample_ids, samples, stream, first_example, positions, share, threshold, thresholds, scale, shift, fill, expand,
              out);
    return out;
  }

  static Tensor noise_sum(Tensor dy, Tensor origin, std::optional<Tensor> sample_ids, int64_t samples, int64_t stream,
                          int64_t first_example, int64_t positions, int64_t share, int64_t threshold, std::optional<Tensor> thresholds,
                          double scale) {
    dy = torch::stable::contiguous(dy);
    Tensor dx = torch::stable::new_empty(dy, {dy.size(0), dy.size(1) / samples, dy.size(2)});
    const Noise call{sum_of(dy, origin, sample_ids, samples, stream, first_example, positions, share),
                     rule_of(threshold, thresholds, scale, 0, 0)};
    dispatch_floating(dy, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      Device::template backward<T>(call, data<T>(dy), mutable_data<T>(dx), dy);
    });
    return dx;
  }
};

}  // namespace iwsgd
