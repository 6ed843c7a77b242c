// The loss on a range of units, for one instruction set, in three steps: statistics of every row (maximum, sum of exponentials,
// log-likelihood), weights over the noise samples, gradient. A block of units is small enough that the gradient finds
// the logits in cache: one read and one write of memory.

#include "simd_math.h"

// ---- the target of one position, in the terms of iw_cross_entropy.h ----

template <class A>
struct Target {
  bool ignored;
  int64_t label;          // -1 for probabilities
  const A* probability;   // [C], class_step apart, or null
  A weight;               // m, the position's weight
  A hot;                  // (1 - smoothing) * v[label]
  A uniform;              // smoothing / C
  A c;                    // m * sum q v
};

template <class T, class A>
inline Target<A> target_of(const LossArguments<T, A>& a, const A* c, int64_t position) {
  Target<A> target{};
  target.weight = a.position_weight != nullptr ? a.position_weight[position] : A(1);
  target.uniform = a.smoothing / static_cast<A>(a.C);
  target.c = c[position];
  target.label = -1;
  if (a.labels != nullptr) {
    target.label = a.labels[position];
    target.ignored = target.label == a.ignore_index;
    if (!target.ignored) target.hot = (A(1) - a.smoothing) * (a.class_weight != nullptr ? a.class_weight[target.label] : A(1));
  } else {
    target.probability = a.probabilities + position / a.positions_each * a.C * a.positions_each + position % a.positions_each;
  }
  return target;
}

// q v of class i, without its one-hot part.
template <class T, class A>
inline A soft_target(const LossArguments<T, A>& a, const Target<A>& target, int64_t i) {
  const A v = a.class_weight != nullptr ? a.class_weight[i] : A(1);
  const A q = target.probability != nullptr ? (A(1) - a.smoothing) * target.probability[i * a.positions_each] : A(0);
  return (q + target.uniform) * v;
}

// The same for the lanes of classes i and on; n: how many of them there are.
template <class T, class A>
inline vec<A> soft_targets(const LossArguments<T, A>& a, const Target<A>& target, int64_t i, int64_t n) {
  using V = vec<A>;
  constexpr int L = lanes<A>;
  if (n >= L && (target.probability == nullptr || a.positions_each == 1)) {
    V q = splat<V>(target.uniform);
    if (target.probability != nullptr) q += load(target.probability + i) * (A(1) - a.smoothing);
    return a.class_weight != nullptr ? q * load(a.class_weight + i) : q;
  }
  alignas(64) A soft[L] = {};
  for (int j = 0; j < std::min<int64_t>(n, L); ++j) soft[j] = soft_target(a, target, i + j);
  return load(soft);
}

template <class T, class A>
inline bool has_soft_target(const LossArguments<T, A>& a) {
  return a.probabilities != nullptr || a.smoothing > 0;
}

// ---- rows of adjacent classes: lanes along the classes ----

// L values of z, of which the n first are there.
template <class A, class T>
inline vec<A> load_some(const T* z, int64_t n, A otherwise) {
  constexpr int L = lanes<A>;
  if (n >= L) return load(z);
  alignas(64) A some[L];
  for (int j = 0; j < L; ++j) some[j] = j < n ? to_acc(z[j]) : otherwise;
  return load(some);
}
template <class T, class V>
inline void store_some(T* z, V v, int64_t n) {
  using A = acc_t<T>;
  constexpr int L = lanes<A>;
  if (n >= L) return store(z, v);
  alignas(64) A some[L];
  store(some, v);
  for (int j = 0; j < n; ++j) z[j] = from_acc<T>(some[j]);
}

// Calls body(i, n) for the vectors of a row: classes i .. i + L, of which n are there.
template <class A, class Body>
inline void for_each_vector(int64_t classes, Body&& body) {
  constexpr int L = lanes<A>;
  int64_t i = 0;
  for (; i + L <= classes; i += L) body(i, L);
  if (i < classes) body(i, static_cast<int>(classes - i));
}

template <class T, class A>
void row_statistics(const T* z, int64_t n, A& most, A& sum) {
  using V = vec<A>;
  constexpr int L = lanes<A>;
  const A none = -std::numeric_limits<A>::infinity();
  V m[4] = {splat<V>(none), splat<V>(none), splat<V>(none), splat<V>(none)};  // four chains hide the latency of max
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
    for (int k = 0; k < 4; ++k) m[k] = vmax(load(z + i + k * L), m[k]);
  for (; i + L <= n; i += L) m[0] = vmax(load(z + i), m[0]);
  most = horizontal_max(vmax(vmax(m[0], m[1]), vmax(m[2], m[3])));
  for (; i < n; ++i) most = std::max(most, to_acc(z[i]));  // NaN does not count here: it comes in through the sum
  V total = splat<V>(A(0));
  for (i = 0; i + L <= n;) {  // a partial sum for every 64 vectors keeps rounding errors from growing with n
    V part = splat<V>(A(0));
    for (const int64_t stop = std::min(n - L + 1, i + 64 * L); i < stop; i += L) part += vexp(load(z + i) - most);
    total += part;
  }
  sum = horizontal_sum(total);
  if (i < n) sum += horizontal_sum(vexp(load_some(z + i, n - i, none) - most));
}

