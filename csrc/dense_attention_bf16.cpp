// prefix_attention in bfloat16 where every row sees every key, as in an image tower, by the CPU's
// own products of bfloat16 (AVX512_BF16). Where a build or a machine has none, what is in
// prefix_attention.cpp serves such calls in float32.
//
// One instruction adds the products of two pairs of bfloat16 to each of 16 float32 sums. Its left
// operand is one pair of a row, read by all lanes; its right operand holds a pair of each of 16
// columns. So whatever stands on the right of a product is laid out in pairs first.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "prefix_attention.h"
#include "threads.h"
#include "vectors.h"

#if defined(__x86_64__) && (defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 10))
#define LAMP_HAS_BF16 1
#include <immintrin.h>
// GCC 12 warns of the undefined values inside its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#else
#define LAMP_HAS_BF16 0
#endif

namespace lamp {

#if LAMP_HAS_BF16

bool multiplies_bfloat16() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
}

namespace {

// Functions rather than the file are compiled for these instructions, or what they share with other
// files (templates of the standard library) would be, too.
#define LAMP_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define LAMP_BF16_INLINE [[gnu::always_inline]] LAMP_BF16 inline

using Half = uint16_t;  // the bits of a bfloat16
using Pair = uint32_t;  // two of them

constexpr int64_t kVector = 16;  // float32 sums, or pairs
// Sums in registers: 6 rows of 4 vectors leave 8 of 32 registers for the operands. Even, so that
// blocks of rows are whole pairs of rows.
constexpr int kRowsAtOnce = 6;
constexpr int kVectorsAtOnce = 4;

// out[i][column] = sum over steps of the products of pair `step` of row i with that of the column.
// Pairs of rows lie at left[i * row_stride + step * step_stride], of columns at
// right[step * right_stride + column]. Writes kRowsAtOnce rows, of which those from `rows` on
// repeat the last.
template <int Vectors>
LAMP_BF16_INLINE void product_block(const Pair* left, int64_t rows, int64_t row_stride,
                                    int64_t step_stride, const Pair* right, int64_t right_stride,
                                    int64_t steps, float* out, int64_t out_stride) {
  const Pair* row[kRowsAtOnce];
  __m512 sums[kRowsAtOnce][Vectors];
#pragma GCC unroll 6
  for (int i = 0; i < kRowsAtOnce; ++i) {
    row[i] = left + std::min<int64_t>(i, rows - 1) * row_stride;
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sums[i][v] = _mm512_setzero_ps();
  }
  for (int64_t step = 0, at = 0; step < steps; ++step, at += step_stride, right += right_stride) {
    __m512i columns[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) columns[v] = _mm512_loadu_si512(right + v * kVector);
#pragma GCC unroll 6
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const __m512i one = _mm512_set1_epi32(static_cast<int>(row[i][at]));
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v)
        sums[i][v] = _mm512_dpbf16_ps(sums[i][v], (__m512bh)one, (__m512bh)columns[v]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRowsAtOnce; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v)
      _mm512_storeu_ps(out + i * out_stride + v * kVector, sums[i][v]);
}

// product_block over all `columns`, whole vectors.
LAMP_BF16 void product(const Pair* left, int64_t rows, int64_t row_stride, int64_t step_stride,
                       const Pair* right, int64_t right_stride, int64_t steps, int64_t columns,
                       float* out, int64_t out_stride) {
  int64_t first = 0;
  for (; first + kVectorsAtOnce * kVector <= columns; first += kVectorsAtOnce * kVector)
    product_block<kVectorsAtOnce>(left, rows, row_stride, step_stride, right + first, right_stride,
                                  steps, out + first, out_stride);
  switch ((columns - first) / kVector) {
    case 3:
      return product_block<3>(left, rows, row_stride, step_stride, right + first, right_stride,
                              steps, out + first, out_stride);
    case 2:
      return product_block<2>(left, rows, row_stride, step_stride, right + first, right_stride,
                              steps, out + first, out_stride);
    case 1:
      return product_block<1>(left, rows, row_stride, step_stride, right + first, right_stride,
                              steps, out + first, out_stride);
  }
}

LAMP_BF16_INLINE __m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// [x of the first row, x of the second] for each of 16 columns.
LAMP_BF16_INLINE __m512i paired(__m256i first, __m256i second) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(first),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

// The rows [count, d] of one head -> [count, padded], zeros behind them.
void pack(const HeadRows& rows, int64_t sequence, int64_t head, int64_t count, int64_t width,
          int64_t padded, Half* packed) {
  const Half* from = static_cast<const Half*>(rows.data) + sequence * rows.sequence_stride +
                     head * rows.head_stride;
  for (int64_t i = 0; i < count; ++i, from += rows.row_stride, packed += padded) {
    std::copy(from, from + width, packed);
    std::fill(packed + width, packed + padded, Half{0});
  }
}

const Pair* pairs(const Half* row) { return reinterpret_cast<const Pair*>(row); }

// Rows [count, padded], count a multiple of kVector -> their pairs as columns [padded / 2, count].
void transpose(const Half* rows, int64_t count, int64_t padded, Pair* out) {
  const Pair* from = pairs(rows);
  const int64_t width = padded / 2;
  for (int64_t first = 0; first < count; first += kVector)
    for (int64_t c = 0; c < width; ++c)
      for (int64_t j = first; j < first + kVector; ++j) out[c * count + j] = from[j * width + c];
}

// Rows [count, padded], count even -> pairs of two rows [count / 2, padded].
LAMP_BF16 void pair_rows(const Half* rows, int64_t count, int64_t padded, Pair* out) {
  for (int64_t i = 0; i < count; i += 2, rows += 2 * padded, out += padded)
    for (int64_t d = 0; d < padded; d += kVector) {
      const auto* first = reinterpret_cast<const __m256i*>(rows + d);
      const auto* second = reinterpret_cast<const __m256i*>(rows + padded + d);
      _mm512_storeu_si512(out + d, paired(_mm256_loadu_si256(first), _mm256_loadu_si256(second)));
    }
}

// Row [padded] -> its first `width` numbers, rounded.
LAMP_BF16 void write_row(const float* row, int64_t width, Half* out) {
  for (int64_t d = 0; d < width; d += kVector) {
    const __mmask16 some = width - d >= kVector ? 0xffff : (1u << (width - d)) - 1;
    _mm256_mask_storeu_epi16(out + d, some, rounded(_mm512_loadu_ps(row + d)));
  }
}

LAMP_BF16_INLINE __m512 exponential16(__m512 x) {
  return (__m512)exponential_of<kVector>((Vector<float, kVector>)x);
}

struct Softmax {
  float largest, sum;
};

// Products of a row [keys and more] -> e^(scale product - largest), 0 behind `keys`.
LAMP_BF16_INLINE Softmax exponentials(float* row, int64_t keys, int64_t padded_keys, float scale) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  __m512 maxima = _mm512_set1_ps(-infinity), sums = _mm512_setzero_ps();
  for (int64_t j = 0; j < padded_keys; j += kVector) {
    const __mmask16 some = keys - j >= kVector ? 0xffff : (1u << (keys - j)) - 1;
    const __m512 scores = _mm512_mask_mul_ps(_mm512_set1_ps(-infinity), some,
                                             _mm512_loadu_ps(row + j), _mm512_set1_ps(scale));
    maxima = _mm512_max_ps(maxima, scores);
    _mm512_storeu_ps(row + j, scores);
  }
  const float largest = _mm512_reduce_max_ps(maxima);
  for (int64_t j = 0; j < padded_keys; j += kVector) {
    const __m512 scores = _mm512_loadu_ps(row + j);
    const __m512 some = exponential16(_mm512_sub_ps(scores, _mm512_set1_ps(largest)));
    sums = _mm512_add_ps(sums, some);
    _mm512_storeu_ps(row + j, some);
  }
  return {largest, _mm512_reduce_add_ps(sums)};
}

