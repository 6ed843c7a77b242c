// How the noise kernels cut a call into threads: plain host C++, so that it is tested without CUDA.
//
// A row's elements are taken eight at a time, as packs: a whole group of the generator where rows begin at groups. Every
// thread draws for one pack of one example and goes through the noise samples; a warp reads and writes the elements of its
// 32 packs. Packs of all rows are numbered in one sequence, so that rows of any length fill the warps, and the grid has one
// thread for each. A persistent grid would share a thread's set-up (the key schedule, one or two divisions, addresses: about
// 160 instructions in sm_90's code, 2.5 for each of the 64 elements of S = 8, beside the 9 of its draw and its access); it
// would cost a loop around everything, its registers, and work that ends in unequal shares.
#pragma once
#include <algorithm>
#include <initializer_list>

#include "../noise.h"

namespace iwsgd {

constexpr int kWarp = 32;
constexpr int kBlock = 256;

// n / divisor as a multiplication, exact for n < 2^63: ceil(2^(64+shift) / divisor) = 2^64 + magic (Granlund, Montgomery 1994).
struct Divider {
  uint64_t magic = 1;
  int shift = 0;

  Divider() = default;
  explicit Divider(int64_t divisor) {
    while (shift < 63 && (int64_t(1) << shift) < divisor) ++shift;
    const auto d = static_cast<uint64_t>(divisor);
    magic = static_cast<uint64_t>((static_cast<unsigned __int128>((uint64_t(1) << shift) - d) << 64) / d) + 1;
  }

  IWSGD_HD int64_t operator()(int64_t dividend) const {
    const auto n = static_cast<uint64_t>(dividend);
#if defined(__CUDA_ARCH__)
    const uint64_t high = __umul64hi(n, magic);
#else
    const auto high = static_cast<uint64_t>((static_cast<unsigned __int128>(n) * magic) >> 64);
#endif
    return static_cast<int64_t>((high + n) >> shift);
  }
};

// True where every pack is one group of the generator, or the first elements of one.
inline bool packs_are_groups(const Layout& layout) {
  const bool start = layout.outer == 1 || layout.inner % kGroup == 0;
  const bool end = layout.positions % kGroup == 0 || layout.outer * layout.inner <= layout.positions;
  return layout.share == 1 && start && end;
}

// One call of a kernel of noise, whatever its rule.
struct CallWork {
  Call call;
  int64_t packs, total;  // of one row, and of all examples: O * B * packs
  int64_t step;          // elements from one noise sample of an element to the next
  bool wraps, groups;    // positions come again within one example; packs_are_groups
  Divider by_packs, by_examples, by_share, by_positions;

  explicit CallWork(const Call& call)
      : call(call), packs((call.layout.inner + kGroup - 1) / kGroup), total(call.layout.outer * call.layout.examples * packs),
        step(call.layout.examples * call.layout.inner),
        wraps(call.layout.outer * call.layout.inner > call.layout.positions * call.layout.share), groups(packs_are_groups(call.layout)) {
    if (total == 0) return;
    by_packs = Divider(packs);
    by_examples = Divider(call.layout.examples);
    by_share = Divider(call.layout.share);
    by_positions = Divider(call.layout.positions);
  }
};

// One call of a kernel of Bernoulli noise.
struct NoiseWork : CallWork {
  Rule rule;

  explicit NoiseWork(const Noise& call) : CallWork(call), rule(call.rule) {}
};

// True where every row of every tensor can be taken in accesses of 16 bytes.
inline bool rows_are_aligned(const Layout& layout, int64_t element_bytes, std::initializer_list<const void*> tensors) {
  bool aligned = layout.inner * element_bytes % 16 == 0;
  for (const void* tensor : tensors) aligned = aligned && reinterpret_cast<uintptr_t>(tensor) % 16 == 0;
  return aligned;
}

// True where every pack is a whole group of the generator, its thresholds two aligned accesses of 16 bytes.
inline bool thresholds_are_groups(const NoiseWork& work) {
  const Layout& layout = work.call.layout;
  return work.groups && layout.inner % kGroup == 0 && layout.positions % kGroup == 0 &&
         reinterpret_cast<uintptr_t>(work.rule.thresholds) % 16 == 0;
}

// The grid: blocks in x, which has room for 2^31 - 1 of them (more elements than any memory holds); in y the noise samples in
// `parts` of `part` each.
struct NoiseGrid {
  int64_t blocks, parts, part;
};

// One part where the packs alone fill a GPU, which backward, a sum over the samples, takes in any case. Otherwise parts of
// at least kLeast samples, which share the draws that depend on the group alone.
inline NoiseGrid noise_grid(const CallWork& work, bool divide_samples) {
  constexpr int64_t kFill = 1 << 18, kMostParts = 64, kLeast = 2;  // threads: 128 multiprocessors of 2048
  const int64_t blocks = (work.total + kBlock - 1) / kBlock, samples = work.call.samples;
  int64_t parts = 1;
  if (divide_samples) parts = std::max<int64_t>(1, std::min({kFill / (blocks * kBlock), samples / kLeast, kMostParts}));
  const int64_t part = (samples + parts - 1) / parts;
  return {blocks, (samples + part - 1) / part, part};
}

}  // namespace iwsgd
