// Rows of many adjacent classes, lanes along the classes. Read once per instruction set by iw_cross_entropy_kernels.h.

template <class T, class A>
A maximum(const T* z, int64_t n) {
  using V = vec<A>;
  constexpr int L = lanes<A>;
  constexpr A kLeast = -std::numeric_limits<A>::infinity();
  V m[4];  // four chains hide the latency of max
  for (V& v : m) v = splat<V>(kLeast);
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
    for (int k = 0; k < 4; ++k) m[k] = vmax(load(z + i + k * L), m[k]);  // NaN does not count here: it comes in through the sum
  for (; i < n; i += L) m[0] = vmax(load_some(z + i, n - i, kLeast), m[0]);
  return horizontal_max(vmax(vmax(m[0], m[1]), vmax(m[2], m[3])));
}

// A row comes in chunks that the first level of a cache holds between the search for the maximum and the sum, beside the gradient of
// another row. Half as much, twice as much, or one chunk less ahead took 2 to 6% longer (1000 and 32000 classes, Xeon).
constexpr int64_t kChunkBytes = 32 * kLineBytes, kAheadBytes = 3 * kChunkBytes;

// A row whose softmax is wanted, and the row that is read after it.
template <class T>
struct Row {
  const T* z = nullptr;
  int64_t classes = 0;
  const T* next = nullptr;
};

template <class A>
struct Softmax {
  A most, sum;  // the maximum, and the sum of exp(z[i] - most)
};

// The softmax of a row, in steps, so that other work goes on beside them: while !done(), open_chunk(), line() any number of times,
// close_chunk(). finish() takes the steps that are left.
template <class T, class A>
class SoftmaxSteps {
  using V = vec<A>;
  static constexpr int64_t kLine = kLineBytes / sizeof(T), kChunk = kChunkBytes / sizeof(T);
  static constexpr A kLeast = -std::numeric_limits<A>::infinity();

  const Row<T> row_;
  const T* ahead_ = nullptr;
  int64_t at_ = 0, stop_ = 0;
  double total_ = 0;  // in double, rounding errors do not grow with the number of chunks
  A most_ = kLeast;
  V base_{}, sum_{};

 public:
  explicit SoftmaxSteps(const Row<T>& row) : row_(row) {}

  bool done() const { return at_ == row_.classes; }

  [[gnu::always_inline]] inline void open_chunk() {
    stop_ = std::min(row_.classes, at_ + kChunk);
    const A here = maximum<T, A>(row_.z + at_, stop_ - at_);
    if (here > most_) {
      if (at_ > 0) total_ *= std::exp(static_cast<double>(most_) - here);
      most_ = here;
    }
    // So far only -infinity, and maybe NaN, which has to be found: -infinity less itself would be one too.
    base_ = splat<V>(most_ == kLeast ? A(0) : most_);
    sum_ = V{};
    const int64_t ahead = at_ + std::min<int64_t>(row_.classes, kAheadBytes / sizeof(T));
    ahead_ = ahead < row_.classes ? row_.z + ahead : row_.next + (ahead - row_.classes);
  }

  // The chunk's next whole line, if there is one. Meanwhile as much of what is read later comes from memory.
  [[gnu::always_inline]] inline void line() {
    if (at_ + kLine > stop_) return;
    __builtin_prefetch(ahead_, 0, 2);  // to the second level: the first holds what is worked on
#pragma GCC unroll 8
    for (int k = 0; k < kLine; k += lanes<A>) sum_ += vexp(load(row_.z + at_ + k) - base_);
    ahead_ += kLine, at_ += kLine;
  }

  [[gnu::always_inline]] inline void close_chunk() {
    while (at_ + kLine <= stop_) line();
    for (; at_ < stop_; at_ += lanes<A>) sum_ += vexp(load_some(row_.z + at_, stop_ - at_, kLeast) - base_);
    at_ = stop_;
    total_ += horizontal_sum(sum_);
  }

  // Adds up the rest, all at once.
  [[gnu::always_inline]] inline Softmax<A> finish() {
    while (!done()) open_chunk(), close_chunk();
    return {most_, static_cast<A>(total_)};
  }
};

// Elements from p to the next line of memory.
template <class T>
inline int64_t to_next_line(const T* p) {
  return static_cast<int64_t>(-reinterpret_cast<std::size_t>(p) % kLineBytes / sizeof(T));
}

// A value for one class.
template <class A>
struct At {
  int64_t label;  // -1: none
  A value;
};

