// The Box-Muller rule in float32 against float64, and each instruction set's numbers against the rule.
#include "../real_noise.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "../dtypes.h"
#define ISA_KERNELS "real_noise_kernels.h"
#include "../cpu/for_each_isa.h"

#include "check.h"

using namespace iwsgd;

constexpr double kTolerance = 2e-6, kShortTolerance = 8e-6;  // of float32, and of GPUs; between backends 5e-5 are allowed

// Words where the rule changes its way, or where a short formula would give an infinity, 0 or a coarse step.
std::vector<uint32_t> edges() {
  std::vector<uint32_t> words{0xB504F333u, 0x5A82799Au};  // sqrt(1/2) and its half: where the logarithm changes its exponent
  for (int bit = 0; bit < 32; ++bit) words.push_back(uint32_t(1) << bit);
  for (uint32_t eighth = 0; eighth < 8; ++eighth) words.push_back(eighth << 29);
  const std::size_t n = words.size();
  for (std::size_t i = 0; i < n; ++i)
    for (uint32_t step = 1; step < 200; step = step * 3 + 1) {
      words.push_back(words[i] + step);
      words.push_back(words[i] - step);
      words.push_back(~words[i] - step);
    }
  return words;
}

void near(float got, double want, const char* isa, uint32_t a, uint32_t b) {
  CHECK(std::abs(got - want) <= kTolerance, isa, ": words ", a, " ", b, ": ", got, ", not ", want);
}

void normal() {
  const auto pair = [](uint32_t a, uint32_t b) {
    const Pair<double> want = Normal::pair<double>(a, b);
    const Pair<float> got = Normal::pair<float>(a, b);
    CHECK(std::isfinite(want.first) && std::isfinite(want.second), a, " ", b);
    near(got.first, want.first, "float32", a, b);
    near(got.second, want.second, "float32", a, b);
  };
  const std::vector<uint32_t> words = edges();
  for (const uint32_t a : words)
    for (const uint32_t b : words) pair(a, b);
  test::Random random;
  for (int trial = 0; trial < 3000000; ++trial) pair(random.word() >> random.below(32), random.word());
  for (int trial = 0; trial < 1000000; ++trial) pair(~(random.word() >> random.below(32)), random.word());

  // By hand: u = 1/2 + 2^-33 at no turn, and at a quarter turn
  const double r = std::sqrt(-2 * std::log(0.5 + std::ldexp(1, -33)));
  near(Normal::pair<float>(0x80000000u, 0).first, r, "hand", 0x80000000u, 0);
  near(Normal::pair<float>(0x80000000u, 0x40000000u).second, r, "hand", 0x80000000u, 0x40000000u);
  near(Normal::pair<float>(0x80000000u, 0x80000000u).first, -r, "hand", 0x80000000u, 0x80000000u);
  near(Normal::pair<float>(0x80000000u, 0xC0000000u).second, -r, "hand", 0x80000000u, 0xC0000000u);
  CHECK(Normal::pair<float>(0, 0).first > 6.76f && Normal::pair<float>(0, 0).first < 6.77f,
        "the largest: ", Normal::pair<float>(0, 0).first);
  CHECK(Normal::pair<float>(0xFFFFFFFFu, 0).first > 0, "the smallest is not 0");
}

// A GPU's functions at the edge of their documented errors, each to the side that `sides` says.
struct Inexact {
  static inline int sides = 0;
  static float off(double x, double error, int which) { return static_cast<float>(x + (sides >> which & 1 ? error : -error)); }
  static float log2(float x) {
    const double y = std::log2(static_cast<double>(x));
    return off(y, 0x1p-22 * std::max(1.0, std::abs(y)), 0);
  }
  static float sine(float x) { return off(std::sin(static_cast<double>(x)), std::exp2(-20.5), 1); }
  static float cosine(float x) { return off(std::cos(static_cast<double>(x)), std::exp2(-20.5), 2); }
  static float root(float x) {
    const double y = std::sqrt(static_cast<double>(x));
    return off(y, 0x1p-23 * y, 3);
  }
};

// What GPUs compute.
void short_normal() {
  const auto pair = [](uint32_t a, uint32_t b) {
    const Pair<double> want = Normal::pair<double>(a, b);
    const Pair<float> got = Normal::short_pair<Inexact>(a, b);
    CHECK(std::abs(got.first - want.first) <= kShortTolerance && std::abs(got.second - want.second) <= kShortTolerance, "short: words ", a,
          ' ', b, ": ", got.first, ' ', got.second, ", not ", want.first, ' ', want.second);
    CHECK(std::abs(got.first) < 6.77f && std::abs(got.second) < 6.77f && got.first * got.first + got.second * got.second > 0, a, ' ', b);
  };
  const std::vector<uint32_t> words = edges();
  for (Inexact::sides = 0; Inexact::sides < 16; ++Inexact::sides) {
    for (std::size_t i = 0; i < words.size(); ++i)
      pair(words[i], words[(i * 7919) % words.size()]), pair(~words[i], words[(i * 104729) % words.size()]);
    test::Random random;
    for (int trial = 0; trial < 100000; ++trial) pair(random.word() >> random.below(32), random.word());
    for (int trial = 0; trial < 100000; ++trial) pair(~(random.word() >> random.below(32)), random.word());
  }
}

