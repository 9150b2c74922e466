// Binds kernels.h to torch's dispatcher for the CPU, through the stable ABI: one build serves many
// versions of torch and Python. Shapes and dtypes were checked in minrnn/ops/checks.py; here only
// what a direct call of torch.ops could use to reach memory that is not ours.

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "entries.h"
#include "threads.h"

namespace minrnn {
namespace {

Candidate candidate_named(const std::string& name) {
  if (name == "identity") return Candidate::identity;
  if (name == "tanh") return Candidate::tanh;
  STD_TORCH_CHECK(name == "g", "`candidate` must be one of 'g', 'identity', 'tanh', got ", name);
  return Candidate::g;
}

// Calls `f` with a value of the type in memory.
template <class F>
auto with_type(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      STD_TORCH_CHECK(dtype == ScalarType::Half, "dtype is not supported");
      return f(Float16{});
  }
}

// `x` itself if its channels are dense, else a copy.
Tensor dense(const Tensor& x) {
  return x.size(2) <= 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}

void check_gate(const Tensor& x) {
  check_readable("gates", x);
  STD_TORCH_CHECK(x.dim() == 3, "gates must have shape (B, T, D)");
}

// Sequences of a call: rows of the batch, or pieces of its one row, with the direction applied.
class Layout {
 public:
  Layout(const Tensor& gate, const MaybeTensor& reset, const MaybeTensor& cu_seqlens, bool reverse)
      : reverse_(reverse) {
    check_gate(gate);
    B_ = gate.size(0);
    T_ = gate.size(1);
    if (reset) {
      check_readable("reset", *reset);
      STD_TORCH_CHECK(reset->dim() == 2 && reset->size(0) == B_ && reset->size(1) == T_ &&
                          reset->scalar_type() == ScalarType::Bool,
                      "`reset` must have shape (B, T) and dtype bool");
      reset_ = reset->const_data_ptr<bool>();
      reset_row_ = reset->stride(0);
      reset_step_ = reset->stride(1);
    }
    if (!cu_seqlens) return;
    check_readable("cu_seqlens", *cu_seqlens);
    const ScalarType index = cu_seqlens->scalar_type();
    STD_TORCH_CHECK(cu_seqlens->dim() == 1 &&
                        (index == ScalarType::Int || index == ScalarType::Long),
                    "`cu_seqlens` must have shape (N + 1,) and dtype int32 or int64");
    STD_TORCH_CHECK(B_ == 1, "`cu_seqlens` needs a batch of one row");
    const Tensor wide = torch::stable::contiguous(torch::stable::to(*cu_seqlens, ScalarType::Long));
    const int64_t* bounds = wide.const_data_ptr<int64_t>();
    bounds_.assign(bounds, bounds + wide.numel());
    STD_TORCH_CHECK(!bounds_.empty() && bounds_.front() == 0 && bounds_.back() == T_ &&
                        std::is_sorted(bounds_.begin(), bounds_.end()),
                    "`cu_seqlens` must rise from 0 to T = ", T_);
  }

  int64_t num_sequences() const { return bounds_.empty() ? B_ : bounds_.size() - 1; }

  int64_t length(int64_t n) const { return bounds_.empty() ? T_ : bounds_[n + 1] - bounds_[n]; }

  // Where a share's first step lies in a tensor (B, T, ...) with these strides.
  int64_t offset(const Share& share, int64_t row_stride, int64_t step) const {
    const int64_t n = share.n, row = bounds_.empty() ? n : 0;
    const int64_t start = bounds_.empty() ? 0 : bounds_[n];
    const int64_t first = reverse_ ? std::max<int64_t>(length(n), 1) - 1 - share.first : share.first;
    return row * row_stride + (start + first) * step;
  }

  int64_t direction() const { return reverse_ ? -1 : 1; }

  template <class S>
  Stretch<S> stretch(const Share& share, const std::vector<Tensor>& gates) const {
    Stretch<S> made{};
    for (size_t gate = 0; gate < gates.size(); ++gate) {
      const Tensor& x = gates[gate];
      made.x[gate] = static_cast<const S*>(x.const_data_ptr()) +
                     offset(share, x.stride(0), x.stride(1)) + share.c;
      made.x_step[gate] = direction() * x.stride(1);
    }
    if (reset_) made.reset = reset_ + offset(share, reset_row_, reset_step_);
    made.reset_step = direction() * reset_step_;
    made.T = share.steps;
    made.width = share.width;
    made.turn = share.turn;
    return made;
  }

