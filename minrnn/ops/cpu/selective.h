// The selective state space of Mamba, forward and backward, for one row of the batch and a block of
// channels: plain C++, no torch. With N states for each of D channels,
//
//   h_t[d, n] = exp(dt_t[d] A[d, n]) h_{t-1}[d, n] + w_t[d, n] B_t[n] u_t[d]
//   y_t[d]    = sum_n C_t[n] h_t[d, n]
//
// and w_t = dt_t, or (exp(dt_t A) - 1) / A if `zoh`. The T * D * N states are never in memory: a
// block of channels keeps its state in the nearest cache, channels innermost, and the gradient
// computes the states of a few steps once more.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "vector_math.h"

namespace minrnn {

// Channels of a block and steps that the gradient keeps: states of both in the second cache.
constexpr int64_t selective_width = 64, selective_steps = 32;
constexpr int64_t selective_lanes = 16;

// Tensors of a call, contiguous: u, dt (B, T, D); b, c (B, T, N); A (D, N); h0 (B, D, N).
template <class S>
struct Selective {
  const S *u, *dt, *A, *b, *c, *h0;
  int64_t T, D, N;
  bool zoh;
};

// Where gradients go, shaped as what they are of; dA has a row for each of the batch.
template <class S>
struct SelectiveGradients {
  const S *dy, *dh_T;
  S *du, *ddt, *dA, *db, *dc, *dh0;
};

// exp(x). States decay where A < 0 < dt; where they do not, they grow as the formula says.
template <class S>
MINRNN_INLINE S exponential(S x) {
  // up to here `exp_nonpositive` is right for x > 0, too
  const S most = sizeof(S) == 4 ? S(88.722835) : S(709.782712893384);
  return x > most ? std::numeric_limits<S>::infinity() : exp_nonpositive(x);
}

// exp(x) - 1, to full relative precision.
template <class S>
MINRNN_INLINE S exponential_less_one(S x, S exp_x) {
  // Taylor: the first term left out is below half a unit for |x| < 0.35 (double: terms to x^14)
  S p = S(1.0 / 87178291200.0);
  if (sizeof(S) == 8) {
    p = p * x + S(1.0 / 6227020800.0);
    p = p * x + S(1.0 / 479001600.0);
    p = p * x + S(1.0 / 39916800.0);
    p = p * x + S(1.0 / 3628800.0);
    p = p * x + S(1.0 / 362880.0);
  } else {
    p = S(1.0 / 362880.0);
  }
  p = p * x + S(1.0 / 40320.0);
  p = p * x + S(1.0 / 5040.0);
  p = p * x + S(1.0 / 720.0);
  p = p * x + S(1.0 / 120.0);
  p = p * x + S(1.0 / 24.0);
  p = p * x + S(1.0 / 6.0);
  p = p * x + S(0.5);
  p = p * x * x + x;
  return absolute(x) < S(0.35) ? p : exp_x - S(1);
}

// (width, N) of a tensor (D, N) into (N, W), and back.
template <class S>
void turn_in(const S* from, int64_t width, int64_t N, int64_t W, S* to) {
  for (int64_t j = 0; j < width; ++j)
    for (int64_t n = 0; n < N; ++n) to[n * W + j] = from[j * N + n];
}

template <class S>
void turn_out(const S* from, int64_t width, int64_t N, int64_t W, S* to) {
  for (int64_t j = 0; j < width; ++j)
    for (int64_t n = 0; n < N; ++n) to[j * N + n] = from[n * W + j];
}

// Numbers that a block of `width` channels takes: whole vectors. Compilers see no constant, and so
// make loops of them instead of hundreds of instructions in a row.
inline int64_t block_width(int64_t width) {
  return (width + selective_lanes - 1) / selective_lanes * selective_lanes;
}

// A block of one row at one time; what is beyond `width` is 0.
template <class S>
struct Step {
  alignas(64) S u[selective_width] = {}, dt[selective_width] = {}, w[selective_width] = {};

