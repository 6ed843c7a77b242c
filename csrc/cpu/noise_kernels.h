// The noise op on one row, for one instruction set. Two steps: the keep bits of a run of positions go to a small buffer
// (1/32 of the bytes of fp32 data, it stays in L1), and the bits are applied to data of any type and layout. So the mask
// rule stands once per instruction set, and forward and backward share it.

// ---- keep bits: one byte per group of kGroup elements ----

#if IWSGD_AVX512
// Eight groups at a time, each Philox word in its own 64-bit lane, where one multiplication gives both halves of a product.
inline void keep_eight_groups(uint8_t* bits, const RowAddress& row, uint32_t group, uint32_t threshold) {
  // Lane order 0 4 1 5 2 6 3 7: the two unpacks at the end then put the groups in memory order.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  __m512i c0 = _mm512_add_epi32(_mm512_set1_epi64(group), order);
  __m512i c1 = _mm512_set1_epi64(row.example), c2 = _mm512_set1_epi64(row.sample), c3 = _mm512_set1_epi64(row.stream);
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  uint32_t k0 = static_cast<uint32_t>(row.seed), k1 = static_cast<uint32_t>(row.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const __m512i p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);  // reads the low half of each lane only
    c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi64(k0), 0x96);  // a ^ b ^ c
    c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(k1), 0x96);
    c1 = p1;
    c3 = p0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  const __mmask16 high = 0xAAAA;
  const __m512i w01 = _mm512_mask_mov_epi32(c0, high, _mm512_slli_epi64(c1, 32));
  const __m512i w23 = _mm512_mask_mov_epi32(c2, high, _mm512_slli_epi64(c3, 32));
  const __m512i first = _mm512_unpacklo_epi64(w01, w23), second = _mm512_unpackhi_epi64(w01, w23);
  const __m512i t = _mm512_set1_epi16(static_cast<int16_t>(threshold));
  const uint64_t kept = static_cast<uint64_t>(_mm512_cmpge_epu16_mask(first, t)) |
                        static_cast<uint64_t>(_mm512_cmpge_epu16_mask(second, t)) << 32;
  std::memcpy(bits, &kept, sizeof kept);
}
#elif IWSGD_AVX2
// Four groups: their keep bits as 0xFF/0x00 bytes in two vectors of 16-bit fields.
inline __m256i keep_four_groups(const RowAddress& row, uint32_t group, __m256i t) {
  const __m256i order = _mm256_setr_epi64x(0, 2, 1, 3);  // as above, for the two unpacks
  __m256i c0 = _mm256_add_epi32(_mm256_set1_epi64x(group), order);
  __m256i c1 = _mm256_set1_epi64x(row.example), c2 = _mm256_set1_epi64x(row.sample), c3 = _mm256_set1_epi64x(row.stream);
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  uint32_t k0 = static_cast<uint32_t>(row.seed), k1 = static_cast<uint32_t>(row.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const __m256i p0 = _mm256_mul_epu32(c0, m0), p1 = _mm256_mul_epu32(c2, m1);
    c0 = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(c1, _mm256_set1_epi64x(k0)));
    c2 = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(c3, _mm256_set1_epi64x(k1)));
    c1 = p1;
    c3 = p0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  const __m256i w01 = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
  const __m256i w23 = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
  const __m256i first = _mm256_unpacklo_epi64(w01, w23), second = _mm256_unpackhi_epi64(w01, w23);
  const __m256i keep_first = _mm256_cmpeq_epi16(_mm256_max_epu16(first, t), first);
  const __m256i keep_second = _mm256_cmpeq_epi16(_mm256_max_epu16(second, t), second);
  return _mm256_permute4x64_epi64(_mm256_packs_epi16(keep_first, keep_second), 0xD8);  // packs works on 128-bit halves
}
inline void keep_eight_groups(uint8_t* bits, const RowAddress& row, uint32_t group, uint32_t threshold) {
  const __m256i t = _mm256_set1_epi16(static_cast<int16_t>(threshold));
  const uint32_t low = static_cast<uint32_t>(_mm256_movemask_epi8(keep_four_groups(row, group, t)));
  const uint32_t high = static_cast<uint32_t>(_mm256_movemask_epi8(keep_four_groups(row, group + 4, t)));
  std::memcpy(bits, &low, sizeof low);
  std::memcpy(bits + 4, &high, sizeof high);
}
#else
inline void keep_eight_groups(uint8_t* bits, const RowAddress& row, uint32_t group, uint32_t threshold) {
  for (uint32_t g = 0; g < 8; ++g) bits[g] = static_cast<uint8_t>(keep_group(row, group + g, threshold));
}
#endif

// The keep bits of `groups` groups from `group` on; writes whole blocks of eight bytes. threshold < kFieldRange.
inline void keep_bits(uint8_t* bits, const RowAddress& row, int64_t group, int64_t groups, uint32_t threshold) {
  for (int64_t g = 0; g < groups; g += 8) keep_eight_groups(bits + g, row, static_cast<uint32_t>(group + g), threshold);
}

// The bits of 16 elements from element `at` of a bit buffer on, whatever `at` is (reads up to four bytes past it).
inline uint32_t bits_at(const uint8_t* bits, int64_t at) {
  uint32_t u;
  std::memcpy(&u, bits + (at >> 3), sizeof u);
  return u >> (at & 7);
}

