// quick_gelu and gelu of bfloat16. There are 65,536 numbers of that type, so all values and slopes
// are computed once, in double: faster than any arithmetic, since the numbers that activations have
// are few and stay in the first cache, and alike on every machine.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "lamp.h"
#include "threads.h"
#include "vectors.h"

namespace lamp {
namespace {

// A thread takes so many numbers at a time: what it reads and writes stays in the second cache.
constexpr int64_t kPart = 1 << 15;
// What one number costs, in multiply-adds.
constexpr int64_t kWork = 8;
constexpr int64_t kValues = 1 << 16;
constexpr int64_t kSlopesAtOnce = 64;

struct Table {
  Table(double (*value)(double), double (*slope)(double)) : values(kValues), slopes(kValues) {
    for (int64_t bits = 0; bits < kValues; ++bits) {
      BFloat16 x;
      x.bits = static_cast<uint16_t>(bits);
      values[bits] = BFloat16(static_cast<float>(value(x)));
      slopes[bits] = static_cast<float>(slope(x));
    }
  }
  std::vector<BFloat16> values;  // by the bits of x
  std::vector<float> slopes;
};

double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }

double quick_gelu(double x) { return x * sigmoid(1.702 * x); }

// d/dx x s = s (1 + z (1 - s)) with z = 1.702 x.
double quick_gelu_slope(double x) {
  const double z = 1.702 * x;
  return sigmoid(z) * (1 + z * sigmoid(-z));
}

double normal_below(double x) { return 0.5 * std::erfc(-x * std::sqrt(0.5)); }

double gelu(double x) { return x * normal_below(x); }

double gelu_slope(double x) {
  const double density = std::exp(-0.5 * x * x) * 0.3989422804014327;  // 1 / sqrt(2 pi)
  return normal_below(x) + x * density;
}

const Table& table_of(Activation activation) {
  if (activation == Activation::kQuickGelu) {
    static const Table table(quick_gelu, quick_gelu_slope);
    return table;
  }
  static const Table table(gelu, gelu_slope);
  return table;
}

// Calls run(first, count) for parts of `count` numbers.
template <typename Run>
void in_parts(int64_t count, int64_t threads, const Run& run) {
  const int64_t parts = round_up(count, kPart) / kPart;
  const int64_t useful = useful_threads(threads, count * kWork, parts);
  for_each_part(parts, useful, threads, [&](int64_t part, int64_t) {
    const int64_t first = part * kPart;
    run(first, std::min(kPart, count - first));
  });
}

LAMP_VECTOR_CLONES void multiply(const float* slopes, const BFloat16* grad, BFloat16* out,
                                 int64_t count) {
  constexpr int64_t lanes = kLanes<float>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(out + i, load(grad + i) * load(slopes + i));
  for (; i < count; ++i) out[i] = grad[i] * slopes[i];
}

}  // namespace

void activate_bf16(Activation activation, const void* x, void* out, int64_t count, int threads) {
  const BFloat16* values = table_of(activation).values.data();
  in_parts(count, threads, [=](int64_t first, int64_t some) {
    const BFloat16* from = static_cast<const BFloat16*>(x) + first;
    BFloat16* to = static_cast<BFloat16*>(out) + first;
    for (int64_t i = 0; i < some; ++i) to[i] = values[from[i].bits];
  });
}

void activate_bf16_backward(Activation activation, const void* grad, const void* x, void* out,
                            int64_t count, int threads) {
  const float* slopes = table_of(activation).slopes.data();
  in_parts(count, threads, [=](int64_t first, int64_t some) {
    const BFloat16* from = static_cast<const BFloat16*>(x) + first;
    const BFloat16* above = static_cast<const BFloat16*>(grad) + first;
    BFloat16* to = static_cast<BFloat16*>(out) + first;
    float block[kSlopesAtOnce];
    for (int64_t i = 0; i < some; i += kSlopesAtOnce) {
      const int64_t few = std::min(kSlopesAtOnce, some - i);
      for (int64_t j = 0; j < few; ++j) block[j] = slopes[from[i + j].bits];
      multiply(block, above + i, to + i, few);
    }
  });
}

}  // namespace lamp