  MINRNN_INLINE void load(const Selective<S>& in, int64_t at, int64_t width, int64_t W) {
    for (int64_t j = 0; j < width; ++j) u[j] = in.u[at + j];
    for (int64_t j = 0; j < width; ++j) dt[j] = in.dt[at + j];
    for (int64_t j = 0; j < W; ++j) w[j] = dt[j] * u[j];
  }
};

// One step of state n: h <- a h + w B u; a is told.
template <class S, bool Zoh>
MINRNN_INLINE void selective_step(const Step<S>& step, int64_t W, const S* __restrict A, S b,
                                  S* __restrict a, const S* from, S* h) {
  for (int64_t j = 0; j < W; ++j) {
    const S x = step.dt[j] * A[j], decay = exponential(x);
    const S weight = Zoh ? exponential_less_one(x, decay) / A[j] * step.u[j] : step.w[j];
    a[j] = decay;
    h[j] = decay * from[j] + weight * b;
  }
}

// y (T, D) of row `row`, channels [first, first + width); `h` (B, D, N) is h0 and becomes h_T.
template <class S, bool Zoh>
MINRNN_INLINE void selective_forward(const Selective<S>& in, int64_t row, int64_t first,
                                     int64_t width, S* y, S* h_T) {
  const int64_t T = in.T, D = in.D, N = in.N, W = block_width(width);
  std::vector<S> scratch(2 * N * W, S(0));
  // beyond `width` A is -1, so that nothing is divided by 0
  S *A = scratch.data(), *h = A + N * W;
  std::fill(A, A + N * W, S(-1));
  turn_in(in.A + first * N, width, N, W, A);
  turn_in(in.h0 + (row * D + first) * N, width, N, W, h);
  alignas(64) S a[selective_width], sum[selective_width];
  Step<S> step;
  for (int64_t t = 0; t < T; ++t) {
    const int64_t at = (row * T + t) * D + first;
    const S *b = in.b + (row * T + t) * N, *c = in.c + (row * T + t) * N;
    step.load(in, at, width, W);
    for (int64_t j = 0; j < W; ++j) sum[j] = 0;
    for (int64_t n = 0; n < N; ++n) {
      S* state = h + n * W;
      selective_step<S, Zoh>(step, W, A + n * W, b[n], a, state, state);
      const S weight = c[n];
      for (int64_t j = 0; j < W; ++j) sum[j] += state[j] * weight;
    }
    for (int64_t j = 0; j < width; ++j) y[at + j] = sum[j];
  }
  turn_out(h, width, N, W, h_T + (row * D + first) * N);
}

template <class S>
MINRNN_INLINE S sum_of(S* lanes) {
  for (int64_t half = selective_lanes / 2; half; half /= 2)
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

// One step back of state n. `g` is the gradient by h_t, and becomes that by h_{t-1}.
template <class S, bool Zoh>
MINRNN_INLINE void selective_step_back(const Step<S>& step, int64_t W, const S* __restrict dy,
                                       const S* __restrict A, S b, S c, const S* __restrict a,
                                       const S* __restrict before, const S* __restrict h,
                                       S* __restrict g, S* __restrict dA, S* __restrict dw,
                                       S* __restrict ddt, S& db, S& dc) {
  alignas(64) S to_b[selective_lanes] = {}, to_c[selective_lanes] = {};
  for (int64_t j = 0; j < W; j += selective_lanes)
    for (int64_t l = 0; l < selective_lanes; ++l) {
      const int64_t i = j + l;
      const S grad = g[i] + dy[i] * c;
      to_c[l] += dy[i] * h[i];
      // by the exponent dt A
      S dx = grad * before[i] * a[i];
      if (Zoh) {
        const S size = exponential_less_one(step.dt[i] * A[i], a[i]) / A[i];
        const S dsize = grad * b * step.u[i];
        to_b[l] += grad * size * step.u[i];
        dw[i] += grad * b * size;
        // size = expm1(x) / A: by x is a / A, by A itself -size / A
        dx += dsize * a[i] / A[i];
        dA[i] -= dsize * size / A[i];
      } else {
        to_b[l] += grad * step.w[i];
        dw[i] += grad * b;
      }
      ddt[i] += dx * A[i];
      dA[i] += dx * step.dt[i];
      g[i] = grad * a[i];
    }
  db += sum_of(to_b);
  dc += sum_of(to_c);
}

// Gradients of row `row`, channels [first, first + width); db and dc are added to.
template <class S, bool Zoh>
MINRNN_INLINE void selective_backward(const Selective<S>& in, int64_t row, int64_t first,
                                      int64_t width, const SelectiveGradients<S>& to) {
  const int64_t T = in.T, D = in.D, N = in.N, W = block_width(width), K = selective_steps;
  const int64_t size = N * W, num_chunks = (T + K - 1) / K;
  std::vector<S> scratch((3 + num_chunks + 2 * K + 1) * size, S(0));
  S *A = scratch.data(), *dA = A + size, *g = dA + size, *starts = g + size;
  S *states = starts + num_chunks * size, *decays = states + (K + 1) * size;
  std::fill(A, A + size, S(-1));
  turn_in(in.A + first * N, width, N, W, A);
  turn_in(in.h0 + (row * D + first) * N, width, N, W, states);
  turn_in(to.dh_T + (row * D + first) * N, width, N, W, g);
  Step<S> step;
  // the states of a chunk from the one before it, which stands first
  const auto run = [&](int64_t chunk) MINRNN_LAMBDA {
    const int64_t begin = chunk * K, end = std::min(T, begin + K);
    for (int64_t t = begin; t < end; ++t) {
      const S* b = in.b + (row * T + t) * N;
      step.load(in, (row * T + t) * D + first, width, W);
      S* from = states + (t - begin) * size;
      for (int64_t n = 0; n < N; ++n)
        selective_step<S, Zoh>(step, W, A + n * W, b[n], decays + (t - begin) * size + n * W,
                               from + n * W, from + size + n * W);
    }
    return end - begin;
  };
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    std::copy(states, states + size, starts + chunk * size);
    if (chunk + 1 == num_chunks) break;
    const int64_t steps = run(chunk);
    std::copy(states + steps * size, states + (steps + 1) * size, states);
  }
  alignas(64) S dy[selective_width] = {}, dw[selective_width], ddt[selective_width];
  for (int64_t chunk = num_chunks; chunk-- > 0;) {
    std::copy(starts + chunk * size, starts + (chunk + 1) * size, states);
    for (int64_t s = run(chunk); s-- > 0;) {
      const int64_t t = chunk * K + s, at = (row * T + t) * D + first, side = (row * T + t) * N;
      step.load(in, at, width, W);
      for (int64_t j = 0; j < width; ++j) dy[j] = to.dy[at + j];
      for (int64_t j = 0; j < W; ++j) dw[j] = ddt[j] = 0;
      for (int64_t n = 0; n < N; ++n) {
        const int64_t n_at = s * size + n * W;
        selective_step_back<S, Zoh>(step, W, dy, A + n * W, in.b[side + n], in.c[side + n],
                                    decays + n_at, states + n_at, states + size + n_at, g + n * W,
                                    dA + n * W, dw, ddt, to.db[side + n], to.dc[side + n]);
      }
      // w = dt u; with `zoh` dw is by u already
      for (int64_t j = 0; j < width; ++j) to.du[at + j] = Zoh ? dw[j] : dw[j] * step.dt[j];
      for (int64_t j = 0; j < width; ++j) to.ddt[at + j] = ddt[j] + (Zoh ? S(0) : dw[j] * step.u[j]);
    }
  }
  turn_out(g, width, N, W, to.dh0 + (row * D + first) * N);
  turn_out(dA, width, N, W, to.dA + (row * D + first) * N);
}

}  // namespace minrnn
