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
  int64_t label[L];
  bool all_counted = true;

  Panel(const LossArguments<T, A>& a, const A* c_of, int64_t p, int64_t last) : first(p) {
    const int64_t left = a.positions_each == 1 ? last - p : std::min(last - p, a.positions_each - p % a.positions_each);
    n = static_cast<int>(std::min<int64_t>(left, L));
    for (int j = 0; j < L; ++j) {
      const Target<A>& target = targets[j] = target_of(a, c_of, p + std::min(j, n - 1));
      c[j] = target.c;
      weight[j] = target.weight;
      hot[j] = target.weight * target.hot;
      example_weight[j] = a.example_weight_of(p + std::min(j, n - 1));
      label[j] = target.ignored || target.label < 0 ? 0 : target.label;
      all_counted = all_counted && !target.ignored;
    }
  }

  // tile [C, L] of one noise sample's logits
  void read(const LossArguments<T, A>& a, int64_t s, A* tile) const {
    const T* z = a.row(s, first);
    const int64_t step = a.lane_stride(), classes = a.C, class_stride = a.class_stride;
    if (step == 1 && n == L) {
      for (int64_t i = 0; i < classes; ++i) store(tile + i * L, load(z + i * class_stride));
      return;
    }
    // Turned as they are, in the upper part of the tile's memory, and then converted vector by vector from its lower end on.
    T* turned = reinterpret_cast<T*>(tile + classes * L) - classes * L;
    for (int j = 0; j < L; ++j) {
      const T* row = z + std::min(j, n - 1) * step;
      for (int64_t i = 0; i < classes; ++i) turned[i * L + j] = row[i * class_stride];
    }
    if constexpr (!std::is_same_v<T, A>)
      for (int64_t i = 0; i < classes; ++i) store(tile + i * L, load(turned + i * L));
  }
  // and back; the tile's memory is used up
  void write(const LossArguments<T, A>& a, int64_t s, A* tile) const {
    T* dz = a.drow(s, first);
    const int64_t step = a.dlane_stride(), classes = a.C, class_stride = a.dclass_stride;
    if (step == 1 && n == L) {
      for (int64_t i = 0; i < classes; ++i) store(dz + i * class_stride, load(tile + i * L));
      return;
    }
    T* turned = reinterpret_cast<T*>(tile);
    if constexpr (!std::is_same_v<T, A>)
      for (int64_t i = 0; i < classes; ++i) store(turned + i * L, load(tile + i * L));
    for (int j = 0; j < n; ++j) {
      T* row = dz + j * step;
      for (int64_t i = 0; i < classes; ++i) row[i * class_stride] = turned[i * L + j];
    }
  }

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
  for (int64_t i = 0; i < a.C; ++i) most = vmax(load(tile + i * L), most);
  alignas(64) A at_label[L], soft_likelihood[L];
  for (int j = 0; j < L; ++j) at_label[j] = tile[panel.label[j] * L + j];
  double weighted[L] = {}, alone[L] = {};  // sums of (soft target) * (z - max), and of the soft target
  if (has_soft_target(a))
    for (int64_t i = 0; i < a.C; ++i)
      for (int j = 0; j < L; ++j) {
        const double soft = soft_target(a, panel.targets[j], i);
        weighted[j] += soft * (tile[i * L + j] - most[j]);
        alone[j] += soft;
      }
  for (int64_t i = 0; i < a.C; ++i) {
    const V e = vexp(load(tile + i * L) - most);
    store(tile + i * L, e);
    sum += e;
  }
  const V log_sum = vlog(sum);
  V u = splat<V>(A(0));
  if (a.labels != nullptr) u = load(panel.hot) * ((load(at_label) - most) - log_sum);
  if (has_soft_target(a)) {
    for (int j = 0; j < L; ++j) soft_likelihood[j] = static_cast<A>(weighted[j] - alone[j] * log_sum[j]);
    u += load(panel.weight) * load(soft_likelihood);
  }
  if (!a.shares_weights()) u = select(load(panel.c) > splat<V>(A(0)), u / load(panel.c), u);
  const int64_t at = stats.at(s, panel.first);
  store_some(stats.max + at, most, panel.n);
  store_some(stats.sum + at, sum, panel.n);
  A* likelihood = &stats.likelihood(s, panel.first);
  store_some(likelihood, u, panel.n);
  if (!panel.all_counted)
    for (int j = 0; j < panel.n; ++j)
      if (panel.targets[j].ignored) likelihood[j] = A(0);
}

// Gradient of one noise sample of a panel whose tile holds exp(z - max).
template <class T, class A>
void panel_gradient(const LossArguments<T, A>& a, const Panel<T, A>& panel, A scale, const Statistics<A>& stats, int64_t s, A* tile) {
  constexpr int L = lanes<A>;
  alignas(64) A k[L];
  for (int j = 0; j < L; ++j) k[j] = j < panel.n ? a.weight(s, panel.first + j) * scale * panel.example_weight[j] : A(0);
  const vec<A> factor = load(k) * load(panel.c) / panel.lanes_of(stats.sum + stats.at(s, panel.first));
  for (int64_t i = 0; i < a.C; ++i) store(tile + i * L, load(tile + i * L) * factor);
  if (a.labels != nullptr)
    for (int j = 0; j < panel.n; ++j) tile[panel.label[j] * L + j] -= k[j] * panel.hot[j];
  if (has_soft_target(a))
    for (int64_t i = 0; i < a.C; ++i)
      for (int j = 0; j < panel.n; ++j) tile[i * L + j] -= k[j] * panel.weight[j] * soft_target(a, panel.targets[j], i);
  if (!panel.all_counted)
    for (int j = 0; j < panel.n; ++j)
      if (panel.targets[j].ignored)
        for (int64_t i = 0; i < a.C; ++i) tile[i * L + j] = A(0);
  panel.write(a, s, tile);
}
