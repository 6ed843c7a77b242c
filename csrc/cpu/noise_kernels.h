// The noise op on one row, for one instruction set: keep bits are made 64 at a time and applied to data of any type and
// layout. Forward and backward share the bits, so that the mask rule stands once per instruction set.
#include "philox_simd.h"

// ---- keep bits: one byte per group of kGroup elements, 64 elements at a time ----

// The keep bits of 64 elements. AVX-512 holds them where its masks live: a way through the integer registers costs a fifth
// of the whole kernel.
struct Bits {
#if IWSGD_AVX512
  __mmask32 low, high;
  uint32_t from(int i) const { return i < 32 ? low >> i : high >> (i - 32); }  // those of elements i and on, for constant i
  uint64_t word() const { return low | static_cast<uint64_t>(high) << 32; }
#else
  uint64_t bits;
  uint32_t from(int i) const { return static_cast<uint32_t>(bits >> i); }
  uint64_t word() const { return bits; }
#endif
};

// Bit i is set where field i of the eight groups reaches the threshold.
inline Bits words_to_bits(const Drawn& drawn, uint32_t threshold) {
  const vwords *w01 = drawn.w01, *w23 = drawn.w23;
  const auto t16 = static_cast<int16_t>(threshold);
#if IWSGD_AVX512
  const __m512i t = _mm512_set1_epi16(t16);
  const __m512i first = _mm512_unpacklo_epi64((__m512i)w01[0], (__m512i)w23[0]);
  const __m512i second = _mm512_unpackhi_epi64((__m512i)w01[0], (__m512i)w23[0]);
  return {_mm512_cmpge_epu16_mask(first, t), _mm512_cmpge_epu16_mask(second, t)};
#elif IWSGD_AVX2
  const __m256i t = _mm256_set1_epi16(t16);
  uint64_t bits = 0;
  for (int v = 0; v < kVectors; ++v) {
    const __m256i first = _mm256_unpacklo_epi64((__m256i)w01[v], (__m256i)w23[v]);
    const __m256i second = _mm256_unpackhi_epi64((__m256i)w01[v], (__m256i)w23[v]);
    const __m256i kept =
        _mm256_packs_epi16(_mm256_cmpeq_epi16(_mm256_max_epu16(first, t), first), _mm256_cmpeq_epi16(_mm256_max_epu16(second, t), second));
    const __m256i in_order = _mm256_permute4x64_epi64(kept, 0xD8);  // packs works within 128-bit halves
    bits |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(in_order))) << (32 * v);
  }
  return {bits};
#elif IWSGD_X86
  const __m128i t = _mm_set1_epi16(t16), zero = _mm_setzero_si128();
  uint64_t bits = 0;
  for (int v = 0; v < kVectors; ++v) {
    const __m128i first = _mm_unpacklo_epi64((__m128i)w01[v], (__m128i)w23[v]);
    const __m128i second = _mm_unpackhi_epi64((__m128i)w01[v], (__m128i)w23[v]);
    // max(t - field, 0) == 0: SSE2 has no unsigned comparison
    const __m128i kept = _mm_packs_epi16(_mm_cmpeq_epi16(_mm_subs_epu16(t, first), zero), _mm_cmpeq_epi16(_mm_subs_epu16(t, second), zero));
    bits |= static_cast<uint64_t>(_mm_movemask_epi8(kept)) << (16 * v);
  }
  return {bits};
#else
  uint64_t bits = 0;
  for (int g = 0; g < 8; ++g) {
    const uint64_t a = w01[g / 2][g % 2], b = w23[g / 2][g % 2];
    const Words words{{static_cast<uint32_t>(a), static_cast<uint32_t>(a >> 32), static_cast<uint32_t>(b), static_cast<uint32_t>(b >> 32)}};
    for (int j = 0; j < kGroup; ++j) bits |= static_cast<uint64_t>(keep(field(words, j), threshold)) << (kGroup * g + j);
  }
  (void)t16;
  return {bits};
#endif
}

// The keep bits of 64 elements. threshold < kFieldRange.
inline Bits keep_64(const Groups& groups, const RowShare& row, const Keys& keys, uint32_t threshold) {
  return words_to_bits(draw_8(groups, row, keys), threshold);
}

// The keep bits of `groups` groups from `group` on, to memory; writes whole blocks of eight bytes.
inline void keep_bits(uint8_t* __restrict bits, RowAddress address, int64_t group, int64_t groups, uint32_t threshold) {
  const Keys keys(address.seed);
  const RowShare row(address, keys);
  for (int64_t g = 0; g < groups; g += 8) {
    const uint64_t kept = keep_64(Groups(static_cast<uint32_t>(group + g), address.stream, keys), row, keys, threshold).word();
    std::memcpy(bits + g, &kept, sizeof kept);
  }
}

// ---- applying bits to data ----

