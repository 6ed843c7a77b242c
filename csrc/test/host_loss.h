// One call of the CUDA loss, run on the host by host_block.h with the launches that a GPU would get. Results are compared with a loop in
// long double, and between several orders of the threads, bit for bit; NaN stands between the rows and in all fresh memory.
#pragma once
#include <limits>
#include <utility>
#include <vector>

#include "../cuda/iw_cross_entropy_cluster.cuh"
#include "../cuda/iw_cross_entropy_registers.cuh"
#include "../cuda/iw_cross_entropy_slices.cuh"
#include "check.h"
#include "host_block.h"

using namespace iwsgd;

// A few cases of two types, until the first that fails: tools/plant_faults.py runs it for one fault after the other.
#if defined(IWSGD_FEW_CASES)
constexpr bool kFewCases = true;
#else
constexpr bool kFewCases = false;
#endif

// What ran, over all cases.
struct Counts {
  int registers = 0, tiles = 0, together = 0, clusters = 0, slices = 0, parts = 0, others = 0;
};

template <class T>
struct HostLaunches {
  using A = acc_t<T>;
  using Arguments = LossArguments<T, A>;
  using Work = LossWork<A>;
  Threads* threads;
  Counts* counts;
  int64_t resident_blocks, resident_clusters;  // what the device says of itself

  template <class Body>
  void launch(int64_t blocks, int together, int count, int64_t shared, const Body& body) const {
    CHECK(blocks > 0 && blocks < int64_t(1) << 31 && count % 32 == 0 && count <= 1024, "grid of ", blocks, " blocks of ", count);
    launch_on_host(*threads, blocks, together, count, shared, body,
                   [](int64_t at) { CHECK(false, "written ", at, " bytes behind shared memory"); });
  }
  template <class Body>
  void launch(int64_t blocks, int count, int64_t shared, const Body& body) const {
    launch(blocks, 1, count, shared, body);
  }
  template <class>
  int64_t resident(const RegisterPlan&) const {
    return resident_blocks;
  }
  template <bool, class>
  int64_t resident(const TilePlan&) const {
    return resident_blocks;
  }
  template <bool, class>
  int64_t clusters(const ClusterPlan& plan) const {
    return plan.ranks > 8 ? resident_clusters / 2 : resident_clusters;
  }
  void denominator(const Arguments& a, const Work& work) const {
    ++counts->others;
    launch(work.denominator_blocks, kPlainThreads, kScratchBytes, [&](const HostBlock& block) { loss_denominator(block, a, work); });
  }
  void registers(const Arguments& a, const Work& work, const RegisterPlan& plan) const {
    ++counts->registers, counts->together += plan.one_launch;
    CHECK(!plan.one_launch || plan.blocks <= resident_blocks, "more blocks than are there at once: ", plan.blocks);
    with_form<T>(plan, [&](auto form) {
      using Form = decltype(form);
      launch(
          plan.blocks, plan.one_launch ? static_cast<int>(plan.blocks) : 1, plan.threads, plan.shared_bytes,
          [&](const HostBlock& block) { loss_registers<Form::access, Form::accesses, Form::rows, Form::shifted>(block, a, work, plan); });
    });
  }
  template <bool kSoft>
  void tile(const Arguments& a, const Work& work, const TilePlan& plan) const {
    ++counts->tiles, counts->together += plan.one_launch;
    CHECK(!plan.one_launch || plan.blocks <= resident_blocks, "more blocks than are there at once: ", plan.blocks);
    launch(plan.blocks, plan.one_launch ? static_cast<int>(plan.blocks) : 1, plan.threads, plan.shared_bytes,
           [&](const HostBlock& block) { loss_tile<kSoft>(block, a, work, plan); });
  }
  template <bool kSoft>
  void cluster(const Arguments& a, const Work& work, const ClusterPlan& plan) const {
    ++counts->clusters;
    CHECK(plan.blocks % plan.ranks == 0, "clusters of ", plan.ranks, " among ", plan.blocks);
    launch(plan.blocks, plan.ranks, plan.threads, plan.shared_bytes,
           [&](const HostBlock& block) { loss_cluster<kSoft>(block, a, work, plan); });
  }
  template <bool kSoft>
  void statistics(const Arguments& a, const Work& work, const SlicePlan& plan) const {
    ++counts->slices, counts->parts += plan.parts > 1;
    launch(plan.row_blocks, kPlainThreads, kScratchBytes,
           [&](const HostBlock& block) { loss_statistics<kSoft>(block, a, work, plan.lanes); });
  }
  template <bool kSoft>
  void parts(const Arguments& a, const Work& work, const SlicePlan& plan) const {
    launch(plan.part_blocks, kPlainThreads, kScratchBytes, [&](const HostBlock& block) { loss_parts<kSoft>(block, a, work); });
  }
  void weights(const Arguments& a, const Work& work, const SlicePlan& plan) const {
    launch(plan.unit_blocks, kPlainThreads, kScratchBytes, [&](const HostBlock& block) { loss_weights(block, a, work, plan.weigh_lanes); });
  }
  void join(const Arguments& a, const Work& work, const SlicePlan& plan) const {
    launch(plan.unit_blocks, kJoinThreads, kScratchBytes, [&](const HostBlock& block) { loss_join(block, a, work); });
  }
  template <bool kSoft>
  void gradient(const Arguments& a, const Work& work, const SlicePlan& plan) const {
    launch(plan.row_blocks, kPlainThreads, kScratchBytes,
           [&](const HostBlock& block) { loss_gradient<kSoft>(block, a, work, plan.lanes); });
  }
  void total(const Arguments& a, const Work& work) const {
    ++counts->others;
    launch(1, kJoinThreads, kScratchBytes, [&](const HostBlock& block) { loss_total(block, a, work); });
  }
};

