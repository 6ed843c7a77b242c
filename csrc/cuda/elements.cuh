// Neighbouring elements of a tensor as one memory access, with their conversions. Compiles for the host too, where dtypes.h
// has the conversions, so that kernels written with it can be tested there.
#pragma once
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "../dtypes.h"
#include "../philox.h"
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

// Before a loop, in device code: unroll it whole, or by n; the host's compiler would warn of nvcc's pragma.
#if defined(__CUDA_ARCH__)
#define IWSGD_PRAGMA_TEXT(x) _Pragma(#x)
#define IWSGD_UNROLL _Pragma("unroll")
#define IWSGD_UNROLL_BY(n) IWSGD_PRAGMA_TEXT(unroll n)
#else
#define IWSGD_UNROLL
#define IWSGD_UNROLL_BY(n)
#endif

namespace iwsgd {

// x, which the compiler takes for another value each time: what depends on it is computed where it is used, not kept over a loop that
// has no registers to spare.
template <class X>
IWSGD_HD X fresh_register(X x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(X) == 8) asm volatile("" : "+l"(x));
  else asm volatile("" : "+r"(x));
#endif
  return x;
}

// 1 / x of numbers that are normal, as far as their reciprocals are, within a unit of the last place.
IWSGD_HD float fast_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.f / x;
#endif
}
IWSGD_HD double fast_reciprocal(double x) { return 1 / x; }

template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements of one 16-byte access

// True where V elements are kept as words of two, the first one in the lower half.
template <class T, int V>
constexpr bool kInWords = sizeof(T) == 2 && V > 1;

template <class T, int V, bool kWords = kInWords<T, V>>
struct alignas(V * sizeof(T)) Elements {
  T e[V];
};
template <class T, int V>
struct alignas(V * sizeof(T)) Elements<T, V, true> {
  uint32_t w[V / 2];
};

template <class T, int V>
IWSGD_HD Elements<T, V> load(const T* from) {
#if defined(__CUDA_ARCH__)
  return *reinterpret_cast<const Elements<T, V>*>(from);
#else
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Elements<T, V>) != 0) std::abort();  // as a GPU does
  Elements<T, V> elements;
  std::memcpy(&elements, from, sizeof elements);
  return elements;
#endif
}

// The same of memory that nothing writes while the kernel runs: stores before it do not hold it up.
template <class T, int V>
IWSGD_HD Elements<T, V> load_constant(const T* from) {
#if defined(__CUDA_ARCH__)
  static_assert(sizeof(Elements<T, V>) == 16, "one access");
  const int4 words = __ldg(reinterpret_cast<const int4*>(from));
  Elements<T, V> elements;
  std::memcpy(&elements, &words, sizeof elements);
  return elements;
#else
  return load<T, V>(from);
#endif
}

// Where a pointer that is not to a local variable leads.
enum class Space { global, shared };

// One access; two where the elements have 32 bytes. In a plain assignment of a struct of words, nvcc makes each of the words a
// store of its own.
template <class T, int V, Space kSpace = Space::global>
IWSGD_HD void store(T* to, const Elements<T, V>& elements) {
#if defined(__CUDA_ARCH__)
  constexpr int kBytes = V * sizeof(T);
  static_assert(kBytes <= 8 || kBytes % 16 == 0, "the accesses below");
  if constexpr (kBytes < 8) {
    *reinterpret_cast<Elements<T, V>*>(to) = elements;
  } else {
    uint32_t w[kBytes / 4];
    std::memcpy(w, &elements, kBytes);
    if constexpr (kSpace == Space::global) {
      const auto at = __cvta_generic_to_global(to);
      if constexpr (kBytes == 8) asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(at), "r"(w[0]), "r"(w[1]) : "memory");
      IWSGD_UNROLL
      for (int i = 0; i + 4 <= kBytes / 4; i += 4)
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at + 4 * i), "r"(w[i]), "r"(w[i + 1]), "r"(w[i + 2]), "r"(w[i + 3])
                     : "memory");
    } else {
      const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
      if constexpr (kBytes == 8) asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(at), "r"(w[0]), "r"(w[1]) : "memory");
      IWSGD_UNROLL
      for (int i = 0; i + 4 <= kBytes / 4; i += 4)
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at + 4 * i), "r"(w[i]), "r"(w[i + 1]), "r"(w[i + 2]), "r"(w[i + 3])
                     : "memory");
    }
  }
