// A language model of minimal cells in one call: the blocks of minrnn/blocks.py on rows (b, t), for
// inference. Plain C++, no torch. What a row gives does not depend on the others, nor on how a
// sequence is cut.
//
//   x = x + W_p (depthwise convolution of x) + b_p
//   x = x + W_d h(W_g norm(x) + b_g)
//   x = x + W_n gelu(W_w norm(x) + b_w) + b_n
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "formulas.h"
#include "rows.h"

namespace minrnn {

// Sizes of a model, and of a call on B sequences of T steps.
struct ModelSizes {
  int64_t B, T, width, D, num_gates, conv_width, inner;
  int64_t rows() const { return B * T; }
};

// Weights of one block; vectors are float, `conv` is (conv_width, width). Parts that a model does
// without are null.
template <class W>
struct BlockWeights {
  const float *conv, *conv_bias, *mixer_norm, *mlp_norm;
  Panels<W> pointwise, gates, down, widen, narrow;
};

// sum_i x_i^2 in one order for each length, eight or sixteen lanes at a time.
MINRNN_INLINE float sum_of_squares(const float* x, int64_t n) {
  constexpr int64_t lanes = 32;
  float sum[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    for (int64_t j = 0; j < lanes; ++j) sum[j] += x[i + j] * x[i + j];
  for (int64_t j = 0; i + j < n; ++j) sum[j] += x[i + j] * x[i + j];
  for (int64_t half = lanes / 2; half; half /= 2)
    for (int64_t j = 0; j < half; ++j) sum[j] += sum[j + half];
  return sum[0];
}

// y = x / sqrt(mean(x^2) + eps) * weight, as nn.RMSNorm with the smallest eps of float32.
MINRNN_INLINE void rms_norm(const float* x, const float* weight, int64_t n, float* y) {
  const float scale = 1.0f / std::sqrt(sum_of_squares(x, n) / static_cast<float>(n) + 0x1p-23f);
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] * scale * weight[i];
}

// x Phi(x). The complementary error function by a fit of its logarithm, relative error 1.2e-7 (Press
// et al., Numerical Recipes in C, 2nd edition, section 6.2).
MINRNN_INLINE float gelu(float x) {
  const float size = absolute(x) * 0.70710678f, t = 1.0f / (1.0f + 0.5f * size);
  float p = 0.17087277f;
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const float half = 0.5f * t * exp_nonpositive(p - size * size);
  return x * (x < 0.0f ? half : 1.0f - half);
}

// Row (b, t) of the convolution over x (B, T, width) behind `past` (B, conv_width - 1, width).
MINRNN_INLINE void convolve(const ModelSizes& n, const float* x, const float* past,
                            const float* weight, const float* bias, int64_t row, float* u) {
  const int64_t width = n.width, t = row % n.T, b = row / n.T, before = n.conv_width - 1;
  for (int64_t c = 0; c < width; ++c) u[c] = bias[c];
  for (int64_t j = 0; j <= before; ++j) {
    const int64_t at = t - before + j;
    const float* from = at < 0 ? past + (b * before + before + at) * width
                               : x + (b * n.T + at) * width;
    const float* w = weight + j * width;
    for (int64_t c = 0; c < width; ++c) u[c] += w[c] * from[c];
  }
}

// The last inputs of sequence b, which its convolution will see next.
inline void keep_inputs(const ModelSizes& n, const float* x, const float* past, int64_t b,
                        float* kept) {
  const int64_t before = n.conv_width - 1;
  for (int64_t j = 0; j < before; ++j) {
    const int64_t at = n.T - before + j;
    const float* from = at < 0 ? past + (b * before + before + at) * n.width
                               : x + (b * n.T + at) * n.width;
    std::copy(from, from + n.width, kept + (b * before + j) * n.width);
  }
}

// The cell over sequence b: gates (B, T, num_gates, D) to h (B, T, D), state (D) of b in place.
template <class Cell>
MINRNN_INLINE void recur_rows(const ModelSizes& n, const float* gates, int64_t b, float* state,
                              float* h) {
  for (int64_t t = 0; t < n.T; ++t) {
    const float* at = gates + (b * n.T + t) * Cell::num_gates * n.D;
    float* to = h + (b * n.T + t) * n.D;
    for (int64_t d = 0; d < n.D; ++d) {
      float x[Cell::num_gates], decay, added;
      for (int g = 0; g < Cell::num_gates; ++g) x[g] = at[g * n.D + d];
      Cell::coefficients(x, decay, added);
      const float next = decay * state[d] + added;
      state[d] = next;
      to[d] = next;
    }
  }
}

}  // namespace minrnn
