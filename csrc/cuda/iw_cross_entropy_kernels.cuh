// The loss kernels as functions of a block, for the device and, in tests, for the host. Every thread of a block goes through the
// same barriers and exchanges, whether it has a row or not.
#pragma once
#include "iw_cross_entropy_launch.h"
#include "iw_cross_entropy_rows.cuh"

namespace iwsgd {

// ---- reductions, always in the same order ----

// The sum over the block, in its first thread. scratch: a value for each warp.
template <class Block>
IWSGD_HD double block_sum(const Block& block, double x, double* scratch) {
  for (int bits = 1; bits < 32; bits *= 2) x += block.swap(x, bits);
  block.sync();  // whoever still reads scratch
  if (block.thread() % 32 == 0) scratch[block.thread() / 32] = x;
  block.sync();
  if (block.thread() == 0)
    for (int warp = 1; warp < block.threads() / 32; ++warp) x += scratch[warp];
  return x;
}

// The whole row, in the first of each `lanes` threads. scratch: four values for each warp.
template <bool kSoft, class A, class Block>
IWSGD_HD RowSum<A> team_merge(const Block& block, RowSum<A> row, int lanes, A* scratch) {
  const int width = lanes < 32 ? lanes : 32;
  A most = row.max;
  for (int bits = 1; bits < width; bits *= 2) most = larger(most, block.swap(most, bits));
  row.template raise<kSoft>(most);
  for (int bits = 1; bits < width; bits *= 2) {
    row.sum += block.swap(row.sum, bits);
    if (kSoft) row.weighted += block.swap(row.weighted, bits), row.alone += block.swap(row.alone, bits);
  }
  if (lanes > 32) {
    const int warp = block.thread() / 32;
    if (block.thread() % 32 == 0) {
      A* mine = scratch + 4 * warp;
      mine[0] = row.max, mine[1] = row.sum, mine[2] = row.weighted, mine[3] = row.alone;
    }
    block.sync();
    if (block.thread() % lanes == 0)
      for (int other = 1; other < lanes / 32; ++other) {
        const A* its = scratch + 4 * (warp + other);
        RowSum<A> part;
        part.max = its[0], part.sum = its[1], part.weighted = its[2], part.alone = its[3];
        row.template merge<kSoft>(part);
      }
    block.sync();
  }
  return row;
}

// 1 / (what the loss is divided by), in *scale after the next barrier. Every block adds the partial sums up for itself.
template <class T, class A, class Block>
IWSGD_HD void find_scale(const Block& block, const LossArguments<T, A>& a, const LossWork<A>& work, double* scratch, double* scale) {
  double denominator = 1;
  if (a.normalizer != nullptr) {
    denominator = static_cast<double>(*a.normalizer);
  } else if (a.reduction == Reduction::mean) {
    denominator = 0;
    bool any = false;  // part that is not 0
    for (int64_t i = block.thread(); i < work.denominator_blocks; i += block.threads()) {
      const double part = block.fresh(work.denominators + i);
      denominator += part, any |= part != 0;
    }
    denominator = block_sum(block, denominator, scratch);
    const double parts = block_sum(block, any ? 1.0 : 0.0, scratch);
    if (denominator == 0 && parts != 0) denominator = kCancelled;  // of the first thread, which has the sums
  }
  if (block.thread() == 0) *scale = reciprocal(denominator);
}

// ---- weights ----

// One unit's weights from its log-likelihoods l(s), given to put(s, w); the bound. log1p and expm1 keep it exact as alpha goes to
// 0, where it is the mean.
template <class A, class Block, class Likelihood, class Put>
IWSGD_HD A weigh_unit(const Block& block, A alpha, int S, int lane, int lanes, bool there, const Likelihood& l, const Put& put) {
  A most = -infinity<A>(), total = A(0);
  int best = S;
  if (there)
    for (int s = lane; s < S; s += lanes) {
      const A x = l(s);
      if (x > most) most = x, best = s;
      total += x;
    }
  for (int bits = 1; bits < lanes; bits *= 2) {
    const A other = block.swap(most, bits);
    const int its = block.swap(best, bits);
    if (other > most || (other == most && its < best)) most = other, best = its;
    total += block.swap(total, bits);
  }
  const A samples = static_cast<A>(S), mean = total / samples;
  const bool nan = total != total, dead = nan || most == -infinity<A>() || alpha == A(0), single = alpha == infinity<A>();
  A excess = A(0);  // sum of exp(alpha (l - most)) - 1
  if (there && !dead && !single)
    for (int s = lane; s < S; s += lanes) excess += expm1(alpha * below(l(s), most));
  for (int bits = 1; bits < lanes; bits *= 2) excess += block.swap(excess, bits);
  // Of the dead: one sample has all the weight, whatever its likelihood; its gradient is then torch's.
  const A each = nan && alpha != A(0) && S > 1 ? mean : A(1) / samples;
  if (there)
    for (int s = lane; s < S; s += lanes) {
      A w = each;
      if (single && !dead) w = s == best ? A(1) : A(0);
      else if (!dead) w = exp(alpha * below(l(s), most)) / (samples + excess);
      put(s, w);
    }
  if (dead) return mean;
  return single ? most : most + log1p(excess / samples) / alpha;
}

// The sum of |m| lse^2 over the rows of a unit of one position, from lse(s); 0 without lse_square_scale.
template <class T, class A, class Block, class Lse>
IWSGD_HD A unit_squares(const Block& block, const LossArguments<T, A>& a, int64_t position, int lane, int lanes, bool there,
                        const Lse& lse) {
  A sum = A(0);
  if (a.lse_square_scale == A(0)) return sum;
  if (there && !a.ignored(position)) {
    for (int s = lane; s < a.S; s += lanes) sum += lse(s) * lse(s);
    sum *= std::fabs(a.position_weight_of(position));
  }
  for (int bits = 1; bits < lanes; bits *= 2) sum += block.swap(sum, bits);
  return sum;
}

// Writes what one unit is to the loss, and returns it. outer: its weight, before example weight and denominator; squares: of unit_squares.
template <class T, class A>
IWSGD_HD double finish_unit(const LossArguments<T, A>& a, int64_t unit, A bound, A outer, A squares, double scale) {
  if (a.example_weight != nullptr) {
    const A example = a.example_weight[a.per_position && a.positions_each != 1 ? unit / a.positions_each : unit];
    outer *= example, squares *= std::fabs(example);
  }
  const A weight = static_cast<A>(outer * scale);
  A loss = unit_cost(weight, bound);
  if (a.lse_square_scale != A(0)) loss += a.lse_square_share() * squares * static_cast<A>(scale);
  a.bound[unit] = bound;
  a.outer[unit] = weight;
  if (a.reduction == Reduction::none) a.loss[unit] = loss;
  return loss;
}

// ---- the denominator, and the total ----

template <class T, class A, class Block>
IWSGD_HD void loss_denominator(const Block& block, const LossArguments<T, A>& a, const LossWork<A>& work) {
  double sum = 0;
  bool any = false;  // term that is not 0
  for (int64_t p = block.index() * block.threads() + block.thread(); p < a.positions(); p += block.blocks() * block.threads()) {
    const RowTarget<A> target = row_target<true>(a, p);
    if (target.ignored) continue;
    const A v = a.labels != nullptr && a.class_weight != nullptr ? a.class_weight[target.label] : A(1);
    const double d = static_cast<double>(v * target.weight) * a.example_weight_of(p);
    sum += d, any |= d != 0;
  }
  sum = block_sum(block, sum, reinterpret_cast<double*>(block.shared()));
  const double terms = block_sum(block, any ? 1.0 : 0.0, reinterpret_cast<double*>(block.shared()));
  if (block.thread() == 0) work.denominators[block.index()] = sum == 0 && terms != 0 ? kCancelled : sum;
}

template <class T, class A, class Block>
IWSGD_HD void loss_total(const Block& block, const LossArguments<T, A>& a, const LossWork<A>& work) {
  double sum = 0;
  for (int64_t i = block.thread(); i < work.loss_blocks; i += block.threads()) sum += block.fresh(work.losses + i);
  sum = block_sum(block, sum, reinterpret_cast<double*>(block.shared()));
  if (block.thread() == 0) *a.loss = static_cast<A>(sum);
}

// 16-byte accesses of a thread in flight, to hide shared memory's latency. With two, sm_90's code has 129 instructions
// for the statistics of 16 elements of bf16 (18 of them exponentials) and 166 for their gradient (16): 18.5 an element. 132
// multiprocessors at 1.7 GHz issue 28.7 T a second, enough for 1.55 T elements; memory at 4.3 TB/s brings and takes 1.07 T.
template <class T>
constexpr int kTileLoads = sizeof(T) == 8 ? 1 : 2;  // of doubles, two spill

// ---- units in shared memory ----

// n elements between memory and shared memory, which are aligned alike as far as 16-byte accesses are taken.
template <class T, class Block>
IWSGD_HD void copy_in(const Block& block, T* to, const T* from, int n, int lane, int lanes) {
  const Pieces<T> pieces(from, to, n);
  for (int i = lane; i < pieces.chunks; i += lanes) block.copy16(to + pieces.chunk(i), from + pieces.chunk(i));
  for (int i = lane; i < pieces.edges; i += lanes) to[pieces.edge(i)] = from[pieces.edge(i)];
}
template <class T>
IWSGD_HD void copy_out(T* to, const T* from, int n, int lane, int lanes) {
  constexpr int V = kVector<T>;
  const Pieces<T> pieces(from, to, n);
  for (int i = lane; i < pieces.chunks; i += lanes) store<T, V>(to + pieces.chunk(i), load<T, V>(from + pieces.chunk(i)));
  for (int i = lane; i < pieces.edges; i += lanes) to[pieces.edge(i)] = from[pieces.edge(i)];
}

// A row of a tile: its team's, which goes on to the next one without a division.
struct TileRow {
  int lane, teams, r, s, j;  // row r is of unit j under sample s