// ---- cases ----

enum Layout { kClassLast, kClassFirst, kPadded, kApart };  // kApart: every second class
enum Signs { kPositive, kNegative, kBoth };                // of class and position weights
enum Special { kOrdinary, kInfinite, kDead, kNan, kAllIgnored };

struct Case {
  int64_t S, B, C, T;
  Layout layout = kClassLast;
  int offset = 0;  // elements from alignment; one more for the gradient where `apart`
  bool apart = false, in_place = false, gradient = true, per_position = false;
  bool probabilities = false, class_weight = false, example_weight = false, position_weight = false, normalizer = false;
  double smoothing = 0, lse_square_scale = 0, alpha = 1;
  Reduction reduction = Reduction::mean;
  Special special = kOrdinary;
  Signs signs = kPositive;
  DeviceLimits device{2, 100000, 200000, 60000};
  int64_t resident_blocks = 3, resident_clusters = 2;
};

inline std::ostream& operator<<(std::ostream& out, const Case& k) {
  return out << "S " << k.S << " B " << k.B << " C " << k.C << " T " << k.T << " layout " << k.layout << " offset " << k.offset << k.apart
             << " in place " << k.in_place << " position " << k.per_position << " probabilities " << k.probabilities << " weights "
             << k.class_weight << k.example_weight << k.position_weight << k.normalizer << " smoothing " << k.smoothing << " lse "
             << k.lse_square_scale << " alpha " << k.alpha << " reduction " << static_cast<int>(k.reduction) << " special " << k.special
             << " signs " << k.signs << " shared " << k.device.shared_per_block << " ranks " << k.device.most_ranks << " resident "
             << k.resident_blocks << ' ' << k.resident_clusters << ": ";
}

template <class A>
struct Results {
  Watched<A> loss, log_p, weights, bound, outer;
  std::vector<char> dlogits;  // with what stands around them
};

struct Strides {
  int64_t row, classes, position, elements;
  Strides(const Case& k) {
    const int64_t apart = k.layout == kApart ? 2 : 1, pad = k.layout == kPadded ? 3 : 0;
    classes = k.layout == kClassFirst ? k.T : apart;
    position = k.layout == kClassFirst ? 1 : k.C * apart + pad;
    row = k.T * (k.layout == kClassFirst ? k.C : position);
    elements = k.S * k.B * row;
  }
};

