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

  // 16 bytes into shared memory, there for this thread after finish_copies; the first `bytes` of them are read, the others zeros.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  __device__ void copy16(void* to, const void* from, int bytes = 16) const {
    if (bytes == 16) {
      *static_cast<uint4*>(to) = __ldcg(static_cast<const uint4*>(from));
    } else {
      *static_cast<uint4*>(to) = uint4{};
      memcpy(to, from, bytes);
    }
  }
  __device__ void finish_copies() const {}
#else
  __device__ void copy16(void* to, const void* from) const {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address(to)), "l"(from) : "memory");
  }
  __device__ void copy16(void* to, const void* from, int bytes) const {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(to)), "l"(from), "r"(bytes) : "memory");
  }
  __device__ void finish_copies() const { asm volatile("cp.async.wait_all;" ::: "memory"); }
#endif
  static __device__ uint32_t address(const void* x) { return static_cast<uint32_t>(__cvta_generic_to_shared(x)); }

  // ---- between the blocks of a grid that was launched together ----

  // A number that another block has written: not from this multiprocessor's own cache.
  __device__ double fresh(const double* x) const { return __ldcg(x); }
  // After waiting, all threads see what each thread of a block wrote before arriving.
  __device__ unsigned arrive_grid() const { return cooperative_groups::this_grid().barrier_arrive(); }
  __device__ void wait_grid(unsigned arrival) const { cooperative_groups::this_grid().barrier_wait(std::move(arrival)); }
  // True where all other blocks have been here, with what their first threads wrote before. flag: shared memory.
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

  // An mbarrier in shared memory: a phase of it ends when `arrivals` threads have said how many bytes to expect, and these have come. The
  // other blocks know of it after sync_cluster.
  __device__ void init_arrivals(uint64_t* barrier, int arrivals) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(arrivals) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __device__ void expect_bytes(uint64_t* barrier, int bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes) : "memory");
  }
  // 16 bytes to the place of `to` in the shared memory of another of the cluster's blocks, whose barrier in the place of `barrier` counts
  // them.
  template <class X>
  __device__ void push(const X& value, X* to, int rank, uint64_t* barrier) const {
    static_assert(sizeof(X) == 16, "");
    uint32_t w[4], there, counts;
    memcpy(w, &value, 16);
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(to)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counts) : "r"(address(barrier)), "r"(rank));
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(there), "r"(w[0]),
                 "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(counts)
                 : "memory");
  }
  // Until the phase of this parity, 0 of the first one, has ended.
  __device__ void wait_arrivals(uint64_t* barrier, int parity) const {
    uint32_t done = 0;
    while (done == 0)
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                   : "=r"(done)
                   : "r"(address(barrier)), "r"(parity)
                   : "memory");
  }
#endif
};

}  // namespace iwsgd
