// All that is a compiler's own: inlining, one build for every x86-64 machine, hints to vectorise
// loops, vectors. GCC from version 9 and Clang have these; others, MSVC among them, get standard C++
// that computes the same, slower. With MINRNN_PORTABLE any compiler takes that way.
#pragma once

#include <cstdint>
#include <cstring>

#if (defined(__GNUC__) || defined(__clang__)) && !defined(MINRNN_PORTABLE)
#define MINRNN_GNU 1
#else
#define MINRNN_GNU 0
#endif

#if MINRNN_GNU
#define MINRNN_INLINE inline __attribute__((always_inline))
#define MINRNN_LAMBDA __attribute__((always_inline))
#elif defined(_MSC_VER)
#define MINRNN_INLINE __forceinline
#define MINRNN_LAMBDA
#else
#define MINRNN_INLINE inline
#define MINRNN_LAMBDA
#endif

// Iterations of the loop that follows do not depend on each other; and: do not unroll it.
#if MINRNN_GNU && !defined(__clang__)
#define MINRNN_IVDEP _Pragma("GCC ivdep")
#define MINRNN_NO_UNROLL _Pragma("GCC unroll 1")
#elif defined(_MSC_VER)
#define MINRNN_IVDEP __pragma(loop(ivdep))
#define MINRNN_NO_UNROLL
#else
#define MINRNN_IVDEP
#define MINRNN_NO_UNROLL
#endif

// A product and a sum are one instruction where the machine has one.
// Before GCC 12 the pragma keeps functions of other targets from being inlined; it is the default there.
#if MINRNN_GNU && !defined(__clang__) && __GNUC__ >= 12
#define MINRNN_CONTRACT _Pragma("GCC optimize(\"fp-contract=fast\")")
#else
#define MINRNN_CONTRACT
#endif
#if MINRNN_GNU && !defined(__clang__)
// vectors are passed between inlined functions only: their ABI does not matter
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

// One build for every x86-64 machine: the loader picks the widest vectors it has. Sanitizers run
// before the loader's choice is made and so get one clone.
#if MINRNN_GNU && !defined(__clang__) && defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define MINRNN_CLONES 1
#if __GNUC__ >= 12
#define MINRNN_TARGETS 1
#define MINRNN_V3 "arch=x86-64-v3"
#define MINRNN_V4 "arch=x86-64-v4"
#define MINRNN_HAS_V3 __builtin_cpu_supports("x86-64-v3")
#define MINRNN_HAS_V4 __builtin_cpu_supports("x86-64-v4")
#else
// machines that these levels were named after; functions of one target only do not inline vectors
#define MINRNN_TARGETS 0
#define MINRNN_V3 "arch=haswell"
#define MINRNN_V4 "arch=skylake-avx512"
#endif
#define MULTI_ISA __attribute__((target_clones("default", MINRNN_V3, MINRNN_V4)))
#else
#define MINRNN_CLONES 0
#define MINRNN_TARGETS 0
#define MULTI_ISA
#endif

namespace minrnn {

// Vectors: LanesOf<float, 8>::type, with + * << >>.
#if MINRNN_GNU
template <class T, int num>
struct LanesOf {
  typedef T type __attribute__((vector_size(num * sizeof(T))));
};

template <class To, class From>
MINRNN_INLINE To lanes_bits_as(From from) {
  return (To)from;
}

template <class To, class From>
MINRNN_INLINE To lanes_convert(From from) {
  return __builtin_convertvector(from, To);
}
#else
template <class T, int num>
struct Lanes {
  static constexpr int count = num;
  using value_type = T;
  T lane[num];
};

template <class T, int num>
struct LanesOf {
  using type = Lanes<T, num>;
};

// f of each lane.
template <class T, int num, class F>
MINRNN_INLINE Lanes<T, num> lanes_of(const F& f) {
  Lanes<T, num> to;
  for (int i = 0; i < num; ++i) to.lane[i] = static_cast<T>(f(i));
  return to;
}

template <class T, int num>
MINRNN_INLINE Lanes<T, num> operator+(Lanes<T, num> x, Lanes<T, num> y) {
  return lanes_of<T, num>([&](int i) { return x.lane[i] + y.lane[i]; });
}

template <class T, int num>
MINRNN_INLINE Lanes<T, num>& operator+=(Lanes<T, num>& x, Lanes<T, num> y) {
  return x = x + y;
}

template <class T, int num>
MINRNN_INLINE Lanes<T, num> operator*(Lanes<T, num> x, Lanes<T, num> y) {
  return lanes_of<T, num>([&](int i) { return x.lane[i] * y.lane[i]; });
}

template <class T, int num>
MINRNN_INLINE Lanes<T, num> operator*(T x, Lanes<T, num> y) {
  return lanes_of<T, num>([&](int i) { return x * y.lane[i]; });
}

// through unsigned: bits may leave a signed number
template <class T, int num>
MINRNN_INLINE Lanes<T, num> operator<<(Lanes<T, num> x, int by) {
  return lanes_of<T, num>([&](int i) { return static_cast<uint32_t>(x.lane[i]) << by; });
}

template <class T, int num>
MINRNN_INLINE Lanes<T, num> operator>>(Lanes<T, num> x, int by) {
  return lanes_of<T, num>([&](int i) { return x.lane[i] >> by; });
}

template <class To, class From>
MINRNN_INLINE To lanes_bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class To, class From>
MINRNN_INLINE To lanes_convert(From from) {
  return lanes_of<typename To::value_type, To::count>([&](int i) { return from.lane[i]; });
}
#endif

}  // namespace minrnn
