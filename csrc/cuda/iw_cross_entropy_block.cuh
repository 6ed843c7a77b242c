// The threads of a block, as the loss kernels use them. The kernels' bodies are templates on this, so that the tests run them on
// the host with another one.
#pragma once
#include <cstdint>

namespace iwsgd {

struct DeviceBlock {
  char* memory;  // shared

  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ int threads() const { return static_cast<int>(blockDim.x); }
  __device__ int64_t index() const { return blockIdx.x; }
  __device__ int64_t blocks() const { return gridDim.x; }
  __device__ char* shared() const { return memory; }
  __device__ void sync() const { __syncthreads(); }

  // x of the thread whose number differs by these bits; all of the warp take part.
  template <class A>
  __device__ A swap(A x, int bits) const {
    return __shfl_xor_sync(0xFFFFFFFFu, x, bits);
  }

  // 16 bytes into shared memory, there for this thread after finish_copies.
  __device__ void copy16(void* to, const void* from) const {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from)
                 : "memory");
  }
  __device__ void finish_copies() const { asm volatile("cp.async.wait_all;" ::: "memory"); }
};

}  // namespace iwsgd
