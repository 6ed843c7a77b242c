// The importance weighted cross-entropy on NVIDIA GPUs: loss, log-likelihoods, importance weights and gradient in one pass.
//
// An example's S rows must be known before the gradient of any of them: where they fit, one block holds them in shared memory
// in between, and memory sees one read and one write of the logits; else three kernels go over slices that the second level
// cache holds. iw_cross_entropy_launch.h chooses. The mean's denominator comes first, from the targets alone, and the sum over
// the units last; both are sums in a fixed order, so that results are the same in every bit from run to run, and nothing is read
// back to the host. The kernels' bodies are in iw_cross_entropy_kernels.cuh, which compiles for the host too.
#include "common.cuh"
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

template <class A>
const A* data_or_null(const std::optional<Tensor>& x) {
  return x ? data<A>(*x) : nullptr;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // loss, log_p, weights, bound, outer

// dlogits: where the gradient goes (it may be logits itself), or nothing.
Outputs forward(const Tensor& logits,  // [S*B, C, T]
                const Tensor& target,  // [B, T], or [B, C, T]
                int64_t samples, const std::optional<Tensor>& class_weight, const std::optional<Tensor>& example_weight,
                const std::optional<Tensor>& position_weight, const std::optional<Tensor>& normalizer, int64_t ignore_index,
                double smoothing, double alpha, bool per_position, int64_t reduction, const std::optional<Tensor>& dlogits) {
  const OnDeviceOf device(logits);
  const int64_t B = logits.size(0) / samples, units = per_position ? B * logits.size(2) : B;
  STD_TORCH_CHECK(logits.size(1) < int64_t(1) << 30, "logits: expected fewer than 2^30 classes, got ", logits.size(1));
  const auto type = logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor log_p = torch::stable::new_empty(logits, {samples, units}, type);
  const Tensor weights = torch::stable::new_empty(logits, {samples, units}, type);
  const Tensor bound = torch::stable::new_empty(logits, {units}, type);
  const Tensor outer = torch::stable::new_empty(logits, {units}, type);
  const bool none = static_cast<Reduction>(reduction) == Reduction::none;
  const Tensor loss = none ? torch::stable::new_empty(logits, {units}, type) : torch::stable::new_empty(logits, {}, type);
  dispatch_floating(logits, [&](auto* pointer) {
    using T = std::remove_pointer_t<decltype(pointer)>;
    using A = acc_t<T>;
    const bool labels = target.scalar_type() == ScalarType::Long;
    Arguments<T> a{};
    a.S = samples, a.B = B, a.C = logits.size(1), a.positions_each = logits.size(2);
    a.logits = data<T>(logits);
    a.row_stride = logits.stride(0), a.class_stride = a.C == 1 ? 1 : logits.stride(1), a.position_stride = logits.stride(2);
    if (dlogits) {
      a.dlogits = mutable_data<T>(*dlogits);
      a.drow_stride = dlogits->stride(0), a.dclass_stride = a.C == 1 ? 1 : dlogits->stride(1), a.dposition_stride = dlogits->stride(2);
    }
    a.labels = labels ? data<int64_t>(target) : nullptr;
    a.probabilities = labels ? nullptr : data<A>(target);
    a.ignore_index = ignore_index;
    a.smoothing = static_cast<A>(smoothing);
    a.class_weight = data_or_null<A>(class_weight);
    a.example_weight = data_or_null<A>(example_weight);
    a.position_weight = data_or_null<A>(position_weight);
    a.normalizer = data_or_null<A>(normalizer);
    a.reduction = static_cast<Reduction>(reduction);
    a.per_position = per_position;
    a.alpha = samples == 1 ? 1.0 : alpha;
    a.loss = mutable_data<A>(loss), a.log_p = mutable_data<A>(log_p), a.weights = mutable_data<A>(weights);
    a.bound = mutable_data<A>(bound), a.outer = mutable_data<A>(outer);
    Tensor memory;
    const auto allocate = [&](int64_t bytes) {
      memory = torch::stable::new_empty(logits, {bytes}, ScalarType::Byte);
      return mutable_data<char>(memory);
    };
    run_loss(a, device_limits(logits.get_device_index()), allocate, Launches<T>{device.stream()});
  });
  return {loss, log_p, weights, bound, outer};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> iw_cross_entropy(
    Tensor logits, Tensor target, int64_t samples, std::optional<Tensor> class_weight, std::optional<Tensor> example_weight,
    std::optional<Tensor> position_weight, std::optional<Tensor> normalizer, int64_t ignore_index, double smoothing, double alpha,
    bool per_position, int64_t reduction, bool need_gradient) {
  const Tensor dlogits = need_gradient ? torch::stable::empty_like(logits) : torch::stable::new_empty(logits, {0});
  auto [loss, log_p, weights, bound, outer] =
      forward(logits, target, samples, class_weight, example_weight, position_weight, normalizer, ignore_index, smoothing, alpha,
              per_position, reduction, need_gradient ? std::optional<Tensor>(dlogits) : std::nullopt);
  return {loss, log_p, weights, bound, outer, dlogits};
}

Outputs iw_cross_entropy_inplace(Tensor logits, Tensor target, int64_t samples, std::optional<Tensor> class_weight,
                                 std::optional<Tensor> example_weight, std::optional<Tensor> position_weight,
                                 std::optional<Tensor> normalizer, int64_t ignore_index, double smoothing, double alpha, bool per_position,
                                 int64_t reduction) {
  return forward(logits, target, samples, class_weight, example_weight, position_weight, normalizer, ignore_index, smoothing, alpha,
                 per_position, reduction, logits);
}

}  // namespace
}  // namespace iwsgd

STABLE_TORCH_LIBRARY_IMPL(iwsgd_ext, CUDA, m) {
  m.impl("iw_cross_entropy", TORCH_BOX(&iwsgd::iw_cross_entropy));
  m.impl("iw_cross_entropy_", TORCH_BOX(&iwsgd::iw_cross_entropy_inplace));
}
