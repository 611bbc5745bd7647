// Attention of some queries of one head of one image: softmax(q k^T * scale) v, without intermediate results in global
// memory.
//
// Shared memory: barriers | queries T [16 * query_tiles][64] | keys and values T [image_rows][64] each. The partial
// outputs float [kKeyGroups][16 * query_tiles][72], their highest scores and their sums later take the place of keys
// and values. Four warps share 16 queries. Each takes a quarter of the keys with a softmax of its own, and the quarters
// are joined in a fixed order, so the bits do not depend on the number of queries in a block.
#pragma once

#include "tile.cuh"

namespace hydravit::cuda {

constexpr int kOutPitch = kHeadDim + 8;

// The output of one warp for its 16 queries. Lane l holds the rows l / 4 and l / 4 + 8, and two of every 8 channels.
struct PartialOutput {
  float out[kHeadDim / 8][4] = {};
  float highest[2] = {-INFINITY, -INFINITY};
  float sum[2] = {};
};

// Adds up to 64 keys, from `first` on, to the partial output.
template <class T>
__device__ void attend_to(PartialOutput& partial, const uint32_t (&q)[4][4], uint32_t keys, uint32_t values, int first,
                          int end, int tokens, float scale, int lane) {
  constexpr int kBlocks = 4;  // 16 keys each
  float scores[2 * kBlocks][4] = {};
#pragma unroll
  for (int block = 0; block < kBlocks; block++) {
    if (first + 16 * block >= end) continue;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint32_t k[4];
      load_b(k, keys, first + 16 * block, 2 * i, lane);
      multiply_add<T>(scores[2 * block], q[i], k[0], k[1]);
      multiply_add<T>(scores[2 * block + 1], q[i], k[2], k[3]);
    }
  }
  float highest[2] = {partial.highest[0], partial.highest[1]};
#pragma unroll
  for (int j = 0; j < 2 * kBlocks; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int key = first + 8 * j + lane % 4 * 2 + e % 2;
      scores[j][e] = key < tokens && key < end ? scores[j][e] * scale : -INFINITY;
      highest[e / 2] = fmaxf(highest[e / 2], scores[j][e]);
    }
  float rescale[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    highest[r] = fmaxf(highest[r], shuffle_xor(highest[r], 1));
    highest[r] = fmaxf(highest[r], shuffle_xor(highest[r], 2));
    rescale[r] = exp2f(partial.highest[r] - highest[r]);
    partial.highest[r] = highest[r];
    partial.sum[r] *= rescale[r];
  }
#pragma unroll
  for (int i = 0; i < kHeadDim / 8; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) partial.out[i][e] *= rescale[e / 2];
#pragma unroll
  for (int block = 0; block < kBlocks; block++) {
    if (first + 16 * block >= end) continue;
    uint32_t p[4];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      float (&s)[4] = scores[2 * block + j];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        s[e] = exp2f(s[e] - highest[e / 2]);
        partial.sum[e / 2] += s[e];
      }
      p[2 * j] = pack<T>(s[0], s[1]);
      p[2 * j + 1] = pack<T>(s[2], s[3]);
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; i++) {
      uint32_t v[4];
      load_b_transposed(v, values, first + 16 * block, 2 * i, lane);
      multiply_add<T>(partial.out[2 * i], p, v[0], v[1]);
      multiply_add<T>(partial.out[2 * i + 1], p, v[2], v[3]);
    }
  }
}

template <class T, Loader loader>
__device__ void attention_tile(const Attention& a, int tile, uint8_t* memory, Pipe<loader>& pipe) {
  const int query_rows = 16 * a.query_tiles;
  const int image = tile / (a.heads * a.blocks), head = tile / a.blocks % a.heads;
  const int query_start = (a.first_block + tile % a.blocks) * query_rows;
  const int rows = min(query_rows, a.image_rows - query_start);

  uint8_t* kv_memory = memory + kBarrierBytes + query_rows * kRowBytes;
  const uint32_t q_tile = shared_address(memory + kBarrierBytes), keys = shared_address(kv_memory);
  const uint32_t values = keys + a.image_rows * kRowBytes, bytes = a.image_rows * kRowBytes;
  const T* qkv = static_cast<const T*>(a.qkv) + static_cast<int64_t>(image) * a.image_rows * kPanelChannels;
  wait_for_previous_kernel();
  pipe.expect(2 * bytes + rows * kRowBytes, pipe.filled);
  pipe.copy(q_tile, qkv + head * a.qkv_stride + query_start * kPanelChannels, rows * kRowBytes, pipe.filled);
  pipe.copy(keys, qkv + (a.heads + head) * a.qkv_stride, bytes, pipe.filled);
  pipe.copy(values, qkv + (2 * a.heads + head) * a.qkv_stride, bytes, pipe.filled++);
  pipe.commit();
  pipe.template wait<0>();
  __syncthreads();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp / kKeyGroups * 16, group = warp % kKeyGroups;
  uint32_t q[4][4];
#pragma unroll
  for (int i = 0; i < 4; i++) load_a(q[i], q_tile, row, 2 * i, lane);
  PartialOutput partial;
  const int share = (a.image_rows / 16 + kKeyGroups - 1) / kKeyGroups * 16;
  const int end = min((group + 1) * share, a.image_rows);
  const float scale = a.scale * 1.44269504f;  // log2(e), because exp2f takes powers of two
  for (int first = group * share; first < end; first += 64)
    attend_to<T>(partial, q, keys, values, first, end, a.image_tokens, scale, lane);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    partial.sum[r] += shuffle_xor(partial.sum[r], 1);
    partial.sum[r] += shuffle_xor(partial.sum[r], 2);
  }

  __syncthreads();  // no warp reads keys and values any longer
  auto* outs = reinterpret_cast<float*>(kv_memory);
  float* highests = outs + kKeyGroups * query_rows * kOutPitch;
  float* sums = highests + kKeyGroups * query_rows;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int at = group * query_rows + row + lane / 4 + 8 * r;
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; i++) {
      store<float>(outs + at * kOutPitch + 8 * i + lane % 4 * 2, partial.out[i][2 * r]);
      store<float>(outs + at * kOutPitch + 8 * i + lane % 4 * 2 + 1, partial.out[i][2 * r + 1]);
    }
    if (lane % 4 == 0) {
      store<float>(highests + at, partial.highest[r]);
      store<float>(sums + at, partial.sum[r]);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < query_rows * (kHeadDim / kChunk); i += blockDim.x) {
    const int query = i / (kHeadDim / kChunk), chunk = i % (kHeadDim / kChunk), token = query_start + query;
    if (token < a.query_start || token >= a.query_stop) continue;
    float highest = -INFINITY, sum = 0, v[kChunk] = {};
    for (int g = 0; g < kKeyGroups; g++) highest = fmaxf(highest, load<float>(highests + g * query_rows + query));
    for (int g = 0; g < kKeyGroups; g++) {
      const int at = g * query_rows + query;
      const float weight = exp2f(load<float>(highests + at) - highest);
      sum += weight * load<float>(sums + at);
      for (int j = 0; j < kChunk; j++) v[j] += weight * load<float>(outs + at * kOutPitch + chunk * kChunk + j);
    }
    for (int j = 0; j < kChunk; j++) v[j] /= sum;
    const int64_t to = static_cast<int64_t>(image) * a.out_image_rows + token - a.query_start;
    T* out = static_cast<T*>(a.out) + head * a.out_stride + to * kPanelChannels;
    store<uint4>(out + (chunk ^ static_cast<int>(to & 7)) * kChunk, pack_chunk<T>(v));
  }
}

}  // namespace hydravit::cuda
