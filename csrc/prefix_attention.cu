// Attention for rows that see few keys each. A few neighbouring lanes own one row of one head, so
// that its softmax and its gradients live in registers and only dot products cross lanes. Rows of
// one sequence are neighbours in a warp: they read the same prefix and mostly the same keys, which
// then cost one access instead of one a row. Sums run in a fixed order; nothing is shared.
#include <climits>
#include <cmath>
#include <type_traits>

#include "common.cuh"
#include "lamp.h"

namespace lamp {
namespace {

constexpr int kThreads = 128;
constexpr int kChunk = 8;  // elements that a lane moves at once, 16 bytes of float16
constexpr int kMostWidth = 128;
constexpr int kKeysAtOnce = 2;
constexpr float kLog2OfE = 1.4426950408889634f;
constexpr float kLogOf2 = 0.6931471805599453f;

// What a lane holds of a row: kChunks chunks, kLanes chunks apart; zero where the row is shorter.
template <int kLanes, int kChunks>
struct Slice {
  static constexpr int kSize = kChunks * kChunk;
  int width;
  bool vectors;

  __device__ Slice(int64_t width, bool vectors)
      : width(static_cast<int>(width)), vectors(vectors) {}

  __device__ static int start(int chunk) {
    return (chunk * kLanes + static_cast<int>(threadIdx.x) % kLanes) * kChunk;
  }

  template <typename T>
  __device__ void load(const T* row, float (&x)[kSize]) const {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int first = start(chunk);
      if (vectors && first + kChunk <= width) {
#pragma unroll
        for (int i = 0; i < kChunk; i += Pack<T>::kSize) {
          const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(row + first + i);
#pragma unroll
          for (int j = 0; j < Pack<T>::kSize; ++j)
            x[chunk * kChunk + i + j] = to_float(pack.values[j]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kChunk; ++i)
          x[chunk * kChunk + i] = first + i < width ? to_float(row[first + i]) : 0.0f;
      }
    }
  }

  template <typename T>
  __device__ void store(const float (&x)[kSize], T* row) const {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int first = start(chunk);
      if (vectors && first + kChunk <= width) {
#pragma unroll
        for (int i = 0; i < kChunk; i += Pack<T>::kSize) {
          Pack<T> pack;
#pragma unroll
          for (int j = 0; j < Pack<T>::kSize; ++j)
            round_to(x[chunk * kChunk + i + j], pack.values[j]);
          *reinterpret_cast<Pack<T>*>(row + first + i) = pack;
        }
      } else {
#pragma unroll
        for (int i = 0; i < kChunk; ++i)
          if (first + i < width) round_to(x[chunk * kChunk + i], row[first + i]);
      }
    }
  }

  // Of whole rows, alike in all lanes.
  __device__ static float dot(const float (&a)[kSize], const float (&b)[kSize]) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum = fmaf(a[i], b[i], sum);
    return sum_over_lanes<kLanes>(sum);
  }
};

template <int kSize>
__device__ void scale_by(float factor, float (&x)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) x[i] *= factor;
}

// sum += factor * x
template <int kSize>
__device__ void add_scaled(float factor, const float (&x)[kSize], float (&sum)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) sum[i] = fmaf(factor, x[i], sum[i]);
}

// One instruction; 0 below 2^-126, which no sum of weights could tell.
__device__ float power_of_2(float exponent) {
#ifdef __CUDA_ARCH__
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
  return power;
#else
  return exp2f(exponent);
#endif
}

template <typename T>
__device__ T* head_of(const HeadRows& rows, int64_t sequence, int64_t head) {
  return static_cast<T*>(rows.data) + sequence * rows.sequence_stride + head * rows.head_stride;
}

// Which keys a row sees, or which rows see a key: from a list, or a range.
struct Walk {
  const int32_t* list;
  int first;
  int count;

  __device__ int at(int step) const { return list ? list[step] : first + step; }
};

__device__ Walk listed(const int32_t* lists, int64_t entry, int64_t longest) {
  const int32_t* list = lists + entry * (1 + longest);
  return {list + 1, 0, list[0]};
}

