// Binds rows.h and model.h to torch's dispatcher for the CPU. What calls them is minrnn/ops/rows.py
// and minrnn/packing.py, which pack the weights.

// a product and a sum are one instruction where the machine has one: no order of sums changes
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")
#endif

// vectors are passed between inlined functions only
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "model.h"
#include "rows.h"

namespace minrnn {

// One function for each instruction set, with its own width of vectors; the widest that the machine
// has is taken.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
const int vectors = __builtin_cpu_supports("x86-64-v4")   ? 16
                    : __builtin_cpu_supports("x86-64-v3") ? 8
                                                          : 4;

#define MINRNN_ROWS(W)                                                                       \
  __attribute__((target("arch=x86-64-v4"))) void rows_run_16(                                \
      const Panels<W>& of, int64_t begin, int64_t end, const float* x, int64_t M, float* y) { \
    panels_times<16>(of, begin, end, x, M, y);                                               \
  }                                                                                          \
  __attribute__((target("arch=x86-64-v3"))) void rows_run_8(                                 \
      const Panels<W>& of, int64_t begin, int64_t end, const float* x, int64_t M, float* y) { \
    panels_times<8>(of, begin, end, x, M, y);                                                \
  }                                                                                          \
  void rows_run_4(const Panels<W>& of, int64_t begin, int64_t end, const float* x, int64_t M, \
                  float* y) {                                                                \
    panels_times<4>(of, begin, end, x, M, y);                                                \
  }                                                                                          \
  void rows_run(const Panels<W>& of, int64_t begin, int64_t end, const float* x, int64_t M,  \
                float* y) {                                                                  \
    if (vectors == 16) return rows_run_16(of, begin, end, x, M, y);                          \
    if (vectors == 8) return rows_run_8(of, begin, end, x, M, y);                            \
    rows_run_4(of, begin, end, x, M, y);                                                     \
  }
#else
#define MINRNN_ROWS(W)                                                                       \
  void rows_run(const Panels<W>& of, int64_t begin, int64_t end, const float* x, int64_t M,  \
                float* y) {                                                                  \
    panels_times<4>(of, begin, end, x, M, y);                                                \
  }
#endif

MINRNN_ROWS(float)
MINRNN_ROWS(BFloat16)
MINRNN_ROWS(int8_t)

#define MINRNN_RECUR(name, ...)                                                              \
  MULTI_ISA void recur_##name(const ModelSizes& n, const float* gates, int64_t b,            \
                              float* state, float* h) {                                      \
    recur_rows<__VA_ARGS__>(n, gates, b, state, h);                                          \
  }

MINRNN_RECUR(gru_g, MinGRU<Candidate::g>)
MINRNN_RECUR(gru_identity, MinGRU<Candidate::identity>)
MINRNN_RECUR(gru_tanh, MinGRU<Candidate::tanh>)
MINRNN_RECUR(lstm_g, MinLSTM<Candidate::g, true>)
MINRNN_RECUR(lstm_identity, MinLSTM<Candidate::identity, true>)
MINRNN_RECUR(lstm_tanh, MinLSTM<Candidate::tanh, true>)
MINRNN_RECUR(plain_lstm_g, MinLSTM<Candidate::g, false>)
MINRNN_RECUR(plain_lstm_identity, MinLSTM<Candidate::identity, false>)
MINRNN_RECUR(plain_lstm_tanh, MinLSTM<Candidate::tanh, false>)

MULTI_ISA void convolve_row(const ModelSizes& n, const float* x, const float* past,
                            const float* weight, const float* bias, int64_t row, float* u) {
  convolve(n, x, past, weight, bias, row, u);
}

MULTI_ISA void norm_row(const float* x, const float* weight, int64_t n, float* y) {
  rms_norm(x, weight, n, y);
}

MULTI_ISA void gelu_row(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = gelu(x[i]);
}

MULTI_ISA void add_row(float* x, const float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] += y[i];
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Recur = void (*)(const ModelSizes&, const float*, int64_t, float*, float*);

const float* vector_of(const MaybeTensor& x, int64_t N) {
  if (!x || x->numel() == 0) return nullptr;
  STD_TORCH_CHECK(x->numel() == N && x->is_contiguous() && x->scalar_type() == ScalarType::Float,
                  "a vector must be contiguous, float32, of ", N, " numbers");
  return x->const_data_ptr<float>();
}

// Packed weights of W (N, K): the last axis has the steps that are read at once.
template <class W>
Panels<W> panels_of(const Tensor& packed, const MaybeTensor& scale, const MaybeTensor& bias,
                    int64_t N, int64_t K) {
  constexpr int64_t steps = Group<4, W>::steps;
  STD_TORCH_CHECK(N > 0 && packed.dim() == 4 && packed.is_contiguous() &&
                      packed.size(0) == (N + panel_width - 1) / panel_width &&
                      packed.size(1) == (K + steps - 1) / steps &&
                      packed.size(2) == panel_width && packed.size(3) == steps &&
                      packed.element_size() == static_cast<int64_t>(sizeof(W)),
                  "expected x (M, K) and weights packed as (ceil(N / 32), ceil(K / steps), 32, steps)");
  return {static_cast<const W*>(packed.const_data_ptr()), vector_of(scale, N), vector_of(bias, N),
          N, K};
}