template <class T>
class Problem {
 public:
  using A = acc_t<T>;
  explicit Problem(const Case& k) : k_(k), strides_(k) {
    const auto uniform = [&] { return random().word() * 0x1p-32; };
    logits.resize(strides_.elements + kAround * 2);
    const int64_t positions = k.B * k.T;
    for (T& z : logits) z = from_acc<T>(std::numeric_limits<A>::quiet_NaN());  // around the rows, and between them
    for (int64_t s = 0; s < k.S; ++s)
      for (int64_t p = 0; p < positions; ++p)
        for (int64_t i = 0; i < k.C; ++i) at(s, p, i) = from_acc<T>(static_cast<A>(6 * uniform() - 3));
    for (int64_t p = 0; p < positions; ++p) {
      const bool ignored = k.special == kAllIgnored || (k.special == kOrdinary && random().below(4) == 0);
      labels.push_back(ignored ? int64_t(-100) : random().below(static_cast<uint32_t>(k.C)));
      position_weight.push_back(static_cast<A>(random().below(5) == 0 ? 0 : uniform() + 0.5));
    }
    for (int64_t i = 0; i < positions * k.C; ++i) probabilities.push_back(static_cast<A>(uniform() * 2 / static_cast<double>(k.C)));
    for (int64_t i = 0; i < k.C; ++i) class_weight.push_back(static_cast<A>(uniform() + 0.25));
    const auto sign = [&] { return A(k.signs == kPositive || (k.signs == kBoth && random().below(2) == 0) ? 1 : -1); };
    for (A& m : position_weight) m *= sign();
    if (!k.position_weight && k.signs == kBoth && !k.probabilities)  // else terms of both signs nearly cancel
      for (A& v : class_weight) v *= k.smoothing > 0 ? A(1) : sign();
    for (int64_t b = 0; b < k.B; ++b) example_weight.push_back(static_cast<A>(uniform() + 0.25));
    normalizer = A(3.5);
    if (k.special == kOrdinary || k.special == kAllIgnored || logits.size() == 2 * kAround) return;
    for (int64_t s = 0; s < k.S; ++s)
      for (int64_t p = 0; p < positions; ++p) {
        if (k.special == kInfinite && s % 2 == 0) at(s, p, labels[p]) = from_acc<T>(-infinity<A>());
        if (k.special == kDead && p % 2 == 0) at(s, p, labels[p]) = from_acc<T>(-infinity<A>());
        if (k.special == kNan && p == positions / 2 && s == k.S - 1) at(s, p, 0) = from_acc<T>(std::numeric_limits<A>::quiet_NaN());
      }
  }

  Results<A> solve(Threads& threads, Counts* counts) {
    const int64_t units = k_.per_position ? k_.B * k_.T : k_.B;
    constexpr A kStale = A(-77);
    Results<A> r{Watched<A>(k_.reduction == Reduction::none ? units : 1, kStale),
                 Watched<A>(k_.S * units, kStale),
                 Watched<A>(k_.S * units, kStale),
                 Watched<A>(units, kStale),
                 Watched<A>(units, kStale),
                 {}};
    Watched<std::pair<double, double>> in = placed(k_.offset), out = k_.in_place ? in : placed(k_.offset + k_.apart);
    LossArguments<T, A> a{};
    a.S = k_.S, a.B = k_.B, a.C = k_.C, a.positions_each = k_.T;
    a.logits = reinterpret_cast<T*>((k_.in_place ? out : in).data()) + k_.offset + kAround;
    a.row_stride = strides_.row, a.class_stride = strides_.classes, a.position_stride = strides_.position;
    if (k_.gradient) {
      a.dlogits = reinterpret_cast<T*>(out.data()) + k_.offset + k_.apart + kAround;
      a.drow_stride = a.row_stride, a.dclass_stride = a.class_stride, a.dposition_stride = a.position_stride;
    }
    a.labels = k_.probabilities ? nullptr : labels.data();
    a.probabilities = k_.probabilities ? probabilities.data() : nullptr;
    a.ignore_index = -100;
    a.smoothing = static_cast<A>(k_.smoothing), a.lse_square_scale = static_cast<A>(k_.lse_square_scale);
    a.class_weight = k_.class_weight ? class_weight.data() : nullptr;
    a.example_weight = k_.example_weight ? example_weight.data() : nullptr;
    a.position_weight = k_.position_weight ? position_weight.data() : nullptr;
    a.normalizer = k_.normalizer ? &normalizer : nullptr;
    a.reduction = k_.reduction, a.per_position = k_.per_position, a.alpha = k_.alpha;
    a.loss = r.loss.data(), a.log_p = r.log_p.data(), a.weights = r.weights.data(), a.bound = r.bound.data(), a.outer = r.outer.data();
    Watched<std::pair<double, double>> memory;
    const auto allocate = [&](int64_t bytes) {
      memory.assign(bytes / 16 + 1, {std::nan(""), std::nan("")});
      return reinterpret_cast<char*>(memory.data());
    };
    run_loss(a, k_.device, allocate, HostLaunches<T>{&threads, counts, k_.resident_blocks, k_.resident_clusters});
    r.dlogits.resize(logits.size() * sizeof(T));
    std::memcpy(r.dlogits.data(), reinterpret_cast<T*>(out.data()) + k_.offset + (k_.in_place ? 0 : k_.apart), r.dlogits.size());
    return r;
  }

