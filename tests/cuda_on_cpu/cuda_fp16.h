// float16 in software, rounded to nearest even.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

struct __half {
  std::uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 0x1f, digits = x.bits & 0x3ff;
  float value = exponent == 0x1f ? (digits ? NAN : INFINITY)
                : exponent       ? std::ldexp(1024.0f + digits, exponent - 25)
                                 : std::ldexp(static_cast<float>(digits), -24);
  return x.bits & 0x8000 ? -value : value;
}

inline __half __float2half_rn(float x) {
  const std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const auto with_sign = [sign](int bits) {
    return __half{static_cast<std::uint16_t>(sign | bits)};
  };
  if (std::isnan(x)) return with_sign(0x7fff);
  const float size = std::fabs(x);
  if (size == 0) return with_sign(0);
  if (size >= 65520.0f) return with_sign(0x7c00);
  int exponent = 0;
  std::frexp(size, &exponent);                    // size in [2^(exponent - 1), 2^exponent)
  const int unit = std::max(exponent - 11, -24);  // the last digit is worth 2^unit
  // Ties to even is the host's rounding mode; a carry runs on into the exponent as it should.
  const int digits = static_cast<int>(std::nearbyint(std::ldexp(size, -unit)));
  return with_sign((unit + 24) * 1024 + digits);
}