// What a thread works in.
struct Scratch {
  Scratch(const PrefixAttentionParams& params, bool backward)
      : keys(params.prefix_length + params.length),
        padded(round_up(params.width, kVector)),
        padded_keys(round_up(keys, kVector)),
        padded_rows(round_up(params.rows, kRowsAtOnce)),
        q(padded_rows * padded),
        k(padded_keys * padded),
        v(padded_keys * padded),
        k_columns(padded_keys * padded / 2),
        v_pairs(padded_keys * padded / 2),
        scores(kRowsAtOnce * padded_keys),
        halves(kRowsAtOnce * padded_keys),
        sums(kRowsAtOnce * padded) {
    if (!backward) return;
    grad.resize(q.size());
    v_columns.resize(k_columns.size());
    k_pairs.resize(k_columns.size());
    q_pairs.resize(q.size() / 2);
    grad_pairs.resize(q.size() / 2);
    slopes.resize(scores.size());
    weight_pairs.resize(padded_rows / 2 * padded_keys);
    slope_pairs.resize(weight_pairs.size());
    prefix.resize(2 * params.prefix_length * padded);
  }
  int64_t keys, padded, padded_keys, padded_rows;
  std::vector<Half> q;          // [rows, d], as are all tensors, padded in both
  std::vector<Half> k, v;       // [P + L, d]
  std::vector<Pair> k_columns;  // [d / 2, P + L]
  std::vector<Pair> v_pairs;    // [(P + L) / 2, d]
  std::vector<float> scores;    // [kRowsAtOnce, P + L]: products, then weights
  std::vector<Half> halves;     // [kRowsAtOnce, P + L]: weights, or gradients of products
  std::vector<float> sums;      // [kRowsAtOnce, d]
  // Backward.
  std::vector<Half> grad;                       // [rows, d]
  std::vector<Pair> v_columns, k_pairs;         // as those of the other
  std::vector<Pair> q_pairs, grad_pairs;        // [rows / 2, d]
  std::vector<float> slopes;                    // [kRowsAtOnce, P + L]: gradients of weights
  std::vector<Pair> weight_pairs, slope_pairs;  // [rows / 2, P + L]
  std::vector<float> prefix;  // [2, P, d]: sums of a prefix's gradients over its sequences
};

