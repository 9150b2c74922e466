// exp, sigmoid and tanh without branches or calls, so that compilers vectorise the loops around
// them. float is accurate to about 1 unit in the last place of exp, double to about 2.
#pragma once

#include <cstdint>
#include <cstring>

namespace minrnn {

#define MINRNN_INLINE inline __attribute__((always_inline))
#define MINRNN_LAMBDA __attribute__((always_inline))

template <class To, class From>
MINRNN_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// 2^n for the n that `magic + n` carries in its lowest bits (see below), |n| <= 126 or 1022.
MINRNN_INLINE float power_of_two(float shifted) {
  return bits_as<float>((bits_as<int32_t>(shifted) << 23) + (127 << 23));
}

MINRNN_INLINE double power_of_two(double shifted) {
  return bits_as<double>((bits_as<int64_t>(shifted) << 52) + (int64_t{1023} << 52));
}

// exp(x) for x <= 0, down to the smallest subnormal; NaN stays NaN.
//
// x = n ln 2 + r with |r| <= ln 2 / 2. Adding and subtracting a large constant rounds to a whole
// number, which then stands in the lowest bits of the sum. 2^n is applied as two factors, since
// n alone reaches below the smallest normal exponent.
MINRNN_INLINE float exp_nonpositive(float x) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23
  x = x < -104.0f ? -104.0f : x;
  const float half = x * 0.72134752f;  // x / (2 ln 2): half of n, rounded
  const float shifted_1 = half + magic, n_1 = shifted_1 - magic;
  const float shifted_2 = (x * 1.44269504f - n_1) + magic, n_2 = shifted_2 - magic;
  const float n = n_1 + n_2;
  // ln 2 in two parts, the first with few enough bits that n times it is exact
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691e-4f;  // minimax, as in Cephes' expf
  p = p * r + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665796e-2f;
  p = p * r + 1.6666665e-1f;
  p = p * r + 5.0000001e-1f;
  p = p * r * r + r + 1.0f;
  return p * power_of_two(shifted_1) * power_of_two(shifted_2);
}

MINRNN_INLINE double exp_nonpositive(double x) {
  constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52
  x = x < -746.0 ? -746.0 : x;
  const double shifted_1 = x * 0.72134752044448170 + magic, n_1 = shifted_1 - magic;
  const double shifted_2 = (x * 1.4426950408889634 - n_1) + magic, n_2 = shifted_2 - magic;
  const double n = n_1 + n_2;
  const double r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  double p = 1.0 / 6227020800.0;  // Taylor to r^13 / 13!: the rest is below 5e-18
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  return p * power_of_two(shifted_1) * power_of_two(shifted_2);
}

template <class C>
MINRNN_INLINE C absolute(C x) {
  return x < C(0) ? -x : x;
}

// sigmoid(x) and sigmoid(-x) from one exponential, both to full relative precision.
template <class C>
MINRNN_INLINE void sigmoids(C x, C& open, C& shut) {
  const C e = exp_nonpositive(-absolute(x));
  const C larger = C(1) / (C(1) + e), smaller = e * larger;
  open = x < C(0) ? smaller : larger;
  shut = x < C(0) ? larger : smaller;
}

// tanh(x): the exponential form loses digits where x is small, a polynomial takes over there.
template <class C>
MINRNN_INLINE C hyperbolic_tangent(C x) {
  const C size = absolute(x);
  const C e = exp_nonpositive(C(-2) * size);
  const C large = (C(1) - e) / (C(1) + e);
  const C y = x * x;
  // Taylor coefficients of (tanh x) / x - 1 over x^2, enough for |x| < 0.3 (double: |x| < 0.1)
  C p = C(-929569.0 / 638512875.0);
  p = p * y + C(21844.0 / 6081075.0);
  p = p * y + C(-1382.0 / 155925.0);
  p = p * y + C(62.0 / 2835.0);
  p = p * y + C(-17.0 / 315.0);
  p = p * y + C(2.0 / 15.0);
  p = p * y + C(-1.0 / 3.0);
  const C small = x + x * y * p;
  const C threshold = sizeof(C) == 4 ? C(0.3) : C(0.1);
  return size < threshold ? small : (x < C(0) ? -large : large);
}

}  // namespace minrnn
