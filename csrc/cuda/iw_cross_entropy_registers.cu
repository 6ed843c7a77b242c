// The importance weighted cross-entropy of units that fit into registers: a kernel for each form of iw_cross_entropy_launch.h. A file of
// its own, so that its kernels compile beside the others.
#include "common.cuh"
#include "block.cuh"
#include "iw_cross_entropy_registers.cuh"
#include "iw_cross_entropy_registers.h"

namespace iwsgd {
namespace {

extern __shared__ __align__(16) double shared_memory[];

template <class T, int V, int K, int R, bool kShifted>
__global__ void __launch_bounds__(kTeamWarps* kWarpLanes, 1)
    iw_cross_entropy_registers_kernel(const __grid_constant__ LossArguments<T, float> a, const __grid_constant__ LossWork<float> work,
                                      const __grid_constant__ RegisterPlan plan) {
  loss_registers<V, K, R, kShifted>(DeviceBlock{reinterpret_cast<char*>(shared_memory)}, a, work, plan);
}

// Calls body with the kernel of the plan's form.
template <class T, class Body>
void with_kernel(const RegisterPlan& plan, const Body& body) {
  with_form<T>(plan, [&](auto form) {
    using Form = decltype(form);
    body(iw_cross_entropy_registers_kernel<T, Form::access, Form::accesses, Form::rows, Form::shifted>);
  });
}

}  // namespace

template <class T>
int64_t resident_registers(const RegisterPlan& plan, int64_t multiprocessors) {
  int each = 0;
  with_kernel<T>(
      plan, [&](auto kernel) { check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, plan.threads, plan.shared_bytes)); });
  return each * multiprocessors;
}

template <class T>
void launch_registers(const LossArguments<T, float>& a, const LossWork<float>& work, const RegisterPlan& plan, cudaStream_t stream) {
  with_kernel<T>(plan, [&](auto kernel) {
    Launch launch(plan.blocks, plan.threads, plan.shared_bytes, stream);
    check(cudaLaunchKernelEx(&launch.together(plan.one_launch).config, kernel, a, work, plan));
  });
}

#define IWSGD_REGISTERS_OF(T)                                           \
  template int64_t resident_registers<T>(const RegisterPlan&, int64_t); \
  template void launch_registers<T>(const LossArguments<T, float>&, const LossWork<float>&, const RegisterPlan&, cudaStream_t);
IWSGD_REGISTERS_OF(float)
IWSGD_REGISTERS_OF(bf16)
IWSGD_REGISTERS_OF(fp16)
#undef IWSGD_REGISTERS_OF

}  // namespace iwsgd
