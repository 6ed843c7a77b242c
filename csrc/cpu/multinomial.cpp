// Multinomial counts on the CPU, [K, B, F]: rows are shared out over torch's threads. A draw is a quarter of a generator's call and a
// search; integers, so that every order of the draws gives the same.
#include <algorithm>

#include "../multinomial_op.h"

namespace iwsgd {
namespace {

struct Cpu {
  static void forward(const Multinomial& call, int32_t* counts, const Tensor&) {
    constexpr int64_t kGrainDraws = 4096;  // below this a second thread costs more than it brings
    const int64_t grain = std::max<int64_t>(1, kGrainDraws / std::max<int64_t>(1, call.draws));
    torch::stable::parallel_for(0, call.samples * call.examples, grain, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const int64_t s = r / call.examples, b = r % call.examples;
        int32_t* of_row = counts + r * call.features;
        std::fill(of_row, of_row + call.features, 0);
        const RowAddress row = call.address.of_row(s, b, call.examples);
        for (int64_t group = 0; group * kDraws < call.draws; ++group)
          for_each_draw(call, row, call.of_sample(s), group, [&](int64_t f) { ++of_row[f]; });
      }
    });
  }
};

}  // namespace
}  // namespace iwsgd

STABLE_TORCH_LIBRARY_IMPL(iwsgd_ext, CPU, m) { m.impl("multinomial", TORCH_BOX(&iwsgd::MultinomialOp<iwsgd::Cpu>::multinomial)); }