 private:
  bool reverse_;
  int64_t B_, T_;
  const bool* reset_ = nullptr;
  int64_t reset_row_ = 0, reset_step_ = 0;
  std::vector<int64_t> bounds_;
};

ScalarType state_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A state (rows, D), h0 or dh_T, as the kernels read it.
Tensor as_state(const char* name, const Tensor& x, ScalarType dtype, int64_t rows, int64_t D) {
  check_readable(name, x);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == D, "`", name,
                  "` must have shape (", rows, ", ", D, ")");
  STD_TORCH_CHECK(is_floating(x.scalar_type()), "`", name, "` must have a floating dtype");
  return torch::stable::contiguous(torch::stable::to(x, state_type(dtype)));
}

MaybeTensor as_state(const char* name, const MaybeTensor& x, ScalarType dtype, int64_t rows,
                     int64_t D) {
  return x ? MaybeTensor(as_state(name, *x, dtype, rows, D)) : x;
}

std::vector<Tensor> checked(std::vector<Tensor> gates) {
  for (Tensor& x : gates) {
    check_gate(x);
    for (int axis = 0; axis < 3; ++axis)
      STD_TORCH_CHECK(x.size(axis) == gates[0].size(axis), "gates must have equal shapes");
    STD_TORCH_CHECK(x.scalar_type() == gates[0].scalar_type(), "gates must have equal dtypes");
    x = dense(x);
  }
  return gates;
}

// Writes h (B, T, D), whatever its strides; returns h_T.
Tensor run_forward(Formula formula, std::vector<Tensor> gates, const Tensor& h,
                   const MaybeTensor& h0, const Layout& layout) {
  gates = checked(std::move(gates));
  const ScalarType dtype = gates[0].scalar_type();
  const int64_t D = gates[0].size(2), rows = layout.num_sequences();
  const MaybeTensor before = as_state("h0", h0, dtype, rows, D);
  Tensor h_T = before ? torch::stable::clone(*before)
                      : torch::stable::new_zeros(gates[0], {rows, D}, state_type(dtype));
  const auto length = [&](int64_t n) { return layout.length(n); };
  with_type(dtype, [&](auto type) {
    using S = decltype(type);
    using C = typename Compute<S>::type;
    const auto kernel = entries<S>(formula).forward;
    S* to = static_cast<S*>(const_cast<Tensor&>(h).mutable_data_ptr());
    C* state = static_cast<C*>(h_T.mutable_data_ptr());
    share_out(Lines(rows, D), length, false, [&](const Share& share) {
      kernel(layout.stretch<S>(share, gates),
             to + layout.offset(share, h.stride(0), h.stride(1)) + share.c,
             layout.direction() * h.stride(1), state + share.n * D + share.c);
    });
  });
  return h_T;
}

// The gates that lie side by side in one tensor (B, T, num * D): views of it.
std::vector<Tensor> split(const Tensor& fused, int64_t num) {
  check_readable("gates", fused);
  STD_TORCH_CHECK(fused.dim() == 3 && fused.size(2) % num == 0,
                  "gates must have shape (B, T, ", num, " * D)");
  const int64_t D = fused.size(2) / num;
  std::vector<Tensor> gates;
  for (int64_t gate = 0; gate < num; ++gate)
    gates.push_back(torch::stable::narrow(const_cast<Tensor&>(fused), 2, gate * D, D));
  return gates;
}

// Writes the gradient of each gate to `grads`, whatever their strides; returns dh0.
Tensor run_backward(Formula formula, const Tensor& dh, const Tensor& dh_T,
                    std::vector<Tensor> gates, const std::vector<Tensor>& grads,
                    const MaybeTensor& h0, const Tensor& h, const Layout& layout) {
  // dh and h go through the checks and the density of a gate
  gates.push_back(dh);
  gates.push_back(h);
  gates = checked(std::move(gates));
  const Tensor all_h = gates.back(), all_dh = gates[gates.size() - 2];
  gates.resize(gates.size() - 2);
  const ScalarType dtype = h.scalar_type();
  const int64_t D = h.size(2), rows = layout.num_sequences();
  const MaybeTensor before = as_state("h0", h0, dtype, rows, D);
  Tensor carry = torch::stable::clone(as_state("dh_T", dh_T, dtype, rows, D));
  // the gradient of scan does not read b
  if (gates.size() == 1) gates.push_back(gates[0]);
  const auto length = [&](int64_t n) { return layout.length(n); };
  with_type(dtype, [&](auto type) {
    using S = decltype(type);
    using C = typename Compute<S>::type;
    const auto kernel = entries<S>(formula).backward;
    const C* from = before ? static_cast<const C*>(before->const_data_ptr()) : nullptr;
    C* carried = static_cast<C*>(carry.mutable_data_ptr());
    share_out(Lines(rows, D), length, true, [&](const Share& share) {
      const auto at = [&](const Tensor& x) {
        return static_cast<const S*>(x.const_data_ptr()) +
               layout.offset(share, x.stride(0), x.stride(1)) + share.c;
      };
      const int64_t column = share.n * D + share.c;
      Gradients<S> to{};
      to.dh = at(all_dh);
      to.h = at(all_h);
      to.dh_step = layout.direction() * all_dh.stride(1);
      to.h_step = layout.direction() * all_h.stride(1);
      to.before = from ? from + column : nullptr;
      to.follows = share.first > 0;
      for (size_t gate = 0; gate < grads.size(); ++gate) {
        to.dx[gate] = const_cast<S*>(at(grads[gate]));
        to.dx_step[gate] = layout.direction() * grads[gate].stride(1);
      }
      kernel(layout.stretch<S>(share, gates), to, carried + column);
    });
  });
  return h0 ? torch::stable::to(carry, h0->scalar_type()) : carry;
}

