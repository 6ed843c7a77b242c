// The Gaussian ops as torch calls them, for any device: tensors to a Gaussian and back. Device::forward<T>(call, x, y, tensor) and
// Device::backward<T>(call, dy, dx, tensor) compute, on the device that the tensor is on.
#pragma once
#include <type_traits>

#include "gaussian.h"
#include "stable_torch.h"

namespace iwsgd {

template <class Device>
struct GaussianOp {
  // x or dy is [O, rows, I]
  static Gaussian call_of(const Tensor& x, const Tensor& origin, const std::optional<Tensor>& sample_ids, int64_t samples, int64_t stream,
                          int64_t first_example, int64_t positions, int64_t share, double std, bool multiply, int64_t examples,
                          bool expand) {
    Draw draw{};
    draw.layout = {x.size(0), examples, x.size(2), positions, share};
    draw.address = {origin.const_data_ptr<int64_t>(), sample_ids ? sample_ids->const_data_ptr<int64_t>() : nullptr,
                    sample_ids && sample_ids->dim() == 2, stream, first_example};
    draw.samples = samples;
    draw.expand = expand;
    return {draw, std, multiply};
  }

  static Tensor gaussian(Tensor x, Tensor origin, std::optional<Tensor> sample_ids, int64_t samples, int64_t stream, int64_t first_example,
                         int64_t positions, int64_t share, double std, bool multiply, bool expand) {
    x = torch::stable::contiguous(x);
    Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1) * (expand ? samples : 1), x.size(2)});
    const Gaussian call = call_of(x, origin, sample_ids, samples, stream, first_example, positions, share, std, multiply,
                                  expand ? x.size(1) : x.size(1) / samples, expand);
    dispatch_floating(x, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      Device::template forward<T>(call, data<T>(x), mutable_data<T>(y), x);
    });
    return y;
  }

  static Tensor gaussian_sum(Tensor dy, Tensor origin, std::optional<Tensor> sample_ids, int64_t samples, int64_t stream,
                             int64_t first_example, int64_t positions, int64_t share, double std) {
    dy = torch::stable::contiguous(dy);
    const int64_t examples = dy.size(1) / samples;
    Tensor dx = torch::stable::new_empty(dy, {dy.size(0), examples, dy.size(2)});
    const Gaussian call = call_of(dy, origin, sample_ids, samples, stream, first_example, positions, share, std, true, examples, true);
    dispatch_floating(dy, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      Device::template backward<T>(call, data<T>(dy), mutable_data<T>(dx), dy);
    });
    return dx;
  }
};

}  // namespace iwsgd
