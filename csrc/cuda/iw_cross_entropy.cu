// The importance weighted cross-entropy on NVIDIA GPUs: loss, log-likelihoods, importance weights and gradient in one pass.
//
// An example's S rows must be known before the gradient of any of them: where they fit, warps hold them in registers in between, a block
// or the blocks of a cluster in shared memory, and memory sees one read and one write of the logits; else three kernels go over slices
// that the second level cache holds. iw_cross_entropy_launch.h chooses. The mean's denominator, from the targets alone, and the sum over
// the units are sums in a fixed order, so that results are the same in every bit from run to run, and nothing is read back to the
// host. The kernels' bodies are in iw_cross_entropy_registers.cuh, _kernels.cuh and _cluster.cuh, which compile for the host too.
#include <map>

#include "common.cuh"
#include "../iw_cross_entropy_op.h"
#include "block.cuh"
#include "iw_cross_entropy_cluster.cuh"
#include "iw_cross_entropy_registers.h"
#include "iw_cross_entropy_scale.cuh"
#include "iw_cross_entropy_slices.cuh"

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
__global__ void __launch_bounds__(kClusterThreads, kTileBlocks<T, kSoft>)
    iw_cross_entropy_cluster_kernel(const __grid_constant__ Arguments<T> a, const __grid_constant__ Work<T> work,
                                    const __grid_constant__ ClusterPlan plan) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  loss_cluster<kSoft>(this_block(), a, work, plan);
#else
  (void)a, (void)work, (void)plan;  // never launched: most_ranks is 1
#endif
}

template <class T, bool kSoft>
__global__ void __launch_bounds__(kPlainThreads, kRowBlocks<T>)
    iw_cross_entropy_statistics_kernel(const __grid_constant__ Arguments<T> a, const __grid_constant__ Work<T> work, int lanes) {
  loss_statistics<kSoft>(this_block(), a, work, lanes);
}

template <class T, bool kSoft>
__global__ void __launch_bounds__(kPlainThreads)
    iw_cross_entropy_parts_kernel(const __grid_constant__ Arguments<T> a, const __grid_constant__ Work<T> work) {
  loss_parts<kSoft>(this_block(), a, work);
}

template <class T>
__global__ void __launch_bounds__(kPlainThreads, kRowBlocks<T>)
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

template <class T>
__global__ void __launch_bounds__(kScaleThreads) iw_cross_entropy_scale_kernel(T* x, int64_t n, const acc_t<T>* factor) {
  scale_elements(x, n, factor, int64_t(blockIdx.x) * blockDim.x + threadIdx.x, int64_t(gridDim.x) * blockDim.x);
}

struct Device {
  DeviceLimits limits;
  bool cooperative;
};

Device ask_device(int device) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device));
    return static_cast<int64_t>(value);
  };
  // A kernel built for an older architecture alone has no code for clusters; the driver's choice shows in what is loaded.
  cudaFuncAttributes loaded{};
  check(cudaFuncGetAttributes(&loaded, iw_cross_entropy_cluster_kernel<float, false>));
  const bool clusters = attribute(cudaDevAttrClusterLaunch) != 0 && loaded.ptxVersion >= 90 && loaded.binaryVersion >= 90;
  DeviceLimits limits{attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                      attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor), attribute(cudaDevAttrL2CacheSize)};
  limits.most_ranks = clusters ? kMostRanks : 1;
  limits.registers = attribute(cudaDevAttrMaxRegistersPerBlock);
  return {limits, attribute(cudaDevAttrCooperativeLaunch) != 0};
}

// Of the current device; each thread asks once.
const Device& this_device(int device) {
  thread_local std::map<int, Device> known;
  const auto found = known.find(device);
  return found != known.end() ? found->second : known.emplace(device, ask_device(device)).first->second;
}

// The kernels of a call, as run_loss asks for them.
template <class T>
struct Launches {
  cudaStream_t stream;
  const DeviceLimits& limits;
  bool cooperative;