Tensor new_like(const Tensor& x) {
  return torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
}

// Gates that are tensors of their own: h and h_T.
std::tuple<Tensor, Tensor> forward_apart(Formula formula, std::vector<Tensor> gates,
                                         const MaybeTensor& h0, const Layout& layout) {
  // Layout has read the first
  const Tensor h = new_like(gates[0]);
  return {h, run_forward(formula, std::move(gates), h, h0, layout)};
}

// The gradient of each gate, and dh0.
std::vector<Tensor> backward_apart(Formula formula, const Tensor& dh, const Tensor& dh_T,
                                   std::vector<Tensor> gates, int num_grads,
                                   const MaybeTensor& h0, const Tensor& h, const Layout& layout) {
  check_gate(h);
  std::vector<Tensor> grads;
  for (int gate = 0; gate < num_grads; ++gate) grads.push_back(new_like(h));
  const Tensor dh0 = run_backward(formula, dh, dh_T, std::move(gates), grads, h0, h, layout);
  grads.push_back(dh0);
  return grads;
}

// (B, T, ...) of what is (T, B, ...) if `time_first`: a view.
Tensor batch_first(const Tensor& x, bool time_first) {
  check_readable("an input", x);
  STD_TORCH_CHECK(x.dim() >= 2, "expected an axis for time and one for the batch");
  return time_first ? torch::stable::transpose(x, 0, 1) : x;
}

MaybeTensor batch_first(const MaybeTensor& x, bool time_first) {
  return x ? MaybeTensor(batch_first(*x, time_first)) : x;
}

// Gates side by side, time or batch first: h likewise, and h_T.
std::tuple<Tensor, Tensor> forward_fused(Formula formula, int64_t num, const Tensor& fused,
                                         const MaybeTensor& h0, bool time_first,
                                         const MaybeTensor& reset, const MaybeTensor& cu_seqlens,
                                         bool reverse) {
  const auto gates = split(batch_first(fused, time_first), num);
  const Tensor h = torch::stable::new_empty(fused, {fused.size(0), fused.size(1), gates[0].size(2)});
  const Layout layout(gates[0], batch_first(reset, time_first), cu_seqlens, reverse);
  return {h, run_forward(formula, gates, batch_first(h, time_first), h0, layout)};
}

// Their gradient in one tensor, and dh0.
std::tuple<Tensor, Tensor> backward_fused(Formula formula, int64_t num, const Tensor& dh,
                                          const Tensor& dh_T, const Tensor& fused,
                                          const MaybeTensor& h0, const Tensor& h, bool time_first,
                                          const MaybeTensor& reset, const MaybeTensor& cu_seqlens,
                                          bool reverse) {
  const auto gates = split(batch_first(fused, time_first), num);
  const Tensor grad = new_like(fused);
  const Layout layout(gates[0], batch_first(reset, time_first), cu_seqlens, reverse);
  const Tensor dh0 =
      run_backward(formula, batch_first(dh, time_first), dh_T, gates,
                   split(batch_first(grad, time_first), num), h0, batch_first(h, time_first), layout);
  return {grad, dh0};
}

Formula minlstm_formula(const std::string& candidate, bool normalized) {
  return {normalized ? Formula::minlstm : Formula::plain_minlstm, candidate_named(candidate)};
}

// The operators, with the arguments of their schemas in minrnn/ops/__init__.py.

std::tuple<Tensor, Tensor> scan(Tensor a, Tensor b, MaybeTensor h0, MaybeTensor reset,
                                MaybeTensor cu_seqlens, bool reverse) {
  return forward_apart({Formula::scan, Candidate::g}, {a, b}, h0,
                       Layout(a, reset, cu_seqlens, reverse));
}

std::tuple<Tensor, Tensor, Tensor> scan_backward(Tensor dh, Tensor dh_T, Tensor a, MaybeTensor h0,
                                                 Tensor h, MaybeTensor reset,
                                                 MaybeTensor cu_seqlens, bool reverse) {
  const auto grads = backward_apart({Formula::scan, Candidate::g}, dh, dh_T, {a}, 2, h0, h,
                                    Layout(a, reset, cu_seqlens, reverse));
  return {grads[0], grads[1], grads[2]};
}

