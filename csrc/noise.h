// The address of noise and the rule that turns random bits into a mask. Plain C++17 for host and device, no torch.
//
//   key     = seed                                    (64 bits)
//   counter = (group, example, sample, stream)        (32 bits each)
//   group   = position / kGroup, the element's index within its example over the elements of one Philox call
//
// A call gives 128 bits, which are eight 16-bit fields: field j is bits 16*(j%2) .. +16 of word j/2, so that on a
// little-endian machine the fields are the words read as uint16_t[8]. An element is dropped where its field < threshold.
#pragma once
#include "philox.h"

namespace iwsgd {

constexpr int kGroup = 8;                            // elements of one Philox call
constexpr uint32_t kFieldRange = 65536;              // a threshold in [0, kFieldRange] drops threshold/kFieldRange of all elements
constexpr int64_t kMaxPositions = int64_t(1) << 35;  // 2^32 groups of kGroup

// What every element of one row (one example, one noise sample) shares.
struct RowAddress {
  uint64_t seed;
  uint32_t example, sample, stream;
};

// What one noise call shares. `origin` is int64[3] in the memory of the device that draws: seed, stream, first example.
// Stream and first example are offsets from it, so that a captured graph or a compiled region need not change when they do.
struct CallAddress {
  const int64_t* origin;
  const int64_t* sample_ids;  // [K] or [K, B]; null: 0 .. K-1
  bool ids_per_example;
  int64_t stream, first_example;

  IWSGD_HD uint64_t seed() const { return static_cast<uint64_t>(origin[0]); }

  IWSGD_HD RowAddress row(int64_t sample, int64_t example, int64_t examples) const {
    const int64_t id = sample_ids == nullptr ? sample : sample_ids[ids_per_example ? sample * examples + example : sample];
    return {seed(), static_cast<uint32_t>(origin[2] + first_example + example), static_cast<uint32_t>(id),
            static_cast<uint32_t>(origin[1] + stream)};
  }
};

IWSGD_HD uint32_t field(const Words& words, int j) { return (words.w[j / 2] >> (16 * (j % 2))) & 0xFFFFu; }

IWSGD_HD bool keep(uint32_t field, uint32_t threshold) { return field >= threshold; }

// The factor of kept elements: the inverse of the probability that the threshold really keeps.
IWSGD_HD double keep_scale(uint32_t threshold) {
  return threshold >= kFieldRange ? 0.0 : double(kFieldRange) / double(kFieldRange - threshold);
}

// The keep bits of one group: bit j is element j.
IWSGD_HD uint32_t keep_group(const RowAddress& row, uint32_t group, uint32_t threshold) {
  const Words words = philox({group, row.example, row.sample, row.stream}, row.seed);
  uint32_t bits = 0;
  for (int j = 0; j < kGroup; ++j) bits |= static_cast<uint32_t>(keep(field(words, j), threshold)) << j;
  return bits;
}

// How one call's tensor is laid out, and which of its elements share a draw: x [O, B, I] row-major, position of element
// (o, i) = ((o * I + i) / share) % positions. Element noise: share 1, positions O * I; channel noise: positions = channels.
struct Layout {
  int64_t outer, examples, inner;  // O, B, I
  int64_t positions, share;
};

// What becomes of an element: scale * x + shift where it is kept, fill where it is dropped.
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

// One call of the noise op. y is [O, samples * B, I]; x is [O, B, I] where expand, else as y.
struct Draw {
  Layout layout;
  CallAddress address;
  int64_t samples;
  Rule rule;
  bool expand;

  // Where element 0 of row (o, s, b) starts, in y and in x.
  IWSGD_HD int64_t row(int64_t o, int64_t s, int64_t b) const { return ((o * samples + s) * layout.examples + b) * layout.inner; }
  IWSGD_HD int64_t input_row(int64_t o, int64_t s, int64_t b) const { return expand ? example(o, b) : row(o, s, b); }
  IWSGD_HD int64_t example(int64_t o, int64_t b) const { return (o * layout.examples + b) * layout.inner; }
};

}  // namespace iwsgd
