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

// The sum of exp(z[i] - most). Meanwhile the row that is read next comes from memory, which waits for nothing here.
template <class T, class A>
A sum_of_exponentials(const T* z, int64_t n, A most, const T* next) {
  using V = vec<A>;
  constexpr int L = lanes<A>, kLine = kLineBytes / static_cast<int>(sizeof(T));
  V total = splat<V>(A(0));
  int64_t i = 0;
  while (i + kLine <= n) {  // a partial sum for every 64 lines keeps rounding errors from growing with n
    V part = splat<V>(A(0));
    for (const int64_t stop = std::min(n - kLine + 1, i + 64 * kLine); i < stop; i += kLine) {
      __builtin_prefetch(next + i, 0, 2);  // to the second level: the first holds this row
#pragma GCC unroll 8
      for (int k = 0; k < kLine; k += L) part += vexp(load(z + i + k) - most);
    }
    total += part;
  }
  for (; i < n; i += L) total += vexp(load_some(z + i, n - i, -std::numeric_limits<A>::infinity()) - most);
  return horizontal_sum(total);
}

// dz[i] = gradient(i, n), the n <= L values from class i on, with `at_label` in the label's place (-1: none). dz may be what gradient
// reads at the same place. Where `past_cache`, whole lines go past the caches.
template <class A, class T, class Gradient>
void write_gradient(T* dz, int64_t classes, int64_t label, A at_label, bool past_cache, const Gradient& gradient) {
  constexpr int L = lanes<A>, kLine = kLineBytes / static_cast<int>(sizeof(T));
  const auto single = [&](int64_t i, int64_t stop) {
    for_each_vector<A>(stop - i, [&](int64_t j, int n) { store_some(dz + i + j, gradient(i + j, n), n); });
    if (label >= i && label < stop) dz[label] = from_acc<T>(at_label);
  };
  if (!past_cache) return single(0, classes);
  vec<A> v[kLine / L];
  const auto take = [&](int64_t i) {
#pragma GCC unroll 16
    for (int k = 0; k < kLine; k += L) v[k / L] = gradient(i + k, L);
  };
  const auto give = [&](int64_t i) {
#pragma GCC unroll 16
    for (int k = 0; k < kLine; k += lanes<T>) stream(dz + i + k, rounded<T>(v + k / L));
  };
  const auto streams = [&](int64_t i, int64_t stop) {
    for (; i < stop; i += kLine) {
      take(i);
      give(i);
    }
  };
  const auto past = static_cast<int64_t>(reinterpret_cast<std::size_t>(dz) % kLineBytes / sizeof(T));  // elements of the line before
  const int64_t head = std::min<int64_t>(classes, (kLine - past) % kLine), tail = head + (classes - head) / kLine * kLine;
  if (tail < classes) __builtin_prefetch(dz + tail, 1);  // the one line here that is read before it is written
  single(0, head);
  if (label >= head && label < tail) {  // a line that is both streamed and written would be read back: the label's is put together first
    const int64_t at = label - (label - head) % kLine;
    streams(head, at);
    take(at);
    for (int k = 0; k < kLine; k += L) v[k / L] = with_lane<A>(v[k / L], label - at - k, at_label);
    give(at);
    streams(at + kLine, tail);
  } else {
    streams(head, tail);
  }
  single(tail, classes);
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
        const A most = maximum<T, A>(z, a.C), sum = sum_of_exponentials(z, a.C, most, next), log_sum = std::log(sum);
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

// The exponentials are taken anew: that costs less than memory to keep them in, beside logits that are in cache and a gradient that
// waits for its place in memory.
template <class T, class A>
void row_gradients(const LossArguments<T, A>& a, const A* c, A scale, const Statistics<A>& stats, int64_t first, int64_t last) {
  using V = vec<A>;
  const bool past_cache = streams_gradient(a);
  // The next block's rows come from memory while these go there, if the second level holds both: 9% at 1000 classes.
  const int64_t block = last - first;
  const bool read_ahead = block * a.S * a.C * static_cast<int64_t>(sizeof(T)) <= 4 * kBlockBytes;
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
      const T* ahead = read_ahead && p + block < a.positions() ? a.row(s, p + block) : z;
      const auto likely = [=](int64_t i, int64_t n) {
        __builtin_prefetch(ahead + i, 0, 2);
        return vexp(load_some(z + i, n, most) - most) * factor;
      };
      if (has_soft_target(a))
        write_gradient(dz, a.C, target.label, at_label, past_cache,
                       [&](int64_t i, int64_t n) { return minus_product(likely(i, n), soft_targets(a, target, i, n), splat<V>(k)); });
      else
        write_gradient(dz, a.C, target.label, at_label, past_cache, likely);
    }
  end_of_streams();
}
