// The CUDA loss kernels' bodies in every regime, on the host: sizes, clusters, and every option with every other.
#include "host_loss.h"

// Sizes at the borders of the kernels' choices: lanes, accesses, several rows of a warp, several warps of a row, several tiles.
void sizes() {
  const DeviceLimits roomy{1, 230000, 460000, 60000}, tight{1, 4000, 8000, 3000};
  DeviceLimits grouped{1, 6000, 12000, 3000};
  grouped.most_ranks = 4;
  for (const int64_t C : {1, 2, 3, 7, 8, 10, 16, 33, 63, 64, 65, 250, 256, 1000, 1001})
    for (const int64_t S : {1, 2, 3, 5, 8}) {
      if (S * C > 4000 || (kFewCases && (C % 25 != 3 && C % 25 != 14 && C != 250))) continue;
      Case k{S, C > 100 ? 2 : 9, C, 1};
      for (auto device : {roomy, tight, grouped, roomy}) {
        device.registers = k.device.shared_per_block == grouped.shared_per_block ? 1 << 16 : 0;  // the last one's
        k.device = device;
        run<float>(k), run<bf16>(k);
        k.smoothing = 0.125, k.class_weight = true, k.lse_square_scale = 0.3;
        run<float>(k);
        k.smoothing = 0, k.class_weight = false;
        if (C % 5 == 0) run<bf16>(k);
        k.lse_square_scale = 0;
      }
    }
  Case most{5, 9, 10, 1};  // the likeliest sample alone has the weight
  most.alpha = std::numeric_limits<double>::infinity();
  run<float>(most), run<bf16>(most);
  Case several{3, 2, 1001, 1};  // more rows of a tile than teams of several warps
  several.device.registers = 0;
  run<float>(several);
  if (kFewCases) return;
  run_all({2, 2, 5003, 1});
  run_all({1, 1, 20011, 1});
  run_all({3, 700, 2, 1});    // more units than threads
  run_all({40, 3, 5, 1});     // more samples than lanes
  run_all({2, 3, 4, 70});     // more positions than a block has warps
  Case image{2, 3, 4, 1100};  // than threads
  image.layout = kClassFirst;
  run<bf16>(image);
  for (const bool per_position : {false, true})
    for (const Reduction reduction : {Reduction::none, Reduction::mean, Reduction::sum}) {
      Case k{2, 0, 4, 3};
      k.per_position = per_position, k.reduction = reduction;
      run<float>(k);
      k.B = 3, k.T = 0;
      run<float>(k);
    }
}

// Units held by 2 to 16 blocks: ranges of classes that are uneven, a block without any, labels in each, rows that begin anywhere in a
// granule, units that follow one another in a cluster.
void clusters() {
  int taken[kMostRanks + 1] = {};
  for (const int ranks : {2, 4, 8, 16})
    for (const int64_t C : {100, 2048, 3001, 4099})
      for (const bool soft : {false, true}) {
        if (kFewCases && (ranks == 16 || C != 3001)) continue;
        Case k{ranks < 8 ? 2 : 16, 5, C, 1};
        k.special = C < 3000 ? kInfinite : kOrdinary;
        k.device = {2, 1 << 20, 1 << 21, 3000};
        k.device.most_ranks = ranks, k.device.registers = 0;
        // What just holds the rows in that many blocks, so that no fewer are taken.
        const LossShape shape{k.S, k.B, C, 1, 2, 4, true, true, true, soft, C % 8 == 0 ? 16 : 2, false};
        k.device.shared_per_block = cluster_with(shape, ranks).shared_bytes;
        k.device.shared_per_multiprocessor = 2 * (k.device.shared_per_block + 1024);
        if (soft) k.smoothing = 0.1, k.class_weight = true, k.in_place = true;
        if (C % 2 == 1) k.lse_square_scale = 0.3;
        const int before = counts.clusters;
        run<bf16>(k);
        CHECK((counts.clusters > before) == !tile_plan(shape, k.device).use, k);
        taken[cluster_plan(shape, k.device, [](const ClusterPlan&) { return 1; }).ranks] += counts.clusters > before;
        if (ranks != 4) continue;
        k.offset = 3, k.apart = !soft;  // the gradient lies elsewhere in its granules
        run<bf16>(k);
        k.layout = kPadded;
        run<float>(k), run<double>(k);
      }
  for (const int ranks : {2, 4, 8, 16}) CHECK(kFewCases || taken[ranks] > 0, "no cluster of ", ranks);
}

