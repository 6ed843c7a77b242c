// The noise kernels as functions of (block, part, thread), for the device and, in tests, for a loop on the host.

#pragma once
#include "elements.cuh"
#include "noise_launch.h"

namespace iwsgd {

// ---- keep bits ----
//
// NOTE [Shared rounds] The counter is (group, example, sample, stream). A Philox round mixes word 0 with word 3 and word 2
// with word 1, so that what a group adds to the first two rounds knows nothing of example and sample: a thread does it once
// for all noise samples (struct Group). What example and sample add are two multiplications, and eight rounds of two follow.

struct Keys {
  uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];
  IWSGD_HD explicit Keys(uint64_t seed) {
    IWSGD_UNROLL
    for (int i = 0; i < kPhiloxRounds; ++i) {
      k0[i] = static_cast<uint32_t>(seed) + i * kPhiloxW0;
      k1[i] = static_cast<uint32_t>(seed >> 32) + i * kPhiloxW1;
    }
  }
};

IWSGD_HD uint64_t product(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b; }
IWSGD_HD uint32_t high(uint64_t a) { return static_cast<uint32_t>(a >> 32); }
IWSGD_HD uint32_t low(uint64_t a) { return static_cast<uint32_t>(a); }

// One group's share of rounds 0 and 1.
struct Group {
  uint32_t c0, c1, c2;
  Group() = default;
  IWSGD_HD Group(uint32_t group, uint32_t stream, const Keys& keys) {
    const uint64_t p0 = product(kPhiloxM0, group);
    const uint64_t p1 = product(kPhiloxM1, high(p0) ^ stream ^ keys.k1[0]);
    c0 = high(p1) ^ keys.k0[1];
    c1 = low(p1);
    c2 = low(p0) ^ keys.k1[1];
  }
};

// philox({group, example, sample, stream}, seed)
IWSGD_HD Words philox(const Group& group, uint32_t example, uint32_t sample, const Keys& keys) {
  const uint64_t p1 = product(kPhiloxM1, sample);
  const uint64_t p0 = product(kPhiloxM0, high(p1) ^ example ^ keys.k0[0]);
  uint32_t c0 = group.c0 ^ low(p1), c1 = group.c1, c2 = group.c2 ^ high(p0), c3 = low(p0);
  IWSGD_UNROLL
  for (int round = 2; round < kPhiloxRounds; ++round) {
    const uint64_t q0 = product(kPhiloxM0, c0), q1 = product(kPhiloxM1, c2);
    c0 = high(q1) ^ c1 ^ keys.k0[round];
    c1 = low(q1);
    c2 = high(q0) ^ c3 ^ keys.k1[round];
    c3 = low(q0);
  }
  return {{c0, c1, c2, c3}};
}

// Bit j: whether element j of a group is kept. Field and threshold are compared in the upper halves of words, which saves
// taking the upper fields out; threshold < kFieldRange.
IWSGD_HD uint32_t keep_bits(const Words& words, uint32_t threshold) {
  uint32_t bits = 0;
  IWSGD_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    const uint32_t word = words.w[j / 2];
    bits |= static_cast<uint32_t>(keep(j % 2 ? word : word << 16, threshold << 16)) << j;
  }
  return bits;
}

// Where a pack begins: outer index, example, and element within the row.
struct Place {
  int64_t o, b, i;
  IWSGD_HD Place(const NoiseWork& work, int64_t pack) {
    const int64_t row = work.by_packs(pack);
    o = work.by_examples(row);
    b = row - o * work.draw.layout.examples;
    i = (pack - row * work.packs) * kGroup;
  }
};

// What a thread draws: the keep bits of one pack, for one noise sample after the other.
// kGroups: packs are known to be groups of the generator, and the bits never leave the predicates that they are made in.
template <bool kGroups>
struct PackNoise {
  int64_t b;               // the example's place in the batch, for its sample ids
  RowAddress row;          // but for the sample
  Keys keys;
  int64_t position, left;  // of the pack's first element; elements that share its draw, from it on
  Group group;             // of that position

  IWSGD_HD PackNoise(const NoiseWork& work, const Place& place)
      : b(place.b),
        row(work.draw.address.row(0, place.b, work.draw.layout.examples)),
        keys(row.seed),
        position(place.o * work.draw.layout.inner + place.i),
        left(1) {
    if constexpr (!kGroups) {
      const int64_t index = position;
      position = work.by_share(index);
      left = work.draw.layout.share - (index - position * work.draw.layout.share);
    }
    if (work.wraps) position -= work.by_positions(position) * work.draw.layout.positions;
    group = Group(static_cast<uint32_t>(position / kGroup), row.stream, keys);
  }