  void denominator(const Arguments<T>& a, const Work<T>& work) const {
    iw_cross_entropy_denominator_kernel<T><<<grid(work.denominator_blocks), kPlainThreads, kScratchBytes, stream>>>(a, work);
    check_launch();
  }
  // How many blocks the device holds at once, or 0 where it cannot start them together.
  template <class>
  int64_t resident(const RegisterPlan& plan) const {
    return cooperative ? resident_registers<T>(plan, limits.multiprocessors) : 0;
  }
  void registers(const Arguments<T>& a, const Work<T>& work, const RegisterPlan& plan) const { launch_registers(a, work, plan, stream); }
  template <bool kSoft, class>
  int64_t resident(const TilePlan& plan) const {
    int each = 0;
    const auto kernel = iw_cross_entropy_fwd_kernel<T, kSoft>;
    allow_shared(kernel, plan.shared_bytes);
    if (!cooperative) return 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, plan.threads, plan.shared_bytes));
    return each * limits.multiprocessors;
  }
  template <bool kSoft>
  void tile(const Arguments<T>& a, const Work<T>& work, const TilePlan& plan) const {
    const auto kernel = iw_cross_entropy_fwd_kernel<T, kSoft>;
    allow_shared(kernel, plan.shared_bytes);
    Launch launch(plan.blocks, plan.threads, plan.shared_bytes, stream);
    check(cudaLaunchKernelEx(&launch.together(plan.one_launch).config, kernel, a, work, plan));
  }
  // How many clusters the device holds at once; there may be no group of multiprocessors that is large enough for one.
  template <bool kSoft, class>
  int64_t clusters(const ClusterPlan& plan) const {
    int resident = 0;
    const auto kernel = iw_cross_entropy_cluster_kernel<T, kSoft>;
    allow_shared(kernel, plan.shared_bytes);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    Launch launch(plan.ranks, plan.threads, plan.shared_bytes, stream);
    const cudaError_t answer = cudaOccupancyMaxActiveClusters(&resident, kernel, &launch.in_clusters_of(plan.ranks).config);
    if (answer == cudaErrorInvalidClusterSize) {  // no cluster of this device is so large: of sm_120, more than 8 blocks
      static_cast<void>(cudaGetLastError());
      return 0;
    }
    check(answer);
    return resident;
  }
  template <bool kSoft>
  void cluster(const Arguments<T>& a, const Work<T>& work, const ClusterPlan& plan) const {
    const auto kernel = iw_cross_entropy_cluster_kernel<T, kSoft>;
    Launch launch(plan.blocks, plan.threads, plan.shared_bytes, stream);
    check(cudaLaunchKernelEx(&launch.in_clusters_of(plan.ranks).config, kernel, a, work, plan));
  }
  template <bool kSoft>
  void statistics(const Arguments<T>& a, const Work<T>& work, const SlicePlan& plan) const {
    const auto kernel = iw_cross_entropy_statistics_kernel<T, kSoft>;
    kernel<<<grid(plan.row_blocks), kPlainThreads, kScratchBytes, stream>>>(a, work, plan.lanes);
    check_launch();
  }
  template <bool kSoft>
  void parts(const Arguments<T>& a, const Work<T>& work, const SlicePlan& plan) const {
    iw_cross_entropy_parts_kernel<T, kSoft><<<grid(plan.part_blocks), kPlainThreads, kScratchBytes, stream>>>(a, work);
    check_launch();
  }
  void weights(const Arguments<T>& a, const Work<T>& work, const SlicePlan& plan) const {
    const auto kernel = iw_cross_entropy_weights_kernel<T>;
    kernel<<<grid(plan.unit_blocks), kPlainThreads, kScratchBytes, stream>>>(a, work, plan.weigh_lanes);
    check_launch();
  }
  void join(const Arguments<T>& a, const Work<T>& work, const SlicePlan& plan) const {
    iw_cross_entropy_join_kernel<T><<<grid(plan.unit_blocks), kJoinThreads, kScratchBytes, stream>>>(a, work);
    check_launch();
  }
  template <bool kSoft>
  void gradient(const Arguments<T>& a, const Work<T>& work, const SlicePlan& plan) const {
    const auto kernel = iw_cross_entropy_gradient_kernel<T, kSoft>;
    kernel<<<grid(plan.row_blocks), kPlainThreads, kScratchBytes, stream>>>(a, work, plan.lanes);
    check_launch();
  }
  void total(const Arguments<T>& a, const Work<T>& work) const {
    iw_cross_entropy_total_kernel<T><<<1, kJoinThreads, kScratchBytes, stream>>>(a, work);
    check_launch();
  }
  static unsigned grid(int64_t blocks) { return static_cast<unsigned>(blocks); }
  // Always as much as there is: the limit is the function's, so that less, for a smaller call of another thread or of the same graph,
  // would forbid a launch that is still to come.
  template <class Kernel>
  void allow_shared(Kernel kernel, int64_t bytes) const {
    if (bytes > 48 * 1024)  // more than a launch has without asking
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(limits.shared_per_block)));
  }
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
    const auto& [limits, cooperative] = this_device(logits.get_device_index());
    run_loss(arguments, limits, allocate, Launches<T>{device.stream(), limits, cooperative});
  }
  template <class T>
  static void scale(T* x, int64_t n, const acc_t<T>* factor, const Tensor& tensor) {
    const OnDeviceOf device(tensor);
    const int64_t needed = divide_up(divide_up(n, kVector<T>) + 1, kScaleThreads);
    const int64_t blocks = std::min(needed, kScaleBlocks * this_device(tensor.get_device_index()).limits.multiprocessors);
    iw_cross_entropy_scale_kernel<T><<<static_cast<unsigned>(blocks), kScaleThreads, 0, device.stream()>>>(x, n, factor);
    check_launch();
  }
};

}  // namespace
}  // namespace iwsgd

STABLE_TORCH_LIBRARY_IMPL(iwsgd_ext, CUDA, m) {
  m.impl("iw_cross_entropy", TORCH_BOX(&iwsgd::LossOp<iwsgd::Cuda>::out_of_place));
  m.impl("iw_cross_entropy_", TORCH_BOX(&iwsgd::LossOp<iwsgd::Cuda>::in_place));
  m.impl("iw_cross_entropy_scale_", TORCH_BOX(&iwsgd::LossOp<iwsgd::Cuda>::scale));
}
