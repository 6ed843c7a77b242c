// Each instruction set's keep bits against keep_group, for addresses of all sizes.
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../dtypes.h"
#include "../noise.h"
#define ISA_KERNELS "noise_kernels.h"
#include "../cpu/for_each_isa.h"

#include "check.h"

using namespace iwsgd;

using KeepBits = void (*)(uint8_t*, RowAddress, int64_t, int64_t, uint32_t);

void keep_bits(const char* isa, KeepBits function) {
  test::Random random;
  const uint32_t thresholds[] = {0, 1, 19661, 32767, 32768, 32769, 65534, 65535};  // the sign of a 16-bit field, and the ends
  std::vector<uint8_t> bits;
  for (int trial = 0; trial < 4000; ++trial) {
    const RowAddress row{random.next() >> random.below(64), random.word() >> random.below(32), random.word() >> random.below(32),
                         random.word() >> random.below(32)};
    // groups up to 2^32 - 1, the last one included
    const int64_t groups = 8 * (1 + random.below(16));
    const int64_t group = std::min<int64_t>(random.word() >> random.below(32), (int64_t(1) << 32) - groups);
    const uint32_t threshold = trial % 2 ? thresholds[trial / 2 % 8] : random.below(kFieldRange);
    bits.assign(static_cast<std::size_t>(groups) + 8, 0xA5);
    function(bits.data(), row, group, groups, threshold);
    for (int64_t g = 0; g < groups; ++g) {
      const uint32_t expected = keep_group(row, static_cast<uint32_t>(group + g), threshold);
      CHECK(bits[g] == expected, isa, ": group ", group + g, ", threshold ", threshold, ": ", int(bits[g]), ", not ", expected);
    }
    for (int64_t g = groups; g < groups + 8; ++g) CHECK(bits[g] == 0xA5, isa, ": wrote past ", groups, " groups");
  }
}

int main() {
  keep_bits("baseline", baseline::keep_bits);
#if defined(IWSGD_X86)
  if (machine_isa() >= Isa::avx2) keep_bits("avx2", avx2::keep_bits);
  if (machine_isa() >= Isa::avx512) keep_bits("avx512", avx512::keep_bits);
#endif
  std::cout << "up to " << kIsaNames[static_cast<int>(machine_isa())] << "\n";
  return test::report();
}