#else
  if (reinterpret_cast<uintptr_t>(to) % sizeof(elements) != 0) std::abort();
  std::memcpy(to, &elements, sizeof elements);
#endif
}

template <class T>
IWSGD_HD acc_t<T> widen(T x) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, bf16>) return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
  else if constexpr (std::is_same_v<T, fp16>) return __half2float(__ushort_as_half(x.bits));
  else return x;
#else
  return to_acc(x);
#endif
}

template <class T>
IWSGD_HD T narrow(acc_t<T> x) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, bf16>) return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  else if constexpr (std::is_same_v<T, fp16>) return {__half_as_ushort(__float2half_rn(x))};
  else return x;
#else
  return from_acc<T>(x);
#endif
}

// Two neighbours in one word, rounded by one instruction where there is such a one.
template <class T>
IWSGD_HD uint32_t narrow_two(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t word;
  if constexpr (std::is_same_v<T, bf16>) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
#else
  return narrow<T>(first).bits | static_cast<uint32_t>(narrow<T>(second).bits) << 16;
#endif
}

// Element j as a number.
template <class T, int V>
IWSGD_HD acc_t<T> element(const Elements<T, V>& x, int j) {
  if constexpr (kInWords<T, V>) return widen<T>({static_cast<uint16_t>(x.w[j / 2] >> (16 * (j % 2)))});
  else return widen<T>(x.e[j]);
}

// value(j) as element j.
template <class T, int V, class Value>
IWSGD_HD Elements<T, V> gathered(const Value& value) {
  Elements<T, V> y;
  if constexpr (kInWords<T, V>) {
    IWSGD_UNROLL
    for (int i = 0; i < V / 2; ++i) {
      const T first = value(2 * i), second = value(2 * i + 1);
      y.w[i] = first.bits | static_cast<uint32_t>(second.bits) << 16;
    }
  } else {
    IWSGD_UNROLL
    for (int j = 0; j < V; ++j) y.e[j] = value(j);
  }
  return y;
}

// Element j as it is.
template <class T, int V>
IWSGD_HD T element_bits(const Elements<T, V>& x, int j) {
  if constexpr (kInWords<T, V>) return {static_cast<uint16_t>(x.w[j / 2] >> (16 * (j % 2)))};
  else return x.e[j];
}

// x as every element.
template <class T, int V>
IWSGD_HD Elements<T, V> filled(acc_t<T> x) {
  Elements<T, V> y;
  if constexpr (kInWords<T, V>) {
    IWSGD_UNROLL
    for (int i = 0; i < V / 2; ++i) y.w[i] = narrow<T>(x).bits * 0x10001u;
  } else {
    IWSGD_UNROLL
    for (int j = 0; j < V; ++j) y.e[j] = narrow<T>(x);
  }
  return y;
}

// number(j) * scale as element j, rounded once.
template <class T, int V, class Number>
IWSGD_HD Elements<T, V> scaled(const Number& number, acc_t<T> scale) {
  Elements<T, V> y;
  if constexpr (kInWords<T, V>) {
    IWSGD_UNROLL
    for (int i = 0; i < V / 2; ++i) y.w[i] = narrow_two<T>(number(2 * i) * scale, number(2 * i + 1) * scale);
  } else {
    IWSGD_UNROLL
    for (int j = 0; j < V; ++j) y.e[j] = narrow<T>(number(j) * scale);
  }
  return y;
}

// Element j where bit j is set, else fill, whatever x was.
template <class T, int V>
IWSGD_HD Elements<T, V> masked(Elements<T, V> x, uint32_t bits, T fill) {
  if constexpr (kInWords<T, V>) {
    const uint32_t two = fill.bits * 0x10001u;
    IWSGD_UNROLL
    for (int i = 0; i < V / 2; ++i) {
      if (!(bits >> (2 * i) & 1u)) x.w[i] = (x.w[i] & 0xFFFF0000u) | (two & 0x0000FFFFu);
      if (!(bits >> (2 * i + 1) & 1u)) x.w[i] = (x.w[i] & 0x0000FFFFu) | (two & 0xFFFF0000u);
    }
  } else {
    IWSGD_UNROLL
    for (int j = 0; j < V; ++j)
      if (!(bits >> j & 1u)) x.e[j] = fill;
  }
  return x;
}

}  // namespace iwsgd