void pack_keys_and_values(const PrefixAttentionParams& params, int64_t sequence, int64_t prefix,
                          int64_t head, Scratch& scratch) {
  const int64_t padded = scratch.padded, own = params.prefix_length * padded;
  const int64_t width = params.width;
  pack(params.prefix_k, prefix, head, params.prefix_length, width, padded, scratch.k.data());
  pack(params.prefix_v, prefix, head, params.prefix_length, width, padded, scratch.v.data());
  pack(params.k, sequence, head, params.length, width, padded, scratch.k.data() + own);
  pack(params.v, sequence, head, params.length, width, padded, scratch.v.data() + own);
  transpose(scratch.k.data(), scratch.padded_keys, padded, scratch.k_columns.data());
}

LAMP_BF16 void forward_head(const PrefixAttentionParams& params, int64_t sequence, int64_t prefix,
                            int64_t head, Scratch& scratch) {
  const int64_t padded = scratch.padded, padded_keys = scratch.padded_keys;
  pack_keys_and_values(params, sequence, prefix, head, scratch);
  pair_rows(scratch.v.data(), padded_keys, padded, scratch.v_pairs.data());
  pack(params.q, sequence, head, params.rows, params.width, padded, scratch.q.data());
  Half* out = static_cast<Half*>(params.out.data) + sequence * params.out.sequence_stride +
              head * params.out.head_stride;
  float* lse = static_cast<float*>(params.lse) + (sequence * params.heads + head) * params.rows;
  for (int64_t first = 0; first < params.rows; first += kRowsAtOnce) {
    const int64_t rows = std::min<int64_t>(kRowsAtOnce, params.rows - first);
    product(pairs(scratch.q.data() + first * padded), rows, padded / 2, 1, scratch.k_columns.data(),
            padded_keys, padded / 2, padded_keys, scratch.scores.data(), padded_keys);
    float sum[kRowsAtOnce];
    for (int64_t i = 0; i < rows; ++i) {
      float* row = scratch.scores.data() + i * padded_keys;
      Half* half = scratch.halves.data() + i * padded_keys;
      const Softmax of_row =
          exponentials(row, scratch.keys, padded_keys, static_cast<float>(params.scale));
      lse[first + i] = of_row.largest + std::log(of_row.sum);
      sum[i] = of_row.sum;
      for (int64_t j = 0; j < padded_keys; j += kVector)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(half + j),
                            rounded(_mm512_loadu_ps(row + j)));
    }
    product(pairs(scratch.halves.data()), rows, padded_keys / 2, 1, scratch.v_pairs.data(), padded,
            padded_keys / 2, padded, scratch.sums.data(), padded);
    for (int64_t i = 0; i < rows; ++i) {
      float* row = scratch.sums.data() + i * padded;
      for (int64_t d = 0; d < padded; ++d) row[d] /= sum[i];
      write_row(row, params.width, out + (first + i) * params.out.row_stride);
    }
  }
}

