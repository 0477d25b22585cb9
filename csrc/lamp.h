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

struct RetrieveBackwardParams {
  Dtype dtype;             // of all but indices
  const void* query;       // [B, D]
  const void* keys;        // [M, D]
  const int64_t* indices;  // [B, k], contiguous, as are all that follow
  const void* similarity;  // [B, k]
  const void* grad;        // [B, k], of similarity
  void* grad_query;        // [B, D]
  void* grad_keys;         // [M, D]
  int64_t query_stride;
  int64_t keys_stride;
  int64_t batch;      // B
  int64_t pool_size;  // M
  int64_t width;      // D
  int64_t k;
  int threads;  // at most so many; never changes a result
};

void retrieve_backward_cpu(const RetrieveBackwardParams& params);

// A tensor [N or G, H, rows, d] whose d is contiguous; strides are in elements.
struct HeadRows {
  void* data;  // nullptr: not wanted
  int64_t sequence_stride;
  int64_t head_stride;
  int64_t row_stride;
};

struct PrefixAttentionParams {
  Dtype dtype;                  // of all tensors; lse is float32, for float64 float64
  HeadRows q;                   // [N, H, R, d]
  HeadRows k, v;                // [N, H, L, d]
  HeadRows prefix_k, prefix_v;  // [G, H, P, d]
  HeadRows out;                 // [N, H, R, d]
  void* lse;                    // [N, H, R], contiguous
  const int64_t* prefix_index;  // [N]; nullptr: sequence n reads n / (N / G)
  const bool* mask;             // [R, P + L], contiguous; nullptr: causal and blind say it
  int64_t sequences;            // N
  int64_t groups;               // G
  int64_t heads;                // H
  int64_t rows;                 // R, the last ones of L where there is no mask
  int64_t length;               // L
  int64_t prefix_length;        // P
  int64_t width;                // d
  bool causal;
  int64_t blind;
  double scale;
  int threads;  // CPU: at most so many; never changes a result
};

// out and lse are as the forward wrote them; the CPU reads neither.
struct PrefixAttentionBackwardParams {
  PrefixAttentionParams forward;
  HeadRows grad;                          // [N, H, R, d]
  HeadRows grad_q, grad_k, grad_v;        // all wanted or none
  HeadRows grad_prefix_k, grad_prefix_v;  // both wanted or none
};

void prefix_attention_cpu(const PrefixAttentionParams& params);
void prefix_attention_backward_cpu(const PrefixAttentionBackwardParams& params);

struct CudaDevice {
  std::string name;
  int major;
  int minor;
};

// The devices that the driver shows. Throws std::runtime_error with CUDA's reason.
std::vector<CudaDevice> cuda_devices();

}  // namespace lamp
