// Units held in registers, from one read of their logits to one write of their gradient: one or more units by a warp, or one row of
// warps, a team, for larger ones. For hard labels, whatever their weights; soft targets take tiles. Compiles for the host too.
//
// A lane holds K accesses of V elements of each of R rows, and refills each of them for the team's next units as soon as the
// gradient has been made of it: memory is busy while a warp computes, without shared memory and without a barrier of the block
// where the team is one warp.
#pragma once
#include <iterator>
#include <utility>

#include "iw_cross_entropy_kernels.cuh"

namespace iwsgd {

// Values that the lanes of a row and the threads that weigh its unit exchange.
struct alignas(16) RowSlot {
  float max;
  float factor;  // gradient = factor exp(z - max), but for the label; before the weights the sum
  float own;     // the label's gradient; before the weights exp(z - max) of its logit
  int label;     // -1: the gradient is 0
};

static_assert(sizeof(RowSlot) + 2 * sizeof(float) == kSlotBytes, "");

// A form with accesses of V elements as a type.
template <int V, int K, int R, bool kShifted>
struct FormOf {
  static constexpr int access = V, accesses = K, rows = R;
  static constexpr bool shifted = kShifted;
};

template <int V, bool kShifted, const auto& kForms, class Body, std::size_t... I>
void with_form_of(const RegisterPlan& plan, const Body& body, std::index_sequence<I...>) {
  ((plan.accesses == kForms[I].accesses ? body(FormOf<V, kForms[I].accesses, kForms[I].rows, kShifted>{}) : void()), ...);
}

// Calls body with the plan's FormOf.
template <class T, class Body>
void with_form(const RegisterPlan& plan, const Body& body) {
  constexpr auto narrow = std::make_index_sequence<std::size(kNarrowForms)>{};
  if (plan.shifted) with_form_of<kVector<T>, true, kShiftedForms>(plan, body, std::make_index_sequence<std::size(kShiftedForms)>{});
  else if (plan.access == kVector<T>)
    with_form_of<kVector<T>, false, kWideForms>(plan, body, std::make_index_sequence<std::size(kWideForms)>{});
  else if (plan.access == 1) with_form_of<1, false, kNarrowForms>(plan, body, narrow);
  else if constexpr (sizeof(T) == 2) with_form_of<2, false, kNarrowForms>(plan, body, narrow);
}

// Two elements in a register are taken apart by each use for itself: their numbers would need twice the registers.
template <class T, int V>
IWSGD_HD Elements<T, V> fresh_register(Elements<T, V> x) {
  if constexpr (kInWords<T, V>) {
    IWSGD_UNROLL
    for (int i = 0; i < V / 2; ++i) x.w[i] = fresh_register(x.w[i]);
  }
  return x;
}

// The barrier of a team.
template <class Block>
IWSGD_HD void sync_team(const Block& block, bool warp) {
  if (warp) block.sync_warp();
  else block.sync();
}

// Where a thread stands in a team. Made anew in each step, which costs less than to keep it.
struct TeamPlace {
  bool alone;  // the team is one warp
  int lane, warp;
  int groups, group;  // of lanes: this lane's row is of unit `group`
  int sub;            // the lane in its group
  int team;           // of the block
  int first_row;      // of the warp, among the rows of its team