  void compare(const Results<A>& got) const;

 private:
  static constexpr int64_t kAround = 64;  // elements before and behind, which must stay as they are
  static test::Random& random() {
    static test::Random one;
    return one;
  }
  int64_t index(int64_t s, int64_t p, int64_t i) const {
    return (s * k_.B + p / k_.T) * strides_.row + p % k_.T * strides_.position + i * strides_.classes + kAround;
  }
  T& at(int64_t s, int64_t p, int64_t i) { return logits[index(s, p, i)]; }
  Watched<std::pair<double, double>> placed(int offset) const {
    Watched<std::pair<double, double>> memory((logits.size() + 16) * sizeof(T) / 16 + 2);
    std::memcpy(reinterpret_cast<T*>(memory.data()) + offset, logits.data(), logits.size() * sizeof(T));
    return memory;
  }

  Case k_;
  Strides strides_;
  std::vector<T> logits;
  std::vector<int64_t> labels;
  std::vector<A> probabilities, class_weight, example_weight, position_weight;
  A normalizer;
};

// ---- the loop ----

using Wide = long double;

inline bool near(Wide got, Wide expected, Wide relative, Wide absolute) {
  if (std::isnan(expected) || std::isinf(expected)) return std::isnan(expected) ? std::isnan(got) : got == expected;
  return std::abs(got - expected) <= relative * std::abs(expected) + absolute;
}

