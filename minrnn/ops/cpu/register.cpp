// Binds kernels.h to torch's dispatcher for the CPU, through the stable ABI: one build serves many
// versions of torch and Python. Shapes and dtypes were checked in minrnn/ops/checks.py; here only
// what a direct call of torch.ops could use to reach memory that is not ours.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "narrow.h"

// One build for every x86-64 machine: the loader picks the widest vectors it has.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MULTI_ISA __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define MULTI_ISA
#endif

namespace minrnn {

// Clones need a plain function for each operator and type; overloads on S keep their names short.
#define MINRNN_ENTRIES_OF(name, S, ...)                                                          \
  MULTI_ISA void forward_##name(const Sequence<S>& sequence, S* h, int64_t h_step,               \
                                Compute<S>::type* h_T) {                                         \
    if (is_narrow<__VA_ARGS__>(sequence)) {                                                      \
      narrow_forward<__VA_ARGS__>(sequence, h, h_T);                                             \
    } else {                                                                                     \
      forward<__VA_ARGS__>(sequence, h, h_step, h_T);                                            \
    }                                                                                            \
  }                                                                                              \
  MULTI_ISA void backward_##name(const Sequence<S>& sequence, const S* dh, int64_t dh_step,      \
                                 const S* h, int64_t h_step, S* const* dx,                       \
                                 const int64_t* dx_step, Compute<S>::type* carry) {              \
    const int64_t width = sequence.width;                                                        \
    if (is_narrow<__VA_ARGS__>(sequence) && dh_step == width && h_step == width) {               \
      narrow_backward<__VA_ARGS__>(sequence, dh, h, dx, carry);                                  \
    } else {                                                                                     \
      backward<__VA_ARGS__>(sequence, dh, dh_step, h, h_step, dx, dx_step, carry);               \
    }                                                                                            \
  }

#define MINRNN_ENTRIES(name, ...)                 \
  MINRNN_ENTRIES_OF(name, float, __VA_ARGS__)     \
  MINRNN_ENTRIES_OF(name, double, __VA_ARGS__)    \
  MINRNN_ENTRIES_OF(name, BFloat16, __VA_ARGS__)  \
  MINRNN_ENTRIES_OF(name, Float16, __VA_ARGS__)

MINRNN_ENTRIES(scan, Scan)
MINRNN_ENTRIES(mingru_g, MinGRU<Candidate::g>)
MINRNN_ENTRIES(mingru_identity, MinGRU<Candidate::identity>)
MINRNN_ENTRIES(mingru_tanh, MinGRU<Candidate::tanh>)
MINRNN_ENTRIES(minlstm_g, MinLSTM<Candidate::g, true>)
MINRNN_ENTRIES(minlstm_identity, MinLSTM<Candidate::identity, true>)
MINRNN_ENTRIES(minlstm_tanh, MinLSTM<Candidate::tanh, true>)
MINRNN_ENTRIES(plain_minlstm_g, MinLSTM<Candidate::g, false>)
MINRNN_ENTRIES(plain_minlstm_identity, MinLSTM<Candidate::identity, false>)
MINRNN_ENTRIES(plain_minlstm_tanh, MinLSTM<Candidate::tanh, false>)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

template <class S>
struct Entries {
  void (*forward)(const Sequence<S>&, S*, int64_t, typename Compute<S>::type*);
  void (*backward)(const Sequence<S>&, const S*, int64_t, const S*, int64_t, S* const*,
                   const int64_t*, typename Compute<S>::type*);
};

// Which formula: an operator and its options.
struct Formula {
  enum { scan, mingru, minlstm, plain_minlstm } op;
  Candidate candidate;
};

template <class S>
Entries<S> entries(Formula formula) {
  const int column = static_cast<int>(formula.candidate);
  static const Entries<S> table[4][3] = {
      {{forward_scan, backward_scan}, {forward_scan, backward_scan}, {forward_scan, backward_scan}},
      {{forward_mingru_g, backward_mingru_g},
       {forward_mingru_identity, backward_mingru_identity},
       {forward_mingru_tanh, backward_mingru_tanh}},
      {{forward_minlstm_g, backward_minlstm_g},
       {forward_minlstm_identity, backward_minlstm_identity},
       {forward_minlstm_tanh, backward_minlstm_tanh}},
      {{forward_plain_minlstm_g, backward_plain_minlstm_g},
       {forward_plain_minlstm_identity, backward_plain_minlstm_identity},
       {forward_plain_minlstm_tanh, backward_plain_minlstm_tanh}}};
  return table[formula.op][column];
}

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

