// Tiles of a product with many rows, by the warpgroups of sm_90a. A lies in panels: what norms or gathers has an input
// phase in front.
//
// As many blocks as SMs, each of which takes every n-th tile. One thread has the stages of A and W copied, in order; two
// warpgroups multiply them, 64 of the tile's rows each, and while they finish a tile the copies of the next are under
// way. Stages are written by bulk copies and read by wgmma, which both go through the asynchronous proxy: barriers
// order them, and no fence is needed.
//
// Shared memory: barriers | kWarpgroupStages stages, A [BM][64] and W [BN][64] | 16 rows of sums of every warp
#pragma once

#include "product.cuh"

namespace hydravit::cuda {

template <Shape shape>
struct WarpgroupStages {
  static constexpr ShapeSize kSize = size_of(shape);
  static constexpr uint32_t kATile = kSize.rows * kRowBytes, kRun = kPanel * kRowBytes;
  static constexpr uint32_t kBytes = kATile + kSize.columns * kRowBytes;

  uint32_t memory;  // barriers and stages

  // Filling number i goes to stage i % kWarpgroupStages. Two barriers for each stage: it is full, it is empty again.
  __device__ uint32_t full(int filling) const { return memory + 8 * (filling % kWarpgroupStages); }
  __device__ uint32_t empty(int filling) const { return full(filling) + 8 * kWarpgroupStages; }
  __device__ uint32_t a(int filling) const { return memory + kBarrierBytes + filling % kWarpgroupStages * kBytes; }
  __device__ uint32_t w(int filling) const { return a(filling) + kATile; }

  // By all threads, once.
  __device__ void begin() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kWarpgroupStages; i++) barrier_init(full(i), 1), barrier_init(empty(i), kSize.warps_along_rows);
      barrier_init_fence();
    }
    __syncthreads();
  }
  // What was there before must have been used.
  __device__ void wait_until_empty(int filling) const {
    if (filling >= kWarpgroupStages) barrier_wait(empty(filling), (filling / kWarpgroupStages - 1) & 1);
  }
  __device__ void wait_until_full(int filling) const { barrier_wait(full(filling), filling / kWarpgroupStages & 1); }
};

// The first tile from `tile` on that this block has to compute.
__device__ inline int next_wanted(const Product& p, int tile, Shape shape) {
  while (tile < tiles_of(p, shape) && !is_wanted(p, tile, size_of(shape))) tile += gridDim.x;
  return tile;
}

// By one thread: copies all stages of this block's tiles.
template <class T, Shape shape>
__device__ void copy_stages(const Product& p, const WarpgroupStages<shape>& stages) {
  using Stages = WarpgroupStages<shape>;
  constexpr int kRuns = Stages::kSize.columns / kPanel;
  struct Sources {
    const T *a, *w[kRuns];  // W's rows come in runs that lie in one segment each; the last tile may have a run less
    int runs;
  };
  const auto sources_of = [&](int tile) {
    const Corner corner = corner_of(p, tile, Stages::kSize);
    Sources from{static_cast<const T*>(p.a) + static_cast<int64_t>(corner.row) * kPanel,
                 {},
                 min(kRuns, (p.columns - corner.column) / kPanel)};
#pragma unroll
    for (int i = 0; i < kRuns; i++) {
      const int column = corner.column + (i < from.runs ? i : 0) * kPanel;
      from.w[i] =
          static_cast<const T*>(p.weight[column / p.segment]) + static_cast<int64_t>(column % p.segment) * kPanel;
    }
    return from;
  };
  const auto copy_w = [&](const Sources& from, int step, int filling) {
    barrier_expect(stages.full(filling), Stages::kATile + from.runs * Stages::kRun);
#pragma unroll
    for (int i = 0; i < kRuns; i++)
      if (i < from.runs)
        copy_bulk(stages.w(filling) + i * Stages::kRun, from.w[i] + step * p.weight_stride, Stages::kRun,
                  stages.full(filling));
  };

  const int steps = p.depth / kPanel, tiles = tiles_of(p, shape);
  int tile = next_wanted(p, blockIdx.x, shape);
  if (tile >= tiles) return;
  // W does not depend on earlier phases: the first stages of it are under way before the wait.
  const int early = min(steps, kWarpgroupStages);
  for (int step = 0; step < early; step++) copy_w(sources_of(tile), step, step);
  wait_for_previous_kernel();
  for (int filling = 0; tile < tiles; tile = next_wanted(p, tile + gridDim.x, shape)) {
    const Sources from = sources_of(tile);
    for (int step = 0; step < steps; step++, filling++) {
      stages.wait_until_empty(filling);
      if (filling >= early) copy_w(from, step, filling);
      copy_bulk(stages.a(filling), from.a + step * p.a_stride, Stages::kATile, stages.full(filling));
    }
  }
}

