// Rows of many adjacent classes, lanes along the classes. Read once per instruction set by iw_cross_entropy_kernels.h.

template <class T, class A>
A maximum(const T* z, int64_t n) {
  using V = vec<A>;
  constexpr int L = lanes<A>;
  V m[4];  // four chains hide the latency of max
  for (V& v : m) v = splat<V>(-std::numeric_limits<A>::infinity());
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
    for (int k = 0; k < 4; ++k) m[k] = vmax(load(z + i + k * L), m[k]);
  for (; i + L <= n; i += L) m[0] = vmax(load(z + i), m[0]);
  A most = horizontal_max(vmax(vmax(m[0], m[1]), vmax(m[2], m[3])));
  for (; i < n; ++i) most = std::max(most, to_acc(z[i]));  // NaN does not count here: it comes in through the sum
  return most;
}

// The sum of e[i] = exp(z[i] - most); e may be z, or null.
template <class T, class A>
A exponentials(const T* z, int64_t n, A most, A* e) {
  using V = vec<A>;
  constexpr int L = lanes<A>;
  V total = splat<V>(A(0));
  int64_t i = 0;
  while (i + L <= n) {  // a partial sum for every 64 vectors keeps rounding errors from growing with n
    V part = splat<V>(A(0));
    const int64_t stop = std::min(n - L + 1, i + 64 * L);
    if (e != nullptr)
      for (; i < stop; i += L) {
        const V value = vexp(load(z + i) - most);
        store(e + i, value);
        part += value;
      }
    else
      for (; i < stop; i += L) part += vexp(load(z + i) - most);
    total += part;
  }
  A sum = horizontal_sum(total);
  if (i < n) {
    const V value = vexp(load_some(z + i, n - i, -std::numeric_limits<A>::infinity()) - most);
    if (e != nullptr) store_some(e + i, value, n - i);
    sum += horizontal_sum(value);
  }
  return sum;
}

// dz[i] = gradient(i, n), the n <= L values from class i on, with `at_label` in the label's place (-1: none). dz may be what gradient
// reads. Where `past_cache`, whole vectors go past the caches.
template <class A, class T, class Gradient>
void write_gradient(T* dz, int64_t classes, int64_t label, A at_label, bool past_cache, const Gradient& gradient) {
  constexpr int64_t L = lanes<A>;
  if (!past_cache) {
    for_each_vector<A>(classes, [&](int64_t i, int n) { store_some(dz + i, gradient(i, n), n); });
    if (label >= 0) dz[label] = from_acc<T>(at_label);
    return;
  }
  const auto single = [&](int64_t i, int64_t stop) {
    if (i < stop) store_some(dz + i, gradient(i, stop - i), stop - i);
    if (label >= i && label < stop) dz[label] = from_acc<T>(at_label);
  };
  // A line that is both streamed and written would be read back: the label's vector is put together first.
  constexpr std::size_t kLine = L * sizeof(T);
  const int64_t head = std::min<int64_t>(classes, (kLine - reinterpret_cast<std::size_t>(dz) % kLine) % kLine / sizeof(T));
  const int64_t vectors = (classes - head) / L, of_label = label >= head ? (label - head) / L : vectors;
  const auto streams = [&](int64_t first, int64_t last) {
    for (int64_t i = head + first * L; i < head + last * L; i += L) stream(dz + i, gradient(i, L));
  };
  single(0, head);
  streams(0, std::min(of_label, vectors));
  if (of_label < vectors) {
    vec<A> v = gradient(head + of_label * L, L);
    v[(label - head) % L] = at_label;
    stream(dz + head + of_label * L, v);
    streams(of_label + 1, vectors);
  }
  single(head + vectors * L, classes);
}

// sum over classes of (soft target) * (z - most), and of the soft target alone.
template <class T, class A>
void soft_sums(const LossArguments<T, A>& a, const Target<A>& target, const T* z, A most, A& weighted, A& alone) {
  vec<A> x{}, y{};
  for_each_vector<A>(a.C, [&](int64_t i, int n) {
    const vec<A> soft = soft_targets(a, target, i, n);  // 0 for a class that is not there
    x += soft * (load_some(z + i, n, most) - most);
    y += soft;
  });
  weighted = horizontal_sum(x);
  alone = horizontal_sum(y);
}

