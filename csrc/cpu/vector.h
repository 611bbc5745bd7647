// One vector of floats, as wide as the instruction set that this file is compiled for. It is the vector extension of
// GCC and Clang, without intrinsics, so another width takes one more line below. The compiler makes `a * b + c` a fused
// multiply-add where the instruction set has one.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#ifndef HYDRAVIT_ISA
#error "compile with -DHYDRAVIT_ISA=<name>: it names the namespace of this instruction set"
#endif

namespace hydravit::HYDRAVIT_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

using Vec = float __attribute__((vector_size(kWidth * 4)));
using IntVec = int32_t __attribute__((vector_size(kWidth * 4)));

// These replace std::min and std::max: the linker keeps one copy of a std template that several files instantiate, and
// that could be the one compiled here for AVX-512.
template <class T>
static inline T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
static inline T larger(T a, T b) {
  return a < b ? b : a;
}
static constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

static inline Vec splat(float value) { return value - Vec{}; }

static inline Vec load(const float* from) {
  Vec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
static inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

// These load or store the first `count` lanes and touch no memory beyond; the other lanes become `fill`.
static inline Vec load(const float* from, int64_t count, float fill = 0.0f) {
  if (count >= kWidth) return load(from);
  Vec value = splat(fill);
  std::memcpy(&value, from, static_cast<size_t>(count) * sizeof(float));
  return value;
}
static inline void store(float* to, Vec value, int64_t count) {
  if (count >= kWidth) return store(to, value);
  std::memcpy(to, &value, static_cast<size_t>(count) * sizeof(float));
}

static inline Vec vmax(Vec a, Vec b) { return a > b ? a : b; }

#if defined(__clang__)
template <int... lanes>
static inline Vec shuffle(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, lanes...);
}
#else
template <int... lanes>
static inline Vec shuffle(Vec a, Vec b) {
  return __builtin_shuffle(a, b, IntVec{lanes...});
}
#endif

// Exchanges lane i with lane i ^ half.
template <int half, int... lane>
static inline Vec exchange(Vec value, std::integer_sequence<int, lane...>) {
  return shuffle<(lane ^ half)...>(value, value);
}

// Combines all lanes into one, pairwise, always in the same order.
template <int half = kWidth / 2, class Combine>
static inline float reduce(Vec value, const Combine& combine) {
  value = combine(value, exchange<half>(value, std::make_integer_sequence<int, kWidth>()));
  if constexpr (half > 1) return reduce<half / 2>(value, combine);
  return value[0];
}
static inline float sum(Vec value) {
  return reduce(value, [](Vec a, Vec b) { return a + b; });
}
static inline float highest(Vec value) { return reduce(value, vmax); }

// The sum of term(i) for i in [0, count). Terms are summed kTerms at a time, and then these sums, which keeps the
// precision of long sums.
template <class Term>
static inline Vec sum_over(int64_t count, const Term& term) {
  constexpr int64_t kTerms = 16;
  Vec total{};
  for (int64_t begin = 0; begin < count; begin += kTerms) {
    Vec part{};
    for (int64_t i = begin; i < smaller(count, begin + kTerms); i++) part += term(i);
    total += part;
  }
  return total;
}

// e^x within 1.01 ulp for -87.3 <= x <= 88.3: zero below, e^88.3 above, NaN stays NaN.
static inline Vec exp(Vec x) {
  const Vec low = splat(-87.3f), high = splat(88.3f);
  Vec clamped = x < low ? low : x;
  clamped = clamped > high ? high : clamped;
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const Vec shifted = clamped * 1.44269504f + magic;
  const Vec n = shifted - magic;
  const Vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const IntVec exponent = (reinterpret_cast<IntVec>(shifted) << 23) + 0x3f800000;
  const Vec result = p * reinterpret_cast<Vec>(exponent);
  return x < low ? Vec{} : result;
}

// (Phi(x) - 1/2) / x from x^2, where |x| < kNormalTail and Phi is the normal distribution function. It is a minimax
// polynomial of degree 14, which takes half the operations of the error function. Its variable is
// 2 x^2 / kNormalTail^2 - 1, which keeps it stable.
constexpr float kNormalTail = 5.4f;  // beyond, Phi is 0 or 1
static inline Vec normal_slope(Vec square) {
  const Vec u = square * (2.0f / (kNormalTail * kNormalTail)) - 1.0f;
  Vec p = splat(3.92819609e-4f);
  p = p * u - 1.02823798e-3f;
  p = p * u + 8.75034253e-4f;
  p = p * u - 1.18680194e-3f;
  p = p * u + 3.65883182e-3f;
  p = p * u - 6.71489071e-3f;
  p = p * u + 9.65122692e-3f;
  p = p * u - 1.39635643e-2f;
  p = p * u + 1.96451433e-2f;
  p = p * u - 2.57463939e-2f;
  p = p * u + 3.21165957e-2f;
  p = p * u - 3.92068215e-2f;
  p = p * u + 4.84995916e-2f;
  p = p * u - 6.53280541e-2f;
  p = p * u + 1.30928114e-1f;
  return p;
}

// x Phi(x)
static inline Vec gelu(Vec x) {
  const Vec square = x * x;
  const Vec inside = square * normal_slope(square) + 0.5f * x;
  return square > kNormalTail * kNormalTail ? vmax(x, Vec{}) : inside;
}

// d gelu(x) / dx = Phi(x) + x phi(x)
static inline Vec gelu_derivative(Vec x) {
  const Vec square = x * x;
  const Vec inside = x * normal_slope(square) + 0.5f;
  const Vec tail = x > 0.0f ? splat(1.0f) : Vec{};
  const Vec phi = 0.398942280f * exp(-0.5f * square);
  return (square > kNormalTail * kNormalTail ? tail : inside) + x * phi;
}

}  // namespace hydravit::HYDRAVIT_ISA
