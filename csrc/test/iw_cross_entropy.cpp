// The CPU loss on each instruction set. Of one example, in rows and in panels: NaN whatever its bits, and what rounding does to sums over
// many classes. Of several, in rows: one is written while the next is read, which must change nothing.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "../dtypes.h"
#include "../iw_cross_entropy.h"
#define ISA_KERNELS "iw_cross_entropy_kernels.h"
#include "../cpu/for_each_isa.h"

#include "check.h"

using namespace iwsgd;

using Solve = void (*)(const LossArguments<float, float>&, const float*, const float*, float, int64_t, int64_t);

// One example under one noise sample, label 1. Classes `step` apart: where they are not adjacent, rows are worked on as panels.
struct Example {
  std::vector<float> z, dz;
  float log_p = 0, weight = 0, bound = 0;

  Example(Solve solve, const std::vector<float>& logits, int64_t step, float smoothing)
      : z(logits.size() * step), dz(logits.size() * step) {
    const auto classes = static_cast<int64_t>(logits.size()), label = int64_t(1);
    for (int64_t i = 0; i < classes; ++i) z[i * step] = logits[i];
    LossArguments<float, float> a{};
    a.S = a.B = a.positions_each = 1, a.C = classes;
    a.logits = z.data(), a.dlogits = dz.data();
    a.row_stride = a.drow_stride = a.position_stride = a.dposition_stride = classes * step, a.class_stride = a.dclass_stride = step;
    a.labels = &label, a.ignore_index = -100, a.smoothing = smoothing, a.alpha = 1;
    a.log_p = &log_p, a.weights = &weight, a.bound = &bound;
    const float c = 1;
    solve(a, &c, &c, 1, 0, 1);
  }
};

void nan_payloads(const char* isa, Solve solve) {
  for (const uint32_t bits : {0x7FC00000u, 0xFFC00000u, 0x7FC00001u, 0x7FC000FFu, 0x7FC00100u, 0x7FFFFFFFu, 0xFFFFFFFFu})
    for (const int64_t classes : {7, 100, 3000})  // the last: several chunks
      for (const int64_t step : {1, 2})
        for (const int64_t at : {int64_t(0), int64_t(1), classes - 1}) {
          std::vector<float> z(classes);
          z[at] = bit_cast<float>(bits);
          const Example got(solve, z, step, 0);
          CHECK(std::isnan(got.log_p) && std::isnan(got.bound), isa, ": NaN ", bits, " at ", at, " of ", classes, ": ", got.log_p);
          for (int64_t i = 0; i < classes; ++i) CHECK(std::isnan(got.dz[i * step]), isa, ": NaN ", bits, ": gradient ", got.dz[i * step]);
        }
}

void many_classes(const char* isa, Solve solve) {
  constexpr int64_t kClasses = 32001;
  test::Random random;
  // Equal terms are all rounded to the same side; a rising row has a new maximum in every chunk.
  for (const char* kind : {"any", "equal", "rising"}) {
    std::vector<float> z(kClasses);
    const bool equal = kind[0] == 'e';
    for (float& x : z) x = equal ? -3.3f : static_cast<float>(random.word() * 0x1p-29 - 4);
    if (kind[0] == 'r') std::sort(z.begin(), z.end());
    else z[0] = 4;
    long double sum = 0, mean = 0;
    for (const float x : z) sum += std::exp(static_cast<long double>(x)), mean += x / static_cast<long double>(kClasses);
    for (const float smoothing : {0.0f, 0.1f, 1.0f})
      for (const int64_t step : {1, 2}) {
        const long double expected = (1 - smoothing) * z[1] + smoothing * mean - std::log(sum);
        const Example got(solve, z, step, smoothing);
        CHECK(std::abs(got.log_p / expected - 1) < 6e-7L, isa, ": ", kind, ", classes ", step, " apart, smoothing ", smoothing, ": ",
              got.log_p, ", not ", expected);
      }
  }
}

