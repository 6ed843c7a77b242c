// The noise op on NVIDIA GPUs: x [O, B, I] -> y [O, K*B, I], one independent mask for every noise sample, none of them stored.
//
// x is read once and its K outputs are written from registers: (1 + K) * n * sizeof(T) bytes for n elements of x, and as many
// in backward, whose sum over samples stays in registers. What remains is to hide the generator behind memory: 16-bit fields,
// and the work that noise samples share done once (NOTE [Shared rounds]). The kernels' bodies are in noise_kernels.cuh, which
// compiles for the host too.
#include "common.cuh"
#include "../noise_op.h"
#include "noise_kernels.cuh"
#include "noise_rule_kernels.cuh"

namespace iwsgd {
namespace {

// Blocks on a multiprocessor at once, which give the registers. Where x is not expanded, as many as leave room for kAhead's loads: left to
// itself ptxas saves registers, and does so by beginning half of the loads only when the others have been used. Where x is expanded there
// is one load, and warps do more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kMostBlocks = 4;  // Turing's
#else
constexpr int kMostBlocks = 5;
#endif
template <class T, int V, bool kExpand>
constexpr int kBlocks = std::min(kMostBlocks, (V == kGroup               ? 4
                                               : V > 1 && sizeof(T) == 4 ? 3
                                                                         : 2) +
                                                  (kExpand && V > 1 ? 1 : 0));

template <class T, int V, bool kGroups, bool kExpand>
__global__ void __launch_bounds__(kBlock, kBlocks<T, V, kExpand>) noise_fwd_kernel(const __grid_constant__ NoiseWork work,
                                                                                   const T* x,  // [O, B, I] where kExpand, else as y
                                                                                   T* y,        // [O, K*B, I]
                                                                                   const __grid_constant__ Affine<T> map, int part) {
  noise_fwd<T, V, kGroups, kExpand>(work, x, y, map, part, blockIdx.x, static_cast<int>(blockIdx.y), static_cast<int>(threadIdx.x));
}

template <class T, int V, bool kGroups>
__global__ void __launch_bounds__(kBlock, kBlocks<T, V, false>) noise_bwd_kernel(const __grid_constant__ NoiseWork work,
                                                                                 const T* dy,  // [O, K*B, I]
                                                                                 T* dx,        // [O, B, I]
                                                                                 acc_t<T> scale) {
  noise_bwd<T, V, kGroups>(work, dy, dx, scale, blockIdx.x, static_cast<int>(threadIdx.x));
}

// With more, the compiler spills.
template <class T, int V, bool kGroups>
constexpr int kRuleBlocks = sizeof(T) < 8 && (kGroups || V == kGroup) ? 3 : 2;

template <class T, int V, bool kGroups, bool kExpand>
__global__ void __launch_bounds__(kBlock, kRuleBlocks<T, V, kGroups>)
    noise_rule_fwd_kernel(const __grid_constant__ NoiseWork work, const T* x, T* y, const __grid_constant__ Affine<T> map, int part) {
  noise_rule_fwd<T, V, kGroups, kExpand>(work, x, y, map, part, blockIdx.x, static_cast<int>(blockIdx.y), static_cast<int>(threadIdx.x));
}

template <class T, int V, bool kGroups>
__global__ void __launch_bounds__(kBlock, kRuleBlocks<T, V, kGroups>)
    noise_rule_bwd_kernel(const __grid_constant__ NoiseWork work, const T* dy, T* dx, const __grid_constant__ Affine<T> map) {
  noise_rule_bwd<T, V, kGroups>(work, dy, dx, map, blockIdx.x, static_cast<int>(threadIdx.x));
}

// Calls body with the elements of an access, as a std::integral_constant.
template <class T, class Body>
void with_access(const NoiseWork& work, std::initializer_list<const void*> tensors, const Body& body) {
  if (rows_are_aligned(work.call.layout, sizeof(T), tensors)) body(std::integral_constant<int, kVector<T>>{});
  else body(std::integral_constant<int, 1>{});
}

// Calls body with two types: the elements of an access as a std::integral_constant, and whether packs are known to be groups.
// Only the 16-bit types gain by knowing: of the others the bits go through a shuffle.
template <class T, class Body>
void with_layout(const NoiseWork& work, std::initializer_list<const void*> tensors, const Body& body) {
  with_access<T>(work, tensors, [&](auto vector) {
    if constexpr (decltype(vector)::value == kGroup) {
      if (work.groups) return body(vector, std::true_type{});
    }
    body(vector, std::false_type{});
  });
}

// The same for a threshold of every position: where the accesses are wide, packs are groups or not known to be.
template <class T, class Body>
void with_rule_layout(const NoiseWork& work, std::initializer_list<const void*> tensors, const Body& body) {
  with_access<T>(work, tensors, [&](auto vector) {
    if constexpr (decltype(vector)::value > 1) {
      if (thresholds_are_groups(work)) return body(vector, std::true_type{});
    }
    body(vector, std::false_type{});
  });
}

dim3 dimensions(const NoiseGrid& grid) { return {static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.parts), 1}; }

// Of one noise sample, x is laid out as y, and the kernels for both layouts can run: each time the one with more under way.
template <class T>
void noise_fwd_cuda(const Noise& call, const T* x, T* y, const Affine<T>& map, cudaStream_t stream) {
  const NoiseWork work(call);
  if (work.total == 0) return;
  const NoiseGrid grid = noise_grid(work, true);
  const int part = static_cast<int>(grid.part);
  if (call.rule.thresholds != nullptr) {
    with_rule_layout<T>(work, {x, y}, [&](auto vector, auto groups) {
      constexpr int V = decltype(vector)::value;
      constexpr bool kGroups = decltype(groups)::value;
      if (call.expand && call.samples > 1)
        noise_rule_fwd_kernel<T, V, kGroups, true><<<dimensions(grid), kBlock, 0, stream>>>(work, x, y, map, part);
      else noise_rule_fwd_kernel<T, V, kGroups, false><<<dimensions(grid), kBlock, 0, stream>>>(work, x, y, map, part);
    });
    check_launch();
    return;
  }
  if (call.rule.threshold >= kFieldRange) {  // p = 1 gives zeros, exactly
    STD_TORCH_CHECK(call.rule.fill == 0, "fill: expected 0 where the threshold drops all elements");
    check(cudaMemsetAsync(y, 0, call.samples * call.layout.outer * work.step * sizeof(T), stream));
    return;
  }
  with_layout<T>(work, {x, y}, [&](auto vector, auto groups) {
    constexpr int V = decltype(vector)::value;
    constexpr bool kGroups = decltype(groups)::value;
    if (call.expand || call.samples == 1)
      noise_fwd_kernel<T, V, kGroups, true><<<dimensions(grid), kBlock, 0, stream>>>(work, x, y, map, part);
    else noise_fwd_kernel<T, V, kGroups, false><<<dimensions(grid), kBlock, 0, stream>>>(work, x, y, map, part);
  });
  check_launch();
}

template <class T>
void noise_bwd_cuda(const Noise& call, const T* dy, T* dx, cudaStream_t stream) {
  Affine<T> map(call.rule);
  if (call.samples == 1) {  // a sum of one number is that number plus 0
    map.shift = 0;
    return noise_fwd_cuda(call, dy, dx, map, stream);
  }
  const NoiseWork work(call);
  if (work.total == 0) return;
  const NoiseGrid grid = noise_grid(work, false);
  if (call.rule.thresholds != nullptr) {
    with_rule_layout<T>(work, {dy, dx}, [&](auto vector, auto groups) {
      noise_rule_bwd_kernel<T, decltype(vector)::value, decltype(groups)::value>
          <<<dimensions(grid), kBlock, 0, stream>>>(work, dy, dx, map);
    });
    check_launch();
    return;
  }
  if (call.rule.threshold >= kFieldRange) {
    check(cudaMemsetAsync(dx, 0, call.layout.outer * work.step * sizeof(T), stream));
    return;
  }
  with_layout<T>(work, {dy, dx}, [&](auto vector, auto groups) {
    noise_bwd_kernel<T, decltype(vector)::value, decltype(groups)::value><<<dimensions(grid), kBlock, 0, stream>>>(work, dy, dx, map.scale);
  });
  check_launch();
}

struct Cuda {
  template <class T>
  static void forward(const Noise& call, const T* x, T* y, const Tensor& tensor) {
    const OnDeviceOf device(tensor);
    noise_fwd_cuda(call, x, y, Affine<T>(call.rule), device.stream());
  }
  template <class T>
  static void backward(const Noise& call, const T* dy, T* dx, const Tensor& tensor) {
    const OnDeviceOf device(tensor);
    noise_bwd_cuda(call, dy, dx, device.stream());
  }
};

}  // namespace
}  // namespace iwsgd

STABLE_TORCH_LIBRARY_IMPL(iwsgd_ext, CUDA, m) {
  m.impl("noise", TORCH_BOX(&iwsgd::NoiseOp<iwsgd::Cuda>::noise));
  m.impl("noise_out", TORCH_BOX(&iwsgd::NoiseOp<iwsgd::Cuda>::noise_out));
  m.impl("noise_sum", TORCH_BOX(&iwsgd::NoiseOp<iwsgd::Cuda>::noise_sum));
}
