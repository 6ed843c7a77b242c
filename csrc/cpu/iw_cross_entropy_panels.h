// Rows side by side, lanes along positions or examples: for few classes, or for adjacent positions. Read once per instruction set
// by iw_cross_entropy_kernels.h.

// L adjacent positions of one example, or L examples without positions, and their targets: lane j is position first + j. Lanes that
// are left at the end repeat the last position.
template <class T, class A>
struct Panel {
  static constexpr int L = lanes<A>;
  int64_t first;
  int n;  // positions that are there
  Target<A> targets[L];
  alignas(64) A c[L], weight[L], hot[L], example_weight[L];
  vec_int<A> label;                          // -1 where there is none
  bool all_counted = true, ordinary = true;  // ordinary: every c is finite and not 0

  Panel(const LossArguments<T, A>& a, const A* c_of, int64_t p, int64_t last) : first(p) {
    const int64_t left = a.positions_each == 1 ? last - p : std::min(last - p, a.positions_each - p % a.positions_each);
    n = static_cast<int>(std::min<int64_t>(left, L));
    for (int j = 0; j < L; ++j) {
      const Target<A>& target = targets[j] = target_of(a, c_of, p + std::min(j, n - 1));
      c[j] = target.c;
      weight[j] = target.weight;
      hot[j] = target.weight * target.hot;
      example_weight[j] = a.example_weight_of(p + std::min(j, n - 1));
      label[j] = target.ignored ? -1 : static_cast<lane_int<A>>(target.label);
      all_counted = all_counted && !target.ignored;
      ordinary = ordinary && std::isfinite(c[j]) && c[j] != A(0);
    }
  }

  // tile [C, L] of one noise sample's logits
  void read(const LossArguments<T, A>& a, int64_t s, A* tile) const {
    const T* z = a.row(s, first);
    const int64_t step = a.lane_stride(), classes = a.C, class_stride = a.class_stride;
    if (step == 1 && n == L) {
      for (int64_t i = 0; i < classes; ++i) store(tile + i * L, load(z + i * class_stride));
    } else if (class_stride == 1) {
      for_each_vector<A>(classes, [&](int64_t i, int there) {
        vec<A> v[L];
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) v[j] = load_some(z + std::min(j, n - 1) * step + i, there, A(0));
        turn<A>(v);
        for (int k = 0; k < there; ++k) store(tile + (i + k) * L, v[k]);
      });
    } else {
      for (int j = 0; j < L; ++j)
        for (int64_t i = 0; i < classes; ++i) tile[i * L + j] = to_acc(z[std::min(j, n - 1) * step + i * class_stride]);
    }
  }
  // and back
  void write(const LossArguments<T, A>& a, int64_t s, const A* tile) const {
    T* dz = a.drow(s, first);
    const int64_t step = a.dlane_stride(), classes = a.C, class_stride = a.dclass_stride;
    if (step == 1 && n == L) {
      for (int64_t i = 0; i < classes; ++i) store(dz + i * class_stride, load(tile + i * L));
    } else if (class_stride == 1) {
      for_each_vector<A>(classes, [&](int64_t i, int there) {
        vec<A> v[L];
#pragma GCC unroll 16
        for (int k = 0; k < L; ++k) v[k] = load(tile + (i + std::min(k, there - 1)) * L);
        turn<A>(v);
        for (int j = 0; j < n; ++j) store_some(dz + j * step + i, v[j], there);
      });
    } else {
      for (int j = 0; j < n; ++j)
        for (int64_t i = 0; i < classes; ++i) dz[j * step + i * class_stride] = from_acc<T>(tile[i * L + j]);
    }
  }

  // -1 in the lanes whose label class i is
  vec_int<A> at_label(int64_t i) const { return label == static_cast<lane_int<A>>(i); }

  // the panel's part of a row of numbers, one for each position
  vec<A> lanes_of(const A* row) const { return load_some(row, n, A(1)); }
};

