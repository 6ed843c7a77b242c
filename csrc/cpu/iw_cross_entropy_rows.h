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

// The sum of exp(z[i] - most). Meanwhile as much of what is read next comes from `ahead` in memory, which waits for nothing here.
template <class T, class A>
A sum_of_exponentials(const T* z, int64_t n, A most, const T* ahead) {
  using V = vec<A>;
  constexpr int L = lanes<A>, kLine = kLineBytes / static_cast<int>(sizeof(T));
  V sum = splat<V>(A(0));
  int64_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    __builtin_prefetch(ahead + i, 0, 2);  // to the second level: the first holds what is worked on
#pragma GCC unroll 8
    for (int k = 0; k < kLine; k += L) sum += vexp(load(z + i + k) - most);
  }
  for (; i < n; i += L) sum += vexp(load_some(z + i, n - i, -std::numeric_limits<A>::infinity()) - most);
  return horizontal_sum(sum);
}

// A row comes in chunks that the first level of a cache holds between the search for the maximum and the sum.
constexpr int64_t kChunkBytes = 64 * kLineBytes, kAheadBytes = 2 * kChunkBytes;

template <class A>
struct Softmax {
  A most, sum;  // the maximum, and the sum of exp(z[i] - most)
};

// Of a row of n classes, before the row that begins at `next` is read.
template <class T, class A>
Softmax<A> softmax_of(const T* z, int64_t n, const T* next) {
  constexpr int64_t kChunk = kChunkBytes / sizeof(T);
  const int64_t distance = std::min<int64_t>(n, kAheadBytes / sizeof(T));
  A most = -std::numeric_limits<A>::infinity();
  double sum = 0;  // in double, rounding errors do not grow with the number of chunks
  for (int64_t i = 0; i < n; i += kChunk) {
    const int64_t size = std::min(kChunk, n - i), ahead = i + distance;
    const A here = maximum<T, A>(z + i, size);
    if (here > most) {
      if (i > 0) sum *= std::exp(static_cast<double>(most) - here);
      most = here;
    }
    // So far only -infinity, and maybe NaN, which has to be found: -infinity less itself would be one too.
    const A base = most == -std::numeric_limits<A>::infinity() ? A(0) : most;
    sum += sum_of_exponentials(z + i, size, base, ahead < n ? z + ahead : next + (ahead - n));
  }
  return {most, static_cast<A>(sum)};
}

// dz[i] = gradient(i, n), the n <= L values from class i on, for classes [first, last). `kPastCache`: whole lines, past the caches.
// fetch(i) comes before each line of them.
template <bool kPastCache, class A, class T, class Gradient, class Fetch>
[[gnu::always_inline]] inline void gradient_lines(T* dz, int64_t first, int64_t last, const Gradient gradient, const Fetch fetch) {
  constexpr int L = lanes<A>, kLine = kLineBytes / static_cast<int>(sizeof(T));
  int64_t i = first;
  for (; i + kLine <= last; i += kLine) {
    fetch(i);
    vec<A> v[kLine / L];
#pragma GCC unroll 16
    for (int k = 0; k < kLine; k += L) v[k / L] = gradient(i + k, L);
#pragma GCC unroll 16
    for (int k = 0; k < kLine; k += lanes<T>) {
      if constexpr (kPastCache)
        stream(dz + i + k, rounded<T>(v + k / L));
      else
        put(dz + i + k, rounded<T>(v + k / L));
    }
  }
  if constexpr (!kPastCache)
    for (; i < last; i += L) {
      const int64_t n = std::min<int64_t>(L, last - i);
      store_some(dz + i, gradient(i, n), n);
    }
}

