// The Gaussian kernels as functions of (block, part, thread), for the device and, in tests, for a loop on the host.
#pragma once
#include "elements.cuh"
#include "gaussian_launch.h"
#include "noise_kernels.cuh"

namespace iwsgd {

// What a thread draws: the normal numbers of a pack of P elements, for one noise sample after the other.
template <class A, int P>
struct PackNormals {
  static constexpr int kGroups = P == 1 ? 1 : P / kNormals;
  int64_t x;       // the pack's first element, in [O, B, I]
  int64_t y;       // the same in sample 0 of [O, S*B, I]
  int64_t b;       // the example's place in the batch, for its sample ids
  RowAddress row;  // but for the sample
  Keys keys;
  Group groups[kGroups];
  int which;  // where P is 1: the element's number within its group

  IWSGD_HD PackNormals(const GaussianWork& work, int64_t pack) : PackNormals(work, pack, work.by_packs(pack)) {}

  // z[j] of element j, under noise sample s. ids: the call's address.
  IWSGD_HD void draw(const GaussianWork& work, const CallAddress& ids, int s, A* z) const {
    const uint32_t sample = ids.row(s, b, work.draw.layout.examples).sample;
    if constexpr (P == 1) {
      z[0] = normal<A>(philox(groups[0], row.example, sample, keys), which);
    } else {
      IWSGD_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        const Words words = philox(groups[g], row.example, sample, keys);
        IWSGD_UNROLL
        for (int j = 0; j < kNormals; j += 2) {
          const Pair<A> pair = normal_pair<A>(words.w[j], words.w[j + 1]);
          z[g * kNormals + j] = pair.first;
          z[g * kNormals + j + 1] = pair.second;
        }
      }
    }
  }

 private:
  IWSGD_HD PackNormals(const GaussianWork& work, int64_t pack, int64_t line) : b(line), row(), keys(work.draw.address.seed()), which(0) {
    hold(keys);
    const Layout& layout = work.draw.layout;
    const int64_t i = (pack - line * work.packs) * P;
    int64_t o = 0;
    if (layout.outer > 1) {
      o = work.by_examples(line);
      b = line - o * layout.examples;
    }
    x = line * layout.inner + i;
    y = x + o * (work.draw.samples - 1) * work.step;
    row = work.draw.address.row(0, b, layout.examples);
    int64_t position = o * layout.inner + i;
    if constexpr (P == 1) position = work.by_share(position);
    if (work.wraps) position -= work.by_positions(position) * layout.positions;
    if constexpr (P == 1) which = static_cast<int>(position % kNormals);
    IWSGD_UNROLL
    for (int g = 0; g < kGroups; ++g) groups[g] = Group(static_cast<uint32_t>(position / kNormals + g), row.stream, keys);
  }
};

// ---- forward: y = x * (1 + std * z), or x + std * z, [O, S*B, I] ----
//
// kExpand: x is [O, B, I], read once. What takes the time is the numbers: a call of the generator and two pairs for four elements.

template <class T, int P, bool kExpand>
IWSGD_HD void gaussian_fwd(const GaussianWork& work, const T* x, T* y, int part, int64_t block, int which, int thread) {
  using A = acc_t<T>;
  const int64_t pack = block * kBlock + thread;
  if (pack >= work.total) return;
  const PackNormals<A, P> noise(work, pack);
  const int begin = which * part, end = std::min(begin + part, static_cast<int>(work.draw.samples));
  const A std = static_cast<A>(work.std);
  const T* from = x + (kExpand ? noise.x : noise.y + begin * work.step);
  T* to = y + noise.y + begin * work.step;
  Elements<T, P> values = load<T, P>(from);
  const auto samples = [&](auto multiply, const CallAddress& ids) {
    IWSGD_UNROLL_BY(1)
    for (int s = begin; s < end; ++s) {
      if constexpr (!kExpand) {
        values = load<T, P>(from);
        from += work.step;
      }
      A z[P];
      noise.draw(work, ids, s, z);
      const auto noisy = [&](int j) {
        const A value = element(values, j);
        if constexpr (multiply) return value * (std * z[j] + A(1));
        else return value + std * z[j];
      };
      store<T, P>(to, scaled<T, P>(noisy, A(1)));
      to += work.step;
    }
  };
  with_address(work, [&](const CallAddress& ids) {
    if (work.multiply) samples(std::true_type{}, ids);
    else samples(std::false_type{}, ids);
  });
}

// ---- backward of an expanding multiplication: dx = sum over samples of (1 + std * z) * dy, [O, B, I] ----

template <class T, int P>
IWSGD_HD void gaussian_bwd(const GaussianWork& work, const T* dy, T* dx, int64_t block, int thread) {
  using A = acc_t<T>;
  const int64_t pack = block * kBlock + thread;
  if (pack >= work.total) return;
  const PackNormals<A, P> noise(work, pack);
  const A std = static_cast<A>(work.std);
  const T* from = dy + noise.y;
  A sum[P] = {};
  with_address(work, [&](const CallAddress& ids) {
    IWSGD_UNROLL_BY(1)
    for (int s = 0; s < static_cast<int>(work.draw.samples); ++s) {
      const Elements<T, P> values = load<T, P>(from);
      from += work.step;
      A z[P];
      noise.draw(work, ids, s, z);
      IWSGD_UNROLL
      for (int j = 0; j < P; ++j) sum[j] += element(values, j) * (std * z[j] + A(1));
    }
  });
  store<T, P>(dx + noise.x, scaled<T, P>([&](int j) { return sum[j]; }, A(1)));
}

}  // namespace iwsgd
