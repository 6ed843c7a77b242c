// How the loss kernels cut a call into blocks: plain host C++, so that it is tested without CUDA.
//
// A unit (an example, or a position of one) is S rows of C logits, n bytes. Three regimes:
//   tiles     Where n fits half of a multiprocessor's shared memory (113 KB on sm_90, 81 KB on sm_80), a block holds the rows of one
//             or more units there from the statistics to the gradient: one read and one write of the logits, 2n bytes.
//   clusters  From there to 16 times all of it (3.6 MB: S = 8 of bf16 to 230,000 classes, S = 64 to 27,000), on sm_90 and later, the
//             blocks of a cluster hold a range of the classes each and exchange statistics: 2n bytes too.
//   slices    The rest (units too large, units of several positions, classes that are not adjacent in memory): three kernels
//             (statistics, weights, gradient) that read the logits twice, 3n bytes. They do so by slices that stay in the second
//             level cache between the kernels; where that holds, the memory itself moves 2n.
// Launches: tiles 1, whatever the reduction (NOTE [One launch]); clusters 1 for "none", 2 for "sum" (the total), 3 for "mean" (the
// denominator), beside units of 0.1 to 3.6 MB each; slices three for each slice, and the same two.
#pragma once
#include <algorithm>

#include "../dtypes.h"
#include "../iw_cross_entropy.h"

