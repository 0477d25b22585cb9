#include "prefix_attention.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace lamp {
namespace {

constexpr int kKeysAtOnce = 4;
// So many vectors of a row are summed in registers at once.
constexpr int kVectorsAtOnce = 8;

// Which keys each query row sees, alike in all sequences and heads: a list per row (entries, in the
// order of the rows), and the same pairs as a list per key. Keys are those of the prefix, then
// those of the sequence.
struct Visible {
  explicit Visible(const PrefixAttentionParams& params)
      : keys(params.prefix_length + params.length), row_start(params.rows + 1) {
    std::vector<int64_t> row(keys);
    for (int64_t i = 0; i < params.rows; ++i) {
      const int64_t count = params.mask == nullptr ? from_rule(params, i, row.data())
                                                   : from_mask(params, i, row.data());
      key.insert(key.end(), row.begin(), row.begin() + count);
      row_start[i + 1] = row_start[i] + count;
      most = std::max(most, count);
    }
    transpose();
  }

  int64_t from_rule(const PrefixAttentionParams& params, int64_t i, int64_t* seen) const {
    const int64_t place = params.length - params.rows + i;
    const int64_t first = place < params.blind ? params.prefix_length : 0;
    const int64_t last = params.causal ? params.prefix_length + place + 1 : keys;
    std::iota(seen, seen + (last - first), first);
    return last - first;
  }

  int64_t from_mask(const PrefixAttentionParams& params, int64_t i, int64_t* seen) const {
    const bool* mask = params.mask + i * keys;
    int64_t count = 0;
    // A branch would be guessed wrong at almost every visible key.
    for (int64_t j = 0; j < keys; ++j) {
      seen[count] = j;
      count += mask[j];
    }
    return count;
  }

  void transpose() {
    key_start.resize(keys + 1);
    for (const int64_t j : key) ++key_start[j + 1];
    std::partial_sum(key_start.begin(), key_start.end(), key_start.begin());
    std::vector<int64_t> next(key_start.begin(), key_start.end() - 1);
    row.resize(key.size());
    place.resize(key.size());
    for (int64_t i = 0; i + 1 < static_cast<int64_t>(row_start.size()); ++i) {
      for (int64_t entry = row_start[i]; entry < row_start[i + 1]; ++entry) {
        place[entry] = next[key[entry]]++;
        row[place[entry]] = i;
      }
    }
  }