// Infinities and NaN in one chunk of a row, ordinary logits in another.
void infinities(const char* isa, Solve solve) {
  constexpr int64_t kClasses = 3000, kFirst = 2500;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const int64_t step : {1, 2})
    for (const bool at_end : {true, false}) {  // where the ordinary logits are
      const auto begins = at_end ? kFirst : 0, ends = at_end ? kClasses : kClasses - kFirst;
      std::vector<float> z(kClasses, -kInfinity);
      double sum = 0;
      for (int64_t i = begins; i < ends; ++i) sum += std::exp(static_cast<double>(z[i] = static_cast<float>(i % 7)));
      const Example masked(solve, z, step, 0);
      const double log_p = z[1] - std::log(sum);
      CHECK(at_end ? masked.log_p == -kInfinity : std::abs(masked.log_p - log_p) < 1e-5, isa, ": masked: ", masked.log_p, ", not ", log_p);
      for (int64_t i = 2; i < kClasses; ++i) {
        const double expected = std::exp(static_cast<double>(z[i])) / sum;
        CHECK(std::abs(masked.dz[i * step] - expected) <= 1e-6 * expected, isa, ": masked: gradient ", masked.dz[i * step], " at ", i);
      }
      for (const float special : {std::numeric_limits<float>::quiet_NaN(), kInfinity})
        for (const int64_t at : {int64_t(0), int64_t(1500), kClasses - 1}) {
          const float before = z[at];
          z[at] = special;
          const Example got(solve, z, step, 0);
          CHECK(std::isnan(got.log_p) && std::isnan(got.dz[0]), isa, ": ", special, " at ", at, ": ", got.log_p, ", gradient ", got.dz[0]);
          z[at] = before;
        }
    }
  const Example impossible(solve, std::vector<float>(kClasses, -kInfinity), 1, 0);
  CHECK(std::isnan(impossible.log_p) && std::isnan(impossible.dz[0]), isa, ": -infinity alone: ", impossible.log_p);
}

// Several examples under three noise samples, the third example ignored; with alpha = infinity two rows of each have no weight.
struct Batch {
  static constexpr int64_t kSamples = 3;
  int64_t examples, classes;
  std::vector<float> z, c, log_p, weights, bound;
  std::vector<int64_t> labels;

  Batch(int64_t examples, int64_t classes) : examples(examples), classes(classes), z(kSamples * examples * classes), c(examples, 1.0f) {
    test::Random random;
    for (float& x : z) x = static_cast<float>(random.word() * 0x1p-29 - 4);
    for (int64_t b = 0; b < examples; ++b) labels.push_back(random.below(static_cast<uint32_t>(classes)));
    if (examples > 2) labels[2] = -100, c[2] = 0;
  }

  // The gradient goes `past` elements beyond the beginning of a line of memory; or over the logits. At once, or example by example.
  std::vector<float> gradient(Solve solve, double alpha, float smoothing, int64_t past, bool in_place, bool at_once) {
    std::vector<float> memory(in_place ? z : std::vector<float>(z.size() + 32, 7.0f));
    float* dz = memory.data();
    while (!in_place && reinterpret_cast<std::uintptr_t>(dz) % 64 != static_cast<std::uintptr_t>(4 * past)) ++dz;
    log_p.assign(kSamples * examples, 0), weights = log_p, bound.assign(examples, 0);
    LossArguments<float, float> a{};
    a.S = kSamples, a.B = examples, a.C = classes, a.positions_each = 1;
    a.logits = in_place ? dz : z.data(), a.dlogits = dz;
    a.row_stride = a.drow_stride = classes, a.class_stride = a.dclass_stride = a.position_stride = a.dposition_stride = 1;
    a.labels = labels.data(), a.ignore_index = -100, a.smoothing = smoothing, a.alpha = alpha;
    a.log_p = log_p.data(), a.weights = weights.data(), a.bound = bound.data();
    if (at_once) solve(a, c.data(), c.data(), 0.5f, 0, examples);
    else
      for (int64_t b = 0; b < examples; ++b) solve(a, c.data(), c.data(), 0.5f, b, b + 1);
    for (const float* p = memory.data(); !in_place && p < memory.data() + memory.size(); ++p)
      CHECK((p >= dz && p < dz + z.size()) || *p == 7.0f, "written outside of the gradient: ", p - dz);
    return {dz, dz + z.size()};
  }