  template <class Block>
  IWSGD_HD TeamPlace(const Block& block, const RegisterPlan& plan) : alone(plan.warps == 1) {
    const int thread = fresh_register(block.thread());
    lane = thread % kWarpLanes, warp = thread / kWarpLanes;
    groups = 1 << plan.group_bits, group = lane >> (5 - plan.group_bits), sub = lane & ((kWarpLanes >> plan.group_bits) - 1);
    team = alone ? warp : 0, first_row = alone ? 0 : warp * plan.rows;
  }
};

template <int V, int K, int R, bool kShifted, class T, class Block>
IWSGD_HD void loss_registers(const Block& block, const LossArguments<T, float>& a, const LossWork<float>& work, const RegisterPlan& plan) {
  const int S = static_cast<int>(a.S), C = static_cast<int>(a.C), lanes = kWarpLanes >> plan.group_bits;
  const int accesses = kShifted ? (C + V - 2) / V + 1 : C / V;          // a shifted row begins up to V - 1 elements behind its first access
  const int apart = fills_warp(V * sizeof(T), K) ? kWarpLanes : lanes;  // from one access of a lane to its next
  const int64_t units = a.units();
  double* scratch = reinterpret_cast<double*>(block.shared());
  double* scale = scratch + kScratchBytes / 8 - 1;
  // The slots of the team's rows, row r of group g at r * groups + g, and their log-likelihoods.
  const auto slots = [&](const TeamPlace& at) {
    return reinterpret_cast<RowSlot*>(block.shared() + kScratchBytes) + at.team * R * at.groups;  // a team of several warps is the first
  };
  const auto likelihoods = [&](const TeamPlace& at) {
    const int rows = block.threads() / kWarpLanes * R * at.groups;
    return reinterpret_cast<float*>(reinterpret_cast<RowSlot*>(block.shared() + kScratchBytes) + rows) + at.team * R * at.groups;
  };
  const auto outer = [&](const TeamPlace& at) { return likelihoods(at) + block.threads() / kWarpLanes * R * at.groups; };  // c
  double loss = 0;

  Elements<T, V> x[R][K];
  IWSGD_UNROLL
  for (int r = 0; r < R; ++r) {
    IWSGD_UNROLL
    for (int k = 0; k < K; ++k) x[r][k] = filled<T, V>(-infinity<float>());  // what is beyond the row stays so
  }
  // Calls body(r, distance, offset, doffset) for each of the warp's rows: of the unit `distance` behind the group's first, that far from
  // sample 0 of the latter in the logits and in their gradient.
  const auto for_rows = [&](const TeamPlace& at, const auto& body) {
    const int rows = at.alone ? S * plan.places : S - at.first_row;
    int64_t offset = at.first_row * plan.logits.sample + at.sub * V, doffset = at.first_row * plan.gradient.sample + at.sub * V;
    int distance = 0;
    IWSGD_UNROLL
    for (int r = 0; r < R; ++r) {
      if (r < rows) body(r, distance, offset, doffset);
      offset += plan.logits.sample, doffset += plan.gradient.sample;
      if (plan.last_samples >> r & 1u) {  // seldom: fresh_register makes it a branch, where the compiler would add zeros to each row
        offset = fresh_register(offset + plan.logits.place), doffset += plan.gradient.place, distance += at.groups;
      }
    }
  };
  // Calls whole(k, first) for the accesses of a lane in a row, and some(k, first) for those that reach beyond its ends: of classes from
  // first on, which may be negative, or all beyond C. from: where the lane's first access would be if the row began with one.
  const auto for_accesses = [&](const TeamPlace& at, const T* from, const auto& whole, const auto& some) {
    if constexpr (kShifted) {
      const int first = at.sub * V - static_cast<int>(reinterpret_cast<uintptr_t>(from) % 16 / sizeof(T));
      IWSGD_UNROLL
      for (int k = 0; k < K; ++k) {
        const int c = first + k * kWarpLanes * V;
        if (k > 0 && k * kWarpLanes >= accesses) break;
        if (c >= 0 && c <= C - V) whole(k, c);
        else some(k, c);
      }
    } else {
      const int step = fills_warp(V * sizeof(T), K) ? kWarpLanes : fresh_register(apart);  // lest K multiples of it are kept
      IWSGD_UNROLL
      for (int k = 0; k < K; ++k)
        if (accesses - at.sub > k * step) whole(k, k * step * V);
    }
  };
  const auto read = [&](int r, const TeamPlace& at, const T* from) {
    const T* const row = kShifted ? from - at.sub * V : from;
    for_accesses(
        at, from, [&](int k, int c) { x[r][k] = load<T, V>(row + c); },
        [&](int k, int c) {
          const auto there = [&](int j) { return static_cast<unsigned>(c + j) < static_cast<unsigned>(C); };
          x[r][k] = gathered<T, V>([&](int j) { return there(j) ? row[c + j] : narrow<T>(-infinity<float>()); });
        });
  };
  // Calls body(i, s, unit) for the rows of the warp that are there, a thread each: slot i of its team.
  const auto for_slots = [&](const TeamPlace& at, int64_t first, const auto& body) {
    IWSGD_UNROLL_BY(1)
    for (int i = at.first_row * at.groups + at.lane; i < (at.first_row + R) * at.groups; i += kWarpLanes) {
      const int row = i >> plan.group_bits, place = row * plan.inverse_samples >> 16, s = row - place * S;
      const int64_t unit = first + place * at.groups + (i & (at.groups - 1));
      if (place < plan.places && unit < units) body(i, s, unit);
    }
  };

  int64_t first;  // of the team's units
  {
    const TeamPlace at(block, plan);
    first = (block.index() * (at.alone ? block.threads() / kWarpLanes : 1) + at.team) * (at.groups * plan.places);
    const T* const from = a.logits + (first + at.group) * plan.logits.unit;
    for_rows(at, [&](int r, int distance, int64_t offset, int64_t) {
      if (first + at.group + distance < units) read(r, at, from + offset);
    });
  }
  if (plan.one_launch) {  // NOTE [One launch]; the first rows are on their way meanwhile
    if (work.denominator_blocks > 0) loss_denominator(block, a, work);
    if (block.index() == 0 && block.thread() == 0) *work.finished = 0;
    block.wait_grid(block.arrive_grid());
  }
  find_scale(block, a, work, scratch, scale);
  block.sync();

  for (; first < units; first += plan.stride) {
    // Statistics: in all lanes of a row, and in its slot.
    float max[R], sum[R];
    IWSGD_UNROLL
    for (int r = 0; r < R; ++r) {
      max[r] = -infinity<float>();
      IWSGD_UNROLL
      for (int k = 0; k < K; ++k) {
        if (k > 0 && k * apart >= accesses) break;
        float part = element(x[r][k], 0);
        IWSGD_UNROLL
        for (int j = 1; j < V; ++j) part = larger(part, element(x[r][k], j));
        max[r] = larger(max[r], part);
      }
    }
    for (int bits = 1; bits < lanes; bits *= 2) {
      IWSGD_UNROLL
      for (int r = 0; r < R; ++r) max[r] = larger(max[r], block.swap(max[r], bits));
    }
    IWSGD_UNROLL
    for (int r = 0; r < R; ++r) {
      const float reference = max[r] == -infinity<float>() ? 0.f : max[r];
      sum[r] = 0.f;
      IWSGD_UNROLL
      for (int k = 0; k < K; ++k) {
        if (k > 0 && k * apart >= accesses) break;
        const Elements<T, V> z = fresh_register(x[r][k]);
        float part = exponential(element(z, 0) - reference);
        IWSGD_UNROLL
        for (int j = 1; j < V; ++j) part += exponential(element(z, j) - reference);
        sum[r] += part;
      }
    }
    for (int bits = 1; bits < lanes; bits *= 2) {
      IWSGD_UNROLL
      for (int r = 0; r < R; ++r) sum[r] += block.swap(sum[r], bits);
    }
    {
      const TeamPlace at(block, plan);
      RowSlot* slot = slots(at) + (at.first_row * at.groups + at.group);
      if (at.sub == 0) {
        IWSGD_UNROLL
        for (int r = 0; r < R; ++r, slot += at.groups) slot->max = max[r], slot->factor = sum[r];
      }
    }
    block.sync_warp();

    {  // Log-likelihoods, and what the label adds.
      const TeamPlace at(block, plan);
      for_slots(at, first, [&](int i, int s, int64_t unit) {
        RowSlot& slot = slots(at)[i];
        const RowTarget<float> target = row_target<true>(a, unit);
        RowSum<float> its;
        its.max = slot.max, its.sum = slot.factor;
        float u = 0.f, c = 0.f, z = 0.f;
        if (!target.ignored) {
          z = target.logit(a.logits + (s * plan.logits.sample + unit * plan.logits.unit), 1);
          row_likelihood<false>(target, its, z, u, c);
        }
        slot.own = exponential(z - its.max), slot.label = target.ignored ? -1 : target.label;
        likelihoods(at)[i] = unit_log_likelihood(u, c), outer(at)[i] = c;
      });
    }
    sync_team(block, plan.warps == 1);

    {  // Weights: some threads for each unit of the team.
      const TeamPlace at(block, plan);
      const int threads = plan.warps * kWarpLanes, thread = at.alone ? at.lane : block.thread();
      const int weigh_lanes = 1 << plan.weigh_bits, weigh_lane = thread & (weigh_lanes - 1);
      IWSGD_UNROLL_BY(1)
      for (int begin = 0; begin < at.groups * plan.places; begin += threads >> plan.weigh_bits) {
        const int j = begin + (thread >> plan.weigh_bits), row_0 = (j >> plan.group_bits) * S * at.groups + (j & (at.groups - 1));
        const int64_t unit = first + j;
        const bool there = j < at.groups * plan.places && unit < units;
        RowSlot* const its = slots(at) + row_0;  // row s at s * groups
        const float* const l = likelihoods(at) + row_0;
        const float c = there ? outer(at)[row_0] : 0.f;
        // Before put writes over the sums.
        const float squares = unit_squares(block, a, unit, weigh_lane, weigh_lanes, there,
                                           [&](int s) { return log_sum_exp(its[s * at.groups].max, its[s * at.groups].factor); });
        const auto put = [&](int s, float w) {
          RowSlot& slot = its[s * at.groups];
          a.log_p[s * units + unit] = l[s * at.groups];
          a.weights[s * units + unit] = w;
          const RowFactors<float> factors = row_factors(a, unit, slot.label < 0, w, *scale, c, slot.max, slot.factor);
          if (factors.zero) slot.label = -1;
          slot.factor = factors.factor, slot.own = factors.factor * slot.own - factors.weight * c;
        };
        const float bound =
            weigh_unit(block, static_cast<float>(a.alpha), S, weigh_lane, weigh_lanes, there, [&](int s) { return l[s * at.groups]; }, put);
        if (there && weigh_lane == 0) loss += finish_unit(a, unit, bound, c, squares, *scale);
      }
    }
    sync_team(block, plan.warps == 1);

    {  // Gradient, and the next units' logits in the place of these.
      const TeamPlace at(block, plan);
      const int64_t unit = first + at.group;
      // Computed once: the compiler would do it anew for each row. left: units from the group's first on, 0 where no gradient is wanted.
      // Of `to` and `next` the distance is held, not the address, which the compiler then no longer knew to be of global memory.
      const auto few = [](int64_t count) { return static_cast<int>(count < 1024 ? count : 1024); };
      const int left = fresh_register(a.dlogits != nullptr ? few(units - unit) : 0),
                next_left = fresh_register(few(units - unit - plan.stride));
      const T* const next = a.logits + fresh_register((unit + plan.stride) * plan.logits.unit);
      T* const to = a.dlogits + fresh_register(unit * plan.gradient.unit);
      const RowSlot* its = slots(at) + (at.first_row * at.groups + at.group);
      for_rows(at, [&](int r, int distance, int64_t offset, int64_t doffset) {
        if (distance < left) {
          const RowSlot slot = *its;
          T* const row = kShifted ? to + doffset - at.sub * V : to + doffset;
          const auto gradient = [&](int k) {
            if (slot.label < 0) return Elements<T, V>{};
            const Elements<T, V> z = fresh_register(x[r][k]);
            return scaled<T, V>([&](int j) { return slot.factor * exponential(element(z, j) - slot.max); }, 1.f);
          };
          for_accesses(
              at, to + doffset, [&](int k, int c) { store<T, V>(row + c, gradient(k)); },
              [&](int k, int c) {
                const Elements<T, V> dz = gradient(k);
                IWSGD_UNROLL
                for (int j = 0; j < V; ++j)
                  if (static_cast<unsigned>(c + j) < static_cast<unsigned>(C)) row[c + j] = element_bits(dz, j);
              });
        }
        its += at.groups;
        if (distance < next_left) read(r, at, next + offset);
      });
      block.sync_warp();  // the label's element is stored once more
      if (a.dlogits != nullptr)
        for_slots(at, first, [&](int i, int s, int64_t unit) {
          const RowSlot slot = slots(at)[i];
          if (slot.label >= 0) a.dlogits[s * plan.gradient.sample + unit * plan.gradient.unit + slot.label] = narrow<T>(slot.own);
        });
    }
    sync_team(block, plan.warps == 1);  // nobody reads the slots any more
  }
  if (work.losses == nullptr) return;
  loss = block_sum(block, loss, scratch);
  if (block.thread() == 0) work.losses[block.index()] = loss;
  if (plan.one_launch && block.last(work.finished, reinterpret_cast<int*>(scale))) loss_total(block, a, work);
}

}  // namespace iwsgd
