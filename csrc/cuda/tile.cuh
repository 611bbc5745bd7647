// How tiles travel: from panels in global memory to shared memory, and from there to the tensor cores.
#pragma once

#include <type_traits>

#include "phase.h"
#include "ptx.cuh"

namespace hydravit::cuda {

// What is compiled for an architecture that lacks bulk copies keeps empty kernels in place of those that use them.
constexpr bool can_run(Loader loader) { return loader == Loader::kAsync || kHasBulkCopies; }

// What the activations are beside weights of W.
template <class W>
using Activation = std::conditional_t<std::is_same_v<W, E4m3>, Fp16, W>;

// Address in shared memory of a chunk of a panel's row; `panel` is the address of a row that is a multiple of 8.
__device__ inline uint32_t chunk_address(uint32_t panel, int row, int chunk) {
  return panel + row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

// The 16 x 16 part of A (rows, channels) that mma takes, from rows `row` and chunks `chunk` on.
__device__ inline void load_a(uint32_t (&a)[4], uint32_t panel, int row, int chunk, int lane) {
  load_matrices(a, chunk_address(panel, row + lane % 16, chunk + lane / 16));
}
// Two parts of B^T, 8 rows x 16 channels each: b[0], b[1] of the first, then of the second.
__device__ inline void load_b(uint32_t (&b)[4], uint32_t panel, int row, int chunk, int lane) {
  load_matrices(b, chunk_address(panel, row + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));
}
// Two parts of B, 16 rows x 8 channels each.
__device__ inline void load_b_transposed(uint32_t (&b)[4], uint32_t panel, int row, int chunk, int lane) {
  load_matrices_transposed(b, chunk_address(panel, row + lane % 16, chunk + lane / 16));
}

// Two e4m3 to fp16, exactly, where no instruction does it: sign, exponent and fraction in fp16's places are the value
// times 2^-8, subnormals included. NaN would be 480; it is given fp16's highest exponent.
__device__ inline uint32_t convert_e4m3_bits(uint16_t pair) {
  const uint32_t in_upper_bytes = (uint32_t{pair} << 8 & 0x0000ff00) | (uint32_t{pair} << 16 & 0xff000000);
  const uint32_t magnitudes = in_upper_bytes & 0x7f007f00;
  const uint32_t nan = (magnitudes + 0x01000100) & 0x80008000;
  const uint32_t moved = (in_upper_bytes & 0x80008000) | magnitudes >> 1;
  return multiply_fp16(moved, 0x5c005c00) | (nan - (nan >> 5));
}

// Two parts of W^T, as load_b's; of chunks, the even ones.
template <class W>
__device__ inline void load_weights(uint32_t (&b)[4], uint32_t panel, int row, int chunk, int lane) {
  load_b(b, panel, row, chunk, lane);
}
template <>
__device__ inline void load_weights<E4m3>(uint32_t (&b)[4], uint32_t panel, int row, int chunk, int lane) {
#pragma unroll
  for (int part = 0; part < 2; part++) {
    const uint32_t values = load_shared(panel + (row + 8 * part) * kPanelChannels + chunk / 2 * 128 + lane * 4);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const auto pair = static_cast<uint16_t>(values >> 16 * i);
      b[2 * part + i] = kHasE4m3Conversion ? convert_e4m3(pair) : convert_e4m3_bits(pair);
    }
  }
}

// Tiles under way to shared memory, in order. Filling number i of this block's life ends in barrier i %
// kMaxStages, also where fewer are under way at once.
template <Loader loader>
struct Pipe {
  uint32_t barriers;  // kBulk: kMaxStages of them
  int filled = 0, used = 0;

  // By all threads, once, with a __syncthreads behind it.
  __device__ void begin(uint32_t memory) {
    barriers = memory;
    if constexpr (loader == Loader::kBulk) {
      if (threadIdx.x == 0) {
        for (int i = 0; i < kMaxStages; i++) barrier_init(barriers + 8 * i, 1);
        barrier_init_fence();
      }
    }
  }
  // One filling: how many bytes it will have, and its copies. By all threads.
  __device__ void expect(uint32_t bytes, int filling) const {
    if constexpr (loader == Loader::kBulk) {
      if (threadIdx.x == 0) barrier_expect(barriers + 8 * (filling % kMaxStages), bytes);
    }
  }
  __device__ void copy(uint32_t to, const void* from, uint32_t bytes, int filling) const {
    if constexpr (loader == Loader::kBulk) {
      if (threadIdx.x == 0) copy_bulk(to, from, bytes, barriers + 8 * (filling % kMaxStages));
    } else {
      const auto* source = static_cast<const uint8_t*>(from);
      for (uint32_t i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16) copy_async(to + i, source + i);
    }
  }
  // CallBuffers a group of copies; an empty one too, for waiting goes by their number.
  __device__ void commit() const {
    if constexpr (loader == Loader::kAsync) copy_async_commit();
  }
  // Until the oldest filling is there, behind which `behind` groups were committed. For all threads' copies to be
  // there, a __syncthreads has to follow.
  template <int behind>
  __device__ void wait() {
    if constexpr (loader == Loader::kBulk)
      barrier_wait(barriers + 8 * (used % kMaxStages), used / kMaxStages & 1);
    else
      copy_async_wait<behind>();
    used++;
  }
};

template <class T>
__device__ inline uint4 pack_chunk(const float (&v)[kChunk]) {
  return {pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])};
}

__device__ inline float warp_sum(float value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value += shuffle_xor(value, lanes);
  return value;
}

}  // namespace hydravit::cuda
