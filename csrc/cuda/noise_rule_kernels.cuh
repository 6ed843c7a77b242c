// The noise kernels for a threshold of every position, which noise_kernels.cuh leaves out. A thread reads and writes its own pack;
// nothing passes between threads.
#pragma once
#include <cmath>

#include "noise_kernels.cuh"

namespace iwsgd {

// 1 / d, rounded once, of the integers d in [1, kFieldRange]. A GPU's reciprocal is within one unit in the
// last place; of each of the three numbers that it may be, `refined` makes the nearest one (csrc/test/cuda_noise.cpp tries all).
IWSGD_HD float refined(float reciprocal, float d) { return std::fma(std::fma(-d, reciprocal, 1.0f), reciprocal, reciprocal); }

// scale times the inverse of the probability that an element is kept.
template <class A>
IWSGD_HD A kept_factor(A scale, int32_t threshold) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<A, float>) {  // keep_scale by a reciprocal; a power of two: the same in both orders
    const float d = static_cast<float>(std::max(int32_t(kFieldRange) - threshold, 1));
    return refined(fast_reciprocal(d), d) * (scale * float(kFieldRange));
  }
#endif
  return scale * keep_scale<A>(threshold);
}

// A thread's pack under one noise sample after the other. kGroups: packs are known to be groups of the generator, whose thresholds lie in
// two accesses of 16 bytes; they and the factors are then read once for all samples that share them.
template <class T, bool kGroups>
struct PackRule {
  using A = acc_t<T>;
  const NoiseWork& work;
  const PackPlace place;
  Elements<int32_t, 4> thresholds[2];  // where kGroups
  const PackNoise<kGroups> noise;
  const Affine<T>& map;
  const bool by_sample;  // each sample has thresholds of its own
  A factor[kGroup];      // of element j where it is kept

  // first: the first noise sample. Its thresholds are loaded before the keys are waited for.
  IWSGD_HD PackRule(const NoiseWork& work, const Affine<T>& map, const PackPlace& place, int first)
      : work(work), place(place), noise((load_thresholds(first), work), place), map(map),
        by_sample(!kGroups || (work.rule.threshold_rows != 1 && work.rule.threshold_rows != work.call.layout.examples)) {
    set_factors();
  }

  // Goes on to noise sample s, which has thresholds of its own.
  IWSGD_HD void next(int s) {
    if constexpr (kGroups) {
      load_thresholds(s);
      set_factors();
    }
  }

  // Bit j: whether element j is kept.
  IWSGD_HD uint32_t draw(int s) {
    const Layout& layout = work.call.layout;
    const uint32_t sample = work.call.address.of_row(s, place.b, layout.examples).sample;
    Words words = philox(noise.group, noise.row.example, sample, noise.keys);
    uint32_t kept = 0;
    if constexpr (kGroups) {
      IWSGD_UNROLL
      for (int j = 0; j < kGroup; ++j) kept |= static_cast<uint32_t>(keep(static_cast<int32_t>(field(words, j)), threshold(j))) << j;
      return kept;
    }
    const int32_t* thresholds = of_row(s);
    int64_t at = noise.position, same = noise.left;
    IWSGD_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      const int32_t threshold = thresholds[at];
      const int within = static_cast<int>(at % kGroup);
      uint32_t word = words.w[0];  // chosen by comparisons: an index that is not known would put the words into memory
      IWSGD_UNROLL
      for (int w = 1; w < 4; ++w) word = within / 2 == w ? words.w[w] : word;
      const uint32_t drawn = within % 2 ? word >> 16 : word & 0xFFFFu;
      kept |= static_cast<uint32_t>(keep(static_cast<int32_t>(drawn), threshold)) << j;
      factor[j] = kept_factor(map.scale, threshold);
      if (--same > 0) continue;
      same = layout.share;
      const int64_t before = at++;
      if (at == layout.positions) at = 0;
      if (at / kGroup != before / kGroup)
        words = philox(Group(static_cast<uint32_t>(at / kGroup), noise.row.stream, noise.keys), noise.row.example, sample, noise.keys);
    }
    return kept;
  }

 private:
  IWSGD_HD const int32_t* of_row(int s) const {
    return work.rule.of_row(s, place.b, work.call.layout.examples, work.call.layout.positions);
  }
  IWSGD_HD int32_t threshold(int j) const { return thresholds[j / 4].e[j % 4]; }

  IWSGD_HD void load_thresholds(int s) {
    int64_t position = place.index;
    if constexpr (kGroups) {
      if (work.wraps) position -= work.by_positions(position) * work.call.layout.positions;
      IWSGD_UNROLL
      for (int i = 0; i < 2; ++i) thresholds[i] = load_constant<int32_t, 4>(of_row(s) + position + 4 * i);
    }
  }

  IWSGD_HD void set_factors() {
    if constexpr (kGroups) {
      IWSGD_UNROLL
      for (int j = 0; j < kGroup; ++j) factor[j] = kept_factor(map.scale, threshold(j));
    }
  }
};

