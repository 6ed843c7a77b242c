// Which instruction set this process uses: the best that the machine has, or the one that IWSGD_ISA names.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define IWSGD_X86 1
#include <cpuid.h>
#include <immintrin.h>
#endif

#define IWSGD_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define IWSGD_TARGET_BEGIN(features) IWSGD_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define IWSGD_TARGET_END IWSGD_PRAGMA(clang attribute pop)
#else
#define IWSGD_TARGET_BEGIN(features) IWSGD_PRAGMA(GCC push_options) IWSGD_PRAGMA(GCC target(features))
#define IWSGD_TARGET_END IWSGD_PRAGMA(GCC pop_options)
#endif

namespace iwsgd {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2 };
constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512"};

inline Isa machine_isa() {
#if defined(IWSGD_X86)
  __builtin_cpu_init();
  unsigned int eax, ebx, ecx = 0, edx;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;  // older compilers know no such name
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") && f16c;
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

inline Isa best_isa() {
  static const Isa isa = [] {
    const Isa machine = machine_isa();
    const char* asked = std::getenv("IWSGD_ISA");
    if (asked == nullptr || *asked == '\0') return machine;
    for (int i = 0; i <= static_cast<int>(machine); ++i)
      if (std::strcmp(asked, kIsaNames[i]) == 0) return static_cast<Isa>(i);
    throw std::runtime_error(std::string("IWSGD_ISA: expected one of baseline, avx2, avx512 that this machine has (its best is ") +
                             kIsaNames[static_cast<int>(machine)] + "), got " + asked);
  }();
  return isa;
}

}  // namespace iwsgd

// Calls FUNCTION of the namespace for the instruction set in use.
#if defined(IWSGD_X86)
#define IWSGD_ISA_CALL(FUNCTION, ...)                                                   \
  (::iwsgd::best_isa() == ::iwsgd::Isa::avx512 ? ::iwsgd::avx512::FUNCTION(__VA_ARGS__) \
   : ::iwsgd::best_isa() == ::iwsgd::Isa::avx2 ? ::iwsgd::avx2::FUNCTION(__VA_ARGS__)   \
                                               : ::iwsgd::baseline::FUNCTION(__VA_ARGS__))
#else
#define IWSGD_ISA_CALL(FUNCTION, ...) ::iwsgd::baseline::FUNCTION(__VA_ARGS__)
#endif
