// Binds selective.h to torch's dispatcher for the CPU. What calls it is minrnn/ops/selective.py.

#include <algorithm>
#include <tuple>

#include "checks.h"
#include "selective.h"

namespace minrnn {

#define MINRNN_SELECTIVE(S)                                                                    \
  MULTI_ISA void selective_run(const Selective<S>& in, int64_t row, int64_t first,             \
                               int64_t width, S* y, S* h_T) {                                  \
    if (in.zoh)                                                                                \
      selective_forward<S, true>(in, row, first, width, y, h_T);                               \
    else                                                                                       \
      selective_forward<S, false>(in, row, first, width, y, h_T);                              \
  }                                                                                            \
  MULTI_ISA void selective_run_back(const Selective<S>& in, int64_t row, int64_t first,        \
                                    int64_t width, const SelectiveGradients<S>& to) {          \
    if (in.zoh)                                                                                \
      selective_backward<S, true>(in, row, first, width, to);                                  \
    else                                                                                       \
      selective_backward<S, false>(in, row, first, width, to);                                 \
  }

MINRNN_SELECTIVE(float)
MINRNN_SELECTIVE(double)

namespace {

void check_shapes(const Tensor& u, const Tensor& dt, const Tensor& A, const Tensor& b,
                  const Tensor& c, const Tensor& h0) {
  for (const Tensor& x : {u, dt, A, b, c, h0}) check_readable("inputs", x);
  STD_TORCH_CHECK(u.dim() == 3 && b.dim() == 3 && A.dim() == 2, "u, b need 3 dimensions, A 2");
  const int64_t B = u.size(0), T = u.size(1), D = u.size(2), N = A.size(1);
  const bool right = dt.dim() == 3 && dt.size(0) == B && dt.size(1) == T && dt.size(2) == D &&
                     A.size(0) == D && b.size(0) == B && b.size(1) == T && b.size(2) == N &&
                     c.dim() == 3 && c.size(0) == B && c.size(1) == T && c.size(2) == N &&
                     h0.dim() == 2 && h0.size(0) == B && h0.size(1) == D * N;
  STD_TORCH_CHECK(right, "expected u, dt (B, T, D), A (D, N), B, C (B, T, N), h0 (B, D * N)");
  for (const Tensor& x : {u, dt, A, b, c, h0})
    STD_TORCH_CHECK(x.scalar_type() == u.scalar_type(), "expected tensors of one dtype");
  STD_TORCH_CHECK(u.scalar_type() == ScalarType::Float || u.scalar_type() == ScalarType::Double,
                  "dtype must be float32 or float64");
}

void make_contiguous(std::initializer_list<Tensor*> tensors) {
  for (Tensor* x : tensors) *x = torch::stable::contiguous(*x);
}

template <class S>
Selective<S> read(const Tensor& u, const Tensor& dt, const Tensor& A, const Tensor& b,
                  const Tensor& c, const Tensor& h0, bool zoh) {
  const auto at = [](const Tensor& x) { return static_cast<const S*>(x.const_data_ptr()); };
  return {at(u), at(dt), at(A), at(b), at(c), at(h0), u.size(1), u.size(2), A.size(1), zoh};
}

template <class F>
void with_float(const Tensor& x, F f) {
  x.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

std::tuple<Tensor, Tensor> selective_scan(Tensor u, Tensor dt, Tensor A, Tensor b, Tensor c,
                                          Tensor h0, bool zoh) {
  check_shapes(u, dt, A, b, c, h0);
  make_contiguous({&u, &dt, &A, &b, &c, &h0});
  const int64_t B = u.size(0), D = u.size(2);
  Tensor y = torch::stable::new_empty(u, {B, u.size(1), D});
  Tensor h_T = torch::stable::new_empty(h0, {B, h0.size(1)});
  // nothing to compute, however many rows there are of it
  if (y.numel() == 0 && h_T.numel() == 0) return {y, h_T};
  with_float(u, [&](auto type) {
    using S = decltype(type);
    const auto in = read<S>(u, dt, A, b, c, h0, zoh);
    S* to = static_cast<S*>(y.mutable_data_ptr());
    S* last = static_cast<S*>(h_T.mutable_data_ptr());
    const int64_t blocks = (D + selective_width - 1) / selective_width;
    torch::stable::parallel_for(0, B * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % blocks * selective_width;
        selective_run(in, i / blocks, first, std::min(selective_width, D - first), to, last);
      }
    });
  });
  return {y, h_T};
}

// One thread has all channels of a row, which add to the same db and dc; the same sum for any
// number of threads.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    Tensor dy, Tensor dh_T, Tensor u, Tensor dt, Tensor A, Tensor b, Tensor c, Tensor h0,
    bool zoh) {
  check_shapes(u, dt, A, b, c, h0);
  check_shapes(dy, dt, A, b, c, dh_T);
  make_contiguous({&dy, &dh_T, &u, &dt, &A, &b, &c, &h0});
  const int64_t B = u.size(0), T = u.size(1), D = u.size(2), N = A.size(1);
  Tensor du = torch::stable::new_empty(u, {B, T, D}), ddt = torch::stable::new_empty(u, {B, T, D});
  // a row for each of the batch, summed in their order
  Tensor rows = torch::stable::new_empty(u, {B, D, N}), dA = torch::stable::new_zeros(u, {D, N});
  Tensor db = torch::stable::new_zeros(u, {B, T, N}), dc = torch::stable::new_zeros(u, {B, T, N});
  Tensor dh0 = torch::stable::new_empty(u, {B, D * N});
  if (u.numel() == 0 && h0.numel() == 0) return {du, ddt, dA, db, dc, dh0};
  with_float(u, [&](auto type) {
    using S = decltype(type);
    const auto in = read<S>(u, dt, A, b, c, h0, zoh);
    const auto out = [](Tensor& x) { return static_cast<S*>(x.mutable_data_ptr()); };
    const SelectiveGradients<S> to{static_cast<const S*>(dy.const_data_ptr()),
                                   static_cast<const S*>(dh_T.const_data_ptr()),
                                   out(du), out(ddt), out(rows), out(db), out(dc), out(dh0)};
    torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        for (int64_t first = 0; first < D; first += selective_width)
          selective_run_back(in, row, first, std::min(selective_width, D - first), to);
    });
    S* sum = out(dA);
    for (int64_t row = 0; row < B; ++row)
      for (int64_t i = 0; i < D * N; ++i) sum[i] += to.dA[row * D * N + i];
  });
  return {du, ddt, dA, db, dc, dh0};
}

}  // namespace
}  // namespace minrnn

STABLE_TORCH_LIBRARY_IMPL(minrnn, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&minrnn::selective_scan));
  m.impl("selective_scan_backward", TORCH_BOX(&minrnn::selective_scan_backward));
}