// ---- applying bits to data ----

template <class T>
inline T keep_one(acc_t<T> x, uint32_t bit) {
  // Masked as an integer: see NOTE [Instruction sets].
  using A = acc_t<T>;
  using U = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;
  return from_acc<T>(bit_cast<A>(static_cast<U>(bit_cast<U>(x) & (U(0) - U(bit & 1u)))));
}

// y[i] = keep[at + i] ? x[i] * scale : 0
template <class T>
inline void apply(const uint8_t* bits, int64_t at, const T* x, T* y, int64_t n, acc_t<T> scale) {
  using V = vec<acc_t<T>>;
  constexpr int L = lanes<acc_t<T>>;
  const V k = splat<V>(scale);
  int64_t i = 0;
  for (; i + L <= n; i += L) store(y + i, keep_lanes(load(x + i) * k, bits_at(bits, at + i)));
  for (; i < n; ++i) y[i] = keep_one<T>(to_acc(x[i]) * scale, bits_at(bits, at + i));
}

// sum[i] += keep[at + i] ? g[i] : 0
template <class T>
inline void accumulate(const uint8_t* bits, int64_t at, const T* g, acc_t<T>* sum, int64_t n) {
  constexpr int L = lanes<acc_t<T>>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store(sum + i, load(sum + i) + keep_lanes(load(g + i), bits_at(bits, at + i)));
  for (; i < n; ++i) sum[i] += keep_one<acc_t<T>>(to_acc(g[i]), bits_at(bits, at + i));
}

// y[i] = x[i] * scale
template <class In, class T>
inline void scaled(const In* x, T* y, int64_t n, acc_t<T> scale) {
  using V = vec<acc_t<T>>;
  constexpr int L = lanes<acc_t<T>>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store(y + i, load(x + i) * splat<V>(scale));
  for (; i < n; ++i) y[i] = from_acc<T>(to_acc(x[i]) * scale);
}

// ---- one chunk: elements [begin, end) of the inner dimension at outer index o, of one row ----

constexpr int64_t kChunk = 2048;  // elements: x and its bits stay in L1 while S outputs are written

// Calls elements(bits, at, offset, n) for each run x[offset .. offset + n) whose keep bits are consecutive from `at` on, and
// shared(bit, offset, n) for each run that shares one bit.
template <class Elements, class Shared>
inline void for_each_run(const Layout& layout, const RowAddress& row, uint32_t threshold, int64_t o, int64_t begin, int64_t end,
                         Elements&& elements, Shared&& shared) {
  alignas(64) uint8_t bits[kChunk / kGroup + 80];  // an unaligned start, whole blocks of groups, reads past the end
  const int64_t first = o * layout.inner + begin, last = o * layout.inner + end;
  const int64_t share = layout.share, positions = layout.positions;
  const bool whole = positions <= end - begin;  // the chunk meets every position: draw each once
  if (whole) keep_bits(bits, row, 0, (positions + kGroup - 1) / kGroup, threshold);
  for (int64_t index = first; index < last;) {
    const int64_t position = index / share % positions;
    const int64_t n = std::min(last - index, (positions - position) * share - index % share);  // up to where positions wrap
    int64_t at = position;
    if (!whole) {
      at = position % kGroup;
      const int64_t count = (index % share + n + share - 1) / share;
      keep_bits(bits, row, position / kGroup, (at + count + kGroup - 1) / kGroup, threshold);
    }
    if (share == 1) {
      elements(bits, at, index - first, n);
      index += n;
    } else {
      for (const int64_t stop = index + n; index < stop; ++at) {
        const int64_t run = std::min(stop - index, share - index % share);
        shared(bits_at(bits, at) & 1u, index - first, run);
        index += run;
      }
    }
  }
}

// y = keep * scale * x, the chunk of one noise sample.
template <class T>
void noise_chunk(const Layout& layout, const RowAddress& row, uint32_t threshold, int64_t o, int64_t begin, int64_t end, const T* x,
                 T* y) {
  const auto scale = static_cast<acc_t<T>>(keep_scale(threshold));
  for_each_run(
      layout, row, threshold, o, begin, end,
      [&](const uint8_t* bits, int64_t at, int64_t offset, int64_t n) { apply(bits, at, x + offset, y + offset, n, scale); },
      [&](uint32_t bit, int64_t offset, int64_t n) {
        if (bit)
          scaled(x + offset, y + offset, n, scale);
        else
          std::memset(static_cast<void*>(y + offset), 0, n * sizeof(T));
      });
}

// sum += keep * g, the chunk of one noise sample.
template <class T>
void noise_sum_chunk(const Layout& layout, const RowAddress& row, uint32_t threshold, int64_t o, int64_t begin, int64_t end,
                     const T* g, acc_t<T>* sum) {
  for_each_run(
      layout, row, threshold, o, begin, end,
      [&](const uint8_t* bits, int64_t at, int64_t offset, int64_t n) { accumulate(bits, at, g + offset, sum + offset, n); },
      [&](uint32_t bit, int64_t offset, int64_t n) {
        if (bit)
          for (int64_t i = offset; i < offset + n; ++i) sum[i] += to_acc(g[i]);
      });
}
