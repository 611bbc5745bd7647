// The arithmetic peak of one core: independent chains of multiply-adds that never leave the registers.
// fma.py builds and calls it. 12 chains of the widest vectors hide the latency and fit 16 registers.

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

typedef float vector __attribute__((vector_size(VECTOR_BYTES)));

// Runs `iterations` rounds; returns the floating-point operations done, two per multiply-add and lane.
extern "C" double multiply_adds(long iterations, float factor, float* sink) {
  constexpr int chains = 12;
  vector sums[chains];
  const vector a = factor - vector{}, b = 0.5f - vector{};
  for (int c = 0; c < chains; ++c) sums[c] = static_cast<float>(c) - vector{};
  for (long i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < chains; ++c) sums[c] = sums[c] * a + b;
  }
  for (int c = 0; c < chains; ++c) *sink += sums[c][0];
  return 2.0 * chains * (VECTOR_BYTES / sizeof(float)) * static_cast<double>(iterations);
}
