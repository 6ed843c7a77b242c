// The multinomial op as torch calls it, for any device. Device::forward(call, counts, tensor) computes, on the device that the tensor is
// on.
#pragma once
#include "address_op.h"
#include "multinomial.h"

namespace iwsgd {

template <class Device>
struct MultinomialOp {
  static Tensor multinomial(Tensor origin, std::optional<Tensor> sample_ids, int64_t samples, int64_t stream, int64_t first_example,
                            int64_t examples, Tensor bounds, int64_t draws) {
    bounds = torch::stable::contiguous(bounds);
    const int64_t features = bounds.size(-1);
    Tensor counts = torch::stable::new_empty(bounds, {samples, examples, features}, ScalarType::Int);
    if (samples * examples * features > 0)
      Device::forward({address_of(origin, sample_ids, stream, first_example), samples, examples, features, bounds.const_data_ptr<int64_t>(),
                       bounds.dim() == 2, draws},
                      counts.mutable_data_ptr<int32_t>(), bounds);
    return counts;
  }
};

}  // namespace iwsgd
