// Reads the file ISA_KERNELS once per instruction set, each time in a namespace of its own (avx512, avx2, baseline), and
// then defines nothing more: the including file picks a namespace at run time with best_isa().
//
// NOTE [Instruction sets]
// One binary serves every machine, so kernels are compiled several times instead of with -march=native. Intrinsics are used
// where g++ 12.2 would otherwise miscompile `keep ? x * scale : 0` (seen under -O3 with AVX-512 and with AVX2): a product
// is always masked after it is made, never selected from a comparison. Everything the kernels include must have been
// included before this file, outside of the target regions, so that no common function is compiled for one machine only.
#ifndef ISA_KERNELS
#error "define ISA_KERNELS to the file to be compiled for each instruction set"
#endif
#include "isa.h"

#if defined(IWSGD_X86)
IWSGD_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#define IWSGD_AVX512 1
namespace iwsgd {
namespace avx512 {
#include "simd.h"
#include ISA_KERNELS
}  // namespace avx512
}  // namespace iwsgd
#undef IWSGD_AVX512
IWSGD_TARGET_END

IWSGD_TARGET_BEGIN("avx2,fma,f16c,bmi2")
#define IWSGD_AVX2 1
namespace iwsgd {
namespace avx2 {
#include "simd.h"
#include ISA_KERNELS
}  // namespace avx2
}  // namespace iwsgd
#undef IWSGD_AVX2
IWSGD_TARGET_END
#endif

namespace iwsgd {
namespace baseline {
#include "simd.h"
#include ISA_KERNELS
}  // namespace baseline
}  // namespace iwsgd
