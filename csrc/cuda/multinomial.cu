// Multinomial counts on NVIDIA GPUs, [K, B, F]: one block for each row. A draw is a quarter of a generator's call, a search and an atomic
// addition. The kernel's body is in multinomial_kernels.cuh, which compiles for the host too.
#include "common.cuh"
#include "../multinomial_op.h"
#include "block.cuh"
#include "multinomial_kernels.cuh"

namespace iwsgd {
namespace {

template <bool kShared>
__global__ void __launch_bounds__(kCountThreads) multinomial_fwd_kernel(const __grid_constant__ Multinomial call,
                                                                        int32_t* counts) {  // [K, B, F]
  extern __shared__ char memory[];
  multinomial_fwd<kShared>(call, counts, DeviceBlock{memory});
}

struct Cuda {
  static void forward(const Multinomial& call, int32_t* counts, const Tensor& tensor) {
    const OnDeviceOf device(tensor);
    const auto rows = static_cast<unsigned>(call.samples * call.examples);
    if (call.features <= kSharedFeatures)
      multinomial_fwd_kernel<true><<<rows, kCountThreads, call.features * sizeof(int32_t), device.stream()>>>(call, counts);
    else multinomial_fwd_kernel<false><<<rows, kCountThreads, 0, device.stream()>>>(call, counts);
    check_launch();
  }
};

}  // namespace
}  // namespace iwsgd

STABLE_TORCH_LIBRARY_IMPL(iwsgd_ext, CUDA, m) { m.impl("multinomial", TORCH_BOX(&iwsgd::MultinomialOp<iwsgd::Cuda>::multinomial)); }
