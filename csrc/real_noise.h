// Gaussian noise: the rule that turns random words into standard normal numbers (Box and Muller, 1958). Plain C++17 for host and
// device, no torch.
//
// A call of the generator gives four words, which are four numbers: of words (a, b), with u = (a + 1/2) / 2^32 and v = (b + 1/2) / 2^32,
//
//   z0 = sqrt(-2 ln u) cos(2 pi v),  z1 = sqrt(-2 ln u) sin(2 pi v)
//
// and of words (2, 3) the next two. Neither u nor v is ever 0 or 1: |z| < 6.77, and no bits give an infinity or NaN.
#pragma once
#include <cmath>
#include <cstring>

#include "noise.h"

namespace iwsgd {

constexpr int kNormals = 4;  // elements of one Philox call

// One call of a Gaussian op: y = x * (1 + std * z) where multiply, else x + std * z.
struct Gaussian {
  Draw draw;  // but for the rule of its mask
  double std;
  bool multiply;
};

template <class A>
struct Pair {
  A first, second;
};

// NOTE [Normals in float32]
// Agreement of all backends within 5e-5 of the definition rules out what is short: u as a float reaches 1 for the 128 largest words,
// and near 1 its steps of 2^-24 are steps of more than 3e-4 in z. So the word is taken as signed: it gives d = u in the lower half and
// d = u - 1 in the upper one, each with a full mantissa and never 0, and -ln u = -ln(1 + d) is as exact there as for small u.
// The angle is split in integers, into the nearest quarter turn and what is left of it, of which 23 bits are kept: 2e-7 radians.
// Polynomials, shared by the scalar form below and each vector form (gaussian_kernels.h): least relative error of ln(1 + f) / f over
// [sqrt(1/2) - 1, sqrt(2) - 1], 1.8e-7; of sin(pi/2 h) / h, 5e-9, and least error of cos(pi/2 h), 4e-8, over [-1/2, 1/2]. What comes out is
// within 2e-6 of the definition.
constexpr float kLog0 = -1.9999999f, kLog1 = 1.0000073f, kLog2 = -0.6667012f, kLog3 = 0.49939817f;  // times -2
constexpr float kLog4 = -0.3980033f, kLog5 = 0.3450166f, kLog6 = -0.32445166f, kLog7 = 0.20213794f;
constexpr float kLn2 = -1.3862944f;  // times -2
constexpr float kSin1 = 1.5707964f, kSin3 = -0.6459635f, kSin5 = 0.07968023f, kSin7 = -0.004602177f;
constexpr float kCos2 = -1.233698f, kCos4 = 0.25360635f, kCos6 = -0.02042625f;
constexpr int32_t kSqrtHalf =
    0x3F3504F3;  // sqrt(1/2) in bits: x = 2^e m with m in [sqrt(1/2), sqrt(2)) for the exponent e of x / sqrt(1/2)

IWSGD_HD float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
IWSGD_HD uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
// a * b + c, on GPUs rounded once: of two products in one sum the compiler would choose which to round, in each kernel anew, and numbers
// must not depend on the kernel.
IWSGD_HD float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return a * b + c;
#endif
}

