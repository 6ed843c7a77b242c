// The CUDA kernels of real-valued noise without CUDA: their bodies run thread by thread over the whole grid, every element compared with
// the law of real_noise.h. What it cannot see: the device's own conversions and functions (real_noise.cpp has their errors), and the
// launch.
#include "../cuda/real_noise_kernels.cuh"

#include <cmath>
#include <string>
#include <vector>

#include "check.h"

using namespace iwsgd;

enum class Ids { none, per_sample, per_example };

struct Case {
  const char* name;
  Layout layout;  // outer, examples, inner, positions, share
  int64_t samples;
  Ids ids = Ids::none;
};

// Sizes on both sides of a pack (4 or 8) and of a block's packs (1024 or 2048), and rows that end inside each.
const Case kCases[] = {
    {"one element", {1, 1, 1, 1, 1}, 1},
    {"less than a group", {1, 3, 3, 3, 1}, 2},
    {"a group", {1, 3, 4, 4, 1}, 2},
    {"whole packs", {1, 3, 64, 64, 1}, 3},
    {"groups, and half a pack", {1, 3, 500, 500, 1}, 4},
    {"an odd row", {1, 5, 63, 63, 1}, 8},
    {"a row of more than a block", {1, 2, 2056, 2056, 1}, 3},
    {"an odd row of more than a block", {1, 2, 2051, 2051, 1}, 3},
    {"rows of one element", {1, 700, 1, 1, 1}, 3},
    {"many samples of few packs", {1, 2, 24, 24, 1}, 67},
    {"samples by number", {1, 9, 64, 64, 1}, 4, Ids::per_sample},
    {"samples by number and example, odd", {1, 301, 3, 3, 1}, 4, Ids::per_example},
    {"examples in the second dimension", {3, 5, 64, 3 * 64, 1}, 3},
    {"examples in the second dimension, whole groups", {3, 5, 36, 3 * 36, 1}, 3},
    {"examples in the second dimension, odd", {3, 5, 37, 3 * 37, 1}, 3},
    {"examples last", {40, 5, 1, 40, 1}, 3},
    {"channels first", {1, 3, 13 * 49, 13, 49}, 3},
    {"channels last, whole packs", {1, 3, 25 * 16, 16, 1}, 3},
    {"channels last, whole groups", {1, 4, 26 * 12, 12, 1}, 3},
    {"channels last, odd", {1, 4, 32 * 3, 3, 1}, 3},
    {"channels, examples in the second dimension", {3, 5, 7 * 8, 7, 8}, 3},
    {"whole rows", {1, 300, 72, 1, 72}, 3},
};

template <class L, class T, int P>
class Trial {
  using A = acc_t<T>;

 public:
  Trial(const Case& c, test::Random& random) : c_(c), random_(random) {
    origin_[0] = static_cast<int64_t>(random.next());
    origin_[1] = random.below(1000);
    origin_[2] = random.word();
    for (int64_t i = 0; i < c.samples * c.layout.examples; ++i) ids_.push_back(random.word());
  }

  void run() {
    for (const bool multiply : {true, false}) {
      forward<true>(multiply);
      forward<false>(multiply);
    }
    backward();
  }

 private:
  RealNoise call(bool expand, bool multiply) const {
    const Address address{origin_, c_.ids == Ids::none ? nullptr : ids_.data(), c_.ids == Ids::per_example, 5, 1000};
    return {{c_.layout, address, c_.samples, expand}, Law::normal, 0.7, multiply};
  }

  // Calls body(o, s, b, i, z) for every element, with z as real_noise.h has it.
  template <class Body>
  void expected(const Call& call, const Body& body) const {
    const Layout& l = call.layout;
    for (int64_t o = 0; o < l.outer; ++o)
      for (int64_t s = 0; s < call.samples; ++s)
        for (int64_t b = 0; b < l.examples; ++b) {
          const RowAddress row = call.address.of_row(s, b, l.examples);
          for (int64_t i = 0; i < l.inner; ++i) {
            const int64_t position = (o * l.inner + i) / l.share % l.positions;
            const Words words = philox({static_cast<uint32_t>(position / kNumbers), row.example, row.sample, row.stream}, row.seed);
            body(o, s, b, i, number<L, A>(words, static_cast<int>(position % kNumbers)));
          }
        }
  }

  // n elements that begin at an aligned address, for whole packs; off it for single elements.
  std::vector<T> filled(int64_t n) {
    std::vector<T> x(static_cast<std::size_t>(n) + 1);
    for (T& value : x) value = from_acc<T>(static_cast<A>(static_cast<int64_t>(random_.below(4001)) - 2000) / 64);
    return x;
  }
  static constexpr int64_t kAlignment = P * sizeof(T);
  struct Aligned {  // a copy at an aligned address, which the sanitizer guards
    explicit Aligned(const std::vector<T>& x) : memory(static_cast<T*>(std::aligned_alloc(kAlignment, bytes(x)))) {
      std::memcpy(static_cast<void*>(memory), x.data(), (x.size() - 1) * sizeof(T));
    }
    ~Aligned() { std::free(memory); }
    static std::size_t bytes(const std::vector<T>& x) { return (x.size() * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment; }
    T* memory;
  };

