// Units too large for one block: a cluster's blocks hold a range of the classes each, in shared memory, and read one another's
// statistics there. Compiles for the host too.
#pragma once
#include "iw_cross_entropy_kernels.cuh"

namespace iwsgd {

// 16-byte accesses of a thread in flight. Two take more than the 64 registers that leave room for two blocks of 512 threads on a
// multiprocessor, whose 32 warps hide the latency of shared memory with one. sm_90's code has 63 instructions for the statistics of 8
// elements of bf16 and 88 for their gradient, 19 an element: as few as a tile's.
constexpr int kClusterLoads = 1;

// What a block knows of a row: the statistics of its classes, and the logit of the label if that is one of them.
template <class A>
struct RowPart {
  RowSum<A> sum;
  A logit;
};
static_assert(sizeof(RowPart<float>) == kPartValues * sizeof(float) && sizeof(RowPart<double>) == kPartValues * sizeof(double), "");

// One unit after another by each cluster. A unit is one position here. Every block merges the parts of all, in the order of the
// ranks, and so has the same weights in every bit; the first writes them.
template <bool kSoft, class T, class A, class Block>
IWSGD_HD void loss_cluster(const Block& block, const LossArguments<T, A>& a, const LossWork<A>& work, const ClusterPlan& plan) {
  const int S = static_cast<int>(a.S), C = static_cast<int>(a.C), ranks = plan.ranks, classes = static_cast<int>(plan.classes);
  const int rank = static_cast<int>(block.index() % ranks);
  const int64_t cluster = block.index() / ranks, clusters = block.blocks() / ranks, units = a.units();
  const int from = rank * classes < C ? rank * classes : C, n = C - from < classes ? C - from : classes;
  const int lane = block.thread() % plan.lanes, team = block.thread() / plan.lanes, teams = block.threads() / plan.lanes;
  double* scratch = reinterpret_cast<double*>(block.shared());
  double* scale = scratch + kScratchBytes / 8 - 1;
  auto* parts = reinterpret_cast<RowPart<A>*>(block.shared() + kScratchBytes);  // [S]
  A* max = reinterpret_cast<A*>(parts + S);                                     // [S]
  A* sum = max + S;
  A* l = sum + S;  // then the weights
  A* c = l + S;    // []
  char* held = block.shared() + plan.rows_at;
  double loss = 0;
  find_scale(block, a, work, scratch, scale);

  for (int64_t unit = cluster; unit < units; unit += clusters) {
    const RowTarget<A> target = row_target<true>(a, unit), mine = target.from(from);
    const auto row_in_memory = [&](int s) { return a.logits + (s * a.B * a.row_stride + unit * a.lane_stride() + from); };
    const auto row_in_shared = [&](int s) {
      return reinterpret_cast<T*>(held + s * plan.row_bytes + reinterpret_cast<uintptr_t>(row_in_memory(s)) % 16);
    };
    if (!target.ignored)
      for (int s = 0; s < S; ++s) copy_in(block, row_in_shared(s), row_in_memory(s), n, block.thread(), block.threads());
    block.finish_copies();
    block.sync();

    for (int at = 0; at < S; at += teams) {
      const int s = at + team;
      RowSum<A> row;
      const T* z = row_in_shared(s < S ? s : 0);
      if (s < S && !target.ignored) row = row_sum<kSoft, kClusterLoads, T, A>(mine, z, 1, n, lane, plan.lanes);
      row = team_merge<kSoft>(block, row, plan.lanes, reinterpret_cast<A*>(scratch));
      if (s < S && lane == 0) parts[s] = {row, mine.label >= 0 && mine.label < n && !target.ignored ? widen(z[mine.label]) : A(0)};
    }
    block.sync_cluster();
    for (int s = block.thread(); s < S; s += block.threads()) {
      RowSum<A> row;
      A logit = A(0), u = A(0), its_c = A(0);
      for (int other = 0; other < ranks; ++other) {
        const RowPart<A> part = block.of_rank(parts, other)[s];
        row.template merge<kSoft>(part.sum);
        if (target.label >= 0 && target.label / classes == other) logit = part.logit;
      }
      if (!target.ignored) row_likelihood<kSoft>(target, row, logit, u, its_c);
      max[s] = row.max, sum[s] = row.sum, l[s] = unit_log_likelihood(u, its_c);
      if (s == 0) *c = its_c;
    }
    block.sync_cluster();  // nobody reads the parts any more; and max, sum, l, c are there

    if (block.thread() < 32) {
      const auto put = [&](int s, A w) {
        if (rank == 0) a.log_p[s * units + unit] = l[s], a.weights[s * units + unit] = w;
        l[s] = w;
      };
      const A bound = weigh_unit(block, static_cast<A>(a.alpha), S, block.thread(), 32, true, [&](int s) { return l[s]; }, put);
      if (rank == 0 && block.thread() == 0) loss += finish_unit(a, unit, bound, *c, *scale);
    }
    block.sync();

    for (int s = team; s < S && a.dlogits != nullptr; s += teams) {
      const A w = l[s], outside = w * static_cast<A>(*scale) * a.example_weight_of(unit);
      T* const dz = a.dlogits + (s * a.B * a.drow_stride + unit * a.dlane_stride() + from);
      if (target.ignored || w == A(0)) zero_row(dz, 1, n, lane, plan.lanes);
      else
        row_gradient<kSoft, kClusterLoads>(mine, row_in_shared(s), 1, dz, 1, n, max[s], outside * *c / sum[s], outside * target.weight,
                                           lane, plan.lanes);
    }
    block.sync();
  }
  if (work.losses != nullptr && rank == 0 && block.thread() == 0) work.losses[cluster] = loss;
}

}  // namespace iwsgd
