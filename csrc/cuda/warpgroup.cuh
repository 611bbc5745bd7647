// Tiles of a product with many rows, by the warpgroups of sm_90a. A lies in panels: in front of a product that norms or
// gathers there is an input phase.
//
// As many blocks as SMs, each of which takes every n-th tile. One thread has the steps' tiles of A and W copied; two
// warpgroups multiply them, each 64 of the rows. While they finish a tile of C, what the next one needs is under way.
// A and W are written by bulk copies and read by wgmma, both through the asynchronous proxy: barriers order them, and
// no fence is needed.
//
// Shared memory: barriers | kWarpgroupStages stages, A [128][64] and W [128][64] | scratch for every warp
#pragma once

#include "product.cuh"

namespace hydravit::cuda {

constexpr TileShape kWarpgroupShape = TileShape::k128x128;
constexpr TileSize kWarpgroupSize = size_of(kWarpgroupShape);
constexpr int kSums = kWarpgroupSize.columns / 2;  // of a thread: a warpgroup's 64 rows over its 128 threads

// Filling number i goes to stage i % kWarpgroupStages.
struct Stages {
  static constexpr uint32_t kA = kWarpgroupSize.rows * kRowBytes, kW = kWarpgroupSize.columns * kRowBytes;

  uint32_t memory;

  __device__ uint32_t full(int filling) const { return memory + 8 * (filling % kWarpgroupStages); }
  __device__ uint32_t empty(int filling) const { return full(filling) + 8 * kWarpgroupStages; }
  __device__ uint32_t a(int filling) const { return memory + kBarrierBytes + filling % kWarpgroupStages * (kA + kW); }
  __device__ uint32_t w(int filling) const { return a(filling) + kA; }

  // By all threads, once.
  __device__ void begin() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kWarpgroupStages; i++) {
        barrier_init(full(i), 1);
        barrier_init(empty(i), kWarpgroupSize.warps_along_rows);
      }
      barrier_init_fence();
    }
    __syncthreads();
  }
  __device__ void wait_until_empty(int filling) const {
    if (filling >= kWarpgroupStages) barrier_wait(empty(filling), (filling / kWarpgroupStages - 1) & 1);
  }
  __device__ void wait_until_full(int filling) const { barrier_wait(full(filling), filling / kWarpgroupStages & 1); }
};

// The first from `tile` on that this block has to compute.
__device__ inline int next_needed(const Product& p, int tile) {
  while (tile < tiles_of(p, kWarpgroupShape) && !is_needed(p, tile, kWarpgroupSize)) tile += gridDim.x;
  return tile;
}

// By one thread: has everything copied that this block's tiles read.
template <class T>
__device__ void copy_stages(const Product& p, const Stages& stages) {
  constexpr int kRuns = kWarpgroupSize.columns / kPanelChannels;
  struct Sources {
    const T *a, *w[kRuns];  // W's rows come in runs that lie in one segment each; the last tile may have a run less
    int runs;
  };
  const auto sources_of = [&](int tile) {
    const Origin origin = origin_of(p, tile, kWarpgroupSize);
    Sources from{};
    from.a = static_cast<const T*>(p.a) + static_cast<int64_t>(origin.row) * kPanelChannels;
    from.runs = min(kRuns, (p.columns - origin.column) / kPanelChannels);
#pragma unroll
    for (int i = 0; i < kRuns; i++) {
      const int column = origin.column + (i < from.runs ? i : 0) * kPanelChannels;
      const T* segment = static_cast<const T*>(p.weight[column / p.segment]);
      from.w[i] = segment + static_cast<int64_t>(column % p.segment) * kPanelChannels;
    }
    return from;
  };
  const auto copy_w = [&](const Sources& from, int step, int filling) {
    constexpr uint32_t kRun = kPanelChannels * kRowBytes;
    barrier_expect(stages.full(filling), Stages::kA + from.runs * kRun);
#pragma unroll
    for (int i = 0; i < kRuns; i++) {
      const T* run = from.w[i] + step * p.weight_stride;
      if (i < from.runs) copy_bulk(stages.w(filling) + i * kRun, run, kRun, stages.full(filling));
    }
  };

  const int steps = p.k / kPanelChannels, tiles = tiles_of(p, kWarpgroupShape), early = min(steps, kWarpgroupStages);
  int tile = next_needed(p, blockIdx.x);
  if (tile >= tiles) return;
  // W does not depend on earlier phases: the first of it is under way before the wait.
  const Sources first = sources_of(tile);
  for (int step = 0; step < early; step++) copy_w(first, step, step);
  wait_for_previous_kernel();
  for (int filling = 0; tile < tiles; tile = next_needed(p, tile + gridDim.x)) {
    const Sources from = sources_of(tile);
    for (int step = 0; step < steps; step++, filling++) {
      stages.wait_until_empty(filling);
      if (filling >= early) copy_w(from, step, filling);
      copy_bulk(stages.a(filling), from.a + step * p.a_stride, Stages::kA, stages.full(filling));
    }
  }
}

