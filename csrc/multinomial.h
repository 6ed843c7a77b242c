// Multinomial noise: how often each of F features is drawn in a number of draws, and the rule that turns random words into features.
// Plain C++17 for host and device, no torch.
#pragma once
#include "address.h"

namespace iwsgd {

constexpr int kDraws = 4;  // of one Philox call: draw j takes word j % kDraws of group j / kDraws

// One call of the multinomial op; counts are [K, B, F].
struct Multinomial {
  Address address;
  int64_t samples, examples, features;  // K, B, F
  const int64_t* bounds;                // [F], or [K, F] where by_sample: probabilities summed up, times 2^32
  bool by_sample;
  int64_t draws;

  IWSGD_HD const int64_t* of_sample(int64_t s) const { return bounds + (by_sample ? s * features : 0); }
};

// The feature that a word draws: the first whose bound is above it. bounds ascend to 2^32.
IWSGD_HD int64_t feature_of(uint32_t word, const int64_t* bounds, int64_t features) {
  // Where probabilities are equal this is the answer, and otherwise a place in range.
  const auto guess = static_cast<int64_t>((static_cast<uint64_t>(word) * static_cast<uint64_t>(features)) >> 32);
  if (bounds[guess] > word && (guess == 0 || bounds[guess - 1] <= word)) return guess;
  int64_t low = 0, high = features - 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (bounds[middle] > word) high = middle;
    else low = middle + 1;
  }
  return low;
}

// Calls count(feature) for the draws of one group.
template <class Count>
IWSGD_HD void for_each_draw(const Multinomial& call, const RowAddress& row, const int64_t* bounds, int64_t group, const Count& count) {
  const Words words = philox({static_cast<uint32_t>(group), row.example, row.sample, row.stream}, row.seed);
  const int64_t left = call.draws - group * kDraws;
  for (int j = 0; j < kDraws; ++j)
    if (j < left) count(feature_of(words.w[j], bounds, call.features));
}

}  // namespace iwsgd
