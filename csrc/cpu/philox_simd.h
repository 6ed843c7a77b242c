// Philox for one instruction set: the words of eight groups, side by side. Read once per instruction set by for_each_isa.h, inside
// its namespace: no include guard and no includes here.
//
// NOTE [Shared rounds] The counter is (group, example, sample, stream). A Philox round mixes word 0 with word 3 and word 2
// with word 1, so that of the ten rounds the first two multiplications that a group takes part in see nothing of example
// and sample: they are done once for all rows (struct Groups), and those of example and sample once for all groups
// (struct RowShare). Eight rounds are left for each row and group: 48 vector operations instead of 60 per 64 elements.
//
// Each 32-bit word sits in a 64-bit lane of its own, whose upper half is garbage that no operation reads: one
// multiplication then gives both halves of a product in place.

typedef uint64_t vwords __attribute__((vector_size(kBytes)));
constexpr int kVectors = 64 / kBytes;  // that hold one word of eight groups

inline vwords multiply_low(vwords a, uint32_t m) {
#if IWSGD_AVX512
  return (vwords)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif IWSGD_AVX2
  return (vwords)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#elif IWSGD_X86
  return (vwords)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(m));
#else
  return (a & 0xFFFFFFFFu) * uint64_t(m);
#endif
}

struct Keys {
  uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];
  explicit Keys(uint64_t seed) {
    for (uint32_t i = 0; i < kPhiloxRounds; ++i) {
      k0[i] = static_cast<uint32_t>(seed) + i * kPhiloxW0;
      k1[i] = static_cast<uint32_t>(seed >> 32) + i * kPhiloxW1;
    }
  }
};

// Eight groups after the part of rounds 0 and 1 that knows only group, stream and key.
struct Groups {
  vwords p0[kVectors], p1[kVectors];
  Groups(uint32_t group, uint32_t stream, const Keys& keys) {
    for (int v = 0; v < kVectors; ++v) {
      // The order of the groups within the lanes is the one that words_to_bits undoes.
#if IWSGD_AVX512
      const vwords order = {0, 4, 1, 5, 2, 6, 3, 7};
#elif IWSGD_AVX2
      const vwords order = {0, 2, 1, 3};
#else
      const vwords order = {0, 1};
#endif
      p0[v] = multiply_low(order + (group + 8 / kVectors * v), kPhiloxM0);
      p1[v] = multiply_low((p0[v] >> 32) ^ (stream ^ keys.k1[0]), kPhiloxM1);
    }
  }
};

// One row after the part of rounds 0 and 1 that knows only example, sample and key.
struct RowShare {
  uint64_t x0, x2, c3;  // 64 bits wide, so that a vector unit broadcasts them straight from memory
  RowShare() = default;
  RowShare(const RowAddress& row, const Keys& keys) {
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * row.sample;
    const uint32_t c0 = static_cast<uint32_t>(p1 >> 32) ^ row.example ^ keys.k0[0];
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0;
    x0 = (p1 & 0xFFFFFFFFu) ^ keys.k0[1];
    x2 = (p0 >> 32) ^ keys.k1[1];
    c3 = p0 & 0xFFFFFFFFu;
  }
};

// The words of eight groups, words 0 and 1 side by side and words 2 and 3, in Groups' order of the lanes.
struct Drawn {
  vwords w01[kVectors], w23[kVectors];
};