  template <class Block>
  IWSGD_HD TileRow(const Block& block, const TilePlan& plan) {
    const int thread = fresh_register(block.thread());
    lane = thread & (plan.lanes - 1), teams = block.threads() / plan.lanes;
    r = thread / plan.lanes, s = r / plan.n, j = r - s * plan.n;
  }
  IWSGD_HD void next(const TilePlan& plan) {
    r += teams, s += plan.step_samples, j += plan.step_units;
    if (j >= plan.n) j -= plan.n, ++s;
  }
};

// n units at a time, from logits to gradient. A unit is one position here.
template <bool kSoft, class T, class A, class Block>
IWSGD_HD void loss_tile(const Block& block, const LossArguments<T, A>& a, const LossWork<A>& work, const TilePlan& plan) {
  const int S = static_cast<int>(a.S), C = static_cast<int>(a.C), n = plan.n, rows = S * n;
  double* scratch = reinterpret_cast<double*>(block.shared());
  double* scale = scratch + kScratchBytes / 8 - 1;
  A* max = reinterpret_cast<A*>(block.shared() + kScratchBytes);  // [S, n]
  A* sum = max + rows;
  A* l = sum + rows;  // then the weights
  A* c = l + rows;    // [n]
  char* held = block.shared() + plan.rows_at;
  const int64_t units = a.units();
  const int64_t pitch = a.lane_stride(), dpitch = a.dlane_stride();
  double loss = 0;

  int64_t first = block.index() * n;  // of the tile's units
  int count = 0;
  const auto row_in_memory = [&](int s, int j) { return a.logits + (s * a.B * a.row_stride + (first + j) * pitch); };
  const auto gradient_in_memory = [&](int s, int j) { return a.dlogits + (s * a.B * a.drow_stride + (first + j) * dpitch); };
  const auto row_in_shared = [&](int s, int j) {
    const auto shift = reinterpret_cast<uintptr_t>(row_in_memory(s, plan.segments ? 0 : j)) % 16;
    return reinterpret_cast<T*>(held + s * plan.segment_bytes + j * plan.row_bytes + shift);
  };
  const auto fetch = [&] {
    count = static_cast<int>(units - first < n ? units - first : n);
    if (plan.segments) {
      for (int s = 0; s < S; ++s) copy_in(block, row_in_shared(s, 0), row_in_memory(s, 0), count * C, block.thread(), block.threads());
    } else {
      for (TileRow row(block, plan); row.r < rows; row.next(plan))
        if (row.j < count) copy_in(block, row_in_shared(row.s, row.j), row_in_memory(row.s, row.j), C, row.lane, plan.lanes);
    }
  };

  // NOTE [One launch] Where all blocks are on the GPU at once, they share the sum of d and leave it behind a barrier of the grid:
  // they arrive while their first tile is on its way, and wait when its statistics, which do not need it, are done. Three launches
  // (denominator, tiles, total) cost 4 to 6 us more; 131072 examples of 10 classes and 8 samples take 10 us in bf16. Had every block
  // read all targets for itself, it would be 1 MB for each of 500 blocks there, 50 us of the second level cache.
  fetch();
  unsigned arrival = 0;
  if (plan.one_launch) {
    if (work.denominator_blocks > 0) loss_denominator(block, a, work);
    if (block.index() == 0 && block.thread() == 0) *work.finished = 0;
    arrival = block.arrive_grid();
  } else {
    find_scale(block, a, work, scratch, scale);
  }

  for (int64_t tile = block.index(); tile < plan.tiles; tile += block.blocks()) {
    if (tile != block.index()) {
      first = tile * n;
      fetch();
    }
    block.finish_copies();
    block.sync();

    TileRow row(block, plan);
    for (int at = 0; at < rows; at += row.teams, row.next(plan)) {
      const bool there = row.r < rows && row.j < count;
      RowTarget<A> target{};
      if (there) target = row_target<true>(a, first + row.j);
      RowSum<A> part;
      const T* z = row_in_shared(there ? row.s : 0, there ? row.j : 0);
      if (there && !target.ignored) part = row_sum<kSoft, kTileLoads<T>, T, A>(target, z, 1, C, row.lane, plan.lanes);
      part = team_merge<kSoft>(block, part, plan.lanes, reinterpret_cast<A*>(scratch));
      if (there && row.lane == 0) {
        A u = A(0), its_c = A(0);
        if (!target.ignored) row_likelihood<kSoft>(target, part, target.logit(z, 1), u, its_c);
        max[row.r] = part.max, sum[row.r] = part.sum, l[row.r] = unit_log_likelihood(u, its_c);
        if (row.s == 0) c[row.j] = its_c;
      }
    }
    if (plan.one_launch && tile == block.index()) {
      block.wait_grid(arrival);
      find_scale(block, a, work, scratch, scale);
    }
    block.sync();

    const int weigh_lane = block.thread() % plan.weigh_lanes, weigh_teams = block.threads() / plan.weigh_lanes;
    for (int at = 0; at < n; at += weigh_teams) {
      const int j = at + block.thread() / plan.weigh_lanes;
      const int64_t unit = first + j;
      const auto likelihood = [&](int s) { return l[s * n + j]; };
      const auto put = [&](int s, A w) {
        a.log_p[s * units + unit] = l[s * n + j];
        a.weights[s * units + unit] = w;
        l[s * n + j] = w;
      };
      const auto lse = [&](int s) { return log_sum_exp(max[s * n + j], sum[s * n + j]); };
      const A bound = weigh_unit(block, static_cast<A>(a.alpha), S, weigh_lane, plan.weigh_lanes, j < count, likelihood, put);
      const A squares = unit_squares(block, a, unit, weigh_lane, plan.weigh_lanes, j < count, lse);
      if (j < count && weigh_lane == 0) loss += finish_unit(a, unit, bound, c[j], squares, *scale);
    }
    block.sync();

    if (a.dlogits != nullptr) {
      const auto gradients = [&](auto space, const auto& gradient_at) {
        constexpr Space kSpace = decltype(space)::value;
        for (TileRow row(block, plan); row.r < rows; row.next(plan)) {
          if (row.j >= count) continue;
          const RowTarget<A> target = row_target<false>(a, first + row.j);
          const RowFactors<A> factors = row_factors(a, first + row.j, target.ignored, l[row.r], *scale, c[row.j], max[row.r], sum[row.r]);
          T* const dz = gradient_at(row.s, row.j);
          if (factors.zero) {
            zero_row<kSpace>(dz, 1, C, row.lane, plan.lanes);
            continue;
          }
          row_gradient<kSoft, kTileLoads<T>, kSpace>(target, row_in_shared(row.s, row.j), 1, dz, 1, C, max[row.r], factors, row.lane,
                                                     plan.lanes);
        }
      };
      if (plan.flat) gradients(std::integral_constant<Space, Space::shared>{}, row_in_shared);
      else gradients(std::integral_constant<Space, Space::global>{}, gradient_in_memory);
      if (plan.flat) {
        block.sync();
        for (int s = 0; s < S; ++s) copy_out(gradient_in_memory(s, 0), row_in_shared(s, 0), count * C, block.thread(), block.threads());
      }
    }
    block.sync();
  }
  if (work.losses == nullptr) return;
  loss = block_sum(block, loss, scratch);
  if (block.thread() == 0) work.losses[block.index()] = loss;
  // The block that finishes last adds up, in the blocks' order: which one it is does not show.
  if (plan.one_launch && block.last(work.finished, reinterpret_cast<int*>(scale))) loss_total(block, a, work);
}

}  // namespace iwsgd
