// threads.h with real threads, for ThreadSanitizer, AddressSanitizer and
// UndefinedBehaviorSanitizer: sequences shared out over several threads must come out as one thread
// leaves them, bit for bit. Built and run by `make sanitize`, with tests/stub in place of torch.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../minrnn/ops/cpu/threads.h"

using namespace minrnn;

namespace {

int failures = 0;

double uniform() { return std::rand() / (RAND_MAX + 1.0) * 4 - 2; }

// Sequences of `lengths` steps over D channels, one behind the other; a NaN among them if `broken`.
struct Case {
  std::vector<int64_t> lengths;
  int64_t D;
  bool reset, broken;
};

// All results of a call in buffers without a byte to spare, so that a sanitizer sees every step
// beside them.
template <class S>
struct Results {
  using C = typename Compute<S>::type;
  int64_t size, states;
  std::unique_ptr<S[]> h, dx[3];
  std::unique_ptr<C[]> h_T, dh0;

  Results(int64_t size_, int64_t states_) : size(size_), states(states_) {
    h.reset(new S[size]);
    for (auto& x : dx) x.reset(new S[size]());
    h_T.reset(new C[states]);
    dh0.reset(new C[states]);
  }

  bool operator==(const Results& other) const {
    bool same = std::memcmp(h.get(), other.h.get(), size * sizeof(S)) == 0;
    for (int gate = 0; gate < 3; ++gate)
      same &= std::memcmp(dx[gate].get(), other.dx[gate].get(), size * sizeof(S)) == 0;
    same &= std::memcmp(h_T.get(), other.h_T.get(), states * sizeof(C)) == 0;
    return same && std::memcmp(dh0.get(), other.dh0.get(), states * sizeof(C)) == 0;
  }
};

template <class Op, class S>
class Run {
 public:
  explicit Run(const Case& c) : c_(c), starts_{0} {
    for (const int64_t length : c.lengths) starts_.push_back(starts_.back() + length);
    const int64_t size = starts_.back() * c.D;
    for (auto& x : x_) fill(x, size);
    fill(dh_, size);
    fill(h0_, c.lengths.size() * c.D);
    reset_.reset(new bool[starts_.back()]);
    for (int64_t t = 0; t < starts_.back(); ++t) reset_[t] = c.reset && std::rand() % 50 == 0;
    if (c.broken) store(x_[1][size / 2], C(NAN));
  }

  Results<S> with(int threads) const {
    torch::stable::num_threads = threads;
    Results<S> to(starts_.back() * c_.D, c_.lengths.size() * c_.D);
    const Lines lines(c_.lengths.size(), c_.D);
    const auto length = [&](int64_t n) { return c_.lengths[n]; };
    std::memcpy(to.h_T.get(), h0_.get(), to.states * sizeof(C));
    share_out(lines, length, false, [&](const Share& share) {
      forward<Op>(stretch(share), to.h.get() + offset(share), c_.D, to.h_T.get() + column(share));
    });
    std::memcpy(to.dh0.get(), h0_.get(), to.states * sizeof(C));
    share_out(lines, length, true, [&](const Share& share) {
      Gradients<S> grads{};
      grads.dh = dh_.get() + offset(share);
      grads.h = to.h.get() + offset(share);
      grads.dh_step = grads.h_step = c_.D;
      grads.before = h0_.get() + column(share);
      grads.follows = share.first > 0;
      for (int gate = 0; gate < 3; ++gate) {
        grads.dx[gate] = to.dx[gate].get() + offset(share);
        grads.dx_step[gate] = c_.D;
      }
      backward<Op>(stretch(share), grads, to.dh0.get() + column(share));
    });
    return to;
  }

 private:
  using C = typename Compute<S>::type;

  template <class Number>
  static void fill(std::unique_ptr<Number[]>& x, int64_t size) {
    x.reset(new Number[size]);
    for (int64_t i = 0; i < size; ++i) store(x[i], C(uniform() * 0.4));
  }

  int64_t offset(const Share& share) const {
    return (starts_[share.n] + share.first) * c_.D + share.c;
  }

  int64_t column(const Share& share) const { return share.n * c_.D + share.c; }

  Stretch<S> stretch(const Share& share) const {
    Stretch<S> made{};
    for (int gate = 0; gate < 3; ++gate) {
      made.x[gate] = x_[gate].get() + offset(share);
      made.x_step[gate] = c_.D;
    }
    made.reset = c_.reset ? reset_.get() + starts_[share.n] + share.first : nullptr;
    made.reset_step = 1;
    made.T = share.steps;
    made.width = share.width;
    made.turn = share.turn;
    return made;
  }

  const Case c_;
  std::vector<int64_t> starts_;
  std::unique_ptr<S[]> x_[3], dh_;
  std::unique_ptr<C[]> h0_;
  std::unique_ptr<bool[]> reset_;
};

template <class Op, class S>
void run(const Case& c) {
  const Run<Op, S> call(c);
  const Results<S> alone = call.with(1);
  for (const int threads : {2, 4, 7})
    if (!(call.with(threads) == alone)) ++failures;
}

}  // namespace

int main() {
  const std::vector<Case> cases = {
      {{700}, 128, false, false},
      {{700}, 128, true, true},
      {{300, 0, 900}, 130, true, false},
      {{60000}, 1, false, true},
      {{20000, 70, 8000}, 3, false, false},
      {{9000}, 8, false, false},
      {{7}, 9000, true, false},
      {{1000, 1000, 1000, 1000}, 20, false, false},
  };
  for (const Case& c : cases) {
    run<Scan, float>(c);
    run<MinLSTM<Candidate::tanh, true>, float>(c);
    run<MinGRU<Candidate::g>, BFloat16>(c);
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
