// What stands around the CUDA loss kernels: which regime is chosen, and the upstream gradient's product.
#include <cstring>
#include <utility>
#include <vector>

#include "../cuda/iw_cross_entropy_launch.h"
#include "../cuda/iw_cross_entropy_scale.cuh"
#include "check.h"

using namespace iwsgd;

// The upstream gradient: any size and alignment, and nothing at all where it is 1.
template <class T>
void scale_as(acc_t<T> factor) {
  for (const int64_t n : {0, 1, 7, 8, 9, 100, 1000})
    for (int offset = 0; offset < 9; ++offset) {
      std::vector<std::pair<double, double>> memory(n * sizeof(T) / 16 + 16), before;
      T* const x = reinterpret_cast<T*>(memory.data()) + offset;
      for (int64_t i = -offset; i < n + 8; ++i) x[i] = from_acc<T>(static_cast<acc_t<T>>(i % 13) / 4);
      before = memory;
      const T* const old = reinterpret_cast<const T*>(before.data()) + offset;
      for (int64_t thread = 0; thread < 37; ++thread) scale_elements(x, n, &factor, thread, 37);
      for (int64_t i = -offset; i < n + 8; ++i) {
        const T expected = i >= 0 && i < n && factor != 1 ? from_acc<T>(to_acc(old[i]) * factor) : old[i];
        CHECK(std::memcmp(&x[i], &expected, sizeof(T)) == 0, "element ", i, " of ", n, " at offset ", offset, " times ", factor);
      }
    }
}

void scales() {
  for (const double factor : {1.0, 0.3, 0.0}) {
    scale_as<float>(static_cast<float>(factor)), scale_as<double>(factor);
    scale_as<bf16>(static_cast<float>(factor)), scale_as<fp16>(static_cast<float>(factor));
  }
}