  static bool same(T got, A want) {
    const T rounded = from_acc<T>(want);
    return std::memcmp(&got, &rounded, sizeof got) == 0;
  }

  template <bool kExpand>
  void forward(bool multiply) {
    const RealNoise call = this->call(kExpand, multiply);
    const RealNoiseWork work(call, P);
    const int64_t inputs = c_.layout.outer * work.step, outputs = inputs * c_.samples;
    const Aligned x(filled(kExpand ? inputs : outputs)), y(filled(outputs));
    const NoiseGrid grid = noise_grid(work, true);
    for (int64_t block = 0; block < grid.blocks; ++block)
      for (int part = 0; part < grid.parts; ++part)
        for (int thread = 0; thread < kBlock; ++thread)
          real_noise_fwd<L, T, P, kExpand>(work, x.memory, y.memory, static_cast<int>(grid.part), block, part, thread);
    expected(call, [&](int64_t o, int64_t s, int64_t b, int64_t i, A z) {
      const A value = to_acc(x.memory[call.input_at(o, s, b) + i]), std = static_cast<A>(0.7);
      const A want = multiply ? value * (std * z + A(1)) : value + std * z;
      CHECK(same(y.memory[call.output_at(o, s, b) + i], want), where(kExpand ? "expand" : "rows"), " at ", o, " ", s, " ", b, " ", i);
    });
  }

  void backward() {
    const RealNoise call = this->call(true, true);
    const RealNoiseWork work(call, P);
    const int64_t inputs = c_.layout.outer * work.step;
    const Aligned dy(filled(inputs * c_.samples)), dx(filled(inputs));
    const NoiseGrid grid = noise_grid(work, false);
    for (int64_t block = 0; block < grid.blocks; ++block)
      for (int thread = 0; thread < kBlock; ++thread) real_noise_bwd<L, T, P>(work, dy.memory, dx.memory, block, thread);
    std::vector<A> sum(static_cast<std::size_t>(inputs));
    expected(call, [&](int64_t o, int64_t s, int64_t b, int64_t i, A z) {
      sum[call.example_at(o, b) + i] += to_acc(dy.memory[call.output_at(o, s, b) + i]) * (static_cast<A>(0.7) * z + A(1));
    });
    for (int64_t i = 0; i < inputs; ++i) CHECK(same(dx.memory[i], sum[i]), where("backward"), " at ", i);
  }

  std::string where(const char* kernel) const {
    return std::string(c_.name) + ", " + std::to_string(sizeof(T)) + "-byte elements, packs of " + std::to_string(P) + ", " + kernel;
  }

  const Case& c_;
  test::Random& random_;
  int64_t origin_[3];
  std::vector<int64_t> ids_;
};

template <class T>
void trials(const Case& c, test::Random& random) {
  for (const Law law : {Law::normal, Law::laplace, Law::uniform})
    with_law(law, [&](auto of) {
      using L = decltype(of);
      if (packs_are_whole(c.layout, kPack<T>, sizeof(T), {})) Trial<L, T, kPack<T>>(c, random).run();
      Trial<L, T, 1>(c, random).run();
    });
}

void choices() {
  alignas(32) static const char memory[64] = {};
  const auto whole = [](const Layout& layout, int64_t bytes, int offset) {
    return packs_are_whole(layout, 4, bytes, {memory, memory + offset});
  };
  CHECK(whole({1, 5, 64, 64, 1}, 4, 0) && whole({3, 5, 64, 192, 1}, 4, 16), "elements");
  CHECK(whole({1, 5, 48, 12, 1}, 4, 0), "channels last, whole packs");
  CHECK(!whole({1, 5, 48, 6, 1}, 4, 0), "channels that wrap inside a pack");
  CHECK(!whole({1, 5, 63, 63, 1}, 4, 0) && !whole({3, 5, 62, 186, 1}, 4, 0), "rows that end inside a pack");
  CHECK(!whole({1, 5, 64, 16, 4}, 4, 0), "draws that are shared");
  CHECK(!whole({1, 5, 64, 64, 1}, 4, 4) && !whole({1, 5, 64, 64, 1}, 8, 16), "a tensor that is not aligned");
}

int main() {
  choices();
  test::Random random;
  for (const Case& c : kCases) {
    trials<float>(c, random);
    trials<double>(c, random);
    trials<bf16>(c, random);
    trials<fp16>(c, random);
  }
  return test::report();
}