template <class T>
inline T keep_one(acc_t<T> x, uint64_t bit) {
  // Masked as an integer: see NOTE [Instruction sets].
  using A = acc_t<T>;
  using U = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;
  return from_acc<T>(bit_cast<A>(static_cast<U>(bit_cast<U>(x) & (U(0) - static_cast<U>(bit & 1u)))));
}

// Elements become scale * x, or 0, by the bits that keep them.
template <class T>
struct Scaled {
  using A = acc_t<T>;
  A scale;
  explicit Scaled(const Rule& rule) : scale(static_cast<A>(rule.scale)) {}
  vec<A> kept(vec<A> x) const { return x * splat<vec<A>>(scale); }
  template <class V>
  V chosen(V kept, uint32_t bits) const {
    return keep_lanes(kept, bits);
  }
  T one(T x, uint64_t bit) const { return keep_one<T>(to_acc(x) * scale, bit); }
};

// scale * x + shift, or fill.
template <class T>
struct Affine {
  using A = acc_t<T>;
  A scale, shift, fill;
  explicit Affine(const Rule& rule)
      : scale(static_cast<A>(rule.scale)), shift(static_cast<A>(rule.shift)), fill(static_cast<A>(rule.fill)) {}
  vec<A> kept(vec<A> x) const { return x * splat<vec<A>>(scale) + splat<vec<A>>(shift); }
  template <class V>
  V chosen(V kept, uint32_t bits) const {
    V dropped;
    if constexpr (std::is_same_v<V, vshort>) dropped = splat<V>(bit_cast<int16_t>(from_acc<T>(fill)));
    else dropped = splat<V>(fill);
    return (V)((vlong)keep_lanes(kept, bits) | (vlong)keep_lanes(dropped, ~bits));
  }
  T one(T x, uint64_t bit) const { return bit & 1u ? from_acc<T>(to_acc(x) * scale + shift) : from_acc<T>(fill); }
};

// y[i] = what becomes of x[i] by bit i, for n <= 64
template <class T, class Becomes>
inline void apply(uint64_t bits, const T* x, T* y, int64_t n, const Becomes& becomes) {
  sweep<lanes<acc_t<T>>>(
      n, [&](int64_t i) { store(y + i, becomes.chosen(becomes.kept(load(x + i)), static_cast<uint32_t>(bits >> i))); },
      [&](int64_t i) { y[i] = becomes.one(x[i], bits >> i); });
}

// 64 elements as they are where they are kept, rounded: the same for every noise sample of an expansion, which only chooses.
template <class T>
struct Kept64 {
  static constexpr int L = lanes<T>, kParts = L / lanes<acc_t<T>>;
  stored<T> v[64 / L];
  template <class Becomes>
  Kept64(const T* x, const Becomes& becomes) {
#pragma GCC unroll 32
    for (int k = 0; k < 64 / L; ++k, x += L) {
      vec<acc_t<T>> made[kParts];
      for (int i = 0; i < kParts; ++i) made[i] = becomes.kept(load(x + i * lanes<acc_t<T>>));
      v[k] = rounded<T>(made);
    }
  }
  template <class Becomes>
  void write(T* y, Bits bits, const Becomes& becomes, bool past_cache) const {
    if (past_cache) {
#pragma GCC unroll 32
      for (int k = 0; k < 64 / L; ++k) stream(y + k * L, becomes.chosen(v[k], bits.from(k * L)));
    } else {
#pragma GCC unroll 32
      for (int k = 0; k < 64 / L; ++k) put(y + k * L, becomes.chosen(v[k], bits.from(k * L)));
    }
  }
};

// True where outputs go past the caches: so large that they leave them long before anything reads them. With a reader behind it (2 cores
// of a Xeon) that took 1.5 times as long at 64 MB, 0.93 at 128 MB; alone 1.1 and 0.78. Whole lines only: `y` is a row of one sample.
constexpr int64_t kStreamBytes = 96 << 20;
template <class T>
inline bool streams_output(const Noise& call, const T* y, int64_t y_step) {
  const Layout& layout = call.layout;
  return layout.outer * call.samples * layout.examples * layout.inner * static_cast<int64_t>(sizeof(T)) >= kStreamBytes &&
         reinterpret_cast<std::size_t>(y) % kLineBytes == 0 && y_step * sizeof(T) % kLineBytes == 0;
}

// sum[i] += bit i ? g[i] : 0, for n <= 64
template <class T>
inline void accumulate(uint64_t bits, const T* g, acc_t<T>* sum, int64_t n) {
  sweep<lanes<acc_t<T>>>(
      n, [&](int64_t i) { store(sum + i, load(sum + i) + keep_lanes(load(g + i), static_cast<uint32_t>(bits >> i))); },
      [&](int64_t i) { sum[i] += keep_one<acc_t<T>>(to_acc(g[i]), bits >> i); });
}

