// The CUDA noise kernels without CUDA: their launch arithmetic, and their bodies run thread by thread over the whole grid, every
// element compared with keep_group. What it cannot see: the device's own conversions and shuffles, and the launch itself.
#include "../cuda/noise_kernels.cuh"
#include "../cuda/noise_rule_kernels.cuh"

#include <cmath>
#include <string>
#include <vector>

#include "check.h"

using namespace iwsgd;

// ---- launch arithmetic ----

void dividers() {
  test::Random random;
  const auto check = [](int64_t n, int64_t d) { CHECK(Divider(d)(n) == n / d, n, " / ", d, " gives ", Divider(d)(n)); };
  constexpr int64_t kMost = INT64_MAX;
  for (int64_t d = 1; d < 300; ++d)
    for (int64_t n = 0; n < 1000; ++n) check(n, d);
  for (int trial = 0; trial < 200000; ++trial) {
    const auto d = std::max<int64_t>(1, static_cast<int64_t>(random.next() >> (1 + random.below(63))));
    const auto n = static_cast<int64_t>(random.next() >> (1 + random.below(63)));
    check(n, d);
    const int64_t multiple = n - n % d;
    check(multiple, d);
    if (multiple > 0) check(multiple - 1, d);
    check(kMost, d);
    check(kMost - kMost % d, d);
    check(kMost - kMost % d - 1, d);
  }
}

NoiseWork work_of(int64_t outer, int64_t examples, int64_t inner, int64_t samples) {
  const Call call{{outer, examples, inner, outer * inner, 1}, {nullptr, nullptr, false, 0, 0}, samples, true};
  return NoiseWork(Noise{call, Rule{1, 1.0, 0.0, 0.0, nullptr, 0}});
}

void grids() {
  for (const int64_t examples : {1, 7, 1000, 8192, 1 << 20})
    for (const int64_t inner : {1, 8, 63, 4096, 131072})
      for (const int64_t samples : {1, 2, 3, 8, 64, 1000}) {
        const NoiseWork work = work_of(1, examples, inner, samples);
        for (const bool divide : {false, true}) {
          const NoiseGrid grid = noise_grid(work, divide);
          const auto text = [&] { return std::to_string(examples) + " x " + std::to_string(inner) + ", S=" + std::to_string(samples); };
          CHECK(grid.blocks * kBlock >= work.total && (grid.blocks - 1) * kBlock < work.total, text());
          CHECK(grid.blocks <= INT32_MAX, text(), ": ", grid.blocks, " blocks");
          CHECK(grid.parts >= 1 && grid.parts <= 64, text(), ": ", grid.parts, " parts");
          CHECK(grid.parts * grid.part >= samples && (grid.parts - 1) * grid.part < samples, text(), ": no sample left, no part empty");
          if (!divide || work.total >= 1 << 18) CHECK(grid.parts == 1, text(), ": enough packs to fill a GPU");
        }
      }
  CHECK(noise_grid(work_of(1, 4, 512, 64), true).parts == 32, "few packs: the samples fill the grid");
  // the largest noise that an 141 GB card holds, and far more
  CHECK(noise_grid(work_of(1, int64_t(1) << 14, int64_t(1) << 21, 1), true).blocks == int64_t(1) << 24, "2^35 elements");
  CHECK(noise_grid(work_of(1, int64_t(1) << 20, int64_t(1) << 20, 1), true).blocks <= INT32_MAX, "2^40 elements");
  CHECK(work_of(1, 0, 8, 2).total == 0 && work_of(1, 3, 0, 2).total == 0 && work_of(0, 3, 8, 2).total == 0, "nothing to do");
}