// Sequences of a call: rows of the batch, or pieces of its one row, with the direction applied.
class Layout {
 public:
  Layout(const Tensor& gate, const MaybeTensor& reset, const MaybeTensor& cu_seqlens, bool reverse)
      : reverse_(reverse), B_(gate.size(0)), T_(gate.size(1)) {
    if (reset) {
      STD_TORCH_CHECK(reset->dim() == 2 && reset->size(0) == B_ && reset->size(1) == T_ &&
                          reset->scalar_type() == ScalarType::Bool,
                      "`reset` must have shape (B, T) and dtype bool");
      reset_ = reset->const_data_ptr<bool>();
      reset_row_ = reset->stride(0);
      reset_step_ = reset->stride(1);
    }
    if (!cu_seqlens) return;
    STD_TORCH_CHECK(B_ == 1 && cu_seqlens->dim() == 1, "`cu_seqlens` needs a batch of one row");
    const Tensor wide = torch::stable::contiguous(torch::stable::to(*cu_seqlens, ScalarType::Long));
    const int64_t* bounds = wide.const_data_ptr<int64_t>();
    bounds_.assign(bounds, bounds + wide.numel());
    STD_TORCH_CHECK(!bounds_.empty() && bounds_.front() == 0 && bounds_.back() == T_ &&
                        std::is_sorted(bounds_.begin(), bounds_.end()),
                    "`cu_seqlens` must rise from 0 to T = ", T_);
  }

  int64_t num_sequences() const { return bounds_.empty() ? B_ : bounds_.size() - 1; }

  int64_t length(int64_t n) const { return bounds_.empty() ? T_ : bounds_[n + 1] - bounds_[n]; }

  // Where the first step processed of sequence n lies in a tensor (B, T, ...) with these strides.
  int64_t offset(int64_t n, int64_t row_stride, int64_t step) const {
    const int64_t row = bounds_.empty() ? n : 0, start = bounds_.empty() ? 0 : bounds_[n];
    const int64_t first = reverse_ && length(n) > 0 ? start + length(n) - 1 : start;
    return row * row_stride + first * step;
  }

  int64_t direction() const { return reverse_ ? -1 : 1; }

  template <class S>
  Sequence<S> sequence(int64_t n, int64_t c, int64_t width, const std::vector<Tensor>& gates) const {
    Sequence<S> made{};
    for (size_t gate = 0; gate < gates.size(); ++gate) {
      const Tensor& x = gates[gate];
      made.x[gate] = static_cast<const S*>(x.const_data_ptr()) +
                     offset(n, x.stride(0), x.stride(1)) + c;
      made.x_step[gate] = direction() * x.stride(1);
    }
    if (reset_) made.reset = reset_ + offset(n, reset_row_, reset_step_);
    made.reset_step = direction() * reset_step_;
    made.T = length(n);
    made.width = width;
    return made;
  }

 private:
  bool reverse_;
  int64_t B_, T_;
  const bool* reset_ = nullptr;
  int64_t reset_row_ = 0, reset_step_ = 0;
  std::vector<int64_t> bounds_;
};

// Calls f(n, c, width) over all sequences n and blocks of channels, on as many threads as pay.
template <class F>
void for_each_block(const Layout& layout, int64_t T, int64_t D, const F& f) {
  constexpr int64_t worth_a_thread = 1 << 14, line = 32;
  const int64_t rows = layout.num_sequences();
  if (rows == 0 || D == 0) return;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(),
                                            1 + rows * T * D / worth_a_thread);
  // whole rows if there are enough of them, else blocks of channels in whole cache lines
  int64_t blocks = rows % threads == 0 ? 1 : threads;
  const int64_t width = std::max(line, (D / blocks + line - 1) / line * line);
  blocks = std::max<int64_t>(1, (D + width - 1) / width);
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      // a thread's items are neighbours: all rows of one block of channels
      const int64_t n = item % rows, c = item / rows * width;
      f(n, c, std::min(width, D - c));
    }
  };
  if (threads == 1) return run(0, rows * blocks);
  torch::stable::parallel_for(0, rows * blocks, std::max<int64_t>(1, rows * blocks / threads), run);
}

