// The selective scan under AddressSanitizer and UndefinedBehaviorSanitizer: widths and lengths around
// those of vector, block and chunk, in buffers without a byte to spare. Values against a plain loop,
// the gradient against a difference along a random direction. Built and run by `make sanitize`.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../minrnn/ops/cpu/selective.h"

using namespace minrnn;

namespace {

int failures = 0;

double uniform() { return std::rand() / (RAND_MAX + 1.0) * 2 - 1; }

void require(bool right, const char* what, int64_t T, int64_t D, int64_t N, bool zoh) {
  if (right) return;
  ++failures;
  std::printf("%s is wrong: T %ld, D %ld, N %ld, zoh %d\n", what, T, D, N, zoh);
}

// Tensors of a case: u, dt, A, b, c, h0, each in memory of its own size.
struct Inputs {
  std::vector<std::unique_ptr<double[]>> x;
  std::vector<int64_t> size;

  Inputs(int64_t B, int64_t T, int64_t D, int64_t N)
      : size{B * T * D, B * T * D, D * N, B * T * N, B * T * N, B * D * N} {
    for (int64_t n : size) {
      x.emplace_back(new double[n]);
      for (int64_t i = 0; i < n; ++i) x.back()[i] = uniform();
    }
    for (int64_t i = 0; i < size[1]; ++i) x[1][i] = std::exp(3 * x[1][i] - 2);
    for (int64_t i = 0; i < size[2]; ++i) x[2][i] = -std::exp(x[2][i]);
  }

  Selective<double> view(int64_t T, int64_t D, int64_t N, bool zoh) const {
    return {x[0].get(), x[1].get(), x[2].get(), x[3].get(), x[4].get(), x[5].get(), T, D, N, zoh};
  }
};

template <bool Zoh>
void blocks_forward(const Selective<double>& in, int64_t B, double* y, double* h_T) {
  for (int64_t row = 0; row < B; ++row)
    for (int64_t first = 0; first < in.D; first += selective_width)
      selective_forward<double, Zoh>(in, row, first, std::min(selective_width, in.D - first), y, h_T);
}

// The sum of y and h_T, each with the weight that its gradient is.
template <bool Zoh>
double loss(const Selective<double>& in, int64_t B, const double* dy, const double* dh) {
  const int64_t num_y = B * in.T * in.D, num_h = B * in.D * in.N;
  std::unique_ptr<double[]> y(new double[num_y]), h_T(new double[num_h]);
  blocks_forward<Zoh>(in, B, y.get(), h_T.get());
  double sum = 0;
  for (int64_t i = 0; i < num_y; ++i) sum += y[i] * dy[i];
  for (int64_t i = 0; i < num_h; ++i) sum += h_T[i] * dh[i];
  return sum;
}

template <bool Zoh>
void check_values(const Inputs& inputs, int64_t B, int64_t T, int64_t D, int64_t N) {
  const auto in = inputs.view(T, D, N, Zoh);
  std::unique_ptr<double[]> y(new double[B * T * D]), h_T(new double[B * D * N]);
  blocks_forward<Zoh>(in, B, y.get(), h_T.get());
  double off = 0;
  for (int64_t row = 0; row < B; ++row)
    for (int64_t d = 0; d < D; ++d) {
      std::vector<double> h(in.h0 + (row * D + d) * N, in.h0 + (row * D + d + 1) * N);
      for (int64_t t = 0; t < T; ++t) {
        const int64_t at = (row * T + t) * D + d, side = (row * T + t) * N;
        double sum = 0;
        for (int64_t n = 0; n < N; ++n) {
          const double A = in.A[d * N + n], x = in.dt[at] * A;
          const double weight = Zoh ? std::expm1(x) / A : in.dt[at];
          h[n] = std::exp(x) * h[n] + weight * in.b[side + n] * in.u[at];
          sum += h[n] * in.c[side + n];
        }
        off = std::max(off, std::abs(sum - y[at]));
      }
      for (int64_t n = 0; n < N; ++n)
        off = std::max(off, std::abs(h[n] - h_T[(row * D + d) * N + n]));
    }
  require(off < 1e-11, "a value", T, D, N, Zoh);
}

template <bool Zoh>
void check_gradient(Inputs& inputs, int64_t B, int64_t T, int64_t D, int64_t N) {
  const auto in = inputs.view(T, D, N, Zoh);
  const int64_t sizes[] = {B * T * D, B * T * D, B * D * N, B * T * N, B * T * N, B * D * N};
  std::vector<std::unique_ptr<double[]>> grad;
  for (int64_t n : sizes) grad.emplace_back(new double[n]());
  std::unique_ptr<double[]> dy(new double[sizes[0]]), dh(new double[sizes[5]]);
  for (int64_t i = 0; i < sizes[0]; ++i) dy[i] = uniform();
  for (int64_t i = 0; i < sizes[5]; ++i) dh[i] = uniform();
  const SelectiveGradients<double> to{dy.get(),      dh.get(),      grad[0].get(), grad[1].get(),
                                      grad[2].get(), grad[3].get(), grad[4].get(), grad[5].get()};
  for (int64_t row = 0; row < B; ++row)
    for (int64_t first = 0; first < D; first += selective_width)
      selective_backward<double, Zoh>(in, row, first, std::min(selective_width, D - first), to);
  // the gradient of A comes with a row for each of the batch
  for (int64_t row = 1; row < B; ++row)
    for (int64_t i = 0; i < D * N; ++i) grad[2][i] += grad[2][row * D * N + i];
  const double step = 1e-6;
  double along = 0;
  std::vector<std::vector<double>> way;
  for (size_t k = 0; k < inputs.x.size(); ++k) {
    way.emplace_back(inputs.size[k]);
    for (int64_t i = 0; i < inputs.size[k]; ++i) {
      // in proportion, so that dt and A keep their signs
      way[k][i] = uniform() * inputs.x[k][i];
      along += way[k][i] * grad[k][i];
    }
  }
  const auto moved = [&](double size) {
    for (size_t k = 0; k < way.size(); ++k)
      for (int64_t i = 0; i < inputs.size[k]; ++i) inputs.x[k][i] += size * way[k][i];
  };
  moved(step);
  const double up = loss<Zoh>(in, B, dy.get(), dh.get());
  moved(-2 * step);
  const double down = loss<Zoh>(in, B, dy.get(), dh.get());
  moved(step);
  const double difference = (up - down) / (2 * step);
  require(std::abs(difference - along) < 1e-6 * (1 + std::abs(along)), "the gradient", T, D, N, Zoh);
}

}  // namespace

int main() {
  for (int64_t T : {1, 2, 31, 32, 33, 65})
    for (int64_t D : {1, 15, 16, 17, 63, 64, 65, 130})
      for (int64_t N : {1, 3, 16}) {
        Inputs inputs(2, T, D, N);
        check_values<false>(inputs, 2, T, D, N);
        check_values<true>(inputs, 2, T, D, N);
        check_gradient<false>(inputs, 2, T, D, N);
        check_gradient<true>(inputs, 2, T, D, N);
      }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
