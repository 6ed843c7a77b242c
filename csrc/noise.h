// The rule that turns random bits into a mask, and the mask into noise. Plain C++17 for host and device, no torch.
//
// A Philox call gives 128 bits, which are eight 16-bit fields: field j is bits 16*(j%2) .. +16 of word j/2, so that on a
// little-endian machine the fields are the words read as uint16_t[8]. An element is dropped where its field < threshold.
#pragma once
#include <algorithm>
#include <type_traits>

#include "address.h"

namespace iwsgd {

constexpr int kGroup = 8;                            // elements of one Philox call
constexpr uint32_t kFieldRange = 65536;              // a threshold in [0, kFieldRange] drops threshold/kFieldRange of all elements
constexpr int64_t kMaxPositions = int64_t(1) << 35;  // 2^32 groups of kGroup

IWSGD_HD uint32_t field(const Words& words, int j) { return (words.w[j / 2] >> (16 * (j % 2))) & 0xFFFFu; }

// Signed or unsigned: vectors of the CPU compare signed integers in fewer instructions.
template <class I>
IWSGD_HD bool keep(I field, std::common_type_t<I> threshold) {
  return field >= threshold;
}

// The factor of kept elements: the inverse of the probability that the threshold really keeps. (A threshold of kFieldRange keeps none.)
template <class A>
IWSGD_HD A keep_scale(int32_t threshold) {
  return A(kFieldRange) / A(std::max(int32_t(kFieldRange) - threshold, 1));
}

// The keep bits of one group: bit j is element j.
IWSGD_HD uint32_t keep_group(const RowAddress& row, uint32_t group, uint32_t threshold) {
  const Words words = philox({group, row.example, row.sample, row.stream}, row.seed);
  uint32_t bits = 0;
  for (int j = 0; j < kGroup; ++j) bits |= static_cast<uint32_t>(keep(field(words, j), threshold)) << j;
  return bits;
}

// An element becomes scale * x + shift where it is kept, fill where it is dropped.
struct Rule {
  uint32_t threshold;
  double scale, shift, fill;
  // [rows, positions]; null: `threshold` for all. An element's own keep_scale is then a factor beside scale.
  const int32_t* thresholds;
  int64_t threshold_rows;  // 1 for all rows, B by example, or K*B by row

  IWSGD_HD bool plain() const { return thresholds == nullptr && shift == 0.0 && fill == 0.0; }

  // The thresholds of all positions of row (s, b).
  IWSGD_HD const int32_t* of_row(int64_t s, int64_t b, int64_t examples, int64_t positions) const {
    return thresholds + (threshold_rows == 1 ? 0 : threshold_rows == examples ? b : s * examples + b) * positions;
  }
};

// One call of the noise op.
struct Noise : Call {
  Rule rule;
};

}  // namespace iwsgd
