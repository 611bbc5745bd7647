// One small function for every instruction that CUDA C++ has no name for. No other file contains PTX.
//
// The tests compile the kernels for the CPU: they define HYDRAVIT_EMULATOR and replace these functions by others that
// do what the PTX ISA says (tests/cuda/emulator). Not every architecture has all instructions. Bulk copies and
// mbarriers need sm_90, wgmma needs sm_90a and exists nowhere else: kernels that use them are compiled for the other
// architectures as well, with a trap in place of the instruction, and are never launched there. The conversion of 8-bit
// floats needs sm_89; tile.cuh has a substitute.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace hydravit::cuda {

// 16-bit floats as they lie in memory. Arithmetic is in float.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};
// 8-bit floats for weights: 4 bits of exponent and 3 of fraction. There is no infinity; all ones in both are NaN.
struct E4m3 {
  uint8_t bits;
};

// Describes a matrix in shared memory to wgmma: 16 channels of rows of 128 bytes, from `address` on. Groups of 8 rows
// follow each other and begin at multiples of 1024 bytes. The 16-byte chunks of a row lie in the order
// (chunk ^ row % 8), which is "128-byte swizzling". The descriptor counts addresses and distances in units of 16 bytes
// and ignores the distance along a row.
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

// All shared memory is dynamic: the launch sets its size.
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

// ---- 16-bit floats: a register holds two, the first in its low half ----

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

// Multiplies two pairs of fp16.
__device__ inline uint32_t multiply_fp16(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
// Converts two e4m3, the first in the low byte, to two fp16.
__device__ inline uint32_t convert_e4m3(uint16_t pair) {
  uint32_t result = 0;
  HYDRAVIT_SM89("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(result) : "h"(pair));
  return result;
}

// ---- Warp instructions: ldmatrix loads matrices of 8 x 8 16-bit values, mma multiplies 16 x 16 by 16 x 8 ----

// Loads four matrices. Lanes 8 i ... 8 i + 7 pass the addresses of the rows of matrix i.
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

// ---- Asynchronous copies to shared memory (sm_80): every thread copies 16 bytes and waits for groups of copies ----

__device__ inline void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(__cvta_generic_to_global(from)) : "memory");
}
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all groups of this thread but the newest `pending` have ended.
template <int pending>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- Bulk copies to shared memory (sm_90): one thread copies any multiple of 16 bytes; an mbarrier counts them ----

__device__ inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  HYDRAVIT_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to bulk copies.
__device__ inline void barrier_init_fence() { HYDRAVIT_SM90("fence.mbarrier_init.release.cluster;" :: : "memory"); }
// Arrives, and makes the phase of the barrier last until `bytes` more bytes have come.
__device__ inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  HYDRAVIT_SM90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ inline void barrier_arrive(uint32_t barrier) {
  HYDRAVIT_SM90("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Waits until the phase with this parity has ended.
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

// ---- Warpgroups (sm_90a): four warps multiply 64 x 16 by 16 x 128 asynchronously and wait for groups of products ----

// Orders a thread's accesses to the sums before the products that follow.
__device__ inline void warpgroup_fence() { HYDRAVIT_SM90A("wgmma.fence.sync.aligned;" :: : "memory"); }
// Ends a group of products.
__device__ inline void warpgroup_commit() { HYDRAVIT_SM90A("wgmma.commit_group.sync.aligned;" :: : "memory"); }
// Waits until all groups but the newest `pending` have ended. Their sums are then valid, and the shared memory that
// they read may be overwritten.
template <int pending>
__device__ inline void warpgroup_wait() {
  HYDRAVIT_SM90A("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Follows a wait, and keeps the compiler from using the sums before it.
template <int count>
__device__ inline void hold(float (&sums)[count]) {
#pragma unroll
  for (int i = 0; i < count; i++) asm volatile("" : "+f"(sums[i])::"memory");
}

// Adds A B^T to the sums. A warp holds 16 rows of it. Lane l holds the rows l / 4 and l / 4 + 8, and in every 8 columns
// the columns l % 4 * 2 and l % 4 * 2 + 1. The sums 4 j and 4 j + 1 belong to the upper row and the columns from 8 j
// on, the sums 4 j + 2 and 4 j + 3 to the lower row.
template <class T>
__device__ void warpgroup_multiply_add(float (&sums)[64], uint64_t a, uint64_t b);

// The numbers after the descriptors: add to the sums, negate neither factor, transpose neither factor.
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

// ---- Programmatic dependent launch: a kernel may start before the preceding kernel of its stream has ended ----

// Waits until the preceding kernel has ended and its writes are visible.
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
