// scan, mingru and minlstm, forward and backward, as single passes over memory.
//
// Plain C++ on raw pointers; register.cpp knows torch. One template per direction: time outside,
// channels inside, the state in a buffer that stays in the first-level cache. What the operators
// differ in, the coefficients of a step and their derivatives, is a struct each: Scan, MinGRU,
// MinLSTM. Letters as in minrnn/ops/__init__.py; formulas in docs/equations.md, section 10.
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

// The candidate and its slope at v. At v = 0, g has the slope of its right side.
template <Candidate candidate, class C>
MINRNN_INLINE void activate(C v, C& value, C& slope) {
  if constexpr (candidate == Candidate::g) {
    C open, shut;
    sigmoids(v, open, shut);
    // written so that NaN takes the branch v + 0.5
    value = v < C(0) ? open : v + C(0.5);
    slope = v < C(0) ? open * shut : C(1);
  } else if constexpr (candidate == Candidate::tanh) {
    value = hyperbolic_tangent(v);
    slope = C(1) - value * value;
  } else {
    value = v;
    slope = C(1);
  }
}

struct Scan {
  static constexpr int num_gates = 2;

  template <class C>
  static MINRNN_INLINE void coefficients(const C* x, C& a, C& b) {
    a = x[0];
    b = x[1];
  }

  // From g, the gradient of the state after the step, and p, the state before it.
  template <class C>
  static MINRNN_INLINE void gradients(const C* x, C g, C p, C* dx, C& a) {
    a = x[0];
    dx[0] = g * p;
    dx[1] = g;
  }
};

template <Candidate candidate>
struct MinGRU {
  static constexpr int num_gates = 2;

  template <class C>
  static MINRNN_INLINE void coefficients(const C* x, C& a, C& b) {
    C z, value, slope;
    sigmoids(x[0], z, a);
    activate<candidate>(x[1], value, slope);
    b = z * value;
  }

  template <class C>
  static MINRNN_INLINE void gradients(const C* x, C g, C p, C* dx, C& a) {
    C z, value, slope;
    sigmoids(x[0], z, a);
    activate<candidate>(x[1], value, slope);
    dx[0] = g * (value - p) * z * a;
    dx[1] = g * z * slope;
  }
};

template <Candidate candidate, bool normalized>
struct MinLSTM {
  static constexpr int num_gates = 3;

  // sigmoid(f) = open_f / sum_f and sigmoid(-f) = shut_f / sum_f, sum_f = 1 + exp(-|f|).
  template <class C>
  struct Half {
    C open, shut, sum;

    MINRNN_INLINE explicit Half(C x) {
      const C e = exp_nonpositive(-absolute(x));
      open = x < C(0) ? e : C(1);
      shut = x < C(0) ? C(1) : e;
      sum = C(1) + e;
    }
  };

  // f' = sigmoid(f) / (sigmoid(f) + sigmoid(i)), with the larger of the two numerators brought to
  // 1 by a common factor, so that no pair of gates gives 0/0.
  template <class C>
  static MINRNN_INLINE void normalize(C f, C i, const Half<C>& F, const Half<C>& I, C& a, C& in) {
    const C low_f = f < C(0) ? f : C(0), low_i = i < C(0) ? i : C(0);
    const C e = exp_nonpositive(-absolute(low_f - low_i));
    const C weight_f = (low_f < low_i ? e : C(1)) * I.sum;
    const C weight_i = (low_f < low_i ? C(1) : e) * F.sum;
    const C scale = C(1) / (weight_f + weight_i);
    a = weight_f * scale;
    in = weight_i * scale;
  }

  template <class C>
  static MINRNN_INLINE void gates(const C* x, C& a, C& in, C& shut_f, C& shut_i) {
    const Half<C> F(x[0]), I(x[1]);
    shut_f = F.shut / F.sum;
    shut_i = I.shut / I.sum;
    if constexpr (normalized) {
      normalize(x[0], x[1], F, I, a, in);
    } else {
      a = F.open / F.sum;
      in = I.open / I.sum;
    }
  }

  template <class C>
  static MINRNN_INLINE void coefficients(const C* x, C& a, C& b) {
    C in, shut_f, shut_i, value, slope;
    gates(x, a, in, shut_f, shut_i);
    activate<candidate>(x[2], value, slope);
    b = in * value;
  }

  template <class C>
  static MINRNN_INLINE void gradients(const C* x, C g, C p, C* dx, C& a) {
    C in, shut_f, shut_i, value, slope;
    gates(x, a, in, shut_f, shut_i);
    activate<candidate>(x[2], value, slope);
    if constexpr (normalized) {
      const C dd = g * (value - p) * a * in;
      dx[0] = -dd * shut_f;
      dx[1] = dd * shut_i;
    } else {
      dx[0] = g * p * a * shut_f;
      dx[1] = g * value * in * shut_i;
    }
    dx[2] = g * in * slope;
  }
};

