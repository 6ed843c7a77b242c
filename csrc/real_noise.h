// Real-valued noise: the laws that turn random words into real numbers. Plain C++17 for host and device, no torch.
//
// Each law has mean 0 and standard deviation 1. A call of the generator gives four words, which are four numbers: words (0, 1) make
// numbers 0 and 1, words (2, 3) the next two. With u = (a + 1/2) / 2^32, v = (b + 1/2) / 2^32 of words a and b, with a word's lower 31 bits
// m, and with the word as a signed integer i,
//
//   normal    z0 = sqrt(-2 ln u) cos(2 pi v),  z1 = sqrt(-2 ln u) sin(2 pi v)    (Box and Muller, 1958)
//   laplace   z = -ln((m + 1/2) / 2^31) / sqrt(2), negative where the word's highest bit is 1
//   uniform   z = sqrt(3) (i + 1/2) / 2^31
//
// No logarithm is ever of 0: |z| < 6.77, < 15.7 and <= sqrt(3), and no bits give an infinity or NaN.
#pragma once
#include <cmath>
#include <cstring>

#include "address.h"

namespace iwsgd {

constexpr int kNumbers = 4;  // elements of one Philox call

enum class Law : int { normal, laplace, uniform };

// One call of an op of real-valued noise: y = x * (1 + std * z) where multiply, else x + std * z.
struct RealNoise : Call {
  Law law;
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
// Polynomials, shared by the scalar form below and each vector form (real_noise_kernels.h): least relative error of ln(1 + f) / f over
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

IWSGD_HD double multiply_add(double a, double b, double c) { return a * b + c; }

// -2 ln u of u in (0, 1]. `less` replaces u - 1 where `near_one`, for u near 1 whose u - 1 is known better than from u.
IWSGD_HD float minus_two_log(float u, bool near_one, float less) {
  const auto bits = static_cast<int32_t>(as_bits(u));
  const int32_t e = (bits - kSqrtHalf) >> 23;
  const float f = near_one ? less : as_float(static_cast<uint32_t>(bits - e * (1 << 23))) - 1.0f;  // near 1, e is 0
  const float log = ((((((kLog7 * f + kLog6) * f + kLog5) * f + kLog4) * f + kLog3) * f + kLog2) * f + kLog1) * f + kLog0;
  return log * f + static_cast<float>(e) * kLn2;  // -2 ln(1 + f) - 2 e ln 2
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

// Each law: pair<A>(a, b) gives the two numbers of words a and b, computed in A. On GPUs float32 takes the law's short form, by functions
// of short instructions. Functions: GpuFunctions, or in tests others with its errors.
struct Normal {
  template <class Functions>
  static IWSGD_HD Pair<float> short_pair(uint32_t a, uint32_t b) {
    const float d = static_cast<float>(static_cast<int32_t>(a)) * 0x1p-32f + 0x1p-33f, u = d < 0 ? d + 1.0f : d;
    const float series = multiply_add(multiply_add(-2.0f / 3.0f, d, 1.0f), d, -2.0f) * d;  // -2 ln(1 + d), but for d^4 / 2
    const float r = Functions::root(d < 0 && d > -0x1p-6f ? series : kLn2 * Functions::log2(u));
    const float radians = static_cast<float>(static_cast<int32_t>(b)) * static_cast<float>(6.283185307179586 * 0x1p-32);
    return {r * Functions::cosine(radians), r * Functions::sine(radians)};
  }

  static IWSGD_HD Pair<float> of(float, uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    return short_pair<GpuFunctions>(a, b);
#else
    const float d = static_cast<float>(static_cast<int32_t>(a)) * 0x1p-32f + 0x1p-33f;
    const bool upper = d < 0;
    const float r = std::sqrt(minus_two_log(upper ? d + 1.0f : d, upper && d > -0.25f, d));
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

  static IWSGD_HD Pair<double> of(double, uint32_t a, uint32_t b) {
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

  template <class A>
  static IWSGD_HD Pair<A> pair(uint32_t a, uint32_t b) {
    return of(A(), a, b);
  }
};

struct Laplace {
  static constexpr float kPerLog = 0.35355338f;  // ln u / sqrt(2) of 2 ln u

  // u of a word, in (0, 1]; near 1 it is rounded by up to 2^-25, which is that much in z.
  static IWSGD_HD float share(uint32_t word) { return static_cast<float>(static_cast<int32_t>(word & 0x7FFFFFFFu)) * 0x1p-31f + 0x1p-32f; }
  static IWSGD_HD float with_sign(float size, uint32_t word) { return as_float(as_bits(size) ^ (word & 0x80000000u)); }

  template <class Functions>
  static IWSGD_HD float short_one(uint32_t word) {
    return with_sign(kLn2 * kPerLog * Functions::log2(share(word)), word);
  }

  static IWSGD_HD float of(float, uint32_t word) {
#if defined(__CUDA_ARCH__)
    return short_one<GpuFunctions>(word);
#else
    return with_sign(minus_two_log(share(word), false, 0.0f) * kPerLog, word);
#endif
  }

  static IWSGD_HD double of(double, uint32_t word) {
    const double size = -0.70710678118654752440 * log(((word & 0x7FFFFFFFu) + 0.5) * 0x1p-31);
    return word >> 31 ? -size : size;
  }

  template <class A>
  static IWSGD_HD Pair<A> pair(uint32_t a, uint32_t b) {
    return {of(A(), a), of(A(), b)};
  }
};

struct Uniform {
  static constexpr double kStep = 1.73205080756887729353 * 0x1p-31;  // sqrt(3) / 2^31

  template <class A>
  static IWSGD_HD A of(uint32_t word) {
    return multiply_add(static_cast<A>(static_cast<int32_t>(word)), static_cast<A>(kStep), static_cast<A>(kStep / 2));
  }

  template <class A>
  static IWSGD_HD Pair<A> pair(uint32_t a, uint32_t b) {
    return {of<A>(a), of<A>(b)};
  }
};

// Calls body with the law as a type.
template <class Body>
void with_law(Law law, const Body& body) {
  switch (law) {
    case Law::normal:
      return body(Normal());
    case Law::laplace:
      return body(Laplace());
    case Law::uniform:
      return body(Uniform());
  }
}

// Number j of the four of a call.
template <class L, class A>
IWSGD_HD A number(const Words& words, int j) {
  const Pair<A> pair = j < 2 ? L::template pair<A>(words.w[0], words.w[1]) : L::template pair<A>(words.w[2], words.w[3]);
  return j % 2 == 0 ? pair.first : pair.second;
}

}  // namespace iwsgd
