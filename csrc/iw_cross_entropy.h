// The importance weighted cross-entropy: its formulas, and the layout of its tensors. Plain C++17, no torch.
//
// logits [S*B, C, T], row s*B + b; a unit is what has importance weights of its own: an example, or a position of one.
// For a position: u[s] = sum_c q[c] v[c] log p[s, c],  c = sum_c q[c] v[c],  d = v[y] (1 for probabilities); a position weight
// multiplies all three, an ignored position has zeros.
//   unit = position:  l[s] = u[s] / c,             outer weight c, of any sign
//   unit = example:   l[s] = sum_t u[s,t] / cbar,  outer weight cbar = sum_t c / (number of positions not ignored)
//   L = (1/alpha) (logsumexp_s(alpha l) - log S),  w = softmax_s(alpha l),  loss = -sum outer L / sum d
//   dloss / dlogits[s] = w[s] / (sum d) * (c softmax(logits[s]) - q v)
// With lse_square_scale k, lse[s] = log sum_c exp(logits[s]), e and m the weights of example and position, a position that is not ignored
// adds k |e m| / S sum_s lse[s]^2 / (sum d) to its unit's loss, whatever the importance weights.
#pragma once
#include <cmath>

#include "philox.h"  // IWSGD_HD

namespace iwsgd {

enum class Reduction { none = 0, mean = 1, sum = 2 };

// A is float, or double for double logits.
template <class T, class A>
struct LossArguments {
  int64_t S, B, C;
  int64_t positions_each;  // T
  const T* logits;
  int64_t row_stride, class_stride, position_stride;
  T* dlogits;  // null where no gradient is wanted; may be logits
  int64_t drow_stride, dclass_stride, dposition_stride;

  const int64_t* labels;   // [B, T], or null
  const A* probabilities;  // [B, C, T], or null
  int64_t ignore_index;
  A smoothing;
  A lse_square_scale;
  const A* class_weight;     // [C] or null
  const A* example_weight;   // [B] or null
  const A* position_weight;  // [B, T] or null
  const A* normalizer;       // one value, or null: sum d for the mean
  Reduction reduction;
  bool per_position;  // units are positions
  double alpha;

  A* loss;     // one value, or [units]
  A* log_p;    // [S, units]
  A* weights;  // [S, units]
  A* bound;    // [units]
  A* outer;    // [units], the outer weight over the denominator: loss = -sum outer L

  IWSGD_HD int64_t positions() const { return B * positions_each; }
  IWSGD_HD int64_t units() const { return per_position ? B * positions_each : B; }
  IWSGD_HD bool shares_weights() const { return !per_position && positions_each > 1; }  // several positions in a unit
  IWSGD_HD const T* row(int64_t s, int64_t position) const {
    return positions_each == 1 ? logits + (s * B + position) * row_stride
                               : logits + (s * B + position / positions_each) * row_stride + position % positions_each * position_stride;
  }
  IWSGD_HD T* drow(int64_t s, int64_t position) const {
    return positions_each == 1 ? dlogits + (s * B + position) * drow_stride
                               : dlogits + (s * B + position / positions_each) * drow_stride + position % positions_each * dposition_stride;
  }
  // From one position to the next: of an example, or of the next example where each has one.
  IWSGD_HD int64_t lane_stride() const { return positions_each == 1 ? row_stride : position_stride; }
  IWSGD_HD int64_t dlane_stride() const { return positions_each == 1 ? drow_stride : dposition_stride; }
  IWSGD_HD A weight(int64_t s, int64_t position) const {
    return weights[s * units() + (shares_weights() ? position / positions_each : position)];
  }
  IWSGD_HD A example_weight_of(int64_t position) const {
    return example_weight == nullptr ? A(1) : example_weight[positions_each == 1 ? position : position / positions_each];
  }
  IWSGD_HD A position_weight_of(int64_t position) const { return position_weight == nullptr ? A(1) : position_weight[position]; }
  IWSGD_HD A lse_square_share() const { return lse_square_scale / static_cast<A>(S); }  // of a row
  IWSGD_HD bool ignored(int64_t position) const { return labels != nullptr && labels[position] == ignore_index; }
};

// l of a unit of outer weight c, which may have any sign. Without any weight u is 0, or NaN. Terms that are not 0 and add up to 0 have no
// log-likelihood: NaN. An infinite weight makes the loss infinite, as torch's: not the NaN of inf / inf.
template <class A>
IWSGD_HD A unit_log_likelihood(A u, A c) {
  constexpr A inf = static_cast<A>(HUGE_VAL);
  if (c == inf || c == -inf) return u * c;
  if (c != A(0)) return u / c;
  return u == A(0) ? u : static_cast<A>(NAN);
}

// The term of a unit in the loss, its outer weight divided by the denominator: 0, not 0 * infinity, where the weight is 0.
template <class A>
IWSGD_HD A unit_cost(A outer, A bound) {
  return outer == A(0) && bound == bound ? A(0) : -outer * bound;
}

// How far l is below the largest: 0 for the largest itself, which may be infinite.
template <class A>
IWSGD_HD A below(A l, A most) {
  return l == most ? A(0) : l - most;
}

// 1 / (what the loss is divided by), which is 0 where nothing counts. kCancelled is a denominator whose terms are not 0 and add up to 0: 1
// over it is infinite, as torch's 1 / 0.
constexpr double kCancelled = 4.9e-324;
IWSGD_HD double reciprocal(double denominator) { return denominator == 0 ? 0.0 : 1.0 / denominator; }

// The numbers of every row that are kept between the steps. max and sum, for softmax = exp(z - max) / sum: [S, positions of a block], the
// block beginning at position `first`. u: [S, ...] likewise, with its own beginning, because where the unit is the position it is
// log_p itself.
template <class A>
struct Statistics {
  A *max, *sum;
  int64_t first, stride;
  A* u;
  int64_t u_first, u_stride;
  int64_t at(int64_t s, int64_t position) const { return s * stride + position - first; }
  A& likelihood(int64_t s, int64_t position) const { return u[s * u_stride + position - u_first]; }
};

}  // namespace iwsgd
