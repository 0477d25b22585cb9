// The CUDA half of lamp_fast._C on the kernels as cuda_runtime.h beside this file runs them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Here rather than compiled apart, as pybind11 is what takes the time.
#include "bindings_cuda.cpp"

namespace lamp {
std::vector<CudaDevice> cuda_devices() { return {}; }
}  // namespace lamp

namespace {

// Kernels with known faults, to see that they are found.

__global__ void neighbours(const int* in, int* out, bool with_barrier) {
  __shared__ int values[64];
  values[threadIdx.x] = in[threadIdx.x];
  if (with_barrier) __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 1) % 64];
}

__global__ void missing_thread(const int*, int*, bool) {
  if (threadIdx.x != 5) __syncthreads();
}

__global__ void different_votes(const int*, int* out, bool) {
  out[threadIdx.x] =
      threadIdx.x % 2 ? __any_sync(0xffffffff, true) : __shfl_xor_sync(0xffffffff, 1, 1);
}

std::vector<int> run(const std::string& name, std::vector<int> values) {
  std::vector<int> out(64);
  values.resize(64);
  cudaLaunchConfig_t config;
  config.blockDim = dim3(64);
  const auto kernel = name == "missing_thread"    ? missing_thread
                      : name == "different_votes" ? different_votes
                                                  : neighbours;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, values.data(), out.data(),
                                                name != "neighbours_without_barrier");
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  namespace py = pybind11;
  module.def("build_info", [] {
    py::dict info;
    info["cuda"] = true;
    return info;
  });
  lamp::bind_params(module);
  lamp::bind_cuda(module);
  module.def("set_order", [](unsigned order) { cuda_on_cpu::Machine::get().set_order(order); });
  module.def("blocks", [] { return cuda_on_cpu::Machine::get().blocks(); });
  module.def("run", &run);
  module.def("half_bits", [](float x) { return __float2half_rn(x).bits; });
  module.def("bfloat16_bits", [](float x) { return __float2bfloat16_rn(x).bits; });
  module.def("from_half_bits", [](std::uint16_t bits) { return __half2float({bits}); });
  module.def("from_bfloat16_bits", [](std::uint16_t bits) { return __bfloat162float({bits}); });
}
