// The loss, for one instruction set, in three steps: statistics of every row (maximum, sum of exponentials, log-likelihood), weights
// over the noise samples, gradient. Work comes in blocks whose logits stay in cache between the steps: one read and one write of
// memory. Rows of many adjacent classes have their lanes along the classes (iw_cross_entropy_rows.h); else L rows are worked on side
// by side, as a panel (iw_cross_entropy_panels.h).

#include "simd_math.h"

// ---- the target of one position, in the terms of iw_cross_entropy.h ----

template <class A>
struct Target {
  bool ignored;
  int64_t label;         // -1 for probabilities
  const A* probability;  // [C], class_step apart, or null
  A weight;              // m, the position's weight
  A hot;                 // (1 - smoothing) * v[label]
  A uniform;             // smoothing / C
  A c;                   // m * sum q v
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

// Of a row, where vlog() is of the lanes of a panel.
inline float vlog(float x) { return std::log(x); }
inline double vlog(double x) { return std::log(x); }

// The factor of exp(z - max) in the gradient of a row, or of the lanes of a panel. weight: the importance weight over the
// denominator, times the example weight; given: the weights of example and position.
template <class T, class A, class V>
inline V row_factor(const LossArguments<T, A>& a, V weight, V c, V given, A scale, V most, V sum) {
  if (a.lse_square_scale == A(0)) return weight * c / sum;
  const V pull = (2 * a.lse_square_share() * scale) * (given < V{} ? -given : given) * (most + vlog(sum));
  return (weight * c + pull) / sum;
}

// Calls body(i, n) for the vectors of a row: classes i .. i + L, of which n are there.
template <class A, class Body>
inline void for_each_vector(int64_t classes, Body&& body) {
  constexpr int L = lanes<A>;
  int64_t i = 0;
  for (; i + L <= classes; i += L) body(i, L);
  if (i < classes) body(i, static_cast<int>(classes - i));
}

// True where the gradient goes past the caches: it is more than they hold beside the logits, and in other memory than these. With a
// reader behind it (2 cores of a Xeon) that took 1.2 times as long at 15 MB, 0.95 at 31 MB, 0.88 at 62 MB.
constexpr int64_t kStreamBytes = 24 << 20;
template <class T, class A>
inline bool streams_gradient(const LossArguments<T, A>& a) {
  return a.dlogits != nullptr && a.dlogits != a.logits && a.S * a.positions() * a.C * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
}

// Of logits and gradient in a block. The first level of a cache nearly holds it; 128 KiB took 2 to 5% longer (1000 classes, Xeon).
constexpr int64_t kBlockBytes = 32 * 1024;

#include "iw_cross_entropy_panels.h"
#include "iw_cross_entropy_rows.h"

// ---- the steps, on positions [first, last) and all noise samples ----

// True where rows are worked on in panels. Above this many classes a row of adjacent classes fills the lanes by itself.
template <class T, class A>
inline bool in_panels(const LossArguments<T, A>& a) {
  return a.class_stride != 1 || a.C < 64 || (a.dlogits != nullptr && a.dclass_stride != 1);
}

template <class T, class A>
void statistics(const LossArguments<T, A>& a, const A* c, const Statistics<A>& stats, int64_t first, int64_t last) {
  if (!in_panels(a)) return row_pass(a, c, A(0), RowBlock<A>{first, last, stats}, RowBlock<A>{});
  std::vector<A> tile(static_cast<std::size_t>(a.C) * lanes<A>);
  for (int64_t p = first; p < last;) {
    const Panel<T, A> panel(a, c, p, last);
    for (int64_t s = 0; s < a.S; ++s) panel_statistics(a, panel, stats, s, tile.data());
    p += panel.n;
  }
}

template <class T, class A>
void gradients(const LossArguments<T, A>& a, const A* c, A scale, const Statistics<A>& stats, int64_t first, int64_t last) {
  constexpr int L = lanes<A>;
  if (!in_panels(a)) return row_pass(a, c, scale, RowBlock<A>{}, RowBlock<A>{first, last, stats});
  std::vector<A> tile(static_cast<std::size_t>(a.C) * L);
  for (int64_t p = first; p < last;) {
    const Panel<T, A> panel(a, c, p, last);
    for (int64_t s = 0; s < a.S; ++s) {
      panel.read(a, s, tile.data());
      const vec<A> most = panel.lanes_of(stats.max + stats.at(s, p));
      for (int64_t i = 0; i < a.C; ++i) store(tile.data() + i * L, vexp(load(tile.data() + i * L) - most));
      panel_gradient(a, panel, scale, stats, s, tile.data());
    }
    p += panel.n;
  }
}

// l[s, b] of examples [first, last) whose positions share their weights, from u[s, b, t].
template <class T, class A>
void join_positions(const LossArguments<T, A>& a, const A* outer, const Statistics<A>& stats, int64_t first, int64_t last) {
  for (int64_t s = 0; s < a.S; ++s)
    for (int64_t b = first; b < last; ++b) {
      const A* u = &stats.likelihood(s, b * a.positions_each);
      double sum = 0;
      for (int64_t t = 0; t < a.positions_each; ++t) sum += u[t];
      a.log_p[s * a.B + b] = static_cast<A>(unit_log_likelihood<double>(sum, outer[b]));
    }
}

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
    // One sample has all the weight, whatever its likelihood: its gradient is then torch's.
    for (int64_t s = 0; s < a.S; ++s) weigh(s, nan && a.alpha != 0 && a.S > 1 ? mean : equal);
    a.bound[unit] = static_cast<A>(mean);
  } else if (a.alpha == std::numeric_limits<double>::infinity()) {
    for (int64_t s = 0; s < a.S; ++s) weigh(s, s == best ? 1.0 : 0.0);
    a.bound[unit] = static_cast<A>(most);
  } else {
    double excess = 0;  // mean of exp(alpha (l - most)) - 1
    for (int64_t s = 0; s < a.S; ++s) excess += std::expm1(a.alpha * below(l(s), most)) / samples;
    for (int64_t s = 0; s < a.S; ++s) weigh(s, std::exp(a.alpha * below(l(s), most)) / (samples * (1.0 + excess)));
    a.bound[unit] = static_cast<A>(most + std::log1p(excess) / a.alpha);
  }
}