// Laplace and uniform numbers, each of one word, against formulas written anew; GPUs' short form of the first.
void of_one_word() {
  const double kRootThree = std::sqrt(3.0), kRootHalf = std::sqrt(0.5);
  const auto word = [&](uint32_t a) {
    const double size = -kRootHalf * std::log((std::fmod(a, 2147483648.0) + 0.5) / 2147483648.0);
    const double laplace = a < 0x80000000u ? size : -size;
    const double uniform = kRootThree * ((a < 0x80000000u ? double(a) : double(a) - 4294967296.0) + 0.5) / 2147483648.0;
    CHECK(std::abs(Laplace::pair<double>(a, ~a).first - laplace) <= 1e-14 * 16, a, ": ", laplace);
    CHECK(std::abs(Uniform::pair<double>(~a, a).second - uniform) <= 1e-15 * 2, a, ": ", uniform);
    near(Laplace::pair<float>(a, ~a).first, laplace, "laplace", a, ~a);
    near(Uniform::pair<float>(~a, a).second, uniform, "uniform", ~a, a);
    for (Inexact::sides = 0; Inexact::sides < 2; ++Inexact::sides) {
      const float got = Laplace::short_one<Inexact>(a);
      CHECK(std::abs(got - laplace) <= kShortTolerance, "short laplace: word ", a, ": ", got, ", not ", laplace);
    }
    CHECK(std::abs(Laplace::pair<float>(a, a).first) < 15.7f && std::abs(Uniform::pair<float>(a, a).first) < 1.7320509f, "bounds ", a);
  };
  for (const uint32_t a : edges()) word(a);
  test::Random random;
  for (int trial = 0; trial < 1000000; ++trial) {
    const uint32_t a = random.word() >> random.below(32);
    word(a), word(~a);
  }
  CHECK(Laplace::pair<double>(0, 0x80000000u).first == -Laplace::pair<double>(0, 0x80000000u).second, "signs");
}

// One instruction set's forms, under one type.
struct Forms {
  const char* isa;
  void (*words)(const uint64_t* w01, const uint64_t* w23, float* z);  // of eight groups each
  void (*floats)(const RowAddress&, int64_t position, int64_t n, float* z);
  void (*doubles)(const RowAddress&, int64_t position, int64_t n, double* z);
};

#define FORMS(ISA, LAW)                                                     \
  Forms {                                                                   \
    #ISA " " #LAW,                                                          \
        [](const uint64_t* w01, const uint64_t* w23, float* z) {            \
          ISA::Drawn drawn;                                                 \
          std::memcpy(drawn.w01, w01, sizeof drawn.w01);                    \
          std::memcpy(drawn.w23, w23, sizeof drawn.w23);                    \
          ISA::store_numbers(LAW(), drawn, z);                              \
        },                                                                  \
        [](const RowAddress& row, int64_t position, int64_t n, float* z) {  \
          ISA::Buffer<float> buffer;                                        \
          std::copy_n(ISA::numbers(LAW(), row, position, n, buffer), n, z); \
        },                                                                  \
        [](const RowAddress& row, int64_t position, int64_t n, double* z) { \
          ISA::Buffer<double> buffer;                                       \
          std::copy_n(ISA::numbers(LAW(), row, position, n, buffer), n, z); \
        }                                                                   \
  }

template <class L>
void forms(const Forms& forms) {
  const std::vector<uint32_t> words = edges();
  float z[32];
  for (const uint32_t a : words)
    for (const uint32_t b : words) {
      uint64_t w01[8], w23[8];
      std::fill(w01, w01 + 8, a | static_cast<uint64_t>(b) << 32);
      std::fill(w23, w23 + 8, b | static_cast<uint64_t>(a) << 32);
      forms.words(w01, w23, z);
      const Pair<double> first = L::template pair<double>(a, b), second = L::template pair<double>(b, a);
      for (int i = 0; i < 32; i += 4) {
        near(z[i], first.first, forms.isa, a, b);
        near(z[i + 1], first.second, forms.isa, a, b);
        near(z[i + 2], second.first, forms.isa, b, a);
        near(z[i + 3], second.second, forms.isa, b, a);
      }
    }

  test::Random random;
  std::vector<float> floats;
  std::vector<double> doubles;
  for (int trial = 0; trial < 3000; ++trial) {
    const RowAddress row{random.next() >> random.below(64), random.word() >> random.below(32), random.word() >> random.below(32),
                         random.word() >> random.below(32)};
    const int64_t n = 1 + random.below(200);
    const int64_t position =
        (static_cast<int64_t>(random.word() >> random.below(32)) * kNumbers + random.below(kNumbers)) - (trial % 2) * n;
    if (position < 0) continue;
    floats.resize(n);
    doubles.resize(n);
    forms.floats(row, position, n, floats.data());
    forms.doubles(row, position, n, doubles.data());
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = position + i;
      const Words drawn = philox({static_cast<uint32_t>(at / kNumbers), row.example, row.sample, row.stream}, row.seed);
      const double want = number<L, double>(drawn, static_cast<int>(at % kNumbers));
      CHECK(std::abs(doubles[i] - want) <= 1e-14 * 8, forms.isa, ": float64, position ", at, ": ", doubles[i], ", not ", want);
      CHECK(std::abs(floats[i] - want) <= kTolerance, forms.isa, ": float32, position ", at, ": ", floats[i], ", not ", want);
    }
  }
}

#define ALL_FORMS(ISA) forms<Normal>(FORMS(ISA, Normal)), forms<Laplace>(FORMS(ISA, Laplace)), forms<Uniform>(FORMS(ISA, Uniform))

int main() {
  normal();
  of_one_word();
  short_normal();
  ALL_FORMS(baseline);
#if defined(IWSGD_X86)
  if (machine_isa() >= Isa::avx2) ALL_FORMS(avx2);
  if (machine_isa() >= Isa::avx512) ALL_FORMS(avx512);
#endif
  std::cout << "up to " << kIsaNames[static_cast<int>(machine_isa())] << "\n";
  return test::report();
}