// The words of eight groups for each of N rows. Chains that know nothing of each other stand side by side, N * V of them, so that none
// waits for its products. With AVX-512 (a Xeon), N = 4 against 1: the gradient of bfloat16 from memory 1.05 to 1.09 times as fast, other
// work from memory the same within noise; in the first level of a cache the forward of float32 0.93, the gradient of bfloat16 0.95.
template <int N>
inline void draw_8(const Groups& groups, const RowShare* rows, const Keys& keys, Drawn* drawn) {
  constexpr uint64_t kLow = 0xFFFFFFFFu;
  constexpr int V = kVectors < 2 ? 1 : 2, M = N * V;
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; v += V) {
    vwords c0[M], c1[M], c2[M], c3[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const RowShare& row = rows[m / V];
      c0[m] = (groups.p1[v + m % V] >> 32) ^ row.x0;
      c1[m] = groups.p1[v + m % V];
      c2[m] = groups.p0[v + m % V] ^ row.x2;
      c3[m] = splat<vwords>(row.c3);
    }
#pragma GCC unroll 10
    for (int round = 2; round < kPhiloxRounds - 1; ++round)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const vwords p0 = multiply_low(c0[m], kPhiloxM0), p1 = multiply_low(c2[m], kPhiloxM1);
        c0[m] = (p1 >> 32) ^ c1[m] ^ uint64_t(keys.k0[round]);
        c2[m] = (p0 >> 32) ^ c3[m] ^ uint64_t(keys.k1[round]);
        c1[m] = p1;
        c3[m] = p0;
      }
    // The last round leaves its two words side by side: a product with its halves swapped is (high, low).
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const vwords p0 = multiply_low(c0[m], kPhiloxM0), p1 = multiply_low(c2[m], kPhiloxM1);
      Drawn& to = drawn[m / V];
      to.w01[v + m % V] = (p1 >> 32 | p1 << 32) ^ ((c1[m] & kLow) ^ uint64_t(keys.k0[kPhiloxRounds - 1]));
      to.w23[v + m % V] = (p0 >> 32 | p0 << 32) ^ ((c3[m] & kLow) ^ uint64_t(keys.k1[kPhiloxRounds - 1]));
    }
  }
}
inline Drawn draw_8(const Groups& groups, const RowShare& row, const Keys& keys) {
  Drawn drawn;
  draw_8<1>(groups, &row, keys, &drawn);
  return drawn;
}

// The words in the order of the groups: 32 words of 32 bits, or, on these little-endian machines, 64 fields of 16.
inline void store_words(const Drawn& drawn, void* to) {
  auto* at = static_cast<unsigned char*>(to);
#if IWSGD_AVX512
  _mm512_storeu_si512(at, _mm512_unpacklo_epi64((__m512i)drawn.w01[0], (__m512i)drawn.w23[0]));
  _mm512_storeu_si512(at + 64, _mm512_unpackhi_epi64((__m512i)drawn.w01[0], (__m512i)drawn.w23[0]));
#elif IWSGD_AVX2
  for (int v = 0; v < kVectors; ++v, at += 64) {
    _mm256_storeu_si256((__m256i*)at, _mm256_unpacklo_epi64((__m256i)drawn.w01[v], (__m256i)drawn.w23[v]));
    _mm256_storeu_si256((__m256i*)(at + 32), _mm256_unpackhi_epi64((__m256i)drawn.w01[v], (__m256i)drawn.w23[v]));
  }
#else
  for (int g = 0; g < 8; ++g, at += 16) {
    const uint64_t two[2] = {drawn.w01[g / 2][g % 2], drawn.w23[g / 2][g % 2]};
    std::memcpy(at, two, sizeof two);
  }
#endif
}

// Writes what belongs to elements [begin, end) of the inner dimension at outer index o: of_positions(position, n) draws for n positions,
// without a wrap among them, and returns the value of each as a function of its number.
template <class A, class OfPositions>
inline void spread(const Layout& layout, int64_t o, int64_t begin, int64_t end, A* to, OfPositions&& of_positions) {
  const int64_t last = o * layout.inner + end;
  for (int64_t index = o * layout.inner + begin; index < last;) {
    const int64_t position = index / layout.share % layout.positions, offset = index % layout.share;
    // positions up to where they wrap, or the chunk ends
    const int64_t n = std::min((last - index + offset + layout.share - 1) / layout.share, layout.positions - position);
    const auto value = of_positions(position, n);
    const int64_t count = std::min(last - index, n * layout.share - offset);
    if (layout.share == 1) {
      for (int64_t i = 0; i < n; ++i) to[i] = value(i);
    } else {
      int64_t left = layout.share - offset;
      for (int64_t i = 0, at = 0; i < n; ++i, left = layout.share) {
        const int64_t run = std::min(left, count - at);
        std::fill(to + at, to + at + run, value(i));
        at += run;
      }
    }
    to += count;
    index += count;
  }
}