// load_some() and store_some(), 0 in the other lanes, of values that were just written one by one, and are read so: a vector loaded behind
// a scalar's store waits until all stores before are done, a gradient's among them.
template <class A>
inline vec<A> load_lanes(const A* p, int64_t n) {
  if (n >= lanes<A>) return load(p);
  vec<A> v{};
  for (int64_t j = 0; j < n; ++j) v = with_lane<A>(v, j, p[j]);
  return v;
}
template <class A>
inline void store_lanes(A* p, vec<A> v, int64_t n) {
  if (n >= lanes<A>) return store(p, v);
  for (int64_t j = 0; j < n; ++j) p[j] = v[j];
}

// Of each unit the sum of |m| lse^2 over its rows that are not ignored. It stands in a.outer until the loss is added up.
template <class T, class A>
void add_squares(const LossArguments<T, A>& a, const Statistics<A>& stats, int64_t first, int64_t last) {
  const int64_t each = a.shares_weights() ? a.positions_each : 1;
  for (int64_t unit = first; unit < last; ++unit) {
    double sum = 0;
    for (int64_t p = unit * each; p < (unit + 1) * each; ++p) {
      if (a.ignored(p)) continue;
      double squares = 0;
      for (int64_t s = 0; s < a.S; ++s) {
        const A lse = stats.max[stats.at(s, p)] + std::log(stats.sum[stats.at(s, p)]);
        squares += static_cast<double>(lse) * lse;
      }
      sum += std::fabs(a.position_weight_of(p)) * squares;
    }
    a.outer[unit] = static_cast<A>(sum);
  }
}

template <class T, class A>
void weigh(const LossArguments<T, A>& a, const Statistics<A>& stats, int64_t first, int64_t last) {
  using V = vec<A>;
  constexpr int64_t L = lanes<A>;
  if (a.lse_square_scale != A(0)) add_squares(a, stats, first, last);
  if (a.alpha != 1.0) {
    for (int64_t unit = first; unit < last; ++unit) weigh_unit(a, unit);
    return;
  }
  const A samples = static_cast<A>(a.S);
  for (int64_t unit = first; unit < last; unit += L) {
    const int64_t units = a.units(), n = std::min(L, last - unit);
    const auto likelihoods = [=](int64_t s) { return load_lanes(a.log_p + s * units + unit, n); };
    V most = splat<V>(-std::numeric_limits<A>::infinity()), sum = splat<V>(A(0));
    for (int64_t s = 0; s < a.S; ++s) most = vmax(likelihoods(s), most);
    for (int64_t s = 0; s < a.S; ++s) sum += vexp(likelihoods(s) - most);
    for (int64_t s = 0; s < a.S; ++s) store_lanes(a.weights + s * units + unit, vexp(likelihoods(s) - most) / sum, n);
    store_lanes(a.bound + unit, most + vlog(sum / samples), n);
    for (int64_t j = 0; j < n; ++j)
      if (!(sum[j] >= A(1))) weigh_unit(a, unit + j);  // NaN: a sample is NaN or +infinity, or every one is -infinity
  }
}

