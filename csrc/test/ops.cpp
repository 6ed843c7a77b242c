// The operators through torch's dispatcher, without Python: the library is loaded as a file, its operators are called by
// name, and every element is compared with keep_group.   ops LIBRARY INSTRUCTION_SET (which IWSGD_ISA must name too)
#include <dlfcn.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cmath>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <vector>

#include "../cpu/isa.h"
#include "../dtypes.h"
#include "../noise.h"
#include "check.h"

using namespace iwsgd;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

STABLE_TORCH_LIBRARY_FRAGMENT(iwsgd_ext, m) {
#include "schemas.inc"
}

Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::empty(shape, dtype, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

// Calls an operator and returns its first result's slot.
template <class... Args>
StableIValue call(const char* name, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  if (torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) throw std::runtime_error(name);
  return stack[0];
}

template <class T>
T* elements(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

bool same(double a, double b) { return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b)); }

enum class Ids { none, per_sample, per_example };

struct Case {
  const char* name;
  int64_t outer, examples, inner, samples, positions, share;
  uint32_t threshold;
  Ids ids;
};

// p = 0.3 where a case does not need another threshold; odd sizes leave parts of a group and of a vector at the ends.
const Case kCases[] = {
    {"one element", 1, 1, 1, 1, 1, 1, 19661, Ids::none},
    {"elements", 1, 3, 1000, 5, 1000, 1, 19661, Ids::none},
    {"every 16-bit pattern", 1, 1, 65536, 2, 65536, 1, 19661, Ids::none},
    {"more samples than are drawn together", 1, 2, 129, 19, 129, 1, 19661, Ids::none},
    {"given samples", 1, 3, 63, 4, 63, 1, 19661, Ids::per_sample},
    {"given samples per example", 1, 3, 63, 4, 63, 1, 19661, Ids::per_example},
    {"examples in the second dimension", 3, 2, 37, 2, 3 * 37, 1, 19661, Ids::none},
    {"channels, in front", 1, 2, 7 * 25, 3, 7, 25, 19661, Ids::none},
    {"channels, last", 1, 2, 25 * 7, 3, 7, 1, 19661, Ids::none},
    {"elements over several pieces of work", 2, 2, 9001, 2, 2 * 9001, 1, 19661, Ids::none},
    {"channels over several pieces of work", 1, 2, 3 * 3001, 2, 3, 3001, 19661, Ids::none},
    {"channels that come again", 1, 2, 4 * 3 * 701, 2, 3, 701, 19661, Ids::none},
    {"whole rows", 1, 5, 70, 3, 1, 70, 19661, Ids::none},
    {"p = 0", 1, 2, 70, 3, 70, 1, 0, Ids::none},
    {"p = 1", 1, 2, 70, 3, 70, 1, kFieldRange, Ids::none},
    {"p = 1 - 1/65536", 1, 2, 4000, 3, 4000, 1, 65535, Ids::none},
    {"no examples", 1, 0, 70, 3, 70, 1, 19661, Ids::none},
};

class OneNoise {
 public:
  explicit OneNoise(const Case& c, test::Random& random)
      : c_(c), origin_(empty({3}, ScalarType::Long)), seed_(random.next()), stream_(random.word()), example_(random.word()) {
    const int64_t origin[3] = {static_cast<int64_t>(seed_), stream_, example_};
    std::memcpy(origin_.data_ptr(), origin, sizeof origin);
    if (c.ids == Ids::none) return;
    const int64_t n = c.samples * (c.ids == Ids::per_example ? c.examples : 1);
    sample_ids_ = c.ids == Ids::per_example ? empty({c.samples, c.examples}, ScalarType::Long) : empty({n}, ScalarType::Long);
    for (int64_t i = 0; i < n; ++i) ids_.push_back(random.word());
    std::memcpy(sample_ids_->data_ptr(), ids_.data(), ids_.size() * sizeof(int64_t));
  }

  bool kept(int64_t o, int64_t s, int64_t b, int64_t i) const {
    const int64_t position = (o * c_.inner + i) / c_.share % c_.positions;
    const int64_t id = c_.ids == Ids::none ? s : ids_[c_.ids == Ids::per_example ? s * c_.examples + b : s];
    const RowAddress row{seed_, static_cast<uint32_t>(example_ + kFirstExample + b), static_cast<uint32_t>(id),
                         static_cast<uint32_t>(stream_ + kStream)};
    return keep_group(row, static_cast<uint32_t>(position / kGroup), c_.threshold) >> (position % kGroup) & 1u;
  }

  Tensor forward(const Tensor& x, bool expand) const {
    return torch::stable::detail::to<Tensor>(call("iwsgd_ext::noise", x, origin_, sample_ids_, c_.samples, kStream, kFirstExample,
                                                  c_.positions, c_.share, int64_t(c_.threshold), std::optional<Tensor>(), scale(), 0.0, 0.0,
                                                  expand));
  }
  void forward_out(const Tensor& x, bool expand, const Tensor& out) const {
    call("iwsgd_ext::noise_out", x, origin_, sample_ids_, c_.samples, kStream, kFirstExample, c_.positions, c_.share, int64_t(c_.threshold),
         std::optional<Tensor>(), scale(), 0.0, 0.0, expand, out);
  }
  Tensor sum(const Tensor& dy) const {
    return torch::stable::detail::to<Tensor>(call("iwsgd_ext::noise_sum", dy, origin_, sample_ids_, c_.samples, kStream, kFirstExample,
                                                  c_.positions, c_.share, int64_t(c_.threshold), std::optional<Tensor>(), scale()));
  }
  double scale() const { return keep_scale<double>(c_.threshold); }