void choices() {
  alignas(16) static const char memory[32] = {};
  const auto aligned = [](int64_t inner, int64_t bytes, int offset) {
    return rows_are_aligned({1, 1, inner, inner, 1}, bytes, {memory, memory + offset});
  };
  CHECK(aligned(8, 2, 0) && aligned(4, 4, 0) && aligned(2, 8, 16), "16-byte rows");
  CHECK(!aligned(4, 2, 0) && !aligned(1000 + 4, 2, 0) && !aligned(63, 4, 0) && !aligned(1, 8, 0), "other rows");
  CHECK(!aligned(8, 2, 2) && !aligned(8, 4, 8), "a tensor that starts off a multiple of 16 bytes");

  CHECK(packs_are_groups({1, 5, 63, 63, 1}), "elements, any length");
  CHECK(packs_are_groups({3, 5, 64, 3 * 64, 1}), "elements, examples in the second dimension");
  CHECK(packs_are_groups({1, 5, 49 * 16, 16, 1}), "channels last, whole groups");
  CHECK(!packs_are_groups({3, 5, 63, 3 * 63, 1}), "rows that begin inside a group");
  CHECK(!packs_are_groups({1, 5, 49 * 12, 12, 1}), "channels that wrap inside a group");
  CHECK(!packs_are_groups({1, 5, 64, 1, 64}) && !packs_are_groups({1, 5, 16 * 64, 16, 64}), "shared draws");
}

// A GPU's reciprocal may be one unit in the last place off, either way: what is made of it is the nearest number in any case.
void factors() {
  for (uint32_t d = 1; d <= kFieldRange; ++d) {
    const float nearest = 1.0f / static_cast<float>(d);
    for (const float from : {std::nextafter(nearest, 0.0f), nearest, std::nextafter(nearest, 2.0f)})
      CHECK(refined(from, static_cast<float>(d)) == nearest, "1 / ", d, " from ", from);
  }
  CHECK(kept_factor(1.0f, 0) == 1 && kept_factor(1.0f, 32768) == 2 && kept_factor(1.0f, 65536) == 65536, "halves, and none kept");
}

// ---- the kernels ----

enum class Ids { none, per_sample, per_example };

struct Case {
  const char* name;
  Layout layout;  // outer, examples, inner, positions, share
  int64_t samples;
  uint32_t threshold = 19661;  // p = 0.3
  Ids ids = Ids::none;
};

// Sizes on both sides of a pack (8), a warp's packs (256) and a block's (2048), and rows that end inside each.
const Case kCases[] = {
    {"one element", {1, 1, 1, 1, 1}, 1},
    {"one sample", {1, 3, 4104, 4104, 1}, 1},
    {"one sample, odd", {3, 5, 37, 3 * 37, 1}, 1},
    {"less than a group", {1, 3, 5, 5, 1}, 2},
    {"whole groups", {1, 3, 64, 64, 1}, 3},
    {"half a group left", {1, 3, 500, 500, 1}, 4},
    {"an odd row", {1, 5, 63, 63, 1}, 8},
    {"a row of more than a block", {1, 2, 4104, 4104, 1}, 5},
    {"an odd row of more than a block", {1, 2, 4099, 4099, 1}, 5},
    {"rows of one element", {1, 700, 1, 1, 1}, 3},
    {"many samples of few packs", {1, 2, 24, 24, 1}, 67},
    {"samples by number", {1, 9, 64, 64, 1}, 4, 19661, Ids::per_sample},
    {"samples by number and example", {1, 9, 64, 64, 1}, 4, 19661, Ids::per_example},
    {"samples by number and example, odd", {1, 301, 3, 3, 1}, 4, 19661, Ids::per_example},
    {"examples in the second dimension", {3, 5, 64, 3 * 64, 1}, 3},
    {"examples in the second dimension, odd", {3, 5, 37, 3 * 37, 1}, 3},
    {"examples last", {40, 5, 1, 40, 1}, 3},
    {"channels first, 8 x 8", {1, 3, 16 * 64, 16, 64}, 3},
    {"channels first, 7 x 7", {1, 3, 24 * 49, 24, 49}, 3},
    {"channels first, 3 elements each", {1, 3, 40 * 3, 40, 3}, 3},
    {"channels first, 7 x 7, odd", {1, 3, 13 * 49, 13, 49}, 3},
    {"channels last, whole groups", {1, 3, 25 * 16, 16, 1}, 3},
    {"channels last, 12", {1, 4, 26 * 12, 12, 1}, 3},
    {"channels last, 17: three groups in eight elements", {1, 3, 16 * 17, 17, 1}, 3},
    {"channels last, 3, odd", {1, 3, 25 * 3, 3, 1}, 3},
    {"channels, examples in the second dimension", {3, 5, 7 * 6, 7, 6}, 3},
    {"whole rows", {1, 300, 72, 1, 72}, 3},
    {"whole rows, odd", {1, 300, 7, 1, 7}, 3},
    {"p = 0", {1, 3, 72, 72, 1}, 3, 0},
    {"p = 1/65536", {1, 3, 72, 72, 1}, 3, 1},
    {"p = 1 - 1/65536", {1, 3, 4000, 4000, 1}, 3, 65535},
    {"p = 1/2", {1, 3, 4000, 4000, 1}, 3, 32768},
};

