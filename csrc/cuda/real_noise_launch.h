// How the kernels of real-valued noise cut a call into threads: plain host C++, so that it is tested without CUDA.
//
// A thread draws for one pack of neighbouring elements of one example and goes through the noise samples. Where rows begin at groups of
// the generator and at whole accesses, a pack is one access of 16 bytes or one group, whichever is more. Elsewhere (odd rows, draws that
// are shared) it is one element: neighbouring threads still touch neighbouring memory, and the generator's words are drawn four times.
#pragma once
#include "../real_noise.h"
#include "noise_launch.h"

namespace iwsgd {

template <class T>
constexpr int kPack = std::max<int>(kNumbers, 16 / sizeof(T));

// True where every pack of `pack` elements is made of whole groups and is one aligned access in every tensor.
inline bool packs_are_whole(const Layout& layout, int pack, int64_t element_bytes, std::initializer_list<const void*> tensors) {
  bool whole = layout.share == 1 && layout.inner % pack == 0;  // rows, and with them positions, begin at packs
  if (layout.outer * layout.inner > layout.positions) whole = whole && layout.positions % pack == 0;
  for (const void* tensor : tensors) whole = whole && reinterpret_cast<uintptr_t>(tensor) % (pack * element_bytes) == 0;
  return whole;
}

// One call of a kernel of real-valued noise: packs of `pack` elements.
struct RealNoiseWork : CallWork {
  double std;
  bool multiply;

  RealNoiseWork(const RealNoise& call, int pack) : CallWork(call), std(call.std), multiply(call.multiply) {
    packs = call.layout.inner / pack;
    total = call.layout.outer * call.layout.examples * packs;
    if (total > 0) by_packs = Divider(packs);
  }
};

}  // namespace iwsgd