// Where the exponentials of a row are kept between the steps: in the block's memory if it has some, else in the gradient's own place
// where the type allows, else nowhere (null).
template <class T, class A>
inline A* kept_exponentials(const LossArguments<T, A>& a, const Statistics<A>& stats, int64_t s, int64_t p) {
  if (stats.e != nullptr) return stats.e + stats.at(s, p) * a.C;
  if constexpr (std::is_same_v<T, A>) return a.dlogits != nullptr ? a.drow(s, p) : nullptr;
  return nullptr;
}

template <class T, class A>
void row_statistics(const LossArguments<T, A>& a, const A* c, const Statistics<A>& stats, int64_t first, int64_t last) {
  for (int64_t s = 0; s < a.S; ++s)
    for (int64_t p = first; p < last; ++p) {
      const Target<A> target = target_of(a, c, p);
      A u = A(0);
      if (!target.ignored) {
        const T* z = a.row(s, p);
        const A most = maximum<T, A>(z, a.C);
        // u = sum_c q v log p, each term relative to the maximum first, which is exact where logits are large. Taken before the
        // exponentials, which may go to the same memory.
        const A at_label = target.label >= 0 ? to_acc(z[target.label]) - most : A(0);
        A weighted = A(0), alone = A(0);
        if (has_soft_target(a)) soft_sums(a, target, z, most, weighted, alone);
        const A sum = exponentials(z, a.C, most, kept_exponentials(a, stats, s, p)), log_sum = std::log(sum);
        if (target.label >= 0) u = target.hot * (at_label - log_sum);
        if (has_soft_target(a)) u += weighted - alone * log_sum;
        u *= target.weight;
        stats.max[stats.at(s, p)] = most;
        stats.sum[stats.at(s, p)] = sum;
      }
      stats.likelihood(s, p) = a.shares_weights() ? u : unit_log_likelihood(u, target.c);
    }
}

template <class T, class A>
void row_gradients(const LossArguments<T, A>& a, const A* c, A scale, const Statistics<A>& stats, int64_t first, int64_t last) {
  std::vector<A> memory;
  for (int64_t s = 0; s < a.S; ++s)
    for (int64_t p = first; p < last; ++p) {
      T* dz = a.drow(s, p);
      const Target<A> target = target_of(a, c, p);
      const A w = a.weight(s, p);
      if (target.ignored || w == A(0)) {  // a row of no weight is finite: NaN would have made the weight NaN
        std::fill(dz, dz + a.C, T{});
        continue;
      }
      const A outside = w * scale * a.example_weight_of(p), k = outside * target.weight;
      const A factor = outside * target.c / stats.sum[stats.at(s, p)];
      A* e = kept_exponentials(a, stats, s, p);
      if (e == nullptr) {
        memory.resize(a.C);
        e = memory.data();
        exponentials(a.row(s, p), a.C, stats.max[stats.at(s, p)], e);
      }
      A at_label = A(0);
      if (target.label >= 0) {  // read before dz, which may be the same memory, is written
        at_label = e[target.label] * factor - k * target.hot;
        if (a.smoothing > 0) at_label -= k * soft_target(a, target, target.label);
      }
      const bool past_cache = stats.e != nullptr && streams_gradient(a);
      if (has_soft_target(a))
        write_gradient(dz, a.C, target.label, at_label, past_cache,
                       [&](int64_t i, int64_t n) {
                         return minus_product(load_some(e + i, n, A(0)) * factor, soft_targets(a, target, i, n), splat<vec<A>>(k));
                       });
      else
        write_gradient(dz, a.C, target.label, at_label, past_cache, [&](int64_t i, int64_t n) { return load_some(e + i, n, A(0)) * factor; });
    }
  end_of_streams();
}
