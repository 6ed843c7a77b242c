// The address and the layout of a call of noise, of the arguments that all its ops begin with.
#pragma once
#include "address.h"
#include "stable_torch.h"

namespace iwsgd {

inline Address address_of(const Tensor& origin, const std::optional<Tensor>& sample_ids, int64_t stream, int64_t first_example) {
  return {origin.const_data_ptr<int64_t>(), sample_ids ? sample_ids->const_data_ptr<int64_t>() : nullptr,
          sample_ids && sample_ids->dim() == 2, stream, first_example};
}

// x: [O, B, I] where expand, else [O, K*B, I].
inline Call call_of(const Tensor& x, const Tensor& origin, const std::optional<Tensor>& sample_ids, int64_t samples, int64_t stream,
                    int64_t first_example, int64_t positions, int64_t share, bool expand) {
  return {{x.size(0), expand ? x.size(1) : x.size(1) / samples, x.size(2), positions, share},
          address_of(origin, sample_ids, stream, first_example),
          samples,
          expand};
}

// The call of which dy [O, K*B, I] is a gradient, and which sums it up to [O, B, I].
inline Call sum_of(const Tensor& dy, const Tensor& origin, const std::optional<Tensor>& sample_ids, int64_t samples, int64_t stream,
                   int64_t first_example, int64_t positions, int64_t share) {
  Call call = call_of(dy, origin, sample_ids, samples, stream, first_example, positions, share, false);
  call.expand = true;
  return call;
}

}  // namespace iwsgd