// dz[i] = gradient(i, n), the n <= L values from class i on, for classes [first, last), but at the label. dz may be what gradient reads at
// the same place. `kPastCache`: whole lines, past the caches. beside(i) comes before each line.
template <bool kPastCache, class A, class T, class Gradient, class Beside>
[[gnu::always_inline]] inline void gradient_lines(T* dz, int64_t first, int64_t last, At<A> at, const Gradient& gradient,
                                                  const Beside& beside) {
  constexpr int L = lanes<A>, kLine = kLineBytes / static_cast<int>(sizeof(T));
  // A line that is both streamed and written would be read back: the label's is put together in registers.
  const int64_t with_label = at.label >= first ? at.label - (at.label - first) % kLine : -1;
  int64_t i = first;
  for (; i + kLine <= last; i += kLine) {
    beside(i);
    vec<A> v[kLine / L];
#pragma GCC unroll 16
    for (int k = 0; k < kLine; k += L) v[k / L] = gradient(i + k, L);
    if (i == with_label)
      for (int k = 0; k < kLine; k += L) v[k / L] = with_lane<A>(v[k / L], at.label - i - k, at.value);
#pragma GCC unroll 16
    for (int k = 0; k < kLine; k += lanes<T>) {
      if constexpr (kPastCache) stream(dz + i + k, rounded<T>(v + k / L));
      else put(dz + i + k, rounded<T>(v + k / L));
    }
  }
  if constexpr (!kPastCache)
    for (; i < last; i += L) {
      const int64_t n = std::min<int64_t>(L, last - i);
      store_some(dz + i, with_lane<A>(gradient(i, n), at.label - i, at.value), n);
    }
}

// The same; past the caches where that is wanted and lines are whole.
template <class A, class T, class Gradient, class Beside>
[[gnu::always_inline]] inline void write_gradient(T* dz, int64_t first, int64_t last, At<A> at, bool past_cache, const Gradient& gradient,
                                                  const Beside& beside) {
  constexpr int kLine = kLineBytes / static_cast<int>(sizeof(T));
  int64_t head = last, tail = last;  // whole lines from head to tail go past the caches
  if (past_cache) {
    head = std::min(last, first + to_next_line(dz + first)), tail = head + (last - head) / kLine * kLine;
    if (tail < last) __builtin_prefetch(dz + tail, 1);  // the one line here that is read before it is written
  }
  gradient_lines<false, A>(dz, first, head, at, gradient, beside);
  gradient_lines<true, A>(dz, head, tail, at, gradient, beside);
  gradient_lines<false, A>(dz, tail, last, at, gradient, beside);
}

// sum over classes of (soft target) * (z - most), and of the soft target alone. Partial sums keep rounding errors from growing with the
// number of classes: each of 64 vectors.
template <class T, class A>
void soft_sums(const LossArguments<T, A>& a, const Target<A>& target, const T* z, A most, double& weighted, double& alone) {
  constexpr int64_t kPart = 64 * lanes<A>;
  weighted = alone = 0;
  for (int64_t first = 0; first < a.C; first += kPart) {
    vec<A> x{}, y{};
    for_each_vector<A>(std::min(kPart, a.C - first), [&](int64_t k, int n) {
      const vec<A> soft = soft_targets(a, target, first + k, n);  // 0 for a class that is not there
      x += soft * (load_some(z + first + k, n, most) - most);
      y += soft;
    });
    weighted += horizontal_sum(x);
    alone += horizontal_sum(y);
  }
}

// Log-likelihood of a row under its target, once its softmax is known.
template <class T, class A>
void row_likelihood(const LossArguments<T, A>& a, const A* c, const Statistics<A>& stats, int64_t s, int64_t p, Softmax<A> softmax) {
  const Target<A> target = target_of(a, c, p);
  A u = A(0);
  if (!target.ignored) {
    const T* z = a.row(s, p);
    const A log_sum = std::log(softmax.sum);
    // u = sum_c q v log p, each term relative to the maximum first, which is exact where logits are large.
    if (target.label >= 0) u = target.hot * (to_acc(z[target.label]) - softmax.most - log_sum);
    if (has_soft_target(a)) {
      double weighted, alone;
      soft_sums(a, target, z, softmax.most, weighted, alone);
      u += static_cast<A>(weighted - alone * log_sum);
    }
    u *= target.weight;
    stats.max[stats.at(s, p)] = softmax.most;
    stats.sum[stats.at(s, p)] = softmax.sum;
  }
  stats.likelihood(s, p) = a.shares_weights() ? u : unit_log_likelihood(u, target.c);
}