// What a warp has of its 16 rows' sums becomes rows of C, some columns at a time.
template <class T>
__device__ void finish_rows(const Product& p, const Origin& origin, const float (&sums)[kSums], float* scratch) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int first = 0; first < kWarpgroupSize.columns; first += kScratchColumns) {
    if (origin.column + first >= p.columns) return;
#pragma unroll
    for (int i = 0; i < kScratchColumns / 2; i += 2) {
      const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2, at = first / 2 + i;
      store<float2>(scratch + row * kScratchPitch + column, {sums[at], sums[at + 1]});
    }
    __syncwarp();
    constexpr int kChunks = kScratchColumns / kChunk;
    for (int i = lane; i < 16 * kChunks; i += 32) {
      const int row = i / kChunks, column = i % kChunks * kChunk;
      const float* from = scratch + row * kScratchPitch + column;
      const auto low = load<float4>(from), high = load<float4>(from + 4);
      float v[kChunk] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      apply_epilogue<T>(p, origin.row + row, origin.column + first + column, v);
    }
    __syncwarp();
  }
}

// By the warpgroups: computes this block's tiles. `scratch`: this warp's.
template <class T>
__device__ void multiply_stages(const Product& p, const Stages& stages, float* scratch) {
  constexpr int kNext = 32 / 16;  // bytes of 16 channels, in a descriptor's units
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group_row = warp / 4 * 64;
  const int steps = p.k / kPanelChannels, tiles = tiles_of(p, kWarpgroupShape);
  wait_for_previous_kernel();
  int used = 0;
  for (int tile = next_needed(p, blockIdx.x); tile < tiles; tile = next_needed(p, tile + gridDim.x)) {
    float sums[kSums] = {};
    for (int step = 0; step < steps; step++, used++) {
      stages.wait_until_full(used);
      const uint64_t a = matrix_descriptor(stages.a(used) + group_row * kRowBytes);
      const uint64_t w = matrix_descriptor(stages.w(used));
      warpgroup_fence();
#pragma unroll
      for (int part = 0; part < kPanelChannels / 16; part++)
        warpgroup_multiply_add<T>(sums, a + part * kNext, w + part * kNext);
      warpgroup_commit();
      warpgroup_wait<1>();  // these stay under way; this warp's of the step before have ended
      if (step > 0 && lane == 0) barrier_arrive(stages.empty(used - 1));
    }
    warpgroup_wait<0>();
    hold(sums);
    if (lane == 0) barrier_arrive(stages.empty(used - 1));
    const Origin origin = origin_of(p, tile, kWarpgroupSize);
    finish_rows<T>(p, {origin.row + 16 * warp, origin.column}, sums, scratch);
  }
}

template <class T>
__device__ void warpgroup_tiles(const Product& p, uint8_t* memory) {
  const Stages stages{shared_address(memory)};
  stages.begin();
  const int warp = threadIdx.x / 32;
  auto* scratch = reinterpret_cast<float*>(memory + kBarrierBytes + kWarpgroupStages * (Stages::kA + Stages::kW));
  if (warp < kWarpgroupSize.warps_along_rows)
    multiply_stages<T>(p, stages, scratch + warp * 16 * kScratchPitch);
  else if (threadIdx.x % 32 == 0)
    copy_stages<T>(p, stages);
}

}  // namespace hydravit::cuda