template <class T>
void Problem<T>::compare(const Results<A>& got) const {
  const int64_t S = k_.S, C = k_.C, P = k_.B * k_.T, each = k_.per_position ? 1 : k_.T, units = k_.per_position ? P : k_.B;
  const Wide eps = std::numeric_limits<A>::epsilon();
  std::vector<Wide> log_p(S * P * C), u(S * P), c(P), d(P), lse(S * P);
  const auto counted = [&](int64_t p) { return k_.probabilities || labels[p] != -100; };
  const auto qv = [&](int64_t p, int64_t i) {
    const A q = k_.probabilities ? probabilities[(p / k_.T * C + i) * k_.T + p % k_.T] : A(labels[p] == i);
    return ((1 - k_.smoothing) * q + k_.smoothing / static_cast<Wide>(C)) * (k_.class_weight ? class_weight[i] : 1.0) *
           (k_.position_weight ? position_weight[p] : 1.0);
  };
  Wide denominator = 0;
  for (int64_t p = 0; p < P; ++p) {
    if (!counted(p)) continue;
    d[p] = (k_.position_weight ? position_weight[p] : 1.0) * (k_.probabilities || !k_.class_weight ? 1.0 : class_weight[labels[p]]);
    denominator += d[p] * (k_.example_weight ? example_weight[p / k_.T] : 1.0);
    for (int64_t i = 0; i < C; ++i) c[p] += qv(p, i);
    for (int64_t s = 0; s < S; ++s) {
      Wide most = -std::numeric_limits<Wide>::infinity(), sum = 0;
      for (int64_t i = 0; i < C; ++i) most = std::fmax(most, Wide(to_acc(logits[index(s, p, i)])));
      for (int64_t i = 0; i < C; ++i) sum += std::exp(to_acc(logits[index(s, p, i)]) - most);
      lse[s * P + p] = most + std::log(sum);
      for (int64_t i = 0; i < C; ++i) {
        const Wide x = log_p[(s * P + p) * C + i] = to_acc(logits[index(s, p, i)]) - most - std::log(sum);
        if (k_.probabilities || k_.smoothing > 0 || labels[p] == i) u[s * P + p] += qv(p, i) * x;
      }
    }
  }
  if (k_.normalizer) denominator = normalizer;
  else if (k_.reduction != Reduction::mean) denominator = 1;
  const Wide scale = denominator == 0 ? 0 : 1 / denominator;
  Wide loss = 0, losses = 0, most_gradient = 0;  // losses: the sum of their sizes
  std::vector<Wide> gradient(logits.size());
  for (int64_t unit = 0; unit < units; ++unit) {
    Wide outer = 0, counts = 0, most = -std::numeric_limits<Wide>::infinity(), mean = 0, excess = 0;
    for (int64_t p = unit * each; p < (unit + 1) * each; ++p) outer += c[p], counts += counted(p);
    outer = counts > 0 ? outer / counts : 0;
    std::vector<Wide> l(S), w(S);
    int64_t best = 0;
    for (int64_t s = 0; s < S; ++s) {
      for (int64_t p = unit * each; p < (unit + 1) * each; ++p) l[s] += u[s * P + p];
      if (outer != 0) l[s] /= outer;
      if (l[s] > l[best]) best = s;
      most = std::fmax(most, l[s]);
      mean += l[s] / static_cast<Wide>(S);
    }
    Wide bound = mean;
    for (Wide& x : w) x = std::isnan(mean) && k_.alpha != 0 && S > 1 ? mean : 1.0 / static_cast<Wide>(S);
    if (!std::isnan(mean) && k_.alpha != 0 && !std::isinf(most)) {
      if (std::isinf(k_.alpha)) {
        for (int64_t s = 0; s < S; ++s) w[s] = s == best;
        bound = most;
      } else {
        for (int64_t s = 0; s < S; ++s) excess += std::expm1(k_.alpha * (l[s] - most));
        for (int64_t s = 0; s < S; ++s) w[s] = std::exp(k_.alpha * (l[s] - most)) / (static_cast<Wide>(S) + excess);
        bound = most + std::log1p(excess / static_cast<Wide>(S)) / k_.alpha;
      }
    }
    const Wide example = k_.example_weight ? example_weight[unit * each / std::max<int64_t>(k_.T, 1)] : 1.0;
    // Of a row, by what lse^2 comes into the loss.
    const auto strength = [&](int64_t p) {
      const Wide m = k_.position_weight ? position_weight[p] : A(1);
      return counted(p) ? static_cast<Wide>(k_.lse_square_scale) / static_cast<Wide>(S) * std::abs(example * m) * scale : 0;
    };
    Wide penalty = 0;
    for (int64_t p = unit * each; p < (unit + 1) * each; ++p)
      for (int64_t s = 0; s < S; ++s)
        if (strength(p) != 0) penalty += strength(p) * lse[s * P + p] * lse[s * P + p];
    const Wide weight = outer * example * scale, of_unit = (weight == 0 && !std::isnan(bound) ? 0 : -weight * bound) + penalty;
    Wide size = 1, whole = 0;
    for (int64_t p = unit * each; p < (unit + 1) * each; ++p) whole += std::abs(c[p]);
    for (Wide x : l) size = std::isfinite(x) ? std::max<Wide>(size, std::abs(x)) : size;
    if (outer != 0 && counts > 0) size *= std::max<Wide>(1, whole / counts / std::abs(outer));  // weights of both signs cancel in part
    for (int64_t s = 0; s < S; ++s) {
      const A its_l = got.log_p[s * units + unit], its_w = got.weights[s * units + unit];
      const Wide steep = std::isinf(k_.alpha) ? 1 : std::max(1.0, k_.alpha);
      CHECK(near(its_l, l[s], 8 * eps, 8 * eps * size), k_, "log_p ", s, " ", unit, ": ", its_l, " ", l[s]);
      CHECK(near(its_w, w[s], 64 * eps * size * steep, eps), k_, "weight ", s, " ", unit, ": ", its_w, " ", w[s]);
    }
    CHECK(near(got.bound[unit], bound, 8 * eps, 8 * eps * size), k_, "bound ", unit, ": ", got.bound[unit], " ", bound);
    CHECK(near(got.outer[unit], weight, 32 * eps, 0), k_, "outer ", unit, ": ", got.outer[unit], " ", weight);
    if (k_.reduction == Reduction::none)
      CHECK(near(got.loss[unit], of_unit, 40 * eps, 8 * eps * size * std::abs(weight) + 40 * eps * std::abs(penalty)), k_, "loss ", unit,
            ": ", got.loss[unit], " ", of_unit);
    loss += of_unit;
    losses += std::isfinite(of_unit) ? std::abs(of_unit) + 2 * std::abs(penalty) : 0;
    for (int64_t p = unit * each; p < (unit + 1) * each; ++p)
      for (int64_t s = 0; s < S; ++s)
        for (int64_t i = 0; i < C; ++i) {
          Wide g = 0;
          if (counted(p) && w[s] != 0) g = w[s] * scale * example * (c[p] * std::exp(log_p[(s * P + p) * C + i]) - qv(p, i));
          const Wide pull = 2 * strength(p) * lse[s * P + p];
          if (strength(p) != 0) g += pull * std::exp(log_p[(s * P + p) * C + i]);
          gradient[index(s, p, i)] = g;
          if (std::isfinite(g)) most_gradient = std::max(most_gradient, std::abs(w[s] * scale * example * c[p]) + std::abs(pull));
        }
  }
  if (k_.reduction != Reduction::none)
    CHECK(near(got.loss[0], loss, 64 * eps, 64 * eps * losses + 1e-300), k_, "loss ", got.loss[0], " ", loss);

  std::vector<bool> written(logits.size());
  const Wide half_unit = std::is_same_v<T, bf16> ? 0x1p-8 : std::is_same_v<T, fp16> ? 0x1p-11 : 0.0;
  const auto* dlogits = reinterpret_cast<const T*>(got.dlogits.data());
  for (int64_t p = 0; k_.gradient && p < P; ++p)
    for (int64_t s = 0; s < S; ++s)
      for (int64_t i = 0; i < C; ++i) {
        const int64_t at = index(s, p, i);
        written[at] = true;
        const Wide g = to_acc(dlogits[at]);
        CHECK(near(g, gradient[at], half_unit * 1.01 + 256 * eps, (std::is_same_v<T, fp16> ? 0x1p-24 : 0) + 128 * eps * most_gradient), k_,
              "gradient ", s, " ", p, " ", i, ": ", g, " ", gradient[at]);
        if (!counted(p)) CHECK(g == 0, k_, "gradient of an ignored row ", g);
      }
  for (std::size_t i = 0; i < logits.size(); ++i)
    if (!written[i]) CHECK(std::memcmp(dlogits + i, &logits[i], sizeof(T)) == 0, k_, "written outside the gradient, at ", i);
}