  // Bit j: whether element j of the pack is kept by noise sample s. ids: the call's address.
  IWSGD_HD uint32_t bits(const NoiseWork& work, const CallAddress& ids, int s) const {
    const Layout& layout = work.draw.layout;
    const uint32_t sample = ids.row(s, b, layout.examples).sample, threshold = work.draw.threshold;
    uint32_t drawn = keep_bits(philox(group, row.example, sample, keys), threshold);
    if constexpr (kGroups) return drawn;
    if (work.groups) return drawn;
    if (left >= kGroup) return drawn >> position % kGroup & 1u ? 0xFFu : 0u;
    uint32_t bits = 0;
    int64_t at = position, same = left;
    IWSGD_UNROLL_BY(1)
    for (int j = 0; j < kGroup; ++j) {
      bits |= (drawn >> at % kGroup & 1u) << j;
      if (--same > 0) continue;
      same = layout.share;
      const int64_t before = at++;
      if (at == layout.positions) at = 0;
      if (at / kGroup != before / kGroup)
        drawn = keep_bits(philox(Group(static_cast<uint32_t>(at / kGroup), row.stream, keys), row.example, sample, keys), threshold);
    }
    return bits;
  }
};

// Calls body with the call's address. Without sample ids the compiler knows it, and the sample is the loop's counter.
template <class Body>
IWSGD_HD void with_address(const NoiseWork& work, const Body& body) {
  CallAddress address = work.draw.address;
  if (address.sample_ids != nullptr) return body(address);
  address.sample_ids = nullptr;
  body(address);
}

// ---- who draws and who writes ----

// A thread draws for pack `thread` of its block. It reads and writes kGroup / V accesses of V elements, in each of which
// the warp covers neighbouring memory. V = kGroup: those of its own pack; otherwise those of other lanes' packs, whose keep
// bits it gets by a shuffle.
template <int V, bool kGroups>
struct Slots {
  static constexpr int kSlots = kGroup / V;
  int64_t warp_pack, x[kSlots], y[kSlots];  // first pack of the warp; first elements of the accesses, in x and y of sample 0
  bool inside[kSlots];
  int lane;

  IWSGD_HD Slots(const NoiseWork& work, int64_t block, int thread)
      : warp_pack(block * kBlock + thread / kWarp * kWarp), lane(thread % kWarp) {
    IWSGD_UNROLL
    for (int k = 0; k < kSlots; ++k) {
      const Place place = this->place(work, source(k));
      const int64_t i = place.i + first(k);
      inside[k] = warp_pack + source(k) < work.total && i < work.draw.layout.inner;
      x[k] = work.draw.example(place.o, place.b) + (inside[k] ? i : 0);  // an address that can be read in any case
      y[k] = work.draw.row(place.o, 0, place.b) + (inside[k] ? i : 0);
    }
  }

  // Whether the thread has nothing to do: nothing to write, and no bits to draw for other lanes.
  IWSGD_HD bool idle() const { return kSlots == 1 && !inside[0]; }

  // Whether a thread that is not idle writes access k.
  IWSGD_HD bool writes(int k) const { return kSlots == 1 || inside[k]; }

  // The lane that draws for access k, and the access' first element in that lane's pack.
  IWSGD_HD int source(int k) const { return (k * kWarp + lane) * V / kGroup; }
  IWSGD_HD int first(int k) const { return (k * kWarp + lane) * V % kGroup; }

  IWSGD_HD Place place(const NoiseWork& work, int lane) const {
    const int64_t pack = warp_pack + lane;
    return Place(work, pack < work.total ? pack : work.total - 1);
  }

  // The keep bits of access k. drawn: those of the thread's own pack; all lanes of a warp call this together.
  IWSGD_HD uint32_t bits(const NoiseWork& work, const CallAddress& ids, int s, int k, uint32_t drawn) const {
    if constexpr (kSlots == 1) return drawn;
#if defined(__CUDA_ARCH__)
    return __shfl_sync(0xFFFFFFFFu, drawn, source(k)) >> first(k);
#else
    return PackNoise<kGroups>(work, place(work, source(k))).bits(work, ids, s) >> first(k);
#endif
  }
};

// Noise samples whose elements are read before the first is used: 64 bytes a thread under way, or eight single elements.
template <class T, int V>
constexpr int kAhead = V == 1 ? 1 : std::max(1, 64 / static_cast<int>(kGroup * sizeof(T)));

// ---- forward: y = keep * scale * x, [O, S*B, I] ----
//
// kExpand: x is [O, B, I], read once; its scaled and rounded values stay in registers, and of each sample remain the draws,
// one masking of them and the stores. No cache hints: what is written here is read next, and a tensor that the cache cannot
// hold loses nothing by the ordinary policy.

