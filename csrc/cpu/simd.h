// Vectors of the instruction set's own width (wider GCC vectors are several times slower). Read once per instruction set
// by for_each_isa.h, inside its namespace: no include guard and no includes here.

#if IWSGD_AVX512
constexpr int kBytes = 64;
#elif IWSGD_AVX2
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / 4;  // floats in a vector

typedef float vfloat __attribute__((vector_size(kBytes)));
typedef int32_t vint __attribute__((vector_size(kBytes)));
typedef uint32_t vuint __attribute__((vector_size(kBytes)));  // for sums that wrap
typedef double vdouble __attribute__((vector_size(kBytes)));
typedef int64_t vlong __attribute__((vector_size(kBytes)));
typedef int16_t vshort __attribute__((vector_size(kBytes)));

// The vector in which values of type A (float or double) are computed.
template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = vfloat;
};
template <>
struct VectorOf<double> {
  using type = vdouble;
};
template <class A>
using vec = typename VectorOf<A>::type;
template <class A>
constexpr int lanes = kBytes / static_cast<int>(sizeof(A));

// A whole vector of what memory holds: two vectors of floats for the 16-bit types.
template <class T>
using stored = std::conditional_t<sizeof(T) == 2, vshort, vec<acc_t<T>>>;

template <class V, class A>
inline V splat(A x) {
  return V{} + x;
}

inline vfloat load(const float* p) {
  vfloat v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline vdouble load(const double* p) {
  vdouble v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, vdouble v) { std::memcpy(p, &v, sizeof v); }

// The 16-bit types: widened to floats exactly, narrowed to the nearest even.
#if IWSGD_AVX512
using halves = __m256i;
inline vfloat widen(halves u, bf16) { return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(u), 16); }
inline __m512i round_to_bf16(vfloat v) {  // in the upper half of each lane
  const __m512i u = (__m512i)v;
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  return _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC00000));
}
inline halves narrow(vfloat v, bf16) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_to_bf16(v), 16)); }
[[gnu::always_inline]] inline __m512i narrow(vfloat a, vfloat b, bf16) {  // the upper halves side by side, then a's before b's
  const __m512i both = _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(round_to_bf16(a), 16), round_to_bf16(b));
  alignas(64) static constexpr int16_t kOrder[32] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                     1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both);
}
inline vfloat widen(halves u, fp16) { return (vfloat)_mm512_cvtph_ps(u); }
inline halves narrow(vfloat v, fp16) { return _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
[[gnu::always_inline]] inline __m512i narrow(vfloat a, vfloat b, fp16) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(a, fp16{})), narrow(b, fp16{}), 1);
}
// v where the lane's bit is set, else +0 (also for NaN and infinities).
inline vfloat keep_lanes(vfloat v, uint32_t bits) { return (vfloat)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)v); }
inline vdouble keep_lanes(vdouble v, uint32_t bits) { return (vdouble)_mm512_maskz_mov_pd(static_cast<__mmask8>(bits), (__m512d)v); }
inline vshort keep_lanes(vshort v, uint32_t bits) { return (vshort)_mm512_maskz_mov_epi16(static_cast<__mmask32>(bits), (__m512i)v); }
// sum + v where the lane's bit is set, else sum.
inline vfloat add_lanes(vfloat sum, vfloat v, uint32_t bits) {
  return (vfloat)_mm512_mask_add_ps((__m512)sum, static_cast<__mmask16>(bits), (__m512)sum, (__m512)v);
}
inline vdouble add_lanes(vdouble sum, vdouble v, uint32_t bits) {
  return (vdouble)_mm512_mask_add_pd((__m512d)sum, static_cast<__mmask8>(bits), (__m512d)sum, (__m512d)v);
}
#else