// dz = factor * exp(z - most), minus k * (soft target) where there is one.
template <class T, class A>
void row_gradient(const LossArguments<T, A>& a, const Target<A>& target, const T* z, T* dz, A most, A factor, A k) {
  if (!has_soft_target(a))
    for_each_vector<A>(a.C, [&](int64_t i, int n) { store_some(dz + i, vexp(load_some(z + i, n, most) - most) * factor, n); });
  else
    for_each_vector<A>(a.C, [&](int64_t i, int n) {
      const vec<A> p = vexp(load_some(z + i, n, most) - most) * factor;
      store_some(dz + i, p - soft_targets(a, target, i, n) * k, n);
    });
}

// sum over classes of (soft target) * log p of a row.
template <class T, class A>
A row_soft_likelihood(const LossArguments<T, A>& a, const Target<A>& target, const T* z, A most, A log_sum) {
  vec<A> total{};
  for_each_vector<A>(a.C, [&](int64_t i, int n) {
    total += soft_targets(a, target, i, n) * ((load_some(z + i, n, most) - most) - log_sum);  // a missing class has target 0
  });
  return horizontal_sum(total);
}

// ---- columns: lanes along rows or positions, for few classes or adjacent positions ----

// kLanes rows side by side: class i of lane j is z[i * step + j].
template <class Source, class A>
inline void column_statistics(const Source* z, int64_t step, int64_t n, vec<A>& most, vec<A>& sum) {
  using V = vec<A>;
  most = splat<V>(-std::numeric_limits<A>::infinity());
  for (int64_t i = 0; i < n; ++i) most = vmax(load(z + i * step), most);
  sum = splat<V>(A(0));
  for (int64_t i = 0; i < n; ++i) sum += vexp(load(z + i * step) - most);
}

// ---- log-likelihood of a position, given its row's maximum and sum ----

// u = sum_c q v log p. Each term is taken relative to the maximum first, which is exact where logits are large.
template <class T, class A>
inline A log_likelihood(const LossArguments<T, A>& a, const Target<A>& target, const T* z, A most, A log_sum) {
  A u = A(0);
  if (target.label >= 0) u = target.hot * ((to_acc(z[target.label * a.class_stride]) - most) - log_sum);
  if (has_soft_target(a) && a.class_stride == 1) {
    u += row_soft_likelihood(a, target, z, most, log_sum);
  } else if (has_soft_target(a)) {
    double soft = 0;
    for (int64_t i = 0; i < a.C; ++i) soft += soft_target(a, target, i) * ((to_acc(z[i * a.class_stride]) - most) - log_sum);
    u += static_cast<A>(soft);
  }
  return target.weight * u;
}

template <class A>
inline A unit_log_likelihood(A u, A outer) {
  return outer > A(0) ? u / outer : u;  // without any weight u is 0, or NaN
}

// ---- step 1: statistics of positions [first, last), all noise samples ----

// Whether rows are worked on side by side. Above this many classes a row of adjacent classes fills the lanes by itself.
template <class T, class A>
inline bool in_columns(const LossArguments<T, A>& a) {
  return a.class_stride != 1 || a.C < 64 || (a.dlogits != nullptr && a.dclass_stride != 1);
}

// Calls body(position, n, step) for runs of at most `most` positions whose rows are `step` apart.
template <class T, class A, class Body>
inline void for_each_panel(const LossArguments<T, A>& a, int64_t first, int64_t last, int64_t row_stride, int64_t position_stride, Body&& body) {
  constexpr int L = lanes<A>;
  for (int64_t p = first; p < last;) {
    const int64_t run = a.positions_each == 1 ? last - p : std::min(last - p, a.positions_each - p % a.positions_each);
    const int64_t n = std::min<int64_t>(run, L);
    body(p, static_cast<int>(n), a.positions_each == 1 ? row_stride : position_stride);
    p += n;
  }
}