template <class T, int V, bool kGroups, bool kExpand>
IWSGD_HD void noise_fwd(const NoiseWork& work, const T* x, T* y, acc_t<T> scale, int part, int64_t block, int which, int thread) {
  const Slots<V, kGroups> slots(work, block, thread);
  if (slots.idle()) return;
  const PackNoise<kGroups> noise(work, slots.place(work, slots.lane));
  constexpr int kSlots = slots.kSlots, kSamples = kExpand ? 1 : kAhead<T, V>;
  const int begin = which * part, end = std::min(begin + part, static_cast<int>(work.draw.samples));
  const T* from[kSlots];
  T* to[kSlots];
  Elements<T, V> values[kSamples][kSlots];
  IWSGD_UNROLL
  for (int k = 0; k < kSlots; ++k) {
    from[k] = x + (kExpand ? slots.x[k] : slots.y[k] + begin * work.step);
    to[k] = y + slots.y[k] + begin * work.step;
  }
  const auto read = [&](int u) {
    IWSGD_UNROLL
    for (int k = 0; k < kSlots; ++k) {
      values[u][k] = load<T, V>(from[k]);
      from[k] += work.step;
    }
  };
  const auto scale_all = [&](int u) {
    IWSGD_UNROLL
    for (int k = 0; k < kSlots; ++k) values[u][k] = scaled<T, V>([&](int j) { return element(values[u][k], j); }, scale);
  };
  const auto write = [&](int u, const CallAddress& ids, int s) {
    const uint32_t drawn = noise.bits(work, ids, s);
    IWSGD_UNROLL
    for (int k = 0; k < kSlots; ++k) {
      const uint32_t bits = slots.bits(work, ids, s, k, drawn);
      if (slots.writes(k)) store<T, V>(to[k], masked<T, V>(values[u][k], bits));
      to[k] += work.step;
    }
  };

  with_address(work, [&](const CallAddress& ids) {
    if constexpr (kExpand) {
      read(0);
      scale_all(0);
      IWSGD_UNROLL_BY(V == 1 ? 1 : 2)
      for (int s = begin; s < end; ++s) write(0, ids, s);
    } else {
      for (int s = begin; s < end; s += kSamples) {
        IWSGD_UNROLL
        for (int u = 0; u < kSamples; ++u)
          if (s + u < end) read(u);
        IWSGD_UNROLL
        for (int u = 0; u < kSamples; ++u) {
          if (s + u >= end) break;
          scale_all(u);
          write(u, ids, s + u);
        }
      }
    }
  });
}

// ---- backward of the expansion: dx = scale * sum over samples of keep * dy, [O, B, I] ----

template <class T, int V, bool kGroups>
IWSGD_HD void noise_bwd(const NoiseWork& work, const T* dy, T* dx, acc_t<T> scale, int64_t block, int thread) {
  const Slots<V, kGroups> slots(work, block, thread);
  if (slots.idle()) return;
  const PackNoise<kGroups> noise(work, slots.place(work, slots.lane));
  constexpr int kSlots = slots.kSlots, kSamples = kAhead<T, V>;
  const int samples = static_cast<int>(work.draw.samples);
  const T* from[kSlots];
  IWSGD_UNROLL
  for (int k = 0; k < kSlots; ++k) from[k] = dy + slots.y[k];
  acc_t<T> sum[kSlots][V] = {};
  with_address(work, [&](const CallAddress& ids) {
    for (int s = 0; s < samples; s += kSamples) {
      Elements<T, V> values[kSamples][kSlots];
      IWSGD_UNROLL
      for (int u = 0; u < kSamples; ++u) {
        if (s + u >= samples) break;
        IWSGD_UNROLL
        for (int k = 0; k < kSlots; ++k) {
          values[u][k] = load<T, V>(from[k]);
          from[k] += work.step;
        }
      }
      IWSGD_UNROLL
      for (int u = 0; u < kSamples; ++u) {
        if (s + u >= samples) break;
        const uint32_t drawn = noise.bits(work, ids, s + u);
        IWSGD_UNROLL
        for (int k = 0; k < kSlots; ++k) {
          const uint32_t bits = slots.bits(work, ids, s + u, k, drawn);
          IWSGD_UNROLL
          for (int j = 0; j < V; ++j)
            if (bits >> j & 1u) sum[k][j] += element(values[u][k], j);
        }
      }
    }
  });
  IWSGD_UNROLL
  for (int k = 0; k < kSlots; ++k)
    if (slots.writes(k)) store<T, V>(dx + slots.x[k], scaled<T, V>([&](int j) { return sum[k][j]; }, scale));
}

}  // namespace iwsgd
