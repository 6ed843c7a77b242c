// Real-valued noise on one row, for one instruction set: the law's numbers are made 32 at a time into a buffer that the first cache holds,
// and applied from there. Forward and backward share them.
#include "philox_simd.h"
#include "simd_math.h"

// ---- numbers of a law: eight calls of the generator, 32 elements at a time ----

#if IWSGD_AVX512
inline vfloat vsqrt(vfloat x) { return (vfloat)_mm512_sqrt_ps((__m512)x); }
inline vfloat interleave_low(vfloat a, vfloat b) { return (vfloat)_mm512_unpacklo_ps((__m512)a, (__m512)b); }
inline vfloat interleave_high(vfloat a, vfloat b) { return (vfloat)_mm512_unpackhi_ps((__m512)a, (__m512)b); }
#elif IWSGD_AVX2
inline vfloat vsqrt(vfloat x) { return (vfloat)_mm256_sqrt_ps((__m256)x); }
inline vfloat interleave_low(vfloat a, vfloat b) { return (vfloat)_mm256_unpacklo_ps((__m256)a, (__m256)b); }
inline vfloat interleave_high(vfloat a, vfloat b) { return (vfloat)_mm256_unpackhi_ps((__m256)a, (__m256)b); }
#elif IWSGD_X86
inline vfloat vsqrt(vfloat x) { return (vfloat)_mm_sqrt_ps((__m128)x); }
inline vfloat interleave_low(vfloat a, vfloat b) { return (vfloat)_mm_unpacklo_ps((__m128)a, (__m128)b); }
inline vfloat interleave_high(vfloat a, vfloat b) { return (vfloat)_mm_unpackhi_ps((__m128)a, (__m128)b); }
#else
inline vfloat vsqrt(vfloat x) {
  for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
}
inline vfloat interleave_low(vfloat a, vfloat b) { return vfloat{a[0], b[0], a[1], b[1]}; }
inline vfloat interleave_high(vfloat a, vfloat b) { return vfloat{a[2], b[2], a[3], b[3]}; }
#endif

// minus_two_log of each lane; near_one is a mask.
inline vfloat minus_two_log(vfloat u, vint near_one, vfloat less) {
  const vint bits = (vint)u;
  const vint e = (bits - kSqrtHalf) >> 23;
  const vfloat f = select(near_one, less, (vfloat)(bits - (e << 23)) - 1.0f);
  const vfloat log = polynomial(f, {kLog7, kLog6, kLog5, kLog4, kLog3, kLog2, kLog1, kLog0});
  return log * f + __builtin_convertvector(e, vfloat) * kLn2;
}

// The numbers of the words in each lane, as real_noise.h has them for one: NOTE [Normals in float32].
inline Pair<vfloat> number_pairs(Normal, vint a, vint b) {
  const vint upper = a >> 31;
  const vfloat d = __builtin_convertvector(a, vfloat) * 0x1p-32f + 0x1p-33f;
  const vint near_one = (vint)(d > splat<vfloat>(-0.25f)) & upper;
  const vfloat r = vsqrt(minus_two_log(d + (vfloat)((vint)splat<vfloat>(1.0f) & upper), near_one, d));

  const vint turned = (vint)((vuint)b + 0x20000000u);
  const vfloat h = (vfloat)((turned >> 7 & 0x7FFFFF) | 0x3F800000) - 1.5f, h2 = h * h;
  const vfloat s = polynomial(h2, {kSin7, kSin5, kSin3, kSin1}) * h, c = polynomial(h2, {kCos6, kCos4, kCos2, 1.0f});
  const vint odd = turned << 1 >> 31, sign = splat<vint>(INT32_MIN);
  const vint cos_sign = (vint)((vuint)turned + 0x40000000u) & sign, sin_sign = turned & sign;
  return {r * (vfloat)((vint)select(odd, s, c) ^ cos_sign), r * (vfloat)((vint)select(odd, c, s) ^ sin_sign)};
}
inline vfloat numbers_of(Laplace, vint word) {
  const vfloat u = __builtin_convertvector(word & INT32_MAX, vfloat) * 0x1p-31f + 0x1p-32f;
  const vfloat size = minus_two_log(u, splat<vint>(0), u) * Laplace::kPerLog;
  return (vfloat)((vint)size ^ (word & splat<vint>(INT32_MIN)));
}
inline Pair<vfloat> number_pairs(Laplace law, vint a, vint b) { return {numbers_of(law, a), numbers_of(law, b)}; }
inline Pair<vfloat> number_pairs(Uniform, vint a, vint b) {
  constexpr float kStep = static_cast<float>(Uniform::kStep), kHalf = static_cast<float>(Uniform::kStep / 2);
  return {__builtin_convertvector(a, vfloat) * kStep + kHalf, __builtin_convertvector(b, vfloat) * kStep + kHalf};
}