template <class T, class A>
void statistics(const LossArguments<T, A>& a, const A* c, const Statistics<A>& stats, int64_t first, int64_t last) {
  using V = vec<A>;
  constexpr int L = lanes<A>;
  const auto likelihood = [&](int64_t s, int64_t p, const T* z, A most, A log_sum) {
    const Target<A> target = target_of(a, c, p);
    const A u = target.ignored ? A(0) : log_likelihood(a, target, z, most, log_sum);
    stats.likelihood(s, p) = a.per_position || a.positions_each == 1 ? unit_log_likelihood(u, target.c) : u;
  };
  if (!in_columns(a)) {
    for (int64_t s = 0; s < a.S; ++s)
      for (int64_t p = first; p < last; ++p) {
        if (a.ignored(p)) {
          stats.likelihood(s, p) = A(0);
          continue;
        }
        const T* z = a.row(s, p / a.positions_each, p % a.positions_each);
        A most, sum;
        row_statistics(z, a.C, most, sum);
        stats.max[stats.at(s, p)] = most;
        stats.sum[stats.at(s, p)] = sum;
        likelihood(s, p, z, most, std::log(sum));
      }
    return;
  }
  std::vector<A> tile(static_cast<std::size_t>(a.C) * L);
  for (int64_t s = 0; s < a.S; ++s)
    for_each_panel(a, first, last, a.row_stride, a.position_stride, [&](int64_t p, int n, int64_t step) {
      const T* z = a.row(s, p / a.positions_each, p % a.positions_each);
      V most, sum;
      if (step == 1 && n == L) {
        column_statistics<T, A>(z, a.class_stride, a.C, most, sum);
      } else {
        for (int64_t i = 0; i < a.C; ++i)
          for (int j = 0; j < L; ++j) tile[i * L + j] = to_acc(z[i * a.class_stride + std::min(j, n - 1) * step]);
        column_statistics<A, A>(tile.data(), L, a.C, most, sum);
      }
      const V log_sum = vlog(sum);
      for (int j = 0; j < n; ++j) {
        stats.max[stats.at(s, p + j)] = most[j];
        stats.sum[stats.at(s, p + j)] = sum[j];
        likelihood(s, p + j, z + j * step, most[j], log_sum[j]);
      }
    });
}

// ---- step 2: bound and weights of units [first, last); log_p [S, units] holds l ----

// One unit in double, for any alpha. log1p and expm1 keep the bound exact as alpha goes to 0, where it is the mean.
template <class T, class A>
void weigh_unit(const LossArguments<T, A>& a, int64_t unit) {
  const int64_t units = a.units();
  const auto l = [&](int64_t s) { return static_cast<double>(a.log_p[s * units + unit]); };
  const auto weigh = [&](int64_t s, double w) { a.weights[s * units + unit] = static_cast<A>(w); };
  const double samples = static_cast<double>(a.S), equal = 1.0 / samples;
  int64_t best = 0;
  bool nan = false;
  double mean = 0;
  for (int64_t s = 0; s < a.S; ++s) {
    if (l(s) > l(best)) best = s;
    nan = nan || l(s) != l(s);
    mean += l(s) / samples;
  }
  const double most = l(best);
  if (nan || a.alpha == 0 || most == -std::numeric_limits<double>::infinity()) {
    for (int64_t s = 0; s < a.S; ++s) weigh(s, nan && a.alpha != 0 ? mean : equal);
    a.bound[unit] = static_cast<A>(mean);
  } else if (a.alpha == std::numeric_limits<double>::infinity()) {
    for (int64_t s = 0; s < a.S; ++s) weigh(s, s == best ? 1.0 : 0.0);
    a.bound[unit] = static_cast<A>(most);
  } else {
    double excess = 0;  // mean of exp(alpha (l - most)) - 1
    for (int64_t s = 0; s < a.S; ++s) excess += std::expm1(a.alpha * (l(s) - most)) / samples;
    for (int64_t s = 0; s < a.S; ++s) weigh(s, std::exp(a.alpha * (l(s) - most)) / (samples * (1.0 + excess)));
    a.bound[unit] = static_cast<A>(most + std::log1p(excess) / a.alpha);
  }
}

template <class T, class A>
void weigh(const LossArguments<T, A>& a, int64_t first, int64_t last) {
  using V = vec<A>;
  constexpr int L = lanes<A>;
  const int64_t units = a.units();
  int64_t unit = first;
  if (a.alpha == 1.0) {
    const V none = splat<V>(-std::numeric_limits<A>::infinity());
    const A samples = static_cast<A>(a.S);
    for (; unit + L <= last; unit += L) {
      V most = none, sum = splat<V>(A(0));
      for (int64_t s = 0; s < a.S; ++s) most = vmax(load(a.log_p + s * units + unit), most);
      for (int64_t s = 0; s < a.S; ++s) {
        const V e = vexp(load(a.log_p + s * units + unit) - most);
        store(a.weights + s * units + unit, e);
        sum += e;
      }
      for (int64_t s = 0; s < a.S; ++s) store(a.weights + s * units + unit, load(a.weights + s * units + unit) / sum);
      store(a.bound + unit, most + vlog(sum / samples));
      for (int j = 0; j < L; ++j)
        if (!(sum[j] >= A(1))) weigh_unit(a, unit + j);  // NaN: a sample is NaN, or every one is -infinity
    }
  }
  for (; unit < last; ++unit) weigh_unit(a, unit);
}