// Two rows [keys] -> pairs of them.
LAMP_BF16_INLINE void pair_floats(const float* first, const float* second, int64_t keys,
                                  Pair* out) {
  for (int64_t j = 0; j < keys; j += kVector)
    _mm512_storeu_si512(
        out + j, paired(rounded(_mm512_loadu_ps(first + j)), rounded(_mm512_loadu_ps(second + j))));
}

// Weights and the gradients of products of rows [first, first + rows): in floats, in slopes.
LAMP_BF16 void slopes_of_rows(const PrefixAttentionParams& params, int64_t first, int64_t rows,
                              Scratch& scratch) {
  const int64_t padded = scratch.padded, padded_keys = scratch.padded_keys;
  const float scale = static_cast<float>(params.scale);
  product(pairs(scratch.q.data() + first * padded), rows, padded / 2, 1, scratch.k_columns.data(),
          padded_keys, padded / 2, padded_keys, scratch.scores.data(), padded_keys);
  product(pairs(scratch.grad.data() + first * padded), rows, padded / 2, 1,
          scratch.v_columns.data(), padded_keys, padded / 2, padded_keys, scratch.slopes.data(),
          padded_keys);
  for (int64_t i = 0; i < kRowsAtOnce; ++i) {
    float* weights = scratch.scores.data() + i * padded_keys;
    float* slopes = scratch.slopes.data() + i * padded_keys;
    if (i >= rows) {
      std::fill(weights, weights + padded_keys, 0.f);
      std::fill(slopes, slopes + padded_keys, 0.f);
      continue;
    }
    const Softmax of_row = exponentials(weights, scratch.keys, padded_keys, scale);
    const __m512 inverse = _mm512_set1_ps(1 / of_row.sum);
    __m512 sums = _mm512_setzero_ps();
    for (int64_t j = 0; j < padded_keys; j += kVector) {
      const __m512 weight = _mm512_mul_ps(_mm512_loadu_ps(weights + j), inverse);
      _mm512_storeu_ps(weights + j, weight);
      sums = _mm512_fmadd_ps(weight, _mm512_loadu_ps(slopes + j), sums);
    }
    // From the weights rather than from the rounded output, which does not tell it.
    const __m512 along = _mm512_set1_ps(_mm512_reduce_add_ps(sums));
    for (int64_t j = 0; j < padded_keys; j += kVector) {
      const __m512 slope = _mm512_sub_ps(_mm512_loadu_ps(slopes + j), along);
      const __m512 weight = _mm512_mul_ps(_mm512_loadu_ps(weights + j), _mm512_set1_ps(scale));
      _mm512_storeu_ps(slopes + j, _mm512_mul_ps(weight, slope));
    }
  }
}

