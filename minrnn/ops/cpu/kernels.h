// scan, mingru and minlstm over time, forward and backward, as single passes over memory.
//
// Plain C++ on raw pointers; register.cpp knows torch. A sequence is worked through tile by tile, a
// tile being some 8,000 numbers whose intermediate results stay in the second-level cache:
//
//   fill    what a step computes from its gates alone: a, b (backward: a, dh, derivatives)
//   recur   the chain of multiply-adds, tile after tile: the only part that waits for the one before
//   drain   what is left: rounding h, multiplying the derivatives by g
//
// Threads may therefore share one sequence, each taking the next tile: only `recur` goes in turn.
// It does the same operations in the same order as a loop over single steps, so the result is the
// same bit for bit, however it was cut; rows narrower than 8 numbers are the exception (compose).
#pragma once

#include "chain.h"

namespace minrnn {

// Some steps of one sequence and a range of its channels, in the order of processing: for `reverse`,
// pointers stand at the last step and strides are negative. A step's channels are dense.
template <class S>
struct Stretch {
  using C = typename Compute<S>::type;

  const S* x[3];         // gates (T, width)
  int64_t x_step[3];     // from one step to the next
  const bool* reset;     // (T) or null
  int64_t reset_step;
  int64_t T, width;
  const Turn* turn;      // null: nobody else works on this sequence. Else T is one tile at most
};

// The numbers of a tile, line by line: a row each, or pieces where rows follow without gaps.
struct Pieces {
  int64_t rows, width;
  bool dense;
  static constexpr int64_t piece = 512;

  // Calls f(t, j, count) for `count` numbers from number j of row t on.
  template <class F>
  MINRNN_INLINE void for_each(const F& f) const {
    const int64_t all = rows * width, lines = dense ? (all + piece - 1) / piece : rows;
    for (int64_t n = 0; n < lines; ++n) {
      const int64_t j = dense ? n * piece : 0, left = all - j;
      f(dense ? 0 : n, j, !dense ? width : left < piece ? left : piece);
    }
  }
};

// h_t = a_t * h_{t-1} + b_t for the coefficients themselves, in long rows that no other thread works
// on: nothing is computed, so buffers would cost more than they save.
template <class S>
MINRNN_INLINE void forward_rows(const Stretch<S>& q, S* h, int64_t h_step,
                                typename Compute<S>::type* __restrict state) {
  using C = typename Compute<S>::type;
  for (int64_t t = 0; t < q.T; ++t) {
    if (q.reset && q.reset[t * q.reset_step])
      for (int64_t c = 0; c < q.width; ++c) state[c] = C(0);
    const S* __restrict a = q.x[0] + t * q.x_step[0];
    const S* __restrict b = q.x[1] + t * q.x_step[1];
    S* __restrict h_t = h + t * h_step;
MINRNN_IVDEP
    for (int64_t c = 0; c < q.width; ++c) {
      const C next = load(a[c]) * state[c] + load(b[c]);
      state[c] = next;
      store(h_t[c], next);
    }
  }
}

// h_t = a_t * h_{t-1} + b_t. Writes h (T, width); the state (width) moves on.
template <class Op, class S>
MINRNN_INLINE void forward(const Stretch<S>& q, S* h, int64_t h_step,
                           typename Compute<S>::type* state) {
  using C = typename Compute<S>::type;
  const int64_t width = q.width, most = tile_steps(width);
  if constexpr (!Op::has_activations)
    if (!q.turn && width >= 64) return forward_rows(q, h, h_step, state);
  bool dense = h_step == width;
  for (int gate = 0; gate < Op::num_gates; ++gate) dense &= q.x_step[gate] == width;
  Chain<C> chain;
  for (int64_t first = 0; first < q.T; first += most) {
    const Pieces pieces{q.T - first < most ? q.T - first : most, width, dense};
    const bool* reset = q.reset ? q.reset + first * q.reset_step : nullptr;
    chain.begin(pieces.rows, width, reset);
    const bool placed = chain.place_b(h + first * h_step, h_step);
    recur<Op, false>(chain, reset, q.reset_step, state, q.turn, [&]() MINRNN_LAMBDA {
      pieces.for_each([&](int64_t t, int64_t j0, int64_t count) MINRNN_LAMBDA {
        const S* __restrict x0 = q.x[0] + (first + t) * q.x_step[0] + j0;
        const S* __restrict x1 = q.x[1] + (first + t) * q.x_step[1] + j0;
        const S* __restrict x2 = Op::num_gates > 2 ? q.x[2] + (first + t) * q.x_step[2] + j0 : x1;
        C* __restrict a = chain.a + t * width + j0;
        C* __restrict b = chain.b + t * chain.b_step + j0;
MINRNN_IVDEP
        for (int64_t j = 0; j < count; ++j) {
          const C x[3] = {load(x0[j]), load(x1[j]), Op::num_gates > 2 ? load(x2[j]) : C(0)};
          Op::coefficients(x, a[j], b[j]);
        }
      });
    });
    if (placed) continue;
    pieces.for_each([&](int64_t t, int64_t j0, int64_t count) MINRNN_LAMBDA {
      S* __restrict h_t = h + (first + t) * h_step + j0;
      const C* __restrict b = chain.b + t * width + j0;
MINRNN_IVDEP
      for (int64_t j = 0; j < count; ++j) store(h_t[j], b[j]);
    });
  }
}

// What `backward` reads and writes besides the gates.
template <class S>
struct Gradients {
  using C = typename Compute<S>::type;

