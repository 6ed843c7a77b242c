// How the loss kernels cut a call into blocks: plain host C++, so that it is tested without CUDA.
//
// A unit (an example, or a position of one) is S rows of C logits, n bytes. Four regimes:
//   registers Hard labels, rows of up to 4096 classes of bf16 or 2048 of float: a warp, or several of a block, hold the rows of one or
//             more units from the statistics to the gradient: one read and one write of the logits, 2n bytes.
//   tiles     Where n fits half of a multiprocessor's shared memory (113 KB on sm_90, 81 KB on sm_80), a block holds the rows of one
//             or more units there: 2n bytes.
//   clusters  From there to 16 times all of it (3.6 MB: S = 8 of bf16 to 220,000 classes, S = 64 to 23,000), on sm_90 and later, the
//             blocks of a cluster hold a range of the classes each and exchange statistics: 2n bytes too.
//   slices    The rest (units too large, units of several positions, classes that are not adjacent in memory): three kernels
//             (statistics, weights, gradient) that read the logits twice, 3n bytes. They do so by slices that stay in the second
//             level cache between the kernels; where that holds, the memory itself moves 2n.
// Launches: registers and tiles 1, whatever the reduction (NOTE [One launch]); clusters 1 for "none", 2 for "sum" (the total), 3 for
// "mean" (the denominator), beside units of 0.1 to 3.6 MB each; slices three for each slice, and the same two.
#pragma once
#include <algorithm>
#include <iterator>

#include "../dtypes.h"
#include "../iw_cross_entropy.h"

