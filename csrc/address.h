// The address of noise: each element's noise is a function of it alone. Plain C++17 for host and device, no torch.
//
//   key     = seed                                    (64 bits)
//   counter = (group, example, sample, stream)        (32 bits each)
//   group   = position over the number of elements that one Philox call serves; an element's position is its index in its example
#pragma once
#include "philox.h"

namespace iwsgd {

// The address that all elements of one row (one example under one noise sample) share.
struct RowAddress {
  uint64_t seed;
  uint32_t example, sample, stream;
};

// The address that one call shares. `origin` is int64[3] in the memory of the device that draws: seed, stream, first example.
// Stream and first example are offsets from it, so that a captured graph or a compiled region need not change when they do.
struct Address {
  const int64_t* origin;
  const int64_t* sample_ids;  // [K] or [K, B]; null: 0 .. K-1
  bool ids_per_example;
  int64_t stream, first_example;

  IWSGD_HD uint64_t seed() const { return static_cast<uint64_t>(origin[0]); }

  // The address of example number `example` of the batch under noise sample number `sample` of the call.
  IWSGD_HD RowAddress of_row(int64_t sample, int64_t example, int64_t examples) const {
    const int64_t id = sample_ids == nullptr ? sample : sample_ids[ids_per_example ? sample * examples + example : sample];
    return {seed(), static_cast<uint32_t>(origin[2] + first_example + example), static_cast<uint32_t>(id),
            static_cast<uint32_t>(origin[1] + stream)};
  }
};

// The layout of one call's tensors, and which of their elements share a draw: x [O, B, I] row-major, position of element
// (o, i) = ((o * I + i) / share) % positions. Element noise: share 1, positions O * I; channel noise: positions = channels.
struct Layout {
  int64_t outer, examples, inner;  // O, B, I
  int64_t positions, share;
};

// The noise of one call, whatever its rule: y is [O, K*B, I]; x is [O, B, I] where expand, else as y.
struct Call {
  Layout layout;
  Address address;
  int64_t samples;  // K
  bool expand;

  // Where element 0 of outer index o, noise sample s and example b is: in y, in x, and in a tensor [O, B, I].
  IWSGD_HD int64_t output_at(int64_t o, int64_t s, int64_t b) const { return ((o * samples + s) * layout.examples + b) * layout.inner; }
  IWSGD_HD int64_t input_at(int64_t o, int64_t s, int64_t b) const { return expand ? example_at(o, b) : output_at(o, s, b); }
  IWSGD_HD int64_t example_at(int64_t o, int64_t b) const { return (o * layout.examples + b) * layout.inner; }
};

}  // namespace iwsgd
