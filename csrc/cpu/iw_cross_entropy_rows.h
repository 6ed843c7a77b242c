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

// dz = factor * e, and minus k * (soft target) where there is one; dz may be e.
template <class T, class A>
void row_gradient(const LossArguments<T, A>& a, const Target<A>& target, const A* e, T* dz, A factor, A k) {
  if (!has_soft_target(a))
    for_each_vector<A>(a.C, [&](int64_t i, int n) { store_some(dz + i, load_some(e + i, n, A(0)) * factor, n); });
  else
    for_each_vector<A>(a.C, [&](int64_t i, int n) {
      store_some(dz + i, load_some(e + i, n, A(0)) * factor - soft_targets(a, target, i, n) * k, n);
    });
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

// Where the exponentials of a row are kept between the steps: in the gradient's own place where the type allows, else in the
// block's memory, else nowhere (null).
template <class T, class A>
inline A* kept_exponentials(const LossArguments<T, A>& a, const Statistics<A>& stats, int64_t s, int64_t p) {
  if constexpr (std::is_same_v<T, A>)
    return a.dlogits != nullptr ? a.drow(s, p) : nullptr;
  else
    return stats.e != nullptr ? stats.e + stats.at(s, p) * a.C : nullptr;
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
      row_gradient(a, target, e, dz, factor, k);
      if (target.label >= 0) dz[target.label] = from_acc<T>(at_label);
    }
}