#if IWSGD_AVX2
using halves = __m128i;
inline vfloat widen(halves u, bf16) { return (vfloat)_mm256_slli_epi32(_mm256_cvtepu16_epi32(u), 16); }
inline halves narrow(vfloat v, bf16) {
  const __m256i u = (__m256i)v;
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
  const __m256i nan = (__m256i)_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
  r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7FC0), nan);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0xD8));
}
inline vfloat widen(halves u, fp16) { return (vfloat)_mm256_cvtph_ps(u); }
inline halves narrow(vfloat v, fp16) { return _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
template <class T>
inline vfloat load(const T* p) {
  vfloat v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_acc(p[i]);
  return v;
}
template <class T>
inline void store(T* p, vfloat v) {
  for (int i = 0; i < kLanes; ++i) p[i] = from_acc<T>(v[i]);
}
#endif

inline vfloat keep_lanes(vfloat v, uint32_t bits) {
  vint lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = 1 << i;
  const vint mask = (splat<vint>(static_cast<int32_t>(bits)) & lane) == lane;
  return (vfloat)((vint)v & mask);
}
inline vdouble keep_lanes(vdouble v, uint32_t bits) {
  vlong lane;
  for (int i = 0; i < lanes<double>; ++i) lane[i] = 1 << i;
  const vlong mask = (splat<vlong>(static_cast<int64_t>(bits)) & lane) == lane;
  return (vdouble)((vlong)v & mask);
}
inline vshort keep_lanes(vshort v, uint32_t bits) {
  vshort lane;
  for (int i = 0; i < lanes<int16_t>; ++i) lane[i] = static_cast<int16_t>(1 << i);
  return v & ((splat<vshort>(static_cast<int16_t>(bits)) & lane) == lane);
}
template <class V>
inline V add_lanes(V sum, V v, uint32_t bits) {
  return sum + keep_lanes(v, bits);
}
#endif

#if IWSGD_AVX512 || IWSGD_AVX2
template <class T>
inline vfloat load(const T* p) {
  halves u;
  std::memcpy(&u, p, sizeof u);
  return widen(u, T{});
}
template <class T>
inline void store(T* p, vfloat v) {
  const halves u = narrow(v, T{});
  std::memcpy(p, &u, sizeof u);
}
#endif

// ---- across lanes ----

// Integers as wide as A, and a vector of them.
template <class A>
using lane_int = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
template <class A>
using vec_int = std::conditional_t<sizeof(A) == 8, vlong, vint>;

// v where the mask's lanes are -1, else +0.
template <class A>
inline vec<A> masked(vec_int<A> mask, vec<A> v) {
  return (vec<A>)((vec_int<A>)v & mask);
}

// v with x in lane i, if there is one. In registers: a vector loaded behind a scalar's store waits until all stores before are done.
template <class A>
inline vec<A> with_lane(vec<A> v, int64_t i, A x) {
  using I = vec_int<A>;
  I lane;
  for (int j = 0; j < lanes<A>; ++j) lane[j] = j;
  const I here = lane == splat<I>(static_cast<lane_int<A>>(i));
  return (vec<A>)(((I)splat<vec<A>>(x) & here) | ((I)v & ~here));
}

// a[from], b[from], a[from + 1], b[from + 1] ...
template <class A>
inline vec<A> interleave(vec<A> a, vec<A> b, int from) {
  constexpr int L = lanes<A>;
#if defined(__clang__)
  vec<A> v;
  for (int i = 0; i < L; ++i) v[i] = i % 2 ? b[from + i / 2] : a[from + i / 2];
  return v;
#else
  vec_int<A> order;
  for (int i = 0; i < L; ++i) order[i] = from + i / 2 + i % 2 * L;
  return __builtin_shuffle(a, b, order);
#endif
}

// Turns the square of L vectors: lane j of v[i] becomes lane i of v[j].
template <class A>
inline void turn(vec<A>* v) {
  constexpr int L = lanes<A>;
#pragma GCC unroll 4
  for (int done = 1; done < L; done *= 2) {
    vec<A> t[L];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      t[2 * i] = interleave<A>(v[i], v[i + L / 2], 0);
      t[2 * i + 1] = interleave<A>(v[i], v[i + L / 2], L / 2);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) v[i] = t[i];
  }
}

