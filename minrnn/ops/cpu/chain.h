// The recurrence itself: the chain of multiply-adds of one tile, and whose turn it is.
//
// A tile is some 8,000 numbers of one sequence; kernels.h fills it and takes the results. Rows of 8
// numbers and more are walked step by step. Of narrower ones, several steps are composed into one,
// so that vectors are full.
#pragma once

#include <atomic>
#include <cstring>
#include <thread>
#include <type_traits>

#include "formulas.h"

namespace minrnn {

constexpr int64_t tile_numbers = 8192;  // (steps, width) of a tile; width is not above it
constexpr int64_t margin = 48;          // identity steps before and after, for compose

MINRNN_INLINE int64_t tile_steps(int64_t width) {
  return width > 0 ? tile_numbers / width : tile_numbers;
}

// Lets the tiles of a sequence run `recur` one after the other.
struct Turn {
  std::atomic<int64_t>* done;  // tiles that are through
  int64_t ticket;              // tiles that go first

  void wait() const {
    for (int spins = 0; done->load(std::memory_order_acquire) != ticket; ++spins)
      if (spins > 1000) std::this_thread::yield();
  }
  void pass() const { done->store(ticket + 1, std::memory_order_release); }
};

// `num` rows of a chain; b becomes the states (backward: the gradients g).
//
//   s = a * s + b,  b = s          carry: from g = b + s,  b = g,  s = a * g
template <bool back, bool carry, class C>
MINRNN_INLINE void rows(const C* a, C* b, int64_t b_step, int64_t num, int64_t width,
                        const bool* reset, int64_t reset_step, C* __restrict s) {
  for (int64_t n = 0; n < num; ++n) {
    const int64_t t = back ? num - 1 - n : n;
    const bool starts = reset && reset[t * reset_step];
    for (int64_t c = 0; !back && starts && c < width; ++c) s[c] = C(0);
    const C* __restrict a_t = a + t * width;
    C* __restrict b_t = b + t * b_step;
MINRNN_IVDEP
    for (int64_t c = 0; c < width; ++c) {
      const C value = carry ? b_t[c] + s[c] : a_t[c] * s[c] + b_t[c];
      b_t[c] = value;
      s[c] = carry ? a_t[c] * value : value;
    }
    for (int64_t c = 0; back && starts && c < width; ++c) s[c] = C(0);
  }
}

// The same with s in a register: through memory, a short row would wait for its own last store.
template <bool back, bool carry, int width, class C>
MINRNN_INLINE void rows_in_register(const C* a, C* b, int64_t b_step, int64_t num, C* s_) {
  using Row = typename LanesOf<C, width>::type;
  Row s, x, y;
  std::memcpy(&s, s_, sizeof(Row));
  for (int64_t n = 0; n < num; ++n) {
    const int64_t t = back ? num - 1 - n : n;
    std::memcpy(&x, a + t * width, sizeof(Row));
    std::memcpy(&y, b + t * b_step, sizeof(Row));
    y = carry ? y + s : x * s + y;
    s = carry ? x * y : y;
    std::memcpy(b + t * b_step, &y, sizeof(Row));
  }
  std::memcpy(s_, &s, sizeof(Row));
}

// What a tile keeps between fill, recur and drain.
template <class C>
struct Chain {
  C a_[margin + tile_numbers + margin], b_[margin + tile_numbers + margin];
  C *const a = a_ + margin, *b = b_ + margin;
  int64_t count = 0, width = 0, lanes = 0, b_step = 0;

  // lanes: how many numbers of the chain are computed side by side. A row of its own if that fills
  // a vector; else several rows, which compose() makes independent of each other.
  MINRNN_INLINE void begin(int64_t steps, int64_t width_, bool reset) {
    b = b_ + margin;
    width = lanes = b_step = width_;
    count = steps * width;
    if (width >= 8 || width == 0 || reset || steps < 64) return;
    while (lanes < 16) lanes *= 2;
    for (int64_t i = 0; i < margin; ++i) {
      a[i - margin] = a[count + i] = C(1);
      b[i - margin] = b[count + i] = C(0);
    }
  }

  // Single steps may be computed where their result goes.
  template <class S>
  MINRNN_INLINE bool place_b(S* to, int64_t step) {
    if constexpr (sizeof(S) == sizeof(C))
      if (lanes == width) {
        b = to;
        b_step = step;
        return true;
      }
    return false;
  }

