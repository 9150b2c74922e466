// Products by packed weights and the parts of a packed model under AddressSanitizer and
// UndefinedBehaviorSanitizer: sizes around those of panels and vectors, in buffers without a byte to
// spare. Values against plain loops. Built and run by `make sanitize`.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "../minrnn/ops/cpu/model.h"
#include "../minrnn/ops/cpu/rows.h"

using namespace minrnn;

namespace {

int failures = 0;

float uniform() { return static_cast<float>(std::rand() / (RAND_MAX + 1.0) * 2 - 1); }

std::unique_ptr<float[]> numbers(int64_t n) {
  std::unique_ptr<float[]> x(new float[n]);
  for (int64_t i = 0; i < n; ++i) x[i] = uniform();
  return x;
}

void require(bool right, const char* what, int64_t a, int64_t b, int64_t c) {
  if (right) return;
  ++failures;
  std::printf("%s is wrong: %ld, %ld, %ld\n", what, a, b, c);
}

void put(float& to, float x) { to = x; }
void put(BFloat16& to, float x) { store(to, x); }
void put(int8_t& to, float x) { to = static_cast<int8_t>(std::lround(100 * x)); }

float value(float x) { return x; }
float value(BFloat16 x) { return load(x); }
float value(int8_t x) { return x; }

template <int L, class W>
void product(int64_t M, int64_t N, int64_t K) {
  constexpr int64_t steps = Group<L, W>::steps;
  const int64_t groups = (K + steps - 1) / steps, panels = (N + panel_width - 1) / panel_width;
  std::unique_ptr<W[]> w(new W[panels * groups * panel_width * steps]());
  std::unique_ptr<float[]> plain(new float[N * K]);
  for (int64_t n = 0; n < N; ++n)
    for (int64_t k = 0; k < K; ++k) {
      const int64_t row = n / panel_width * groups + k / steps;
      W& to = w[(row * panel_width + n % panel_width) * steps + k % steps];
      put(to, uniform());
      plain[n * K + k] = value(to);
    }
  const auto x = numbers(M * K), bias = numbers(N), scale = numbers(N);
  std::unique_ptr<float[]> y(new float[M * N]);
  const Panels<W> of{w.get(), scale.get(), bias.get(), N, K};
  panels_times<L>(of, 0, panels, x.get(), M, y.get());
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += double(x[m * K + k]) * plain[n * K + k];
      const double expected = sum * scale[n] + bias[n];
      require(std::abs(y[m * N + n] - expected) < 1e-3 * (1 + std::abs(expected)), "a product", M, N,
              K);
    }
}

template <class W>
void products(int64_t M, int64_t N, int64_t K) {
  product<4, W>(M, N, K);
  product<8, W>(M, N, K);
  product<16, W>(M, N, K);
}

// The convolution of whole sequences and of their halves, and the cell over them.
void parts(int64_t B, int64_t T, int64_t width, int64_t conv_width) {
  ModelSizes n{B, T, width, width, 2, conv_width, 0};
  const int64_t before = conv_width - 1;
  const auto x = numbers(B * T * width), past = numbers(B * before * width);
  const auto weight = numbers(conv_width * width), bias = numbers(width);
  const auto gates = numbers(B * T * 2 * width);
  auto state = numbers(B * width), kept = numbers(B * before * width);
  std::unique_ptr<float[]> u(new float[width]), h(new float[B * T * width]);
  for (int64_t row = 0; row < B * T; ++row) {
    convolve(n, x.get(), past.get(), weight.get(), bias.get(), row, u.get());
    const int64_t t = row % T, b = row / T;
    for (int64_t c = 0; c < width; ++c) {
      double sum = bias[c];
      for (int64_t j = 0; j < conv_width; ++j) {
        const int64_t at = t - before + j;
        sum += weight[j * width + c] * (at < 0 ? past[(b * before + before + at) * width + c]
                                               : x[(b * T + at) * width + c]);
      }
      require(std::abs(u[c] - sum) < 1e-4, "the convolution", B, T, width);
    }
    rms_norm(x.get() + row * width, weight.get(), width, u.get());
    for (int64_t c = 0; c < width; ++c)
      require(std::isfinite(u[c]) && std::isfinite(gelu(10 * u[c])), "the norm", B, T, width);
  }
  for (int64_t b = 0; b < B; ++b) {
    keep_inputs(n, x.get(), past.get(), b, kept.get());
    float* own = state.get() + b * width;
    recur_rows<MinGRU<Candidate::g>>(n, gates.get(), b, own, h.get());
    for (int64_t c = 0; c < width; ++c)
      require(own[c] == h[(b * T + T - 1) * width + c], "the last state", B, T, width);
  }
}

}  // namespace

int main() {
  for (int64_t M : {1, 2, 3, 4, 5, 7, 9})
    for (int64_t N : {1, 31, 32, 33, 64, 70})
      for (int64_t K : {1, 2, 3, 4, 5, 16, 37}) {
        products<float>(M, N, K);
        products<BFloat16>(M, N, K);
        products<int8_t>(M, N, K);
      }
  for (int64_t T : {1, 2, 3, 9})
    for (int64_t width : {1, 31, 33, 70})
      for (int64_t conv_width : {1, 2, 4}) parts(3, T, width, conv_width);
  for (float x = -9; x < 9; x += 0.01f) {
    const double expected = 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    require(std::abs(gelu(x) - expected) < 1e-6 + 1e-5 * std::abs(expected), "gelu", x, 0, 0);
  }
  std::printf(failures ? "%d failures\n" : "rows: right, and within their memory\n", failures);
  return failures != 0;
}