std::tuple<Tensor, Tensor> mingru(Tensor k, Tensor v, MaybeTensor h0, std::string candidate,
                                  MaybeTensor reset, MaybeTensor cu_seqlens, bool reverse) {
  return forward_apart({Formula::mingru, candidate_named(candidate)}, {k, v}, h0,
                       Layout(k, reset, cu_seqlens, reverse));
}

std::tuple<Tensor, Tensor, Tensor> mingru_backward(Tensor dh, Tensor dh_T, Tensor k, Tensor v,
                                                   MaybeTensor h0, Tensor h, std::string candidate,
                                                   MaybeTensor reset, MaybeTensor cu_seqlens,
                                                   bool reverse) {
  const auto grads = backward_apart({Formula::mingru, candidate_named(candidate)}, dh, dh_T,
                                    {k, v}, 2, h0, h, Layout(k, reset, cu_seqlens, reverse));
  return {grads[0], grads[1], grads[2]};
}

std::tuple<Tensor, Tensor> mingru_fused(Tensor gates, MaybeTensor h0, std::string candidate,
                                        bool time_first, MaybeTensor reset,
                                        MaybeTensor cu_seqlens, bool reverse) {
  return forward_fused({Formula::mingru, candidate_named(candidate)}, 2, gates, h0, time_first,
                       reset, cu_seqlens, reverse);
}

std::tuple<Tensor, Tensor> mingru_fused_backward(Tensor dh, Tensor dh_T, Tensor gates,
                                                 MaybeTensor h0, Tensor h, std::string candidate,
                                                 bool time_first, MaybeTensor reset,
                                                 MaybeTensor cu_seqlens, bool reverse) {
  return backward_fused({Formula::mingru, candidate_named(candidate)}, 2, dh, dh_T, gates, h0, h,
                        time_first, reset, cu_seqlens, reverse);
}

std::tuple<Tensor, Tensor> minlstm(Tensor f, Tensor i, Tensor v, MaybeTensor h0,
                                   std::string candidate, bool normalized, MaybeTensor reset,
                                   MaybeTensor cu_seqlens, bool reverse) {
  return forward_apart(minlstm_formula(candidate, normalized), {f, i, v}, h0,
                       Layout(f, reset, cu_seqlens, reverse));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> minlstm_backward(
    Tensor dh, Tensor dh_T, Tensor f, Tensor i, Tensor v, MaybeTensor h0, Tensor h,
    std::string candidate, bool normalized, MaybeTensor reset, MaybeTensor cu_seqlens,
    bool reverse) {
  const auto grads = backward_apart(minlstm_formula(candidate, normalized), dh, dh_T, {f, i, v}, 3,
                                    h0, h, Layout(f, reset, cu_seqlens, reverse));
  return {grads[0], grads[1], grads[2], grads[3]};
}

std::tuple<Tensor, Tensor> minlstm_fused(Tensor gates, MaybeTensor h0, std::string candidate,
                                         bool normalized, bool time_first, MaybeTensor reset,
                                         MaybeTensor cu_seqlens, bool reverse) {
  return forward_fused(minlstm_formula(candidate, normalized), 3, gates, h0, time_first, reset,
                       cu_seqlens, reverse);
}

std::tuple<Tensor, Tensor> minlstm_fused_backward(Tensor dh, Tensor dh_T, Tensor gates,
                                                  MaybeTensor h0, Tensor h, std::string candidate,
                                                  bool normalized, bool time_first,
                                                  MaybeTensor reset, MaybeTensor cu_seqlens,
                                                  bool reverse) {
  return backward_fused(minlstm_formula(candidate, normalized), 3, dh, dh_T, gates, h0, h,
                        time_first, reset, cu_seqlens, reverse);
}

}  // namespace
}  // namespace minrnn

STABLE_TORCH_LIBRARY_IMPL(minrnn, CPU, m) {
  m.impl("scan", TORCH_BOX(&minrnn::scan));
  m.impl("scan_backward", TORCH_BOX(&minrnn::scan_backward));
  m.impl("mingru", TORCH_BOX(&minrnn::mingru));
  m.impl("mingru_backward", TORCH_BOX(&minrnn::mingru_backward));
  m.impl("mingru_fused", TORCH_BOX(&minrnn::mingru_fused));
  m.impl("mingru_fused_backward", TORCH_BOX(&minrnn::mingru_fused_backward));
  m.impl("minlstm", TORCH_BOX(&minrnn::minlstm));
  m.impl("minlstm_backward", TORCH_BOX(&minrnn::minlstm_backward));
  m.impl("minlstm_fused", TORCH_BOX(&minrnn::minlstm_fused));
  m.impl("minlstm_fused_backward", TORCH_BOX(&minrnn::minlstm_fused_backward));
}