// n elements of guarded memory that begin `offset` elements after a 16-byte boundary.
template <class T>
class Buffer {
 public:
  Buffer(int64_t n, int64_t offset) : n_(n), offset_(offset), blocks_((n + offset + 2 * kGuard) * sizeof(T) / 16 + 1) {
    std::memset(static_cast<void*>(blocks_.data()), 0xA5, blocks_.size() * 16);
  }
  T* data() { return start() + kGuard + offset_; }
  bool guarded() {
    const auto* bytes = reinterpret_cast<const unsigned char*>(blocks_.data());
    const auto* first = reinterpret_cast<const unsigned char*>(data());
    for (const unsigned char* p = bytes; p < bytes + blocks_.size() * 16; ++p)
      if ((p < first || p >= first + n_ * sizeof(T)) && *p != 0xA5) return false;
    return true;
  }

 private:
  static constexpr int64_t kGuard = 64;
  struct alignas(16) Block {
    char bytes[16];
  };
  T* start() { return reinterpret_cast<T*>(blocks_.data()); }
  int64_t n_, offset_;
  std::vector<Block> blocks_;
};

template <class T>
bool same(T a, T b) {
  return std::memcmp(&a, &b, sizeof a) == 0;
}

template <class T, int V, bool kGroups>
class Trial {
 public:
  Trial(const Case& c, int64_t offset, test::Random& random) : c_(c), offset_(offset), random_(random) {
    origin_[0] = static_cast<int64_t>(random.next());
    origin_[1] = random.below(1000);
    origin_[2] = random.word();
    for (int64_t i = 0; i < c.samples * c.layout.examples; ++i) ids_.push_back(random.word());
  }

  void run() {
    forward<true>();
    forward<false>();
    backward();
    rule_.scale = 0.75, rule_.shift = 0.3125, rule_.fill = -1.5;
    forward<true>();
    forward<false>();
  }

  // The kernels of noise_rule_kernels.cuh: thresholds for all rows, by example, and by row; alone and with an affine map.
  void run_rules() {
    const Layout& l = c_.layout;
    for (const int64_t rows : {int64_t(1), l.examples, l.examples * c_.samples}) {
      Buffer<int32_t> thresholds(rows * l.positions, kGroups ? 0 : 1);
      for (int64_t i = 0; i < rows * l.positions; ++i)
        thresholds.data()[i] = static_cast<int32_t>(random_.below(10) == 0 ? random_.below(2) * kFieldRange : random_.below(kFieldRange));
      rule_ = {0, 1.0, 0.0, 0.0, thresholds.data(), rows};
      rule_forward<true>();
      rule_forward<false>();
      rule_backward();
      rule_ = {0, 0.75, 0.3125, -1.5, thresholds.data(), rows};
      rule_forward<true>();
      rule_forward<false>();
    }
  }

