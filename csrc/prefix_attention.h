// What the CPU's implementations of prefix_attention share.
#pragma once

#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "lamp.h"

namespace lamp {

// More parts than threads: what a busy core leaves, another one takes.
constexpr int64_t kPartsPerThread = 4;

// Which prefix each sequence reads, and the sequences that read each prefix, in their order.
struct Readers {
  explicit Readers(const PrefixAttentionParams& params)
      : prefix(params.sequences), start(params.groups + 1), sequence(params.sequences) {
    for (int64_t n = 0; n < params.sequences; ++n) {
      prefix[n] = prefix_of(params, n);
      ++start[prefix[n] + 1];
    }
    std::partial_sum(start.begin(), start.end(), start.begin());
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t n = 0; n < params.sequences; ++n) sequence[next[prefix[n]]++] = n;
  }

  static int64_t prefix_of(const PrefixAttentionParams& params, int64_t n) {
    if (params.prefix_index == nullptr) return n / (params.sequences / params.groups);
    const int64_t prefix = params.prefix_index[n];
    if (prefix < 0 || prefix >= params.groups)
      throw std::out_of_range("prefix_index: holds " + std::to_string(prefix) + ", expected 0.." +
                              std::to_string(params.groups - 1));
    return prefix;
  }

  std::vector<int64_t> prefix;    // [N]
  std::vector<int64_t> start;     // [G + 1]
  std::vector<int64_t> sequence;  // [N]
};

// bfloat16 where every row sees every key, by the CPU's own products of bfloat16; only where
// multiplies_bfloat16().
void dense_attention_bf16(const PrefixAttentionParams& params);
void dense_attention_bf16_backward(const PrefixAttentionBackwardParams& params);

}  // namespace lamp