// ---- vectors that are not full: n > 0 values are there ----

#if IWSGD_AVX2
inline __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// load() of values that are there; `otherwise` in the other lanes.
template <class T, class A>
inline vec<A> load_some(const T* p, int64_t n, A otherwise) {
  constexpr int L = lanes<A>;
  if (n >= L) return load(p);
#if IWSGD_AVX512
  const uint32_t there = (1u << n) - 1;
  if constexpr (std::is_same_v<T, float>) return (vfloat)_mm512_mask_loadu_ps(_mm512_set1_ps(otherwise), static_cast<__mmask16>(there), p);
  else if constexpr (sizeof(T) == 2)
    return (vfloat)_mm512_mask_mov_ps(_mm512_set1_ps(otherwise), static_cast<__mmask16>(there),
                                      (__m512)widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(there), p), T{}));
#elif IWSGD_AVX2
  if constexpr (std::is_same_v<T, float>) {
    const __m256i there = first_lanes(n);
    return (vfloat)_mm256_blendv_ps(_mm256_set1_ps(otherwise), _mm256_maskload_ps(p, there), _mm256_castsi256_ps(there));
  }
#endif
  alignas(64) A some[L];
  for (int j = 0; j < L; ++j) some[j] = j < n ? to_acc(p[j]) : otherwise;
  return load(some);
}
template <class T, class V>
inline void store_some(T* p, V v, int64_t n) {
  using A = acc_t<T>;
  constexpr int L = lanes<A>;
  if (n >= L) return store(p, v);
#if IWSGD_AVX512
  const uint32_t there = (1u << n) - 1;
  if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(p, static_cast<__mmask16>(there), (__m512)v);
  else if constexpr (sizeof(T) == 2) return _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(there), narrow(v, T{}));
#elif IWSGD_AVX2
  if constexpr (std::is_same_v<T, float>) return _mm256_maskstore_ps(p, first_lanes(n), (__m256)v);
#endif
  alignas(64) A some[L];
  store(some, v);
  for (int j = 0; j < n; ++j) p[j] = from_acc<T>(some[j]);
}

// ---- whole vectors of memory ----

// The values of one or two vectors as memory holds them, rounded once.
template <class T>
[[gnu::always_inline]] inline stored<T> rounded(const vec<acc_t<T>>* v) {
  if constexpr (sizeof(T) == 2) {
#if IWSGD_AVX512
    return (vshort)narrow(v[0], v[1], T{});
#elif IWSGD_AVX2
    return (vshort)_mm256_set_m128i(narrow(v[1], T{}), narrow(v[0], T{}));
#else
    T in_order[lanes<T>];
    for (int i = 0; i < 2; ++i) store(in_order + i * kLanes, v[i]);
    vshort both;
    std::memcpy(&both, in_order, sizeof both);
    return both;
#endif
  } else {
    return v[0];
  }
}

template <class V>
inline void put(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

// put() to memory that nobody reads soon: past the caches, which saves reading what is overwritten. `p` is a multiple of kBytes, and
// whole lines of kLineBytes are written one after another; end_of_streams() comes before another thread may read them.
constexpr int kLineBytes = 64;
template <class V>
inline void stream(void* p, V v) {
#if IWSGD_AVX512
  _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#elif IWSGD_AVX2
  _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#elif IWSGD_X86
  _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
#else
  put(p, v);
#endif
}
inline void end_of_streams() {
#if IWSGD_X86
  _mm_sfence();
#endif
}

// Calls vector(i) for i = 0, L, 2L ... while L elements are left of n, then single(i) for the rest.
template <int L, class Vector, class Single>
inline void sweep(int64_t n, Vector&& vector, Single&& single) {
  int64_t i = 0;
  for (; i + L <= n; i += L) vector(i);
  for (; i < n; ++i) single(i);
}