  static constexpr int64_t kStream = 3, kFirstExample = 1000;

 private:
  const Case& c_;
  Tensor origin_;
  std::optional<Tensor> sample_ids_;
  std::vector<int64_t> ids_;
  uint64_t seed_;
  int64_t stream_, example_;
};

template <class T>
void forward(const Case& c, const char* type, ScalarType dtype, bool expand, test::Random& random) {
  const OneNoise noise(c, random);
  const int64_t rows = c.samples * c.examples;
  const Tensor x = empty({c.outer, expand ? c.examples : rows, c.inner}, dtype), out = empty({c.outer, rows, c.inner}, dtype);
  // Any bits at all: infinities and NaN too must vanish where they are dropped. 16-bit patterns come in turn.
  for (int64_t i = 0; i < static_cast<int64_t>(x.numel()); ++i) {
    const uint64_t bits = sizeof(T) == 2 ? static_cast<uint64_t>(i) : random.next();
    std::memcpy(elements<T>(x) + i, &bits, sizeof(T));
  }
  const Tensor y = noise.forward(x, expand);
  noise.forward_out(x, expand, out);
  CHECK(y.dim() == 3 && y.size(0) == c.outer && y.size(1) == rows && y.size(2) == c.inner, c.name, ", ", type, ": shape");
  const auto scale = static_cast<acc_t<T>>(keep_scale<double>(c.threshold));
  for (int64_t o = 0; o < c.outer; ++o)
    for (int64_t s = 0; s < c.samples; ++s)
      for (int64_t b = 0; b < c.examples; ++b)
        for (int64_t i = 0; i < c.inner; ++i) {
          const int64_t to = ((o * c.samples + s) * c.examples + b) * c.inner + i, from = expand ? (o * c.examples + b) * c.inner + i : to;
          const acc_t<T> product = to_acc(elements<T>(x)[from]) * scale;
          const double expected = noise.kept(o, s, b, i) ? to_acc(from_acc<T>(product)) : 0.0;
          const double got = to_acc(elements<T>(y)[to]);
          CHECK(same(got, expected), c.name, ", ", type, ", expand ", expand, ", [", o, ", ", s, ", ", b, ", ", i, "]: ", got, ", not ",
                expected);
          CHECK(same(to_acc(elements<T>(out)[to]), got), c.name, ", ", type, ": noise_out differs from noise");
        }
}

// Integers and p = 1/2, so that sums are exact in every order; only the result is rounded, often halfway in the short types.
template <class T>
void backward(Case c, const char* type, ScalarType dtype, test::Random& random) {
  c.threshold = kFieldRange / 2;
  const OneNoise noise(c, random);
  const Tensor dy = empty({c.outer, c.samples * c.examples, c.inner}, dtype);
  for (int64_t i = 0; i < static_cast<int64_t>(dy.numel()); ++i)
    elements<T>(dy)[i] = from_acc<T>(static_cast<acc_t<T>>(random.below(513)) - 256);
  const Tensor dx = noise.sum(dy);
  CHECK(dx.dim() == 3 && dx.size(0) == c.outer && dx.size(1) == c.examples && dx.size(2) == c.inner, c.name, ", ", type, ": shape");
  for (int64_t o = 0; o < c.outer; ++o)
    for (int64_t b = 0; b < c.examples; ++b)
      for (int64_t i = 0; i < c.inner; ++i) {
        acc_t<T> sum = 0;
        for (int64_t s = 0; s < c.samples; ++s)
          if (noise.kept(o, s, b, i)) sum += 2 * to_acc(elements<T>(dy)[((o * c.samples + s) * c.examples + b) * c.inner + i]);
        const double expected = to_acc(from_acc<T>(sum));
        const double got = to_acc(elements<T>(dx)[(o * c.examples + b) * c.inner + i]);
        CHECK(got == expected, c.name, ", ", type, ", gradient [", o, ", ", b, ", ", i, "]: ", got, ", not ", expected);
      }
}

template <class T>
void all(const char* type, ScalarType dtype, test::Random& random) {
  for (const Case& c : kCases) {
    forward<T>(c, type, dtype, true, random);
    forward<T>(c, type, dtype, false, random);
    backward<T>(c, type, dtype, random);
  }
}

void errors() {
  const Case& c = kCases[1];
  test::Random random;
  const OneNoise noise(c, random);
  bool thrown = false;
  try {
    noise.forward(empty({c.outer, c.examples, c.inner}, ScalarType::Int), true);
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  CHECK(thrown, "integers have no noise");
}

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: ops LIBRARY INSTRUCTION_SET\n";
    return 2;
  }
  int isa = 0;
  while (isa <= static_cast<int>(machine_isa()) && std::strcmp(argv[2], kIsaNames[isa]) != 0) ++isa;
  if (isa > static_cast<int>(machine_isa())) {
    std::cout << "this machine has no " << argv[2] << "\n";
    return 77;
  }
  CHECK(static_cast<int>(best_isa()) == isa, "IWSGD_ISA does not name ", argv[2]);
  if (dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::cerr << dlerror() << "\n";
    return 1;
  }
  test::Random random;
  all<float>("float32", ScalarType::Float, random);
  all<double>("float64", ScalarType::Double, random);
  all<bf16>("bfloat16", ScalarType::BFloat16, random);
  all<fp16>("float16", ScalarType::Half, random);
  errors();
  return test::report();
}