// By the warpgroups: computes this block's tiles.
template <class T, Shape shape>
__device__ void multiply_stages(const Product& p, const WarpgroupStages<shape>& stages, float* slices) {
  using Stages = WarpgroupStages<shape>;
  constexpr int kGroupRows = 64, kSums = Stages::kSize.columns / 2, kPitch = kWarpgroupColumns + 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;
  float* slice = slices + warp * 16 * kPitch;
  const int steps = p.depth / kPanel, tiles = tiles_of(p, shape);
  wait_for_previous_kernel();
  int used = 0;
  for (int tile = next_wanted(p, blockIdx.x, shape); tile < tiles; tile = next_wanted(p, tile + gridDim.x, shape)) {
    float even[kSums] = {}, odd[kSums] = {};
    for (int step = 0; step < steps; step++, used++) {
      stages.wait_until_full(used);
      const uint64_t a = matrix_descriptor(stages.a(used) + group * kGroupRows * kRowBytes);
      const uint64_t w = matrix_descriptor(stages.w(used));
      constexpr int kNext = 32 / 16;  // bytes of 16 channels, in a descriptor's units
      warpgroup_fence();
      warpgroup_multiply_add<T>(even, a, w);
      warpgroup_multiply_add<T>(even, a + kNext, w + kNext);
      warpgroup_multiply_add<T>(odd, a + 2 * kNext, w + 2 * kNext);
      warpgroup_multiply_add<T>(odd, a + 3 * kNext, w + 3 * kNext);
      warpgroup_commit();
      // These products stay under way; those of the step before have ended, for this warp.
      warpgroup_wait<1>();
      if (step > 0 && lane == 0) barrier_arrive(stages.empty(used - 1));
    }
    warpgroup_wait<0>();
    hold(even), hold(odd);
    if (lane == 0) barrier_arrive(stages.empty(used - 1));

    // Some columns at a time, a warp's sums become rows.
    const Corner corner = corner_of(p, tile, Stages::kSize);
#pragma unroll
    for (int first = 0; first < Stages::kSize.columns; first += kWarpgroupColumns) {
      if (corner.column + first >= p.columns) break;
#pragma unroll
      for (int column = 0; column < kWarpgroupColumns; column += 8)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int i = (first + column) / 2 + 2 * half;
          store<float2>(slice + (lane / 4 + 8 * half) * kPitch + column + lane % 4 * 2,
                        {even[i] + odd[i], even[i + 1] + odd[i + 1]});
        }
      __syncwarp();
      constexpr int kChunks = kWarpgroupColumns / kChunk;
      for (int i = lane; i < 16 * kChunks; i += 32) {
        const int r = i / kChunks, c = i % kChunks * kChunk;
        const auto low = load<float4>(slice + r * kPitch + c), high = load<float4>(slice + r * kPitch + c + 4);
        float v[kChunk] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        finish_chunk<T>(p, corner.row + 16 * warp + r, corner.column + first + c, v);
      }
      __syncwarp();
    }
  }
}

template <class T, Shape shape>
__device__ void warpgroup_tiles(const Product& p, uint8_t* memory) {
  const WarpgroupStages<shape> stages{shared_address(memory)};
  stages.begin();
  if (threadIdx.x / 32 < size_of(shape).warps_along_rows)
    multiply_stages<T>(p, stages,
                       reinterpret_cast<float*>(memory + kBarrierBytes + kWarpgroupStages * stages.kBytes));
  else if (threadIdx.x % 32 == 0)
    copy_stages<T>(p, stages);
}

}  // namespace hydravit::cuda
