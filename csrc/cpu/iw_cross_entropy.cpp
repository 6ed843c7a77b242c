// The importance weighted cross-entropy on the CPU: loss, log-likelihoods, importance weights and gradient in one pass.
//
// Units that do not depend on one another (examples, or positions) are worked on in blocks whose logits stay in a core's second
// level cache between the statistics and the gradient, so that memory sees one read and one write of the logits. An example whose
// positions share their weights is one block however large it is; with few of them, threads share each step instead.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../dtypes.h"
#include "../iw_cross_entropy.h"
#define ISA_KERNELS "iw_cross_entropy_kernels.h"
#include "for_each_isa.h"

#include "../stable_torch.h"

namespace iwsgd {
namespace {

constexpr int64_t kBlockBytes = 256 * 1024;  // of logits and as much of gradient: together half of a 1 MiB cache
constexpr int64_t kPanel = 16;               // rows worked on side by side, at most

// c of every position (0 where ignored), the outer weight of every unit, and sum d.
template <class T, class A>
struct Terms {
  std::vector<A> c, outer;
  double denominator = 0;
};

template <class T, class A>
Terms<T, A> terms_of(const LossArguments<T, A>& a) {
  Terms<T, A> terms;
  terms.c.resize(a.positions());
  terms.outer.resize(a.units());
  double all_weights = static_cast<double>(a.C);
  if (a.class_weight != nullptr) {
    all_weights = 0;
    for (int64_t i = 0; i < a.C; ++i) all_weights += a.class_weight[i];
  }
  const double smoothing = a.smoothing, uniform = smoothing / static_cast<double>(a.C) * all_weights;
  for (int64_t b = 0; b < a.B; ++b) {
    const double example = a.example_weight != nullptr ? a.example_weight[b] : 1.0;
    double sum_c = 0;
    int64_t counted = 0;
    for (int64_t p = b * a.positions_each; p < (b + 1) * a.positions_each; ++p) {
      if (a.ignored(p)) {
        terms.c[p] = A(0);
        if (a.per_position) terms.outer[p] = A(0);
        continue;
      }
      double c = 0, d = 1;
      if (a.labels != nullptr) {
        const int64_t y = a.labels[p];
        if (y < 0 || y >= a.C)
          throw std::invalid_argument("target: expected class indices in [0, " + std::to_string(a.C) + ") or ignore_index " +
                                      std::to_string(a.ignore_index) + ", got " + std::to_string(y) + " in example " + std::to_string(b));
        d = a.class_weight != nullptr ? a.class_weight[y] : 1.0;
        c = (1.0 - smoothing) * d + (smoothing > 0 ? uniform : 0.0);
      } else {
        const A* q = a.probabilities + b * a.C * a.positions_each + p % a.positions_each;
        for (int64_t i = 0; i < a.C; ++i) c += q[i * a.positions_each] * (a.class_weight != nullptr ? double(a.class_weight[i]) : 1.0);
        c = (1.0 - smoothing) * c + uniform;
      }
      const double m = a.position_weight != nullptr ? a.position_weight[p] : 1.0;
      terms.c[p] = static_cast<A>(m * c);
      terms.denominator += m * d * example;
      if (a.per_position) terms.outer[p] = static_cast<A>(m * c);
      sum_c += m * c;
      ++counted;
    }
    if (!a.per_position) terms.outer[b] = static_cast<A>(counted > 0 ? sum_c / counted : 0.0);
  }
  return terms;
}

// l[s, b] of examples whose positions share their weights, from u[s, b, t].
template <class T, class A>
void join_positions(const LossArguments<T, A>& a, const std::vector<A>& outer, const Statistics<A>& stats, int64_t first, int64_t last) {
  for (int64_t s = 0; s < a.S; ++s)
    for (int64_t b = first; b < last; ++b) {
      const A* u = &stats.likelihood(s, b * a.positions_each);
      double sum = 0;
      for (int64_t t = 0; t < a.positions_each; ++t) sum += u[t];
      a.log_p[s * a.B + b] = static_cast<A>(outer[b] > 0 ? sum / outer[b] : sum);
    }
}

template <class T, class A>
void run(const LossArguments<T, A>& a) {
  const Terms<T, A> terms = terms_of(a);
  double denominator = 1;
  if (a.normalizer != nullptr)
    denominator = *a.normalizer;
  else if (a.reduction == Reduction::mean)
    denominator = terms.denominator;
  const double scale = denominator == 0 ? 0.0 : 1.0 / denominator;

  const bool joint = !a.per_position && a.positions_each > 1;
  const int64_t positions = a.positions(), unit_positions = joint ? a.positions_each : 1, units = a.units();
  const int64_t unit_bytes = a.S * unit_positions * a.C * static_cast<int64_t>(sizeof(T));
  int64_t block = std::max<int64_t>(1, kBlockBytes / std::max<int64_t>(unit_bytes, 1));
  if (!joint && block > kPanel) block -= block % kPanel;
  if (!joint && a.C < 64) block = std::max(block, kPanel);
  const int64_t threads = torch::stable::get_num_threads();

  const auto statistics = [&](const Statistics<A>& stats, int64_t first, int64_t last) {
    IWSGD_ISA_CALL(statistics, a, terms.c.data(), stats, first, last);
  };
  const auto weigh = [&](const Statistics<A>& stats, int64_t first, int64_t last) {
    if (joint) join_positions(a, terms.outer, stats, first, last);
    IWSGD_ISA_CALL(weigh, a, first, last);
  };
  const auto gradient = [&](const Statistics<A>& stats, int64_t first, int64_t last) {
    if (a.dlogits != nullptr) IWSGD_ISA_CALL(gradient, a, terms.c.data(), static_cast<A>(scale), stats, first, last);
  };
  const auto with_statistics = [&](int64_t first, int64_t count, const auto& body) {
    const std::unique_ptr<A[]> memory(new A[3 * a.S * std::max<int64_t>(count, 1)]);
    A *max = memory.get(), *sum = max + a.S * count, *u = sum + a.S * count;
    body(joint ? Statistics<A>{max, sum, first, count, u, first, count} : Statistics<A>{max, sum, first, count, a.log_p, 0, units});
  };

  if (joint && a.B < 4 * threads) {
    with_statistics(0, positions, [&](const Statistics<A>& stats) {
      torch::stable::parallel_for(0, positions, kPanel, [&](int64_t first, int64_t last) { statistics(stats, first, last); });
      weigh(stats, 0, units);
      torch::stable::parallel_for(0, positions, kPanel, [&](int64_t first, int64_t last) { gradient(stats, first, last); });
    });
  } else {
    const int64_t blocks = (units + block - 1) / block;
    const int64_t grain = std::max<int64_t>(1, kBlockBytes / 8 / std::max<int64_t>(unit_bytes * block, 1));
    torch::stable::parallel_for(0, blocks, grain, [&](int64_t first_block, int64_t last_block) {
      for (int64_t k = first_block; k < last_block; ++k) {
        const int64_t first = k * block, last = std::min(units, first + block);
        with_statistics(first * unit_positions, (last - first) * unit_positions, [&](const Statistics<A>& stats) {
          statistics(stats, first * unit_positions, last * unit_positions);
          weigh(stats, first, last);
          gradient(stats, first * unit_positions, last * unit_positions);
        });
      }
    });
  }

  double loss = 0;
  for (int64_t unit = 0; unit < units; ++unit) {
    const double example = a.example_weight != nullptr ? a.example_weight[a.per_position ? unit / a.positions_each : unit] : 1.0;
    const double outer = example * terms.outer[unit] * scale;
    const double of_unit = outer == 0 && a.bound[unit] == a.bound[unit] ? 0.0 : -outer * a.bound[unit];  // not 0 * infinity
    a.outer[unit] = static_cast<A>(outer);
    if (a.reduction == Reduction::none) a.loss[unit] = static_cast<A>(of_unit);
    loss += of_unit;
  }
  if (a.reduction != Reduction::none) *a.loss = static_cast<A>(loss);
}

template <class A>
const A* data_or_null(const std::optional<Tensor>& x) {
  return x ? data<A>(*x) : nullptr;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // loss, log_p, weights, bound, outer

// dlogits: where the gradient goes (it may be logits itself), or nothing.
Outputs forward(const Tensor& logits, const Tensor& target, int64_t samples, const std::optional<Tensor>& class_weight,
                const std::optional<Tensor>& example_weight, const std::optional<Tensor>& position_weight,
                const std::optional<Tensor>& normalizer, int64_t ignore_index, double smoothing, double alpha, bool per_position,
                int64_t reduction, const std::optional<Tensor>& dlogits) {
  const int64_t B = logits.size(0) / samples, units = per_position ? B * logits.size(2) : B;
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
    a.logits = data<T>(logits);
    a.row_stride = logits.stride(0), a.class_stride = logits.stride(1), a.position_stride = logits.stride(2);
    if (dlogits) {
      a.dlogits = mutable_data<T>(*dlogits);
      a.drow_stride = dlogits->stride(0), a.dclass_stride = dlogits->stride(1), a.dposition_stride = dlogits->stride(2);
    }
    a.labels = labels ? data<int64_t>(target) : nullptr;
    a.probabilities = labels ? nullptr : data<A>(target);
    a.ignore_index = ignore_index;
    a.smoothing = static_cast<A>(smoothing);
    a.class_weight = data_or_null<A>(class_weight);
    a.example_weight = data_or_null<A>(example_weight);
    a.position_weight = data_or_null<A>(position_weight);
    a.normalizer = data_or_null<A>(normalizer);
    a.reduction = static_cast<Reduction>(reduction);
    a.per_position = per_position;
    a.alpha = samples == 1 ? 1.0 : alpha;
    a.loss = mutable_data<A>(loss), a.log_p = mutable_data<A>(log_p), a.weights = mutable_data<A>(weights), a.bound = mutable_data<A>(bound);
    a.outer = mutable_data<A>(outer);
    run(a);
  });
  return {loss, log_p, weights, bound, outer};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> iw_cross_entropy(
    Tensor logits, Tensor target, int64_t samples, std::optional<Tensor> class_weight, std::optional<Tensor> example_weight,
    std::optional<Tensor> position_weight, std::optional<Tensor> normalizer, int64_t ignore_index, double smoothing, double alpha,
    bool per_position, int64_t reduction, bool need_gradient) {
  const Tensor dlogits = need_gradient ? torch::stable::empty_like(logits) : torch::stable::new_empty(logits, {0});
  auto [loss, log_p, weights, bound, outer] =
      forward(logits, target, samples, class_weight, example_weight, position_weight, normalizer, ignore_index, smoothing, alpha,
              per_position, reduction, need_gradient ? std::optional<Tensor>(dlogits) : std::nullopt);
  return {loss, log_p, weights, bound, outer, dlogits};
}

Outputs iw_cross_entropy_inplace(Tensor logits, Tensor target, int64_t samples, std::optional<Tensor> class_weight,
                                 std::optional<Tensor> example_weight, std::optional<Tensor> position_weight,
                                 std::optional<Tensor> normalizer, int64_t ignore_index, double smoothing, double alpha, bool per_position,
                                 int64_t reduction) {
  return forward(logits, target, samples, class_weight, example_weight, position_weight, normalizer, ignore_index, smoothing, alpha,
                 per_position, reduction, logits);
}

}  // namespace
}  // namespace iwsgd

STABLE_TORCH_LIBRARY_IMPL(iwsgd_ext, CPU, m) {
  m.impl("iw_cross_entropy", TORCH_BOX(&iwsgd::iw_cross_entropy));
  m.impl("iw_cross_entropy_", TORCH_BOX(&iwsgd::iw_cross_entropy_inplace));
}
