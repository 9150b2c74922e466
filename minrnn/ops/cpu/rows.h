// y = x W^T + bias for few rows of x: plain C++, no torch. Every row is summed by itself and always
// in the same order, so that what a row gives does not depend on how many there are. Weights are
// read once for every four rows, in the order in which they lie in memory.
//
//   y[r, n] = bias[n] + scale[n] * sum_k x[r, k] W[n, k],  k rising
#pragma once

#include <cstdint>
#include <cstring>

#include "formulas.h"

namespace minrnn {

// Outputs that lie side by side in packed weights, and rows that share one reading of them: as many
// sums as registers hold with either width of vectors.
constexpr int panel_width = 32, panel_rows = 4;

// Vectors of L floats and of what they are read from. Explicit, as compilers vectorise this loop for
// some weight dtypes only.
template <int L>
struct Vector {
  using Floats = typename LanesOf<float, L>::type;
  using Ints = typename LanesOf<int32_t, L>::type;
  using Halves = typename LanesOf<uint16_t, L>::type;
};

// What is read at once of L outputs: their weights for `steps` values of k. One in float and in
// bfloat16; four bytes side by side, which shifts take apart.
template <int L, class W>
struct Group;

template <int L>
struct Group<L, float> {
  static constexpr int steps = 1;
  typename Vector<L>::Floats floats;

  MINRNN_INLINE explicit Group(const float* w) { std::memcpy(&floats, w, sizeof(floats)); }
  MINRNN_INLINE typename Vector<L>::Floats step(int) const { return floats; }
};

template <int L>
struct Group<L, BFloat16> {
  static constexpr int steps = 1;
  typename Vector<L>::Halves halves;

  MINRNN_INLINE explicit Group(const BFloat16* w) { std::memcpy(&halves, w, sizeof(halves)); }
  MINRNN_INLINE typename Vector<L>::Floats step(int) const {
    return lanes_bits_as<typename Vector<L>::Floats>(
        lanes_convert<typename Vector<L>::Ints>(halves) << 16);
  }
};

template <int L>
struct Group<L, int8_t> {
  static constexpr int steps = 4;
  typename Vector<L>::Ints bytes;

  MINRNN_INLINE explicit Group(const int8_t* w) { std::memcpy(&bytes, w, sizeof(bytes)); }
  MINRNN_INLINE typename Vector<L>::Floats step(int i) const {
    return lanes_convert<typename Vector<L>::Floats>((bytes << (24 - 8 * i)) >> 24);
  }
};

// Weights W (N, K) packed as (ceil(N / panel_width), ceil(K / steps), panel_width, steps), 0 beyond N
// and K.
template <class W>
struct Panels {
  const W* weights;
  const float* scale;  // (N), or null for ones
  const float* bias;   // (N), or null for zeros
  int64_t N, K;

  int64_t count() const { return (N + panel_width - 1) / panel_width; }
};

// Panels [p, p + P) of rows [first, first + R) of x (M, K) to y (M, N), in vectors of L.
template <int L, int R, int P, class W>
MINRNN_INLINE void panel_times(const Panels<W>& of, int64_t p, const float* x, int64_t first,
                               float* y) {
  constexpr int per_panel = panel_width / L, C = P * per_panel;
  constexpr int steps = Group<L, W>::steps;
  const int64_t K = of.K, panel = (K + steps - 1) / steps * steps * panel_width;
  const W* __restrict w = of.weights + p * panel;
  const float* __restrict from = x + first * K;
  typename Vector<L>::Floats sum[R][C] = {};
  for (int64_t k = 0; k < K; k += steps, w += steps * panel_width)
    for (int c = 0; c < C; ++c) {
      const Group<L, W> group(w + c / per_panel * panel + c % per_panel * L * steps);
      for (int i = 0; i < steps; ++i) {
        const auto wide = group.step(i);
        // beyond K weights are 0, and there is no x
        const int64_t at = steps == 1 || k + i < K ? k + i : k;
        for (int r = 0; r < R; ++r) sum[r][c] += from[r * K + at] * wide;
      }
    }
  for (int r = 0; r < R; ++r) {
    float all[C * L];
    std::memcpy(all, sum[r], sizeof(all));
    const int64_t begin = p * panel_width;
    const int64_t width = of.N - begin < C * L ? of.N - begin : C * L;
    float* to = y + (first + r) * of.N + begin;
    for (int64_t j = 0; j < width; ++j) {
      const float scaled = of.scale ? all[j] * of.scale[begin + j] : all[j];
      to[j] = of.bias ? scaled + of.bias[begin + j] : scaled;
    }
  }
}

// Panels [begin, end) of all M rows. With one row, two panels at a time: their sums take turns.
template <int L, class W>
MINRNN_INLINE void panels_times(const Panels<W>& of, int64_t begin, int64_t end, const float* x,
                                int64_t M, float* y) {
  int64_t p = begin;
  if (M == 1)
    for (; p + 2 <= end; p += 2) panel_times<L, 1, 2>(of, p, x, 0, y);
  for (; p < end; ++p) {
    int64_t r = 0;
    for (; r + panel_rows <= M; r += panel_rows) panel_times<L, panel_rows, 1>(of, p, x, r, y);
    for (; r + 2 <= M; r += 2) panel_times<L, 2, 1>(of, p, x, r, y);
    if (r < M) panel_times<L, 1, 1>(of, p, x, r, y);
  }
}

}  // namespace minrnn
