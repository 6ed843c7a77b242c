// An upstream gradient of the loss, applied to a gradient that is there already. Compiles for the host too.
#pragma once
#include "elements.cuh"

namespace iwsgd {

constexpr int kScaleThreads = 256;
constexpr int kScaleBlocks = 8;  // on a multiprocessor: all of its 2048 threads

// x [n] times *factor, by thread `thread` of `threads`. The usual factor is 1: then each has read one value, the same for all, and
// nothing else is touched, 2 us of a launch instead of 2n elements of memory traffic (0.5 ms for 8 x 128 rows of 128k classes).
template <class T>
IWSGD_HD void scale_elements(T* x, int64_t n, const acc_t<T>* factor, int64_t thread, int64_t threads) {
  constexpr int V = kVector<T>;
  const acc_t<T> by = *factor;
  if (by == acc_t<T>(1)) return;
  const auto before = static_cast<int64_t>((16 - reinterpret_cast<uintptr_t>(x) % 16) % 16 / sizeof(T));
  const int64_t head = before < n ? before : n, chunks = (n - head) / V;
  IWSGD_UNROLL_BY(1)
  for (int64_t i = thread; i < chunks; i += threads) {
    T* const at = x + head + i * V;
    const Elements<T, V> old = load<T, V>(at);
    store<T, V>(at, scaled<T, V>([&](int j) { return element(old, j); }, by));
  }
  IWSGD_UNROLL_BY(1)
  for (int64_t i = thread; i < n - chunks * V; i += threads) {
    T* const at = x + (i < head ? i : i + chunks * V);
    *at = narrow<T>(widen(*at) * by);
  }
}

}  // namespace iwsgd
