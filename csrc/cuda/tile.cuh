// Copies of tiles from panels in global memory to shared memory, and loads from there into the registers of mma.
#pragma once

#include <type_traits>

#include "phase.h"
#include "ptx.cuh"

namespace hydravit::cuda {

// Code for an architecture without bulk copies has empty kernels in place of those that use them.
constexpr bool can_run(Loader loader) { return loader == Loader::kAsync || kHasBulkCopies; }

// The dtype of the activations that weights of dtype W are multiplied with.
template <class W>
using Activation = std::conditional_t<std::is_same_v<W, E4m3>, Fp16, W>;

// The address in shared memory of a chunk of a row. Rows count from `panel`, the address of a row whose number in its
// panel is a multiple of 8, because that number decides the order of the chunks.
__device__ inline uint32_t chunk_address(uint32_t panel, int row, int chunk) {
  return panel + row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

// Loads 16 rows x 16 channels of A, from row `row` and chunk `chunk` on.
__device__ inline void load_a(uint32_t (&a)[4], uint32_t panel, int row, int chunk, int lane) {
  load_matrices(a, chunk_address(panel, row + lane % 16, chunk + lane / 16));
}
// Loads two parts of B^T, 8 rows x 16 channels each: b[0], b[1] are the first, b[2], b[3] the second.
__device__ inline void load_b(uint32_t (&b)[4], uint32_t panel, int row, int chunk, int lane) {
  load_matrices(b, chunk_address(panel, row + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));
}
// Loads two parts of B, 16 rows x 8 channels each.
__device__ inline void load_b_transposed(uint32_t (&b)[4], uint32_t panel, int row, int chunk, int lane) {
  load_matrices_transposed(b, chunk_address(panel, row + lane % 16, chunk + lane / 16));
}

// Converts two e4m3 to fp16 exactly, without the instruction of sm_89. Sign, exponent and fraction moved to their
// places in fp16 are the value times 2^-8, subnormals included, so the result is multiplied by 2^8. NaN would become
// 480; therefore it gets the highest exponent of fp16.
__device__ inline uint32_t convert_e4m3_bits(uint16_t pair) {
  const uint32_t in_upper_bytes = (uint32_t{pair} << 8 & 0x0000ff00) | (uint32_t{pair} << 16 & 0xff000000);
  const uint32_t magnitudes = in_upper_bytes & 0x7f007f00;
  const uint32_t nan = (magnitudes + 0x01000100) & 0x80008000;
  const uint32_t moved = (in_upper_bytes & 0x80008000) | magnitudes >> 1;
  return multiply_fp16(moved, 0x5c005c00) | (nan - (nan >> 5));
}

// Loads two parts of W, as load_b does. `chunk` is even.
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

// The copies of tiles to shared memory, in order. A filling is the content of one stage at one step. Barrier
// i % kMaxStages signals that filling number i has come, also where the shape has fewer stages.
template <Loader loader>
struct Pipe {
  uint32_t barriers;  // kBulk: the address of kMaxStages barriers
  int filled = 0, used = 0;

  // All threads call it once, and then __syncthreads.
  __device__ void begin(uint32_t memory) {
    barriers = memory;
    if constexpr (loader == Loader::kBulk) {
      if (threadIdx.x == 0) {
        for (int i = 0; i < kMaxStages; i++) barrier_init(barriers + 8 * i, 1);
        barrier_init_fence();
      }
    }
  }
  // All threads call expect for each filling, with its number of bytes, and copy for each of its parts.
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
  // Ends a group of copies, which may be empty, because wait counts groups.
  __device__ void commit() const {
    if constexpr (loader == Loader::kAsync) copy_async_commit();
  }
  // Waits for the oldest filling, after which `behind` groups were committed. A __syncthreads must follow, because with
  // kAsync a thread waits for its own copies only.
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