// Statistics of one noise sample of a panel; leaves exp(z - max) in the tile.
template <class T, class A>
void panel_statistics(const LossArguments<T, A>& a, const Panel<T, A>& panel, const Statistics<A>& stats, int64_t s, A* tile) {
  using V = vec<A>;
  constexpr int L = lanes<A>;
  panel.read(a, s, tile);
  V most = splat<V>(-std::numeric_limits<A>::infinity()), sum = splat<V>(A(0));
  V at_label = splat<V>(A(0));
  for (int64_t i = 0; i < a.C; ++i) {
    const V z = load(tile + i * L);
    most = vmax(z, most);
    at_label = select(panel.at_label(i), z, at_label);
  }
  alignas(64) A soft_likelihood[L];
  double weighted[L] = {}, alone[L] = {};  // sums of (soft target) * (z - max), and of the soft target
  if (has_soft_target(a))
    for (int64_t i = 0; i < a.C; ++i)
      for (int j = 0; j < L; ++j) {
        const double soft = soft_target(a, panel.targets[j], i);
        weighted[j] += soft * (tile[i * L + j] - most[j]);
        alone[j] += soft;
      }
  for (int64_t i = 0; i < a.C;) {  // a partial sum for every 64 classes keeps rounding errors from growing with their number
    V part = splat<V>(A(0));
    for (const int64_t stop = std::min(a.C, i + 64); i < stop; ++i) {
      const V e = vexp(load(tile + i * L) - most);
      store(tile + i * L, e);
      part += e;
    }
    sum += part;
  }
  const V log_sum = vlog(sum);
  V u = splat<V>(A(0));
  if (a.labels != nullptr) u = load(panel.hot) * ((at_label - most) - log_sum);
  if (has_soft_target(a)) {
    for (int j = 0; j < L; ++j) soft_likelihood[j] = static_cast<A>(weighted[j] - alone[j] * log_sum[j]);
    u += load(panel.weight) * load(soft_likelihood);
  }
  if (!a.shares_weights() && panel.ordinary) u = u / load(panel.c);
  const int64_t at = stats.at(s, panel.first);
  store_some(stats.max + at, most, panel.n);
  store_some(stats.sum + at, sum, panel.n);
  A* likelihood = &stats.likelihood(s, panel.first);
  store_some(likelihood, u, panel.n);
  if (panel.ordinary) return;  // an ignored position has no weight
  for (int j = 0; j < panel.n; ++j) {
    if (panel.targets[j].ignored) likelihood[j] = A(0);
    else if (!a.shares_weights()) likelihood[j] = unit_log_likelihood(likelihood[j], panel.c[j]);
  }
}

// Gradient of one noise sample of a panel whose tile holds exp(z - max).
template <class T, class A>
void panel_gradient(const LossArguments<T, A>& a, const Panel<T, A>& panel, A scale, const Statistics<A>& stats, int64_t s, A* tile) {
  using V = vec<A>;
  constexpr int L = lanes<A>;
  const A* w = a.weights + s * a.units();
  const V weight = a.shares_weights() ? splat<V>(w[panel.first / a.positions_each]) : load_some(w + panel.first, panel.n, A(0));
  const V k = weight * splat<V>(scale) * load(panel.example_weight), of_label = k * load(panel.hot);
  const int64_t at = stats.at(s, panel.first);
  const V factor = row_factor(a, k, load(panel.c), load(panel.example_weight) * load(panel.weight), scale, panel.lanes_of(stats.max + at),
                              panel.lanes_of(stats.sum + at));
  for (int64_t i = 0; i < a.C; ++i) store(tile + i * L, load(tile + i * L) * factor - masked<A>(panel.at_label(i), of_label));
  if (has_soft_target(a))
    for (int64_t i = 0; i < a.C; ++i)
      for (int j = 0; j < panel.n; ++j) tile[i * L + j] -= k[j] * panel.weight[j] * soft_target(a, panel.targets[j], i);
  if (!panel.all_counted)
    for (int j = 0; j < panel.n; ++j)
      if (panel.targets[j].ignored)
        for (int64_t i = 0; i < a.C; ++i) tile[i * L + j] = A(0);
  panel.write(a, s, tile);
}
