// The functions of csrc/cuda/ptx.cuh on the emulator: they do what the PTX ISA says of their instructions.
#pragma once

#include <bit>
#include <cstring>

#include "emulator.h"

namespace hydravit::cuda {

// ---- Memory ----

uint8_t* shared_memory();
uint32_t shared_address(const void* pointer);

uint32_t load_shared(uint32_t address);

template <class V>
V load(const void* from) {
  if (!emulator::is_shared(from)) emulator::check_global(from, sizeof(V), alignof(V));
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <class V>
void store(void* to, const V& value) {
  if (!emulator::is_shared(to)) emulator::check_global(to, sizeof(V), alignof(V));
  std::memcpy(to, &value, sizeof value);
}

// ---- 16-bit and 8-bit floats ----

float to_float(Bf16 value);
float to_float(Fp16 value);
float to_float(E4m3 value);
inline float to_float(float value) { return value; }
void from_float(float value, Bf16& result);  // to nearest, ties to even
void from_float(float value, Fp16& result);

template <class T>
uint32_t pack(float first, float second) {
  T low, high;
  from_float(first, low);
  from_float(second, high);
  return static_cast<uint32_t>(high.bits) << 16 | low.bits;
}

constexpr bool kHasE4m3Conversion = true;

uint32_t multiply_fp16(uint32_t a, uint32_t b);
uint32_t convert_e4m3(uint16_t pair);

// ---- Warps ----

void load_matrices(uint32_t (&matrices)[4], uint32_t row);
void load_matrices_transposed(uint32_t (&matrices)[4], uint32_t row);
template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
float shuffle_xor(float value, int lanes);

// ---- Asynchronous copies ----

constexpr bool kHasBulkCopies = true;

void copy_async(uint32_t to, const void* from);
void copy_async_commit();
void copy_async_wait_for(size_t pending);
template <int pending>
void copy_async_wait() {
  copy_async_wait_for(pending);
}

void barrier_init(uint32_t barrier, uint32_t arrivals);
inline void barrier_init_fence() {}
void barrier_expect(uint32_t barrier, uint32_t bytes);
void barrier_arrive(uint32_t barrier);
void barrier_wait(uint32_t barrier, uint32_t parity);
void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier);

// ---- Warpgroups ----

constexpr bool kHasWarpgroups = true;

void warpgroup_fence();
void warpgroup_commit();
void warpgroup_wait_for(size_t pending);
template <int pending>
void warpgroup_wait() {
  warpgroup_wait_for(pending);
}
template <int count>
void hold(float (&)[count]) {}

void begin_warpgroup_product(float* sums, int columns, uint64_t a, uint64_t b, float (*value)(uint16_t));
template <class T, int count>
void warpgroup_multiply_add(float (&sums)[count], uint64_t a, uint64_t b) {
  begin_warpgroup_product(sums, 2 * count, a, b, [](uint16_t bits) { return to_float(T{bits}); });
}

// ---- Between kernels ----

inline void wait_for_previous_kernel() { emulator::wait_for_previous(); }
inline void let_next_kernel_start() {}

}  // namespace hydravit::cuda