namespace iwsgd {

// The least alpha, unless it is 0: less would make alpha (l - max) a subnormal number, and the limit is long reached.
template <class A>
constexpr double kLeastAlpha = sizeof(A) == 4 ? 1e-30 : 1e-290;

struct DeviceLimits {
  int64_t multiprocessors;
  int64_t shared_per_block, shared_per_multiprocessor;  // bytes
  int64_t cache;                                        // bytes of the second level cache
  int most_ranks = 1;                                   // blocks of a cluster; 1: there are no clusters
  int64_t most_blocks = 1 << 15;                        // of a grid; each then works on several tiles or rows
  int64_t registers = 1 << 16;                          // of a block
  int64_t part_bytes = 1 << 14;                         // of a row that is worth a block of its own
};

// The facts of a call that its plan depends on.
struct LossShape {
  int64_t S, units, C;
  int64_t positions;  // of a unit: more than one only where an example's positions share their weights
  int64_t element_bytes, acc_bytes;
  bool even;             // row (s, unit) begins at s * B * row_stride + unit * pitch, in both, and its classes are adjacent
  bool adjacent;         // the classes of a row of the logits
  bool contiguous;       // the rows of neighbouring units, too, in the logits and in their gradient
  bool soft;             // probabilities, or smoothed labels
  int64_t access_bytes;  // the widest access in which every row can be taken, in both: 16, 4, or one element
  bool alike;            // a row begins as far behind a multiple of 16 bytes in the logits as in their gradient
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
  uint64_t ends = static_cast<uint64_t>(a.C * size);  // where rows begin and end, as far as its lowest bits tell
  const auto begin_at = [&](const T* base, int64_t row, int64_t position) {
    ends |=
        reinterpret_cast<uintptr_t>(base) | static_cast<uint64_t>(row * size) | static_cast<uint64_t>(positions == 1 ? 0 : position * size);
  };
  LossShape shape{};
  shape.S = a.S, shape.units = a.units(), shape.C = a.C;
  shape.positions = a.per_position ? 1 : positions;
  shape.element_bytes = size, shape.acc_bytes = sizeof(A);
  shape.soft = a.probabilities != nullptr || a.smoothing > A(0);
  shape.adjacent = a.class_stride == 1;
  shape.even = lies_even(a.row_stride, a.class_stride, a.position_stride);
  shape.contiguous = follow(a.row_stride, a.class_stride, a.position_stride);
  begin_at(a.logits, a.row_stride, a.position_stride);
  if (a.dlogits != nullptr) {
    shape.even = shape.even && lies_even(a.drow_stride, a.dclass_stride, a.dposition_stride);
    shape.contiguous = shape.contiguous && follow(a.drow_stride, a.dclass_stride, a.dposition_stride);
    begin_at(a.dlogits, a.drow_stride, a.dposition_stride);
  }
  shape.access_bytes = ends % 16 == 0 ? 16 : ends % 4 == 0 ? std::max<int64_t>(4, size) : size;
  const uint64_t apart = (reinterpret_cast<uintptr_t>(a.logits) - reinterpret_cast<uintptr_t>(a.dlogits)) |
                         static_cast<uint64_t>((a.row_stride - a.drow_stride) * size) |
                         static_cast<uint64_t>(positions == 1 ? 0 : (a.position_stride - a.dposition_stride) * size);
  shape.alike = a.dlogits == nullptr || apart % 16 == 0;
  return shape;
}

constexpr int kWarpLanes = 32;
constexpr int64_t kSlotBytes = 24;       // of a RowSlot, a log-likelihood and a weight c
constexpr int kStatsPerRow = 3;          // max, sum, log-likelihood
constexpr int64_t kScratchBytes = 1024;  // a block's reductions
constexpr int kDenominatorBlocks = 32;   // of the kernel that does nothing else
constexpr int kPlainThreads = 256;       // of the kernels that hold nothing in shared memory
constexpr int kJoinThreads = 1024;       // of those that add up an example's positions

// A team of warps holds the rows of 2^group_bits * places units: in each warp `rows` rows for each group of 32 >> group_bits lanes, of
// one unit's samples or, where there are fewer of them, of `places` units. iw_cross_entropy_registers.cuh has a kernel for each form.
struct RegisterPlan {
  bool use;
  int access, accesses, rows;  // the form: elements of an access; accesses of a lane in a row; rows of a lane
  bool shifted;                // the form: rows begin anywhere, and are taken in the aligned accesses that cover them
  int group_bits, places, warps;
  int weigh_bits;         // 2^weigh_bits threads weigh a unit
  int inverse_samples;    // row / S = row * inverse_samples >> 16
  unsigned last_samples;  // bit r: a lane's row r is of its unit's last sample, and another unit's rows follow
  int threads;            // of a block: a team, or several of one warp each
  bool one_launch;
  int64_t shared_bytes, tiles, blocks;  // tiles: of a team's units
  int64_t stride;                       // units from one tile of a team to its next one
  // Elements, in the logits and in their gradient: between neighbouring units; from a row to the next sample's; and, added to that, from
  // the row of a last sample to the first one of the next place.
  struct Steps {
    int64_t unit, sample, place;
  } logits, gradient;
};

// A block holds the rows of n units; row (s, j) begins at s * segment_bytes + j * row_bytes, shifted so that it lies to 16 bytes as
// it does in memory. lanes threads work on a row, weigh_lanes on a unit's weights: both powers of two.
struct TilePlan {
  bool use;
  int threads, lanes, weigh_lanes, n;
  int step_samples, step_units;  // from a team's row to its next one, threads / lanes rows on
  bool segments;                 // the n rows of one noise sample are copied as one
  bool flat;                     // the gradient goes through shared memory, as rows alone would be written in unaligned bits
  bool one_launch;               // NOTE [One launch]: the blocks are on the GPU all at once, and make the denominator and the total too
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
  int64_t blocks;  // ranks times the clusters, each of which works on several units
};

struct SlicePlan {
  int64_t units;    // of a slice
  int lanes;        // of a row, or of each of its parts
  int parts;        // of a row: as many as it takes to keep all multiprocessors busy with a slice that the cache holds
  int64_t classes;  // of a part; the last may have fewer
  int weigh_lanes;  // of a unit's weights
  int64_t row_blocks, part_blocks, unit_blocks;  // of the kernels of rows or their parts, of the one that joins parts, of those of units
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

struct RegisterForm {
  int accesses, rows;
};
// Of accesses of 16 bytes, which take four registers, and of narrow ones, of 4 bytes or one element, which take one: at most 64 registers
// of logits, beside which a thread needs some 40. Short rows that do not lie in whole accesses are taken in narrow ones, longer rows in
// shifted ones, of which the first and the last are made of elements.
constexpr RegisterForm kWideForms[] = {{2, 8}, {4, 4}, {16, 1}};
constexpr RegisterForm kShiftedForms[] = {{4, 4}, {16, 1}};
constexpr RegisterForm kNarrowForms[] = {{8, 8}};
// True where a row takes all lanes of a warp, whose accesses are then a constant number of elements apart.
constexpr bool fills_warp(int64_t access_bytes, int accesses) { return access_bytes == 16 && accesses > 2; }
constexpr int kTeamWarps = 16, kTeamRegisters = 128;  // of a team, and of a thread: at most

inline int bits_of(int64_t n) {  // the least b for which 2^b is at least n
  int bits = 0;
  while ((int64_t(1) << bits) < n) ++bits;
  return bits;
}

// The form with the fewest registers that holds a row.
inline RegisterPlan register_plan(const LossShape& shape, const DeviceLimits& device) {
  RegisterPlan plan{};
  if (!shape.even || shape.positions != 1 || shape.units == 0 || shape.element_bytes > 4 || shape.soft) return plan;
  int64_t bytes = shape.access_bytes, accesses = 0;
  const auto take = [&](const RegisterForm& form) {
    if (plan.rows == 0 && accesses <= form.accesses * kWarpLanes) plan.accesses = form.accesses, plan.rows = form.rows;
  };
  const auto choose_of = [&](const auto& forms) {
    plan.access = static_cast<int>(bytes / shape.element_bytes);
    accesses = plan.shifted ? (shape.C + plan.access - 2) / plan.access + 1 : divide_up(shape.C, plan.access);
    std::for_each(std::begin(forms), std::end(forms), take);
  };
  if (bytes == 16) choose_of(kWideForms);
  else choose_of(kNarrowForms);
  if (plan.rows == 0 && bytes != 16 && shape.alike) bytes = 16, plan.shifted = true, choose_of(kShiftedForms);
  if (plan.rows == 0 || divide_up(shape.S, plan.rows) > kTeamWarps) return plan;
  plan.use = divide_up(shape.S, plan.rows) * kWarpLanes * kTeamRegisters <= device.registers;
  plan.warps = static_cast<int>(divide_up(shape.S, plan.rows));
  // The fewest lanes that hold a row, so that a warp has many; more of them, down to one access each, where there would be too few teams.
  constexpr int kTeams = 8;  // of a multiprocessor, at least
  const int most_bits = fills_warp(bytes, plan.accesses) ? 5 : std::min(5, bits_of(accesses));
  int lane_bits = fills_warp(bytes, plan.accesses) ? 5 : bits_of(divide_up(accesses, plan.accesses));
  while (lane_bits < most_bits && divide_up(shape.units << lane_bits, kWarpLanes) < kTeams * device.multiprocessors) ++lane_bits;
  plan.group_bits = 5 - lane_bits;
  // Several units of few samples, where there are teams enough.
  const int64_t groups = int64_t(1) << plan.group_bits, spread = shape.units / (groups * kTeams * device.multiprocessors);
  plan.places = static_cast<int>(std::max<int64_t>(1, std::min(plan.rows / shape.S, spread)));
  plan.tiles = divide_up(shape.units, groups * plan.places);
  const int teams = plan.warps > 1 || plan.tiles < 4 * device.multiprocessors ? 1 : 4;
  plan.threads = plan.warps * teams * kWarpLanes;
  const int64_t weigh_lanes = std::max<int64_t>(1, plan.warps * kWarpLanes / (groups * plan.places));
  plan.weigh_bits = bits_of(power_of_two_in(std::min<int64_t>({shape.S, weigh_lanes, kWarpLanes})));
  plan.inverse_samples = static_cast<int>(65536 / shape.S + 1);
  for (int64_t row = shape.S; plan.warps == 1 && row < shape.S * plan.places; row += shape.S) plan.last_samples |= 1u << (row - 1);
  plan.shared_bytes = kScratchBytes + teams * plan.warps * plan.rows * groups * kSlotBytes;
  plan.blocks = std::min(divide_up(plan.tiles, teams), device.most_blocks);
  return plan;
}

// The steps of a call, for a plan whose blocks are known.
template <class T, class A>
void take_steps(RegisterPlan& plan, const LossArguments<T, A>& a) {
  const int64_t groups = int64_t(1) << plan.group_bits, teams = plan.blocks * (plan.threads / (plan.warps * kWarpLanes));
  const auto steps = [&](int64_t unit, int64_t row) { return RegisterPlan::Steps{unit, a.B * row, groups * unit - a.S * a.B * row}; };
  plan.stride = teams * groups * plan.places;
  plan.logits = steps(a.lane_stride(), a.row_stride);
  plan.gradient = steps(a.dlane_stride(), a.drow_stride);
}

inline TilePlan tile_with(const LossShape& shape, int64_t n) {
  TilePlan plan{};
  plan.n = static_cast<int>(n);
  plan.segments = shape.contiguous;
  plan.flat = shape.contiguous && shape.access_bytes != 16;
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
  plan.step_samples = static_cast<int>(plan.threads / plan.lanes / n), plan.step_units = static_cast<int>(plan.threads / plan.lanes % n);
  plan.weigh_lanes = std::min(32, power_of_two_in(std::min(shape.S, std::max<int64_t>(1, plan.threads / n))));
  plan.tiles = divide_up(shape.units, n);
  plan.blocks = std::min(plan.tiles, device.most_blocks);
  return plan;
}

// The bytes that a warp sends of its part of a row: five values, or three where the target is hard, in whole pieces of 16 bytes.
IWSGD_HD constexpr int64_t part_bytes(bool soft, int64_t acc_bytes) { return ((soft ? 5 : 3) * acc_bytes + 15) / 16 * 16; }

constexpr int kMostRanks = 16;  // of a cluster; more than 8 must be asked for
constexpr int kClusterThreads = 512;

inline ClusterPlan cluster_with(const LossShape& shape, int ranks) {
  ClusterPlan plan{};
  plan.ranks = ranks;
  plan.threads = kClusterThreads;
  const int64_t line = 128 / shape.element_bytes;  // ranges begin at whole lines of memory where rows do
  plan.classes = divide_up(divide_up(shape.C, ranks), line) * line;
  plan.row_bytes = plan.classes * shape.element_bytes + 16;
  // All rows at once where there are warps enough, so that each is merged once.
  plan.lanes = plan.threads / std::min(plan.threads / kWarpLanes, power_of_two_in(shape.S));
  const int64_t inbox = 2 * shape.S * ranks * (plan.lanes / kWarpLanes) * part_bytes(shape.soft, shape.acc_bytes);
  plan.rows_at = kScratchBytes + 16 + inbox + divide_up((kStatsPerRow * shape.S + 1) * shape.acc_bytes, 16) * 16;
  plan.shared_bytes = plan.rows_at + shape.S * plan.row_bytes;
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
  // Logits and gradient of a slice share the cache; a slice fills the multiprocessors at least once, with its rows in parts where these
  // are long, else with more units.
  const int64_t row_lanes = shape.adjacent ? lanes_of_row(shape, kPlainThreads) : 1;
  const int64_t unit_threads = std::max<int64_t>(1, shape.S * shape.positions * row_lanes), threads = device.multiprocessors * 1024;
  const int64_t row_bytes = shape.C * shape.element_bytes,
                most_parts = shape.adjacent ? std::max<int64_t>(1, row_bytes / device.part_bytes) : 1;
  const int64_t fill = divide_up(threads, unit_threads * most_parts);
  plan.units = std::max<int64_t>(1, std::min(shape.units, std::max(fill, device.cache / 3 / unit_bytes)));
  plan.lanes = static_cast<int>(row_lanes);
  const int64_t line = 128 / shape.element_bytes, parts = std::min(most_parts, divide_up(threads, plan.units * unit_threads));
  plan.classes = divide_up(divide_up(shape.C, parts), line) * line;
  plan.parts = static_cast<int>(divide_up(shape.C, plan.classes));
  plan.weigh_lanes = std::min(32, power_of_two_in(plan.units * shape.S > 65536 ? 1 : shape.S));
  const int64_t rows = plan.units * shape.S * shape.positions;
  plan.row_blocks = std::min(divide_up(rows * plan.parts * plan.lanes, kPlainThreads), device.most_blocks);
  plan.part_blocks = std::min(divide_up(rows, kPlainThreads), device.most_blocks);
  plan.unit_blocks = shape.positions == 1 ? divide_up(plan.units * plan.weigh_lanes, kPlainThreads) : plan.units;
  plan.unit_blocks = std::min(plan.unit_blocks, device.most_blocks);
  return plan;
}

// Memory of a call besides its arguments and results.
template <class A>
struct LossWork {
  double* denominators;  // [denominator_blocks], partial sums of d, where the loss is the mean
  int64_t denominator_blocks;
  unsigned* finished;  // blocks, where one launch does everything
  double* losses;      // [blocks], partial sums of the loss, or null
  int64_t loss_blocks;
  // Of the positions of a slice, row (s, position) at s * (positions of the slice) + position - first:
  A *max, *sum, *u;  // [S, positions]
  A* c;              // [positions]
  int64_t first_unit, units;
  // Of rows in parts of so many classes each: what a RowSum holds, [S, positions, parts, 4].
  int64_t parts, part_classes;
  A* part_sums;
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
    if (rows && plan.parts > 1) launches.template parts<kSoft>(a, work, plan);
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
  RegisterPlan registers{};
  if constexpr (!kSoft && sizeof(T) <= 4) registers = register_plan(shape, device);
  TilePlan tiles = registers.use ? TilePlan{} : tile_plan(shape, device);
  bool one_launch = false;
  if (registers.use) {
    const int64_t resident = launches.template resident<T>(registers);
    if (resident > 0) registers.blocks = std::min(registers.blocks, resident);
    registers.one_launch = one_launch = total && resident > 0;
    take_steps(registers, a);
  } else if (tiles.use && total) {
    const int64_t resident = launches.template resident<kSoft, T>(tiles);
    if (resident > 0) tiles.blocks = std::min(tiles.tiles, resident);
    tiles.one_launch = one_launch = resident > 0;
  }
  const bool held = registers.use || tiles.use;  // by one block
  const int64_t held_blocks = registers.use ? registers.blocks : tiles.blocks;
  const ClusterPlan clusters =
      held ? ClusterPlan{}
           : cluster_plan(shape, device, [&](const ClusterPlan& plan) { return launches.template clusters<kSoft, T>(plan); });
  const bool sliced = !held && !clusters.use && shape.units > 0;
  const SlicePlan slices = sliced ? slice_plan(shape, device) : SlicePlan{};
  const int64_t positions = slices.units * shape.positions;