// Keys are numbered through: the prefix is 0..P-1, the sequence P..P+L-1.
__device__ Walk keys_seen_by(int64_t row, const PrefixAttentionParams& params,
                             const int32_t* seen_keys) {
  const int64_t prefix = params.prefix_length;
  if (seen_keys) return listed(seen_keys, row, prefix + params.length);
  const int64_t place = params.length - params.rows + row;  // in its sequence
  const int64_t first = place < params.blind ? prefix : 0;
  const int64_t end = prefix + (params.causal ? place + 1 : params.length);
  return {nullptr, static_cast<int>(first), static_cast<int>(end - first)};
}

__device__ Walk rows_that_see(int64_t key, const PrefixAttentionParams& params,
                              const int32_t* seeing_rows) {
  if (seeing_rows) return listed(seeing_rows, key, params.rows);
  const int64_t own = key - params.prefix_length;
  const int64_t place = own < 0 ? params.blind : params.causal ? own : 0;
  const int64_t first = min(max(place - (params.length - params.rows), int64_t{0}), params.rows);
  return {nullptr, static_cast<int>(first), static_cast<int>(params.rows - first)};
}

__device__ int64_t group_of(int64_t sequence, const PrefixAttentionParams& params) {
  if (params.prefix_length == 0) return 0;
  if (!params.prefix_index) return sequence / (params.sequences / params.groups);
  const int64_t group = params.prefix_index[sequence];
  if (group < 0 || group >= params.groups) __trap();
  return group;
}

// The rows that one head of one sequence reads as keys, or as values.
template <typename T>
struct Table {
  const T* prefix;
  const T* own;
  int64_t prefix_stride;
  int64_t own_stride;
  int prefix_length;

  __device__ Table(const HeadRows& prefix_rows, const HeadRows& own_rows, int64_t group,
                   int64_t sequence, int64_t head, int64_t prefix_length)
      : prefix(head_of<const T>(prefix_rows, group, head)),
        own(head_of<const T>(own_rows, sequence, head)),
        prefix_stride(prefix_rows.row_stride),
        own_stride(own_rows.row_stride),
        prefix_length(static_cast<int>(prefix_length)) {}

  __device__ const T* row(int key) const {
    return key < prefix_length ? prefix + key * prefix_stride
                               : own + (key - prefix_length) * own_stride;
  }
};

// The work of kLanes lanes: one row of one head. Blocks take a head's neighbouring rows, and
// neighbouring blocks the heads of the same rows. Lanes beyond the last row repeat the first one
// and stay, as shuffles need the whole warp.
struct Item {
  int64_t sequence;
  int64_t head;
  int64_t row;
  bool exists;

  template <int kLanes>
  __host__ __device__ static int64_t blocks(int64_t sequences, int64_t heads, int64_t rows) {
    constexpr int64_t kItems = kThreads / kLanes;
    return (sequences * rows + kItems - 1) / kItems * heads;
  }

  template <int kLanes>
  __device__ static Item of_lane(int64_t block, int64_t sequences, int64_t heads, int64_t rows) {
    const int64_t place = block / heads * (kThreads / kLanes) + threadIdx.x / kLanes;
    const bool exists = place < sequences * rows;
    const int64_t index = exists ? place : 0;
    return {index / rows, block % heads, index % rows, exists};
  }
};