  // Makes a and b of each step those of the lanes / width steps that end (backward: begin) with it,
  // so that a state follows from the one that many steps before: doubled until they are enough, twice
  // at a time where that is not too much.
  template <bool back>
  MINRNN_INLINE void compose() {
    int64_t d = width;
    for (; 4 * d <= lanes; d *= 4) compose_with<back, 4>(d);
    for (; d < lanes; d *= 2) compose_with<back, 2>(d);
  }

  // Composes each number's step with those d, ... (factor - 1) * d numbers before.
  template <bool back, int factor>
  MINRNN_INLINE void compose_with(int64_t d) {
    constexpr int64_t block = 16;
    const int64_t blocks = (count + block - 1) / block, other = back ? d : -d;
    for (int64_t n = 0; n < blocks; ++n) {
      // the blocks that are read are not overwritten yet
      const int64_t i = block * (back ? n : blocks - 1 - n);
      C *const a0 = a + i + (back ? width : 0), *const b0 = b + i;
      const C *const a1 = a0 + other, *const a2 = a1 + other, *const a3 = a2 + other;
      const C *const b1 = b0 + other, *const b2 = b1 + other, *const b3 = b2 + other;
      C p[block], q[block];
MINRNN_NO_UNROLL
      for (int64_t l = 0; l < block; ++l) {
        p[l] = a0[l] * a1[l];
        q[l] = a0[l] * b1[l] + b0[l];
        if (factor == 4) {
          q[l] = p[l] * (a2[l] * b3[l] + b2[l]) + q[l];
          p[l] = p[l] * (a2[l] * a3[l]);
        }
      }
      std::memcpy(a0, p, sizeof(p));
      std::memcpy(b0, q, sizeof(q));
    }
  }

  // The chain of single steps.
  template <bool back>
  MINRNN_INLINE void walk(const bool* reset, int64_t reset_step, C* state) {
    const int64_t steps = width ? count / width : 0;
    if (width == 8 && !reset) {
      rows_in_register<back, back, 8>(a, b, b_step, steps, state);
    } else {
      rows<back, back>(a, b, b_step, steps, width, reset, reset_step, state);
    }
  }

  // Whether a step multiplies by more than 1: it would bring back what a product of small decays
  // loses by underflow.
  MINRNN_INLINE bool grows() const {
    // as wide as a number, for the sake of vectors
    std::conditional_t<sizeof(C) == 4, int32_t, int64_t> any = 0;
    for (int64_t i = 0; i < count; ++i) any |= a[i] * a[i] > C(1);
    return any != 0;
  }

  // The chain of composed steps, from g_t = b_t + a_{t+1} * g_{t+1} backward. False if any of the
  // lanes ends infinite or NaN: a product of decays that underflows or overflows can cause that where
  // single steps do not, and once there it stays, but in its own lane only.
  template <bool back>
  MINRNN_INLINE bool leap(C* state) {
    C s[margin];
    for (int64_t l = 0; l < lanes; ++l) s[l] = state[l % width];
    const int64_t num = (count + lanes - 1) / lanes, from = back ? count - num * lanes : 0;
    const C* const decay = a + (back ? width : 0);
    if (lanes == 16) {
      rows_in_register<back, false, 16>(decay + from, b + from, 16, num, s);
    } else {
      rows<back, false>(decay + from, b + from, lanes, num, lanes, nullptr, 0, s);
    }
    bool finite = true;
    for (int64_t l = 0; l < lanes; ++l) finite &= s[l] - s[l] == C(0);
    for (int64_t c = 0; c < width; ++c) {
      state[c] = back ? a[c] * b[c] : b[count - width + c];
      finite &= state[c] - state[c] == C(0);
    }
    return finite;
  }
};

// One tile: `fill` computes a and b, then the chain runs and the state moves on.
template <class Op, bool back, class C, class Fill>
MINRNN_INLINE void recur(Chain<C>& chain, const bool* reset, int64_t reset_step, C* state,
                         const Turn* turn, const Fill& fill) {
  bool composed = chain.lanes != chain.width;
  C before[8];
  for (bool again = false;; again = true) {
    fill();
    if (!again) {
      // decays that are sigmoids do not grow
      if (!Op::has_activations && composed && chain.grows()) composed = false;
      if (composed) chain.template compose<back>();
      if (turn) turn->wait();
    }
    if (!composed || again) {
      chain.template walk<back>(reset, reset_step, state);
      break;
    }
    for (int64_t c = 0; c < chain.width; ++c) before[c] = state[c];
    if (chain.template leap<back>(state)) break;
    for (int64_t c = 0; c < chain.width; ++c) state[c] = before[c];
  }
  if (turn) turn->pass();
}

}  // namespace minrnn
