// The importance weighted cross-entropy on NVIDIA GPUs: loss, log-likelihoods, importance weights and gradient in one pass.
//
// An example's S rows must be known before the gradient of any of them: where they fit, one block holds them in shared memory
// in between, and memory sees one read and one write of the logits; else three kernels go over slices that the second level
// cache holds. iw_cross_entropy_launch.h chooses. The mean's denominator comes first, from the targets alone, and the sum over
// the units last; both are sums in a fixed order, so that results are the same in every bit from run to run, and nothing is read
// back to the host. The kernels' bodies are in iw_cross_entropy_kernels.cuh, which compiles for the host too.
#include "common.cuh"
#include "../iw_cross_entropy_op.h"
#include "iw_cross_entropy_block.cuh"
#include "iw_cross_entropy_kernels.cuh"

namespace iwsgd {
namespace {

template <class T>
using Arguments = LossArguments<T, acc_t<T>>;
template <class T>
using Work = LossWork<acc_t<T>>;

extern __shared__ __align__(16) double shared_memory[];
__device__ DeviceBlock this_block() { return {reinterpret_cast<char*>(shared_memory)}; }

// A second number of launch bounds, blocks on a multiprocessor, keeps ptxas from spilling to reach a round number of registers.
template <class T>
constexpr int kRowBlocks = sizeof(T) == 8 ? 1 : 2;
constexpr int kTileThreads = 512;
template <class T, bool kSoft>
constexpr int kTileBlocks = kSoft || sizeof(T) == 8 ? 1 : 2;

template <class T>
__global__ void __launch_bounds__(kPlainThreads)
    iw_cross_entropy_denominator_kernel(const __grid_constant__ Arguments<T> a, const __grid_constant__ Work<T> work) {
  loss_denominator(this_block(), a, work);
}

template <class T, bool kSoft>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<T, kSoft>)
    iw_cross_entropy_fwd_kernel(const __grid_constant__ Arguments<T> a, const __grid_constant__ Work<T> work,
                                const __grid_constant__ TilePlan plan) {
  loss_tile<kSoft>(this_block(), a, work, plan);
}

template <class T, bool kSoft>
__global__ void __launch_bounds__(kPlainThreads, kRowBlocks<T>)
    iw_cross_entropy_statistics_kernel(const __grid_constant__ Arguments<T> a, const __grid_constant__ Work<T> work, int lanes) {
  loss_statistics<kSoft>(this_block(), a, work, lanes);
}

template <class T>
__global__ void __launch_bounds__(kPlainThreads)
    iw_cross_entropy_weights_kernel(const __grid_constant__ Arguments<T> a, const __grid_constant__ Work<T> work, int lanes) {
  loss_weights(this_block(), a, work, lanes);
}

template <class T>
__global__ void __launch_bounds__(kJoinThreads, 1)
    iw_cross_entropy_join_kernel(const __grid_constant__ Arguments<T> a, const __grid_constant__ Work<T> work) {
  loss_join(this_block(), a, work);
}

template <class T, bool kSoft>
__global__ void __launch_bounds__(kPlainThreads, kRowBlocks<T>)
    iw_cross_entropy_gradient_kernel(const __grid_constant__ Arguments<T> a, const __grid_constant__ Work<T> work, int lanes) {
  loss_gradient<kSoft>(this_block(), a, work, lanes);
}

template <class T>
__global__ void __launch_bounds__(kJoinThreads, 1)
    iw_cross_entropy_total_kernel(const __grid_constant__ Arguments<T> a, const __grid_constant__ Work<T> work) {
  loss_total(this_block(), a, work);
}

DeviceLimits device_limits(int device) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
    return static_cast<int64_t>(value);
  };
  return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor), attribute(cudaDevAttrL2CacheSize)};
}

// The kernels of a call, as run_loss asks for them.
template <class T>
struct Launches {
  cudaStream_t stream;

  void denominator(const Arguments<T>& a, const Work<T>& work) const {
    iw_cross_entropy_denominator_kernel<T><<<work.denominator_blocks, kPlainThreads, kScratchBytes, stream>>>(a, work);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  template <bool kSoft>
  void tile(const Arguments<T>& a, const Work<T>& work, const TilePlan& plan) const {
    const auto kernel = iw_cross_entropy_fwd_kernel<T, kSoft>;
    if (plan.shared_bytes > 48 * 1024)  // more than a launch has without asking
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared_bytes)));
    kernel<<<grid(plan.blocks), plan.threads, plan.shared_bytes, stream>>>(a, work, plan);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  template <bool kSoft>
  void statistics(const Arguments<T>& a, const Work<T>& work, const SlicePlan& plan) const {
    const auto kernel = iw_cross_entropy_statistics_kernel<T, kSoft>;
    kernel<<<grid(plan.row_blocks), kPlainThreads, kScratchBytes, stream>>>(a, work, plan.lanes);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  void weights(const Arguments<T>& a, const Work<T>& work, const SlicePlan& plan) const {
    const auto kernel = iw_cross_entropy_weights_kernel<T>;
    kernel<<<grid(plan.unit_blocks), kPlainThreads, kScratchBytes, stream>>>(a, work, plan.weigh_lanes);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  void join(const Arguments<T>& a, const Work<T>& work, const SlicePlan& plan) const {
    iw_cross_entropy_join_kernel<T><<<grid(plan.unit_blocks), kJoinThreads, kScratchBytes, stream>>>(a, work);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  template <bool kSoft>
  void gradient(const Arguments<T>& a, const Work<T>& work, const SlicePlan& plan) const {
    const auto kernel = iw_cross_entropy_gradient_kernel<T, kSoft>;
    kernel<<<grid(plan.row_blocks), kPlainThreads, kScratchBytes, stream>>>(a, work, plan.lanes);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  void total(const Arguments<T>& a, const Work<T>& work) const {
    iw_cross_entropy_total_kernel<T><<<1, kJoinThreads, kScratchBytes, stream>>>(a, work);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  static unsigned grid(int64_t blocks) { return static_cast<unsigned>(blocks); }
};

struct Cuda {
  template <class T>
  static void run(const Arguments<T>& arguments, const Tensor& logits) {
    const OnDeviceOf device(logits);
    Tensor memory;
    const auto allocate = [&](int64_t bytes) {
      memory = torch::stable::new_empty(logits, {bytes}, ScalarType::Byte);
      return mutable_data<char>(memory);
    };
    run_loss(arguments, device_limits(logits.get_device_index()), allocate, Launches<T>{device.stream()});
  }
};

}  // namespace
}  // namespace iwsgd

STABLE_TORCH_LIBRARY_IMPL(iwsgd_ext, CUDA, m) {
  m.impl("iw_cross_entropy", TORCH_BOX(&iwsgd::LossOp<iwsgd::Cuda>::out_of_place));
  m.impl("iw_cross_entropy_", TORCH_BOX(&iwsgd::LossOp<iwsgd::Cuda>::in_place));
}
