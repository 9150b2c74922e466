// What scan, mingru and minlstm compute in one step, and its derivatives: a struct each, Scan, MinGRU,
// MinLSTM. kernels.h runs them over time. Letters as in minrnn/ops/__init__.py; formulas in
// docs/equations.md, section 10.
//
// S is the type in memory, C that of arithmetic and state: double for double, else float.
#pragma once

#include <cstdint>

#include "vector_math.h"

namespace minrnn {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

MINRNN_INLINE float load(float x) { return x; }
MINRNN_INLINE double load(double x) { return x; }
MINRNN_INLINE float load(BFloat16 x) { return bits_as<float>(uint32_t{x.bits} << 16); }

MINRNN_INLINE float load(Float16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, size = uint32_t{x.bits & 0x7fffu};
  // the exponent's bias differs by 112; multiplying also sets subnormals right
  const float finite = bits_as<float>(size << 13) * 0x1p112f;
  const uint32_t special = 0x7f800000u | (size << 13);
  return bits_as<float>(sign | (size >= 0x7c00u ? special : bits_as<uint32_t>(finite)));
}

MINRNN_INLINE void store(float& to, float x) { to = x; }
MINRNN_INLINE void store(double& to, double x) { to = x; }

// To the nearest, ties to even.
MINRNN_INLINE void store(BFloat16& to, float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

MINRNN_INLINE void store(Float16& to, float x) {
  const uint32_t bits = bits_as<uint32_t>(x), sign = (bits >> 16) & 0x8000u;
  const uint32_t size = bits & 0x7fffffffu;
  // normal: shift the exponent's bias, round at bit 13
  const uint32_t normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
  // subnormal: adding 1/2 puts the bits that stay at the lowest end, rounded
  const uint32_t tiny = bits_as<uint32_t>(bits_as<float>(size) + 0.5f) - 0x3f000000u;
  uint32_t half = size < (113u << 23) ? tiny : normal;
  half = size >= 0x477ff000u ? 0x7c00u : half;  // 65520 and more round to infinity
  half = size > 0x7f800000u ? 0x7e00u : half;
  to.bits = static_cast<uint16_t>(sign | half);
}

template <class S>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

enum class Candidate { g, identity, tanh };

// The candidate at v, top / bottom, and its slope. At v = 0, g has the slope of its right side.
template <Candidate candidate, class C>
struct Activation {
  static constexpr bool divides = candidate == Candidate::g;  // else bottom is 1
  C top, bottom;

  MINRNN_INLINE explicit Activation(C v) {
    bottom = C(1);
    if constexpr (candidate == Candidate::g) {
      const C e = exp_nonpositive(-absolute(v));
      // written so that NaN takes the branch v + 0.5
      top = v < C(0) ? e : v + C(0.5);
      bottom = v < C(0) ? C(1) + e : C(1);
    } else if constexpr (candidate == Candidate::tanh) {
      top = hyperbolic_tangent(v);
    } else {
      top = v;
    }
  }

  // From v, the candidate and 1 / bottom.
  static MINRNN_INLINE C slope(C v, C value, C inverse) {
    if constexpr (candidate == Candidate::g) return v < C(0) ? value * inverse : C(1);
    if constexpr (candidate == Candidate::tanh) return C(1) - value * value;
    return C(1);
  }
};

struct Scan {
  static constexpr int num_gates = 2;
  static constexpr bool has_activations = false;

  template <class C>
  static MINRNN_INLINE void coefficients(const C* x, C& a, C& b) {
    a = x[0];
    b = x[1];
  }

  // The derivatives of the state after the step, by the gates (dx) and by the state before it, p (a).
  template <class C>
  static MINRNN_INLINE void derivatives(const C* x, C p, C* dx, C& a) {
    a = x[0];
    dx[0] = p;
    dx[1] = C(1);
  }
};

// keep / (keep + lose) from the smaller of the two shares. The division behind a share is off by some
// units of its last place; in a decay near 1 that would be raised to the power of the number of
// steps, and a shut gate would leak. 1 - small has the rounding of small only: 1 where small is 0.
template <class C>
MINRNN_INLINE C share(bool keeps_most, C small) {
  return keeps_most ? C(1) - small : small;
}

// Quotients share one division: 1 / (x y) times y is 1 / x.
template <Candidate candidate>
struct MinGRU {
  static constexpr int num_gates = 2;
  static constexpr bool has_activations = true;

  template <class C>
  static MINRNN_INLINE void coefficients(const C* x, C& a, C& b) {
    const Sigmoid<C> z(x[0]);
    const Activation<candidate, C> value(x[1]);
    const C scale = C(1) / (z.sum * value.bottom);
    const C small = z.small * value.bottom * scale;
    a = share(x[0] < C(0), small);
    b = value.divides ? z.open * value.top * scale : share(C(0) <= x[0], small) * value.top;
  }

  template <class C>
  static MINRNN_INLINE void derivatives(const C* x, C p, C* dx, C& a) {
    const Sigmoid<C> k(x[0]);
    const Activation<candidate, C> v(x[1]);
    const C scale = C(1) / (k.sum * v.bottom);
    const C inverse = k.sum * scale, value = v.top * inverse;
    const C small = k.small * v.bottom * scale;
    const C z = share(C(0) <= x[0], small);
    a = share(x[0] < C(0), small);
    dx[0] = (value - p) * z * a;
    dx[1] = z * v.slope(x[1], value, inverse);
  }
};

template <Candidate candidate, bool normalized>
struct MinLSTM {
  static constexpr int num_gates = 3;
  static constexpr bool has_activations = true;

  // What both directions need of the gates: a = keep / sum, i' (or i) = take / sum. `less` is the
  // smaller of keep and sum - keep.
  template <class C>
  struct Gates {
    Sigmoid<C> f, i;
    C keep, take, sum, less;
    bool keeps_most;

    MINRNN_INLINE Gates(C f_, C i_) : f(f_), i(i_) {
      keep = f.open * i.sum;
      take = i.open * f.sum;
      sum = normalized ? keep + take : f.sum * i.sum;
      keeps_most = normalized ? take < keep : C(0) < f_;
      less = !normalized ? f.small * i.sum : take < keep ? take : keep;
    }

    // a, from 1 / sum.
    MINRNN_INLINE C decay(C part) const { return share(keeps_most, less * part); }
  };

  // Normalised gates depend on sigmoid(f) / sigmoid(i) only, and far below 0 that is exp(f - i), while
  // sigmoid(-f) and sigmoid(-i) are 1. Both are raised there by the same, so that no finite pair
  // underflows to 0/0. The larger is subtracted first: it would swallow `far`.
  template <class C>
  static MINRNN_INLINE Gates<C> gates(const C* x) {
    if (!normalized) return Gates<C>(x[0], x[1]);
    // 1 + exp(far) rounds to 1
    constexpr C far = sizeof(C) == 4 ? C(-18) : C(-40);
    const C larger = x[0] < x[1] ? x[1] : x[0];
    const bool raise = larger < far;
    return Gates<C>(raise ? (x[0] - larger) + far : x[0], raise ? (x[1] - larger) + far : x[1]);
  }

  template <class C>
  static MINRNN_INLINE void coefficients(const C* x, C& a, C& b) {
    const Gates<C> gate = gates(x);
    const Activation<candidate, C> value(x[2]);
    const C scale = C(1) / (gate.sum * value.bottom);
    a = gate.decay(value.bottom * scale);
    b = gate.take * value.top * scale;
  }

  template <class C>
  static MINRNN_INLINE void derivatives(const C* x, C p, C* dx, C& a) {
    const Gates<C> gate = gates(x);
    const Activation<candidate, C> v(x[2]);
    const C sums = gate.f.sum * gate.i.sum, rest = gate.sum * v.bottom;
    const C scale = C(1) / (sums * rest);
    const C shut_f = gate.f.shut * gate.i.sum * rest * scale;
    const C shut_i = gate.i.shut * gate.f.sum * rest * scale;
    const C inverse = sums * gate.sum * scale, value = v.top * inverse;
    a = gate.decay(v.bottom * sums * scale);
    const C take = gate.take * v.bottom * sums * scale;
    if constexpr (normalized) {
      const C dd = (value - p) * a * take;
      dx[0] = -dd * shut_f;
      dx[1] = dd * shut_i;
    } else {
      dx[0] = p * a * shut_f;
      dx[1] = value * take * shut_i;
    }
    dx[2] = take * v.slope(x[2], value, inverse);
  }
};

}  // namespace minrnn