constexpr int64_t kNearBytes = 16 * kLineBytes;  // from the second level to the first

template <class T, class A>
Softmax<A> row_softmax(const Row<T>& row) {
  return SoftmaxSteps<T, A>(row).finish();
}

// The same while the gradient of position p's row under noise sample s is written: memory is read and written at once, which takes less
// time than one after the other (32000 classes, float32: 0.82 to 0.88 of it).
// The exponentials are taken anew: that costs less than memory to keep them in, beside logits that are in cache and a gradient that
// waits for its place in memory.
template <class T, class A>
Softmax<A> row_gradient(const LossArguments<T, A>& a, const A* c, A scale, const Statistics<A>& stats, int64_t s, int64_t p,
                        const Row<T>& other) {
  using V = vec<A>;
  T* dz = a.drow(s, p);
  const Target<A> target = target_of(a, c, p);
  const A w = a.weight(s, p);
  if (target.ignored || (w == A(0) && a.lse_square_scale == A(0))) {  // a row of no weight is finite: NaN would have made the weight NaN
    std::fill(dz, dz + a.C, T{});
    return row_softmax<T, A>(other);
  }
  const T* z = a.row(s, p);
  const A most = stats.max[stats.at(s, p)], example = a.example_weight_of(p), outside = w * scale * example, k = outside * target.weight;
  const A factor = row_factor(a, outside, target.c, example * target.weight, scale, most, stats.sum[stats.at(s, p)]);
  A at_label = A(0);
  if (target.label >= 0) {  // before dz, which may be the same memory, is written
    at_label = vexp(splat<V>(to_acc(z[target.label]) - most))[0] * factor - k * target.hot;
    if (a.smoothing > 0) at_label -= k * soft_target(a, target, target.label);
  }
  const bool past_cache = streams_gradient(a);
  // NOTE [always_inline]
  // g++ 12 takes a function that only prefetches for one without effect, and drops the calls; and what it does not inline here
  // comes to the loops through memory, in a row behind the stores.
  const auto write = [&](const auto& gradient) __attribute__((always_inline)) {
    SoftmaxSteps<T, A> steps(other);
    const auto beside = [&](int64_t i) __attribute__((always_inline)) {
      steps.line();
      __builtin_prefetch(z + i + kNearBytes / sizeof(T), 0, 3);  // stores past the caches keep what this would be fetched with
    };
    for (int64_t first = 0, last = to_next_line(dz); first < a.C; first = last) {
      last = std::min<int64_t>(a.C, last + kChunkBytes / sizeof(T));
      const bool reads = !steps.done();
      if (reads) steps.open_chunk();
      write_gradient(dz, first, last, At<A>{target.label, at_label}, past_cache, gradient, beside);
      if (reads) steps.close_chunk();
    }
    return steps.finish();  // the gradient may have had a chunk less, of which the first is longer
  };
  const auto likely = [=](int64_t i, int64_t n) __attribute__((always_inline)) { return vexp(load_some(z + i, n, most) - most) * factor; };
  const auto less_target = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    return minus_product(likely(i, n), soft_targets(a, target, i, n), splat<V>(k));
  };
  return has_soft_target(a) ? write(less_target) : write(likely);
}

// Rows of positions [first, last) under all noise samples.
template <class A>
struct RowBlock {
  int64_t first = 0, last = 0;
  Statistics<A> stats{};
};

// Statistics of the rows in `reads`, beside gradients of the rows in `writes`.
template <class T, class A>
void row_pass(const LossArguments<T, A>& a, const A* c, A scale, const RowBlock<A>& reads, const RowBlock<A>& writes) {
  const int64_t read = reads.last - reads.first, written = writes.last - writes.first;
  for (int64_t s = 0; s < a.S; ++s)
    for (int64_t j = 0; j < std::max(read, written); ++j) {
      const int64_t p = reads.first + j;
      Row<T> row;
      if (j < read && !a.ignored(p))
        row = {a.row(s, p), a.C, j + 1 < read ? a.row(s, p + 1) : a.row((s + 1) % a.S, s + 1 < a.S ? reads.first : reads.last)};
      const Softmax<A> softmax = j < written ? row_gradient(a, c, scale, writes.stats, s, writes.first + j, row) : row_softmax<T, A>(row);
      if (j < read) row_likelihood(a, c, reads.stats, s, p, softmax);
    }
  if (written > 0) end_of_streams();
}
