// What the CUDA kernels share: launches and their errors, vector accesses, sums over lanes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

// CUDA's limit in x. Kernels walk on in steps of their grid, so any number of blocks of work fits.
#ifndef LAMP_MAX_BLOCKS
#define LAMP_MAX_BLOCKS 0x7fffffff
#endif

namespace lamp {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffff;
constexpr int kVectorBytes = 16;

inline void check_cuda(cudaError_t status, const char* call) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status));
}

// Enqueues a kernel unless there is nothing to do.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
            void* stream, const Arguments&... arguments) {
  if (blocks == 0) return;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(blocks, LAMP_MAX_BLOCKS)));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  check_cuda(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}

inline bool is_aligned(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) % kVectorBytes == 0;
}

// As many elements as one 16-byte access moves.
template <typename T>
struct alignas(kVectorBytes) Pack {
  static constexpr int kSize = kVectorBytes / sizeof(T);
  T values[kSize];
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void round_to(float x, float& out) { out = x; }
__device__ inline void round_to(float x, __half& out) { out = __float2half_rn(x); }
__device__ inline void round_to(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }

// The sum over kLanes neighbours, alike in all of them; the whole warp takes part.
template <int kLanes, typename T>
__device__ inline T sum_over_lanes(T x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    x += __shfl_xor_sync(kWholeWarp, x, distance);
  return x;
}

}  // namespace lamp