// NOTE [Normals of GPUs]
// GPUs have instructions for what the polynomials compute, whose absolute errors are documented: 2^-22 of log2 (relative beyond [1/2, 2]),
// 2^-20.5 of sine and cosine over [-pi, pi], 2^-23 of the root, relative. An error of the logarithm's counts over 2 z, so that u near 1
// takes a series; the others count as they are, times at most 6.8. What comes out is within 8e-6 of the definition.
#if defined(__CUDA_ARCH__)
struct GpuFunctions {
  static __device__ float log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  static __device__ float sine(float radians) {
    float y;
    asm("sin.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(radians));
    return y;
  }
  static __device__ float cosine(float radians) {
    float y;
    asm("cos.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(radians));
    return y;
  }
  static __device__ float root(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
};
#endif

// Two independent standard normal numbers of two words, computed in A.
template <class A>
IWSGD_HD Pair<A> normal_pair(uint32_t a, uint32_t b);

// The same by functions of short instructions. Functions: GpuFunctions, or in tests others with its errors.
template <class Functions>
IWSGD_HD Pair<float> short_pair(uint32_t a, uint32_t b) {
  const float d = static_cast<float>(static_cast<int32_t>(a)) * 0x1p-32f + 0x1p-33f, u = d < 0 ? d + 1.0f : d;
  const float series = multiply_add(multiply_add(-2.0f / 3.0f, d, 1.0f), d, -2.0f) * d;  // -2 ln(1 + d), but for d^4 / 2
  const float r = Functions::root(d < 0 && d > -0x1p-6f ? series : kLn2 * Functions::log2(u));
  const float radians = static_cast<float>(static_cast<int32_t>(b)) * static_cast<float>(6.283185307179586 * 0x1p-32);
  return {r * Functions::cosine(radians), r * Functions::sine(radians)};
}

template <>
IWSGD_HD Pair<float> normal_pair<float>(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return short_pair<GpuFunctions>(a, b);
#else
  // -2 ln u = -2 e ln 2 - 2 ln(1 + f)
  const float d = static_cast<float>(static_cast<int32_t>(a)) * 0x1p-32f + 0x1p-33f;
  const bool upper = d < 0;
  const auto bits = static_cast<int32_t>(as_bits(upper ? d + 1.0f : d));
  const int32_t e = (bits - kSqrtHalf) >> 23;
  float f = as_float(static_cast<uint32_t>(bits - e * (1 << 23))) - 1.0f;
  if (upper && d > -0.25f) f = d;  // there e is 0
  const float log = ((((((kLog7 * f + kLog6) * f + kLog5) * f + kLog4) * f + kLog3) * f + kLog2) * f + kLog1) * f + kLog0;
  const float r = std::sqrt(log * f + static_cast<float>(e) * kLn2);

  const uint32_t turned = b + 0x20000000u;  // the nearest quarter turn in the upper two bits, the way from it (plus 1/2) in the others
  const float h = as_float((turned >> 7 & 0x7FFFFFu) | 0x3F800000u) - 1.5f, h2 = h * h;
  const float s = (((kSin7 * h2 + kSin5) * h2 + kSin3) * h2 + kSin1) * h;
  const float c = ((kCos6 * h2 + kCos4) * h2 + kCos2) * h2 + 1.0f;
  const uint32_t next = turned + 0x40000000u;  // its upper bit is not that of turned where the quarter turns are odd in number
  const bool odd = static_cast<int32_t>(turned ^ next) < 0;
  const uint32_t cos_sign = next & 0x80000000u, sin_sign = turned & 0x80000000u;
  return {r * as_float(as_bits(odd ? s : c) ^ cos_sign), r * as_float(as_bits(odd ? c : s) ^ sin_sign)};
#endif
}

template <>
IWSGD_HD Pair<double> normal_pair<double>(uint32_t a, uint32_t b) {
  const double u = (a + 0.5) * 0x1p-32, half_turns = (b + 0.5) * 0x1p-31;
  double s, c;
#if defined(__CUDA_ARCH__)
  sincospi(half_turns, &s, &c);
#else
  constexpr double kPi = 3.14159265358979323846;
  s = std::sin(kPi * half_turns);
  c = std::cos(kPi * half_turns);
#endif
  const double r = sqrt(-2.0 * log(u));
  return {r * c, r * s};
}

// Number j of the four of a call.
template <class A>
IWSGD_HD A normal(const Words& words, int j) {
  const Pair<A> pair = j < 2 ? normal_pair<A>(words.w[0], words.w[1]) : normal_pair<A>(words.w[2], words.w[3]);
  return j % 2 == 0 ? pair.first : pair.second;
}

}  // namespace iwsgd