// ---- step 3: gradient of positions [first, last), all noise samples ----

template <class T, class A>
void gradient(const LossArguments<T, A>& a, const A* c, A scale, const Statistics<A>& stats, int64_t first, int64_t last) {
  using V = vec<A>;
  constexpr int L = lanes<A>;
  const int64_t units = a.units();
  // What the gradient of a position is multiplied by: its weight, and the outside of the loss.
  const auto coefficient = [&](int64_t s, int64_t p) {
    const int64_t b = p / a.positions_each, unit = a.per_position ? p : b;
    return a.weights[s * units + unit] * scale * (a.example_weight != nullptr ? a.example_weight[b] : A(1));
  };
  const auto no_weight = [&](int64_t s, int64_t p) { return a.weights[s * units + (a.per_position ? p : p / a.positions_each)] == A(0); };
  if (!in_columns(a)) {
    for (int64_t s = 0; s < a.S; ++s)
      for (int64_t p = first; p < last; ++p) {
        T* dz = a.drow(s, p / a.positions_each, p % a.positions_each);
        const Target<A> target = target_of(a, c, p);
        if (target.ignored || no_weight(s, p)) {
          std::fill(dz, dz + a.C, T{});
          continue;
        }
        const T* z = a.row(s, p / a.positions_each, p % a.positions_each);
        const A most = stats.max[stats.at(s, p)], factor = coefficient(s, p) * target.c / stats.sum[stats.at(s, p)];
        const A k = coefficient(s, p) * target.weight;
        A at_label = A(0);
        if (target.label >= 0) {  // read before dz may overwrite it
          at_label = vexp(splat<V>(to_acc(z[target.label]) - most))[0] * factor - k * target.hot;
          if (a.smoothing > 0) at_label -= k * soft_target(a, target, target.label);
        }
        row_gradient(a, target, z, dz, most, factor, k);
        if (target.label >= 0) dz[target.label] = from_acc<T>(at_label);
      }
    return;
  }
  std::vector<A> tile(static_cast<std::size_t>(a.C) * L);
  for (int64_t s = 0; s < a.S; ++s)
    for_each_panel(a, first, last, a.row_stride, a.position_stride, [&](int64_t p, int n, int64_t step) {
      const T* z = a.row(s, p / a.positions_each, p % a.positions_each);
      T* dz = a.drow(s, p / a.positions_each, p % a.positions_each);
      const int64_t dstep = a.positions_each == 1 ? a.drow_stride : a.dposition_stride;
      Target<A> targets[L];
      alignas(64) A most[L], factor[L], k[L];
      for (int j = 0; j < L; ++j) {
        const int64_t q = p + std::min(j, n - 1);
        targets[j] = target_of(a, c, q);
        most[j] = stats.max[stats.at(s, q)];
        factor[j] = coefficient(s, q) * targets[j].c / stats.sum[stats.at(s, q)];
        k[j] = coefficient(s, q) * targets[j].weight;
      }
      const bool direct = step == 1 && n == L;
      for (int64_t i = 0; i < a.C; ++i) {
        if (direct) {
          store(tile.data() + i * L, vexp(load(z + i * a.class_stride) - load(most)) * load(factor));
        } else {
          A* to = tile.data() + i * L;
          for (int j = 0; j < L; ++j) to[j] = to_acc(z[i * a.class_stride + std::min(j, n - 1) * step]);
          store(to, vexp(load(to) - load(most)) * load(factor));
        }
      }
      for (int j = 0; j < n; ++j) {
        if (targets[j].ignored || no_weight(s, p + j)) {
          for (int64_t i = 0; i < a.C; ++i) tile[i * L + j] = A(0);
          continue;
        }
        if (targets[j].label >= 0) tile[targets[j].label * L + j] -= k[j] * targets[j].hot;
        if (has_soft_target(a))
          for (int64_t i = 0; i < a.C; ++i) tile[i * L + j] -= k[j] * soft_target(a, targets[j], i);
      }
      for (int64_t i = 0; i < a.C; ++i) {
        if (dstep == 1 && n == L)
          store(dz + i * a.dclass_stride, load(tile.data() + i * L));
        else
          for (int j = 0; j < n; ++j) dz[i * a.dclass_stride + j * dstep] = from_acc<T>(tile[i * L + j]);
      }
    });
}