template <class T, int V, bool kGroups, bool kExpand>
IWSGD_HD void noise_rule_fwd(const NoiseWork& work, const T* x, T* y, const Affine<T>& map, int part, int64_t block, int which,
                             int thread) {
  constexpr int kSlots = kGroup / V;
  const PackPlace place(work, block * kBlock + thread, std::bool_constant<kGroups>{});
  if (place.count == 0) return;
  const int begin = which * part, end = std::min(begin + part, static_cast<int>(work.call.samples));
  const int64_t row = place.y + begin * work.step;  // in [O, K*B, I], of the first sample
  const T* from = x + (kExpand ? place.x : row);
  T* to = y + row;
  Elements<T, V> read[kSlots], values[kSlots];
  const auto read_all = [&] {
    IWSGD_UNROLL
    for (int k = 0; k < kSlots; ++k)
      if (kGroups || k * V < place.count) read[k] = load<T, V>(from + k * V);
    from += work.step;
  };
  read_all();
  PackRule<T, kGroups> rule(work, map, place, begin);
  const auto map_all = [&] {
    IWSGD_UNROLL
    for (int k = 0; k < kSlots; ++k) {
      const auto becomes = [&](int j) { return element(read[k], j) * rule.factor[k * V + j] + map.shift; };
      values[k] = scaled<T, V>(becomes, acc_t<T>(1));
    }
  };
  if constexpr (kGroups && kExpand) map_all();
  IWSGD_UNROLL_BY(1)
  for (int s = begin; s < end; ++s) {
    if (s > begin) {
      if constexpr (!kExpand) read_all();
      if (rule.by_sample) {
        rule.next(s);
        if constexpr (kGroups && kExpand) map_all();
      }
    }
    const uint32_t kept = rule.draw(s);
    if constexpr (!kGroups || !kExpand) map_all();
    IWSGD_UNROLL
    for (int k = 0; k < kSlots; ++k)
      if (kGroups || k * V < place.count) store<T, V>(to + k * V, masked<T, V>(values[k], kept >> (k * V), map.fill));
    to += work.step;
  }
}

template <class T, int V, bool kGroups>
IWSGD_HD void noise_rule_bwd(const NoiseWork& work, const T* dy, T* dx, const Affine<T>& map, int64_t block, int thread) {
  constexpr int kSlots = kGroup / V, kSamples = kGroups ? kAhead<T, V> : 1;
  const PackPlace place(work, block * kBlock + thread, std::bool_constant<kGroups>{});
  if (place.count == 0) return;
  PackRule<T, kGroups> rule(work, map, place, 0);
  const T* from = dy + place.y;
  acc_t<T> sum[kGroup] = {};
  for_batches<kSamples>(0, static_cast<int>(work.call.samples), [&](auto batch, int s) {
    Elements<T, V> values[batch][kSlots];
    IWSGD_UNROLL
    for (int u = 0; u < batch; ++u) {
      IWSGD_UNROLL
      for (int k = 0; k < kSlots; ++k)
        if (kGroups || k * V < place.count) values[u][k] = load<T, V>(from + k * V);
      from += work.step;
    }
    IWSGD_UNROLL
    for (int u = 0; u < batch; ++u) {
      if (rule.by_sample && s + u > 0) rule.next(s + u);
      const uint32_t kept = rule.draw(s + u);
      IWSGD_UNROLL
      for (int e = 0; e < kGroup; ++e)
        if ((kGroups || e < place.count) && kept >> e & 1u) sum[e] += element(values[u][e / V], e % V) * rule.factor[e];
    }
  });
  IWSGD_UNROLL
  for (int k = 0; k < kSlots; ++k)
    if (kGroups || k * V < place.count) store<T, V>(dx + place.x + k * V, scaled<T, V>([&](int j) { return sum[k * V + j]; }, acc_t<T>(1)));
}

}  // namespace iwsgd
