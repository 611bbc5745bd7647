// Every instruction that CUDA C++ has no name for, one small function each; nothing else contains PTX.
//
// The tests compile the same kernels for the CPU: they define HYDRAVIT_EMULATOR and bring the second implementation of
// these functions, by the letter of the PTX ISA (tests/cuda/emulator). Below sm_90 the bulk copies and their barriers
// do not exist; kernels that use them are compiled there, for one source's sake, and never launched. wgmma exists on
// sm_90a alone: neither below nor above it. Below sm_89 there is no conversion of 8-bit floats; tile.cuh does without.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace hydravit::cuda {

// 16-bit floats in memory; arithmetic is in float.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};
// 8-bit floats, of weights: 4 bits of exponent and 3 of fraction, no infinity, NaN where all of both are ones.
struct E4m3 {
  uint8_t bits;
};

// How wgmma is told of a matrix in shared memory, 16 channels of rows of 128 bytes from `address` on: groups of 8 rows
// begin at multiples of 1024 bytes, one behind the other, and of each row the 16-byte chunks lie in the order
// (chunk ^ row % 8), which is "128-byte swizzling". Addresses and distances are in units of 16 bytes; the distance
// along a row is not used.
constexpr uint64_t matrix_descriptor(uint32_t address) {
  return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16 | (address & 0x3ffff) >> 4;
}

}  // namespace hydravit::cuda

#ifdef HYDRAVIT_EMULATOR
#include "instructions.h"
#else

namespace hydravit::cuda {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kHasBulkCopies = true;
#define HYDRAVIT_SM90(...) asm volatile(__VA_ARGS__)
#else
constexpr bool kHasBulkCopies = false;
#define HYDRAVIT_SM90(...) __trap()
#endif
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWarpgroups = true;
#define HYDRAVIT_SM90A(...) asm volatile(__VA_ARGS__)
#else
constexpr bool kHasWarpgroups = false;
#define HYDRAVIT_SM90A(...) __trap()
#endif

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
constexpr bool kHasE4m3Conversion = true;
#define HYDRAVIT_SM89(...) asm(__VA_ARGS__)
#else
constexpr bool kHasE4m3Conversion = false;
#define HYDRAVIT_SM89(...) __trap()
#endif

// ---- Memory ----

// All shared memory is dynamic; its size comes with the launch.
__device__ inline uint8_t* shared_memory() {
  extern __shared__ __align__(1024) uint8_t memory[];
  return memory;
}
__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline uint32_t load_shared(uint32_t address) {
  uint32_t result;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(result) : "r"(address) : "memory");
  return result;
}

template <class V>
__device__ inline V load(const void* from) {
  return *static_cast<const V*>(from);
}
template <class V>
__device__ inline void store(void* to, const V& value) {
  *static_cast<V*>(to) = value;
}

// ---- 16-bit floats: two to a register, the first in the low half ----

template <class T>
__device__ uint32_t pack(float first, float second);
template <>
__device__ inline uint32_t pack<Bf16>(float first, float second) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
  return result;
}
template <>
__device__ inline uint32_t pack<Fp16>(float first, float second) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
  return result;
}

__device__ inline float to_float(Bf16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }
__device__ inline float to_float(Fp16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}
__device__ inline float to_float(float value) { return value; }

// Two products of fp16.
__device__ inline uint32_t multiply_fp16(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
// Two e4m3, the first in the low byte, to fp16.
__device__ inline uint32_t convert_e4m3(uint16_t pair) {
  uint32_t result = 0;
  HYDRAVIT_SM89("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(result) : "h"(pair));
  return result;
}

// ---- Warps: matrices of 8 x 8 16-bit values, products of 16 x 16 with 16 x 8 ----

// Four matrices; lanes 8 i .. 8 i + 7 hold the addresses of the rows of matrix i.
__device__ inline void load_matrices(uint32_t (&matrices)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(row)
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&matrices)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(row)
               : "memory");
}