template <typename T, int kLanes, int kChunks>
__global__ void __launch_bounds__(kThreads)
    prefix_attention_kernel(const PrefixAttentionParams params, const int32_t* seen_keys,
                            const int64_t blocks, const bool vectors) {
  using RowSlice = Slice<kLanes, kChunks>;
  const RowSlice slice(params.width, vectors);
  const float scale = static_cast<float>(params.scale) * kLog2OfE;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const Item item = Item::of_lane<kLanes>(block, params.sequences, params.heads, params.rows);
    const int64_t group = group_of(item.sequence, params);
    const Table<T> keys(params.prefix_k, params.k, group, item.sequence, item.head,
                        params.prefix_length);
    const Table<T> values(params.prefix_v, params.v, group, item.sequence, item.head,
                          params.prefix_length);
    Walk seen = keys_seen_by(item.row, params, seen_keys);
    if (!item.exists) seen.count = 0;

    float q[RowSlice::kSize];
    slice.load(
        head_of<const T>(params.q, item.sequence, item.head) + item.row * params.q.row_stride, q);
    scale_by(scale, q);
    float largest = -INFINITY, total = 0, out[RowSlice::kSize] = {};
    for (int step = 0; __any_sync(kWholeWarp, step < seen.count); step += kKeysAtOnce) {
      float score[kKeysAtOnce], value[kKeysAtOnce][RowSlice::kSize];
#pragma unroll
      for (int i = 0; i < kKeysAtOnce; ++i) {
        float key[RowSlice::kSize] = {};
        if (step + i < seen.count) {
          const int index = seen.at(step + i);
          slice.load(keys.row(index), key);
          slice.load(values.row(index), value[i]);
        }
        score[i] = slice.dot(q, key);
      }
      float next_largest = largest;
#pragma unroll
      for (int i = 0; i < kKeysAtOnce; ++i)
        if (step + i < seen.count) next_largest = fmaxf(next_largest, score[i]);
      // With nothing but -inf so far any finite number does, and avoids inf - inf.
      const float offset = next_largest == -INFINITY ? 0.0f : next_largest;
      const float shrink = power_of_2(largest - offset);
      largest = next_largest;
      total *= shrink;
      scale_by(shrink, out);
#pragma unroll
      for (int i = 0; i < kKeysAtOnce; ++i) {
        if (step + i < seen.count) {
          const float weight = power_of_2(score[i] - offset);
          total += weight;
          add_scaled(weight, value[i], out);
        }
      }
    }

    if (!item.exists) continue;
    scale_by(1 / total, out);
    slice.store(
        out, head_of<T>(params.out, item.sequence, item.head) + item.row * params.out.row_stride);
    if (threadIdx.x % kLanes == 0) {
      const int64_t index = (item.sequence * params.heads + item.head) * params.rows + item.row;
      static_cast<float*>(params.lse)[index] = (largest + log2f(total)) * kLogOf2;
    }
  }
}

// The gradient of q, and delta, which the gradients of keys and values need. With weights p and
// their gradient dp = grad v: ds = p (dp - delta), delta = sum p dp = out grad, dq = scale ds k.
// An output that was rounded to half precision is off by more than all ds of a saturated softmax:
// then delta is sum p dp / sum p, known at the end of the walk: dq = scale (p dp k - delta p k).
template <typename T, int kLanes, int kChunks>
__global__ void __launch_bounds__(kThreads)
    grad_query_kernel(const PrefixAttentionBackwardParams params, const int32_t* seen_keys,
                      float* deltas, const int64_t blocks, const bool vectors) {
  const PrefixAttentionParams& forward = params.forward;
  using RowSlice = Slice<kLanes, kChunks>;
  constexpr bool kRounded = !std::is_same_v<T, float>;
  const RowSlice slice(forward.width, vectors);
  const float scale = static_cast<float>(forward.scale);
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const Item item = Item::of_lane<kLanes>(block, forward.sequences, forward.heads, forward.rows);
    const int64_t index = (item.sequence * forward.heads + item.head) * forward.rows + item.row;
    const bool writes = item.exists && threadIdx.x % kLanes == 0;
    float grad[RowSlice::kSize], delta = 0;
    slice.load(
        head_of<const T>(params.grad, item.sequence, item.head) + item.row * params.grad.row_stride,
        grad);
    if constexpr (!kRounded) {
      float out[RowSlice::kSize];
      slice.load(head_of<const T>(forward.out, item.sequence, item.head) +
                     item.row * forward.out.row_stride,
                 out);
      delta = slice.dot(grad, out);
      if (writes) deltas[index] = delta;
      if (!params.grad_q.data) continue;
    }

    const int64_t group = group_of(item.sequence, forward);
    const Table<T> keys(forward.prefix_k, forward.k, group, item.sequence, item.head,
                        forward.prefix_length);
    const Table<T> values(forward.prefix_v, forward.v, group, item.sequence, item.head,
                          forward.prefix_length);
    Walk seen = keys_seen_by(item.row, forward, seen_keys);
    if (!item.exists) seen.count = 0;
    float q[RowSlice::kSize];
    slice.load(
        head_of<const T>(forward.q, item.sequence, item.head) + item.row * forward.q.row_stride, q);
    scale_by(scale * kLog2OfE, q);
    const float lse = static_cast<const float*>(forward.lse)[index] * kLog2OfE;
    float grad_q[RowSlice::kSize] = {};
    float mean_key[RowSlice::kSize] = {}, total = 0;  // sums of p k and of p, where kRounded
    for (int step = 0; __any_sync(kWholeWarp, step < seen.count); ++step) {
      float key[RowSlice::kSize] = {}, value[RowSlice::kSize] = {};
      if (step < seen.count) {
        const int key_index = seen.at(step);
        slice.load(keys.row(key_index), key);
        slice.load(values.row(key_index), value);
      }
      const float weight = power_of_2(slice.dot(q, key) - lse);
      const float grad_weight = slice.dot(grad, value);
      if (step >= seen.count) continue;
      if constexpr (kRounded) {
        total += weight;
        delta += weight * grad_weight;
        add_scaled(weight, key, mean_key);
        add_scaled(weight * grad_weight, key, grad_q);
      } else {
        add_scaled(weight * (grad_weight - delta), key, grad_q);
      }
    }
    if constexpr (kRounded) {
      if (total != 0) delta /= total;
      add_scaled(-delta, mean_key, grad_q);
      if (writes) deltas[index] = delta;
    }
    scale_by(scale, grad_q);
    if (item.exists && params.grad_q.data)
      slice.store(grad_q, head_of<T>(params.grad_q, item.sequence, item.head) +
                              item.row * params.grad_q.row_stride);
  }
}

