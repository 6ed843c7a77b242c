// The noise kernels for rules that noise_kernels.cuh leaves out: a threshold for every position, and an affine map of what is kept
// (alpha dropout). A thread reads and writes its own pack; nothing passes between threads.
#pragma once
#include "noise_kernels.cuh"

namespace iwsgd {

// What a thread's pack becomes under one noise sample after the other.
template <class T>
struct PackRule {
  using A = acc_t<T>;
  const NoiseWork& work;
  Place place;
  PackNoise<false> noise;
  A scale, shift, fill;
  uint32_t kept;      // bit j: whether element j is
  A factor[kGroup];  // of element j where it is kept

  IWSGD_HD PackRule(const NoiseWork& work, int64_t pack)
      : work(work),
        place(work, pack),
        noise(work, place),
        scale(static_cast<A>(work.draw.rule.scale)),
        shift(static_cast<A>(work.draw.rule.shift)),
        fill(static_cast<A>(work.draw.rule.fill)),
        kept(0) {
    IWSGD_UNROLL
    for (int j = 0; j < kGroup; ++j) factor[j] = scale;
  }

  IWSGD_HD void draw(int s) {
    const Draw& call = work.draw;
    if (call.rule.thresholds == nullptr) {
      kept = noise.bits(work, call.address, s);
      return;
    }
    const Layout& layout = call.layout;
    const int32_t* thresholds = call.rule.of_row(s, place.b, layout.examples, layout.positions);
    const uint32_t sample = call.address.row(s, place.b, layout.examples).sample;
    Group group = noise.group;
    Words words = philox(group, noise.row.example, sample, noise.keys);
    int64_t at = noise.position, same = noise.left;
    kept = 0;
    IWSGD_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      const int32_t threshold = thresholds[at];
      const int within = static_cast<int>(at % kGroup);
      uint32_t word = words.w[0];  // chosen by comparisons: an index that is not known would put the words into memory
      IWSGD_UNROLL
      for (int w = 1; w < 4; ++w) word = within / 2 == w ? words.w[w] : word;
      const uint32_t drawn = within % 2 ? word >> 16 : word & 0xFFFFu;
      kept |= static_cast<uint32_t>(static_cast<int32_t>(drawn) >= threshold) << j;
      factor[j] = scale * (A(kFieldRange) / A(threshold < int32_t(kFieldRange) ? int32_t(kFieldRange) - threshold : 1));
      if (--same > 0) continue;
      same = layout.share;
      const int64_t before = at++;
      if (at == layout.positions) at = 0;
      if (at / kGroup != before / kGroup) {
        group = Group(static_cast<uint32_t>(at / kGroup), noise.row.stream, noise.keys);
        words = philox(group, noise.row.example, sample, noise.keys);
      }
    }
  }
};

template <class T, int V, bool kExpand>
IWSGD_HD void noise_rule_fwd(const NoiseWork& work, const T* x, T* y, int part, int64_t block, int which, int thread) {
  constexpr int kSlots = kGroup / V;
  PackRule<T> rule(work, block * kBlock + thread);
  const Place& place = rule.place;
  if (place.count == 0) return;
  const int begin = which * part, end = std::min(begin + part, static_cast<int>(work.draw.samples));
  const int64_t row = place.x + place.o * (work.draw.samples - 1) * work.step;  // in [O, S*B, I], of sample 0
  Elements<T, V> values[kSlots];
  const auto read = [&](const T* from) {
    IWSGD_UNROLL
    for (int k = 0; k < kSlots; ++k)
      if (k * V < place.count) values[k] = load<T, V>(from + k * V);
  };
  if (kExpand) read(x + place.x);
  IWSGD_UNROLL_BY(1)
  for (int s = begin; s < end; ++s) {
    if (!kExpand) read(x + row + s * work.step);
    rule.draw(s);
    IWSGD_UNROLL
    for (int k = 0; k < kSlots; ++k) {
      const auto becomes = [&](int j) {
        const int e = k * V + j;
        return rule.kept >> e & 1u ? element(values[k], j) * rule.factor[e] + rule.shift : rule.fill;
      };
      if (k * V < place.count) store<T, V>(y + row + s * work.step + k * V, scaled<T, V>(becomes, acc_t<T>(1)));
    }
  }
}

template <class T, int V>
IWSGD_HD void noise_rule_bwd(const NoiseWork& work, const T* dy, T* dx, int64_t block, int thread) {
  constexpr int kSlots = kGroup / V;
  PackRule<T> rule(work, block * kBlock + thread);
  const Place& place = rule.place;
  if (place.count == 0) return;
  const T* from = dy + place.x + place.o * (work.draw.samples - 1) * work.step;
  acc_t<T> sum[kGroup] = {};
  IWSGD_UNROLL_BY(1)
  for (int64_t s = 0; s < work.draw.samples; ++s, from += work.step) {
    Elements<T, V> values[kSlots];
    IWSGD_UNROLL
    for (int k = 0; k < kSlots; ++k)
      if (k * V < place.count) values[k] = load<T, V>(from + k * V);
    rule.draw(static_cast<int>(s));
    IWSGD_UNROLL
    for (int e = 0; e < kGroup; ++e)
      if (e < place.count && rule.kept >> e & 1u) sum[e] += element(values[e / V], e % V) * rule.factor[e];
  }
  IWSGD_UNROLL
  for (int k = 0; k < kSlots; ++k)
    if (k * V < place.count) store<T, V>(dx + place.x + k * V, scaled<T, V>([&](int j) { return sum[k * V + j]; }, acc_t<T>(1)));
}

}  // namespace iwsgd
