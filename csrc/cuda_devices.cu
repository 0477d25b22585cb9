#include "common.cuh"
#include "lamp.h"

namespace lamp {

std::string cuda_architectures() {
  // nvcc's own list of what it compiles this file for, such as 800,900.
  std::string names;
  for (const int architecture : {__CUDA_ARCH_LIST__})
    names += (names.empty() ? "sm_" : " sm_") + std::to_string(architecture / 10);
  return names;
}

std::vector<CudaDevice> cuda_devices() {
  int count = 0;
  check_cuda(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  std::vector<CudaDevice> devices;
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    check_cuda(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
    devices.push_back({properties.name, properties.major, properties.minor});
  }
  return devices;
}

}  // namespace lamp