// One key with its value and their gradients, fed with the rows that see it.
template <typename T, int kLanes, int kChunks>
struct KeyGradient {
  using RowSlice = Slice<kLanes, kChunks>;
  const PrefixAttentionBackwardParams& params;
  const float* deltas;
  RowSlice slice;
  float key[RowSlice::kSize] = {};  // times scale and log2(e)
  float value[RowSlice::kSize] = {};
  float grad_key[RowSlice::kSize] = {};  // over scale
  float grad_value[RowSlice::kSize] = {};

  __device__ KeyGradient(const PrefixAttentionBackwardParams& params, const float* deltas,
                         RowSlice slice, const T* key_row, const T* value_row)
      : params(params), deltas(deltas), slice(slice) {
    slice.load(key_row, key);
    slice.load(value_row, value);
    scale_by(static_cast<float>(params.forward.scale) * kLog2OfE, key);
  }

  // The whole warp calls it, also lanes whose key no further row sees.
  __device__ void add(bool sees, int64_t sequence, int64_t head, int64_t row) {
    const PrefixAttentionParams& forward = params.forward;
    float q[RowSlice::kSize] = {}, grad[RowSlice::kSize] = {}, lse = 0, delta = 0;
    if (sees) {
      slice.load(head_of<const T>(forward.q, sequence, head) + row * forward.q.row_stride, q);
      slice.load(head_of<const T>(params.grad, sequence, head) + row * params.grad.row_stride,
                 grad);
      const int64_t index = (sequence * forward.heads + head) * forward.rows + row;
      lse = static_cast<const float*>(forward.lse)[index] * kLog2OfE;
      delta = deltas[index];
    }
    const float weight = power_of_2(slice.dot(q, key) - lse);
    const float grad_score = weight * (slice.dot(grad, value) - delta);
    if (sees) {
      add_scaled(weight, grad, grad_value);
      add_scaled(grad_score, q, grad_key);
    }
  }

  __device__ void finish() { scale_by(static_cast<float>(params.forward.scale), grad_key); }
};

template <typename T, int kLanes, int kChunks>
__global__ void __launch_bounds__(kThreads)
    grad_own_kernel(const PrefixAttentionBackwardParams params, const int32_t* seeing_rows,
                    const float* deltas, const int64_t blocks, const bool vectors) {
  const PrefixAttentionParams& forward = params.forward;
  using RowSlice = Slice<kLanes, kChunks>;
  const RowSlice slice(forward.width, vectors);
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const Item item =
        Item::of_lane<kLanes>(block, forward.sequences, forward.heads, forward.length);
    KeyGradient<T, kLanes, kChunks> gradient(
        params, deltas, slice,
        head_of<const T>(forward.k, item.sequence, item.head) + item.row * forward.k.row_stride,
        head_of<const T>(forward.v, item.sequence, item.head) + item.row * forward.v.row_stride);
    Walk seeing = rows_that_see(forward.prefix_length + item.row, forward, seeing_rows);
    if (!item.exists) seeing.count = 0;
    for (int step = 0; __any_sync(kWholeWarp, step < seeing.count); ++step) {
      const bool sees = step < seeing.count;
      gradient.add(sees, item.sequence, item.head, sees ? seeing.at(step) : 0);
    }
    if (!item.exists) continue;
    gradient.finish();
    slice.store(gradient.grad_key, head_of<T>(params.grad_k, item.sequence, item.head) +
                                       item.row * params.grad_k.row_stride);
    slice.store(gradient.grad_value, head_of<T>(params.grad_v, item.sequence, item.head) +
                                         item.row * params.grad_v.row_stride);
  }
}