template <class F>
auto with_weight(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      STD_TORCH_CHECK(dtype == ScalarType::Char, "weights must be float32, bfloat16 or int8");
      return f(int8_t{});
  }
}

template <class W>
void multiply(const Panels<W>& of, const float* x, int64_t M, float* y) {
  // work that is worth waking a thread for
  constexpr int64_t worth_a_thread = 1 << 15;
  const int64_t grain = std::max<int64_t>(1, worth_a_thread / (1 + of.K * panel_width * M));
  torch::stable::parallel_for(0, of.count(), grain, [&](int64_t begin, int64_t end) {
    rows_run(of, begin, end, x, M, y);
  });
}

// f(i) for i in [0, count), each about `size` numbers of work.
template <class F>
void for_each(int64_t count, int64_t size, const F& f) {
  constexpr int64_t worth_a_thread = 1 << 13;
  const int64_t grain = std::max<int64_t>(1, worth_a_thread / std::max<int64_t>(1, size));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

Tensor linear_rows(Tensor x, Tensor packed, MaybeTensor scale, MaybeTensor bias, int64_t N) {
  STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::Float,
                  "`x` must have shape (M, K) and be float32");
  const Tensor from = torch::stable::contiguous(x);
  Tensor y = torch::stable::new_empty(x, {x.size(0), N});
  with_weight(packed.scalar_type(), [&](auto type) {
    const auto of = panels_of<decltype(type)>(packed, scale, bias, N, x.size(1));
    multiply(of, from.const_data_ptr<float>(), x.size(0), y.mutable_data_ptr<float>());
  });
  return y;
}

Recur recurrence(int64_t num_gates, const std::string& candidate, bool normalized) {
  static const Recur table[3][3] = {{recur_gru_g, recur_gru_identity, recur_gru_tanh},
                                    {recur_plain_lstm_g, recur_plain_lstm_identity,
                                     recur_plain_lstm_tanh},
                                    {recur_lstm_g, recur_lstm_identity, recur_lstm_tanh}};
  const int column = candidate == "identity" ? 1 : candidate == "tanh" ? 2 : 0;
  return table[num_gates == 2 ? 0 : normalized ? 2 : 1][column];
}

// What `run_model` is given, taken one after the other.
struct Given {
  const std::vector<Tensor>& tensors;
  size_t next = 0;

  const Tensor& take() {
    STD_TORCH_CHECK(next < tensors.size(), "too few weights");
    return tensors[next++];
  }
  const float* vector(int64_t n) { return vector_of(take(), n); }
  template <class W>
  Panels<W> matrix(int64_t N, int64_t K) {
    const Tensor &packed = take(), &scale = take(), &bias = take();
    if (N == 0) return {};
    return panels_of<W>(packed, scale, bias, N, K);
  }
};

// A block over all rows of x, in place; h and conv are its states, in place too.
template <class W>
void run_block(const ModelSizes& n, const BlockWeights<W>& w, Recur recur, float* x, float* h,
               const float* past, float* kept, std::vector<float>& scratch) {
  const int64_t M = n.rows(), width = n.width;
  const int64_t wide = std::max(n.num_gates * n.D, n.inner);
  scratch.resize(M * (width + wide + n.D));
  float *u = scratch.data(), *v = u + M * width, *hs = v + M * wide;
  const auto add = [&] {
    for_each(M, width, [&](int64_t r) { add_row(x + r * width, u + r * width, width); });
  };
  if (w.conv) {
    for_each(M, width * n.conv_width,
             [&](int64_t r) { convolve_row(n, x, past, w.conv, w.conv_bias, r, v + r * width); });
    for (int64_t b = 0; b < n.B; ++b) keep_inputs(n, x, past, b, kept);
    multiply(w.pointwise, v, M, u);
    add();
  }
  for_each(M, width,
           [&](int64_t r) { norm_row(x + r * width, w.mixer_norm, width, u + r * width); });
  multiply(w.gates, u, M, v);
  for_each(n.B, n.T * n.D * 16, [&](int64_t b) { recur(n, v, b, h + b * n.D, hs); });
  multiply(w.down, hs, M, u);
  add();
  if (!n.inner) return;
  for_each(M, width, [&](int64_t r) { norm_row(x + r * width, w.mlp_norm, width, u + r * width); });
  multiply(w.widen, u, M, v);
  for_each(M, n.inner * 16, [&](int64_t r) { gelu_row(v + r * n.inner, n.inner); });
  multiply(w.narrow, v, M, u);
  add();
}

