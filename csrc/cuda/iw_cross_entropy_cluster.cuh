// Units too large for one block: a cluster's blocks hold a range of the classes each, in shared memory, and send one another their
// statistics. Compiles for the host too.
//
// A row lies in shared memory as in memory, from a multiple of 16 bytes on: in granules of 16 bytes, the first and the last of which may
// belong to it in part. Granule j is always the same thread's, which copies it in, reads it twice, and lets the next unit's follow as soon
// as it has made the gradient of it: the copies need no barrier, and memory is busy while the block computes.
#pragma once
#include "iw_cross_entropy_kernels.cuh"

namespace iwsgd {

// A warp's statistics of its part of a row, and the label's logit, which the warps of one rank have. In pieces of 16 bytes, of which hard
// labels need the first ones only.
template <class A>
struct alignas(16) RowPart {
  A max, sum, logit, weighted, alone;
};

struct alignas(16) Piece {
  uint32_t w[4];
};

template <class A>
IWSGD_HD constexpr int part_pieces(bool soft) {
  return static_cast<int>(part_bytes(soft, sizeof(A)) / sizeof(Piece));
}

// Where a thread stands in its block. Made anew in each step, which costs less than to keep it.
struct ClusterPlace {
  int thread, lane, team;  // the lane among those of its team, which works on one row after another
  int warp_lane, warp;

  template <class Block>
  IWSGD_HD ClusterPlace(const Block& block, const ClusterPlan& plan)
      : thread(fresh_register(block.thread())), lane(thread & (plan.lanes - 1)), team(thread / plan.lanes), warp_lane(thread % kWarpLanes),
        warp(thread / kWarpLanes) {}
};

// The granules of n classes that begin at z.
template <class T>
struct Granules {
  static constexpr int V = kVector<T>;
  int before, count;     // elements of granule 0 that are before z; granules
  int whole, whole_end;  // granules from `whole` on, and before `whole_end`, belong to z with all elements
  int last_bytes;        // of the last one, as far as z goes

