// The multinomial kernel as a function of its block, for the device and, in tests, for the host.
#pragma once
#include "../multinomial.h"

namespace iwsgd {

constexpr int kCountThreads = 256;
constexpr int64_t kSharedFeatures = 48 * 1024 / sizeof(int32_t);  // counts that fit into shared memory without asking for more

IWSGD_HD void add_one(int32_t* count) {
#if defined(__CUDA_ARCH__)
  atomicAdd(count, 1);
#else
  ++*count;
#endif
}

// One row of counts [K, B, F] to a block, whose threads draw one group after the other. kShared: counted in shared memory and written
// once; otherwise in place, where no other block writes. Sums of integers: in any order they are the same.
template <bool kShared, class Block>
IWSGD_HD void multinomial_fwd(const Multinomial& call, int32_t* counts, const Block& block) {
  const int64_t r = block.index(), s = r / call.examples;
  const RowAddress row = call.address.of_row(s, r - s * call.examples, call.examples);
  const int64_t* bounds = call.of_sample(s);
  int32_t* const of_row = counts + r * call.features;
  int32_t* const to = kShared ? reinterpret_cast<int32_t*>(block.shared()) : of_row;
  for (int64_t f = block.thread(); f < call.features; f += block.threads()) to[f] = 0;
  block.sync();
  for (int64_t group = block.thread(); group * kDraws < call.draws; group += block.threads())
    for_each_draw(call, row, bounds, group, [&](int64_t f) { add_one(to + f); });
  if constexpr (kShared) {
    block.sync();
    for (int64_t f = block.thread(); f < call.features; f += block.threads()) of_row[f] = to[f];
  }
}

}  // namespace iwsgd