// Gradients of the keys (or of the values) of one head of one sequence: those of the prefix are
// added to `prefix` [P, padded]; those of the sequence written.
void gradients_of_keys(const PrefixAttentionParams& params, const std::vector<Pair>& weights,
                       const std::vector<Pair>& right, bool needs_prefix, const HeadRows& own,
                       int64_t sequence, int64_t head, float* prefix, Scratch& scratch) {
  const int64_t padded = scratch.padded, padded_keys = scratch.padded_keys;
  const int64_t begin = needs_prefix ? 0 : params.prefix_length;
  const int64_t end = own.data != nullptr ? scratch.keys : params.prefix_length;
  Half* out =
      static_cast<Half*>(own.data) + sequence * own.sequence_stride + head * own.head_stride;
  for (int64_t first = begin; first < end; first += kRowsAtOnce) {
    const int64_t rows = std::min<int64_t>(kRowsAtOnce, end - first);
    product(weights.data() + first, rows, 1, padded_keys, right.data(), padded,
            scratch.padded_rows / 2, padded, scratch.sums.data(), padded);
    for (int64_t i = 0; i < rows; ++i) {
      const float* row = scratch.sums.data() + i * padded;
      const int64_t own_row = first + i - params.prefix_length;
      if (own_row >= 0)
        write_row(row, params.width, out + own_row * own.row_stride);
      else
        for (int64_t d = 0; d < padded; ++d) prefix[(first + i) * padded + d] += row[d];
    }
  }
}

LAMP_BF16 void backward_head(const PrefixAttentionBackwardParams& params, int64_t sequence,
                             int64_t prefix, int64_t head, Scratch& scratch) {
  const PrefixAttentionParams& forward = params.forward;
  const int64_t padded = scratch.padded, padded_keys = scratch.padded_keys;
  const bool needs_own = params.grad_q.data != nullptr;
  const bool needs_prefix = params.grad_prefix_k.data != nullptr;
  pack_keys_and_values(forward, sequence, prefix, head, scratch);
  transpose(scratch.v.data(), padded_keys, padded, scratch.v_columns.data());
  pack(forward.q, sequence, head, forward.rows, forward.width, padded, scratch.q.data());
  pack(params.grad, sequence, head, forward.rows, forward.width, padded, scratch.grad.data());
  pair_rows(scratch.k.data(), padded_keys, padded, scratch.k_pairs.data());
  pair_rows(scratch.q.data(), scratch.padded_rows, padded, scratch.q_pairs.data());
  pair_rows(scratch.grad.data(), scratch.padded_rows, padded, scratch.grad_pairs.data());
  for (int64_t first = 0; first < forward.rows; first += kRowsAtOnce) {
    const int64_t rows = std::min<int64_t>(kRowsAtOnce, forward.rows - first);
    slopes_of_rows(forward, first, rows, scratch);
    for (int64_t i = 0; i < kRowsAtOnce; i += 2) {
      const int64_t row = i * padded_keys, place = (first + i) / 2 * padded_keys;
      const float* weights = scratch.scores.data() + row;
      const float* slopes = scratch.slopes.data() + row;
      pair_floats(weights, weights + padded_keys, padded_keys, scratch.weight_pairs.data() + place);
      pair_floats(slopes, slopes + padded_keys, padded_keys, scratch.slope_pairs.data() + place);
    }
    if (!needs_own) continue;
    for (int64_t j = 0; j < rows * padded_keys; j += kVector)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(scratch.halves.data() + j),
                          rounded(_mm512_loadu_ps(scratch.slopes.data() + j)));
    product(pairs(scratch.halves.data()), rows, padded_keys / 2, 1, scratch.k_pairs.data(), padded,
            padded_keys / 2, padded, scratch.sums.data(), padded);
    Half* out = static_cast<Half*>(params.grad_q.data) + sequence * params.grad_q.sequence_stride +
                head * params.grad_q.head_stride;
    for (int64_t i = 0; i < rows; ++i)
      write_row(scratch.sums.data() + i * padded, forward.width,
                out + (first + i) * params.grad_q.row_stride);
  }
  float* sums = scratch.prefix.data();
  gradients_of_keys(forward, scratch.slope_pairs, scratch.q_pairs, needs_prefix, params.grad_k,
                    sequence, head, sums, scratch);
  gradients_of_keys(forward, scratch.weight_pairs, scratch.grad_pairs, needs_prefix, params.grad_v,
                    sequence, head, sums + forward.prefix_length * padded, scratch);
}

