#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <system_error>
#include <thread>
#include <vector>

#include "lamp.h"

// The loader picks the widest vectors that the machine has. All versions sum in the same order and
// none contracts a * b + c, so the bits are the same on every machine.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define LAMP_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#endif
#ifndef LAMP_VECTOR_CLONES
#define LAMP_VECTOR_CLONES
#endif

namespace lamp {
namespace {

constexpr int kLanes = 8;
// Pairs of queries share what is read of the keys, which outgrow the first cache.
constexpr int kQueriesAtOnce = 2;
constexpr int kKeysAtOnce = 4;
// Starting a thread costs about as much as this many multiply-adds, some tens of microseconds.
constexpr int64_t kWorkPerThread = 1 << 21;

// A vector type rather than an array: GCC keeps it in registers. Aligned as its elements are, and
// allowed to look at them.
using Lanes [[gnu::vector_size(kLanes * sizeof(double)), gnu::aligned(8), gnu::may_alias]] = double;

template <int Keys>
[[gnu::always_inline]] inline void dot(const double* queries, const double* keys, int64_t padded,
                                       double* out, int64_t out_stride) {
  Lanes sums[kQueriesAtOnce][Keys] = {};
  for (int64_t d = 0; d < padded; d += kLanes) {
#pragma GCC unroll 8
    for (int key = 0; key < Keys; ++key) {
      const Lanes some = *reinterpret_cast<const Lanes*>(keys + key * padded + d);
#pragma GCC unroll 8
      for (int query = 0; query < kQueriesAtOnce; ++query)
        sums[query][key] += some * *reinterpret_cast<const Lanes*>(queries + query * padded + d);
    }
  }
#pragma GCC unroll 8
  for (int query = 0; query < kQueriesAtOnce; ++query) {
#pragma GCC unroll 8
    for (int key = 0; key < Keys; ++key) {
      const Lanes sum = sums[query][key];
      out[query * out_stride + key] =
          ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
    }
  }
}

// queries [kQueriesAtOnce, padded] and keys [count, padded] -> out [kQueriesAtOnce, count].
LAMP_VECTOR_CLONES void dots(const double* queries, const double* keys, int64_t count,
                             int64_t padded, double* out) {
  int64_t key = 0;
  for (; key + kKeysAtOnce <= count; key += kKeysAtOnce)
    dot<kKeysAtOnce>(queries, keys + key * padded, padded, out + key, count);
  for (; key < count; ++key) dot<1>(queries, keys + key * padded, padded, out + key, count);
}

double norm(const double* row, int64_t padded) {
  Lanes sums = {};
  for (int64_t d = 0; d < padded; d += kLanes) {
    const Lanes some = *reinterpret_cast<const Lanes*>(row + d);
    sums += some * some;
  }
  double square = 0;
  for (int lane = 0; lane < kLanes; ++lane) square += sums[lane];
  return std::sqrt(square);
}

// Products of float32 are exact in double and their sums neither overflow nor underflow, so the
// similarity is the cosine rounded once and implementations can agree on its bits.
template <typename T>
struct Pool {
  explicit Pool(const RetrieveParams& params)
      : padded((params.width + kLanes - 1) / kLanes * kLanes),
        keys(params.pool_size * padded),
        norms(params.pool_size) {
    for (int64_t m = 0; m < params.pool_size; ++m) {
      const T* key = static_cast<const T*>(params.keys) + m * params.keys_stride;
      double* row = keys.data() + m * padded;
      std::copy(key, key + params.width, row);
      norms[m] = norm(row, padded);
    }
  }
  int64_t padded;            // D and zeros up to whole vectors
  std::vector<double> keys;  // [M, padded]
  std::vector<double> norms;
};

template <typename T>
struct Scratch {
  Scratch(int64_t padded, int64_t pool_size)
      : queries(kQueriesAtOnce * padded),
        dots(kQueriesAtOnce * pool_size),
        similarity(pool_size),
        scores(pool_size),
        order(pool_size) {}
  std::vector<double> queries;  // [kQueriesAtOnce, padded]
  std::vector<double> dots;     // [kQueriesAtOnce, M]
  std::vector<T> similarity;
  std::vector<T> scores;
  std::vector<int64_t> order;
};

// From one query's dot products [M] to its outputs [k].
template <typename T>
void choose(const RetrieveParams& params, const Pool<T>& pool, double query_norm,
            const double* dots, Scratch<T>& scratch, int64_t* indices, T* similarity) {
  const int64_t pool_size = params.pool_size, k = params.k;
  const T* bias = static_cast<const T*>(params.bias);
  bool any_nan = false;
  for (int64_t m = 0; m < pool_size; ++m) {
    const double length = query_norm * pool.norms[m];
    // The product with a zero row is zero already, or NaN if the other row is not finite.
    scratch.similarity[m] = static_cast<T>(length == 0 ? dots[m] : dots[m] / length);
    scratch.scores[m] = scratch.similarity[m] + bias[m];
    any_nan |= std::isnan(scratch.scores[m]);
  }
  if (any_nan) {
    std::iota(indices, indices + k, int64_t{0});
    std::fill(similarity, similarity + k, std::numeric_limits<T>::quiet_NaN());
    return;
  }
  int64_t* order = scratch.order.data();
  const T* scores = scratch.scores.data();
  std::iota(order, order + pool_size, int64_t{0});
  std::nth_element(order, order + (k - 1), order + pool_size, [scores](int64_t a, int64_t b) {
    return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
  });
  std::sort(order, order + k);
  std::copy(order, order + k, indices);
  for (int64_t j = 0; j < k; ++j) similarity[j] = scratch.similarity[indices[j]];
}

template <typename T>
void retrieve_rows(const RetrieveParams& params, const Pool<T>& pool, int64_t first, int64_t last,
                   Scratch<T>& scratch) {
  for (int64_t row = first; row < last; row += kQueriesAtOnce) {
    const int64_t block = std::min<int64_t>(kQueriesAtOnce, last - row);
    for (int64_t i = 0; i < block; ++i) {
      const T* query = static_cast<const T*>(params.query) + (row + i) * params.query_stride;
      std::copy(query, query + params.width, scratch.queries.data() + i * pool.padded);
    }
    dots(scratch.queries.data(), pool.keys.data(), params.pool_size, pool.padded,
         scratch.dots.data());
    for (int64_t i = 0; i < block; ++i)
      choose(params, pool, norm(scratch.queries.data() + i * pool.padded, pool.padded),
             scratch.dots.data() + i * params.pool_size, scratch,
             params.indices + (row + i) * params.k,
             static_cast<T*>(params.similarity) + (row + i) * params.k);
  }
}

template <typename T>
void retrieve_typed(const RetrieveParams& params) {
  const int64_t batch = params.batch, pool_size = params.pool_size, k = params.k;
  const Pool<T> pool(params);

  const int64_t useful = batch * pool_size * params.width / kWorkPerThread;
  const int64_t parts =
      std::max<int64_t>(1, std::min({static_cast<int64_t>(params.threads), useful, batch}));
  std::vector<Scratch<T>> scratch(parts, Scratch<T>(pool.padded, pool_size));
  const auto run_part = [&](int64_t part) {
    retrieve_rows<T>(params, pool, batch * part / parts, batch * (part + 1) / parts, scratch[part]);
  };
  // Threads live for one call: a pool would be lost, and waited for, in a forked data worker.
  std::vector<std::thread> threads;
  threads.reserve(parts - 1);
  int64_t next = 1;
  try {
    for (; next < parts; ++next) threads.emplace_back(run_part, next);
  } catch (const std::system_error&) {
    // The machine gives no more threads: this one does what is left.
  }
  run_part(0);
  for (; next < parts; ++next) run_part(next);
  for (std::thread& thread : threads) thread.join();

  std::fill(params.counts, params.counts + pool_size, int64_t{0});
  const T* similarity = static_cast<const T*>(params.similarity);
  for (int64_t row = 0; row < batch; ++row)
    if (!std::isnan(similarity[row * k]))
      for (int64_t j = 0; j < k; ++j) ++params.counts[params.indices[row * k + j]];
}

}  // namespace

void retrieve_cpu(const RetrieveParams& params) {
  if (params.dtype == Dtype::kFloat64)
    retrieve_typed<double>(params);
  else
    retrieve_typed<float>(params);
}

}  // namespace lamp
