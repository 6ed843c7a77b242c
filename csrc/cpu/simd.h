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
typedef double vdouble __attribute__((vector_size(kBytes)));
typedef int64_t vlong __attribute__((vector_size(kBytes)));

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

#if IWSGD_AVX512
inline vfloat load(const bf16* p) {
  const __m512i u = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return (vfloat)_mm512_slli_epi32(u, 16);
}
inline void store(bf16* p, vfloat v) {
  const __m512i u = (__m512i)v;
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
  r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
}
inline vfloat load(const fp16* p) { return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store(fp16* p, vfloat v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
// v where the lane's bit is set, else +0 (also for NaN and infinities).
inline vfloat keep_lanes(vfloat v, uint32_t bits) { return (vfloat)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)v); }
inline vdouble keep_lanes(vdouble v, uint32_t bits) { return (vdouble)_mm512_maskz_mov_pd(static_cast<__mmask8>(bits), (__m512d)v); }
// sum + v where the lane's bit is set, else sum.
inline vfloat add_lanes(vfloat sum, vfloat v, uint32_t bits) {
  return (vfloat)_mm512_mask_add_ps((__m512)sum, static_cast<__mmask16>(bits), (__m512)sum, (__m512)v);
}
inline vdouble add_lanes(vdouble sum, vdouble v, uint32_t bits) {
  return (vdouble)_mm512_mask_add_pd((__m512d)sum, static_cast<__mmask8>(bits), (__m512d)sum, (__m512d)v);
}
#else

#if IWSGD_AVX2
inline vfloat load(const bf16* p) {
  const __m256i u = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return (vfloat)_mm256_slli_epi32(u, 16);
}
inline void store(bf16* p, vfloat v) {
  const __m256i u = (__m256i)v;
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
  const __m256i nan = (__m256i)_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
  r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7FC0), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline vfloat load(const fp16* p) { return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store(fp16* p, vfloat v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
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
template <class V>
inline V add_lanes(V sum, V v, uint32_t bits) {
  return sum + keep_lanes(v, bits);
}
#endif

// store() to memory that nobody reads soon: past the caches, which saves reading what is overwritten. `p` is a multiple of the
// vector's own bytes (of T); end_of_streams() comes before another thread may read it.
#if IWSGD_AVX512
inline void stream(float* p, vfloat v) { _mm512_stream_ps(p, (__m512)v); }
inline void stream(double* p, vdouble v) { _mm512_stream_pd(p, (__m512d)v); }
#elif IWSGD_AVX2
inline void stream(float* p, vfloat v) { _mm256_stream_ps(p, (__m256)v); }
inline void stream(double* p, vdouble v) { _mm256_stream_pd(p, (__m256d)v); }
#elif IWSGD_X86
inline void stream(float* p, vfloat v) { _mm_stream_ps(p, (__m128)v); }
inline void stream(double* p, vdouble v) { _mm_stream_pd(p, (__m128d)v); }
#else
template <class A, class V>
inline void stream(A* p, V v) {
  store(p, v);
}
#endif
#if IWSGD_AVX512 || IWSGD_AVX2
template <class T>
inline std::enable_if_t<sizeof(T) == 2> stream(T* p, vfloat v) {
  alignas(kBytes / 2) T rounded[kLanes];
  store(rounded, v);
#if IWSGD_AVX512
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm256_load_si256(reinterpret_cast<const __m256i*>(rounded)));
#else
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm_load_si128(reinterpret_cast<const __m128i*>(rounded)));
#endif
}
#else
template <class T>
inline std::enable_if_t<sizeof(T) == 2> stream(T* p, vfloat v) {
  store(p, v);
}
#endif
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