template <class T>
__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void multiply_add<Bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void multiply_add<Fp16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline float shuffle_xor(float value, int lanes) { return __shfl_xor_sync(0xffffffffu, value, lanes); }

// ---- Asynchronous copies to shared memory, sm_80: 16 bytes by every thread, in groups ----

__device__ inline void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(__cvta_generic_to_global(from)) : "memory");
}
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `pending` of this thread's newest groups are under way.
template <int pending>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- Asynchronous copies to shared memory, sm_90: any multiple of 16 bytes by one thread, counted by a barrier ----

__device__ inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  HYDRAVIT_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the copies.
__device__ inline void barrier_init_fence() { HYDRAVIT_SM90("fence.mbarrier_init.release.cluster;" :: : "memory"); }
// Arrives, and lets the barrier's phase end only after so many bytes.
__device__ inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  HYDRAVIT_SM90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ inline void barrier_arrive(uint32_t barrier) {
  HYDRAVIT_SM90("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Until the phase of this parity has ended.
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  HYDRAVIT_SM90(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity) : "memory");
}
__device__ inline void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  HYDRAVIT_SM90("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier) : "memory");
}
// ---- Warpgroups of four warps, sm_90a: asynchronous products of 64 x 16 with 16 x 128, in groups ----

// Orders a thread's accesses to sums before the products that follow.
__device__ inline void warpgroup_fence() { HYDRAVIT_SM90A("wgmma.fence.sync.aligned;" :: : "memory"); }
// CallBuffers a group of products.
__device__ inline void warpgroup_commit() { HYDRAVIT_SM90A("wgmma.commit_group.sync.aligned;" :: : "memory"); }
// Until at most `pending` of the newest groups are under way: sums of the others can be used, and what they read, too.
template <int pending>
__device__ inline void warpgroup_wait() {
  HYDRAVIT_SM90A("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Behind a wait: the compiler uses these sums no earlier.
template <int count>
__device__ inline void hold(float (&sums)[count]) {
#pragma unroll
  for (int i = 0; i < count; i++) asm volatile("" : "+f"(sums[i])::"memory");
}

// Adds A B^T. Of the 16 rows that a warp has of it, lane l has l / 4 and l / 4 + 8, and of every 8 columns l % 4 * 2
// and the next: sums 4 j and 4 j + 1 are of the upper row and columns from 8 j on, the next two of the lower row.
template <class T>
__device__ void warpgroup_multiply_add(float (&sums)[64], uint64_t a, uint64_t b);

// The numbers behind the descriptors: to add, no factor negated, none transposed.
#define HYDRAVIT_SUMS(i)                                                                                        \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), \
      "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define HYDRAVIT_WGMMA(type)                                                                                           \
  HYDRAVIT_SM90A(                                                                                                      \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                                     \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22,"     \
      " %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43,"      \
      " %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63},"          \
      " %64, %65, 1, 1, 1, 0, 0;" : HYDRAVIT_SUMS(0),                                                                  \
      HYDRAVIT_SUMS(8), HYDRAVIT_SUMS(16), HYDRAVIT_SUMS(24), HYDRAVIT_SUMS(32), HYDRAVIT_SUMS(40), HYDRAVIT_SUMS(48), \
      HYDRAVIT_SUMS(56) : "l"(a), "l"(b) : "memory")
template <>
__device__ inline void warpgroup_multiply_add<Bf16>(float (&sums)[64], uint64_t a, uint64_t b) {
  HYDRAVIT_WGMMA("bf16");
}
template <>
__device__ inline void warpgroup_multiply_add<Fp16>(float (&sums)[64], uint64_t a, uint64_t b) {
  HYDRAVIT_WGMMA("f16");
}
#undef HYDRAVIT_WGMMA
#undef HYDRAVIT_SUMS

// ---- Between kernels: a kernel may start before the one in front of it has ended ----

// Until the kernel in front has ended and what it wrote can be seen.
__device__ inline void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace hydravit::cuda

#undef HYDRAVIT_SM89
#undef HYDRAVIT_SM90
#undef HYDRAVIT_SM90A
#endif