 private:
  Noise draw(bool expand) const {
    const Address address{origin_, c_.ids == Ids::none ? nullptr : ids_.data(), c_.ids == Ids::per_example, 5, 1000};
    return {{c_.layout, address, c_.samples, expand}, rule_};
  }

  // Calls body(o, s, b, i, kept) for every element, with what keep_group says about it.
  template <class Body>
  void expected(const Noise& call, const Body& body) const {
    const Layout& l = call.layout;
    for (int64_t o = 0; o < l.outer; ++o)
      for (int64_t s = 0; s < call.samples; ++s)
        for (int64_t b = 0; b < l.examples; ++b)
          for (int64_t i = 0; i < l.inner; ++i) {
            const int64_t position = (o * l.inner + i) / l.share % l.positions;
            const RowAddress row = call.address.of_row(s, b, l.examples);
            const uint32_t threshold = threshold_of(call, s, b, position);
            const uint32_t bits = keep_group(row, static_cast<uint32_t>(position / kGroup), threshold);
            body(o, s, b, i, (bits >> position % kGroup & 1u) != 0);
          }
  }

  static uint32_t threshold_of(const Noise& call, int64_t s, int64_t b, int64_t position) {
    const Rule& rule = call.rule;
    const Layout& l = call.layout;
    return rule.thresholds == nullptr ? rule.threshold : static_cast<uint32_t>(rule.of_row(s, b, l.examples, l.positions)[position]);
  }

