// Parameters of the native ops: raw pointers, sizes and strides, so that nothing here needs torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lamp {

enum class Dtype { kFloat32, kFloat64 };

// Rows are contiguous; strides are in elements from one row to the next.
struct RetrieveParams {
  Dtype dtype;        // of query, keys, bias and similarity
  const void* query;  // [B, D]
  const void* keys;   // [M, D]
  const void* bias;   // [M]
  int64_t* indices;   // [B, k], contiguous
  void* similarity;   // [B, k], contiguous
  int64_t* counts;    // [M]
  int64_t query_stride;
  int64_t keys_stride;
  int64_t batch;      // B
  int64_t pool_size;  // M
  int64_t width;      // D
  int64_t k;          // 1..M
  int threads;        // at most so many; never changes a result
};

void retrieve_cpu(const RetrieveParams& params);

struct CudaDevice {
  std::string name;
  int major;
  int minor;
};

// The devices that the driver shows. Throws std::runtime_error with CUDA's reason.
std::vector<CudaDevice> cuda_devices();

}  // namespace lamp
