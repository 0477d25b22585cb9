#include <cmath>

#include "common.cuh"
#include "lamp.h"

namespace lamp {
namespace {

constexpr int kMostKeys = 256;
constexpr int kMostWarps = 16;
// A warp scores two keys at a time, which halves how often the query is converted to double.
constexpr int kKeysAtOnce = 2;

// Products of float32 are exact in double and their sums neither overflow nor underflow, so the
// similarity is the cosine rounded once and implementations can agree on its bits.
struct Sums {
  double query = 0;
  double keys[kKeysAtOnce] = {};
  double dots[kKeysAtOnce] = {};

  __device__ void add(float query_value, const float (&key_values)[kKeysAtOnce]) {
    const double x = query_value;
    query += x * x;
#pragma unroll
    for (int i = 0; i < kKeysAtOnce; ++i) {
      const double y = key_values[i];
      keys[i] += y * y;
      dots[i] += x * y;
    }
  }

  __device__ void finish() {
    query = sum_over_lanes<kWarp>(query);
#pragma unroll
    for (int i = 0; i < kKeysAtOnce; ++i) {
      keys[i] = sum_over_lanes<kWarp>(keys[i]);
      dots[i] = sum_over_lanes<kWarp>(dots[i]);
    }
  }

  // With one of the keys.
  __device__ float cosine(bool second) const {
    // float32 squared twice stays far within double.
    const double length = sqrt(query * (second ? keys[1] : keys[0]));
    const double dot = second ? dots[1] : dots[0];
    // The product with a zero row is zero already, or NaN if the other row is not finite.
    return static_cast<float>(length == 0 ? dot : dot / length);
  }
};

// One block a query row, at least one thread a key. A batch of training leaves one block an SM, so
// that loads in flight count for more than blocks: it may have the registers.
__global__ void __launch_bounds__(kMostWarps* kWarp, 1)
    retrieve_kernel(const RetrieveParams params, const bool vectors) {
  __shared__ float similarity[kMostKeys];
  __shared__ float scores[kMostKeys];
  __shared__ unsigned chosen[kMostKeys / kWarp];
  const float* keys = static_cast<const float*>(params.keys);
  const float* bias = static_cast<const float*>(params.bias);
  const int pool_size = static_cast<int>(params.pool_size), k = static_cast<int>(params.k);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;

  for (int64_t row = blockIdx.x; row < params.batch; row += gridDim.x) {
    const float* query = static_cast<const float*>(params.query) + row * params.query_stride;
    for (int first = warp * kKeysAtOnce; first < pool_size; first += warps * kKeysAtOnce) {
      const float* pair[kKeysAtOnce];
#pragma unroll
      for (int i = 0; i < kKeysAtOnce; ++i)
        pair[i] = keys + min(first + i, pool_size - 1) * params.keys_stride;
      Sums sums;
      const int64_t packs = vectors ? params.width / Pack<float>::kSize : 0;
#pragma unroll 2
      for (int64_t d = lane; d < packs; d += kWarp) {
        const Pack<float> query_pack = reinterpret_cast<const Pack<float>*>(query)[d];
        Pack<float> key_packs[kKeysAtOnce];
#pragma unroll
        for (int i = 0; i < kKeysAtOnce; ++i)
          key_packs[i] = reinterpret_cast<const Pack<float>*>(pair[i])[d];
#pragma unroll
        for (int e = 0; e < Pack<float>::kSize; ++e)
          sums.add(query_pack.values[e], {key_packs[0].values[e], key_packs[1].values[e]});
      }
      for (int64_t d = packs * Pack<float>::kSize + lane; d < params.width; d += kWarp)
        sums.add(query[d], {pair[0][d], pair[1][d]});
      sums.finish();
      const int own = first + lane;
      if (lane < kKeysAtOnce && own < pool_size) {
        similarity[own] = sums.cosine(lane == 1);
        scores[own] = similarity[own] + bias[own];
      }
    }
    __syncthreads();

    const int m = threadIdx.x;
    float own_similarity = 0;
    bool any_nan = false, is_chosen = false;
    if (m < pool_size) {
      own_similarity = similarity[m];
      const float own_score = scores[m];
      int better = 0;
      for (int j = 0; j < pool_size; ++j) {
        const float other = scores[j];
        any_nan |= isnan(other);
        better += other > own_score || (other == own_score && j < m);
      }
      is_chosen = (any_nan ? m : better) < k;
    }
    const unsigned chosen_here = __ballot_sync(kWholeWarp, is_chosen);
    if (lane == 0 && warp < kMostKeys / kWarp) chosen[warp] = chosen_here;
    // Only `chosen` is read behind this barrier, and the next row writes it behind its first one.
    __syncthreads();

    if (is_chosen) {
      int place = __popc(chosen_here & ((1u << lane) - 1));
      for (int before = 0; before < warp; ++before) place += __popc(chosen[before]);
      params.indices[row * k + place] = m;
      static_cast<float*>(params.similarity)[row * k + place] = any_nan ? NAN : own_similarity;
      if (!any_nan) atomicAdd(reinterpret_cast<unsigned long long*>(params.counts) + m, 1ull);
    }
  }
}

bool takes_vectors(const void* rows, int64_t stride) {
  return is_aligned(rows) && stride % Pack<float>::kSize == 0;
}

}  // namespace

void retrieve_cuda(const RetrieveParams& params, void* stream) {
  if (params.dtype != Dtype::kFloat32 || params.pool_size > kMostKeys)
    throw std::invalid_argument("retrieve_cuda: expected float32 and at most 256 keys");
  check_cuda(cudaMemsetAsync(params.counts, 0, params.pool_size * sizeof(int64_t),
                             static_cast<cudaStream_t>(stream)),
             "retrieve: cudaMemsetAsync");
  const int64_t pairs = (params.pool_size + kKeysAtOnce - 1) / kKeysAtOnce;
  const int threads = kWarp * static_cast<int>(std::min<int64_t>(pairs, kMostWarps));
  const bool vectors = takes_vectors(params.query, params.query_stride) &&
                       takes_vectors(params.keys, params.keys_stride);
  launch("retrieve", retrieve_kernel, params.batch, threads, stream, params, vectors);
}

}  // namespace lamp
