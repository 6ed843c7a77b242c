// The rule of multinomial draws, and the CUDA kernel's body on blocks of the host, against a search from the first feature on.
#include "../cuda/multinomial_kernels.cuh"

#include <algorithm>
#include <functional>
#include <vector>

#include "check.h"
#include "host_block.h"

using namespace iwsgd;

constexpr int64_t kOne = int64_t(1) << 32;

int64_t first_above(uint32_t word, const int64_t* bounds) {
  int64_t f = 0;
  while (bounds[f] <= word) ++f;
  return f;
}

std::vector<int64_t> uniform(int64_t features) {
  std::vector<int64_t> bounds;
  for (int64_t f = 1; f <= features; ++f) bounds.push_back((f * kOne + features - 1) / features);
  return bounds;
}

// Features of very different probabilities, some of them 0, in front, between and at the end.
std::vector<int64_t> uneven(int64_t features, test::Random& random) {
  std::vector<int64_t> bounds;
  for (int64_t f = 0; f < features; ++f) bounds.push_back(random.below(4) == 0 ? 0 : random.word() >> random.below(32));
  std::sort(bounds.begin(), bounds.end());
  bounds.back() = kOne;
  if (features > 4) bounds[features - 2] = kOne;
  return bounds;
}

void rule() {
  test::Random random;
  for (int64_t features = 1; features < 70; ++features)
    for (const auto& bounds : {uniform(features), uneven(features, random)}) {
      std::vector<uint32_t> words{0, 1, 0x7FFFFFFFu, 0x80000000u, 0xFFFFFFFEu, 0xFFFFFFFFu};
      for (const int64_t bound : bounds)
        for (const int64_t word : {bound - 1, bound, bound + 1})
          if (word >= 0 && word < kOne) words.push_back(static_cast<uint32_t>(word));
      for (int i = 0; i < 100; ++i) words.push_back(random.word());
      for (const uint32_t word : words)
        CHECK(feature_of(word, bounds.data(), features) == first_above(word, bounds.data()), features, " features, word ", word);
    }
}

template <bool kShared>
void kernel(int64_t samples, int64_t examples, int64_t features, int64_t draws, bool by_sample, bool given, test::Random& random) {
  std::vector<int64_t> bounds;
  for (int64_t s = 0; s < (by_sample ? samples : 1); ++s) {
    const auto of_sample = given ? uneven(features, random) : uniform(features);
    bounds.insert(bounds.end(), of_sample.begin(), of_sample.end());
  }
  const int64_t origin[3] = {static_cast<int64_t>(random.next()), random.below(1000), random.word()};
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < samples; ++i) ids.push_back(random.word());
  const Multinomial call{{origin, given ? ids.data() : nullptr, false, 3, 4}, samples, examples, features, bounds.data(), by_sample, draws};
  for (const Order order : {Order::forwards, Order::backwards, Order::random}) {
    std::vector<int32_t> counts(static_cast<std::size_t>(samples * examples * features), -1);
    Threads threads(order);
    launch_on_host(
        threads, samples * examples, 1, kCountThreads, features * 4,
        [&](const HostBlock& block) { multinomial_fwd<kShared>(call, counts.data(), block); },
        [](int64_t at) { CHECK(false, "written ", at, " bytes behind shared memory"); });
    for (int64_t r = 0; r < samples * examples; ++r) {
      const int64_t s = r / examples, b = r % examples;
      std::vector<int32_t> want(static_cast<std::size_t>(features));
      const RowAddress row{static_cast<uint64_t>(origin[0]), static_cast<uint32_t>(origin[2] + 4 + b),
                           static_cast<uint32_t>(given ? ids[s] : s), static_cast<uint32_t>(origin[1] + 3)};
      for (int64_t j = 0; j < draws; ++j) {
        const Words words = philox({static_cast<uint32_t>(j / 4), row.example, row.sample, row.stream}, row.seed);
        ++want[first_above(words.w[j % 4], bounds.data() + (by_sample ? s * features : 0))];
      }
      CHECK(std::equal(want.begin(), want.end(), counts.begin() + r * features), samples, " x ", examples, " x ", features, ", ", draws,
            " draws, row ", r);
    }
  }
}

int main() {
  rule();
  test::Random random;
  for (const auto& [features, draws] : {std::pair<int64_t, int64_t>{1, 5}, {2, 1}, {7, 3}, {63, 32}, {500, 1031}, {1000, 250}})
    for (const bool given : {false, true})
      for (const bool by_sample : {false, true}) {
        kernel<true>(2, 3, features, draws, by_sample, given, random);
        kernel<false>(2, 3, features, draws, by_sample, given, random);
      }
  return test::report();
}
