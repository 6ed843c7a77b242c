// One row of logits: its statistics and its gradient, by a team of `lanes` threads that take its classes in turn. Compiles for
// the host too, where the tests run it.
#pragma once
#undef NDEBUG  // a target out of range stops the kernel in every build
#include <cassert>
#include <cmath>
#include <limits>

#include "../iw_cross_entropy.h"
#include "elements.cuh"

namespace iwsgd {

template <class A>
IWSGD_HD A infinity() {
  return static_cast<A>(HUGE_VAL);
}

// exp(x) for x <= 0 in two instructions. The rounding of x log2(e) is the error: |x| * 6e-8 relative to exp(x), so at most 3e-8
// of a sum whose largest term is 1. exp(-inf) is 0, and NaN stays NaN.
IWSGD_HD float exponential(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
  return y;
#else
  return std::exp(x);
#endif
}
IWSGD_HD double exponential(double x) { return exp(x); }

IWSGD_HD float larger(float x, float y) { return fmaxf(x, y); }  // NaN does not count: it comes in through the sum
IWSGD_HD double larger(double x, double y) { return fmax(x, y); }

// ---- the target of one position, in the terms of iw_cross_entropy.h ----

template <class A>
struct RowTarget {
  bool ignored;
  int label;             // -1 for probabilities
  const A* probability;  // [C], probability_stride apart, or null
  int64_t probability_stride;
  const A* class_weight;  // [C] or null
  A weight;               // m, the position's weight
  A hot;                  // (1 - smoothing) * v[label]
  A uniform, share;       // smoothing / C, and 1 - smoothing

  // q v of class i, without its one-hot part.
  IWSGD_HD A soft(int i) const {
    const A q = probability != nullptr ? share * probability[i * probability_stride] + uniform : uniform;
    return class_weight != nullptr ? q * class_weight[i] : q;
  }
  // The logit of the label in a row, if there is one.
  template <class T>
  IWSGD_HD A logit(const T* z, int64_t stride) const {
    return label >= 0 ? widen(z[label * stride]) : A(0);
  }
  // The same target for the classes from `first` on, counted anew; the label may be none of them.
  IWSGD_HD RowTarget from(int first) const {
    RowTarget part = *this;
    part.label -= first;
    if (probability != nullptr) part.probability += first * probability_stride;
    if (class_weight != nullptr) part.class_weight += first;
    return part;
  }
};

// label: of the position, where there are labels. kCheck: once for each position is enough.
template <bool kCheck, class T, class A>
IWSGD_HD RowTarget<A> row_target(const LossArguments<T, A>& a, int64_t position, int64_t label) {
  RowTarget<A> target{};
  target.weight = a.position_weight != nullptr ? a.position_weight[position] : A(1);
  target.class_weight = a.class_weight;
  target.share = A(1) - a.smoothing;
  target.uniform = a.smoothing / static_cast<A>(a.C);
  target.label = -1;
  if (a.labels != nullptr) {
    target.ignored = label == a.ignore_index;
    if (kCheck) assert((target.ignored || (label >= 0 && label < a.C)) && "target: expected class indices in [0, C) or ignore_index");
    target.label = static_cast<int>(label);
    if (!target.ignored) target.hot = target.share * (a.class_weight != nullptr ? a.class_weight[label] : A(1));
  } else {
    const int64_t T_ = a.positions_each, b = T_ == 1 ? position : position / T_;
    target.probability = a.probabilities + (T_ == 1 ? b * a.C : b * a.C * T_ + position % T_);
    target.probability_stride = T_;
  }
  return target;
}

template <bool kCheck, class T, class A>
IWSGD_HD RowTarget<A> row_target(const LossArguments<T, A>& a, int64_t position) {
  return row_target<kCheck>(a, position, a.labels != nullptr ? a.labels[position] : 0);
}

// ---- statistics ----

// Of some of a row's classes: the largest logit; the sum of exp(z - max); and where the target has a soft part, the sums of
// soft (z - max) and of soft. Where every z is -infinity, 0 stands for max in them.
template <class A>
struct RowSum {
  A max = -infinity<A>(), sum = A(0), weighted = A(0), alone = A(0);

  IWSGD_HD A reference() const { return max == -infinity<A>() ? A(0) : max; }

  // The sums relative to a max that is not smaller.
  template <bool kSoft>
  IWSGD_HD void raise(A to) {
    const A before = reference(), factor = max == -infinity<A>() ? A(0) : exponential(max - to);
    max = to;
    const A after = reference();
    sum *= factor;  // NaN stays NaN
    if (kSoft) weighted += alone * (before - after);
  }

