#include "common.cuh"
#include "lamp.h"

namespace lamp {

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
