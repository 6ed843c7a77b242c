// Reductions, exp and log on the vectors of simd.h. Read once per instruction set, like simd.h.

#if IWSGD_AVX512
inline vfloat vmax(vfloat a, vfloat b) { return (vfloat)_mm512_max_ps((__m512)a, (__m512)b); }
inline vdouble vmax(vdouble a, vdouble b) { return (vdouble)_mm512_max_pd((__m512d)a, (__m512d)b); }
inline float horizontal_sum(vfloat v) { return _mm512_reduce_add_ps((__m512)v); }
inline float horizontal_max(vfloat v) { return _mm512_reduce_max_ps((__m512)v); }
#else
// b where either is NaN, as the instruction has it.
inline vfloat vmax(vfloat a, vfloat b) {
#if IWSGD_AVX2
  return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#elif IWSGD_X86
  return (vfloat)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
inline vdouble vmax(vdouble a, vdouble b) { return a > b ? a : b; }
inline float horizontal_sum(vfloat v) {
#if IWSGD_AVX2
  __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
#else
  return (v[0] + v[1]) + (v[2] + v[3]);
#endif
}
inline float horizontal_max(vfloat v) {
#if IWSGD_AVX2
  __m128 s = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
#else
  return std::max(std::max(v[0], v[1]), std::max(v[2], v[3]));
#endif
}
#endif
inline double horizontal_sum(vdouble v) {
  double sum = 0;
  for (int i = 0; i < lanes<double>; ++i) sum += v[i];
  return sum;
}
inline double horizontal_max(vdouble v) {
  double most = v[0];
  for (int i = 1; i < lanes<double>; ++i) most = std::max(most, v[i]);
  return most;
}

// a - b * c, rounded once where the instruction set can: the same everywhere, which a compiler's own choice of products is not.
#if IWSGD_AVX512
inline vfloat minus_product(vfloat a, vfloat b, vfloat c) { return (vfloat)_mm512_fnmadd_ps((__m512)b, (__m512)c, (__m512)a); }
inline vdouble minus_product(vdouble a, vdouble b, vdouble c) { return (vdouble)_mm512_fnmadd_pd((__m512d)b, (__m512d)c, (__m512d)a); }
#elif IWSGD_AVX2
inline vfloat minus_product(vfloat a, vfloat b, vfloat c) { return (vfloat)_mm256_fnmadd_ps((__m256)b, (__m256)c, (__m256)a); }
inline vdouble minus_product(vdouble a, vdouble b, vdouble c) { return (vdouble)_mm256_fnmadd_pd((__m256d)b, (__m256d)c, (__m256d)a); }
#else
template <class V>
inline V minus_product(V a, V b, V c) {
  return a - b * c;
}
#endif

// v where the mask's lanes are -1, else w.
inline vfloat select(vint mask, vfloat v, vfloat w) { return (vfloat)(((vint)v & mask) | ((vint)w & ~mask)); }
inline vdouble select(vlong mask, vdouble v, vdouble w) { return (vdouble)(((vlong)v & mask) | ((vlong)w & ~mask)); }

// ((c[0] x + c[1]) x + ...) x + c[N - 1]
template <std::size_t N>
[[gnu::always_inline]] inline vfloat polynomial(vfloat x, const float (&c)[N]) {
  vfloat p = x * c[0] + c[1];
#pragma GCC unroll 16
  for (std::size_t i = 2; i < N; ++i) p = p * x + c[i];
  return p;
}

// exp(x) for x <= 0, within (1 + |x|) * 8.3e-8 of its value, most of it the rounding of x; exactly 0 for -infinity, NaN for NaN. Below
// -86.6, where the normal range of float comes to its end, AVX-512 gives subnormals and the others give 0.
inline vfloat vexp(vfloat x) {
  // exp(x) = 2^t = 2^n 2^f with n an integer. Polynomials: least relative error of 2^f over the interval of f, 1 at 0.
  const vfloat t = x * 1.44269504088896341f;
#if IWSGD_AVX512
  const vfloat f = (vfloat)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // in [0, 1); 0 for -infinity
  const vfloat p =
      polynomial(f, {2.1612914956e-4f, 1.2467846446e-3f, 9.6754515670e-3f, 5.5485280619e-2f, 2.4022930555e-1f, 6.9314704444e-1f, 1.0f});
  return (vfloat)_mm512_scalef_ps((__m512)p, (__m512)t);  // takes the integer below t itself
#else
  const vfloat magic = splat<vfloat>(12583039.0f);  // 1.5 * 2^23 + 127: adding it rounds, and leaves the exponent of 2^n in the low bits
  const vfloat shifted = t + magic;
  const vfloat f = t - (shifted - magic);  // in [-1/2, 1/2]
  const vfloat p =
      polynomial(f, {1.4902517689e-4f, 1.3389582111e-3f, 9.6200179572e-3f, 5.5503651828e-2f, 2.4022636856e-1f, 6.9314718334e-1f, 1.0f});
  const vint in_range = ~(vint)(t < splat<vfloat>(-125.0f));  // NaN is in range
  // A product, not a sum of exponents: to a NaN's bits those of its payload would be added, which may make a number of it.
  return (vfloat)((vint)(p * (vfloat)((vint)shifted << 23)) & in_range);
#endif
}
inline vdouble vexp(vdouble x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::exp(x[i]);  // float64 is for checking, not for speed
  return x;
}

// log(x) for normal positive x, within 1.2e-7 of its value; NaN for NaN, infinity for infinity.
inline vfloat vlog(vfloat x) {
  const vint bits = (vint)x;
  // x = 2^e * m with m in [sqrt(1/2), sqrt(2)): the exponent of x / sqrt(1/2) is e
  const vint e = (bits - 0x3F3504F3) >> 23;
  const vfloat m = (vfloat)(bits - (e << 23)) - 1.0f;
  const vfloat ef = __builtin_convertvector(e, vfloat);
  // Minimax polynomial of (log(1+m) - m + m^2/2) / m^3, of Moshier's Cephes library.
  const vfloat p = polynomial(m, {7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                                  -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f});
  const vfloat m2 = m * m;
  vfloat y = p * m * m2 + ef * -2.12194440e-4f - m2 * 0.5f;
  y = (m + y) + ef * 0.693359375f;
  const vint finite = (vint)(x - x == splat<vfloat>(0.0f));
  return select(finite, y, x);
}
inline vdouble vlog(vdouble x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::log(x[i]);
  return x;
}
