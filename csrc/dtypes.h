// 16-bit floating-point formats as bits, with their conversions. Rounding is to nearest even, as everywhere in torch.
#pragma once
#include <cstdint>
#include <cstring>

namespace iwsgd {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// The type in which values of T are computed and accumulated.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulate<T>::type;

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline float to_acc(float x) { return x; }
inline double to_acc(double x) { return x; }
inline float to_acc(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_acc(fp16 x) {
  // Exponent and mantissa moved to float's place are off by the difference of the biases, 2^112; infinities and NaN are not scaled.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7FFFu) << 13;
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  return bit_cast<float>(sign | (magnitude >= 0x0F800000u ? magnitude | 0x7F800000u : finite));
}

template <class T>
inline T from_acc(acc_t<T> x);
template <>
inline float from_acc<float>(float x) {
  return x;
}
template <>
inline double from_acc<double>(double x) {
  return x;
}
template <>
inline bf16 from_acc<bf16>(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  if ((u & 0x7FFFFFFFu) > 0x7F800000u) return {0x7FC0};  // NaN
  return {static_cast<uint16_t>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16)};
}
template <>
inline fp16 from_acc<fp16>(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {static_cast<uint16_t>(sign | 0x7E00u)};   // NaN
  if (magnitude >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00u)};  // rounds past the largest, 65504
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 puts the last kept bit at float's last place
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3F000000u))};
  }
  const uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
}

}  // namespace iwsgd