// The sums of 64 elements, held in registers over the noise samples.
template <class T>
struct Sum64 {
  using A = acc_t<T>;
  static constexpr int L = lanes<A>;
  vec<A> sum[64 / L];
  explicit Sum64(const A* from) {
#pragma GCC unroll 32
    for (int v = 0; v < 64 / L; ++v) sum[v] = load(from + v * L);
  }
  void add(Bits bits, const T* g) {
    // Tensors a power of two apart share cache sets, where the hardware's own prefetching gives up: +17% there, 0 elsewhere.
    for (std::size_t byte = 0; byte < 64 * sizeof(T); byte += 64) __builtin_prefetch(reinterpret_cast<const char*>(g + 256) + byte);
#pragma GCC unroll 32
    for (int v = 0; v < 64 / L; ++v) sum[v] = add_lanes(sum[v], load(g + v * L), bits.from(v * L));
  }
  void write(A* to) const {
#pragma GCC unroll 32
    for (int v = 0; v < 64 / L; ++v) store(to + v * L, sum[v]);
  }
};

// y[i] = x[i] * scale
template <class In, class T>
inline void scaled(const In* x, T* y, int64_t n, acc_t<T> scale) {
  using V = vec<acc_t<T>>;
  constexpr int L = lanes<acc_t<T>>;
  sweep<L>(
      n, [&](int64_t i) { store(y + i, load(x + i) * splat<V>(scale)); }, [&](int64_t i) { y[i] = from_acc<T>(to_acc(x[i]) * scale); });
}

// The bits of 57 elements or more, from element `at` of a buffer of keep bits on.
inline uint64_t bits_at(const uint8_t* bits, int64_t at) {
  uint64_t word;
  std::memcpy(&word, bits + (at >> 3), sizeof word);
  return word >> (at & 7);
}

// ---- one chunk: elements [begin, end) of the inner dimension at outer index o, of one row ----

constexpr int64_t kChunk = 4096;  // elements, at most, of one piece of work

// Calls elements(bits, offset, n) for each run x[offset .. offset + n) of at most 56 elements with a bit each, and
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
      for (const int64_t stop = index + n; index < stop;) {
        const int64_t run = std::min<int64_t>(stop - index, 56);  // what one unaligned 64-bit read is sure to hold
        elements(bits_at(bits, at), index - first, run);
        index += run;
        at += run;
      }
    } else {
      for (const int64_t stop = index + n; index < stop; ++at) {
        const int64_t run = std::min(stop - index, share - index % share);
        shared(bits_at(bits, at) & 1u, index - first, run);
        index += run;
      }
    }
  }
}

// True where the chunk's elements have consecutive positions from the start of a group on.
inline bool consecutive(const Layout& layout, int64_t o, int64_t begin, int64_t end) {
  const int64_t position = (o * layout.inner + begin) % layout.positions;
  return layout.share == 1 && position % kGroup == 0 && position + (end - begin) <= layout.positions;
}

// Up to kTogether noise samples are drawn by turns: 64 elements of each, so that x is read once, the groups' share of the
// generator is computed once (NOTE [Shared rounds]), and every tensor is walked in one steady stream. Of these, kAbreast at once.
constexpr int64_t kTogether = 8;
constexpr int kAbreast = kVectors == 1 ? 4 : 1;

// For the 64 elements from i on of a chunk with consecutive positions: calls whole(for_each_sample, i), where for_each_sample(body) calls
// body(bits, s) with the keep bits of one noise sample after another; for the n < 64 elements at its end rest(bits, s, i, n).
template <class Whole, class Rest>
inline void for_each_64(const Noise& call, int64_t o, int64_t b, int64_t begin, int64_t end, Whole&& whole, Rest&& rest) {
  const Keys keys(call.address.seed());
  const uint32_t stream = call.address.of_row(0, 0, 1).stream, threshold = call.rule.threshold;
  const auto group = static_cast<uint32_t>((o * call.layout.inner + begin) % call.layout.positions / kGroup);
  const int64_t samples = call.samples;
  for (int64_t s0 = 0; s0 < samples; s0 += kTogether) {
    const int64_t together = std::min(kTogether, samples - s0);
    RowShare rows[kTogether];
    for (int64_t s = 0; s < together; ++s) rows[s] = RowShare(call.address.of_row(s0 + s, b, call.layout.examples), keys);
    for (int64_t i = begin; i < end; i += 64) {
      const Groups groups(group + static_cast<uint32_t>((i - begin) / kGroup), stream, keys);
      const auto for_each_sample = [&](auto&& body) {
        int64_t s = 0;
        for (; s + kAbreast <= together; s += kAbreast) {
          Drawn drawn[kAbreast];
          draw_8<kAbreast>(groups, rows + s, keys, drawn);
#pragma GCC unroll 8
          for (int n = 0; n < kAbreast; ++n) body(words_to_bits(drawn[n], threshold), s0 + s + n);
        }
        for (; s < together; ++s) body(words_to_bits(draw_8(groups, rows[s], keys), threshold), s0 + s);
      };
      if (end - i >= 64) whole(for_each_sample, i);
      else for_each_sample([&](Bits bits, int64_t s) { rest(bits.word(), s, i, end - i); });
    }
  }
}

