// The kernels of kernels.h for rows narrower than a vector, in memory without gaps: (T, width) is
// then one line of T * width numbers.
//
// The gates, which are most of the work, are computed along that line, whole vectors at a time, into
// buffers that stay in the first-level cache. The recurrence itself is a chain of multiply-adds, each
// waiting for the one before; a block of steps is therefore cut into a few pieces whose chains run
// side by side: first what each piece does to a state (its product of decays, and its end from zero),
// then the pieces again from the states so found.
#pragma once

#include "kernels.h"

namespace minrnn {

constexpr int64_t narrow_block = 2048;  // numbers in a buffer

// `num_chains` pieces of `steps` steps each, `width` channels: b becomes h, `state` moves on.
template <int num_chains, int width, class C>
MINRNN_INLINE void chains(const C* __restrict a, C* __restrict b, int64_t steps, C* state) {
  C product[num_chains * width], end[num_chains * width];
  for (int i = 0; i < num_chains * width; ++i) product[i] = C(1), end[i] = C(0);
  const int64_t piece = steps * width;
  for (int64_t j = 0; j < piece; j += width)
#pragma GCC unroll 16
    for (int m = 0; m < num_chains - 1; ++m)
#pragma GCC unroll 16
      for (int c = 0; c < width; ++c) {
        const int64_t at = m * piece + j + c;
        product[m * width + c] *= a[at];
        end[m * width + c] = a[at] * end[m * width + c] + b[at];
      }
  C h[num_chains * width];
  for (int c = 0; c < width; ++c) h[c] = state[c];
  for (int m = 1; m < num_chains; ++m)
    for (int c = 0; c < width; ++c) {
      const int before = (m - 1) * width + c;
      h[m * width + c] = product[before] * h[before] + end[before];
    }
  for (int64_t j = 0; j < piece; j += width)
#pragma GCC unroll 16
    for (int m = 0; m < num_chains; ++m)
#pragma GCC unroll 16
      for (int c = 0; c < width; ++c) {
        const int64_t at = m * piece + j + c;
        h[m * width + c] = a[at] * h[m * width + c] + b[at];
        b[at] = h[m * width + c];
      }
  for (int c = 0; c < width; ++c) state[c] = h[(num_chains - 1) * width + c];
}

// Any number of steps of any width, with resets: b becomes h.
template <class C>
MINRNN_INLINE void chain(const C* a, C* b, int64_t steps, int64_t width, C* state,
                         const bool* reset, int64_t reset_step) {
  for (int64_t t = 0; t < steps; ++t)
    for (int64_t c = 0; c < width; ++c) {
      const C before = reset && reset[t * reset_step] ? C(0) : state[c];
      state[c] = a[t * width + c] * before + b[t * width + c];
      b[t * width + c] = state[c];
    }
}

template <class C>
MINRNN_INLINE void recur(const C* a, C* b, int64_t steps, int64_t width, C* state,
                         const bool* reset, int64_t reset_step) {
  int64_t done = 0;
  if (!reset) {
    if (width == 1) chains<16, 1>(a, b, steps / 16, state), done = steps / 16 * 16;
    if (width == 2) chains<4, 2>(a, b, steps / 4, state), done = steps / 4 * 4;
    if (width == 4) chains<2, 4>(a, b, steps / 2, state), done = steps / 2 * 2;
    if (width == 8) chains<1, 8>(a, b, steps, state), done = steps;
  }
  chain(a + done * width, b + done * width, steps - done, width, state, reset, reset_step);
}

template <class Op, class S>
MINRNN_INLINE void narrow_forward(const Sequence<S>& sequence, S* __restrict h,
                                  typename Compute<S>::type* __restrict h_T) {
  using C = typename Compute<S>::type;
  const int64_t width = sequence.width, most = narrow_block / width;
  C a[narrow_block], b[narrow_block];
  for (int64_t c = 0; c < width; ++c) h_T[c] = sequence.h0 ? sequence.h0[c] : C(0);
  for (int64_t t = 0; t < sequence.T; t += most) {
    const int64_t steps = sequence.T - t < most ? sequence.T - t : most, count = steps * width;
    const S* __restrict x0 = sequence.x[0] + t * width;
    const S* __restrict x1 = sequence.x[1] + t * width;
    const S* __restrict x2 = Op::num_gates > 2 ? sequence.x[2] + t * width : x1;
    for (int64_t j = 0; j < count; ++j) {
      const C x[3] = {load(x0[j]), load(x1[j]), Op::num_gates > 2 ? load(x2[j]) : C(0)};
      Op::coefficients(x, a[j], b[j]);
    }
    const bool* reset = sequence.reset ? sequence.reset + t * sequence.reset_step : nullptr;
    recur(a, b, steps, width, h_T, reset, sequence.reset_step);
    for (int64_t j = 0; j < count; ++j) store(h[t * width + j], b[j]);
  }
}

}  // namespace minrnn