ScalarType state_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// h0 (rows, D) as the kernels read it.
MaybeTensor as_state(const MaybeTensor& h0, ScalarType dtype, int64_t rows, int64_t D) {
  if (!h0) return std::nullopt;
  STD_TORCH_CHECK(h0->dim() == 2 && h0->size(0) == rows && h0->size(1) == D,
                  "`h0` must have shape (", rows, ", ", D, ")");
  return torch::stable::contiguous(torch::stable::to(*h0, state_type(dtype)));
}

std::vector<Tensor> checked(std::vector<Tensor> gates) {
  for (Tensor& x : gates) {
    STD_TORCH_CHECK(x.dim() == 3, "gates must have shape (B, T, D)");
    for (int axis = 0; axis < 3; ++axis)
      STD_TORCH_CHECK(x.size(axis) == gates[0].size(axis), "gates must have equal shapes");
    STD_TORCH_CHECK(x.scalar_type() == gates[0].scalar_type(), "gates must have equal dtypes");
    x = dense(x);
  }
  return gates;
}

std::tuple<Tensor, Tensor> run_forward(Formula formula, std::vector<Tensor> gates,
                                       const MaybeTensor& h0, const Layout& layout) {
  gates = checked(std::move(gates));
  const ScalarType dtype = gates[0].scalar_type();
  const int64_t B = gates[0].size(0), T = gates[0].size(1), D = gates[0].size(2);
  const int64_t rows = layout.num_sequences();
  const MaybeTensor before = as_state(h0, dtype, rows, D);
  Tensor h = torch::stable::new_empty(gates[0], {B, T, D});
  Tensor h_T = torch::stable::new_empty(gates[0], {rows, D}, state_type(dtype));
  with_type(dtype, [&](auto type) {
    using S = decltype(type);
    using C = typename Compute<S>::type;
    const auto kernel = entries<S>(formula).forward;
    const C* from = before ? static_cast<const C*>(before->const_data_ptr()) : nullptr;
    S* to = static_cast<S*>(h.mutable_data_ptr());
    C* last = static_cast<C*>(h_T.mutable_data_ptr());
    for_each_block(layout, T, D, [&](int64_t n, int64_t c, int64_t width) {
      Sequence<S> sequence = layout.sequence<S>(n, c, width, gates);
      sequence.h0 = from ? from + n * D + c : nullptr;
      kernel(sequence, to + layout.offset(n, T * D, D) + c, layout.direction() * D,
             last + n * D + c);
    });
  });
  return {h, h_T};
}

// The gradient of each gate, and dh0.
std::vector<Tensor> run_backward(Formula formula, const Tensor& dh, const Tensor& dh_T,
                                 std::vector<Tensor> gates, int num_gates, const MaybeTensor& h0,
                                 const Tensor& h, const Layout& layout) {
  // dh and h go through the checks and the density of a gate
  gates.push_back(dh);
  gates.push_back(h);
  gates = checked(std::move(gates));
  const Tensor out_h = gates.back(), out_dh = gates[gates.size() - 2];
  gates.resize(gates.size() - 2);
  const ScalarType dtype = h.scalar_type();
  const int64_t B = h.size(0), T = h.size(1), D = h.size(2), rows = layout.num_sequences();
  const MaybeTensor before = as_state(h0, dtype, rows, D);
  const MaybeTensor later = as_state(dh_T, dtype, rows, D);
  Tensor carry = torch::stable::clone(*later);
  std::vector<Tensor> grads;
  for (int gate = 0; gate < num_gates; ++gate)
    grads.push_back(torch::stable::new_empty(h, {B, T, D}));
  with_type(dtype, [&](auto type) {
    using S = decltype(type);
    using C = typename Compute<S>::type;
    const auto kernel = entries<S>(formula).backward;
    const C* from = before ? static_cast<const C*>(before->const_data_ptr()) : nullptr;
    C* carried = static_cast<C*>(carry.mutable_data_ptr());
    const auto at = [&](const Tensor& x, int64_t n, int64_t c) {
      return static_cast<const S*>(x.const_data_ptr()) + layout.offset(n, x.stride(0), x.stride(1)) + c;
    };
    for_each_block(layout, T, D, [&](int64_t n, int64_t c, int64_t width) {
      Sequence<S> sequence = layout.sequence<S>(n, c, width, gates);
      // the gradient of scan does not read b
      if (gates.size() == 1) {
        sequence.x[1] = sequence.x[0];
        sequence.x_step[1] = sequence.x_step[0];
      }
      sequence.h0 = from ? from + n * D + c : nullptr;
      S* dx[3];
      int64_t dx_step[3];
      for (int gate = 0; gate < num_gates; ++gate) {
        dx[gate] = const_cast<S*>(at(grads[gate], n, c));
        dx_step[gate] = layout.direction() * D;
      }
      kernel(sequence, at(out_dh, n, c), layout.direction() * out_dh.stride(1), at(out_h, n, c),
             layout.direction() * out_h.stride(1), dx, dx_step, carried + n * D + c);
    });
  });
  grads.push_back(h0 ? torch::stable::to(carry, h0->scalar_type()) : carry);
  return grads;
}

