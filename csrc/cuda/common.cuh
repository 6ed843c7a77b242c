// The parts of torch and of the CUDA runtime that every .cu file uses.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../stable_torch.h"

// Only a torch with CUDA has these. Weak, they leave the library loadable on every other one.
#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg

namespace iwsgd {

// Throws where a call of the CUDA runtime has failed, with torch's text. The runtime is a copy of this library's own, whose record of the
// last error torch does not clear: the next launch's check would take it for that launch's.
inline void check(cudaError_t result) {
  if (result != cudaSuccess) static_cast<void>(cudaGetLastError());
  STD_TORCH_CHECK(
      result != cudaErrorNoKernelImageForDevice,
      "iwsgd_ext's CUDA kernels were not built for this GPU (iw.backend_info()['build'] says for which they were). Build again with "
      "TORCH_CUDA_ARCH_LIST set to its compute capability (torch.cuda.get_device_capability()), or iw.set_backend('reference')");
  STD_CUDA_CHECK(result);
}

// The same for the launch before.
inline void check_launch() { check(cudaGetLastError()); }

// A launch with attributes, as cudaLaunchKernelEx takes it.
struct Launch {
  cudaLaunchAttribute attribute[1] = {};
  cudaLaunchConfig_t config = {};

  Launch(int64_t blocks, int threads, int64_t shared_bytes, cudaStream_t stream) {
    config.gridDim = static_cast<unsigned>(blocks), config.blockDim = threads, config.dynamicSmemBytes = shared_bytes;
    config.stream = stream, config.attrs = attribute, config.numAttrs = 1;
  }
  Launch(const Launch&) = delete;
  Launch& together(bool yes) {  // all blocks on the GPU at once
    attribute[0].id = cudaLaunchAttributeCooperative, attribute[0].val.cooperative = yes;
    return *this;
  }
  Launch& in_clusters_of(int ranks) {
    attribute[0].id = cudaLaunchAttributeClusterDimension;
    attribute[0].val.clusterDim.x = ranks, attribute[0].val.clusterDim.y = 1, attribute[0].val.clusterDim.z = 1;
    return *this;
  }
};

// Makes x's device the current one for as long as it lives, and holds that device's current stream.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace iwsgd
