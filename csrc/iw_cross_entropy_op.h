// The loss ops as torch calls them, for any device: tensors to LossArguments and back. Device::run<T>(arguments, logits) computes,
// Device::scale<T>(x, n, factor, tensor) multiplies n elements by a factor that only the device has read.
#pragma once
#include <optional>
#include <tuple>
#include <type_traits>

#include "iw_cross_entropy.h"
#include "stable_torch.h"

namespace iwsgd {

template <class A>
const A* data_or_null(const std::optional<Tensor>& x) {
  return x ? data<A>(*x) : nullptr;
}

using LossOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // loss, log_p, weights, bound, outer

// logits [S*B, C, T], dlogits: where the gradient goes (it may be logits itself), or nothing. Then the arguments that both ops have, in
// the schema's order, of which this is the one list here: target [B, T] or [B, C, T] and so on.
template <class Device>
LossOutputs loss_forward(const Tensor& logits, const std::optional<Tensor>& dlogits, const Tensor& target, int64_t samples,
                         const std::optional<Tensor>& class_weight, const std::optional<Tensor>& example_weight,
                         const std::optional<Tensor>& position_weight, const std::optional<Tensor>& normalizer, int64_t ignore_index,
                         double smoothing, double lse_square_scale, double alpha, bool per_position, int64_t reduction) {
  const int64_t B = logits.size(0) / samples, units = per_position ? B * logits.size(2) : B;
  STD_TORCH_CHECK(logits.size(1) < int64_t(1) << 30, "logits: expected fewer than 2^30 classes, got ", logits.size(1));
  const auto type = logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor log_p = torch::stable::new_empty(logits, {samples, units}, type);
  const Tensor weights = torch::stable::new_empty(logits, {samples, units}, type);
  const Tensor bound = torch::stable::new_empty(logits, {units}, type);
  const Tensor outer = torch::stable::new_empty(logits, {units}, type);
  const bool none = static_cast<Reduction>(reduction) == Reduction::none;
  const Tensor loss = none ? torch::stable::new_empty(logits, {units}, type) : torch::stable::new_empty(logits, {}, type);
  dispatch_floating(logits, [&](auto* pointer) {
    using T = std::remove_pointer_t<decltype(pointer)>;
    using A = acc_t<T>;
    const bool labels = target.scalar_type() == ScalarType::Long;
    LossArguments<T, A> a{};
    a.S = samples, a.B = B, a.C = logits.size(1), a.positions_each = logits.size(2);
    // The stride of a dimension of one class may be anything: it counts as adjacent.
    a.logits = data<T>(logits);
    a.row_stride = logits.stride(0), a.class_stride = a.C == 1 ? 1 : logits.stride(1), a.position_stride = logits.stride(2);
    if (dlogits) {
      a.dlogits = mutable_data<T>(*dlogits);
      a.drow_stride = dlogits->stride(0), a.dclass_stride = a.C == 1 ? 1 : dlogits->stride(1), a.dposition_stride = dlogits->stride(2);
    }
    a.labels = labels ? data<int64_t>(target) : nullptr;
    a.probabilities = labels ? nullptr : data<A>(target);
    a.ignore_index = ignore_index;
    a.smoothing = static_cast<A>(smoothing);
    a.lse_square_scale = static_cast<A>(lse_square_scale);
    a.class_weight = data_or_null<A>(class_weight);
    a.example_weight = data_or_null<A>(example_weight);
    a.position_weight = data_or_null<A>(position_weight);
    a.normalizer = data_or_null<A>(normalizer);
    a.reduction = static_cast<Reduction>(reduction);
    a.per_position = per_position;
    a.alpha = samples == 1 ? 1.0 : alpha;
    a.loss = mutable_data<A>(loss), a.log_p = mutable_data<A>(log_p), a.weights = mutable_data<A>(weights);
    a.bound = mutable_data<A>(bound), a.outer = mutable_data<A>(outer);
    Device::template run<T>(a, logits);
  });
  return {loss, log_p, weights, bound, outer};
}

// The ops as the dispatcher takes them, by value. Forward: loss_forward's type.
template <class Device, class Forward = decltype(loss_forward<Device>)>
struct LossOp;

template <class Device, class... Arguments>
struct LossOp<Device, LossOutputs(const Tensor&, const std::optional<Tensor>&, Arguments...)> {
  // iw_cross_entropy: loss_forward's outputs and dlogits, empty where no gradient is needed.
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> out_of_place(Tensor logits, std::decay_t<Arguments>... arguments,
                                                                                 bool need_gradient) {
    const Tensor dlogits = need_gradient ? torch::stable::empty_like(logits) : torch::stable::new_empty(logits, {0});
    const auto wanted = need_gradient ? std::optional<Tensor>(dlogits) : std::nullopt;
    return std::tuple_cat(loss_forward<Device>(logits, wanted, arguments...), std::tuple<Tensor>(dlogits));
  }

  // iw_cross_entropy_: the gradient takes the place of the logits.
  static LossOutputs in_place(Tensor logits, std::decay_t<Arguments>... arguments) {
    return loss_forward<Device>(logits, logits, arguments...);
  }

  // iw_cross_entropy_scale_: dlogits *= factor, one value; where that is 1, nothing is read or written.
  static void scale(Tensor dlogits, Tensor factor) {
    int64_t last = 0;
    for (int64_t d = 0; d < dlogits.dim(); ++d) last += (dlogits.size(d) - 1) * dlogits.stride(d);
    if (dlogits.numel() == 0) return;
    STD_TORCH_CHECK(last + 1 == dlogits.numel() && factor.numel() == 1, "expected a gradient without gaps in memory and one factor");
    dispatch_floating(dlogits, [&](auto* pointer) {
      using T = std::remove_pointer_t<decltype(pointer)>;
      STD_TORCH_CHECK(factor.scalar_type() == (std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float),
                      "factor: expected the type that the gradient is computed in");
      Device::template scale<T>(mutable_data<T>(dlogits), dlogits.numel(), data<acc_t<T>>(factor), dlogits);
    });
  }
};

}  // namespace iwsgd
