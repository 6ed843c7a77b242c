// The multinomial op as torch calls it, for any device. Device::forward(call, counts, tensor) computes, on the device that the tensor is
// on.
#pragma once
#include "multinomial.h"
#include "stable_torch.h"

namespace iwsgd {

template <class Device>
struct MultinomialOp {
  static Tensor multinomial(Tensor origin, std::optional<Tensor> sample_ids, int64_t samples, int64_t stream, int64_t first_example,
                            int64_t examples, Tensor bounds, int64_t draws) {
    bounds = torch::stable::contiguous(bounds);
    const int64_t features = bounds.size(-1);
    Tensor counts = torch::stable::new_empty(bounds, {samples, examples, features}, ScalarType::Int);
    const CallAddress address{origin.const_data_ptr<int64_t>(), sample_ids ? sample_ids->const_data_ptr<int64_t>() : nullptr,
                              sample_ids && sample_ids->dim() == 2, stream, first_example};
    if (samples * examples * features > 0)
      Device::forward({address, samples, examples, features, bounds.const_data_ptr<int64_t>(), bounds.dim() == 2, draws},
                      counts.mutable_data_ptr<int32_t>(), bounds);
    return counts;
  }
};

}  // namespace iwsgd