// The choice between the regimes, by the numbers of real devices. S, C and bytes of an element, a unit for each of 8192 examples.
void plans() {
  const DeviceLimits a100{108, 166912, 167936, 41943040};
  DeviceLimits h200{132, 232448, 233472, 62914560};
  h200.most_ranks = kMostRanks;
  const auto shape = [](int64_t S, int64_t C, int64_t bytes) {
    return LossShape{S, 8192, C, 1, bytes, 4, true, true, true, false, C * bytes % 16 == 0 ? 16 : bytes, false};
  };
  const auto times = [](LossShape s, double units) { return s.units = static_cast<int64_t>(s.units * units), s; };
  const auto ranks = [](const LossShape& s, const DeviceLimits& device, int64_t held = 8) {
    if (tile_plan(s, device).use) return 1;
    const ClusterPlan plan = cluster_plan(s, device, [&](const ClusterPlan&) { return held; });
    if (!plan.use) return 0;
    CHECK(plan.shared_bytes <= device.shared_per_block && plan.ranks * plan.classes >= s.C && plan.blocks == plan.ranks * held, "C ", s.C);
    CHECK(plan.lanes >= kWarpLanes && plan.threads % plan.lanes == 0 && (plan.lanes & (plan.lanes - 1)) == 0, "lanes ", plan.lanes);
    return plan.ranks;
  };
  const auto expect = [](int got, int expected, const char* what) { CHECK(got == expected, what, ": ", got, " blocks, not ", expected); };
  // In registers: lanes of a row, accesses and rows of a lane, warps of a team, units of it.
  const auto held = [&](LossShape s, int lanes, int accesses, int rows, int warps, int units, const char* what) {
    const RegisterPlan plan = register_plan(s, h200);
    CHECK(plan.use && kWarpLanes >> plan.group_bits == lanes && plan.accesses == accesses && plan.rows == rows && plan.warps == warps &&
              (plan.places << plan.group_bits) == units,
          what, ": ", kWarpLanes >> plan.group_bits, ' ', plan.accesses, ' ', plan.rows, ' ', plan.warps, ' ',
          plan.places << plan.group_bits);
    CHECK(plan.places * s.S <= plan.rows * plan.warps && plan.tiles * (plan.places << plan.group_bits) >= s.units, what);
  };
  const auto pairs = [&](int64_t S, int64_t C) {
    LossShape s = shape(S, C, 2);
    s.access_bytes = 4;
    return s;
  };
  held(times(shape(8, 256, 2), 0.25), 32, 2, 8, 1, 1, "a warp holds a unit, as there are few of them");
  held(shape(8, 256, 2), 16, 2, 8, 1, 2, "a warp holds two units");
  held(shape(8, 1000, 2), 32, 4, 4, 2, 1, "two warps");
  held(shape(8, 4096, 2), 32, 16, 1, 8, 1, "a warp for each row");
  held(shape(64, 256, 2), 16, 2, 8, 8, 2, "many samples");
  held(shape(4, 256, 2), 16, 2, 8, 1, 4, "twice two units of few samples");
  held(shape(3, 8, 4), 2, 2, 8, 1, 16, "units side by side; no places, as there are few of them");
  held(times(pairs(8, 2), 100), 1, 8, 8, 1, 32, "a lane for each unit");
  held(pairs(8, 10), 8, 8, 8, 1, 4, "digits");
  held(times(pairs(8, 10), 100), 1, 8, 8, 1, 32, "many digits: a lane for each row");
  held(times(pairs(8, 100), 100), 8, 8, 8, 1, 4, "seven accesses of eight lanes");
  LossShape odd = shape(8, 1001, 2);
  odd.access_bytes = 2;
  CHECK(!register_plan(odd, h200).use, "rows that begin elsewhere than their gradient");
  odd.alike = true;
  held(odd, 32, 4, 4, 2, 1, "an odd row, in the accesses that cover it");
  CHECK(register_plan(odd, h200).shifted && register_plan(odd, h200).access == 8, "");
  CHECK(!register_plan(shape(8, 5000, 2), h200).use && !register_plan(shape(8, 10, 8), h200).use &&
            !register_plan(shape(1000, 10, 2), h200).use,
        "");
  expect(ranks(shape(8, 10, 2), h200), 1, "digits");
  expect(ranks(shape(8, 7000, 2), h200), 1, "the largest tile");
  expect(ranks(shape(8, 8192, 2), h200), 2, "just above");
  expect(ranks(shape(8, 32000, 2), h200), 8, "a vocabulary: 512 KB, two blocks on a multiprocessor");
  expect(ranks(shape(8, 100000, 2), h200), 16, "1.6 MB");
  expect(ranks(shape(8, 128256, 2), h200), 16, "2 MB, one block on a multiprocessor");
  expect(ranks(shape(8, 220000, 2), h200), 16, "3.5 MB");
  expect(ranks(shape(8, 262144, 2), h200), 0, "4 MB: slices");
  // Slices: units of one, parts of a row, bytes of all that a slice touches.
  const auto sliced = [&](const LossShape& s, const DeviceLimits& device, int64_t units, int parts, const char* what) {
    const SlicePlan plan = slice_plan(s, device);
    CHECK(plan.units == units && plan.parts == parts && plan.parts * plan.classes >= s.C, what, ": ", plan.units, ' ', plan.parts);
    CHECK(2 * plan.units * s.S * s.C * s.element_bytes < device.cache, what, ": does not stay in the cache");
    CHECK(plan.units * s.S * plan.parts * plan.lanes >= device.multiprocessors * 1024, what, ": too few threads");
  };
  sliced(shape(8, 262144, 2), h200, 5, 14, "larger than a cluster");
  sliced(shape(8, 32000, 2), a100, 27, 2, "a vocabulary where there are no clusters");
  expect(ranks(shape(64, 23000, 2), h200), 16, "many samples");
  expect(ranks(shape(64, 131072, 2), h200), 0, "too many");
  expect(ranks(shape(8, 128256, 2), h200, 0), 0, "no group of multiprocessors is large enough");
  expect(ranks(shape(8, 32000, 2), a100), 0, "no clusters");
  expect(ranks(shape(8, 5000, 2), a100), 1, "no clusters, a tile");
  LossShape joint = shape(8, 32000, 2);
  joint.positions = 4;
  expect(ranks(joint, h200), 0, "units of several positions");
  LossShape columns = shape(8, 32000, 2);
  columns.even = false;
  expect(ranks(columns, h200), 0, "classes that are not adjacent");
  // Rows of 100,000 classes fit 8 blocks only as one on a multiprocessor; 16 take two.
  CHECK(cluster_with(shape(8, 100000, 2), 16).shared_bytes <= h200.shared_per_multiprocessor / 2 - 1024, "two on a multiprocessor");
}

int main() {
  scales();
  plans();
  return test::report();
}
