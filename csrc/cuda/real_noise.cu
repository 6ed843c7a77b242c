// Real-valued noise on NVIDIA GPUs: x [O, B, I] -> y [O, K*B, I], x * (1 + std z) or x + std z with z of each element's address, none of it
// stored. (1 + K) * n * sizeof(T) bytes for n elements of x; the arithmetic of the numbers costs more than these bytes, so it is short
// (NOTE [Normals in float32]) and what noise samples share is done once (NOTE [Shared rounds]). The kernels' bodies are in
// real_noise_kernels.cuh, which compiles for the host too.
#include "common.cuh"
#include "../real_noise_op.h"
#include "real_noise_kernels.cuh"

namespace iwsgd {
namespace {

template <class L, class T, int P, bool kExpand>
__global__ void __launch_bounds__(kBlock) real_noise_fwd_kernel(const __grid_constant__ RealNoiseWork work,
                                                                const T* x,  // [O, B, I] where kExpand, else [O, K*B, I]
                                                                T* y,        // [O, K*B, I]
                                                                int part) {
  real_noise_fwd<L, T, P, kExpand>(work, x, y, part, blockIdx.x, static_cast<int>(blockIdx.y), static_cast<int>(threadIdx.x));
}

template <class L, class T, int P>
__global__ void __launch_bounds__(kBlock) real_noise_bwd_kernel(const __grid_constant__ RealNoiseWork work,
                                                                const T* dy,  // [O, K*B, I]
                                                                T* dx) {      // [O, B, I]
  real_noise_bwd<L, T, P>(work, dy, dx, blockIdx.x, static_cast<int>(threadIdx.x));
}

// Calls body with the law as a type, and with the elements of a pack as a std::integral_constant.
template <class T, class Body>
void with_law_and_pack(const RealNoise& call, std::initializer_list<const void*> tensors, const Body& body) {
  with_law(call.law, [&](auto law) {
    if (packs_are_whole(call.layout, kPack<T>, sizeof(T), tensors)) body(law, std::integral_constant<int, kPack<T>>{});
    else body(law, std::integral_constant<int, 1>{});
  });
}

template <class T>
void real_noise_fwd_cuda(const RealNoise& call, const T* x, T* y, cudaStream_t stream) {
  with_law_and_pack<T>(call, {x, y}, [&](auto law, auto pack) {
    using L = decltype(law);
    constexpr int P = decltype(pack)::value;
    const RealNoiseWork work(call, P);
    if (work.total == 0) return;
    const NoiseGrid grid = noise_grid(work, true);
    const dim3 blocks(static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.parts));
    if (call.expand) real_noise_fwd_kernel<L, T, P, true><<<blocks, kBlock, 0, stream>>>(work, x, y, static_cast<int>(grid.part));
    else real_noise_fwd_kernel<L, T, P, false><<<blocks, kBlock, 0, stream>>>(work, x, y, static_cast<int>(grid.part));
    check_launch();
  });
}

template <class T>
void real_noise_bwd_cuda(const RealNoise& call, const T* dy, T* dx, cudaStream_t stream) {
  with_law_and_pack<T>(call, {dy, dx}, [&](auto law, auto pack) {
    using L = decltype(law);
    constexpr int P = decltype(pack)::value;
    const RealNoiseWork work(call, P);
    if (work.total == 0) return;
    real_noise_bwd_kernel<L, T, P><<<static_cast<unsigned>(noise_grid(work, false).blocks), kBlock, 0, stream>>>(work, dy, dx);
    check_launch();
  });
}

struct Cuda {
  template <class T>
  static void forward(const RealNoise& call, const T* x, T* y, const Tensor& tensor) {
    const OnDeviceOf device(tensor);
    real_noise_fwd_cuda(call, x, y, device.stream());
  }
  template <class T>
  static void backward(const RealNoise& call, const T* dy, T* dx, const Tensor& tensor) {
    const OnDeviceOf device(tensor);
    real_noise_bwd_cuda(call, dy, dx, device.stream());
  }
};

}  // namespace
}  // namespace iwsgd

STABLE_TORCH_LIBRARY_IMPL(iwsgd_ext, CUDA, m) {
  m.impl("real_noise", TORCH_BOX(&iwsgd::RealNoiseOp<iwsgd::Cuda>::real_noise));
  m.impl("real_noise_sum", TORCH_BOX(&iwsgd::RealNoiseOp<iwsgd::Cuda>::real_noise_sum));
}
