// Units by slices: the statistics of each row, the weights of each unit, and the gradient, each by a kernel that reads the logits of a
// slice again. For units that fit neither into registers nor into shared memory, of several positions, or of long rows.
#pragma once
#include "iw_cross_entropy_kernels.cuh"

namespace iwsgd {

constexpr int kSliceLoads = 4;  // 16-byte accesses of a thread in flight, to hide memory's latency

template <class T, class A>
struct Slice {
  int64_t each, first, positions, rows;  // positions of a unit; the slice's first position; its positions and rows
  IWSGD_HD Slice(const LossArguments<T, A>& a, const LossWork<A>& work)
      : each(a.per_position ? 1 : a.positions_each), first(work.first_unit * each), positions(work.units * each), rows(a.S * positions) {}
};

// The classes of part `part` of a row.
template <class A>
struct Part {
  int first, classes;
  IWSGD_HD Part(const LossWork<A>& work, int64_t C, int64_t part)
      : first(static_cast<int>(part * work.part_classes)),
        classes(static_cast<int>(C - first < work.part_classes ? C - first : work.part_classes)) {}
};

// Writes the log-likelihood of the slice's position i under sample s, or its part of it, from its row's statistics.
template <bool kSoft, class T, class A>
IWSGD_HD void finish_row(const LossArguments<T, A>& a, const LossWork<A>& work, const Slice<T, A>& slice, int64_t s, int64_t i,
                         const RowTarget<A>& target, const RowSum<A>& row) {
  const int64_t r = s * slice.positions + i, p = slice.first + i;
  A u = A(0), c = A(0);
  if (!target.ignored) row_likelihood<kSoft>(target, row, target.logit(a.row(s, p), a.class_stride), u, c);
  work.max[r] = row.max, work.sum[r] = row.sum;
  if (slice.each == 1) a.log_p[s * a.units() + p] = unit_log_likelihood(u, c);
  else work.u[r] = u;
  if (s == 0) work.c[i] = c;
}

template <bool kSoft, class T, class A, class Block>
IWSGD_HD void loss_statistics(const Block& block, const LossArguments<T, A>& a, const LossWork<A>& work, int lanes) {
  const Slice<T, A> slice(a, work);
  const int lane = block.thread() % lanes, teams = block.threads() / lanes;
  for (int64_t at = block.index() * teams; at < slice.rows * work.parts; at += block.blocks() * teams) {
    const int64_t q = at + block.thread() / lanes, r = work.parts == 1 ? q : q / work.parts;
    const int64_t s = r / slice.positions, i = r - s * slice.positions, p = slice.first + i;
    const bool there = r < slice.rows;
    RowTarget<A> target{};
    RowSum<A> row;
    if (there) {
      target = row_target<true>(a, p);
      const Part<A> part(work, a.C, q - r * work.parts);
      if (!target.ignored)
        row = row_sum<kSoft, kSliceLoads, T, A>(target.from(part.first), a.row(s, p) + part.first * a.class_stride, a.class_stride,
                                                part.classes, lane, lanes);
    }
    row = team_merge<kSoft>(block, row, lanes, reinterpret_cast<A*>(block.shared()));
    if (!there || lane != 0) continue;
    if (work.parts == 1) {
      finish_row<kSoft>(a, work, slice, s, i, target, row);
    } else {
      const A its[] = {row.max, row.sum, row.weighted, row.alone};
      IWSGD_UNROLL
      for (int k = 0; k < 4; k += kVector<A>)
        store<A, kVector<A>>(work.part_sums + 4 * q + k, gathered<A, kVector<A>>([&](int j) { return its[k + j]; }));
    }
  }
}

// The same for rows in parts, a thread for each row.
template <bool kSoft, class T, class A, class Block>
IWSGD_HD void loss_parts(const Block& block, const LossArguments<T, A>& a, const LossWork<A>& work) {
  const Slice<T, A> slice(a, work);
  for (int64_t r = block.index() * block.threads() + block.thread(); r < slice.rows; r += block.blocks() * block.threads()) {
    const int64_t s = r / slice.positions, i = r - s * slice.positions;
    RowSum<A> row;
    const A* its = work.part_sums + 4 * r * work.parts;
    for (int64_t q = 0; q < work.parts; ++q, its += 4) {
      RowSum<A> part;
      part.max = its[0], part.sum = its[1], part.weighted = its[2], part.alone = its[3];
      row.template merge<kSoft>(part);
    }
    finish_row<kSoft>(a, work, slice, s, i, row_target<false>(a, slice.first + i), row);
  }
}

// The weights of units of one position.
template <class T, class A, class Block>
IWSGD_HD void loss_weights(const Block& block, const LossArguments<T, A>& a, const LossWork<A>& work, int lanes) {
  const Slice<T, A> slice(a, work);
  double* scratch = reinterpret_cast<double*>(block.shared());
  double* scale = scratch + kScratchBytes / 8 - 1;
  find_scale(block, a, work, scratch, scale);
  block.sync();
  const int lane = block.thread() % lanes, teams = block.threads() / lanes;
  const int64_t units = a.units();
  double loss = 0;
  for (int64_t at = block.index() * teams; at < work.units; at += block.blocks() * teams) {
    const int64_t i = at + block.thread() / lanes, unit = work.first_unit + i;
    const bool there = i < work.units;
    const A bound = weigh_unit(
        block, static_cast<A>(a.alpha), static_cast<int>(a.S), lane, lanes, there, [&](int s) { return a.log_p[s * units + unit]; },
        [&](int s, A w) { a.weights[s * units + unit] = w; });
    const A squares = unit_squares(block, a, unit, lane, lanes, there, [&](int s) {
      return log_sum_exp(work.max[s * slice.positions + i], work.sum[s * slice.positions + i]);
    });
    if (there && lane == 0) loss += finish_unit(a, unit, bound, work.c[i], squares, *scale);
  }
  if (work.losses == nullptr) return;
  loss = block_sum(block, loss, scratch);
  if (block.thread() == 0) work.losses[block.index()] = loss;
}

// The weights of examples whose positions share them; a block adds up one example after the other.
template <class T, class A, class Block>
IWSGD_HD void loss_join(const Block& block, const LossArguments<T, A>& a, const LossWork<A>& work) {
  const Slice<T, A> slice(a, work);
  double* scratch = reinterpret_cast<double*>(block.shared());
  double* scale = scratch + kScratchBytes / 8 - 1;
  double* shared_outer = scale - 1;
  find_scale(block, a, work, scratch, scale);
  double loss = 0;
  for (int64_t i = block.index(); i < work.units; i += block.blocks()) {
    const int64_t unit = work.first_unit + i, from = i * slice.each;
    double c = 0, size = 0, counted = 0;  // size: the sum of |c|
    for (int64_t t = block.thread(); t < slice.each; t += block.threads()) {
      c += work.c[from + t];
      size += std::fabs(work.c[from + t]);
      counted += a.ignored(slice.first + from + t) ? 0 : 1;
    }
    c = block_sum(block, c, scratch);
    size = block_sum(block, size, scratch);
    counted = block_sum(block, counted, scratch);
    if (block.thread() == 0) {
      *shared_outer = counted > 0 ? c / counted : 0.0;
      const bool one_sign = std::fabs(c) == size || c != c;
      assert((one_sign || a.S == 1 || a.alpha == 0) && "weights: expected positions of one sign in each example at level 'example'");
    }
    for (int64_t s = 0; s < a.S; ++s) {
      const A* u = work.u + s * slice.positions + from;
      double l = 0;
      IWSGD_UNROLL_BY(8)
      for (int64_t t = block.thread(); t < slice.each; t += block.threads()) l += u[t];
      l = block_sum(block, l, scratch);
      if (block.thread() == 0) a.log_p[s * a.B + unit] = static_cast<A>(unit_log_likelihood<double>(l, *shared_outer));
    }
    double squares = 0;  // of |m| lse^2
    if (a.lse_square_scale != A(0)) {
      for (int64_t t = block.thread(); t < slice.each; t += block.threads()) {
        if (a.ignored(slice.first + from + t)) continue;
        double its = 0;
        for (int64_t s = 0; s < a.S; ++s) {
          const A lse = log_sum_exp(work.max[s * slice.positions + from + t], work.sum[s * slice.positions + from + t]);
          its += static_cast<double>(lse) * lse;
        }
        squares += std::fabs(a.position_weight_of(slice.first + from + t)) * its;
      }
      squares = block_sum(block, squares, scratch);
    }
    block.sync();
    if (block.thread() < 32) {
      const A bound = weigh_unit(
          block, static_cast<A>(a.alpha), static_cast<int>(a.S), block.thread(), 32, true, [&](int s) { return a.log_p[s * a.B + unit]; },
          [&](int s, A w) { a.weights[s * a.B + unit] = w; });
      if (block.thread() == 0) loss += finish_unit(a, unit, bound, static_cast<A>(*shared_outer), static_cast<A>(squares), *scale);
    }
  }
  if (work.losses != nullptr && block.thread() == 0) work.losses[block.index()] = loss;
}

template <bool kSoft, class T, class A, class Block>
IWSGD_HD void loss_gradient(const Block& block, const LossArguments<T, A>& a, const LossWork<A>& work, int lanes) {
  const Slice<T, A> slice(a, work);
  double* scratch = reinterpret_cast<double*>(block.shared());
  double* scale = scratch + kScratchBytes / 8 - 1;
  find_scale(block, a, work, scratch, scale);
  block.sync();
  const int lane = block.thread() % lanes, teams = block.threads() / lanes;
  for (int64_t q = block.index() * teams + block.thread() / lanes; q < slice.rows * work.parts; q += block.blocks() * teams) {
    const int64_t r = work.parts == 1 ? q : q / work.parts, s = r / slice.positions, i = r - s * slice.positions, p = slice.first + i;
    const Part<A> part(work, a.C, q - r * work.parts);
    const RowTarget<A> target = row_target<false>(a, p).from(part.first);
    const RowFactors<A> factors = row_factors(a, p, target.ignored, a.weight(s, p), *scale, work.c[i], work.max[r], work.sum[r]);
    T* const dz = a.drow(s, p) + part.first * a.dclass_stride;
    if (factors.zero) {
      zero_row(dz, a.dclass_stride, part.classes, lane, lanes);
      continue;
    }
    row_gradient<kSoft, kSliceLoads>(target, a.row(s, p) + part.first * a.class_stride, a.class_stride, dz, a.dclass_stride, part.classes,
                                     work.max[r], factors, lane, lanes);
  }
}

}  // namespace iwsgd