// [P, padded] -> the float32 gradient of one head of one prefix.
void write_prefix(const PrefixAttentionParams& params, const float* sums, const HeadRows& rows,
                  int64_t prefix, int64_t head, int64_t padded) {
  float* out =
      static_cast<float*>(rows.data) + prefix * rows.sequence_stride + head * rows.head_stride;
  for (int64_t i = 0; i < params.prefix_length; ++i, sums += padded, out += rows.row_stride)
    std::copy(sums, sums + params.width, out);
}

// Calls run(item, scratch) for all items; `products` is how many of two rows all of them form.
template <typename Run>
void for_each_item(const PrefixAttentionParams& params, int64_t items, int64_t products,
                   bool backward, const Run& run) {
  if (items == 0) return;
  // A product of two pairs is an instruction of 16, so it takes half the time of what is counted.
  const int64_t entries = params.rows * (params.prefix_length + params.length);
  const int64_t work = products * entries * params.sequences * params.heads * params.width / 2;
  const int64_t threads = useful_threads(params.threads, work, items);
  const int64_t parts = threads == 1 ? 1 : std::min(items, threads * kPartsPerThread);
  std::vector<Scratch> scratch(threads, Scratch(params, backward));
  for_each_part(parts, threads, params.threads, [&](int64_t part, int64_t thread) {
    for (int64_t i = items * part / parts; i < items * (part + 1) / parts; ++i)
      run(i, scratch[thread]);
  });
}

}  // namespace

void dense_attention_bf16(const PrefixAttentionParams& params) {
  const Readers readers(params);
  const int64_t items = params.sequences * params.heads;
  for_each_item(params, items, 2, false, [&](int64_t i, Scratch& scratch) {
    const int64_t sequence = i / params.heads;
    forward_head(params, sequence, readers.prefix[sequence], i % params.heads, scratch);
  });
}

void dense_attention_bf16_backward(const PrefixAttentionBackwardParams& given) {
  PrefixAttentionBackwardParams params = given;
  PrefixAttentionParams& forward = params.forward;
  if (forward.prefix_length == 0) {
    // Sequences that share an empty prefix share nothing.
    forward.groups = forward.sequences;
    forward.prefix_index = nullptr;
  }
  const Readers readers(forward);
  const int64_t items = forward.groups * forward.heads;
  // A head of a prefix in all sequences that read it, so that its gradients are summed in their
  // order.
  for_each_item(forward, items, 5, true, [&](int64_t item, Scratch& scratch) {
    const int64_t prefix = item / forward.heads, head = item % forward.heads;
    std::fill(scratch.prefix.begin(), scratch.prefix.end(), 0.f);
    for (int64_t i = readers.start[prefix]; i < readers.start[prefix + 1]; ++i)
      backward_head(params, readers.sequence[i], prefix, head, scratch);
    if (params.grad_prefix_k.data == nullptr) return;
    const float* sums = scratch.prefix.data();
    write_prefix(forward, sums, params.grad_prefix_k, prefix, head, scratch.padded);
    sums += forward.prefix_length * scratch.padded;
    write_prefix(forward, sums, params.grad_prefix_v, prefix, head, scratch.padded);
  });
}

#else

bool multiplies_bfloat16() { return false; }

void dense_attention_bf16(const PrefixAttentionParams&) {
  throw std::logic_error("dense_attention_bf16: this build has no products of bfloat16");
}

void dense_attention_bf16_backward(const PrefixAttentionBackwardParams&) {
  throw std::logic_error("dense_attention_bf16_backward: this build has no products of bfloat16");
}

#endif

}  // namespace lamp
