// Conversions of float16 and bfloat16, each against values computed in double from the formats' definition: all 65536 bit
// patterns to float and back, and float to 16 bits at and beside every boundary between two neighbours.
#include "../dtypes.h"

#include <cmath>
#include <limits>
#include <vector>

#include "check.h"

using namespace iwsgd;

struct Format {
  const char* name;
  int exponent_bits, mantissa_bits;

  uint32_t infinity() const { return ((1u << exponent_bits) - 1) << mantissa_bits; }

  // The value of a magnitude (no sign bit); NaN for patterns above infinity's.
  double value(uint32_t magnitude) const {
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = static_cast<int>(magnitude >> mantissa_bits);
    const double mantissa = magnitude & ((1u << mantissa_bits) - 1);
    if (magnitude > infinity()) return std::numeric_limits<double>::quiet_NaN();
    if (magnitude == infinity()) return std::numeric_limits<double>::infinity();
    const double one = std::ldexp(1.0, mantissa_bits);
    return exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_bits) : std::ldexp(one + mantissa, exponent - bias - mantissa_bits);
  }
};

template <class T>
void all_patterns(const Format& format) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const T from{static_cast<uint16_t>(bits)};
    const float x = to_acc(from);
    const double expected = format.value(bits & 0x7FFFu);
    const T back = from_acc<T>(x);
    if (std::isnan(expected)) {
      CHECK(std::isnan(x), format.name, " bits ", bits, " gave ", x);
      CHECK(std::isnan(to_acc(back)), format.name, " NaN bits ", bits, " came back as ", back.bits);
      continue;
    }
    CHECK(x == (bits & 0x8000u ? -expected : expected), format.name, " bits ", bits, " gave ", x);
    CHECK(std::signbit(x) == (bits >> 15 == 1), format.name, " bits ", bits, ": sign");
    CHECK(back.bits == bits, format.name, " bits ", bits, " came back as ", back.bits);
  }
}

template <class T>
void rounds_to(const Format& format, float x, uint32_t magnitude) {
  for (const float signed_x : {x, -x}) {
    const uint32_t expected = magnitude | (std::signbit(signed_x) ? 0x8000u : 0u);
    const uint32_t got = from_acc<T>(signed_x).bits;
    CHECK(got == expected, format.name, ": ", signed_x, " became ", got, ", not ", expected);
  }
}

template <class T>
void rounding(const Format& format) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (uint32_t low = 0; low < format.infinity(); ++low) {
    // Past the largest value the next step of its exponent takes infinity's place.
    const double below = format.value(low);
    const double above = low + 1 < format.infinity() ? format.value(low + 1) : 2 * below - format.value(low - 1);
    const double middle = (below + above) / 2;
    const float x = static_cast<float>(middle);
    CHECK(x == middle, format.name, ": the boundary above ", low, " is no float");
    rounds_to<T>(format, std::nextafter(x, 0.0f), low);
    rounds_to<T>(format, x, low % 2 == 0 ? low : low + 1);  // to even
    rounds_to<T>(format, std::nextafter(x, infinity), low + 1);
  }
  rounds_to<T>(format, infinity, format.infinity());
  rounds_to<T>(format, std::numeric_limits<float>::max(), format.infinity());
  rounds_to<T>(format, 0.0f, 0);
  for (const uint32_t nan : {0x7F800001u, 0x7FC00000u, 0x7FFFFFFFu, 0xFF800001u, 0xFFFFFFFFu})
    CHECK(std::isnan(to_acc(from_acc<T>(bit_cast<float>(nan)))), format.name, ": NaN bits ", nan);

  // Between boundaries: the nearest of the two neighbours that a search finds.
  std::vector<double> values;
  for (uint32_t magnitude = 0; magnitude < format.infinity(); ++magnitude) values.push_back(format.value(magnitude));
  test::Random random;
  for (int trial = 0; trial < 1 << 20; ++trial) {
    const float x = bit_cast<float>(random.word() & 0x7FFFFFFFu);
    if (!(x < values.back())) continue;
    uint32_t low = 0, high = format.infinity() - 1;
    while (high - low > 1) (values[(low + high) / 2] <= x ? low : high) = (low + high) / 2;
    const double down = x - values[low], up = values[high] - x;
    rounds_to<T>(format, x, down < up || (down == up && low % 2 == 0) ? low : high);
  }
}

int main() {
  const Format half{"float16", 5, 10}, brain{"bfloat16", 8, 7};
  all_patterns<fp16>(half);
  all_patterns<bf16>(brain);
  rounding<fp16>(half);
  rounding<bf16>(brain);
  CHECK(to_acc(from_acc<float>(0.1f)) == 0.1f, "float");
  CHECK(to_acc(from_acc<double>(0.1)) == 0.1, "double");
  return test::report();
}
