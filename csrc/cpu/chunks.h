// How an op on [O, B, I] is cut into pieces of work for torch's threads.
#pragma once
#include <algorithm>

#include "../address.h"
#include "../stable_torch.h"

namespace iwsgd {

// Calls body(o, b, begin, end) for every chunk of at most `chunk` elements of the examples' rows, in parallel; `grain` elements over all
// samples are the least that a second thread is worth.
template <class Body>
void for_each_chunk(const Call& call, int64_t chunk, int64_t grain, const Body& body) {
  const Layout& layout = call.layout;
  const int64_t chunks = (layout.inner + chunk - 1) / chunk;
  const int64_t work = std::max<int64_t>(1, std::min(layout.inner, chunk) * call.samples);
  torch::stable::parallel_for(0, layout.outer * layout.examples * chunks, std::max<int64_t>(1, grain / work),
                              [&](int64_t first, int64_t last) {
                                for (int64_t task = first; task < last; ++task) {
                                  const int64_t row = task / chunks, begin = task % chunks * chunk;
                                  body(row / layout.examples, row % layout.examples, begin, std::min(layout.inner, begin + chunk));
                                }
                              });
}

}  // namespace iwsgd