template <class X>
bool equal(const X& x, const X& y) {
  return x.size() == y.size() && (x.empty() || std::memcmp(x.data(), y.data(), x.size() * sizeof x[0]) == 0);
}

inline Counts counts;

template <class T>
void run_in_all_orders(const Case& k) {
  const int races = Races::all().found;
  Problem<T> problem(k);
  static Threads forwards(Order::forwards), backwards(Order::backwards), random(Order::random);
  const auto got = problem.solve(forwards, &counts);
  problem.compare(got);
  for (Threads* threads : {&backwards, &random}) {
    const auto again = problem.solve(*threads, &counts);
    CHECK(equal(got.loss, again.loss) && equal(got.log_p, again.log_p) && equal(got.weights, again.weights) &&
              equal(got.bound, again.bound) && equal(got.outer, again.outer) && equal(got.dlogits, again.dlogits),
          k, "the order of the threads shows in the results");
  }
  CHECK(Races::all().found == races, k, Races::all().found - races, " races");
}

template <class T>
void run(const Case& k) {
  if constexpr (kFewCases && !std::is_same_v<T, float> && !std::is_same_v<T, bf16>) {
    return;
  } else {
    run_in_all_orders<T>(k);
    if (kFewCases && test::failures > 0) std::exit(1);
  }
}

inline void run_all(const Case& k) { run<float>(k), run<bf16>(k), run<fp16>(k), run<double>(k); }
