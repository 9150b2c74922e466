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

// The candidate at v, top / bottom, and its slope. At v = 0, g has the slope of its right side.
template <Candidate candidate, class C>
struct Activation {
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

  // From g, the gradient of the state after the step, and p, the state before it.
  template <class C>
  static MINRNN_INLINE void gradients(const C* x, C g, C p, C* dx, C& a) {
    a = x[0];
    dx[0] = g * p;
    dx[1] = g;
  }
};

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
    a = z.shut * value.bottom * scale;
    b = z.open * value.top * scale;
  }

  template <class C>
  static MINRNN_INLINE void gradients(const C* x, C g, C p, C* dx, C& a) {
    const Sigmoid<C> k(x[0]);
    const Activation<candidate, C> v(x[1]);
    const C scale = C(1) / (k.sum * v.bottom);
    const C inverse = k.sum * scale, value = v.top * inverse;
    const C z = k.open * v.bottom * scale;
    a = k.shut * v.bottom * scale;
    dx[0] = g * (value - p) * z * a;
    dx[1] = g * z * v.slope(x[1], value, inverse);
  }
};

template <Candidate candidate, bool normalized>
struct MinLSTM {
  static constexpr int num_gates = 3;
  static constexpr bool has_activations = true;

  // What both directions need of the gates: a = keep / sum, i' (or i) = take / sum.
  template <class C>
  struct Gates {
    Sigmoid<C> f, i;
    C keep, take, sum;

    MINRNN_INLINE Gates(C f_, C i_, C lift) : f(f_ + lift), i(i_ + lift) {
      keep = f.open * i.sum;
      take = i.open * f.sum;
      sum = normalized ? keep + take : f.sum * i.sum;
    }
  };

  // Normalised gates depend on sigmoid(f) / sigmoid(i) only, and far below 0 that is exp(f - i).
  // Both are lifted there, so that no finite pair underflows to 0/0.
  template <class C>
  static MINRNN_INLINE Gates<C> gates(const C* x) {
    if (!normalized) return Gates<C>(x[0], x[1], C(0));
    const C larger = x[0] < x[1] ? x[1] : x[0];
    return Gates<C>(x[0], x[1], larger < C(-40) ? C(-40) - larger : C(0));
  }

  template <class C>
  static MINRNN_INLINE void coefficients(const C* x, C& a, C& b) {
    const Gates<C> gate = gates(x);
    const Activation<candidate, C> value(x[2]);
    const C scale = C(1) / (gate.sum * value.bottom);
    a = gate.keep * value.bottom * scale;
    b = gate.take * value.top * scale;
  }

  template <class C>
  static MINRNN_INLINE void gradients(const C* x, C g, C p, C* dx, C& a) {
    const Gates<C> gate = gates(x);
    const Activation<candidate, C> v(x[2]);
    const C sums = gate.f.sum * gate.i.sum, rest = gate.sum * v.bottom;
    const C scale = C(1) / (sums * rest);
    const C shut_f = gate.f.shut * gate.i.sum * rest * scale;
    const C shut_i = gate.i.shut * gate.f.sum * rest * scale;
    const C inverse = sums * gate.sum * scale, value = v.top * inverse;
    a = gate.keep * v.bottom * sums * scale;
    const C take = gate.take * v.bottom * sums * scale;
    if constexpr (normalized) {
      const C dd = g * (value - p) * a * take;
      dx[0] = -dd * shut_f;
      dx[1] = dd * shut_i;
    } else {
      dx[0] = g * p * a * shut_f;
      dx[1] = g * value * take * shut_i;
    }
    dx[2] = g * take * v.slope(x[2], value, inverse);
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

// Asks for a row that is read soon: short rows, from the last step to the first, are not what the
// hardware foresees (measured: 1.6 times as fast with rows of 256 bytes).
template <class S>
MINRNN_INLINE void prefetch(const S* row, int64_t width) {
  for (int64_t c = 0; c < width; c += 64 / sizeof(S)) __builtin_prefetch(row + c);
}

// How many steps ahead, so that the distance is about 2 kB.
template <class S>
MINRNN_INLINE int64_t steps_ahead(int64_t width) {
  return 1 + 2048 / (width * static_cast<int64_t>(sizeof(S)));
}

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
  if (width == 0) return;
  const int64_t ahead = steps_ahead<S>(width);
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
    if (t >= ahead) {
      prefetch(x0 - ahead * sequence.x_step[0], width);
      prefetch(x1 - ahead * sequence.x_step[1], width);
      if (Op::num_gates > 2) prefetch(x2 - ahead * sequence.x_step[2], width);
      prefetch(dh_t - ahead * dh_step, width);
      prefetch(h_before - ahead * h_step, width);
    }
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