  template <bool kSoft, int N, class Soft>
  IWSGD_HD void add(const A (&z)[N], const Soft& soft) {
    A most = max;
    IWSGD_UNROLL
    for (int j = 0; j < N; ++j) most = larger(most, z[j]);
    raise<kSoft>(most);
    const A after = reference();
    A part = A(0);
    IWSGD_UNROLL
    for (int j = 0; j < N; ++j) part += exponential(z[j] - after);
    sum += part;
    if (kSoft) {
      IWSGD_UNROLL
      for (int j = 0; j < N; ++j) {
        const A q = soft(j);
        weighted += q * (z[j] - after);
        alone += q;
      }
    }
  }

  template <bool kSoft>
  IWSGD_HD void merge(RowSum other) {
    const A most = larger(max, other.max);
    raise<kSoft>(most);
    other.template raise<kSoft>(most);
    sum += other.sum;
    if (kSoft) weighted += other.weighted, alone += other.alone;
  }
};

// A row as the 16-byte accesses that its start allows: `head` elements, whole accesses, and the rest, taken one by one.
template <class T>
struct Pieces {
  int head, chunks, edges;

  // Where x and y are not aligned alike, all of it is edge.
  IWSGD_HD Pieces(const T* x, const T* y, int n) {
    const auto from = reinterpret_cast<uintptr_t>(x), to = reinterpret_cast<uintptr_t>(y);
    const int before = static_cast<int>((16 - from % 16) % 16 / sizeof(T));
    head = (from ^ to) % 16 != 0 || before > n ? n : before;
    chunks = (n - head) / kVector<T>;
    edges = n - chunks * kVector<T>;
  }
  IWSGD_HD int chunk(int i) const { return head + i * kVector<T>; }
  IWSGD_HD int edge(int i) const { return i < head ? i : i + chunks * kVector<T>; }
};

// kLoads: 16-byte accesses in flight.
template <bool kSoft, int kLoads, class T, class A>
IWSGD_HD RowSum<A> row_sum(const RowTarget<A>& target, const T* z, int64_t stride, int C, int lane, int lanes) {
  RowSum<A> row;
  const auto add_one = [&](int i) {
    const A one[1] = {widen(z[i * stride])};
    row.template add<kSoft>(one, [&](int) { return target.soft(i); });
  };
  if (stride == 1) {
    constexpr int V = kVector<T>;
    const Pieces<T> pieces(z, z, C);
    for (int i = lane; i < pieces.chunks; i += kLoads * lanes) {
      Elements<T, V> x[kLoads];
      IWSGD_UNROLL
      for (int k = 0; k < kLoads; ++k)
        if (i + k * lanes < pieces.chunks) x[k] = load<T, V>(z + pieces.chunk(i + k * lanes));
      IWSGD_UNROLL
      for (int k = 0; k < kLoads; ++k) {
        if (i + k * lanes >= pieces.chunks) break;
        A numbers[V];
        IWSGD_UNROLL
        for (int j = 0; j < V; ++j) numbers[j] = element(x[k], j);
        row.template add<kSoft>(numbers, [&](int j) { return target.soft(pieces.chunk(i + k * lanes) + j); });
      }
    }
    for (int i = lane; i < pieces.edges; i += lanes) add_one(pieces.edge(i));
  } else {
    constexpr int kApart = 8;  // accesses of one element
    int i = lane;
    for (; i + (kApart - 1) * lanes < C; i += kApart * lanes) {
      A numbers[kApart];
      IWSGD_UNROLL
      for (int k = 0; k < kApart; ++k) numbers[k] = widen(z[(i + k * lanes) * stride]);
      row.template add<kSoft>(numbers, [&](int k) { return target.soft(i + k * lanes); });
    }
    for (; i < C; i += lanes) add_one(i);
  }
  return row;
}

// u = sum_c q v log p, each term relative to the maximum first, which is exact where logits are large; and c of the position.
// logit: of the label, if there is one.
template <bool kSoft, class A>
IWSGD_HD void row_likelihood(const RowTarget<A>& target, const RowSum<A>& row, A logit, A& u, A& c) {
  const A log_sum = log(row.sum);
  u = A(0), c = A(0);
  if (target.label >= 0) {
    u = target.hot * (logit - row.max - log_sum);
    c = target.hot;
  }
  if (kSoft) u += row.weighted - row.alone * log_sum, c += row.alone;
  u *= target.weight;
  c *= target.weight;
}

// ---- gradient ----

template <Space kSpace = Space::global, class T>
IWSGD_HD void zero_row(T* dz, int64_t dstride, int C, int lane, int lanes) {
  constexpr int V = kVector<T>;
  if (dstride != 1) {
    for (int i = lane; i < C; i += lanes) dz[i * dstride] = T{};
    return;
  }
  const Pieces<T> pieces(dz, dz, C);
  for (int i = lane; i < pieces.chunks; i += lanes) store<T, V, kSpace>(dz + pieces.chunk(i), Elements<T, V>{});
  for (int i = lane; i < pieces.edges; i += lanes) dz[pieces.edge(i)] = T{};
}

// The gradient of a row is factor exp(z - max) - weight m q v, or zeros.
template <class A>
struct RowFactors {
  bool zero;
  A factor, weight;
};

template <class A>
IWSGD_HD A log_sum_exp(A max, A sum) {
  return max + log(sum);
}

// Of a row of this position: w, its importance weight; scale, 1 over the denominator; c, max and sum.
template <class T, class A>
IWSGD_HD RowFactors<A> row_factors(const LossArguments<T, A>& a, int64_t position, bool ignored, A w, double scale, A c, A max, A sum) {
  const A example = a.example_weight_of(position), weight = w * static_cast<A>(scale) * example;
  A pull = weight * c;  // of the softmax
  if (a.lse_square_scale != A(0))
    pull +=
        A(2) * a.lse_square_share() * static_cast<A>(scale) * std::fabs(example * a.position_weight_of(position)) * log_sum_exp(max, sum);
  // Of weight 0 zeros, whatever the logits are: NaN would have made the weight NaN.
  return {ignored || (w == A(0) && a.lse_square_scale == A(0)), pull * fast_reciprocal(sum), weight};
}

template <bool kSoft, class A>
struct RowGradient {
  const RowTarget<A>& target;
  A max, factor, k, hot;

