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

// Keeps the keys in registers: without it each use adds anew what makes a round's key of the seed.
IWSGD_HD void hold([[maybe_unused]] Keys& keys) {
#if defined(__CUDA_ARCH__)
  IWSGD_UNROLL
  for (int i = 0; i < kPhiloxRounds; ++i) asm volatile("" : "+r"(keys.k0[i]), "+r"(keys.k1[i]));
#endif
}

IWSGD_HD uint64_t product(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b; }
// Asked for as a register: of a shift ptxas makes, for keys that are not in uniform registers, an addition of zero.
IWSGD_HD uint32_t high(uint64_t a) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  asm("{ .reg .b32 unused; mov.b64 {unused, %0}, %1; }" : "=r"(word) : "l"(a));
  return word;
#else
  return static_cast<uint32_t>(a >> 32);
#endif
}
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

// Where a pack lies. kWhole: rows are whole packs; places past the last pack are then not asked for.
struct PackPlace {
  int64_t x, y;   // its first element, in [O, B, I] and in sample 0 of [O, K*B, I]
  int64_t o, b;   // outer index and example
  int64_t index;  // the element's number within the example
  int count;      // elements, kGroup but at the end of a row; none past the last pack

  template <bool kWhole>
  IWSGD_HD PackPlace(const CallWork& work, int64_t pack, std::bool_constant<kWhole>) {
    const Layout& layout = work.call.layout;
    const int64_t known = kWhole || pack < work.total ? pack : work.total - 1;
    b = work.by_packs(known);
    index = (known - b * work.packs) * kGroup;
    x = y = kWhole ? known * kGroup : b * layout.inner + index;
    count = pack < work.total ? kWhole ? kGroup : static_cast<int>(std::min<int64_t>(kGroup, layout.inner - index)) : 0;
    o = 0;
    if (layout.outer > 1) {
      o = work.by_examples(b);
      b -= o * layout.examples;
      index += o * layout.inner;
      y = of_sample_0(work);
    }
  }

  IWSGD_HD int64_t of_sample_0(const CallWork& work) const { return x + o * (work.call.samples - 1) * work.step; }
};

// The draws of a thread: the keep bits of one pack, for one noise sample after the other.
// kGroups: packs are known to be groups of the generator, and the bits never leave the predicates that they are made in.
template <bool kGroups>
struct PackNoise {
  int64_t b;       // the example's place in the batch, for its sample ids
  RowAddress row;  // but for the sample
  Keys keys;
  int64_t position, left;  // of the pack's first element; elements that share its draw, from it on
  Group group;             // of that position

  IWSGD_HD PackNoise(const NoiseWork& work, const PackPlace& place)
      : b(place.b), row(work.call.address.of_row(0, place.b, work.call.layout.examples)), keys(row.seed), position(place.index), left(1) {
    if constexpr (!kGroups) {
      const int64_t index = position;
      position = work.by_share(index);
      left = work.call.layout.share - (index - position * work.call.layout.share);
    }
    if (work.wraps) position -= work.by_positions(position) * work.call.layout.positions;
    group = Group(static_cast<uint32_t>(static_cast<uint64_t>(position) / kGroup), row.stream, keys);
  }