  // The greatest error, relative to the greatest value.
  double error(const std::vector<float>& gradient, double alpha, float smoothing) const {
    double worst = 0;
    for (int64_t b = 0; b < examples; ++b) {
      std::vector<double> sums, l;
      for (int64_t s = 0; s < kSamples; ++s) {
        const float* row = &z[(s * examples + b) * classes];
        double sum = 0, mean = 0;
        for (int64_t i = 0; i < classes; ++i) sum += std::exp(static_cast<double>(row[i])), mean += row[i] / static_cast<double>(classes);
        sums.push_back(sum);
        l.push_back(labels[b] < 0 ? 0.0 : (1 - smoothing) * row[labels[b]] + smoothing * mean - std::log(sum));
      }
      const double most = *std::max_element(l.begin(), l.end());
      double all = 0;
      for (const double x : l) all += std::isinf(alpha) ? x == most : std::exp(alpha * (x - most));
      for (int64_t s = 0; s < kSamples; ++s) {
        const double w = labels[b] < 0 ? 0.0 : (std::isinf(alpha) ? l[s] == most : std::exp(alpha * (l[s] - most))) / all;
        for (int64_t i = 0; i < classes; ++i) {
          const int64_t at = (s * examples + b) * classes + i;
          const double target = (i == labels[b] ? 1 - smoothing : 0) + smoothing / static_cast<double>(classes);
          worst = std::max(worst, std::abs(gradient[at] - 0.5 * w * (std::exp(static_cast<double>(z[at])) / sums[s] - target)));
        }
      }
    }
    return worst;
  }
};

void blocks(const char* isa, Solve solve) {
  const double infinity = std::numeric_limits<double>::infinity();
  // 64 to 700: several examples in a block, the last block shorter; 1030, 3000: one, of several chunks, of which the row that is read may
  // have one more; 64000: past the caches.
  for (const int64_t classes : {64, 100, 700, 1030, 3000, 64000}) {
    Batch batch(classes == 64000 ? 36 : 21, classes);
    for (const double alpha : {1.0, infinity})
      for (const float smoothing : {0.0f, 0.1f}) {
        if (classes == 64000 && alpha == 1 && smoothing > 0) continue;
        const std::vector<float> alone = batch.gradient(solve, alpha, smoothing, 0, false, false), weights = batch.weights;
        const double error = batch.error(alone, alpha, smoothing);
        CHECK(error < 3e-6, isa, ": ", classes, " classes, alpha ", alpha, ", smoothing ", smoothing, ": error ", error);
        for (const int64_t past : {0, 1, 15}) {
          CHECK(batch.gradient(solve, alpha, smoothing, past, false, true) == alone && batch.weights == weights, isa, ": ", classes,
                " classes at once, not as one by one, ", past, " elements past a line");
          if (classes == 64000 && alpha == 1) break;
        }
        CHECK(batch.gradient(solve, alpha, smoothing, 0, true, true) == alone, isa, ": ", classes, " classes in place");
      }
  }
}

void on(const char* isa, Solve solve) {
  blocks(isa, solve);
  infinities(isa, solve);
  nan_payloads(isa, solve);
  many_classes(isa, solve);
}

int main() {
  on("baseline", baseline::solve<float, float>);
#if defined(IWSGD_X86)
  if (machine_isa() >= Isa::avx2) on("avx2", avx2::solve<float, float>);
  if (machine_isa() >= Isa::avx512) on("avx512", avx512::solve<float, float>);
#endif
  std::cout << "up to " << kIsaNames[static_cast<int>(machine_isa())] << "\n";
  return test::report();
}
