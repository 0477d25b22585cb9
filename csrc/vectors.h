// Vectors for the CPU that give the same bits on every machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

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

#if defined(__clang__)
#define LAMP_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LAMP_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype((a) == (b)){__VA_ARGS__})
#endif

namespace lamp {

template <typename T, int Count>
struct VectorOf {
  // A vector type rather than an array: GCC keeps it in registers. Aligned as its elements are, and
  // allowed to look at them.
  using type [[gnu::vector_size(Count * sizeof(T)), gnu::aligned(alignof(T)), gnu::may_alias]] = T;
};

template <typename T, int Count>
using Vector = typename VectorOf<T, Count>::type;

template <typename T>
constexpr int kLanes = 32 / sizeof(T);

template <typename T>
using Lanes = Vector<T, kLanes<T>>;

template <typename T>
[[gnu::always_inline]] inline Lanes<T> load(const T* from) {
  return *reinterpret_cast<const Lanes<T>*>(from);
}

template <typename T>
[[gnu::always_inline]] inline void store(T* to, Lanes<T> value) {
  *reinterpret_cast<Lanes<T>*>(to) = value;
}

// A number of the upper half of a float32's bits.
struct BFloat16 {
  BFloat16() = default;
  // Rounds to the nearest, ties to even; NaN stays one.
  [[gnu::always_inline]] BFloat16(float value) {
    uint32_t whole;
    std::memcpy(&whole, &value, sizeof(whole));
    const uint32_t rounded = (whole + 0x7fffu + ((whole >> 16) & 1)) >> 16;
    const uint32_t nan = (whole >> 16) | 0x40u;
    bits = static_cast<uint16_t>((whole & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
  }
  [[gnu::always_inline]] operator float() const {
    const uint32_t whole = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &whole, sizeof(value));
    return value;
  }
  uint16_t bits;
};

[[gnu::always_inline]] inline Lanes<float> load(const BFloat16* from) {
  using Bits = Vector<uint16_t, kLanes<float>>;
  using Wide = Vector<uint32_t, kLanes<float>>;
  const Wide wide = __builtin_convertvector(*reinterpret_cast<const Bits*>(from), Wide) << 16;
  return reinterpret_cast<Lanes<float>>(wide);
}

[[gnu::always_inline]] inline void store(BFloat16* to, Lanes<float> value) {
  using Bits = Vector<uint16_t, kLanes<float>>;
  using Wide = Vector<uint32_t, kLanes<float>>;
  const Wide whole = reinterpret_cast<Wide>(value);
  const Wide rounded = whole + 0x7fffu + ((whole >> 16) & 1u);
  const Wide bits = value == value ? rounded : whole | 0x400000u;
  *reinterpret_cast<Bits*>(to) = __builtin_convertvector(bits >> 16, Bits);
}

// What a tensor's numbers are computed in.
template <typename Stored>
using Computed = std::conditional_t<std::is_same_v<Stored, BFloat16>, float, Stored>;

inline int64_t round_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// The sums over the lanes of four vectors a, b, c, d in two parts: a b c d a b c d.
[[gnu::always_inline]] inline Lanes<float> half_sums(const Lanes<float> (&x)[4]) {
  const Lanes<float> ab = LAMP_SHUFFLE(x[0], x[1], 0, 8, 1, 9, 4, 12, 5, 13) +
                          LAMP_SHUFFLE(x[0], x[1], 2, 10, 3, 11, 6, 14, 7, 15);
  const Lanes<float> cd = LAMP_SHUFFLE(x[2], x[3], 0, 8, 1, 9, 4, 12, 5, 13) +
                          LAMP_SHUFFLE(x[2], x[3], 2, 10, 3, 11, 6, 14, 7, 15);
  return LAMP_SHUFFLE(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
         LAMP_SHUFFLE(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
}

// Lane i is the sum over the lanes of the i-th vector.
[[gnu::always_inline]] inline Lanes<float> sum_each(const Lanes<float> (&x)[2][4]) {
  const Lanes<float> first = half_sums(x[0]), second = half_sums(x[1]);
  return LAMP_SHUFFLE(first, second, 0, 1, 2, 3, 8, 9, 10, 11) +
         LAMP_SHUFFLE(first, second, 4, 5, 6, 7, 12, 13, 14, 15);
}

[[gnu::always_inline]] inline Lanes<double> sum_each(const Lanes<double> (&x)[1][4]) {
  const Lanes<double> ab =
      LAMP_SHUFFLE(x[0][0], x[0][1], 0, 4, 2, 6) + LAMP_SHUFFLE(x[0][0], x[0][1], 1, 5, 3, 7);
  const Lanes<double> cd =
      LAMP_SHUFFLE(x[0][2], x[0][3], 0, 4, 2, 6) + LAMP_SHUFFLE(x[0][2], x[0][3], 1, 5, 3, 7);
  return LAMP_SHUFFLE(ab, cd, 0, 1, 4, 5) + LAMP_SHUFFLE(ab, cd, 2, 3, 6, 7);
}

[[gnu::always_inline]] inline float sum_of(Lanes<float> x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

[[gnu::always_inline]] inline double sum_of(Lanes<double> x) {
  return (x[0] + x[2]) + (x[1] + x[3]);
}

// e^x for x <= 0 to about 2 units in the last place; 0 where it is below the smallest normal
// number, NaN for NaN.
template <int Count>
[[gnu::always_inline]] inline Vector<float, Count> exponential_of(Vector<float, Count> x) {
  using Floats = Vector<float, Count>;
  using Bits = Vector<uint32_t, Count>;
  // e^x = 2^n e^r with n an integer and |r| <= ln 2 / 2. Adding 1.5 * 2^23 rounds to an integer and
  // leaves it in the low bits. The first part of ln 2 has 9 bits, so that its product is exact.
  constexpr float kRound = 12582912, kFirst = 0.693359375f, kSecond = -2.12194440e-4f;
  const Floats shifted = x * 1.44269504f + kRound;
  const Floats n = shifted - kRound;
  const Floats r = (x - n * kFirst) - n * kSecond;
  // Taylor's series: the first term left out is below 0.35^8 / 8! = 6e-9.
  Floats sum = r * (1.f / 5040) + 1.f / 720;
  sum = sum * r + 1.f / 120;
  sum = sum * r + 1.f / 24;
  sum = sum * r + 1.f / 6;
  sum = sum * r + 0.5f;
  sum = (sum * r) * r + r + 1.f;
  const Bits power = (reinterpret_cast<Bits>(shifted) << 23) + 0x3f800000u;
  const Floats result = sum * reinterpret_cast<Floats>(power);
  return x < -87.f ? Floats{} : result;
}

[[gnu::always_inline]] inline Lanes<float> exponential(Lanes<float> x) {
  return exponential_of<kLanes<float>>(x);
}

[[gnu::always_inline]] inline Lanes<double> exponential(Lanes<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::exp(x[lane]);
  return x;
}

}  // namespace lamp
