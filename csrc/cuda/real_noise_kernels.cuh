// The kernels of real-valued noise as functions of (block, part, thread), for the device and, in tests, for a loop on the host.
#pragma once
#include "elements.cuh"
#include "real_noise_launch.h"
#include "noise_kernels.cuh"

namespace iwsgd {

// The numbers of law L that a thread draws: those of a pack of P elements, for one noise sample after the other.
template <class L, class A, int P>
struct PackNumbers {
  static constexpr int kGroups = P == 1 ? 1 : P / kNumbers;
  int64_t x;       // the pack's first element, in [O, B, I]
  int64_t y;       // the same in sample 0 of [O, K*B, I]
  int64_t b;       // the example's place in the batch, for its sample ids
  RowAddress row;  // but for the sample
  Keys keys;
  Group groups[kGroups];
  int which;  // where P is 1: the element's number within its group

  IWSGD_HD PackNumbers(const RealNoiseWork& work, int64_t pack) : PackNumbers(work, pack, work.by_packs(pack)) {}

  // z[j] of element j, under noise sample s. ids: the call's address.
  IWSGD_HD void draw(const RealNoiseWork& work, const Address& ids, int s, A* z) const {
    const uint32_t sample = ids.of_row(s, b, work.call.layout.examples).sample;
    if constexpr (P == 1) {
      z[0] = number<L, A>(philox(groups[0], row.example, sample, keys), which);
    } else {
      IWSGD_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        const Words words = philox(groups[g], row.example, sample, keys);
        IWSGD_UNROLL
        for (int j = 0; j < kNumbers; j += 2) {
          const Pair<A> pair = L::template pair<A>(words.w[j], words.w[j + 1]);
          z[g * kNumbers + j] = pair.first;
          z[g * kNumbers + j + 1] = pair.second;
        }
      }
    }
  }

 private:
  IWSGD_HD PackNumbers(const RealNoiseWork& work, int64_t pack, int64_t line) : b(line), row(), keys(work.call.address.seed()), which(0) {
    hold(keys);
    const Layout& layout = work.call.layout;
    const int64_t i = (pack - line * work.packs) * P;
    int64_t o = 0;
    if (layout.outer > 1) {
      o = work.by_examples(line);
      b = line - o * layout.examples;
    }
    x = line * layout.inner + i;
    y = x + o * (work.call.samples - 1) * work.step;
    row = work.call.address.of_row(0, b, layout.examples);
    int64_t position = o * layout.inner + i;
    if constexpr (P == 1) position = work.by_share(position);
    if (work.wraps) position -= work.by_positions(position) * layout.positions;
    if constexpr (P == 1) which = static_cast<int>(position % kNumbers);
    IWSGD_UNROLL
    for (int g = 0; g < kGroups; ++g) groups[g] = Group(static_cast<uint32_t>(position / kNumbers + g), row.stream, keys);
  }
};

// ---- forward: y = x * (1 + std * z), or x + std * z, [O, K*B, I] ----
//
// kExpand: x is [O, B, I], read once. What takes the time is the numbers: a call of the generator and two pairs for four elements.

template <class L, class T, int P, bool kExpand>
IWSGD_HD void real_noise_fwd(const RealNoiseWork& work, const T* x, T* y, int part, int64_t block, int which, int thread) {
  using A = acc_t<T>;
  const int64_t pack = block * kBlock + thread;
  if (pack >= work.total) return;
  const PackNumbers<L, A, P> noise(work, pack);
  const int begin = which * part, end = std::min(begin + part, static_cast<int>(work.call.samples));
  const A std = static_cast<A>(work.std);
  const T* from = x + (kExpand ? noise.x : noise.y + begin * work.step);
  T* to = y + noise.y + begin * work.step;
  Elements<T, P> values = load<T, P>(from);
  const auto samples = [&](auto multiply, const Address& ids) {
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
  with_address(work, [&](const Address& ids) {
    if (work.multiply) samples(std::true_type{}, ids);
    else samples(std::false_type{}, ids);
  });
}

// ---- backward of an expanding multiplication: dx = sum over samples of (1 + std * z) * dy, [O, B, I] ----

template <class L, class T, int P>
IWSGD_HD void real_noise_bwd(const RealNoiseWork& work, const T* dy, T* dx, int64_t block, int thread) {
  using A = acc_t<T>;
  const int64_t pack = block * kBlock + thread;
  if (pack >= work.total) return;
  const PackNumbers<L, A, P> noise(work, pack);
  const A std = static_cast<A>(work.std);
  const T* from = dy + noise.y;
  A sum[P] = {};
  with_address(work, [&](const Address& ids) {
    IWSGD_UNROLL_BY(1)
    for (int s = 0; s < static_cast<int>(work.call.samples); ++s) {
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