  const S *dh, *h;      // (T, width)
  int64_t dh_step, h_step;
  const C* before;      // (width), the state before the first step; null: zeros
  bool follows;         // the state before the first step is the row before h instead
  S* dx[3];             // (T, width), a gradient for each gate
  int64_t dx_step[3];
};

// The state before each of `count` numbers from number j of row t on: where it stands, or a copy.
template <class S, class C>
MINRNN_INLINE const C* states_before(const Gradients<S>& to, bool starts, int64_t t, int64_t j,
                                     int64_t width, int64_t count, C* copy) {
  const S* h = to.h + (t - 1) * to.h_step + j;
  // the row before the first is not one of h; a piece may end in the rows after it
  const bool first = t == 0 && !to.follows;
  int64_t own = starts ? count : first && j < width ? width - j : 0;
  own = own < count ? own : count;
  if constexpr (sizeof(S) == sizeof(C))
    if (own == 0) return h;
  const bool zeros = starts || !to.before;
  for (int64_t n = 0; n < own; ++n) copy[n] = zeros ? C(0) : to.before[j + n];
  for (int64_t n = own; n < count; ++n) copy[n] = load(h[n]);
  return copy;
}

// g_t = dh_t + a_{t+1} * g_{t+1}, from the last step to the first. `carry` (width) holds dh_T, or
// a * g of the step after, and moves on to that of the first step, dh0.
template <class Op, class S>
MINRNN_INLINE void backward(const Stretch<S>& q, const Gradients<S>& to,
                            typename Compute<S>::type* carry) {
  using C = typename Compute<S>::type;
  const int64_t width = q.width, most = tile_steps(width);
  bool dense = to.dh_step == width && to.h_step == width && !q.reset;
  for (int gate = 0; gate < Op::num_gates; ++gate)
    dense &= q.x_step[gate] == width && to.dx_step[gate] == width;
  Chain<C> chain;
  C copy[tile_numbers];
  // derivatives wait for g where the gradients go, if these are of the same type
  constexpr bool placed = sizeof(S) == sizeof(C);
  C buffer[3][placed ? 1 : tile_numbers];
  for (int64_t first = q.T > 0 ? (q.T - 1) / most * most : -1; first >= 0; first -= most) {
    const Pieces pieces{q.T - first < most ? q.T - first : most, width, dense};
    const bool* reset = q.reset ? q.reset + first * q.reset_step : nullptr;
    const auto derivative = [&](int gate, int64_t t) MINRNN_LAMBDA {
      if constexpr (placed) return to.dx[gate] + (first + t) * to.dx_step[gate];
      if constexpr (!placed) return buffer[gate] + t * width;
    };
    chain.begin(pieces.rows, width, reset);
    recur<Op, true>(chain, reset, q.reset_step, carry, q.turn, [&]() MINRNN_LAMBDA {
      pieces.for_each([&](int64_t t, int64_t j0, int64_t count) MINRNN_LAMBDA {
        const bool starts = reset && reset[t * q.reset_step];
        const C* __restrict p = states_before(to, starts, first + t, j0, width, count, copy);
        const S* __restrict x0 = q.x[0] + (first + t) * q.x_step[0] + j0;
        const S* __restrict x1 = q.x[1] + (first + t) * q.x_step[1] + j0;
        const S* __restrict x2 = Op::num_gates > 2 ? q.x[2] + (first + t) * q.x_step[2] + j0 : x1;
        const S* __restrict dh = to.dh + (first + t) * to.dh_step + j0;
        C* __restrict a = chain.a + t * width + j0;
        C* __restrict b = chain.b + t * width + j0;
        C* __restrict d0 = derivative(0, t) + j0;
        C* __restrict d1 = derivative(1, t) + j0;
        C* __restrict d2 = Op::num_gates > 2 ? derivative(2, t) + j0 : d1;
MINRNN_IVDEP
        for (int64_t j = 0; j < count; ++j) {
          const C x[3] = {load(x0[j]), load(x1[j]), Op::num_gates > 2 ? load(x2[j]) : C(0)};
          C d[3];
          Op::derivatives(x, p[j], d, a[j]);
          b[j] = load(dh[j]);
          d0[j] = d[0];
          d1[j] = d[1];
          if (Op::num_gates > 2) d2[j] = d[2];
        }
      });
    });
    pieces.for_each([&](int64_t t, int64_t j0, int64_t count) MINRNN_LAMBDA {
      const C* __restrict g = chain.b + t * width + j0;
      for (int gate = 0; gate < Op::num_gates; ++gate) {
        S* dx = to.dx[gate] + (first + t) * to.dx_step[gate] + j0;
        const C* d = derivative(gate, t) + j0;
MINRNN_IVDEP
        for (int64_t j = 0; j < count; ++j) store(dx[j], g[j] * d[j]);
      }
    });
  }
}

}  // namespace minrnn
