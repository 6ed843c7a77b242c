// The threads of a block, as the loss kernels use them. The kernels' bodies are templates on this, so that the tests run them on
// the host with another one.
#pragma once
#include <cooperative_groups.h>

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
  __device__ void sync_warp() const { __syncwarp(); }

  // x of the thread whose number differs by these bits; all of the warp take part.
  template <class A>
  __device__ A swap(A x, int bits) const {
    return __shfl_xor_sync(0xFFFFFFFFu, x, bits);
  }

  // 16 bytes into shared memory, there for this thread after finish_copies.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  __device__ void copy16(void* to, const void* from) const { *static_cast<uint4*>(to) = __ldcg(static_cast<const uint4*>(from)); }
  __device__ void finish_copies() const {}
#else
  __device__ void copy16(void* to, const void* from) const {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from)
                 : "memory");
  }
  __device__ void finish_copies() const { asm volatile("cp.async.wait_all;" ::: "memory"); }
#endif

  // ---- between the blocks of a grid that was launched together ----

  // What another block has written: not from this multiprocessor's own cache.
  __device__ double fresh(const double* x) const { return __ldcg(x); }
  // What each thread of a block wrote before arriving is there for all after waiting.
  __device__ unsigned arrive_grid() const { return cooperative_groups::this_grid().barrier_arrive(); }
  __device__ void wait_grid(unsigned arrival) const { cooperative_groups::this_grid().barrier_wait(std::move(arrival)); }
  // Whether all other blocks have been here, with what their first threads wrote before. flag: shared memory.
  __device__ bool last(unsigned* finished, int* flag) const {
    if (thread() == 0) {
      __threadfence();
      *flag = atomicAdd(finished, 1u) == gridDim.x - 1;
      __threadfence();
    }
    sync();
    return *flag != 0;
  }

  // ---- between the blocks of a cluster ----

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __device__ void sync_cluster() const { cooperative_groups::this_cluster().sync(); }
  // The same place in the shared memory of another of the cluster's blocks.
  template <class X>
  __device__ const X* of_rank(const X* x, int rank) const {
    return cooperative_groups::this_cluster().map_shared_rank(x, rank);
  }
#endif
};

}  // namespace iwsgd
