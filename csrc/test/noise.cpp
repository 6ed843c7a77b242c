// The mask rule: fields of words, keep bits of a group, the scale of what is kept, and how often an element is kept.
#include "../noise.h"

#include <cmath>

#include "check.h"

using namespace iwsgd;

void fields() {
  const Words words{{0x00010000u, 0x00030002u, 0x00050004u, 0xFFFF0006u}};
  for (int j = 0; j < 7; ++j) CHECK(field(words, j) == static_cast<uint32_t>(j), "field ", j);
  CHECK(field(words, 7) == 0xFFFFu, "field 7");
}

void thresholds() {
  CHECK(keep(0, 0) && !keep(0, 1), "field 0");
  CHECK(keep(65535, 65535) && !keep(65535, kFieldRange), "field 65535");
  CHECK(keep_scale<double>(0) == 1.0, keep_scale<double>(0));
  CHECK(std::isfinite(keep_scale<double>(kFieldRange)), "of nothing that is kept");
  for (uint32_t t = 0; t < kFieldRange; ++t) {  // E[keep * scale] = 1
    const double mean = keep_scale<double>(t) * (1.0 - t / 65536.0);
    CHECK(std::abs(mean - 1.0) < 1e-15, "threshold ", t, ": mean ", mean);
  }
}

void groups() {
  test::Random random;
  for (int trial = 0; trial < 20000; ++trial) {
    const RowAddress row{random.next(), random.word(), random.word(), random.word()};
    const uint32_t group = random.word(), threshold = random.below(kFieldRange + 1);
    const uint32_t bits = keep_group(row, group, threshold);
    const Words words = philox({group, row.example, row.sample, row.stream}, row.seed);
    for (uint32_t j = 0; j < kGroup; ++j) {
      const uint32_t sixteen = words.w[j / 2] / (j % 2 ? 65536u : 1u) % 65536u;
      CHECK((bits >> j & 1u) == (sixteen >= threshold ? 1u : 0u), "element ", j, ", threshold ", threshold);
    }
    CHECK(bits < 256, bits);
    CHECK(keep_group(row, group, 0) == 255, "threshold 0 keeps all");
    CHECK(keep_group(row, group, kFieldRange) == 0, "threshold 65536 keeps none");
    // a mask grows as its threshold falls: masks of two dropout rates at one address are nested
    CHECK((bits & ~keep_group(row, group, threshold / 2)) == 0, "threshold ", threshold);
  }
}

// Every part of the address counts: one bit flipped anywhere gives another word. And kept elements have the right frequency.
void addresses() {
  test::Random random;
  const RowAddress row{random.next(), random.word(), random.word(), random.word()};
  const Words words = philox({5, row.example, row.sample, row.stream}, row.seed);
  const auto differs = [&](uint32_t group, const RowAddress& other) {
    return philox({group, other.example, other.sample, other.stream}, other.seed).w[0] != words.w[0];
  };
  for (int bit = 0; bit < 64; ++bit)
    CHECK(differs(5, {row.seed ^ uint64_t(1) << bit, row.example, row.sample, row.stream}), "seed bit ", bit);
  for (int bit = 0; bit < 32; ++bit) {
    const uint32_t flip = uint32_t(1) << bit;
    CHECK(differs(5 ^ flip, row), "group bit ", bit);
    CHECK(differs(5, {row.seed, row.example ^ flip, row.sample, row.stream}), "example bit ", bit);
    CHECK(differs(5, {row.seed, row.example, row.sample ^ flip, row.stream}), "sample bit ", bit);
    CHECK(differs(5, {row.seed, row.example, row.sample, row.stream ^ flip}), "stream bit ", bit);
  }

  const uint32_t threshold = 19661;  // p = 0.3
  const double p = threshold / 65536.0, n = 100000;
  int kept[kGroup] = {};
  for (uint32_t group = 0; group < static_cast<uint32_t>(n); ++group) {
    const uint32_t bits = keep_group(row, group, threshold);
    for (int j = 0; j < kGroup; ++j) kept[j] += bits >> j & 1u;
  }
  for (int j = 0; j < kGroup; ++j) {
    const double z = (kept[j] - n * (1 - p)) / std::sqrt(n * p * (1 - p));
    CHECK(std::abs(z) < 5, "element ", j, " is kept ", kept[j], " times of ", n, ": ", z, " standard deviations off");
  }
}

// Address: offsets from the origin, sample ids absent, per sample, and per sample and example.
void calls() {
  const int64_t origin[3] = {-1, 7, int64_t(1) << 32};
  const int64_t ids[6] = {10, 11, 12, 13, 14, -1};
  const RowAddress plain = Address{origin, nullptr, false, 2, 100}.of_row(3, 4, 5);
  CHECK(plain.seed == ~uint64_t(0), plain.seed);
  CHECK(plain.stream == 9, plain.stream);
  CHECK(plain.example == 104, plain.example);  // modulo 2^32
  CHECK(plain.sample == 3, plain.sample);
  CHECK((Address{origin, ids, false, 0, 0}.of_row(2, 1, 3).sample == 12), "ids [K]");
  CHECK((Address{origin, ids, true, 0, 0}.of_row(1, 0, 3).sample == 13), "ids [K, B]");
  CHECK((Address{origin, ids, true, 0, 0}.of_row(1, 2, 3).sample == 0xFFFFFFFFu), "ids [K, B]");
}

int main() {
  fields();
  thresholds();
  groups();
  addresses();
  calls();
  return test::report();
}
