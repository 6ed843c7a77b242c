// The launches of iw_cross_entropy_registers.cu, for float, bf16 and fp16.
#pragma once
#include <cuda_runtime.h>

#include "iw_cross_entropy_launch.h"

namespace iwsgd {

// How many blocks the current device holds at once.
template <class T>
int64_t resident_registers(const RegisterPlan& plan, int64_t multiprocessors);

template <class T>
void launch_registers(const LossArguments<T, float>& a, const LossWork<float>& work, const RegisterPlan& plan, cudaStream_t stream);

}  // namespace iwsgd
