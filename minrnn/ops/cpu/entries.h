// The kernels of kernels.h as functions: for each formula, type and instruction set.
#pragma once

#include "kernels.h"

namespace minrnn {

// Clones need a plain function for each operator and type; overloads on S keep their names short.
#define MINRNN_ENTRIES_OF(name, S, ...)                                              \
  MULTI_ISA void forward_##name(const Stretch<S>& stretch, S* h, int64_t h_step,     \
                                Compute<S>::type* state) {                           \
    forward<__VA_ARGS__>(stretch, h, h_step, state);                                 \
  }                                                                                  \
  MULTI_ISA void backward_##name(const Stretch<S>& stretch, const Gradients<S>& to,  \
                                 Compute<S>::type* carry) {                          \
    backward<__VA_ARGS__>(stretch, to, carry);                                       \
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

template <class S>
struct Entries {
  void (*forward)(const Stretch<S>&, S*, int64_t, typename Compute<S>::type*);
  void (*backward)(const Stretch<S>&, const Gradients<S>&, typename Compute<S>::type*);
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

}  // namespace minrnn