  IWSGD_HD Granules(const T* z, int n) : before(static_cast<int>(reinterpret_cast<uintptr_t>(z) % 16 / sizeof(T))), whole(before > 0) {
    const int end = n > 0 ? before + n : 0;
    count = (end + V - 1) / V, whole_end = end / V;
    last_bytes = (end - (count - 1) * V) * static_cast<int>(sizeof(T));
  }
  // The first one of a lane that is not before granule `whole`.
  IWSGD_HD int begin(int lane, int lanes) const { return lane < whole ? lane + lanes : lane; }
  IWSGD_HD int bytes(int j) const { return j + 1 < count ? 16 : last_bytes; }
};

// One unit after another by each cluster. A unit is one position here. Every block merges the parts of all, in the same order, and so has
// the same weights in every bit; the first writes them.
template <bool kSoft, class T, class A, class Block>
IWSGD_HD void loss_cluster(const Block& block, const LossArguments<T, A>& a, const LossWork<A>& work, const ClusterPlan& plan) {
  constexpr int V = kVector<T>, kPieces = part_pieces<A>(kSoft);
  const int S = static_cast<int>(a.S), C = static_cast<int>(a.C), ranks = plan.ranks, classes = static_cast<int>(plan.classes);
  const int rank = static_cast<int>(block.index() % ranks);
  const int64_t cluster = block.index() / ranks, clusters = block.blocks() / ranks, units = a.units();
  const int from = rank * classes < C ? rank * classes : C, n = C - from < classes ? C - from : classes;
  const int teams = block.threads() / plan.lanes, warps = plan.lanes / kWarpLanes, parts = ranks * warps;  // of a row
  double* scratch = reinterpret_cast<double*>(block.shared());
  double* scale = scratch + kScratchBytes / 8 - 1;
  auto* arrivals = reinterpret_cast<uint64_t*>(block.shared() + kScratchBytes);  // [2], of every second unit
  auto* inbox = reinterpret_cast<Piece*>(arrivals + 2);                          // [2, S, parts, kPieces]
  A* max = reinterpret_cast<A*>(inbox + 2 * S * parts * kPieces);                // [S]
  A* sum = max + S;
  A* l = sum + S;  // then the weights
  A* c = l + S;    // []
  char* held = block.shared() + plan.rows_at;
  double* loss = scale - 1;  // of the first thread: in each thread's registers it would leave too few for the rows
  if (block.thread() == 0) *loss = 0;

  const auto row_in_memory = [&](int s, int64_t unit) { return a.logits + (s * a.B * a.row_stride + unit * a.lane_stride() + from); };
  const auto row_in_shared = [&](int s) { return reinterpret_cast<T*>(held + s * plan.row_bytes); };  // granule j at j * V
  // Of a unit: its label, 0 where there are probabilities, or kNone where there is nothing to do for it.
  constexpr int kNone = -1;
  const auto label_of = [&](int64_t unit) {
    if (unit >= units) return kNone;
    if (a.labels == nullptr) return 0;
    const int64_t label = a.labels[unit];
    assert((label == a.ignore_index || (label >= 0 && label < C)) && "target: expected class indices in [0, C) or ignore_index");
    return label == a.ignore_index ? kNone : static_cast<int>(label);
  };

  int label = label_of(cluster);
  if (label != kNone)
    for (int s = ClusterPlace(block, plan).team; s < S; s += teams) {
      const Granules<T> granules(row_in_memory(s, cluster), n);
      const T* const row = row_in_memory(s, cluster) - granules.before;
      for (int j = ClusterPlace(block, plan).lane; j < granules.count; j += plan.lanes)
        block.copy16(row_in_shared(s) + j * V, row + j * V, granules.bytes(j));
    }
  if (block.thread() == 0) block.init_arrivals(arrivals, 1), block.init_arrivals(arrivals + 1, 1);
  find_scale(block, a, work, scratch, scale);
  block.sync_cluster();  // the inboxes are open

  int turn = 0;
  for (int64_t unit = cluster; unit < units; unit += clusters, ++turn) {
    const int64_t next = unit + clusters;
    const int next_label = label_of(next);
    const RowTarget<A> target = row_target<false>(a, unit, label == kNone ? a.ignore_index : label), mine = target.from(from);
    uint64_t* const arrived = arrivals + turn % 2;
    Piece* const box = inbox + turn % 2 * (S * parts * kPieces);
    if (block.thread() == 0) block.expect_bytes(arrived, S * parts * kPieces * static_cast<int>(sizeof(Piece)));
    block.finish_copies();

    const ClusterPlace reader(block, plan);
    for (int s = reader.team; s < S; s += teams) {
      RowSum<A> row;
      RowPart<A> part{};
      if (!target.ignored) {
        const T* const z = row_in_memory(s, unit);
        if (mine.label >= 0 && mine.label < n) part.logit = widen(z[mine.label]);
        const Granules<T> granules(z, n);
        const T* const here = row_in_shared(s);
        int j = granules.begin(reader.lane, plan.lanes);
        IWSGD_UNROLL_BY(1)
        for (; j < granules.whole_end; j += plan.lanes) {
          const Elements<T, V> x = load<T, V>(here + j * V);
          A numbers[V];
          IWSGD_UNROLL
          for (int i = 0; i < V; ++i) numbers[i] = element(x, i);
          row.template add<kSoft>(numbers, [&](int i) { return mine.soft(j * V - granules.before + i); });
        }
        const auto add_part = [&](int which) {            // of a granule that the row has in part
          const int first = which * V - granules.before;  // class
          IWSGD_UNROLL_BY(1)
          for (int i = first < 0 ? 0 : first; i < first + V && i < n; ++i) {
            const A one[1] = {widen(here[granules.before + i])};
            row.template add<kSoft>(one, [&](int) { return mine.soft(i); });
          }
        };
        if (reader.lane < granules.whole) add_part(reader.lane);
        if (j < granules.count) add_part(j);
      }
      row = team_merge<kSoft, A>(block, row, kWarpLanes, nullptr);
      part.max = row.max, part.sum = row.sum, part.weighted = row.weighted, part.alone = row.alone;
      Piece pieces[sizeof part / sizeof(Piece)];
      std::memcpy(pieces, &part, sizeof part);
      block.sync_warp();  // what its lanes have read of the unit before is behind the warp's push
      Piece* const place = box + (s * parts + rank * warps + reader.lane / kWarpLanes) * kPieces;
      for (int to = reader.warp_lane; to < ranks; to += kWarpLanes) {
        IWSGD_UNROLL
        for (int i = 0; i < kPieces; ++i) block.push(pieces[i], place + i, to, arrived);
      }
    }
    block.wait_arrivals(arrived, turn / 2 % 2);

    const ClusterPlace merger(block, plan);
    for (int s = merger.warp; s < S; s += block.threads() / kWarpLanes) {
      const auto part_of = [&](int which) {
        RowPart<A> part{};
        std::memcpy(&part, box + (s * parts + which) * kPieces, kPieces * sizeof(Piece));
        return part;
      };
      RowSum<A> row;
      for (int which = merger.warp_lane; which < parts; which += kWarpLanes) {
        const RowPart<A> part = part_of(which);
        RowSum<A> its;
        its.max = part.max, its.sum = part.sum, its.weighted = part.weighted, its.alone = part.alone;
        row.template merge<kSoft>(its);
      }
      row = team_merge<kSoft, A>(block, row, kWarpLanes, nullptr);
      if (merger.warp_lane > 0) continue;
      A u = A(0), its_c = A(0);
      const A logit = target.label >= 0 && !target.ignored ? part_of(target.label / classes * warps).logit : A(0);
      if (!target.ignored) row_likelihood<kSoft>(target, row, logit, u, its_c);
      max[s] = row.max, sum[s] = row.sum, l[s] = unit_log_likelihood(u, its_c);
      if (s == 0) *c = its_c;
    }
    block.sync();

    if (block.thread() < kWarpLanes) {
      const auto put = [&](int s, A w) {
        if (rank == 0) a.log_p[s * units + unit] = l[s], a.weights[s * units + unit] = w;
        l[s] = w;
      };
      const A bound = weigh_unit(block, static_cast<A>(a.alpha), S, block.thread(), kWarpLanes, true, [&](int s) { return l[s]; }, put);
      const auto lse = [&](int s) { return log_sum_exp(max[s], sum[s]); };
      const A squares = unit_squares(block, a, unit, block.thread(), kWarpLanes, rank == 0, lse);
      if (rank == 0 && block.thread() == 0) *loss += finish_unit(a, unit, bound, *c, squares, *scale);
    }
    block.sync();

    const ClusterPlace writer(block, plan);
    for (int s = writer.team; s < S; s += teams) {
      const RowFactors<A> factors = row_factors(a, unit, target.ignored, l[s], *scale, *c, max[s], sum[s]);
      const RowGradient<kSoft, A> gradient(mine, max[s], factors);
      const Granules<T> granules(row_in_memory(s, unit), n), nexts(row_in_memory(s, next), n);
      const T* const next_row = row_in_memory(s, next) - nexts.before;
      T* const here = row_in_shared(s);
      T* const dz = a.dlogits + (s * a.B * a.drow_stride + unit * a.dlane_stride() + from - granules.before);
      const int next_count = next_label != kNone ? nexts.count : 0;
      // Granules of the gradient, too, unless it lies otherwise in memory.
      const bool writes = a.dlogits != nullptr && !factors.zero, alike = writes && reinterpret_cast<uintptr_t>(dz) % 16 == 0;
      if (a.dlogits != nullptr && factors.zero) zero_row(dz + granules.before, 1, n, writer.lane, plan.lanes);
      int j = granules.begin(writer.lane, plan.lanes);
      IWSGD_UNROLL_BY(1)
      for (; alike && j < granules.whole_end; j += plan.lanes) {
        store<T, V>(dz + j * V, gradient.of(j * V - granules.before, load<T, V>(here + j * V)));
        if (j + 1 < next_count) block.copy16(here + j * V, next_row + j * V);
        else if (j < next_count) block.copy16(here + j * V, next_row + j * V, nexts.last_bytes);
      }
      const auto finish = [&](int which) {  // one element at a time
        const int first = which * V - granules.before;
        if (writes) {
          IWSGD_UNROLL_BY(1)
          for (int i = first < 0 ? 0 : first; i < first + V && i < n; ++i)
            dz[granules.before + i] = gradient.of(i, here[granules.before + i]);
        }
        if (which < next_count) block.copy16(here + which * V, next_row + which * V, nexts.bytes(which));
      };
      if (writer.lane < granules.whole) finish(writer.lane);
      IWSGD_UNROLL_BY(1)
      for (; j < granules.count || j < next_count; j += plan.lanes) finish(j);
    }
    label = next_label;
  }
  // A block may end before the others: what is pushed to it has come, as it has waited for the parts of each of its units.
  if (work.losses != nullptr && rank == 0 && block.thread() == 0) work.losses[cluster] = *loss;
}

}  // namespace iwsgd