  // Bit j: whether element j of the pack is kept by noise sample s. ids: the call's address.
  IWSGD_HD uint32_t bits(const NoiseWork& work, const Address& ids, int s) const {
    const Layout& layout = work.call.layout;
    const uint32_t sample = ids.of_row(s, b, layout.examples).sample, threshold = work.rule.threshold;
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
IWSGD_HD void with_address(const CallWork& work, const Body& body) {
  Address address = work.call.address;
  if (address.sample_ids != nullptr) return body(address);
  address.sample_ids = nullptr;
  body(address);
}

// ---- who draws and who writes ----

// A thread draws for pack `thread` of its block. It reads and writes kGroup / V accesses of V elements, in each of which
// the warp covers neighbouring memory. V = kGroup: those of its own pack; otherwise those of other lanes' packs, whose places
// and keep bits it gets by shuffles.
template <int V, bool kGroups>
struct Slots {
  static constexpr int kSlots = kGroup / V;
  static constexpr std::bool_constant<kSlots == 1> kWhole{};  // by rows_are_aligned
  const NoiseWork& work;
  int64_t warp_pack;  // the warp's first pack
  int lane;
  PackPlace own;
  int64_t x[kSlots], y[kSlots];  // first elements of the accesses, in [O, B, I] and in sample 0 of [O, K*B, I]
  bool inside[kSlots];

  IWSGD_HD Slots(const NoiseWork& work, int64_t block, int thread)
      : work(work), warp_pack(block * kBlock + thread - thread % kWarp), lane(static_cast<unsigned>(thread) % kWarp),
        own(work, block * kBlock + thread, kWhole) {
    IWSGD_UNROLL
    for (int k = 0; k < kSlots; ++k) {
      const PackPlace place = place_of(source(k));
      inside[k] = first(k) < place.count;
      x[k] = place.x + (inside[k] ? first(k) : 0);  // an element that can be read in any case
      y[k] = place.y + (x[k] - place.x);
    }
  }

  // The lane that draws for access k, and the access' first element in that lane's pack.
  IWSGD_HD int source(int k) const { return (k * kWarp + lane) * V / kGroup; }
  IWSGD_HD int first(int k) const { return (k * kWarp + lane) * V % kGroup; }

  // True where the thread has nothing to do: nothing to write, and no bits to draw for other lanes.
  IWSGD_HD bool idle() const { return kSlots == 1 && !inside[0]; }
  // True where a thread that is not idle writes access k.
  IWSGD_HD bool writes(int k) const { return kSlots == 1 || inside[k]; }

  // These two are for all lanes of a warp together.

  // x, y and count of another lane's pack; packs of one warp are less than 2^31 elements apart.
  IWSGD_HD PackPlace place_of(int source) const {
    if constexpr (kSlots == 1) return own;
#if defined(__CUDA_ARCH__)
    PackPlace place = own;
    place.x += static_cast<int>(__shfl_sync(0xFFFFFFFFu, low(own.x), source) - low(own.x));
    place.o += static_cast<int>(__shfl_sync(0xFFFFFFFFu, low(own.o), source) - low(own.o));
    place.count = __shfl_sync(0xFFFFFFFFu, own.count, source);
    place.y = place.of_sample_0(work);
    return place;
#else
    return PackPlace(work, warp_pack + source, kWhole);
#endif
  }

  // The keep bits of access k. drawn: those of the thread's own pack.
  IWSGD_HD uint32_t bits(const Address& ids, int s, int k, uint32_t drawn) const {
    if constexpr (kSlots == 1) return drawn;
#if defined(__CUDA_ARCH__)
    return __shfl_sync(0xFFFFFFFFu, drawn, source(k)) >> first(k);
#else
    return PackNoise<kGroups>(work, place_of(source(k))).bits(work, ids, s) >> first(k);
#endif
  }
};

// Noise samples whose elements are read before the first is used: 64 bytes a thread under way, or eight single elements.
template <class T, int V>
constexpr int kAhead = V == 1 ? 1 : std::max(1, 64 / static_cast<int>(kGroup * sizeof(T)));

// Calls body(n, s) for the noise samples s .. s + n of [begin, end), where n is N as a std::integral_constant as long as N are
// left, and then 1.
template <int N, class Body>
IWSGD_HD void for_batches(int begin, int end, const Body& body) {
  int s = begin;
  IWSGD_UNROLL_BY(1)
  for (; s + N <= end; s += N) body(std::integral_constant<int, N>{}, s);
  if constexpr (N > 1) {
    IWSGD_UNROLL_BY(1)
    for (; s < end; ++s) body(std::integral_constant<int, 1>{}, s);
  }
}

// An element becomes x * scale + shift where it is kept, fill where it is dropped.
template <class T>
struct Affine {
  acc_t<T> scale, shift;
  T fill;
  // Of plain dropout the shift is -0, with which every product stays as it is; +0 would make +0 of -0.
  explicit Affine(const Rule& rule)
      : scale(static_cast<acc_t<T>>(rule.scale)), shift(static_cast<acc_t<T>>(rule.plain() ? -0.0 : rule.shift)),
        fill(from_acc<T>(static_cast<acc_t<T>>(rule.fill))) {}
};

// ---- forward: y = x * scale + shift where kept, else fill, [O, K*B, I] ----
//
// kExpand: x is [O, B, I], read once; its values, mapped and rounded, stay in registers, and of each sample remain the draws,
// one masking of them and the stores. No cache hints: what is written here is read next, and a tensor that the cache cannot
// hold loses nothing by the ordinary policy.

template <class T, int V, bool kGroups, bool kExpand>
IWSGD_HD void noise_fwd(const NoiseWork& work, const T* x, T* y, const Affine<T>& map, int part, int64_t block, int which, int thread) {
  const Slots<V, kGroups> slots(work, block, thread);
  if (slots.idle()) return;
  const PackNoise<kGroups> noise(work, slots.own);
  constexpr int kSlots = slots.kSlots, kSamples = kExpand ? 1 : kAhead<T, V>;
  const int begin = which * part, end = std::min(begin + part, static_cast<int>(work.call.samples));
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
  const auto map_all = [&](int u) {
    IWSGD_UNROLL
    for (int k = 0; k < kSlots; ++k)
      values[u][k] = scaled<T, V>([&](int j) { return element(values[u][k], j) * map.scale + map.shift; }, acc_t<T>(1));
  };
  const auto write = [&](int u, const Address& ids, int s) {
    const uint32_t drawn = noise.bits(work, ids, s);
    IWSGD_UNROLL
    for (int k = 0; k < kSlots; ++k) {
      const uint32_t bits = slots.bits(ids, s, k, drawn);
      if (slots.writes(k)) store<T, V>(to[k], masked<T, V>(values[u][k], bits, map.fill));
      to[k] += work.step;
    }
  };

  with_address(work, [&](const Address& ids) {
    if constexpr (kExpand) {
      read(0);
      map_all(0);
      IWSGD_UNROLL_BY(V == 1 ? 1 : 2)
      for (int s = begin; s < end; ++s) write(0, ids, s);
    } else {
      for_batches<kSamples>(begin, end, [&](auto batch, int s) {
        IWSGD_UNROLL
        for (int u = 0; u < batch; ++u) read(u);
        IWSGD_UNROLL
        for (int u = 0; u < batch; ++u) {
          map_all(u);
          write(u, ids, s + u);
        }
      });
    }
  });
}

// ---- backward of the expansion: dx = scale * sum over samples of keep * dy, [O, B, I] ----

template <class T, int V, bool kGroups>
IWSGD_HD void noise_bwd(const NoiseWork& work, const T* dy, T* dx, acc_t<T> scale, int64_t block, int thread) {
  const Slots<V, kGroups> slots(work, block, thread);
  if (slots.idle()) return;
  const PackNoise<kGroups> noise(work, slots.own);
  constexpr int kSlots = slots.kSlots, kSamples = kAhead<T, V>;
  const T* from[kSlots];
  IWSGD_UNROLL
  for (int k = 0; k < kSlots; ++k) from[k] = dy + slots.y[k];
  acc_t<T> sum[kSlots][V] = {};
  with_address(work, [&](const Address& ids) {
    for_batches<kSamples>(0, static_cast<int>(work.call.samples), [&](auto batch, int s) {
      Elements<T, V> values[batch][kSlots];
      IWSGD_UNROLL
      for (int u = 0; u < batch; ++u) {
        IWSGD_UNROLL
        for (int k = 0; k < kSlots; ++k) {
          values[u][k] = load<T, V>(from[k]);
          from[k] += work.step;
        }
      }
      IWSGD_UNROLL
      for (int u = 0; u < batch; ++u) {
        const uint32_t drawn = noise.bits(work, ids, s + u);
        IWSGD_UNROLL
        for (int k = 0; k < kSlots; ++k) {
          const uint32_t bits = slots.bits(ids, s + u, k, drawn);
          IWSGD_UNROLL
          for (int j = 0; j < V; ++j)
            if (bits >> j & 1u) sum[k][j] += element(values[u][k], j);
        }
      }
    });
  });
  IWSGD_UNROLL
  for (int k = 0; k < kSlots; ++k)
    if (slots.writes(k)) store<T, V>(dx + slots.x[k], scaled<T, V>([&](int j) { return sum[k][j]; }, scale));
}

}  // namespace iwsgd