// ---- all steps on units [first, last), block by block ----

// In rows: the gradients of a block are written while the next block is read.
template <class T, class A>
void solve_rows(const LossArguments<T, A>& a, const A* c, const A* outer, A scale, int64_t first, int64_t last) {
  const bool joint = a.shares_weights(), gradient = a.dlogits != nullptr;
  const int64_t each = joint ? a.positions_each : 1, unit_bytes = a.S * each * a.C * static_cast<int64_t>(2 * sizeof(T));
  const int64_t size = std::max<int64_t>(1, kBlockBytes / std::max<int64_t>(unit_bytes, 1));  // in units
  const int64_t rows = a.S * std::min(size, last - first) * each;
  const std::unique_ptr<A[]> memory(new A[6 * rows]);  // of two blocks
  RowBlock<A> now;
  for (int64_t unit = first, turn = 0; unit < last || now.last > now.first; turn = 1 - turn) {
    const int64_t stop = std::min(last, unit + size), p = unit * each, count = (stop - unit) * each;
    A* max = memory.get() + turn * 3 * rows;
    const Statistics<A> stats{max, max + rows, p, count, joint ? max + 2 * rows : a.log_p, joint ? p : 0, joint ? count : a.units()};
    const RowBlock<A> next{p, p + count, stats};
    row_pass(a, c, scale, next, gradient ? now : RowBlock<A>{});
    if (joint) join_positions(a, outer, stats, unit, stop);
    weigh(a, stats, unit, stop);
    now = next, unit = stop;
  }
}

constexpr int64_t kTilesBytes = 512 * 1024;  // of a panel's logits under all noise samples: half of a 1 MiB second level cache

template <class T, class A>
void solve_panels(const LossArguments<T, A>& a, const A* c, const A* outer, A scale, int64_t first, int64_t last) {
  constexpr int64_t L = lanes<A>;
  const bool joint = a.shares_weights(), gradient = a.dlogits != nullptr;
  const int64_t each = joint ? a.positions_each : 1, tile = a.C * L;
  const int64_t unit_bytes = a.S * each * a.C * static_cast<int64_t>(2 * sizeof(T));
  // A panel's tiles of all noise samples are kept from the first step to the last, if that is not too much.
  const bool keep_tiles = !joint && a.S * tile * static_cast<int64_t>(sizeof(A)) <= kTilesBytes;
  const int64_t block = keep_tiles ? L : std::max<int64_t>(joint ? 1 : L, kBlockBytes / std::max<int64_t>(unit_bytes, 1));
  const int64_t rows = a.S * std::min(block, last - first) * each;
  const std::unique_ptr<A[]> memory(new A[3 * rows + (keep_tiles ? a.S * tile : 0)]);
  A *max = memory.get(), *sum = max + rows, *u = sum + rows, *kept = u + rows;
  for (int64_t unit = first; unit < last;) {
    int64_t stop = std::min(last, unit + block);
    const int64_t p = unit * each, count = (stop - unit) * each;
    const Statistics<A> stats{max, sum, p, count, joint ? u : a.log_p, joint ? p : 0, joint ? count : a.units()};
    if (keep_tiles) {
      const Panel<T, A> panel(a, c, p, stop);
      stop = unit + panel.n;
      for (int64_t s = 0; s < a.S; ++s) panel_statistics(a, panel, stats, s, kept + s * tile);
      weigh(a, stats, unit, stop);
      for (int64_t s = 0; gradient && s < a.S; ++s) panel_gradient(a, panel, scale, stats, s, kept + s * tile);
    } else {
      statistics(a, c, stats, p, p + count);
      if (joint) join_positions(a, outer, stats, unit, stop);
      weigh(a, stats, unit, stop);
      if (gradient) gradients(a, c, scale, stats, p, p + count);
    }
    unit = stop;
  }
}

template <class T, class A>
void solve(const LossArguments<T, A>& a, const A* c, const A* outer, A scale, int64_t first, int64_t last) {
  if (in_panels(a)) solve_panels(a, c, outer, scale, first, last);
  else solve_rows(a, c, outer, scale, first, last);
}

// ---- an upstream gradient ----

template <class T, class A>
void scale(T* x, A factor, int64_t first, int64_t last) {
  using V = vec<A>;
  constexpr int64_t L = lanes<A>;
  for (int64_t i = first; i < last; i += L) {
    const int64_t n = std::min(L, last - i);
    store_some(x + i, load_some(x + i, n, A(0)) * splat<V>(factor), n);
  }
}