  IWSGD_HD RowGradient(const RowTarget<A>& target, A max, const RowFactors<A>& factors)
      : target(target), max(max), factor(factors.factor), k(factors.weight * target.weight), hot(k * target.hot) {}

  // Of class i, without the label's part.
  IWSGD_HD A outside(int i, A z) const {
    A g = factor * exponential(z - max);
    if (kSoft) g -= k * target.soft(i);
    return g;
  }
  template <class T>
  IWSGD_HD T of(int i, T z) const {
    const A g = outside(i, widen(z));
    return narrow<T>(i == target.label ? g - hot : g);
  }
  // Of V neighbouring classes.
  template <class T, int V>
  IWSGD_HD Elements<T, V> of(int first, const Elements<T, V>& z) const {
    A g[V];
    IWSGD_UNROLL
    for (int j = 0; j < V; ++j) g[j] = outside(first + j, element(z, j));
    if (static_cast<unsigned>(target.label - first) < static_cast<unsigned>(V)) {
      IWSGD_UNROLL
      for (int j = 0; j < V; ++j)
        if (first + j == target.label) g[j] -= hot;
    }
    return scaled<T, V>([&](int j) { return g[j]; }, A(1));
  }
};

// Of a whole row; dz, in kSpace, may be z.
template <bool kSoft, int kLoads, Space kSpace = Space::global, class T, class A>
IWSGD_HD void row_gradient(const RowTarget<A>& target, const T* z, int64_t stride, T* dz, int64_t dstride, int C, A max,
                           const RowFactors<A>& factors, int lane, int lanes) {
  const RowGradient<kSoft, A> gradient(target, max, factors);
  if (stride != 1 || dstride != 1) {
    IWSGD_UNROLL_BY(4)
    for (int i = lane; i < C; i += lanes) dz[i * dstride] = gradient.of(i, z[i * stride]);
    return;
  }
  constexpr int V = kVector<T>;
  const Pieces<T> pieces(z, dz, C);
  for (int i = lane; i < pieces.chunks; i += kLoads * lanes) {
    Elements<T, V> x[kLoads];
    IWSGD_UNROLL
    for (int n = 0; n < kLoads; ++n)
      if (i + n * lanes < pieces.chunks) x[n] = load<T, V>(z + pieces.chunk(i + n * lanes));
    IWSGD_UNROLL
    for (int n = 0; n < kLoads; ++n) {
      if (i + n * lanes >= pieces.chunks) break;
      const int first = pieces.chunk(i + n * lanes);
      store<T, V, kSpace>(dz + first, gradient.of(first, x[n]));
    }
  }
  for (int i = lane; i < pieces.edges; i += lanes) dz[pieces.edge(i)] = gradient.of(pieces.edge(i), z[pieces.edge(i)]);
}

}  // namespace iwsgd