  int64_t keys;                    // P + L
  int64_t most = 0;                // keys that one row sees
  std::vector<int64_t> row_start;  // [R + 1]
  std::vector<int64_t> key;        // [entries]
  std::vector<int64_t> place;      // [entries], where the pair is in the list per key
  std::vector<int64_t> key_start;  // [P + L + 1]
  std::vector<int64_t> row;        // [entries], in the order of the keys
};

template <typename T>
T* rows_of(const HeadRows& tensor, int64_t sequence, int64_t head) {
  return static_cast<T*>(tensor.data) + sequence * tensor.sequence_stride +
         head * tensor.head_stride;
}

// What a thread works in, for tensors of Stored. Rows are copied one behind the other: where a
// fused projection leaves them they are a power of two apart, or nearly, and push one another out
// of the first cache.
template <typename Stored>
struct Scratch {
  using T = Computed<Stored>;
  Scratch(const PrefixAttentionParams& params, const Visible& visible, bool backward)
      : padded(round_up(params.width, kLanes<T>)),
        q(params.rows * padded),
        k(visible.keys * padded),
        v(visible.keys * padded),
        weights(round_up(visible.most, kLanes<T>)),
        sum(padded) {
    if (!backward) return;
    grad.resize(params.rows * padded);
    slopes.resize(weights.size());
    weights_by_key.resize(visible.key.size());
    slopes_by_key.resize(visible.key.size());
  }
  int64_t padded;          // d and zeros up to whole vectors
  std::vector<T> q;        // [R, padded]
  std::vector<T> k, v;     // [P + L, padded]
  std::vector<T> grad;     // [R, padded]
  std::vector<T> weights;  // of one row: scores, then the softmax
  std::vector<T> slopes;   // of one row: gradients of the weights, then of the products
  std::vector<T> weights_by_key, slopes_by_key;  // [entries], in the order of the keys
  std::vector<T> sum;                            // [padded]
};

// The rows [count, d] of one head -> packed [count, padded]. The next head is asked for meanwhile.
template <typename Stored, typename T>
[[gnu::always_inline]] inline void pack(const HeadRows& rows, int64_t sequence, int64_t head,
                                        int64_t count, int64_t width, int64_t padded, T* packed) {
  const Stored* from = rows_of<const Stored>(rows, sequence, head);
  for (int64_t i = 0; i < count; ++i, from += rows.row_stride, packed += padded) {
    int64_t d = 0;
    for (; d + kLanes<T> <= width; d += kLanes<T>) {
      __builtin_prefetch(from + rows.head_stride + d);
      store(packed + d, load(from + d));
    }
    for (; d < width; ++d) packed[d] = from[d];
    for (; d < padded; ++d) packed[d] = 0;
  }
}

// One row's products with a vectorful of packed rows, the first ones of which[0, count); what is
// beyond them repeats the last or is 0.
template <typename T>
[[gnu::always_inline]] inline Lanes<T> dots(const T* one, const T* packed, const int64_t* which,
                                            int64_t count, int64_t padded) {
  constexpr int fours = kLanes<T> / kKeysAtOnce;
  Lanes<T> sums[fours][kKeysAtOnce] = {};
#pragma GCC unroll 2
  for (int four = 0; four < fours; ++four) {
    const int64_t first = four * kKeysAtOnce, last = count - 1;
    if (first > last) break;
    const T* a = packed + which[first] * padded;
    const T* b = packed + which[std::min(first + 1, last)] * padded;
    const T* c = packed + which[std::min(first + 2, last)] * padded;
    const T* d = packed + which[std::min(first + 3, last)] * padded;
    Lanes<T> sum_a = {}, sum_b = {}, sum_c = {}, sum_d = {};
    for (int64_t i = 0; i < padded; i += kLanes<T>) {
      const Lanes<T> some = load(one + i);
      sum_a += some * load(a + i);
      sum_b += some * load(b + i);
      sum_c += some * load(c + i);
      sum_d += some * load(d + i);
    }
    sums[four][0] = sum_a;
    sums[four][1] = sum_b;
    sums[four][2] = sum_c;
    sums[four][3] = sum_d;
  }
  return sum_each(sums);
}

template <typename T, int Vectors>
[[gnu::always_inline]] inline void sum_block(const T* weights, const T* packed,
                                             const int64_t* which, int64_t count, int64_t padded,
                                             T* out) {
  Lanes<T> sums[Vectors] = {};
  for (int64_t j = 0; j < count; ++j) {
    const T weight = weights[j];
    const T* row = packed + which[j] * padded;
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i) sums[i] += weight * load(row + i * kLanes<T>);
  }
#pragma GCC unroll 8
  for (int i = 0; i < Vectors; ++i) store(out + i * kLanes<T>, sums[i]);
}

// The weighted sum of some of the packed rows: out [padded].
template <typename T>
[[gnu::always_inline]] inline void weighted_sum(const T* weights, const T* packed,
                                                const int64_t* which, int64_t count, int64_t padded,
                                                T* out) {
  constexpr int64_t block = kVectorsAtOnce * kLanes<T>;
  int64_t d = 0;
  for (; d + block <= padded; d += block)
    sum_block<T, kVectorsAtOnce>(weights, packed + d, which, count, padded, out + d);
  for (; d < padded; d += kLanes<T>)
    sum_block<T, 1>(weights, packed + d, which, count, padded, out + d);
}

template <typename T>
struct Softmax {
  T largest, sum;  // of the scores, and of the weights before they were divided by it
};

// The weights of the keys that one row sees [count]; 0 behind them up to whole vectors.
template <typename T>
[[gnu::always_inline]] inline Softmax<T> softmax(const T* query, const T* keys, const int64_t* seen,
                                                 int64_t count, int64_t padded, T scale,
                                                 T* weights) {
  constexpr T infinity = std::numeric_limits<T>::infinity();
  Lanes<T> lane, maxima = Lanes<T>{} - infinity;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  for (int64_t j = 0; j < count; j += kLanes<T>) {
    Lanes<T> scores = dots(query, keys, seen + j, count - j, padded) * scale;
    scores = lane < static_cast<T>(count - j) ? scores : Lanes<T>{} - infinity;
    maxima = maxima > scores ? maxima : scores;
    store(weights + j, scores);
  }
  T largest = -infinity;
  for (int i = 0; i < kLanes<T>; ++i) largest = std::max(largest, maxima[i]);
  Lanes<T> sums = {};
  for (int64_t j = 0; j < count; j += kLanes<T>) {
    const Lanes<T> some = exponential(load(weights + j) - largest);
    store(weights + j, some);
    sums += some;
  }
  const T sum = sum_of(sums), inverse = 1 / sum;
  for (int64_t j = 0; j < count; j += kLanes<T>) store(weights + j, load(weights + j) * inverse);
  return {largest, sum};
}