// The 32 numbers of eight groups.
template <class L>
inline void store_numbers(L law, const Drawn& drawn, float* z) {
  constexpr uint64_t kLow = 0xFFFFFFFFu;
  for (int v = 0; v < kVectors; ++v, z += 2 * kLanes) {
    // Words 0 and 2 of a group side by side, and words 1 and 3: of the pairs that come out, interleaving makes whole groups, in order.
    const vwords w01 = drawn.w01[v], w23 = drawn.w23[v];
    const Pair<vfloat> pairs = number_pairs(law, (vint)((w01 & kLow) | w23 << 32), (vint)(w01 >> 32 | (w23 & ~kLow)));
    store(z, interleave_low(pairs.first, pairs.second));
    store(z + kLanes, interleave_high(pairs.first, pairs.second));
  }
}
template <class L>
inline void store_numbers(L, const Drawn& drawn, double* z) {  // float64 is for checking, not for speed
  uint32_t words[32];
  store_words(drawn, words);
  for (int i = 0; i < 32; i += 2) {
    const Pair<double> pair = L::template pair<double>(words[i], words[i + 1]);
    z[i] = pair.first;
    z[i + 1] = pair.second;
  }
}

constexpr int64_t kChunk = 2048;  // elements, at most, of one piece of work

// The memory for the numbers of a chunk's elements: room for a start inside a group, and for whole blocks of 32.
template <class A>
using Buffer = A[kChunk + 64];

// The numbers of n positions from `position` on: a pointer into the buffer.
template <class L, class A>
inline const A* numbers(L law, const RowAddress& address, int64_t position, int64_t n, Buffer<A>& buffer) {
  const Keys keys(address.seed);
  const RowShare row(address, keys);
  const int64_t group = position / kNumbers, before = position % kNumbers;
  for (int64_t i = 0; i < before + n; i += 32)
    store_numbers(law, draw_8(Groups(static_cast<uint32_t>(group + i / kNumbers), address.stream, keys), row, keys), buffer + i);
  return buffer + before;
}

// The numbers of elements [begin, end) of the inner dimension at outer index o.
template <class L, class A>
inline const A* numbers(L law, const Layout& layout, const RowAddress& row, int64_t o, int64_t begin, int64_t end, Buffer<A>& buffer) {
  const int64_t position = (o * layout.inner + begin) / layout.share % layout.positions;
  if (layout.share == 1 && position + (end - begin) <= layout.positions) return numbers(law, row, position, end - begin, buffer);
  Buffer<A> drawn;
  spread(layout, o, begin, end, static_cast<A*>(buffer), [&](int64_t at, int64_t n) {
    const A* z = numbers(law, row, at, n, drawn);
    return [z](int64_t i) { return z[i]; };
  });
  return buffer;
}

// ---- one chunk: elements [begin, end) of the inner dimension at outer index o, of one example ----

// y = x * (1 + std * z), or x + std * z, for all noise samples.
template <class L, class T>
void real_noise_chunk(L law, const RealNoise& call, int64_t o, int64_t b, int64_t begin, int64_t end, const T* x, T* y) {
  using A = acc_t<T>;
  using V = vec<A>;
  const auto std = static_cast<A>(call.std);
  alignas(64) Buffer<A> buffer;
  for (int64_t s = 0; s < call.samples; ++s) {
    const A* z = numbers(law, call.layout, call.address.of_row(s, b, call.layout.examples), o, begin, end, buffer);
    const T* from = x + call.input_at(o, s, b) + begin;
    T* to = y + call.output_at(o, s, b) + begin;
    if (call.multiply)
      sweep<lanes<A>>(
          end - begin, [&](int64_t i) { store(to + i, load(from + i) * (load(z + i) * splat<V>(std) + A(1))); },
          [&](int64_t i) { to[i] = from_acc<T>(to_acc(from[i]) * (z[i] * std + A(1))); });
    else
      sweep<lanes<A>>(
          end - begin, [&](int64_t i) { store(to + i, load(from + i) + load(z + i) * splat<V>(std)); },
          [&](int64_t i) { to[i] = from_acc<T>(to_acc(from[i]) + z[i] * std); });
  }
}

// dx = sum over noise samples of dy * (1 + std * z).
template <class L, class T>
void real_noise_sum_chunk(L law, const RealNoise& call, int64_t o, int64_t b, int64_t begin, int64_t end, const T* dy, T* dx) {
  using A = acc_t<T>;
  using V = vec<A>;
  const auto std = static_cast<A>(call.std);
  alignas(64) Buffer<A> buffer;
  alignas(64) A sum[kChunk];
  std::fill(sum, sum + (end - begin), A(0));
  for (int64_t s = 0; s < call.samples; ++s) {
    const A* z = numbers(law, call.layout, call.address.of_row(s, b, call.layout.examples), o, begin, end, buffer);
    const T* from = dy + call.output_at(o, s, b) + begin;
    sweep<lanes<A>>(
        end - begin, [&](int64_t i) { store(sum + i, load(sum + i) + load(from + i) * (load(z + i) * splat<V>(std) + A(1))); },
        [&](int64_t i) { sum[i] += to_acc(from[i]) * (z[i] * std + A(1)); });
  }
  T* to = dx + call.example_at(o, b) + begin;
  sweep<lanes<A>>(end - begin, [&](int64_t i) { store(to + i, load(sum + i)); }, [&](int64_t i) { to[i] = from_acc<T>(sum[i]); });
}