  LossWork<A> work{};
  if (mean)
    work.denominator_blocks = one_launch ? held_blocks : std::min<int64_t>(kDenominatorBlocks, divide_up(a.positions(), kPlainThreads));
  const auto cut = [&](char* base) {
    Cutter memory{base};
    work.denominators = memory.take<double>(work.denominator_blocks);
    work.finished = memory.take<unsigned>(1);
    work.loss_blocks = held           ? held_blocks
                       : clusters.use ? clusters.blocks / clusters.ranks
                       : sliced       ? divide_up(shape.units, slices.units) * slices.unit_blocks
                                      : 0;
    work.losses = total ? memory.take<double>(work.loss_blocks) : nullptr;
    work.max = memory.take<A>(a.S * positions);
    work.sum = memory.take<A>(a.S * positions);
    work.u = memory.take<A>(shape.positions == 1 ? 0 : a.S * positions);
    work.c = memory.take<A>(positions);
    work.parts = slices.parts, work.part_classes = slices.classes;
    work.part_sums = memory.take<A>(slices.parts > 1 ? 4 * a.S * positions * slices.parts : 0);
    return memory.used;
  };
  cut(allocate(cut(nullptr)));

  if (mean && !one_launch) launches.denominator(a, work);
  if (registers.use) {
    if constexpr (!kSoft && sizeof(T) <= 4) launches.registers(a, work, registers);
  } else if (tiles.use) {
    launches.template tile<kSoft>(a, work, tiles);
  }
  if (clusters.use) launches.template cluster<kSoft>(a, work, clusters);
  else if (sliced) run_slices<kSoft>(a, work, slices, launches);
  if (total && !one_launch) launches.total(a, work);
}

template <class T, class A, class Allocate, class Launches>
void run_loss(LossArguments<T, A> a, const DeviceLimits& device, const Allocate& allocate, const Launches& launches) {
  if (a.alpha > 0) a.alpha = std::max(a.alpha, kLeastAlpha<A>);
  if (a.probabilities != nullptr || a.smoothing > A(0)) run_loss_as<true>(a, device, allocate, launches);
  else run_loss_as<false>(a, device, allocate, launches);
}

}  // namespace iwsgd
