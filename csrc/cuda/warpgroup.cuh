// wgmma multiplies the tiles of a product with many rows (sm_90a). A lies in panels: where a product has a norm or
// patches as its prologue, a prologue phase precedes it.
//
// There are as many blocks as SMs, and a block computes every n-th tile. A block has two warpgroups, which multiply 64
// rows each, and one thread that issues the copies of A and W. While the warpgroups run the epilogue of one tile, the
// copies for the next tile are under way. Bulk copies write A and W and wgmma reads them, both through the asynchronous
// proxy: mbarriers order the two, and no fence is needed.
//
// Shared memory: barriers | kWarpgroupStages stages of A [128][64] and W [128][64] | scratch for every warp
#pragma once

#include "product.cuh"

namespace hydravit::cuda {

constexpr TileShape kWarpgroupShape = TileShape::k128x128;
constexpr TileSize kWarpgroupSize = size_of(kWarpgroupShape);
constexpr int kSums = kWarpgroupSize.columns / 2;  // of one thread: 128 threads hold 64 rows

// Filling number i goes to stage i % kWarpgroupStages. `full` signals that its bytes have come, `empty` that all warps
// have read them.
struct Stages {
  static constexpr uint32_t kA = kWarpgroupSize.rows * kRowBytes, kW = kWarpgroupSize.columns * kRowBytes;

  uint32_t memory;

  __device__ uint32_t full(int filling) const { return memory + 8 * (filling % kWarpgroupStages); }
  __device__ uint32_t empty(int filling) const { return full(filling) + 8 * kWarpgroupStages; }
  __device__ uint32_t a(int filling) const { return memory + kBarrierBytes + filling % kWarpgroupStages * (kA + kW); }
  __device__ uint32_t w(int filling) const { return a(filling) + kA; }

  // All threads call it once.
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

// The first tile from `tile` on that this block has to compute.
__device__ inline int next_needed(const Product& p, int tile) {
  while (tile < tiles_of(p, kWarpgroupShape) && !is_needed(p, tile, kWarpgroupSize)) tile += gridDim.x;
  return tile;
}

// One thread calls it and issues all copies of this block.
template <class T>
__device__ void copy_stages(const Product& p, const Stages& stages) {
  constexpr int kRuns = kWarpgroupSize.columns / kPanelChannels;
  struct Sources {
    // A run is 64 rows of W, because these lie in one segment. The last tile may have one run less than the others.
    const T *a, *w[kRuns];
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
  // Weights depend on no earlier phase, so their first copies precede the wait.
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

// Turns a warp's sums of 16 rows into rows of C, kScratchColumns columns at a time.
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

// The warpgroups call it and compute all tiles of this block. `scratch` belongs to the calling warp.
template <class T>
__device__ void multiply_stages(const Product& p, const Stages& stages, float* scratch) {
  constexpr int kNext = 32 / 16;  // from 16 channels to the next 16: 32 bytes in a descriptor's units of 16
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
      warpgroup_wait<1>();  // the products of this step stay under way; those of the step before have ended
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