// The gradients of one row's products with the keys that it sees [count], by its weights.
template <typename T>
[[gnu::always_inline]] inline void softmax_backward(const T* grad, const T* values,
                                                    const int64_t* seen, int64_t count,
                                                    int64_t padded, T scale, const T* weights,
                                                    T* slopes) {
  Lanes<T> sums = {};
  for (int64_t j = 0; j < count; j += kLanes<T>) {
    const Lanes<T> some = dots(grad, values, seen + j, count - j, padded);
    store(slopes + j, some);
    sums += load(weights + j) * some;
  }
  const T along = sum_of(sums);
  for (int64_t j = 0; j < count; j += kLanes<T>)
    store(slopes + j, load(weights + j) * (load(slopes + j) - along) * scale);
}

template <typename Stored>
[[gnu::always_inline]] inline void pack_keys_and_values(const PrefixAttentionParams& params,
                                                        int64_t sequence, int64_t prefix,
                                                        int64_t head, Scratch<Stored>& scratch) {
  const int64_t padded = scratch.padded, own = params.prefix_length * padded;
  const int64_t prefix_length = params.prefix_length, length = params.length;
  pack<Stored>(params.prefix_k, prefix, head, prefix_length, params.width, padded,
               scratch.k.data());
  pack<Stored>(params.prefix_v, prefix, head, prefix_length, params.width, padded,
               scratch.v.data());
  pack<Stored>(params.k, sequence, head, length, params.width, padded, scratch.k.data() + own);
  pack<Stored>(params.v, sequence, head, length, params.width, padded, scratch.v.data() + own);
}

template <typename Stored>
[[gnu::always_inline]] inline void forward_head(const PrefixAttentionParams& params,
                                                const Visible& visible, int64_t sequence,
                                                int64_t prefix, int64_t head,
                                                Scratch<Stored>& scratch) {
  using T = Computed<Stored>;
  const int64_t padded = scratch.padded, width = params.width;
  pack_keys_and_values(params, sequence, prefix, head, scratch);
  pack<Stored>(params.q, sequence, head, params.rows, width, padded, scratch.q.data());
  Stored* out = rows_of<Stored>(params.out, sequence, head);
  T* lse = static_cast<T*>(params.lse) + (sequence * params.heads + head) * params.rows;
  for (int64_t i = 0; i < params.rows; ++i) {
    const int64_t* seen = visible.key.data() + visible.row_start[i];
    const int64_t count = visible.row_start[i + 1] - visible.row_start[i];
    T* weights = scratch.weights.data();
    const Softmax<T> row = softmax(scratch.q.data() + i * padded, scratch.k.data(), seen, count,
                                   padded, static_cast<T>(params.scale), weights);
    lse[i] = row.largest + std::log(row.sum);
    weighted_sum(weights, scratch.v.data(), seen, count, padded, scratch.sum.data());
    std::copy(scratch.sum.data(), scratch.sum.data() + width, out + i * params.out.row_stride);
  }
}

// Gradients of the rows [first, last) of the keys (or of the values) of one head of one sequence:
// sums of the packed rows by the weights of those that see each. They overwrite out, or add to it.
template <bool Add, typename T, typename Stored>
[[gnu::always_inline]] inline void gradients_of_keys(const Visible& visible, int64_t first,
                                                     int64_t last, const T* weights_by_key,
                                                     const T* packed, T* sum, int64_t padded,
                                                     int64_t width, Stored* out,
                                                     int64_t out_stride) {
  for (int64_t j = first; j < last; ++j, out += out_stride) {
    const int64_t start = visible.key_start[j];
    weighted_sum(weights_by_key + start, packed, visible.row.data() + start,
                 visible.key_start[j + 1] - start, padded, sum);
    if constexpr (Add)
      for (int64_t d = 0; d < width; ++d) out[d] += sum[d];
    else
      std::copy(sum, sum + width, out);
  }
}

