// Parameters of the native ops: raw pointers, sizes and strides, so that nothing here needs torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lamp {

enum class Dtype { kFloat32, kFloat64, kFloat16, kBFloat16 };

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
  int threads;        // CPU: at most so many; never changes a result
};

void retrieve_cpu(const RetrieveParams& params);

// indices and similarity are as the forward wrote them; bias and counts are not read.
struct RetrieveBackwardParams {
  RetrieveParams forward;
  const void* grad;  // [B, k], of similarity; contiguous, as both gradients are
  void* grad_query;  // [B, D]
  void* grad_keys;   // [M, D]
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

// float32, float64 or bfloat16, of which the gradients of the prefix are float32.
void prefix_attention_cpu(const PrefixAttentionParams& params);
void prefix_attention_backward_cpu(const PrefixAttentionBackwardParams& params);

enum class Activation { kQuickGelu, kGelu };

// An activation and its gradient, of contiguous tensors of `count` bfloat16, each rounded once.
// `threads` never changes a result.
void activate_bf16(Activation activation, const void* x, void* out, int64_t count, int threads);
void activate_bf16_backward(Activation activation, const void* grad, const void* x, void* out,
                            int64_t count, int threads);

// Whether this build has the CPU's instructions for products of bfloat16 (AVX512_BF16), and this
// machine too.
bool multiplies_bfloat16();

// The CUDA ops enqueue on a cudaStream_t of the current device, which the addresses belong to. They
// allocate nothing, wait for nothing and throw std::runtime_error with CUDA's words.

void retrieve_cuda(const RetrieveParams& params, void* stream);  // float32, M <= 256, k <= 32

// Device memory that the CUDA prefix_attention takes beside its tensors.
struct PrefixAttentionScratch {
  int32_t* seen_keys;    // [R, 1 + P + L], with a mask: how many keys each row sees, and which
  int32_t* seeing_rows;  // [P + L, 1 + R], backward with a mask: how many rows see each key, which
  float* delta;          // [N, H, R], backward: dot products of out and grad
  const int64_t* order;  // [N], backward with prefix_index: the sequences, stably sorted by it
  const int64_t* offsets;  // [G + 1], backward with prefix_index: where each group starts in order
  float* partial;          // [parts, G, H, P, 2, d], backward with more than one part
  int64_t parts;           // the walk over a group's rows is cut into; decides the order of sums
};

// float32, float16 or bfloat16; d <= 128.
void prefix_attention_cuda(const PrefixAttentionParams& params,
                           const PrefixAttentionScratch& scratch, void* stream);
void prefix_attention_backward_cuda(const PrefixAttentionBackwardParams& params,
                                    const PrefixAttentionScratch& scratch, void* stream);

// What the kernels were compiled for, such as "sm_80 sm_90".
std::string cuda_architectures();

struct CudaDevice {
  std::string name;
  int major;
  int minor;
};

// The devices that the driver shows. Throws std::runtime_error with CUDA's reason.
std::vector<CudaDevice> cuda_devices();

}  // namespace lamp