// The same for all classes, with `at_label` in the label's place (-1: none). dz may be what gradient reads at the same place.
template <class A, class T, class Gradient, class Fetch>
[[gnu::always_inline]] inline void write_gradient(T* dz, int64_t classes, int64_t label, A at_label, bool past_cache,
                                                  const Gradient& gradient, const Fetch& fetch) {
  constexpr int kLine = kLineBytes / static_cast<int>(sizeof(T));
  int64_t head = classes, tail = classes;  // whole lines from head to tail go past the caches
  if (past_cache) {
    const auto past = static_cast<int64_t>(reinterpret_cast<std::size_t>(dz) % kLineBytes / sizeof(T));  // elements of the line before
    head = std::min<int64_t>(classes, (kLine - past) % kLine), tail = head + (classes - head) / kLine * kLine;
    if (tail < classes) __builtin_prefetch(dz + tail, 1);  // the one line here that is read before it is written
  }
  gradient_lines<false, A>(dz, 0, head, gradient, fetch);
  if (label >= head && label < tail) {  // a line that is both streamed and written would be read back: the label's is put together first
    const int64_t at = label - (label - head) % kLine;
    gradient_lines<true, A>(dz, head, at, gradient, fetch);
    const auto with_label = [=](int64_t i, int64_t n) __attribute__((always_inline)) {
      return with_lane<A>(gradient(i, n), label - i, at_label);
    };
    gradient_lines<true, A>(dz, at, at + kLine, with_label, fetch);
    gradient_lines<true, A>(dz, at + kLine, tail, gradient, fetch);
  } else {
    gradient_lines<true, A>(dz, head, tail, gradient, fetch);
  }
  gradient_lines<false, A>(dz, tail, classes, gradient, fetch);
  if (label >= tail || (label >= 0 && label < head)) dz[label] = from_acc<T>(at_label);
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

template <class T, class A>
void row_statistics(const LossArguments<T, A>& a, const A* c, const Statistics<A>& stats, int64_t first, int64_t last) {
  for (int64_t s = 0; s < a.S; ++s)
    for (int64_t p = first; p < last; ++p) {
      const Target<A> target = target_of(a, c, p);
      A u = A(0);
      if (!target.ignored) {
        const T* z = a.row(s, p);
        const T* next = p + 1 < last ? a.row(s, p + 1) : a.row((s + 1) % a.S, s + 1 < a.S ? first : last);
        const auto [most, sum] = softmax_of<T, A>(z, a.C, next);
        const A log_sum = std::log(sum);
        // u = sum_c q v log p, each term relative to the maximum first, which is exact where logits are large.
        if (target.label >= 0) u = target.hot * (to_acc(z[target.label]) - most - log_sum);
        if (has_soft_target(a)) {
          double weighted, alone;
          soft_sums(a, target, z, most, weighted, alone);
          u += static_cast<A>(weighted - alone * log_sum);
        }
        u *= target.weight;
        stats.max[stats.at(s, p)] = most;
        stats.sum[stats.at(s, p)] = sum;
      }
      stats.likelihood(s, p) = a.shares_weights() ? u : unit_log_likelihood(u, target.c);
    }
}

constexpr int64_t kReadAheadBytes = 256 * 1024;  // of logits in a block
constexpr int64_t kNearBytes = 16 * kLineBytes;          // from the second level to the first

// The exponentials are taken anew: that costs less than memory to keep them in, beside logits that are in cache and a gradient that
// waits for its place in memory.
template <class T, class A>
void row_gradients(const LossArguments<T, A>& a, const A* c, A scale, const Statistics<A>& stats, int64_t first, int64_t last) {
  using V = vec<A>;
  const bool past_cache = streams_gradient(a);
  // The next block's rows come from memory while these go there. Of a block that fills the second level, the next lines of the row itself
  // come from there: stores past the caches keep what the first level would fetch them with (32000 classes, float32: 0.85 of the time
  // where the logits were in the third level, 0.95 where they were in memory).
  const int64_t block = last - first;
  const bool read_ahead = block * a.S * a.C * static_cast<int64_t>(sizeof(T)) <= kReadAheadBytes;
  for (int64_t s = 0; s < a.S; ++s)
    for (int64_t p = first; p < last; ++p) {
      T* dz = a.drow(s, p);
      const Target<A> target = target_of(a, c, p);
      const A w = a.weight(s, p);
      if (target.ignored || w == A(0)) {  // a row of no weight is finite: NaN would have made the weight NaN
        std::fill(dz, dz + a.C, T{});
        continue;
      }
      const T* z = a.row(s, p);
      const A most = stats.max[stats.at(s, p)], outside = w * scale * a.example_weight_of(p), k = outside * target.weight;
      const A factor = outside * target.c / stats.sum[stats.at(s, p)];
      A at_label = A(0);
      if (target.label >= 0) {  // before dz, which may be the same memory, is written
        at_label = vexp(splat<V>(to_acc(z[target.label]) - most))[0] * factor - k * target.hot;
        if (a.smoothing > 0) at_label -= k * soft_target(a, target, target.label);
      }
      const T* next = p + block < a.positions() ? a.row(s, p + block) : z;
      // NOTE [always_inline]
      // g++ 12 takes a function that only prefetches for one without effect, and drops the calls; and what it does not inline here
      // comes to the loops through memory, in a row behind the stores.
      const auto from_memory = [=](int64_t i) __attribute__((always_inline)) { __builtin_prefetch(next + i, 0, 2); };
      const auto from_cache = [=](int64_t i) __attribute__((always_inline)) { __builtin_prefetch(z + i + kNearBytes / sizeof(T), 0, 3); };
      const auto write = [&](const auto& gradient) __attribute__((always_inline)) {
        if (read_ahead)
          write_gradient(dz, a.C, target.label, at_label, past_cache, gradient, from_memory);
        else
          write_gradient(dz, a.C, target.label, at_label, past_cache, gradient, from_cache);
      };
      const auto likely = [=](int64_t i, int64_t n) __attribute__((always_inline)) {
        return vexp(load_some(z + i, n, most) - most) * factor;
      };
      if (has_soft_target(a))
        write([&](int64_t i, int64_t n) __attribute__((always_inline)) {
          return minus_product(likely(i, n), soft_targets(a, target, i, n), splat<V>(k));
        });
      else
        write(likely);
    }
  end_of_streams();
}
