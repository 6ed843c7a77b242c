// How many clusters of blocks a GPU runs at once, by ranks and shared memory of a block: what the loss kernels' plans build on.
// nvcc -arch=sm_90 -o clusters tools/gpu_clusters.cu && ./clusters
#include <cuda_runtime.h>

#include <cstdio>

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) held(int* out) {
  extern __shared__ int memory[];
  if (out != nullptr) *out = memory[threadIdx.x];
}

static bool failed(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return false;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  static_cast<void>(cudaGetLastError());
  return true;
}

int main() {
  struct {
    const char* name;
    cudaDeviceAttr attribute;
  } const attributes[] = {
      {"multiprocessors", cudaDevAttrMultiProcessorCount},
      {"shared memory of a block", cudaDevAttrMaxSharedMemoryPerBlockOptin},
      {"shared memory of a multiprocessor", cudaDevAttrMaxSharedMemoryPerMultiprocessor},
      {"reserved shared memory of a block", cudaDevAttrReservedSharedMemoryPerBlock},
      {"second level cache", cudaDevAttrL2CacheSize},
      {"registers of a multiprocessor", cudaDevAttrMaxRegistersPerMultiprocessor},
      {"threads of a multiprocessor", cudaDevAttrMaxThreadsPerMultiProcessor},
      {"blocks of a multiprocessor", cudaDevAttrMaxBlocksPerMultiprocessor},
      {"cluster launch", cudaDevAttrClusterLaunch},
      {"cooperative launch", cudaDevAttrCooperativeLaunch},
  };
  if (failed(cudaSetDevice(0), "cudaSetDevice")) return 1;
  for (const auto& [name, attribute] : attributes) {
    int value = 0;
    if (!failed(cudaDeviceGetAttribute(&value, attribute, 0), name)) std::printf("%s: %d\n", name, value);
  }
  if (failed(cudaFuncSetAttribute(held, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "clusters above 8")) return 1;
  std::printf("clusters at once, by ranks:\nKB   ");
  for (int ranks = 2; ranks <= 16; ++ranks) std::printf("%5d", ranks);
  std::printf("\n");
  for (const int kilobytes : {66, 113, 128, 227}) {
    std::printf("%-5d", kilobytes);
    const int bytes = kilobytes * 1024;
    if (failed(cudaFuncSetAttribute(held, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory")) continue;
    for (int ranks = 2; ranks <= 16; ++ranks) {
      cudaLaunchAttribute dimension{};
      dimension.id = cudaLaunchAttributeClusterDimension;
      dimension.val.clusterDim = {static_cast<unsigned>(ranks), 1, 1};
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(ranks * 1024), config.blockDim = dim3(kThreads), config.dynamicSmemBytes = bytes;
      config.attrs = &dimension, config.numAttrs = 1;
      int clusters = 0;
      const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, held, &config);
      static_cast<void>(cudaGetLastError());
      if (error == cudaSuccess) std::printf("%5d", clusters);
      else std::printf("%5s", "-");
    }
    std::printf("\n");
  }
  return 0;
}