// A prefix row's gradients over the sequences of its group in order, or over one part of them.
template <typename T, int kLanes, int kChunks>
__global__ void __launch_bounds__(kThreads)
    grad_prefix_kernel(const PrefixAttentionBackwardParams params,
                       const PrefixAttentionScratch scratch, const int64_t blocks,
                       const bool vectors) {
  const PrefixAttentionParams& forward = params.forward;
  using RowSlice = Slice<kLanes, kChunks>;
  const RowSlice slice(forward.width, vectors);
  const int64_t rows = forward.groups * forward.heads * forward.prefix_length;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    int64_t place = block * (kThreads / kLanes) + threadIdx.x / kLanes;
    const bool exists = place < scratch.parts * rows;
    if (!exists) place = 0;
    const int64_t part = place / rows;
    const int64_t prefix_row = place % forward.prefix_length;
    const int64_t head = place / forward.prefix_length % forward.heads;
    const int64_t group = place % rows / (forward.prefix_length * forward.heads);
    KeyGradient<T, kLanes, kChunks> gradient(
        params, scratch.delta, slice,
        head_of<const T>(forward.prefix_k, group, head) + prefix_row * forward.prefix_k.row_stride,
        head_of<const T>(forward.prefix_v, group, head) + prefix_row * forward.prefix_v.row_stride);

    const int64_t per_group = forward.sequences / forward.groups;
    const int64_t start = scratch.order ? scratch.offsets[group] : group * per_group;
    const int64_t sequences = scratch.order ? scratch.offsets[group + 1] - start : per_group;
    const Walk seeing = rows_that_see(prefix_row, forward, scratch.seeing_rows);
    const int64_t pairs = exists ? sequences * seeing.count : 0;
    int64_t pair = pairs * part / scratch.parts;
    const int64_t end = pairs * (part + 1) / scratch.parts;
    int64_t nth = seeing.count ? pair / seeing.count : 0;
    int step = seeing.count ? static_cast<int>(pair % seeing.count) : 0;
    while (__any_sync(kWholeWarp, pair < end)) {
      const bool sees = pair < end;
      const int64_t sequence = !sees ? 0 : scratch.order ? scratch.order[start + nth] : start + nth;
      gradient.add(sees, sequence, head, sees ? seeing.at(step) : 0);
      ++pair;
      if (++step >= seeing.count) {
        step = 0;
        ++nth;
      }
    }
    if (!exists) continue;
    gradient.finish();
    if (scratch.parts == 1) {
      slice.store(gradient.grad_key, head_of<T>(params.grad_prefix_k, group, head) +
                                         prefix_row * params.grad_prefix_k.row_stride);
      slice.store(gradient.grad_value, head_of<T>(params.grad_prefix_v, group, head) +
                                           prefix_row * params.grad_prefix_v.row_stride);
    } else {
      const RowSlice partial_slice(forward.width, forward.width % Pack<float>::kSize == 0);
      float* partial = scratch.partial + place * 2 * forward.width;
      partial_slice.store(gradient.grad_key, partial);
      partial_slice.store(gradient.grad_value, partial + forward.width);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(const PrefixAttentionBackwardParams params,
                     const PrefixAttentionScratch scratch, const int64_t blocks) {
  const PrefixAttentionParams& forward = params.forward;
  const int64_t pair_width = 2 * forward.width;
  const int64_t size = forward.groups * forward.heads * forward.prefix_length * pair_width;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t place = block * kThreads + threadIdx.x;
    if (place >= size) continue;
    float sum = 0;
    for (int64_t part = 0; part < scratch.parts; ++part)
      sum += scratch.partial[part * size + place];
    const int64_t row = place / pair_width, element = place % pair_width;
    const int64_t head = row / forward.prefix_length;
    const HeadRows& grad = element < forward.width ? params.grad_prefix_k : params.grad_prefix_v;
    round_to(sum, head_of<T>(grad, head / forward.heads,
                             head % forward.heads)[row % forward.prefix_length * grad.row_stride +
                                                   element % forward.width]);
  }
}

// For every row of a visibility [rows, columns] how many columns it sees, and which, in order.
// One warp a row.
__global__ void __launch_bounds__(kThreads)
    list_visible_kernel(const bool* visible, const int64_t rows, const int64_t row_stride,
                        const int64_t columns, const int64_t column_stride, int32_t* lists,
                        const int64_t blocks) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t row = block * (kThreads / kWarp) + threadIdx.x / kWarp;
    if (row >= rows) continue;
    int32_t* list = lists + row * (1 + columns);
    int count = 0;
    for (int64_t first = 0; first < columns; first += kWarp) {
      const int64_t column = first + lane;
      const bool sees = column < columns && visible[row * row_stride + column * column_stride];
      const unsigned ballot = __ballot_sync(kWholeWarp, sees);
      if (sees)
        list[1 + count + __popc(ballot & ((1u << lane) - 1))] = static_cast<int32_t>(column);
      count += __popc(ballot);
    }
    if (lane == 0) list[0] = count;
  }
}

