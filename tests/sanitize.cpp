// The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: every width and length around
// the vector's and the buffer's size, in buffers without a byte to spare, forwards and backwards,
// against a plain loop in double. Built and run by `make sanitize`.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../minrnn/ops/cpu/kernels.h"

using namespace minrnn;

namespace {

int failures = 0;

double uniform() { return std::rand() / (RAND_MAX + 1.0) * 4 - 2; }

// One case: a sequence of T steps over `width` channels, rows `gap` numbers apart.
struct Case {
  int64_t T, width, gap;
  bool reverse, reset, h0;
};

template <class Op, class S>
void run(const Case& c, double tolerance) {
  using C = typename Compute<S>::type;
  const int64_t row = c.width + c.gap, size = c.T ? (c.T - 1) * row + c.width : 0;
  std::vector<std::unique_ptr<S[]>> x, dx;
  for (int gate = 0; gate < 3; ++gate) {
    x.emplace_back(new S[size]);
    dx.emplace_back(new S[size]);
    for (int64_t i = 0; i < size; ++i) store(x[gate][i], C(uniform() * (gate ? 1 : 0.4)));
  }
  std::unique_ptr<S[]> h(new S[size]), dh(new S[size]);
  for (int64_t i = 0; i < size; ++i) store(dh[i], C(uniform()));
  std::unique_ptr<C[]> h0(new C[c.width]), h_T(new C[c.width]), carry(new C[c.width]);
  for (int64_t i = 0; i < c.width; ++i) h0[i] = C(uniform()), carry[i] = C(uniform());
  std::unique_ptr<bool[]> reset(new bool[c.T]);
  for (int64_t t = 0; t < c.T; ++t) reset[t] = std::rand() % 5 == 0;

  const int64_t first = c.reverse && c.T ? (c.T - 1) : 0, step = c.reverse ? -row : row;
  Stretch<S> sequence{};
  Gradients<S> to{};
  for (int gate = 0; gate < 3; ++gate) {
    sequence.x[gate] = x[gate].get() + first * row;
    sequence.x_step[gate] = step;
    to.dx[gate] = dx[gate].get() + first * row;
    to.dx_step[gate] = step;
  }
  sequence.reset = c.reset ? reset.get() + first : nullptr;
  sequence.reset_step = c.reverse ? -1 : 1;
  sequence.T = c.T;
  sequence.width = c.width;
  S *h_first = h.get() + first * row, *dh_first = dh.get() + first * row;
  for (int64_t i = 0; i < c.width; ++i) h_T[i] = c.h0 ? h0[i] : C(0);
  forward<Op>(sequence, h_first, step, h_T.get());
  to.dh = dh_first;
  to.h = h_first;
  to.dh_step = to.h_step = step;
  to.before = c.h0 ? h0.get() : nullptr;
  backward<Op>(sequence, to, carry.get());
  for (int64_t channel = 0; channel < c.width; ++channel) {
    double state = c.h0 ? h0[channel] : 0;
    for (int64_t t = 0; t < c.T; ++t) {
      if (sequence.reset && sequence.reset[t * sequence.reset_step]) state = 0;
      double gates[3], a, b;
      for (int gate = 0; gate < 3; ++gate)
        gates[gate] = load(sequence.x[gate][t * step + channel]);
      Op::coefficients(gates, a, b);
      state = a * state + b;
      const double found = load(h_first[t * step + channel]);
      if (!(std::fabs(found - state) <= tolerance * (1 + std::fabs(state)))) ++failures;
    }
    if (!(std::fabs(h_T[channel] - state) <= tolerance * (1 + std::fabs(state)))) ++failures;
  }
}

template <class S>
void run_all(double tolerance) {
  for (int64_t width = 0; width <= 33; ++width)
    for (int64_t T : {0, 1, 2, 3, 63, 64, 65})
      for (int options = 0; options < 16; ++options) {
        const Case c{T, width, options & 1 ? 3 : 0, (options & 2) != 0, (options & 4) != 0,
                     (options & 8) != 0};
        run<Scan, S>(c, tolerance);
        run<MinGRU<Candidate::g>, S>(c, tolerance);
        run<MinGRU<Candidate::tanh>, S>(c, tolerance);
        run<MinLSTM<Candidate::g, true>, S>(c, tolerance);
        run<MinLSTM<Candidate::identity, false>, S>(c, tolerance);
      }
  for (int64_t width = 1; width <= 16; ++width)
    for (int64_t T : {511, 512, 513, 8191, 8192, 8193}) {
      run<Scan, S>({T, width, 0, false, false, true}, tolerance);
      run<MinGRU<Candidate::g>, S>({T, width, 0, false, false, false}, tolerance);
      run<MinLSTM<Candidate::g, true>, S>({T, width, 0, false, false, true}, tolerance);
    }
}

}  // namespace

int main() {
  run_all<float>(1e-5);
  run_all<double>(1e-13);
  run_all<BFloat16>(8e-3);
  run_all<Float16>(1e-3);
  std::printf("%d failures\n", failures);
  return failures != 0;
}