  void fill(T* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] = from_acc<T>(static_cast<acc_t<T>>(static_cast<int64_t>(random_.below(4001)) - 2000) / 64);
    if (n > 22) x[21] = from_acc<T>(-acc_t<T>(0)), x[22] = from_acc<T>(-static_cast<acc_t<T>>(1e-45));
    // what a mask that multiplies would let through
    if (n > 20) x[random_.below(20)] = from_acc<T>(static_cast<acc_t<T>>(INFINITY)), x[20] = from_acc<T>(static_cast<acc_t<T>>(NAN));
  }

  template <bool kExpand>
  void forward() {
    const Noise call = this->draw(kExpand);
    const NoiseWork work(call);
    const int64_t inputs = c_.layout.outer * work.step, outputs = inputs * c_.samples;
    Buffer<T> x(kExpand ? inputs : outputs, offset_), y(outputs, offset_);
    fill(x.data(), kExpand ? inputs : outputs);
    const Affine<T> map(rule_);
    const NoiseGrid grid = noise_grid(work, true);
    for (int64_t block = 0; block < grid.blocks; ++block)
      for (int part = 0; part < grid.parts; ++part)
        for (int thread = 0; thread < kBlock; ++thread)
          noise_fwd<T, V, kGroups, kExpand>(work, x.data(), y.data(), map, static_cast<int>(grid.part), block, part, thread);
    expected(call, [&](int64_t o, int64_t s, int64_t b, int64_t i, bool kept) {
      const acc_t<T> value = to_acc(x.data()[call.input_at(o, s, b) + i]) * map.scale;
      const T want = kept ? from_acc<T>(rule_.plain() ? value : value + map.shift) : from_acc<T>(static_cast<acc_t<T>>(rule_.fill));
      CHECK((rule_.plain() ? same<T> : close)(y.data()[call.output_at(o, s, b) + i], want), where(kExpand ? "expand" : "rows"), " at ", o,
            " ", s, " ", b, " ", i);
    });
    CHECK(x.guarded() && y.guarded(), where("forward"), " writes outside");
  }

  void backward() {
    const Noise call = this->draw(true);
    const NoiseWork work(call);
    const int64_t inputs = c_.layout.outer * work.step, outputs = inputs * c_.samples;
    Buffer<T> dy(outputs, offset_), dx(inputs, offset_);
    fill(dy.data(), outputs);
    const auto scale = static_cast<acc_t<T>>(rule_.scale);
    const NoiseGrid grid = noise_grid(work, false);
    for (int64_t block = 0; block < grid.blocks; ++block)
      for (int thread = 0; thread < kBlock; ++thread) noise_bwd<T, V, kGroups>(work, dy.data(), dx.data(), scale, block, thread);
    std::vector<acc_t<T>> sum(static_cast<std::size_t>(inputs));
    expected(call, [&](int64_t o, int64_t s, int64_t b, int64_t i, bool kept) {
      if (kept) sum[call.example_at(o, b) + i] += to_acc(dy.data()[call.output_at(o, s, b) + i]);
    });
    for (int64_t i = 0; i < inputs; ++i) {
      const T want = from_acc<T>(sum[i] * scale);
      CHECK(same(dx.data()[i], want) || (std::isnan(to_acc(want)) && std::isnan(to_acc(dx.data()[i]))), where("backward"), " at ", i);
    }
    CHECK(dy.guarded() && dx.guarded(), where("backward"), " writes outside");
    if (c_.samples == 1) sum_of_one(work, dy.data(), dx.data(), inputs);
  }

  // Forward's kernels, which make the sum of one sample: the same bits, those of zeros too.
  void sum_of_one(const NoiseWork& work, const T* dy, const T* dx, int64_t n) {
    Affine<T> map(rule_);
    map.shift = 0;
    Buffer<T> y(n, offset_);
    const NoiseGrid grid = noise_grid(work, true);
    for (int64_t block = 0; block < grid.blocks; ++block)
      for (int thread = 0; thread < kBlock; ++thread) {
        if (rule_.thresholds == nullptr) noise_fwd<T, V, kGroups, true>(work, dy, y.data(), map, 1, block, 0, thread);
        else noise_rule_fwd<T, V, kGroups, false>(work, dy, y.data(), map, 1, block, 0, thread);
      }
    for (int64_t i = 0; i < n; ++i)
      CHECK(same(y.data()[i], dx[i]) || (std::isnan(to_acc(dx[i])) && std::isnan(to_acc(y.data()[i]))), where("sum of one"), " at ", i);
  }

  // What a kept element is multiplied by.
  acc_t<T> factor(const Noise& call, int64_t o, int64_t s, int64_t b, int64_t i) const {
    const Layout& l = call.layout;
    const uint32_t own = call.rule.thresholds == nullptr ? 0 : threshold_of(call, s, b, (o * l.inner + i) / l.share % l.positions);
    return static_cast<acc_t<T>>(call.rule.scale) * (acc_t<T>(kFieldRange) / acc_t<T>(std::max<int64_t>(1, int64_t(kFieldRange) - own)));
  }

  // One unit in the last place: the compiler may join a product and a sum, here or there.
  static bool close(T a, T b) {
    const double x = static_cast<double>(to_acc(a)), y = static_cast<double>(to_acc(b));
    return same(a, b) || x == y || (std::isnan(x) && std::isnan(y)) || std::abs(x - y) <= 1e-6 * std::max(1.0, std::abs(y)) ||
           (sizeof(T) == 2 && std::abs(x - y) <= std::abs(y) / 128);
  }

  template <bool kExpand>
  void rule_forward() {
    const Noise call = this->draw(kExpand);
    const NoiseWork work(call);
    const int64_t inputs = c_.layout.outer * work.step, outputs = inputs * c_.samples;
    Buffer<T> x(kExpand ? inputs : outputs, offset_), y(outputs, offset_);
    fill(x.data(), kExpand ? inputs : outputs);
    const NoiseGrid grid = noise_grid(work, true);
    for (int64_t block = 0; block < grid.blocks; ++block)
      for (int part = 0; part < grid.parts; ++part)
        for (int thread = 0; thread < kBlock; ++thread)
          noise_rule_fwd<T, V, kGroups, kExpand>(work, x.data(), y.data(), Affine<T>(rule_), static_cast<int>(grid.part), block, part,
                                                 thread);
    expected(call, [&](int64_t o, int64_t s, int64_t b, int64_t i, bool kept) {
      const acc_t<T> value = to_acc(x.data()[call.input_at(o, s, b) + i]) * factor(call, o, s, b, i) + static_cast<acc_t<T>>(rule_.shift);
      const T want = from_acc<T>(kept ? value : static_cast<acc_t<T>>(rule_.fill));
      CHECK(close(y.data()[call.output_at(o, s, b) + i], want), where("rule forward"), " at ", o, " ", s, " ", b, " ", i);
    });
    CHECK(x.guarded() && y.guarded(), where("rule forward"), " writes outside");
  }

  void rule_backward() {
    const Noise call = this->draw(true);
    const NoiseWork work(call);
    const int64_t inputs = c_.layout.outer * work.step, outputs = inputs * c_.samples;
    Buffer<T> dy(outputs, offset_), dx(inputs, offset_);
    fill(dy.data(), outputs);
    const NoiseGrid grid = noise_grid(work, false);
    for (int64_t block = 0; block < grid.blocks; ++block)
      for (int thread = 0; thread < kBlock; ++thread)
        noise_rule_bwd<T, V, kGroups>(work, dy.data(), dx.data(), Affine<T>(rule_), block, thread);
    std::vector<acc_t<T>> sum(static_cast<std::size_t>(inputs));
    expected(call, [&](int64_t o, int64_t s, int64_t b, int64_t i, bool kept) {
      if (kept) sum[call.example_at(o, b) + i] += to_acc(dy.data()[call.output_at(o, s, b) + i]) * factor(call, o, s, b, i);
    });
    // Kept elements can be 65536 times as large as those that cancel them.
    for (int64_t i = 0; i < inputs; ++i) CHECK(near(dx.data()[i], sum[i]), where("rule backward"), " at ", i);
    CHECK(dy.guarded() && dx.guarded(), where("rule backward"), " writes outside");
    if (c_.samples == 1) sum_of_one(work, dy.data(), dx.data(), inputs);
  }
  static bool near(T a, acc_t<T> want) {
    const double x = static_cast<double>(to_acc(a)), y = static_cast<double>(to_acc(from_acc<T>(want)));
    return x == y || (std::isnan(x) && std::isnan(y)) || std::abs(x - y) <= 0.5 + std::abs(y) / 128;
  }

  std::string where(const char* kernel) const {
    return std::string(c_.name) + ", " + std::to_string(sizeof(T)) + "-byte elements, accesses of " + std::to_string(V) + ", offset " +
           std::to_string(offset_) + ", " + (kGroups ? "groups, " : "") + kernel;
  }

  const Case& c_;
  int64_t offset_;
  test::Random& random_;
  Rule rule_{c_.threshold, keep_scale<double>(c_.threshold), 0.0, 0.0, nullptr, 0};
  int64_t origin_[3];
  std::vector<int64_t> ids_;
};

// Every kernel that may run a case, at an aligned address and at one that is not.
template <class T>
void trials(const Case& c, test::Random& random) {
  alignas(16) static const char aligned[16] = {};
  constexpr int kWide = kVector<T>;
  if (rows_are_aligned(c.layout, sizeof(T), {aligned})) {
    Trial<T, kWide, false>(c, 0, random).run();
    Trial<T, kWide, false>(c, 0, random).run_rules();
    if constexpr (kWide == kGroup)
      if (packs_are_groups(c.layout)) Trial<T, kWide, true>(c, 0, random).run();
    if (packs_are_groups(c.layout) && c.layout.inner % kGroup == 0 && c.layout.positions % kGroup == 0)
      Trial<T, kWide, true>(c, 0, random).run_rules();
  }
  for (const int64_t offset : {0, 1}) Trial<T, 1, false>(c, offset, random).run();
  Trial<T, 1, false>(c, 1, random).run_rules();
}

int main() {
  dividers();
  grids();
  choices();
  factors();
  test::Random random;
  for (const Case& c : kCases) {
    trials<float>(c, random);
    trials<double>(c, random);
    trials<bf16>(c, random);
    trials<fp16>(c, random);
  }
  return test::report();
}
