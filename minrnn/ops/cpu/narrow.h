// The kernels of kernels.h for rows narrower than a vector that lie in memory without gaps: (T,
// width) is then one line of T * width numbers.
//
// The gates, which are most of the work, are computed along that line, whole vectors at a time, into
// buffers that stay in the first-level cache. The recurrence itself is a chain of multiply-adds, each
// waiting for the one before; a block of steps is therefore cut into pieces whose chains run side by
// side: first what each piece does to a state (its product of decays, and its end from zero), then
// the pieces again from the states so found. What a step computes is what kernels.h has it compute;
// only these states are rounded differently.
#pragma once

#include "kernels.h"

namespace minrnn {

constexpr int64_t narrow_block = 2048;  // numbers in a buffer

// `pieces` of `steps` steps each over `width` channels; the state moves on.
//
//   forward:   s = a * s + b,  b becomes s
//   backward:  g = b + s,  b becomes g,  s = a * g,  from the last step to the first
template <bool back, int pieces, int width, class C>
MINRNN_INLINE void chains(const C* __restrict a, C* __restrict b, int64_t steps, C* state) {
  constexpr int num = pieces * width;
  const int64_t piece = steps * width, count = pieces * piece;
  const auto place = [&](int m, int64_t j, int c) {
    return back ? count - width - (m * piece + j) + c : m * piece + j + c;
  };
  C product[num], end[num], s[num];
  for (int i = 0; i < num; ++i) product[i] = C(1), end[i] = C(0);
  if (pieces > 1)
    for (int64_t j = 0; j < piece; j += width)
#pragma GCC unroll 8
      for (int m = 0; m < pieces - 1; ++m)
#pragma GCC unroll 8
        for (int c = 0; c < width; ++c) {
          const int64_t at = place(m, j, c);
          const int i = m * width + c;
          product[i] *= a[at];
          end[i] = back ? a[at] * (end[i] + b[at]) : a[at] * end[i] + b[at];
        }
  for (int i = 0; i < num; ++i)
    s[i] = i < width ? state[i] : product[i - width] * s[i - width] + end[i - width];
  for (int64_t j = 0; j < piece; j += width)
#pragma GCC unroll 8
    for (int m = 0; m < pieces; ++m)
#pragma GCC unroll 8
      for (int c = 0; c < width; ++c) {
        const int64_t at = place(m, j, c);
        const int i = m * width + c;
        const C value = back ? b[at] + s[i] : a[at] * s[i] + b[at];
        b[at] = value;
        s[i] = back ? a[at] * value : value;
      }
  for (int c = 0; c < width; ++c) state[c] = s[num - width + c];
}

template <bool back, class C>
MINRNN_INLINE void recur(const C* a, C* b, int64_t steps, int64_t width, C* state) {
  const int64_t pieces = width == 1 ? 4 : width == 2 ? 4 : width == 4 ? 2 : 1;
  const int64_t each = steps / pieces, rest = width <= 4 && width != 3 ? steps - each * pieces : steps;
  // the steps that fill no piece go last: at the end forward, at the beginning backward
  const int64_t from = back ? rest * width : 0;
  if (width == 1) chains<back, 4, 1>(a + from, b + from, each, state);
  if (width == 2) chains<back, 4, 2>(a + from, b + from, each, state);
  if (width == 4) chains<back, 2, 4>(a + from, b + from, each, state);
  for (int64_t left = 0; left < rest; ++left) {
    const int64_t t = back ? rest - 1 - left : steps - rest + left;
    for (int64_t c = 0; c < width; ++c) {
      const int64_t at = t * width + c;
      const C value = back ? b[at] + state[c] : a[at] * state[c] + b[at];
      b[at] = value;
      state[c] = back ? a[at] * value : value;
    }
  }
}

// Whether a sequence is one that the kernels below take, and take faster than those of kernels.h.
// Rows in half precision are left to those: it is rare that they are narrow, and would cost a
// quarter of the time that this library takes to build.
template <class Op, class S>
MINRNN_INLINE bool is_narrow(const Sequence<S>& sequence) {
  if constexpr (sizeof(S) < 4) return false;
  // scan has no gates to compute: only its shortest chains gain
  const bool pays = Op::has_activations ? sequence.width < 16 && sequence.width != 8
                                        : sequence.width < 2;
  bool dense = sequence.reset == nullptr && sequence.T >= 64 && sequence.width > 0;
  for (int gate = 0; gate < Op::num_gates; ++gate) dense &= sequence.x_step[gate] == sequence.width;
  return pays && dense;
}

template <class Op, class S>
MINRNN_INLINE void narrow_forward(const Sequence<S>& sequence, S* h,
                                  typename Compute<S>::type* h_T) {
  using C = typename Compute<S>::type;
  const int64_t width = sequence.width, most = narrow_block / width;
  C a[narrow_block], b[narrow_block];
  for (int64_t c = 0; c < width; ++c) h_T[c] = sequence.h0 ? sequence.h0[c] : C(0);
  for (int64_t t = 0; t < sequence.T; t += most) {
    const int64_t steps = sequence.T - t < most ? sequence.T - t : most;
    const S* __restrict x0 = sequence.x[0] + t * width;
    const S* __restrict x1 = sequence.x[1] + t * width;
    const S* __restrict x2 = Op::num_gates > 2 ? sequence.x[2] + t * width : x1;
    S* __restrict h_t = h + t * width;
    for (int64_t j = 0; j < steps * width; ++j) {
      const C x[3] = {load(x0[j]), load(x1[j]), Op::num_gates > 2 ? load(x2[j]) : C(0)};
      Op::coefficients(x, a[j], b[j]);
    }
    recur<false>(a, b, steps, width, h_T);
    for (int64_t j = 0; j < steps * width; ++j) store(h_t[j], b[j]);
  }
}

template <class Op, class S>
MINRNN_INLINE void narrow_backward(const Sequence<S>& sequence, const S* dh, const S* h,
                                   S* const* dx, typename Compute<S>::type* carry) {
  using C = typename Compute<S>::type;
  const int64_t width = sequence.width, most = narrow_block / width;
  // `before` holds the state before each step of the block
  C a[narrow_block], g[narrow_block], before[narrow_block];
  for (int64_t stop = sequence.T; stop > 0; stop -= most) {
    const int64_t t = stop < most ? 0 : stop - most, count = (stop - t) * width;
    const S* __restrict x0 = sequence.x[0] + t * width;
    const S* __restrict x1 = sequence.x[1] + t * width;
    const S* __restrict x2 = Op::num_gates > 2 ? sequence.x[2] + t * width : x1;
    const S* __restrict dh_t = dh + t * width;
    const S* __restrict h_t = h + t * width;
    for (int64_t j = 0; j < count; ++j) {
      const C x[3] = {load(x0[j]), load(x1[j]), Op::num_gates > 2 ? load(x2[j]) : C(0)};
      C b;
      Op::coefficients(x, a[j], b);
      g[j] = load(dh_t[j]);
    }
    for (int64_t j = t > 0 ? 0 : width; j < count; ++j) before[j] = load(h_t[j - width]);
    for (int64_t c = 0; t == 0 && c < width; ++c) before[c] = sequence.h0 ? sequence.h0[c] : C(0);
    recur<true>(a, g, stop - t, width, carry);
    S* __restrict dx0 = dx[0] + t * width;
    S* __restrict dx1 = dx[1] + t * width;
    S* __restrict dx2 = Op::num_gates > 2 ? dx[2] + t * width : dx1;
    for (int64_t j = 0; j < count; ++j) {
      const C x[3] = {load(x0[j]), load(x1[j]), Op::num_gates > 2 ? load(x2[j]) : C(0)};
      C d[3], decay;
      Op::gradients(x, g[j], before[j], d, decay);
      store(dx0[j], d[0]);
      store(dx1[j], d[1]);
      if (Op::num_gates > 2) store(dx2[j], d[2]);
    }
  }
}

}  // namespace minrnn
