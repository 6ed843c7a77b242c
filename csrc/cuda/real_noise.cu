// Gaussian noise on NVIDIA GPUs: x [O, B, I] -> y [O, K*B, I], x * (1 + std z) or x + std z with z of each element's address, none of it
// stored. (1 + K) * n * sizeof(T) bytes for n elements of x; the arithmetic of the numbers costs more than these bytes, so it is short
// (NOTE [Normals in float32]) and what noise samples share is done once (NOTE [Shared rounds]). The kernels' bodies are in
// gaussian_kernels.cuh, which compiles for the host too.
#include "common.cuh"
#include "../gaussian_op.h"
#include "gaussian_kernels.cuh"

namespace iwsgd {
namespace {

template <class T, int P, bool kExpand>
__global__ void __launch_bounds__(kBlock) gaussian_fwd_kernel(const __grid_constant__ GaussianWork work,
                                                              const T* x,  // [O, B, I] where kExpand, else [O, S*B, I]
                                                              T* y,        // [O, S*B, I]
                                                              int part) {
  gaussian_fwd<T, P, kExpand>(work, x, y, part, blockIdx.x, static_cast<int>(blockIdx.y), static_cast<int>(threadIdx.x));
}

template <class T, int P>
__global__ void __launch_bounds__(kBlock) gaussian_bwd_kernel(const __grid_constant__ GaussianWork work,
                                                              const T* dy,  // [O, S*B, I]
                                                              T* dx) {      // [O, B, I]
  gaussian_bwd<T, P>(work, dy, dx, blockIdx.x, static_cast<int>(threadIdx.x));
}

// Calls body with the elements of a pack, as a std::integral_constant.
template <class T, class Body>
void with_pack(const Gaussian& call, std::initializer_list<const void*> tensors, const Body& body) {
  if (packs_are_whole(call.draw.layout, kPack<T>, sizeof(T), tensors)) body(std::integral_constant<int, kPack<T>>{});
  else body(std::integral_constant<int, 1>{});
}

template <class T>
void gaussian_fwd_cuda(const Gaussian& call, const T* x, T* y, cudaStream_t stream) {
  with_pack<T>(call, {x, y}, [&](auto pack) {
    constexpr int P = decltype(pack)::value;
    const GaussianWork work(call, P);
    if (work.total == 0) return;
    const NoiseGrid grid = noise_grid(work, true);
    const dim3 blocks(static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.parts));
    if (call.draw.expand) gaussian_fwd_kernel<T, P, true><<<blocks, kBlock, 0, stream>>>(work, x, y, static_cast<int>(grid.part));
    else gaussian_fwd_kernel<T, P, false><<<blocks, kBlock, 0, stream>>>(work, x, y, static_cast<int>(grid.part));
    check_launch();
  });
}

template <class T>
void gaussian_bwd_cuda(const Gaussian& call, const T* dy, T* dx, cudaStream_t stream) {
  with_pack<T>(call, {dy, dx}, [&](auto pack) {
    constexpr int P = decltype(pack)::value;
    const GaussianWork work(call, P);
    if (work.total == 0) return;
    gaussian_bwd_kernel<T, P><<<static_cast<unsigned>(noise_grid(work, false).blocks), kBlock, 0, stream>>>(work, dy, dx);
    check_launch();
  });
}

struct Cuda {
  template <class T>
  static void forward(const Gaussian& call, const T* x, T* y, const Tensor& tensor) {
    const OnDeviceOf device(tensor);
    gaussian_fwd_cuda(call, x, y, device.stream());
  }
  template <class T>
  static void backward(const Gaussian& call, const T* dy, T* dx, const Tensor& tensor) {
    const OnDeviceOf device(tensor);
    gaussian_bwd_cuda(call, dy, dx, device.stream());
  }
};

}  // namespace
}  // namespace iwsgd

STABLE_TORCH_LIBRARY_IMPL(iwsgd_ext, CUDA, m) {
  m.impl("gaussian", TORCH_BOX(&iwsgd::GaussianOp<iwsgd::Cuda>::gaussian));
  m.impl("gaussian_sum", TORCH_BOX(&iwsgd::GaussianOp<iwsgd::Cuda>::gaussian_sum));
}