// Units held in registers: each form with rows that fill it and that do not, of one or several warps; several units of few samples in a
// team; the last team's missing units; fewer blocks than teams.
void registers() {
  for (const int64_t C : {1, 2, 6, 8, 10, 30, 64, 100, 129, 250, 256, 511, 512, 513, 1000, 1001, 1024, 2045, 2047, 2048, 4087, 4096})
    for (const int64_t S : {1, 2, 3, 4, 5, 8, 9, 20}) {
      if (S * C > 9000 || (kFewCases && (S % 3 != 2 || C % 10 > 1))) continue;
      Case k{S, S * C > 1000 ? 3 : 37, C, 1};
      k.resident_blocks = S % 2 == 1 ? 1 : 3;
      const int before = counts.registers;
      run<bf16>(k);
      CHECK(counts.registers > before, k, "not in registers");
      k.resident_blocks = 4 - k.resident_blocks, k.lse_square_scale = 0.3;
      k.reduction = S % 2 == 1 ? Reduction::sum : Reduction::none, k.class_weight = k.example_weight = true, k.alpha = 0.5,
      k.in_place = true;
      run<fp16>(k);
      if (C <= 2048) run<float>(k);
    }
  // Rows that begin anywhere, in both alike or not, some of them a few elements longer than their classes.
  for (const int64_t C : {257, 260, 519, 1017, 1018, 2100})
    for (int offset = 0; offset < 9; offset += kFewCases ? 3 : 1) {
      Case k{3, 5, C, 1};
      k.offset = offset, k.layout = offset % 2 == 0 ? kClassLast : kPadded, k.apart = offset % 3 == 1, k.in_place = offset % 3 == 2;
      k.resident_blocks = 2;
      run<bf16>(k);
      if (C <= 2045) run<float>(k);
    }
  Case few{1, 600, 24, 1};  // places
  few.device = {1, 100000, 200000, 60000};
  few.resident_blocks = 1;
  run_all(few);
}

// Rows that several blocks share: examples and positions, hard and soft targets, the last part shorter than the others.
void parts() {
  for (const int64_t C : {65, 200, 700})
    for (const int64_t T : {1, 3})
      for (const int option : {0, 1, 2}) {
        Case k{3, 2, C, T};
        k.device = {2, 300, 600, 100}, k.device.registers = 0, k.device.part_bytes = 64;
        k.offset = option, k.class_weight = option == 1, k.smoothing = option == 2 ? 0.1 : 0, k.probabilities = option == 2,
        k.per_position = option == 1;
        k.layout = option == 2 ? kPadded : kClassLast, k.in_place = option == 1, k.lse_square_scale = option == 1 ? 0 : 0.3;
        const int before = counts.parts;
        run_all(k);
        CHECK(counts.parts > before, k, "not in parts");
      }
}

// Every option, layout, alignment and special value with every other, at random.
void options() {
  test::Random random;
  const double alphas[] = {1, 1, 0, 0.5, 2, 1e-6, 1e-25, 1e3, std::numeric_limits<double>::infinity()};
  for (int trial = 0; trial < (kFewCases ? 40 : 350); ++trial) {
    const auto coin = [&] { return random.below(2) == 1; };
    Case k{random.below(8) + 1, random.below(6) + 1, random.below(4) == 0 ? random.below(300) + 1 : random.below(20) + 1, 1};
    if (coin()) k.T = random.below(7) + 1;
    k.layout = static_cast<Layout>(random.below(4));
    k.offset = static_cast<int>(random.below(9));
    k.apart = coin(), k.in_place = random.below(3) == 0, k.gradient = k.in_place || random.below(5) > 0;
    k.apart = k.apart && !k.in_place;
    k.per_position = coin(), k.probabilities = random.below(3) == 0, k.class_weight = coin(), k.example_weight = random.below(3) == 0;
    k.position_weight = random.below(3) == 0, k.normalizer = random.below(4) == 0;
    k.smoothing = coin() ? 0 : 0.1, k.lse_square_scale = coin() ? 0 : 0.3;
    k.alpha = k.S == 1 ? 1 : alphas[random.below(9)];
    k.reduction = static_cast<Reduction>(random.below(3));
    k.special = random.below(3) > 0 ? kOrdinary : static_cast<Special>(random.below(5));
    k.signs = static_cast<Signs>(random.below(3));
    // Both signs: of units that do not share importance weights, and over a denominator that does not cancel.
    if (k.signs == kBoth && !k.per_position && k.T > 1 && k.S > 1 && k.alpha != 0) k.signs = kNegative;
    if (k.signs == kBoth && k.reduction == Reduction::mean) k.normalizer = true;
    if (coin()) k.device = {random.below(4) + 1, 6000, 12000, random.below(4000)};
    if (coin()) k.device.part_bytes = 32;
    k.device.most_ranks = coin() ? 1 : 1 << random.below(4), k.device.registers = coin() ? 0 : 1 << 16;
    k.resident_blocks = random.below(5), k.resident_clusters = random.below(4);
    if (coin()) k.device.most_blocks = random.below(3) + 1;
    if (trial % 4 == 0) run<float>(k);
    else if (trial % 4 == 1) run<bf16>(k);
    else if (trial % 4 == 2) run<fp16>(k);
    else run<double>(k);
  }
}

int main() {
  sizes();
  registers();
  parts();
  clusters();
  options();
  CHECK(kFewCases || (counts.registers > 300 && counts.tiles > 300 && counts.together > 200 && counts.clusters > 100 &&
                      counts.slices > 300 && counts.parts > 50),
        "registers ", counts.registers, ", tiles ", counts.tiles, ", in one launch ", counts.together, ", clusters ", counts.clusters,
        ", slices ", counts.slices, ", of them in parts ", counts.parts);
  return test::report();
}
