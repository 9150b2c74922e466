// The kernels of kernels.h as functions: for each formula, type and instruction set.
#pragma once

#include "kernels.h"

namespace minrnn {

// Each formula by its name, for `MACRO(name, S, formula)`.
#define MINRNN_FORMULAS(MACRO, S)                                  \
  MACRO(scan, S, Scan)                                             \
  MACRO(mingru_g, S, MinGRU<Candidate::g>)                         \
  MACRO(mingru_identity, S, MinGRU<Candidate::identity>)           \
  MACRO(mingru_tanh, S, MinGRU<Candidate::tanh>)                   \
  MACRO(minlstm_g, S, MinLSTM<Candidate::g, true>)                 \
  MACRO(minlstm_identity, S, MinLSTM<Candidate::identity, true>)   \
  MACRO(minlstm_tanh, S, MinLSTM<Candidate::tanh, true>)           \
  MACRO(plain_minlstm_g, S, MinLSTM<Candidate::g, false>)          \
  MACRO(plain_minlstm_identity, S, MinLSTM<Candidate::identity, false>) \
  MACRO(plain_minlstm_tanh, S, MinLSTM<Candidate::tanh, false>)

// Defined in kernels_float.cpp and kernels_half.cpp, which compilers take side by side.
#define MINRNN_DECLARE(name, S, ...)                                                         \
  void forward_##name(const Stretch<S>& stretch, S* h, int64_t h_step, Compute<S>::type* state); \
  void backward_##name(const Stretch<S>& stretch, const Gradients<S>& to, Compute<S>::type* carry);

MINRNN_FORMULAS(MINRNN_DECLARE, float)
MINRNN_FORMULAS(MINRNN_DECLARE, double)
MINRNN_FORMULAS(MINRNN_DECLARE, BFloat16)
MINRNN_FORMULAS(MINRNN_DECLARE, Float16)

// Clones need a plain function for each operator and type; overloads on S keep their names short.
#define MINRNN_DEFINE(name, S, ...)                                                  \
  MULTI_ISA void forward_##name(const Stretch<S>& stretch, S* h, int64_t h_step,     \
                                Compute<S>::type* state) {                           \
    forward<__VA_ARGS__>(stretch, h, h_step, state);                                 \
  }                                                                                  \
  MULTI_ISA void backward_##name(const Stretch<S>& stretch, const Gradients<S>& to,  \
                                 Compute<S>::type* carry) {                          \
    backward<__VA_ARGS__>(stretch, to, carry);                                       \
  }

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