void list_visible(const bool* visible, int64_t rows, int64_t row_stride, int64_t columns,
                  int64_t column_stride, int32_t* lists, void* stream) {
  const int64_t blocks = (rows + kThreads / kWarp - 1) / (kThreads / kWarp);
  launch("prefix_attention: list_visible", list_visible_kernel, blocks, kThreads, stream, visible,
         rows, row_stride, columns, column_stride, lists, blocks);
}

bool takes_vectors(const HeadRows& rows, int64_t element_bytes) {
  return is_aligned(rows.data) && rows.sequence_stride * element_bytes % kVectorBytes == 0 &&
         rows.head_stride * element_bytes % kVectorBytes == 0 &&
         rows.row_stride * element_bytes % kVectorBytes == 0;
}

bool forward_takes_vectors(const PrefixAttentionParams& params, int64_t element_bytes) {
  const auto takes = [element_bytes](const HeadRows& rows) {
    return takes_vectors(rows, element_bytes);
  };
  return takes(params.q) && takes(params.k) && takes(params.v) && takes(params.out) &&
         (params.prefix_length == 0 || (takes(params.prefix_k) && takes(params.prefix_v)));
}

// Gradients that are not wanted have null addresses and strides.
bool backward_takes_vectors(const PrefixAttentionBackwardParams& params, int64_t element_bytes) {
  const auto takes = [element_bytes](const HeadRows& rows) {
    return takes_vectors(rows, element_bytes);
  };
  return takes(params.grad) && takes(params.grad_q) && takes(params.grad_k) &&
         takes(params.grad_v) && takes(params.grad_prefix_k) && takes(params.grad_prefix_v);
}

// How many lanes take a row that is no wider than kWidth. Queries are given two chunks a lane, so
// that what is done once a key serves more rows of a warp; keys have too many sums for that.
template <int kWidth>
struct Lanes {
  static constexpr int kOfKey = kWidth / kChunk;
  static constexpr int kChunksOfQuery = kWidth > 32 ? 2 : 1;
  static constexpr int kOfQuery = kOfKey / kChunksOfQuery;
};

template <typename T, int kWidth>
void run_forward(const PrefixAttentionParams& params, const int32_t* seen_keys, void* stream) {
  constexpr int kLanes = Lanes<kWidth>::kOfQuery, kChunks = Lanes<kWidth>::kChunksOfQuery;
  const int64_t blocks = Item::blocks<kLanes>(params.sequences, params.heads, params.rows);
  launch("prefix_attention", prefix_attention_kernel<T, kLanes, kChunks>, blocks, kThreads, stream,
         params, seen_keys, blocks, forward_takes_vectors(params, sizeof(T)));
}

