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
#include <type_traits>
#include <vector>

#include "../dtypes.h"
#include "../iw_cross_entropy.h"
#define ISA_KERNELS "iw_cross_entropy_kernels.h"
#include "for_each_isa.h"

#include "../iw_cross_entropy_op.h"

namespace iwsgd {
namespace {

constexpr int64_t kGrainLogits = 16384;  // below this a second thread costs more than it brings

// c of every position (0 where ignored), the outer weight of every unit, and sum d.
template <class T, class A>
struct Terms {
  std::vector<A> c, outer;
  double denominator = 0;
};

// A sum, and whether any of its terms was not 0.
struct Sum {
  double value = 0;
  bool any = false;
  void add(double x) { value += x, any |= x != 0; }
  void times(double x) { value *= x, any &= x != 0; }
  bool cancelled() const { return any && value == 0; }
};

void check_not_cancelled(const Sum& outer, int64_t example) {
  if (outer.cancelled())
    throw std::invalid_argument("example_weight, weight, target: expected weights that do not cancel in example " +
                                std::to_string(example) +
                                ", got some that are not 0 and add up to 0: no likelihood has such a weight. Rewards of positions take "
                                "level='position', with reduction='sum' or normalizer=");
}

template <class T, class A>
Terms<T, A> terms_of(const LossArguments<T, A>& a) {
  Terms<T, A> terms;
  terms.c.resize(a.positions());
  terms.outer.resize(a.units());
  const auto class_weight = [&](int64_t i) { return a.class_weight != nullptr ? static_cast<double>(a.class_weight[i]) : 1.0; };
  const double smoothing = a.smoothing, of_each = smoothing / static_cast<double>(a.C);
  Sum uniform;
  for (int64_t i = 0; i < a.C && smoothing > 0; ++i) uniform.add(of_each * class_weight(i));
  Sum denominator;
  for (int64_t b = 0; b < a.B; ++b) {
    const double example = a.example_weight != nullptr ? a.example_weight[b] : 1.0;
    Sum unit;
    bool positive = false, negative = false;
    int64_t counted = 0;
    for (int64_t p = b * a.positions_each; p < (b + 1) * a.positions_each; ++p) {
      if (a.ignored(p)) {
        terms.c[p] = A(0);
        if (a.per_position) terms.outer[p] = A(0);
        continue;
      }
      Sum c = uniform;
      double d = 1;
      if (a.labels != nullptr) {
        const int64_t y = a.labels[p];
        if (y < 0 || y >= a.C)
          throw std::invalid_argument("target: expected class indices in [0, " + std::to_string(a.C) + ") or ignore_index " +
                                      std::to_string(a.ignore_index) + ", got " + std::to_string(y) + " in example " + std::to_string(b));
        d = class_weight(y);
        c.add((1.0 - smoothing) * d);
      } else {
        const A* q = a.probabilities + b * a.C * a.positions_each + p % a.positions_each;
        for (int64_t i = 0; i < a.C; ++i) c.add((1.0 - smoothing) * q[i * a.positions_each] * class_weight(i));
      }
      c.times(a.position_weight != nullptr ? a.position_weight[p] : 1.0);
      terms.c[p] = static_cast<A>(c.value);
      denominator.add((a.position_weight != nullptr ? a.position_weight[p] : 1.0) * d * example);
      if (a.per_position) {
        terms.outer[p] = static_cast<A>(c.value);
        check_not_cancelled(c, b);
      }
      unit.add(c.value), unit.any |= c.any;
      positive |= c.value > 0, negative |= c.value < 0;
      ++counted;
    }
    if (a.per_position) continue;
    terms.outer[b] = static_cast<A>(counted > 0 ? unit.value / static_cast<double>(counted) : 0.0);
    check_not_cancelled(unit, b);
    if (positive && negative && a.S > 1 && a.alpha != 0)
      throw std::invalid_argument(
          "example_weight, weight, target: expected positions of one sign in example " + std::to_string(b) +
          ", as at level='example' they share importance weights, got weights of both signs. Rewards of positions take "
          "level='position', with reduction='sum' or normalizer=");
  }
  terms.denominator = denominator.cancelled() ? kCancelled : denominator.value;
  return terms;
}

template <class T, class A>
void run(const LossArguments<T, A>& a) {
  const Terms<T, A> terms = terms_of(a);
  double denominator = 1;
  if (a.normalizer != nullptr) denominator = *a.normalizer;
  else if (a.reduction == Reduction::mean) denominator = terms.denominator;
  const double scale = reciprocal(denominator);

  const A* c = terms.c.data();
  const A* outer = terms.outer.data();
  const A gradient_scale = static_cast<A>(scale);
  const int64_t positions = a.positions(), units = a.units();
  if (positions == 0) {  // examples without positions, or no examples
    std::fill(a.log_p, a.log_p + a.S * units, A(0));
    std::fill(a.weights, a.weights + a.S * units, static_cast<A>(1.0 / static_cast<double>(a.S)));
    std::fill(a.bound, a.bound + units, A(0));
    std::fill(a.outer, a.outer + units, A(0));
    std::fill(a.loss, a.loss + (a.reduction == Reduction::none ? units : 1), A(0));
    return;
  }
  const int64_t grain = std::max<int64_t>(1, kGrainLogits / std::max<int64_t>(a.S * a.C, 1));
  if (a.shares_weights() && a.B < 4 * static_cast<int64_t>(torch::stable::get_num_threads())) {
    // Too few examples to share out: the threads share the positions of each step.
    std::vector<A> memory(3 * a.S * positions);
    A *max = memory.data(), *sum = max + a.S * positions, *u = sum + a.S * positions;
    const Statistics<A> stats{max, sum, 0, positions, u, 0, positions};
    torch::stable::parallel_for(0, positions, grain,
                                [&](int64_t first, int64_t last) { IWSGD_ISA_CALL(statistics, a, c, stats, first, last); });
    IWSGD_ISA_CALL(join_positions, a, outer, stats, 0, units);
    IWSGD_ISA_CALL(weigh, a, stats, 0, units);
    if (a.dlogits != nullptr)
      torch::stable::parallel_for(
          0, positions, grain, [&](int64_t first, int64_t last) { IWSGD_ISA_CALL(gradients, a, c, gradient_scale, stats, first, last); });
  } else {
    const int64_t unit_grain = a.shares_weights() ? std::max<int64_t>(1, grain / a.positions_each) : grain;
    torch::stable::parallel_for(0, units, unit_grain,
                                [&](int64_t first, int64_t last) { IWSGD_ISA_CALL(solve, a, c, outer, gradient_scale, first, last); });
  }

  double loss = 0;
  for (int64_t unit = 0; unit < units; ++unit) {
    const double example = a.example_weight != nullptr ? a.example_weight[a.per_position ? unit / a.positions_each : unit] : 1.0;
    const double outer = example * terms.outer[unit] * scale;
    double of_unit = unit_cost<double>(outer, a.bound[unit]);
    if (a.lse_square_scale != A(0)) of_unit += scale * a.lse_square_share() * std::fabs(example) * a.outer[unit];
    a.outer[unit] = static_cast<A>(outer);
    if (a.reduction == Reduction::none) a.loss[unit] = static_cast<A>(of_unit);
    loss += of_unit;
  }
  if (a.reduction != Reduction::none) *a.loss = static_cast<A>(loss);
}

struct Cpu {
  template <class T>
  static void run(const LossArguments<T, acc_t<T>>& arguments, const Tensor&) {
    iwsgd::run(arguments);
  }
  template <class T>
  static void scale(T* x, int64_t n, const acc_t<T>* factor, const Tensor&) {
    if (*factor == acc_t<T>(1)) return;
    torch::stable::parallel_for(0, n, kGrainLogits, [&](int64_t first, int64_t last) { IWSGD_ISA_CALL(scale, x, *factor, first, last); });
  }
};

}  // namespace
}  // namespace iwsgd

STABLE_TORCH_LIBRARY_IMPL(iwsgd_ext, CPU, m) {
  m.impl("iw_cross_entropy", TORCH_BOX(&iwsgd::LossOp<iwsgd::Cpu>::out_of_place));
  m.impl("iw_cross_entropy_", TORCH_BOX(&iwsgd::LossOp<iwsgd::Cpu>::in_place));
  m.impl("iw_cross_entropy_scale_", TORCH_BOX(&iwsgd::LossOp<iwsgd::Cpu>::scale));
}