template <class W>
Tensor run_blocks(ModelSizes n, int64_t num_blocks, int64_t V, Given given, Recur recur,
                  const std::vector<Tensor>& before, std::vector<Tensor>& after,
                  std::vector<float>& x, const Tensor& like) {
  std::vector<float> scratch;
  const int64_t conv_size = n.B * (n.conv_width - 1) * n.width;
  for (int64_t i = 0; i < num_blocks; ++i) {
    BlockWeights<W> w{};
    w.conv = given.vector(n.conv_width * n.width);
    w.conv_bias = given.vector(n.width);
    w.pointwise = given.matrix<W>(n.conv_width ? n.width : 0, n.width);
    w.mixer_norm = given.vector(n.width);
    w.gates = given.matrix<W>(n.num_gates * n.D, n.width);
    w.down = given.matrix<W>(n.width, n.D);
    w.mlp_norm = given.vector(n.width);
    w.widen = given.matrix<W>(n.inner, n.width);
    w.narrow = given.matrix<W>(n.inner ? n.width : 0, n.inner);
    STD_TORCH_CHECK(n.rows() > 0 && before[2 * i].numel() == n.B * n.D &&
                        (n.conv_width < 2 || before[2 * i + 1].numel() == conv_size),
                    "`states` must have the batch size of `ids`, B = ", n.B, " >= 1");
    const float* h0 = vector_of(before[2 * i], n.B * n.D);
    Tensor h = torch::stable::new_empty(before[2 * i], {n.B, n.D});
    std::copy(h0, h0 + n.B * n.D, h.mutable_data_ptr<float>());
    Tensor conv = torch::stable::new_empty(
        before[2 * i + 1], {n.B, std::max<int64_t>(0, n.conv_width - 1), n.width});
    const float* past = n.conv_width > 1 ? vector_of(before[2 * i + 1], conv_size) : nullptr;
    run_block(n, w, recur, x.data(), h.mutable_data_ptr<float>(), past,
              conv.mutable_data_ptr<float>(), scratch);
    after.push_back(h);
    after.push_back(conv);
  }
  const float* norm = given.vector(n.width);
  const Panels<W> head = given.matrix<W>(V, n.width);
  scratch.resize(n.rows() * n.width);
  for_each(n.rows(), n.width, [&](int64_t r) {
    norm_row(x.data() + r * n.width, norm, n.width, scratch.data() + r * n.width);
  });
  Tensor logits = torch::stable::new_empty(like, {n.B, n.T, V});
  multiply(head, scratch.data(), n.rows(), logits.mutable_data_ptr<float>());
  return logits;
}

// ids (B, T) and states behind them to logits (B, T, V) and the next states: for each block h (B, D)
// and the convolution's inputs. `sizes` are D, the number of gates, conv_width and inner.
std::tuple<Tensor, std::vector<Tensor>> run_model(Tensor ids, Tensor embedding,
                                                  std::vector<Tensor> weights,
                                                  std::vector<Tensor> states,
                                                  std::vector<int64_t> sizes,
                                                  std::string candidate, bool normalized) {
  STD_TORCH_CHECK(ids.dim() == 2 && ids.scalar_type() == ScalarType::Long && sizes.size() == 4 &&
                      embedding.dim() == 2 && states.size() % 2 == 0 && !weights.empty(),
                  "expected ids (B, T) int64, an embedding (V, width), four sizes");
  const int64_t V = embedding.size(0), width = embedding.size(1);
  const float* rows = vector_of(embedding, V * width);
  const ModelSizes n{ids.size(0), ids.size(1), width, sizes[0], sizes[1], sizes[2], sizes[3]};
  const Tensor dense = torch::stable::contiguous(ids);
  const int64_t* id = dense.const_data_ptr<int64_t>();
  std::vector<float> x(n.rows() * width);
  for (int64_t r = 0; r < n.rows(); ++r) {
    STD_TORCH_CHECK(id[r] >= 0 && id[r] < V, "`ids` must be in [0, ", V, "), got ", id[r]);
    std::copy(rows + id[r] * width, rows + (id[r] + 1) * width, x.data() + r * width);
  }
  const Recur recur = recurrence(n.num_gates, candidate, normalized);
  std::vector<Tensor> after;
  // of all matrices the head's is there always
  const Tensor logits = with_weight(weights[weights.size() - 3].scalar_type(), [&](auto type) {
    return run_blocks<decltype(type)>(n, states.size() / 2, V, Given{weights}, recur, states, after,
                                      x, embedding);
  });
  return {logits, after};
}

}  // namespace
}  // namespace minrnn

STABLE_TORCH_LIBRARY_IMPL(minrnn, CPU, m) {
  m.impl("linear_rows", TORCH_BOX(&minrnn::linear_rows));
  m.impl("run_model", TORCH_BOX(&minrnn::run_model));
}