namespace iwsgd {

// What alpha is at least, unless it is 0: less would make alpha (l - max) a subnormal number, and the limit is long reached.
template <class A>
constexpr double kLeastAlpha = sizeof(A) == 4 ? 1e-30 : 1e-290;

struct DeviceLimits {
  int64_t multiprocessors;
  int64_t shared_per_block, shared_per_multiprocessor;  // bytes
  int64_t cache;                                        // bytes of the second level cache
  int most_ranks = 1;                                   // blocks of a cluster; 1: there are no clusters
  int64_t most_blocks = 1 << 15;                        // of a grid; each then works on several tiles or rows
};

// What the choice depends on.
struct LossShape {
  int64_t S, units, C;
  int64_t positions;          // of a unit: more than one only where an example's positions share their weights
  int64_t element_bytes, acc_bytes;
  bool even;                  // row (s, unit) begins at s * B * row_stride + unit * pitch, in both, and its classes are adjacent
  bool adjacent;              // the classes of a row of the logits
  bool contiguous;            // the rows of neighbouring units, too, in the logits and in their gradient
  bool aligned;               // every row, to 16 bytes, in both
};

template <class T, class A>
inline LossShape loss_shape(const LossArguments<T, A>& a) {
  const int64_t positions = a.positions_each, size = sizeof(T);
  const auto follow = [&](int64_t row, int64_t classes, int64_t position) {  // rows of neighbouring positions
    return classes == 1 && (positions == 1 ? row == a.C : position == a.C && row == positions * a.C);
  };
  const auto lies_even = [&](int64_t row, int64_t classes, int64_t position) {
    return classes == 1 && (positions == 1 || row == positions * position);
  };
  const auto align = [&](const T* base, int64_t row, int64_t position) {
    const auto pitches = static_cast<uint64_t>(row * size) | static_cast<uint64_t>(positions == 1 ? 0 : position * size);
    return (reinterpret_cast<uintptr_t>(base) | pitches) % 16 == 0;
  };
  LossShape shape{};
  shape.S = a.S, shape.units = a.units(), shape.C = a.C;
  shape.positions = a.per_position ? 1 : positions;
  shape.element_bytes = size, shape.acc_bytes = sizeof(A);
  shape.adjacent = a.class_stride == 1;
  shape.even = lies_even(a.row_stride, a.class_stride, a.position_stride);
  shape.contiguous = follow(a.row_stride, a.class_stride, a.position_stride);
  shape.aligned = a.C * size % 16 == 0 && align(a.logits, a.row_stride, a.position_stride);
  if (a.dlogits != nullptr) {
    shape.even = shape.even && lies_even(a.drow_stride, a.dclass_stride, a.dposition_stride);
    shape.contiguous = shape.contiguous && follow(a.drow_stride, a.dclass_stride, a.dposition_stride);
    shape.aligned = shape.aligned && align(a.dlogits, a.drow_stride, a.dposition_stride);
  }
  return shape;
}

constexpr int kStatsPerRow = 3;          // max, sum, log-likelihood
constexpr int kPartValues = 5;           // of a RowPart
constexpr int64_t kScratchBytes = 1024;  // a block's reductions
constexpr int kDenominatorBlocks = 32;   // of the kernel that does nothing else
constexpr int kPlainThreads = 256;       // of the kernels that hold nothing in shared memory
constexpr int kJoinThreads = 1024;       // of those that add up an example's positions

// A block holds the rows of n units; row (s, j) begins at s * segment_bytes + j * row_bytes, shifted so that it lies to 16 bytes as
// it does in memory. lanes threads work on a row, weigh_lanes on a unit's weights: both powers of two.
struct TilePlan {
  bool use;
  int threads, lanes, weigh_lanes, n;
  bool segments;  // the n rows of one noise sample are copied as one
  bool flat;      // the gradient goes through shared memory, as rows alone would be written in unaligned bits
  bool one_launch;  // NOTE [One launch]: the blocks are on the GPU all at once, and make the denominator and the total too
  int64_t row_bytes, segment_bytes, rows_at, shared_bytes;
  int64_t tiles, blocks;
};

// The blocks of a cluster hold a unit, each a range of its classes; row s of a block begins at rows_at + s * row_bytes, shifted as
// in a tile.
struct ClusterPlan {
  bool use;
  int ranks, threads, lanes;
  int64_t classes;  // of a block; the last may have fewer, or none
  int64_t row_bytes, rows_at, shared_bytes;
  int64_t blocks;   // ranks times the clusters, each of which works on several units
};

struct SlicePlan {
  int64_t units;        // of a slice
  int lanes;            // of a row
  int weigh_lanes;      // of a unit's weights
  int64_t row_blocks, unit_blocks;
};

inline int power_of_two_in(int64_t n) {  // the largest one that is not above n
  int power = 1;
  while (power < (1 << 30) && 2 * int64_t(power) <= n) power *= 2;
  return power;
}
inline int64_t divide_up(int64_t n, int64_t d) { return (n + d - 1) / d; }

// Lanes that have one 16-byte access each, or a whole block.
inline int lanes_of_row(const LossShape& shape, int most) {
  return static_cast<int>(std::min<int64_t>(most, power_of_two_in(divide_up(shape.C * shape.element_bytes, 16))));
}

inline TilePlan tile_with(const LossShape& shape, int64_t n) {
  TilePlan plan{};
  plan.n = static_cast<int>(n);
  plan.segments = shape.contiguous;
  plan.flat = shape.contiguous && !shape.aligned;
  const int64_t row = shape.C * shape.element_bytes;
  if (plan.segments) {
    plan.row_bytes = row;
    plan.segment_bytes = divide_up(n * row, 16) * 16 + 16;
  } else {
    plan.row_bytes = divide_up(row, 16) * 16 + 16;
    plan.segment_bytes = n * plan.row_bytes;
  }
  plan.rows_at = kScratchBytes + divide_up((kStatsPerRow * shape.S + 1) * n * shape.acc_bytes, 16) * 16;
  plan.shared_bytes = plan.rows_at + shape.S * plan.segment_bytes;
  return plan;
}

inline TilePlan tile_plan(const LossShape& shape, const DeviceLimits& device) {
  // At least two blocks on a multiprocessor, so that one reads while another computes; 1 KiB of each is the system's.
  const int64_t most = std::min(device.shared_per_block, device.shared_per_multiprocessor / 2 - 1024);
  TilePlan plan = tile_with(shape, 1);
  if (!shape.even || shape.positions != 1 || shape.units == 0 || plan.shared_bytes > most) return {};
  // Small units are taken together until a block's reads cover memory's latency, but every multiprocessor gets a few blocks.
  constexpr int64_t kTileBytes = 16384, kMostUnits = 256;
  const int64_t unit_bytes = shape.S * shape.C * shape.element_bytes;
  int64_t n = std::min({std::max<int64_t>(1, kTileBytes / unit_bytes), kMostUnits, divide_up(shape.units, 4 * device.multiprocessors)});
  while (n > 1 && tile_with(shape, n).shared_bytes > most) n /= 2;
  plan = tile_with(shape, n);
  plan.use = true;
  plan.threads = unit_bytes * n > 40960 ? 512 : 256;
  // No more lanes than a row has accesses, unless there are too few rows for all warps.
  const int64_t rows = n * shape.S, spread = plan.threads / std::min<int64_t>(plan.threads, power_of_two_in(rows));
  plan.lanes = lanes_of_row(shape, static_cast<int>(std::max<int64_t>(32, spread)));
  plan.weigh_lanes = std::min(32, power_of_two_in(std::min(shape.S, std::max<int64_t>(1, plan.threads / n))));
  plan.tiles = divide_up(shape.units, n);
  plan.blocks = std::min(plan.tiles, device.most_blocks);
  return plan;
}

constexpr int kMostRanks = 16;       // of a cluster; more than 8 must be asked for
constexpr int kClusterThreads = 512;

inline ClusterPlan cluster_with(const LossShape& shape, int ranks) {
  ClusterPlan plan{};
  plan.ranks = ranks;
  plan.threads = kClusterThreads;
  const int64_t line = 128 / shape.element_bytes;  // ranges begin at whole lines of memory where rows do
  plan.classes = divide_up(divide_up(shape.C, ranks), line) * line;
  plan.row_bytes = plan.classes * shape.element_bytes + 16;
  plan.rows_at = kScratchBytes + divide_up(((kPartValues + kStatsPerRow) * shape.S + 1) * shape.acc_bytes, 16) * 16;
  plan.shared_bytes = plan.rows_at + shape.S * plan.row_bytes;
  // All rows at once where there are warps enough, so that each is merged once.
  const int64_t accesses = divide_up(plan.classes * shape.element_bytes, 16);
  const int spread = plan.threads / std::min(plan.threads / 32, power_of_two_in(shape.S));
  plan.lanes = static_cast<int>(std::min<int64_t>(spread, power_of_two_in(accesses)));
  return plan;
}

// The fewest blocks that hold a unit, two of them on a multiprocessor if that is enough, so that one reads while the other
// computes. clusters(plan): how many of these the device holds at once; it may have no room for any.
template <class Clusters>
ClusterPlan cluster_plan(const LossShape& shape, const DeviceLimits& device, const Clusters& clusters) {
  if (!shape.even || shape.positions != 1 || shape.units == 0) return {};
  for (const int64_t most : {std::min(device.shared_per_block, device.shared_per_multiprocessor / 2 - 1024), device.shared_per_block})
    for (int ranks = 2; ranks <= std::min(kMostRanks, device.most_ranks); ranks *= 2) {
      ClusterPlan plan = cluster_with(shape, ranks);
      if (plan.shared_bytes > most) continue;
      const int64_t resident = clusters(plan);
      if (resident == 0) continue;
      plan.use = true;
      plan.blocks = ranks * std::min({shape.units, resident, device.most_blocks});
      return plan;
    }
  return {};
}

inline SlicePlan slice_plan(const LossShape& shape, const DeviceLimits& device) {
  SlicePlan plan{};
  const int64_t unit_bytes = std::max<int64_t>(1, shape.S * shape.positions * shape.C * shape.element_bytes);
  // Logits and gradient of a slice share the cache; a slice fills the multiprocessors at least once.
  const int64_t row_lanes = shape.adjacent ? lanes_of_row(shape, kPlainThreads) : 1;
  const int64_t unit_threads = std::max<int64_t>(1, shape.S * shape.positions * row_lanes);
  const int64_t fill = divide_up(device.multiprocessors * 1024, unit_threads);
  plan.units = std::max<int64_t>(1, std::min(shape.units, std::max(fill, device.cache / 3 / unit_bytes)));
  plan.lanes = static_cast<int>(row_lanes);
  plan.weigh_lanes = std::min(32, power_of_two_in(plan.units * shape.S > 65536 ? 1 : shape.S));
  const int64_t rows = plan.units * shape.S * shape.positions;
  plan.row_blocks = std::min(divide_up(rows * plan.lanes, kPlainThreads), device.most_blocks);
  plan.unit_blocks = shape.positions == 1 ? divide_up(plan.units * plan.weigh_lanes, kPlainThreads) : plan.units;
  plan.unit_blocks = std::min(plan.unit_blocks, device.most_blocks);
  return plan;
}

// Memory of a call besides its arguments and results.
template <class A>
struct LossWork {
  double* denominators;    // [denominator_blocks], partial sums of d, where the loss is the mean
  int64_t denominator_blocks;
  unsigned* finished;      // blocks, where one launch does everything
  double* losses;          // [blocks], partial sums of the loss, or null
  int64_t loss_blocks;
  // Of the positions of a slice, row (s, position) at s * (positions of the slice) + position - first:
  A *max, *sum, *u;        // [S, positions]
  A* c;                    // [positions]
  int64_t first_unit, units;
};

// Takes a call's memory apart; with a null base it only measures.
struct Cutter {
  char* base;
  int64_t used = 0;
  template <class A>
  A* take(int64_t n) {
    A* const taken = base == nullptr ? nullptr : reinterpret_cast<A*>(base + used);
    used += divide_up(n * static_cast<int64_t>(sizeof(A)), 16) * 16;
    return taken;
  }
};

template <bool kSoft, class T, class A, class Launches>
void run_slices(const LossArguments<T, A>& a, LossWork<A> work, const SlicePlan& plan, const Launches& launches) {
  double* const losses = work.losses;
  const bool rows = plan.row_blocks > 0;  // examples without positions have none
  for (int64_t slice = 0; slice * plan.units < a.units(); ++slice) {
    work.first_unit = slice * plan.units;
    work.units = std::min(plan.units, a.units() - work.first_unit);
    work.losses = losses == nullptr ? nullptr : losses + slice * plan.unit_blocks;
    if (rows) launches.template statistics<kSoft>(a, work, plan);
    if (a.per_position || a.positions_each == 1) launches.weights(a, work, plan);
    else launches.join(a, work, plan);
    if (rows && a.dlogits != nullptr) launches.template gradient<kSoft>(a, work, plan);
  }
}

// Every kernel of a call, in order. allocate(bytes): memory of the device. launches: starts kernels, and says how many blocks and
// clusters of them the device holds at once (0: it cannot start them together).
template <bool kSoft, class T, class A, class Allocate, class Launches>
void run_loss_as(const LossArguments<T, A>& a, const DeviceLimits& device, const Allocate& allocate, const Launches& launches) {
  const LossShape shape = loss_shape(a);
  const bool total = a.reduction != Reduction::none;
  const bool mean = a.reduction == Reduction::mean && a.normalizer == nullptr && a.positions() > 0;
  TilePlan tiles = tile_plan(shape, device);
  if (tiles.use && total)
    if (const int64_t resident = launches.template resident<kSoft, T>(tiles); resident > 0)
      tiles.one_launch = true, tiles.blocks = std::min(tiles.tiles, resident);
  const ClusterPlan clusters = tiles.use ? ClusterPlan{} : cluster_plan(shape, device, [&](const ClusterPlan& plan) {
    return launches.template clusters<kSoft, T>(plan);
  });
  const bool sliced = !tiles.use && !clusters.use && shape.units > 0;
  const SlicePlan slices = sliced ? slice_plan(shape, device) : SlicePlan{};
  const int64_t positions = slices.units * shape.positions;

  LossWork<A> work{};
  if (mean) work.denominator_blocks = tiles.one_launch ? tiles.blocks : std::min<int64_t>(kDenominatorBlocks, divide_up(a.positions(), kPlainThreads));
  const auto cut = [&](char* base) {
    Cutter memory{base};
    work.denominators = memory.take<double>(work.denominator_blocks);
    work.finished = memory.take<unsigned>(1);
    work.loss_blocks = tiles.use ? tiles.blocks : clusters.use ? clusters.blocks / clusters.ranks
                     : sliced ? divide_up(shape.units, slices.units) * slices.unit_blocks : 0;
    work.losses = total ? memory.take<double>(work.loss_blocks) : nullptr;
    work.max = memory.take<A>(a.S * positions);
    work.sum = memory.take<A>(a.S * positions);
    work.u = memory.take<A>(shape.positions == 1 ? 0 : a.S * positions);
    work.c = memory.take<A>(positions);
    return memory.used;
  };
  cut(allocate(cut(nullptr)));

  if (tiles.one_launch) return launches.template tile<kSoft>(a, work, tiles);
  if (mean) launches.denominator(a, work);
  if (tiles.use) launches.template tile<kSoft>(a, work, tiles);
  else if (clusters.use) launches.template cluster<kSoft>(a, work, clusters);
  else if (sliced) run_slices<kSoft>(a, work, slices, launches);
  if (total) launches.total(a, work);
}

template <class T, class A, class Allocate, class Launches>
void run_loss(LossArguments<T, A> a, const DeviceLimits& device, const Allocate& allocate, const Launches& launches) {
  if (a.alpha > 0) a.alpha = std::max(a.alpha, kLeastAlpha<A>);
  if (a.probabilities != nullptr || a.smoothing > A(0)) run_loss_as<true>(a, device, allocate, launches);
  else run_loss_as<false>(a, device, allocate, launches);
}

}  // namespace iwsgd