template <typename T, int kWidth>
void run_backward(const PrefixAttentionBackwardParams& params,
                  const PrefixAttentionScratch& scratch, void* stream) {
  constexpr int kQueryLanes = Lanes<kWidth>::kOfQuery, kChunks = Lanes<kWidth>::kChunksOfQuery;
  constexpr int kKeyLanes = Lanes<kWidth>::kOfKey;
  const PrefixAttentionParams& forward = params.forward;
  const bool vectors =
      forward_takes_vectors(forward, sizeof(T)) && backward_takes_vectors(params, sizeof(T));
  int64_t blocks = Item::blocks<kQueryLanes>(forward.sequences, forward.heads, forward.rows);
  launch("prefix_attention_backward: query", grad_query_kernel<T, kQueryLanes, kChunks>, blocks,
         kThreads, stream, params, scratch.seen_keys, scratch.delta, blocks, vectors);
  if (params.grad_k.data) {
    blocks = Item::blocks<kKeyLanes>(forward.sequences, forward.heads, forward.length);
    launch("prefix_attention_backward: keys", grad_own_kernel<T, kKeyLanes, 1>, blocks, kThreads,
           stream, params, scratch.seeing_rows, scratch.delta, blocks, vectors);
  }
  const int64_t rows = forward.groups * forward.heads * forward.prefix_length;
  if (!params.grad_prefix_k.data || rows == 0) return;
  blocks = (scratch.parts * rows * kKeyLanes + kThreads - 1) / kThreads;
  launch("prefix_attention_backward: prefix", grad_prefix_kernel<T, kKeyLanes, 1>, blocks, kThreads,
         stream, params, scratch, blocks, vectors);
  if (scratch.parts == 1) return;
  blocks = (rows * 2 * forward.width + kThreads - 1) / kThreads;
  launch("prefix_attention_backward: parts", add_parts_kernel<T>, blocks, kThreads, stream, params,
         scratch, blocks);
}

// Calls function(T(), std::integral_constant<int, kWidth>()).
template <typename T, typename Function>
void with_width(int64_t width, const Function& function) {
  if (width <= 32)
    function(T(), std::integral_constant<int, 32>());
  else if (width <= 64)
    function(T(), std::integral_constant<int, 64>());
  else
    function(T(), std::integral_constant<int, kMostWidth>());
}

template <typename Function>
void with_type_and_width(const PrefixAttentionParams& params, const Function& function) {
  if (params.width > kMostWidth)
    throw std::invalid_argument("prefix_attention: expected heads of width up to 128");
  if (params.prefix_length + params.length > INT_MAX - kKeysAtOnce)
    throw std::invalid_argument("prefix_attention: expected fewer than 2^31 keys a row");
  switch (params.dtype) {
    case Dtype::kFloat32:
      return with_width<float>(params.width, function);
    case Dtype::kFloat16:
      return with_width<__half>(params.width, function);
    case Dtype::kBFloat16:
      return with_width<__nv_bfloat16>(params.width, function);
    default:
      throw std::invalid_argument("prefix_attention: expected float32, float16 or bfloat16");
  }
}

}  // namespace

void prefix_attention_cuda(const PrefixAttentionParams& params,
                           const PrefixAttentionScratch& scratch, void* stream) {
  const int64_t keys = params.prefix_length + params.length;
  if (params.mask) list_visible(params.mask, params.rows, keys, keys, 1, scratch.seen_keys, stream);
  with_type_and_width(params, [&](auto type, auto width) {
    run_forward<decltype(type), width()>(params, scratch.seen_keys, stream);
  });
}

void prefix_attention_backward_cuda(const PrefixAttentionBackwardParams& params,
                                    const PrefixAttentionScratch& scratch, void* stream) {
  const PrefixAttentionParams& forward = params.forward;
  const int64_t keys = forward.prefix_length + forward.length;
  if (forward.mask) {
    list_visible(forward.mask, forward.rows, keys, keys, 1, scratch.seen_keys, stream);
    list_visible(forward.mask, keys, 1, forward.rows, keys, scratch.seeing_rows, stream);
  }
  with_type_and_width(forward, [&](auto type, auto width) {
    run_backward<decltype(type), width()>(params, scratch, stream);
  });
}

}  // namespace lamp