// The softmax is formed as in forward rather than from lse, which does not resolve the weights of
// huge scores, and its product with the gradient from the weights rather than from the rounded
// output: neither is read.
template <typename Stored>
[[gnu::always_inline]] inline void backward_head(const PrefixAttentionBackwardParams& params,
                                                 const Visible& visible, int64_t sequence,
                                                 int64_t prefix, int64_t head,
                                                 Scratch<Stored>& scratch) {
  using T = Computed<Stored>;
  const PrefixAttentionParams& forward = params.forward;
  const int64_t padded = scratch.padded, width = forward.width;
  const int64_t prefix_length = forward.prefix_length;
  const T scale = static_cast<T>(forward.scale);
  const bool needs_own = params.grad_q.data != nullptr;
  T* sum = scratch.sum.data();
  pack_keys_and_values(forward, sequence, prefix, head, scratch);
  pack<Stored>(forward.q, sequence, head, forward.rows, width, padded, scratch.q.data());
  pack<Stored>(params.grad, sequence, head, forward.rows, width, padded, scratch.grad.data());
  for (int64_t i = 0; i < forward.rows; ++i) {
    const int64_t start = visible.row_start[i], count = visible.row_start[i + 1] - start;
    const int64_t* seen = visible.key.data() + start;
    T* weights = scratch.weights.data();
    T* slopes = scratch.slopes.data();
    softmax(scratch.q.data() + i * padded, scratch.k.data(), seen, count, padded, scale, weights);
    softmax_backward(scratch.grad.data() + i * padded, scratch.v.data(), seen, count, padded, scale,
                     weights, slopes);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t place = visible.place[start + j];
      scratch.weights_by_key[place] = weights[j];
      scratch.slopes_by_key[place] = slopes[j];
    }
    if (!needs_own) continue;
    weighted_sum(slopes, scratch.k.data(), seen, count, padded, sum);
    std::copy(sum, sum + width,
              rows_of<Stored>(params.grad_q, sequence, head) + i * params.grad_q.row_stride);
  }
  const auto gradients = [&](auto add, int64_t first, int64_t last, auto* of_k, int64_t k_stride,
                             auto* of_v, int64_t v_stride) __attribute__((always_inline)) {
    gradients_of_keys<add>(visible, first, last, scratch.slopes_by_key.data(), scratch.q.data(),
                           sum, padded, width, of_k, k_stride);
    gradients_of_keys<add>(visible, first, last, scratch.weights_by_key.data(), scratch.grad.data(),
                           sum, padded, width, of_v, v_stride);
  };
  const HeadRows &prefix_k = params.grad_prefix_k, &prefix_v = params.grad_prefix_v;
  if (prefix_k.data != nullptr)
    gradients(std::true_type{}, 0, prefix_length, rows_of<T>(prefix_k, prefix, head),
              prefix_k.row_stride, rows_of<T>(prefix_v, prefix, head), prefix_v.row_stride);
  if (needs_own)
    gradients(std::false_type{}, prefix_length, visible.keys,
              rows_of<Stored>(params.grad_k, sequence, head), params.grad_k.row_stride,
              rows_of<Stored>(params.grad_v, sequence, head), params.grad_v.row_stride);
}

template <typename T>
void clear(const HeadRows& rows, const PrefixAttentionParams& params, int64_t prefix,
           int64_t head) {
  T* row = rows_of<T>(rows, prefix, head);
  for (int64_t i = 0; i < params.prefix_length; ++i, row += rows.row_stride)
    std::fill(row, row + params.width, T{0});
}

// Heads [first, last) of all sequences, counted through.
template <typename Stored>
[[gnu::always_inline]] inline void forward_part(const PrefixAttentionParams& params,
                                                const Visible& visible, const Readers& readers,
                                                int64_t first, int64_t last,
                                                Scratch<Stored>& scratch) {
  for (int64_t i = first; i < last; ++i) {
    const int64_t sequence = i / params.heads;
    forward_head(params, visible, sequence, readers.prefix[sequence], i % params.heads, scratch);
  }
}

// Heads [first, last) of all prefixes, counted through: each of them in all sequences that read it,
// so that the gradients of a prefix are summed in the order of the sequences.
template <typename Stored>
[[gnu::always_inline]] inline void backward_part(const PrefixAttentionBackwardParams& params,
                                                 const Visible& visible, const Readers& readers,
                                                 int64_t first, int64_t last,
                                                 Scratch<Stored>& scratch) {
  using T = Computed<Stored>;
  const int64_t heads = params.forward.heads;
  for (int64_t next = first; first < last; first = next) {
    const int64_t prefix = first / heads, first_head = first % heads;
    next = std::min(last, (prefix + 1) * heads);
    const int64_t last_head = first_head + next - first;
    if (params.grad_prefix_k.data != nullptr) {
      for (int64_t head = first_head; head < last_head; ++head) {
        clear<T>(params.grad_prefix_k, params.forward, prefix, head);
        clear<T>(params.grad_prefix_v, params.forward, prefix, head);
      }
    }
    for (int64_t i = readers.start[prefix]; i < readers.start[prefix + 1]; ++i)
      for (int64_t head = first_head; head < last_head; ++head)
        backward_head(params, visible, readers.sequence[i], prefix, head, scratch);
  }
}