// One sequence and a range of its channels, in the order of processing: for `reverse`, pointers
// stand at the last step and strides are negative. A step's channels are dense.
template <class S>
struct Sequence {
  using C = typename Compute<S>::type;

  const S* x[3];        // gates (T, width)
  int64_t x_step[3];    // from one step to the next
  const bool* reset;    // (T) or null
  int64_t reset_step;
  const C* h0;          // (width) or null: zeros
  int64_t T, width;
};

// h_t = a_t * h_{t-1} + b_t. Writes h (T, width) and h_T (width).
template <class Op, class S>
MINRNN_INLINE void forward(const Sequence<S>& sequence, S* h, int64_t h_step,
                           typename Compute<S>::type* __restrict h_T) {
  using C = typename Compute<S>::type;
  const int64_t width = sequence.width;
  for (int64_t c = 0; c < width; ++c) h_T[c] = sequence.h0 ? sequence.h0[c] : C(0);
  for (int64_t t = 0; t < sequence.T; ++t) {
    if (sequence.reset && sequence.reset[t * sequence.reset_step])
      for (int64_t c = 0; c < width; ++c) h_T[c] = C(0);
    const S* __restrict x0 = sequence.x[0] + t * sequence.x_step[0];
    const S* __restrict x1 = sequence.x[1] + t * sequence.x_step[1];
    const S* __restrict x2 = Op::num_gates > 2 ? sequence.x[2] + t * sequence.x_step[2] : x1;
    S* __restrict h_t = h + t * h_step;
#pragma GCC ivdep
    for (int64_t c = 0; c < width; ++c) {
      const C x[3] = {load(x0[c]), load(x1[c]), Op::num_gates > 2 ? load(x2[c]) : C(0)};
      C a, b;
      Op::coefficients(x, a, b);
      const C state = a * h_T[c] + b;
      h_T[c] = state;
      store(h_t[c], state);
    }
  }
}

// g_t = dh_t + a_{t+1} * g_{t+1}, from the last step to the first. Writes dx (T, width) for each
// gate; `carry` (width) holds dh_T on entry and dh0 on return.
template <class Op, class S>
MINRNN_INLINE void backward(const Sequence<S>& sequence, const S* dh, int64_t dh_step, const S* h,
                            int64_t h_step, S* const* dx, const int64_t* dx_step,
                            typename Compute<S>::type* __restrict carry) {
  using C = typename Compute<S>::type;
  const int64_t width = sequence.width;
  for (int64_t t = sequence.T - 1; t >= 0; --t) {
    const bool reset = sequence.reset && sequence.reset[t * sequence.reset_step];
    const S* __restrict x0 = sequence.x[0] + t * sequence.x_step[0];
    const S* __restrict x1 = sequence.x[1] + t * sequence.x_step[1];
    const S* __restrict x2 = Op::num_gates > 2 ? sequence.x[2] + t * sequence.x_step[2] : x1;
    const S* __restrict dh_t = dh + t * dh_step;
    const S* __restrict h_before = h + (t - 1) * h_step;
    S* __restrict dx0 = dx[0] + t * dx_step[0];
    S* __restrict dx1 = dx[1] + t * dx_step[1];
    S* __restrict dx2 = Op::num_gates > 2 ? dx[2] + t * dx_step[2] : dx1;
    const C* __restrict h0 = sequence.h0;
    const auto step = [&](int64_t c, C p) MINRNN_LAMBDA {
      const C x[3] = {load(x0[c]), load(x1[c]), Op::num_gates > 2 ? load(x2[c]) : C(0)};
      C d[3], a;
      const C g = load(dh_t[c]) + carry[c];
      Op::gradients(x, g, p, d, a);
      carry[c] = reset ? C(0) : a * g;
      store(dx0[c], d[0]);
      store(dx1[c], d[1]);
      if (Op::num_gates > 2) store(dx2[c], d[2]);
    };
    if (reset || (t == 0 && !h0)) {
#pragma GCC ivdep
      for (int64_t c = 0; c < width; ++c) step(c, C(0));
    } else if (t == 0) {
#pragma GCC ivdep
      for (int64_t c = 0; c < width; ++c) step(c, h0[c]);
    } else {
#pragma GCC ivdep
      for (int64_t c = 0; c < width; ++c) step(c, load(h_before[c]));
    }
  }
}

}  // namespace minrnn
