#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "lamp.h"
#include "threads.h"
#include "vectors.h"

namespace lamp {
namespace {

// Three queries share what is read of the keys, which outgrow the first cache. Their twelve sums
// with four keys leave four of AVX2's sixteen registers for the operands.
constexpr int kQueriesAtOnce = 3;
constexpr int kKeysAtOnce = 4;
constexpr int64_t kRowsInPart = 6 * kQueriesAtOnce;

using Wide = Lanes<double>;
constexpr int kWide = kLanes<double>;
// Rows are followed by zeros up to a multiple of this.
constexpr int kPadding = 4 * kWide;

// [count, padded] whose rows begin with a cache line: a vector that lies in two is loaded twice.
class Rows {
 public:
  Rows(int64_t count, int64_t width)
      : padded(round_up(width, kPadding)), lines_(count * padded / kInLine) {}
  double* operator[](int64_t row) {
    return reinterpret_cast<double*>(lines_.data()) + row * padded;
  }
  const double* operator[](int64_t row) const {
    return reinterpret_cast<const double*>(lines_.data()) + row * padded;
  }

  const int64_t padded;

 private:
  static constexpr int kInLine = 8;
  static_assert(kPadding % kInLine == 0);
  struct alignas(kInLine * sizeof(double)) Line {
    double values[kInLine];
  };
  std::vector<Line> lines_;
};

LAMP_VECTOR_CLONES void widen(const float* __restrict from, int64_t count, double* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

void widen(const double* from, int64_t count, double* to) { std::copy(from, from + count, to); }

// queries [kQueriesAtOnce, padded] and keys [count, padded] -> out [kQueriesAtOnce, out_stride],
// which has room for count up to whole kKeysAtOnce.
LAMP_VECTOR_CLONES void dots(const double* queries, const double* keys, int64_t count,
                             int64_t padded, double* out, int64_t out_stride) {
  for (int64_t key = 0; key < count; key += kKeysAtOnce) {
    // The last ones repeat a key where there are fewer.
    const double* some[kKeysAtOnce];
    for (int64_t i = 0; i < kKeysAtOnce; ++i)
      some[i] = keys + std::min(key + i, count - 1) * padded;
    Wide sums[kQueriesAtOnce][1][kKeysAtOnce] = {};
    for (int64_t d = 0; d < padded; d += kWide) {
#pragma GCC unroll 4
      for (int i = 0; i < kKeysAtOnce; ++i) {
        const Wide of_key = load(some[i] + d);
#pragma GCC unroll 3
        for (int query = 0; query < kQueriesAtOnce; ++query)
          sums[query][0][i] += of_key * load(queries + query * padded + d);
      }
    }
#pragma GCC unroll 3
    for (int query = 0; query < kQueriesAtOnce; ++query)
      store(out + query * out_stride + key, sum_each(sums[query]));
  }
}

LAMP_VECTOR_CLONES double norm(const double* row, int64_t padded) {
  // An addition takes several cycles, so four sums at once.
  Wide sums[1][4] = {};
  for (int64_t d = 0; d < padded; d += kPadding) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Wide some = load(row + d + i * kWide);
      sums[0][i] += some * some;
    }
  }
  return std::sqrt(sum_of(sum_each(sums)));
}

// Products of float32 are exact in double and their sums neither overflow nor underflow, so the
// similarity is the cosine rounded once and implementations can agree on its bits.
template <typename T>
struct Pool {
  explicit Pool(const RetrieveParams& params)
      : keys(params.pool_size, params.width), norms(params.pool_size) {
    for (int64_t m = 0; m < params.pool_size; ++m) {
      const T* key = static_cast<const T*>(params.keys) + m * params.keys_stride;
      widen(key, params.width, keys[m]);
      norms[m] = norm(keys[m], keys.padded);
    }
  }
  Rows keys;                  // [M, D]
  std::vector<double> norms;  // [M]
};

template <typename T>
struct Scratch {
  Scratch(int64_t width, int64_t pool_size)
      : queries(kQueriesAtOnce, width),
        dots_stride(round_up(pool_size, kKeysAtOnce)),
        dots(kQueriesAtOnce * dots_stride),
        similarity(pool_size),
        scores(pool_size),
        order(pool_size) {}
  Rows queries;              // [kQueriesAtOnce, D]
  int64_t dots_stride;       // M and room up to whole kKeysAtOnce
  std::vector<double> dots;  // [kQueriesAtOnce, dots_stride]
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
      widen(query, params.width, scratch.queries[i]);
    }
    dots(scratch.queries[0], pool.keys[0], params.pool_size, pool.keys.padded, scratch.dots.data(),
         scratch.dots_stride);
    for (int64_t i = 0; i < block; ++i)
      choose(params, pool, norm(scratch.queries[i], pool.keys.padded),
             scratch.dots.data() + i * scratch.dots_stride, scratch,
             params.indices + (row + i) * params.k,
             static_cast<T*>(params.similarity) + (row + i) * params.k);
  }
}

template <typename T>
void retrieve_typed(const RetrieveParams& params) {
  const int64_t batch = params.batch, pool_size = params.pool_size, k = params.k;
  const Pool<T> pool(params);

  const int64_t parts = round_up(batch, kRowsInPart) / kRowsInPart;
  const int64_t threads = useful_threads(params.threads, batch * pool_size * params.width, parts);
  std::vector<Scratch<T>> scratch(threads, Scratch<T>(params.width, pool_size));
  for_each_part(parts, threads, params.threads, [&](int64_t part, int64_t thread) {
    const int64_t first = part * kRowsInPart, last = std::min(batch, first + kRowsInPart);
    retrieve_rows<T>(params, pool, first, last, scratch[thread]);
  });

  std::fill(params.counts, params.counts + pool_size, int64_t{0});
  const T* similarity = static_cast<const T*>(params.similarity);
  for (int64_t row = 0; row < batch; ++row)
    if (!std::isnan(similarity[row * k]))
      for (int64_t j = 0; j < k; ++j) ++params.counts[params.indices[row * k + j]];
}