LAMP_VECTOR_CLONES void run_part(const PrefixAttentionParams& params, const Visible& visible,
                                 const Readers& readers, int64_t first, int64_t last,
                                 Scratch<float>& scratch) {
  forward_part(params, visible, readers, first, last, scratch);
}

LAMP_VECTOR_CLONES void run_part(const PrefixAttentionParams& params, const Visible& visible,
                                 const Readers& readers, int64_t first, int64_t last,
                                 Scratch<double>& scratch) {
  forward_part(params, visible, readers, first, last, scratch);
}

LAMP_VECTOR_CLONES void run_part(const PrefixAttentionParams& params, const Visible& visible,
                                 const Readers& readers, int64_t first, int64_t last,
                                 Scratch<BFloat16>& scratch) {
  forward_part(params, visible, readers, first, last, scratch);
}

LAMP_VECTOR_CLONES void run_part(const PrefixAttentionBackwardParams& params,
                                 const Visible& visible, const Readers& readers, int64_t first,
                                 int64_t last, Scratch<float>& scratch) {
  backward_part(params, visible, readers, first, last, scratch);
}

LAMP_VECTOR_CLONES void run_part(const PrefixAttentionBackwardParams& params,
                                 const Visible& visible, const Readers& readers, int64_t first,
                                 int64_t last, Scratch<double>& scratch) {
  backward_part(params, visible, readers, first, last, scratch);
}

LAMP_VECTOR_CLONES void run_part(const PrefixAttentionBackwardParams& params,
                                 const Visible& visible, const Readers& readers, int64_t first,
                                 int64_t last, Scratch<BFloat16>& scratch) {
  backward_part(params, visible, readers, first, last, scratch);
}

// A direction of the op over `items` heads; `products` is how many it forms of two rows.
template <typename Stored, typename Params>
void run(const Params& params, const PrefixAttentionParams& sizes, int64_t items, int64_t products,
         bool backward) {
  if (items == 0) return;
  const Visible visible(sizes);
  const Readers readers(sizes);
  const int64_t entries = visible.key.size();
  const int64_t work = products * entries * sizes.sequences * sizes.heads * sizes.width;
  const int64_t threads = useful_threads(sizes.threads, work, items);
  const int64_t parts = threads == 1 ? 1 : std::min(items, threads * kPartsPerThread);
  std::vector<Scratch<Stored>> scratch(threads, Scratch<Stored>(sizes, visible, backward));
  for_each_part(parts, threads, sizes.threads, [&](int64_t part, int64_t thread) {
    run_part(params, visible, readers, items * part / parts, items * (part + 1) / parts,
             scratch[thread]);
  });
}

// Every row sees every key, and the CPU multiplies bfloat16: dense_attention_bf16.cpp serves it.
bool is_dense_bf16(const PrefixAttentionParams& params) {
  const bool blind = params.blind > params.length - params.rows && params.prefix_length > 0;
  return params.dtype == Dtype::kBFloat16 && params.mask == nullptr && !params.causal && !blind &&
         multiplies_bfloat16();
}

}  // namespace

void prefix_attention_cpu(const PrefixAttentionParams& params) {
  const int64_t items = params.sequences * params.heads;
  if (is_dense_bf16(params))
    dense_attention_bf16(params);
  else if (params.dtype == Dtype::kFloat64)
    run<double>(params, params, items, 2, false);
  else if (params.dtype == Dtype::kBFloat16)
    run<BFloat16>(params, params, items, 2, false);
  else
    run<float>(params, params, items, 2, false);
}

void prefix_attention_backward_cpu(const PrefixAttentionBackwardParams& params) {
  const int64_t items = params.forward.groups * params.forward.heads;
  if (is_dense_bf16(params.forward))
    dense_attention_bf16_backward(params);
  else if (params.forward.dtype == Dtype::kFloat64)
    run<double>(params, params.forward, items, 5, true);
  else if (params.forward.dtype == Dtype::kBFloat16)
    run<BFloat16>(params, params.forward, items, 5, true);
  else
    run<float>(params, params.forward, items, 5, true);
}

}  // namespace lamp
