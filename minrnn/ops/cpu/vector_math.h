// exp, sigmoid and tanh without branches or calls, so that compilers vectorise the loops around
// them. float is accurate to about 1 unit in the last place of exp, double to about 2.
#pragma once

#include <cstdint>
#include <cstring>

#include "compiler.h"

namespace minrnn {

template <class To, class From>
MINRNN_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// exp(x) for x <= 0; below the smallest normal number it is 0, NaN stays NaN.
//
// x = n ln 2 + r with |r| <= ln 2 / 2. Adding a large constant rounds x / ln 2 to the whole number
// n, which then stands in the lowest bits of the sum; shifted to where the exponent is and added to
// the bits of exp(r), it multiplies by 2^n.
MINRNN_INLINE float exp_nonpositive(float x) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23
  const float shifted = x * 1.44269504f + magic, n = shifted - magic;
  // ln 2 in two parts, the first with few enough bits that n times it is exact
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.381432036e-3f;  // minimax fit of (exp(r) - 1 - r) / r^2, error of exp(r) 3.1e-9
  p = p * r + 8.368851085e-3f;
  p = p * r + 4.166840109e-2f;
  p = p * r + 1.666651952e-1f;
  p = p * r + 4.999999337e-1f;
  p = p * (r * r) + r + 1.0f;
  const float scaled = bits_as<float>(bits_as<uint32_t>(p) + (bits_as<uint32_t>(shifted) << 23));
  return x < -87.336544f ? 0.0f : (x != x ? x : scaled);
}

MINRNN_INLINE double exp_nonpositive(double x) {
  constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52
  const double shifted = x * 1.4426950408889634 + magic, n = shifted - magic;
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
  const double scaled = bits_as<double>(bits_as<uint64_t>(p) + (bits_as<uint64_t>(shifted) << 52));
  return x < -708.396418532264 ? 0.0 : (x != x ? x : scaled);
}

template <class C>
MINRNN_INLINE C absolute(C x) {
  return x < C(0) ? -x : x;
}

// sigmoid(x) = open / sum and sigmoid(-x) = shut / sum, both to full relative precision, from one
// exponential. Undivided, so that several quotients of one step can share a single division. `small`
// is the smaller of open and shut.
template <class C>
struct Sigmoid {
  C open, shut, sum, small;

  MINRNN_INLINE explicit Sigmoid(C x) {
    small = exp_nonpositive(-absolute(x));
    open = x < C(0) ? small : C(1);
    shut = x < C(0) ? C(1) : small;
    sum = C(1) + small;
  }
};

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
