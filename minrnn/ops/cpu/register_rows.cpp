// Binds rows.h and model.h to torch's dispatcher for the CPU. What calls them is minrnn/ops/rows.py
// and minrnn/packing.py, which pack the weights.

#include "compiler.h"

// before all functions: no order of sums changes
MINRNN_CONTRACT

#include <algorithm>
#include <limits>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "model.h"
#include "rows.h"

namespace minrnn {

// One function for each instruction set, with its own width of vectors; the widest that the machine
// has is taken.
#if MINRNN_TARGETS
const int vectors = MINRNN_HAS_V4 ? 16 : MINRNN_HAS_V3 ? 8 : 4;

#define MINRNN_ROWS(W)                                                                       \
  __attribute__((target(MINRNN_V4))) void rows_run_16(                                       \
      const Panels<W>& of, int64_t begin, int64_t end, const float* x, int64_t M, float* y) { \
    panels_times<16>(of, begin, end, x, M, y);                                               \
  }                                                                                          \
  __attribute__((target(MINRNN_V3))) void rows_run_8(                                        \
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
  MULTI_ISA void rows_run(const Panels<W>& of, int64_t begin, int64_t end, const float* x,   \
                          int64_t M, float* y) {                                             \
    panels_times<MINRNN_CLONES ? 8 : 4>(of, begin, end, x, M, y);                            \
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

using Recur = void (*)(const ModelSizes&, const float*, int64_t, float*, float*);

// A dense float32 tensor of these sizes.
const float* floats_of(const char* name, const Tensor& x, std::initializer_list<int64_t> sizes) {
  check_readable(name, x);
  bool right = x.dim() == static_cast<int64_t>(sizes.size()) && x.is_contiguous() &&
               x.scalar_type() == ScalarType::Float;
  int64_t axis = 0;
  for (int64_t size : sizes) right = right && x.size(axis++) == size;
  STD_TORCH_CHECK(right, "`", name, "` must be contiguous, float32 and of the model's sizes");
  return x.const_data_ptr<float>();
}

// What int8 weights are multiplied by, (N,); others have none.
template <class W>
const float* scale_of(const MaybeTensor& scale, int64_t N) {
  constexpr bool is_scaled = std::is_same_v<W, int8_t>;
  STD_TORCH_CHECK(scale.has_value() == is_scaled,
                  is_scaled ? "int8 weights need a `scale`" : "only int8 weights have a `scale`");
  return scale ? floats_of("scale", *scale, {N}) : nullptr;
}

template <class W>
constexpr ScalarType weight_type() {
  return std::is_same_v<W, float>      ? ScalarType::Float
         : std::is_same_v<W, BFloat16> ? ScalarType::BFloat16
                                       : ScalarType::Char;
}

// Packed weights of W (N, K): the last axis has the steps that are read at once.
template <class W>
Panels<W> panels_of(const Tensor& packed, const MaybeTensor& scale, const MaybeTensor& bias,
                    int64_t N, int64_t K) {
  constexpr int64_t steps = Group<4, W>::steps;
  check_readable("panels", packed);
  // comparisons that do not overflow whatever N and K are
  const bool right = packed.dim() == 4 && packed.is_contiguous() &&
                     packed.scalar_type() == weight_type<W>() && N > 0 && K >= 0 &&
                     packed.size(0) == (N - 1) / panel_width + 1 &&
                     packed.size(1) == K / steps + (K % steps > 0) &&
                     packed.size(2) == panel_width && packed.size(3) == steps;
  STD_TORCH_CHECK(right, "expected weights packed as (ceil(N / 32), ceil(K / steps), 32, steps), N = ",
                  N, ", K = ", K);
  return {static_cast<const W*>(packed.const_data_ptr()), scale_of<W>(scale, N),
          bias ? floats_of("bias", *bias, {N}) : nullptr, N, K};
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

Tensor linear_rows(Tensor x, Tensor packed, MaybeTensor scale, MaybeTensor bias, int64_t N,
                   int64_t K) {
  check_readable("x", x);
  check_readable("panels", packed);
  if (scale) check_readable("scale", *scale);
  if (bias) check_readable("bias", *bias);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == K && x.scalar_type() == ScalarType::Float,
                  "`x` must have shape (M, K), K = ", K, ", and be float32");
  if (scale) scale = torch::stable::contiguous(*scale);
  if (bias) bias = torch::stable::contiguous(*bias);
  packed = torch::stable::contiguous(packed);
  return with_weight(packed.scalar_type(), [&](auto type) {
    const auto of = panels_of<decltype(type)>(packed, scale, bias, N, K);
    const Tensor from = torch::stable::contiguous(x);
    Tensor y = torch::stable::new_empty(x, {x.size(0), N});
    multiply(of, from.const_data_ptr<float>(), x.size(0), y.mutable_data_ptr<float>());
    return y;
  });
}

Recur recurrence(int64_t num_gates, const std::string& candidate, bool normalized) {
  static const Recur table[3][3] = {{recur_gru_g, recur_gru_identity, recur_gru_tanh},
                                    {recur_plain_lstm_g, recur_plain_lstm_identity,
                                     recur_plain_lstm_tanh},
                                    {recur_lstm_g, recur_lstm_identity, recur_lstm_tanh}};
  STD_TORCH_CHECK(candidate == "g" || candidate == "identity" || candidate == "tanh",
                  "`candidate` must be one of 'g', 'identity', 'tanh', got ", candidate);
  const int column = candidate == "identity" ? 1 : candidate == "tanh" ? 2 : 0;
  return table[num_gates == 2 ? 0 : normalized ? 2 : 1][column];
}

// What `run_model` is given, taken one after the other. What a model does without has no elements.
struct Given {
  const std::vector<Tensor>& tensors;
  size_t next = 0;

  const Tensor& take() {
    STD_TORCH_CHECK(next < tensors.size(), "too few weights");
    return tensors[next++];
  }
  void nothing(int count) {
    for (int i = 0; i < count; ++i) {
      const Tensor& x = take();
      STD_TORCH_CHECK(x.defined() && x.numel() == 0, "weights of a part that the sizes leave out");
    }
  }
  const float* floats(std::initializer_list<int64_t> sizes) {
    return floats_of("weights", take(), sizes);
  }
  template <class W>
  Panels<W> matrix(int64_t N, int64_t K) {
    const Tensor &packed = take(), &scale = take(), &bias = take();
    return panels_of<W>(packed, present(scale), present(bias), N, K);
  }
  static MaybeTensor present(const Tensor& x) {
    STD_TORCH_CHECK(x.defined(), "`weights` must be tensors");
    return x.numel() == 0 ? std::nullopt : MaybeTensor(x);
  }
};

template <class W>
BlockWeights<W> block_weights(const ModelSizes& n, Given& given) {
  BlockWeights<W> w{};
  if (n.conv_width) {
    w.conv = given.floats({n.conv_width, n.width});
    w.conv_bias = given.floats({n.width});
    w.pointwise = given.matrix<W>(n.width, n.width);
  } else {
    given.nothing(5);
  }
  w.mixer_norm = given.floats({n.width});
  w.gates = given.matrix<W>(n.num_gates * n.D, n.width);
  w.down = given.matrix<W>(n.width, n.D);
  if (n.inner) {
    w.mlp_norm = given.floats({n.width});
    w.widen = given.matrix<W>(n.inner, n.width);
    w.narrow = given.matrix<W>(n.width, n.inner);
  } else {
    given.nothing(7);
  }
  return w;
}

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
  for (int64_t i = 0; i < num_blocks; ++i) {
    const auto w = block_weights<W>(n, given);
    const float* h0 = floats_of("states", before[2 * i], {n.B, n.D});
    const Tensor& inputs = before[2 * i + 1];
    const float* past = nullptr;
    if (n.conv_width > 1)
      past = floats_of("states", inputs, {n.B, n.conv_width - 1, n.width});
    else
      STD_TORCH_CHECK(inputs.defined() && inputs.numel() == 0,
                      "`states` of a convolution that the model does not have");
    Tensor h = torch::stable::new_empty(before[2 * i], {n.B, n.D});
    std::copy(h0, h0 + n.B * n.D, h.mutable_data_ptr<float>());
    Tensor conv = torch::stable::new_empty(
        h, {n.B, std::max<int64_t>(0, n.conv_width - 1), n.width});
    run_block(n, w, recur, x.data(), h.mutable_data_ptr<float>(), past,
              conv.mutable_data_ptr<float>(), scratch);
    after.push_back(h);
    after.push_back(conv);
  }
  const float* norm = given.floats({n.width});
  const Panels<W> head = given.matrix<W>(V, n.width);
  STD_TORCH_CHECK(given.next == given.tensors.size(), "too many weights");
  scratch.resize(n.rows() * n.width);
  for_each(n.rows(), n.width, [&](int64_t r) {
    norm_row(x.data() + r * n.width, norm, n.width, scratch.data() + r * n.width);
  });
  Tensor logits = torch::stable::new_empty(like, {n.B, n.T, V});
  multiply(head, scratch.data(), n.rows(), logits.mutable_data_ptr<float>());
  return logits;
}

// `sizes` are D, the number of gates, conv_width and inner: so large at most that no product of them
// with the number of rows overflows.
ModelSizes checked_sizes(int64_t B, int64_t T, int64_t width, const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(sizes.size() == 4, "`sizes` must be four: D, num_gates, conv_width, inner");
  const ModelSizes n{B, T, width, sizes[0], sizes[1], sizes[2], sizes[3]};
  constexpr int64_t most = int64_t{1} << 28;
  STD_TORCH_CHECK((n.num_gates == 2 || n.num_gates == 3) && n.D >= 1 && n.D <= most &&
                      n.conv_width >= 0 && n.conv_width <= most && n.inner >= 0 &&
                      n.inner <= most && width <= most,
                  "`sizes` must be D >= 1, 2 or 3 gates, conv_width >= 0 and inner >= 0");
  STD_TORCH_CHECK(B <= std::numeric_limits<int64_t>::max() / (int64_t{16} * most) / T,
                  "`ids` must be fewer");
  return n;
}

// ids (B, T) and states behind them to logits (B, T, V) and the next states: for each block h (B, D)
// and the convolution's inputs. `sizes` are D, the number of gates, conv_width and inner.
std::tuple<Tensor, std::vector<Tensor>> run_model(Tensor ids, Tensor embedding,
                                                  std::vector<Tensor> weights,
                                                  std::vector<Tensor> states,
                                                  std::vector<int64_t> sizes,
                                                  std::string candidate, bool normalized) {
  check_readable("ids", ids);
  check_readable("embedding", embedding);
  STD_TORCH_CHECK(ids.dim() == 2 && ids.numel() > 0 && ids.scalar_type() == ScalarType::Long,
                  "`ids` must have shape (B, T), B >= 1, T >= 1, and dtype int64");
  STD_TORCH_CHECK(embedding.dim() == 2 && embedding.size(1) > 0,
                  "`embedding` must have shape (V, width), width >= 1");
  STD_TORCH_CHECK(weights.size() >= 4 && states.size() % 2 == 0,
                  "expected a norm and a head at least, and two states for each block");
  const int64_t V = embedding.size(0), width = embedding.size(1);
  const ModelSizes n = checked_sizes(ids.size(0), ids.size(1), width, sizes);
  const float* rows = floats_of("embedding", embedding, {V, width});
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
  const Tensor& head = weights[weights.size() - 3];
  STD_TORCH_CHECK(head.defined(), "`weights` must be tensors");
  const Tensor logits = with_weight(head.scalar_type(), [&](auto type) {
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