// Gradients take columns apart, so that every sum runs over the batch in its order whatever the
// threads. One block of columns of the keys and of their gradients stays in the first cache.
constexpr int kColumns = 32;

// [rows, D] -> 1 / norm [rows]; 0 for a zero row.
template <typename T>
std::vector<double> inverse_norms(const T* rows, int64_t stride, int64_t count, int64_t width) {
  Rows row(1, width);
  std::vector<double> inverse(count);
  for (int64_t i = 0; i < count; ++i) {
    widen(rows + i * stride, width, row[0]);
    const double length = norm(row[0], row.padded);
    inverse[i] = length == 0 ? 0 : 1 / length;
  }
  return inverse;
}

// One (query, key) pair of a block: what the key adds to the query's gradient, and the query to the
// key's.
LAMP_VECTOR_CLONES void exchange(double weight, const double* __restrict key,
                                 double* __restrict query_sum, const double* __restrict query,
                                 double* __restrict key_sum) {
  for (int d = 0; d < kColumns; ++d) {
    query_sum[d] += weight * key[d];
    key_sum[d] += weight * query[d];
  }
}

template <typename T>
void retrieve_backward_columns(const RetrieveBackwardParams& params,
                               const std::vector<double>& inverse_query,
                               const std::vector<double>& inverse_keys,
                               const std::vector<double>& along_keys, int64_t first) {
  const RetrieveParams& forward = params.forward;
  const int64_t pool_size = forward.pool_size, k = forward.k, width = forward.width;
  const int64_t columns = std::min<int64_t>(kColumns, width - first);
  const T* grad = static_cast<const T*>(params.grad);
  const T* similarity = static_cast<const T*>(forward.similarity);
  std::vector<double> keys(pool_size * kColumns), key_sums(pool_size * kColumns);  // unit keys
  for (int64_t m = 0; m < pool_size; ++m) {
    const T* key = static_cast<const T*>(forward.keys) + m * forward.keys_stride + first;
    for (int64_t d = 0; d < columns; ++d) keys[m * kColumns + d] = key[d] * inverse_keys[m];
  }
  for (int64_t b = 0; b < forward.batch; ++b) {
    const T* query = static_cast<const T*>(forward.query) + b * forward.query_stride + first;
    double unit[kColumns] = {}, sum[kColumns] = {}, along = 0;
    for (int64_t d = 0; d < columns; ++d) unit[d] = query[d] * inverse_query[b];
    for (int64_t j = b * k; j < (b + 1) * k; ++j) {
      const int64_t m = forward.indices[j];
      const double weight = grad[j];
      exchange(weight, keys.data() + m * kColumns, sum, unit, key_sums.data() + m * kColumns);
      along += weight * similarity[j];
    }
    T* out = static_cast<T*>(params.grad_query) + b * width + first;
    for (int64_t d = 0; d < columns; ++d)
      out[d] = static_cast<T>((sum[d] - along * unit[d]) * inverse_query[b]);
  }
  for (int64_t m = 0; m < pool_size; ++m) {
    const double* key = keys.data() + m * kColumns;
    const double* sum = key_sums.data() + m * kColumns;
    T* out = static_cast<T*>(params.grad_keys) + m * width + first;
    for (int64_t d = 0; d < columns; ++d)
      out[d] = static_cast<T>((sum[d] - along_keys[m] * key[d]) * inverse_keys[m]);
  }
}

template <typename T>
void retrieve_backward_typed(const RetrieveBackwardParams& params) {
  const RetrieveParams& forward = params.forward;
  const auto inverse_query = inverse_norms(static_cast<const T*>(forward.query),
                                           forward.query_stride, forward.batch, forward.width);
  const auto inverse_keys = inverse_norms(static_cast<const T*>(forward.keys), forward.keys_stride,
                                          forward.pool_size, forward.width);
  const T* grad = static_cast<const T*>(params.grad);
  const T* similarity = static_cast<const T*>(forward.similarity);
  std::vector<double> along_keys(forward.pool_size);
  for (int64_t j = 0; j < forward.batch * forward.k; ++j)
    along_keys[forward.indices[j]] += static_cast<double>(grad[j]) * similarity[j];

  const int64_t parts = round_up(forward.width, kColumns) / kColumns;
  const int64_t work = 2 * forward.batch * forward.k * forward.width;
  const int64_t threads = useful_threads(forward.threads, work, parts);
  for_each_part(parts, threads, forward.threads, [&](int64_t part, int64_t) {
    retrieve_backward_columns<T>(params, inverse_query, inverse_keys, along_keys, part * kColumns);
  });
}

}  // namespace

void retrieve_cpu(const RetrieveParams& params) {
  if (params.dtype == Dtype::kFloat64)
    retrieve_typed<double>(params);
  else
    retrieve_typed<float>(params);
}

void retrieve_backward_cpu(const RetrieveBackwardParams& params) {
  if (params.forward.dtype == Dtype::kFloat64)
    retrieve_backward_typed<double>(params);
  else
    retrieve_backward_typed<float>(params);
}

}  // namespace lamp