Formula minlstm_formula(const std::string& candidate, bool normalized) {
  return {normalized ? Formula::minlstm : Formula::plain_minlstm, candidate_named(candidate)};
}

// The operators, with the arguments of their schemas in minrnn/ops/__init__.py.

std::tuple<Tensor, Tensor> scan(Tensor a, Tensor b, MaybeTensor h0, MaybeTensor reset,
                                MaybeTensor cu_seqlens, bool reverse) {
  return run_forward({Formula::scan, Candidate::g}, {a, b}, h0,
                     Layout(a, reset, cu_seqlens, reverse));
}

std::tuple<Tensor, Tensor> mingru(Tensor k, Tensor v, MaybeTensor h0, std::string candidate,
                                  MaybeTensor reset, MaybeTensor cu_seqlens, bool reverse) {
  return run_forward({Formula::mingru, candidate_named(candidate)}, {k, v}, h0,
                     Layout(k, reset, cu_seqlens, reverse));
}

std::tuple<Tensor, Tensor> minlstm(Tensor f, Tensor i, Tensor v, MaybeTensor h0,
                                   std::string candidate, bool normalized, MaybeTensor reset,
                                   MaybeTensor cu_seqlens, bool reverse) {
  return run_forward(minlstm_formula(candidate, normalized), {f, i, v}, h0,
                     Layout(f, reset, cu_seqlens, reverse));
}

std::tuple<Tensor, Tensor, Tensor> scan_backward(Tensor dh, Tensor dh_T, Tensor a, MaybeTensor h0,
                                                 Tensor h, MaybeTensor reset,
                                                 MaybeTensor cu_seqlens, bool reverse) {
  const auto grads = run_backward({Formula::scan, Candidate::g}, dh, dh_T, {a}, 2, h0, h,
                                  Layout(a, reset, cu_seqlens, reverse));
  return {grads[0], grads[1], grads[2]};
}

std::tuple<Tensor, Tensor, Tensor> mingru_backward(Tensor dh, Tensor dh_T, Tensor k, Tensor v,
                                                   MaybeTensor h0, Tensor h, std::string candidate,
                                                   MaybeTensor reset, MaybeTensor cu_seqlens,
                                                   bool reverse) {
  const auto grads = run_backward({Formula::mingru, candidate_named(candidate)}, dh, dh_T, {k, v},
                                  2, h0, h, Layout(k, reset, cu_seqlens, reverse));
  return {grads[0], grads[1], grads[2]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> minlstm_backward(
    Tensor dh, Tensor dh_T, Tensor f, Tensor i, Tensor v, MaybeTensor h0, Tensor h,
    std::string candidate, bool normalized, MaybeTensor reset, MaybeTensor cu_seqlens,
    bool reverse) {
  const auto grads = run_backward(minlstm_formula(candidate, normalized), dh, dh_T, {f, i, v}, 3,
                                  h0, h, Layout(f, reset, cu_seqlens, reverse));
  return {grads[0], grads[1], grads[2], grads[3]};
}

}  // namespace
}  // namespace minrnn

STABLE_TORCH_LIBRARY_IMPL(minrnn, CPU, m) {
  m.impl("scan", TORCH_BOX(&minrnn::scan));
  m.impl("scan_backward", TORCH_BOX(&minrnn::scan_backward));
  m.impl("mingru", TORCH_BOX(&minrnn::mingru));
  m.impl("mingru_backward", TORCH_BOX(&minrnn::mingru_backward));
  m.impl("minlstm", TORCH_BOX(&minrnn::minlstm));
  m.impl("minlstm_backward", TORCH_BOX(&minrnn::minlstm_backward));
}