// One chunk of one example under all noise samples.
template <class T, class Becomes>
void noise_chunk(const Noise& call, int64_t o, int64_t b, int64_t begin, int64_t end, const T* x, T* y, const Becomes& becomes) {
  const int64_t x_step = call.input_at(o, 1, b) - call.input_at(o, 0, b), y_step = call.output_at(o, 1, b) - call.output_at(o, 0, b);
  x += call.input_at(o, 0, b);
  y += call.output_at(o, 0, b);
  if (consecutive(call.layout, o, begin, end)) {
    const bool past_cache = streams_output(call, y + begin, y_step);
    for_each_64(
        call, o, b, begin, end,
        [=](const auto& for_each_sample, int64_t i) {
          if (x_step == 0) {
            const Kept64<T> kept(x + i, becomes);
            for_each_sample([&](Bits bits, int64_t s) { kept.write(y + s * y_step + i, bits, becomes, past_cache); });
          } else {
            for_each_sample(
                [&](Bits bits, int64_t s) { Kept64<T>(x + s * x_step + i, becomes).write(y + s * y_step + i, bits, becomes, past_cache); });
          }
        },
        [=](uint64_t bits, int64_t s, int64_t i, int64_t n) { apply(bits, x + s * x_step + i, y + s * y_step + i, n, becomes); });
    if (past_cache) end_of_streams();
    return;
  }
  for (int64_t s = 0; s < call.samples; ++s) {
    const T* from = x + s * x_step + begin;
    T* to = y + s * y_step + begin;
    for_each_run(
        call.layout, call.address.of_row(s, b, call.layout.examples), call.rule.threshold, o, begin, end,
        [&](uint64_t bits, int64_t offset, int64_t n) { apply(bits, from + offset, to + offset, n, becomes); },
        [&](uint32_t bit, int64_t offset, int64_t n) {
          const uint64_t bits = bit ? ~uint64_t(0) : 0;
          for (int64_t i = offset; i < offset + n; i += 64) apply(bits, from + i, to + i, std::min<int64_t>(offset + n - i, 64), becomes);
        });
  }
}
template <class T>
void noise_chunk(const Noise& call, int64_t o, int64_t b, int64_t begin, int64_t end, const T* x, T* y) {
  if (call.rule.plain()) noise_chunk(call, o, b, begin, end, x, y, Scaled<T>(call.rule));
  else noise_chunk(call, o, b, begin, end, x, y, Affine<T>(call.rule));
}

// dx = scale * sum over noise samples of keep * dy for one chunk of one example.
template <class T>
void noise_sum_chunk(const Noise& call, int64_t o, int64_t b, int64_t begin, int64_t end, const T* dy, T* dx) {
  alignas(64) acc_t<T> sum[kChunk];
  std::fill(sum, sum + (end - begin), acc_t<T>(0));
  const int64_t step = call.output_at(o, 1, b) - call.output_at(o, 0, b);
  dy += call.output_at(o, 0, b);
  if (consecutive(call.layout, o, begin, end)) {
    acc_t<T>* const to = sum;
    for_each_64(
        call, o, b, begin, end,
        [=](const auto& for_each_sample, int64_t i) {
          Sum64<T> sum_64(to + (i - begin));
          for_each_sample([&](Bits bits, int64_t s) { sum_64.add(bits, dy + s * step + i); });
          sum_64.write(to + (i - begin));
        },
        [=](uint64_t bits, int64_t s, int64_t i, int64_t n) { accumulate(bits, dy + s * step + i, to + (i - begin), n); });
  } else {
    for (int64_t s = 0; s < call.samples; ++s) {
      const T* from = dy + s * step + begin;
      for_each_run(
          call.layout, call.address.of_row(s, b, call.layout.examples), call.rule.threshold, o, begin, end,
          [&](uint64_t bits, int64_t offset, int64_t n) { accumulate(bits, from + offset, sum + offset, n); },
          [&](uint32_t bit, int64_t offset, int64_t n) {
            for (int64_t i = 0; bit && i < n; i += 64)
              accumulate(~uint64_t(0), from + offset + i, sum + offset + i, std::min<int64_t>(n - i, 64));
          });
    }
  }
  scaled(sum, dx + call.example_at(o, b) + begin, end - begin, static_cast<acc_t<T>>(call.rule.scale));
}

#include "noise_rule_kernels.h"
