// One tile of a product by mma: the prologue makes or copies A (BM rows, K channels), the tile is A W^T, and the
// epilogue writes C.
//
// Shared memory: barriers | stages_of tiles [BN][64] of W | as many tiles [BM][64] of A, or all K / 64 of them where
// the prologue makes A; later the sums [BM][BN + 4] in float lie there.
#pragma once

#include "tile.cuh"

namespace hydravit::cuda {

// ---- Prologue: makes rows of A in panels T [rows][64], in shared memory or, for a prologue phase, in global memory
// ----

// A warp normalises two rows at a time, so that twice as many loads are under way.
template <class T, int rows>
__device__ void normalise_rows(const Product& p, int first_row, uint8_t* panels, int64_t panel_bytes) {
  constexpr int kAtOnce = 2, kLoads = kMaxEmbed / 128;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const auto* a = static_cast<const float*>(p.a);
  const float mean_of_rows = 1.0f / p.pooled, mean_of_channels = 1.0f / p.k;
  for (int row = warp * kAtOnce; row < rows; row += warps * kAtOnce) {
    float4 x[kAtOnce][kLoads] = {};
#pragma unroll
    for (int r = 0; r < kAtOnce; r++) {
      if (first_row + row + r >= p.rows) continue;
      const int64_t from = static_cast<int64_t>(first_row + row + r) * p.a_image_rows + p.a_first;
      for (int token = 0; token < p.pooled; token++) {
#pragma unroll
        for (int i = 0; i < kLoads; i++) {
          const int channel = 128 * i + 4 * lane;
          if (channel >= p.k) continue;
          const auto y = load<float4>(a + (from + token) * p.a_stride + channel);
          x[r][i] = {x[r][i].x + y.x, x[r][i].y + y.y, x[r][i].z + y.z, x[r][i].w + y.w};
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kAtOnce; r++) {
      float sum = 0, squares = 0;
#pragma unroll
      for (int i = 0; i < kLoads; i++) {
        float4& v = x[r][i];
        v = {v.x * mean_of_rows, v.y * mean_of_rows, v.z * mean_of_rows, v.w * mean_of_rows};
        sum += (v.x + v.y) + (v.z + v.w);
      }
      const float mean = warp_sum(sum) * mean_of_channels;
#pragma unroll
      for (int i = 0; i < kLoads; i++) {
        if (128 * i + 4 * lane >= p.k) continue;
        float4& v = x[r][i];
        v = {v.x - mean, v.y - mean, v.z - mean, v.w - mean};
        squares += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
      }
      const float scale = rsqrtf(warp_sum(squares) * mean_of_channels + p.eps);
#pragma unroll
      for (int i = 0; i < kLoads; i++) {
        const int channel = 128 * i + 4 * lane, chunk = channel % kPanelChannels / kChunk;
        if (channel >= p.k) continue;
        const float4 v = x[r][i];
        const auto w = load<float4>(p.norm_weight + channel), b = load<float4>(p.norm_bias + channel);
        uint8_t* panel = panels + channel / kPanelChannels * panel_bytes;
        uint8_t* to = panel + (row + r) * kRowBytes + ((chunk ^ ((row + r) & 7)) << 4) + channel % kChunk * 2;
        store<uint2>(to, {pack<T>(v.x * scale * w.x + b.x, v.y * scale * w.y + b.y),
                          pack<T>(v.z * scale * w.z + b.z, v.w * scale * w.w + b.w)});
      }
    }
  }
}

__device__ inline float load_pixel(const Product& p, int64_t index) {
  if (p.image_dtype == Dtype::kBf16) return to_float(load<Bf16>(static_cast<const Bf16*>(p.a) + index));
  if (p.image_dtype == Dtype::kFp16) return to_float(load<Fp16>(static_cast<const Fp16*>(p.a) + index));
  return load<float>(static_cast<const float*>(p.a) + index);
}

template <class T, int rows>
__device__ void gather_patches(const Product& p, int first_row, uint8_t* panels, int64_t panel_bytes) {
  const int chunks = p.k / kChunk, area = p.patch_height * p.patch_width;
  const int width = p.grid_width * p.patch_width, height = p.grid_height * p.patch_height;
  for (int i = threadIdx.x; i < rows * chunks; i += blockDim.x) {
    const int row = i / chunks, chunk = i % chunks;
    const int image = (first_row + row) / p.image_rows;
    const int patch = (first_row + row) % p.image_rows - p.prefix_tokens;
    const bool inside = first_row + row < p.rows && patch >= 0 && patch < p.grid_height * p.grid_width;
    const int y = patch / p.grid_width * p.patch_height, x = patch % p.grid_width * p.patch_width;
    float v[kChunk];
    for (int j = 0; j < kChunk; j++) {
      const int element = chunk * kChunk + j, channel = element / area, in_patch = element % area;
      const int64_t line = (static_cast<int64_t>(image) * p.channels + channel) * height + y + in_patch / p.patch_width;
      v[j] = inside && channel < p.channels ? load_pixel(p, line * width + x + in_patch % p.patch_width) : 0.0f;
    }
    uint8_t* panel = panels + chunk * kChunk / kPanelChannels * panel_bytes;
    const int place = chunk % (kPanelChannels / kChunk) ^ (row & 7);
    store<uint4>(panel + row * kRowBytes + (place << 4), pack_chunk<T>(v));
  }
}

template <class T, int rows>
__device__ void run_prologue(const Product& p, int first_row, uint8_t* panels, int64_t panel_bytes) {
  if (p.prologue == Prologue::kNorm) normalise_rows<T, rows>(p, first_row, panels, panel_bytes);
  if (p.prologue == Prologue::kPatches) gather_patches<T, rows>(p, first_row, panels, panel_bytes);
}

// ---- Epilogue ----

__device__ inline float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }

template <class W>
__device__ void apply_epilogue(const Product& p, int row, int column, float (&v)[kChunk]) {
  using T = Activation<W>;
  const int token = row % p.image_rows;
  const bool inside = row < p.rows && token < p.image_tokens;
  if constexpr (std::is_same_v<W, E4m3>) {
    const float* scale = p.weight_scale[column / p.segment] + column % p.segment;
    for (int i = 0; i < kChunk; i += 4) {
      const auto s = load<float4>(scale + i);
      v[i] *= s.x, v[i + 1] *= s.y, v[i + 2] *= s.z, v[i + 3] *= s.w;
    }
  }
  if (p.epilogue != Epilogue::kPositions) {
    const float* bias = p.bias[column / p.segment] + column % p.segment;
    for (int i = 0; i < kChunk; i += 4) {
      const auto b = load<float4>(bias + i);
      v[i] += b.x, v[i + 1] += b.y, v[i + 2] += b.z, v[i + 3] += b.w;
    }
  }
  if (p.epilogue == Epilogue::kPanels || p.epilogue == Epilogue::kGelu) {
    for (int i = 0; i < kChunk; i++) {
      if (p.epilogue == Epilogue::kGelu) v[i] = gelu(v[i]);
      if (!inside) v[i] = 0.0f;
    }
    const int chunk = column % kPanelChannels / kChunk ^ (row & 7);
    const int64_t at =
        column / kPanelChannels * p.c_stride + static_cast<int64_t>(row) * kPanelChannels + chunk * kChunk;
    store<uint4>(static_cast<T*>(p.c) + at, pack_chunk<T>(v));
    return;
  }
  if (row >= p.rows) return;
  float* c = static_cast<float*>(p.c) + row * p.c_stride + column;
  if (p.epilogue == Epilogue::kLogits) {
    for (int i = 0; i < kChunk; i++)
      if (column + i < p.c_columns) store<float>(c + i, v[i]);
    return;
  }
  const bool residual = p.epilogue == Epilogue::kResidual;
  const int64_t from = static_cast<int64_t>(row / p.image_rows) * p.residual_image_rows + p.residual_first + token;
  const float* add = residual ? p.residual + from * p.c_stride : p.positions + token * p.positions_stride;
  for (int i = 0; i < kChunk; i += 4) {
    float4 y{};
    if (inside) {
      const auto base = load<float4>(add + column + i);
      float4 scale{1.0f, 1.0f, 1.0f, 1.0f};
      if (residual) scale = load<float4>(p.layer_scale + column + i);
      y = {base.x + scale.x * v[i], base.y + scale.y * v[i + 1], base.z + scale.z * v[i + 2],
           base.w + scale.w * v[i + 3]};
    }
    store<float4>(c + i, y);
  }
}

// ---- The tile ----

struct Origin {
  int row, column;
};
// Tiles with neighbouring numbers have the same columns, so that blocks that run together read the same weights.
__device__ inline Origin origin_of(const Product& p, int tile, TileSize size) {
  const int row_tiles = (p.rows + size.rows - 1) / size.rows;
  return {tile % row_tiles * size.rows, tile / row_tiles * size.columns};
}

// Whether some row of this tile is needed.
__device__ inline bool is_needed(const Product& p, int tile, TileSize size) {
  const Origin origin = origin_of(p, tile, size);
  if (origin.column + size.columns > p.segment || p.token_stop - p.token_start >= p.image_tokens) return true;
  const int token = origin.row % p.image_rows, end = token + size.rows;
  return (p.token_start < end && p.token_stop > token) || end > p.image_rows + p.token_start;
}

template <class W, TileShape shape, Loader loader>
__device__ void product_tile(const Product& p, int tile, uint8_t* memory, Pipe<loader>& pipe) {
  using T = Activation<W>;
  constexpr TileSize size = size_of(shape);
  constexpr int kRows = size.rows / size.warps_along_rows, kColumns = size.columns / size.warps_along_columns;
  constexpr uint32_t kATile = size.rows * kRowBytes, kWTile = size.columns * kPanelChannels * sizeof(W);
  constexpr int kStages = stages_of(shape, sizeof(W)), kAhead = kStages - 1;
  const auto [first_row, first_column] = origin_of(p, tile, size);
  const bool from_panels = p.prologue == Prologue::kPanels;
  const int steps = p.k / kPanelChannels;

  uint8_t* a_memory = memory + kBarrierBytes + kStages * kWTile;
  const uint32_t w_tiles = shared_address(memory + kBarrierBytes), a_tiles = shared_address(a_memory);
  // A run is at most 64 rows of W, because these lie in one segment. The last tile may have fewer runs than the others.
  constexpr int kRunRows = size.columns < kPanelChannels ? size.columns : kPanelChannels,
                kRuns = size.columns / kRunRows;
  const int runs = min(kRuns, (p.columns - first_column) / kRunRows);
  const W* w[kRuns];
  for (int i = 0; i < kRuns; i++) {
    const int column = first_column + (i < runs ? i : 0) * kRunRows;
    w[i] =
        static_cast<const W*>(p.weight[column / p.segment]) + static_cast<int64_t>(column % p.segment) * kPanelChannels;
  }
  const T* a = static_cast<const T*>(p.a) + static_cast<int64_t>(first_row) * kPanelChannels;
  const auto copy_w = [&](int step, int filling) {
    constexpr uint32_t kRun = kRunRows * kPanelChannels * sizeof(W);
    pipe.expect(runs * kRun + (from_panels ? kATile : 0), filling);
    for (int i = 0; i < runs; i++)
      pipe.copy(w_tiles + filling % kStages * kWTile + i * kRun, w[i] + step * p.weight_stride, kRun, filling);
  };
  const auto copy_a = [&](int step, int filling) {
    if (from_panels) pipe.copy(a_tiles + filling % kStages * kATile, a + step * p.a_stride, kATile, filling);
  };

  // Weights depend on no earlier phase, so their first copies precede the wait.
  for (int step = 0; step < kAhead && step < steps; step++) copy_w(step, step);
  wait_for_previous_kernel();
  for (int step = 0; step < kAhead; step++) {
    if (step < steps) copy_a(step, pipe.filled++);
    pipe.commit();
  }
  run_prologue<T, size.rows>(p, first_row, a_memory, kATile);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = warp / (size.warps_along_rows * size.warps_along_columns);
  const int row = warp / size.warps_along_columns % size.warps_along_rows * kRows;
  const int column = warp % size.warps_along_columns * kColumns;
  float sums[kRows / 16][kColumns / 8][4] = {};
  for (int step = 0; step < steps; step++) {
    const int stage = pipe.used % kStages;
    pipe.template wait<kAhead - 1>();
    __syncthreads();  // all threads see the tiles, and none reads the stage that is filled next
    if (step + kAhead < steps) {
      copy_w(step + kAhead, pipe.filled);
      copy_a(step + kAhead, pipe.filled++);
    }
    pipe.commit();
    const uint32_t w_tile = w_tiles + stage * kWTile, a_tile = a_tiles + (from_panels ? stage : step) * kATile;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int chunk = group * 4 + half * 2;
      uint32_t a_part[kRows / 16][4], b_part[kColumns / 16][4];
#pragma unroll
      for (int i = 0; i < kRows / 16; i++) load_a(a_part[i], a_tile, row + i * 16, chunk, lane);
#pragma unroll
      for (int j = 0; j < kColumns / 16; j++) load_weights<W>(b_part[j], w_tile, column + j * 16, chunk, lane);
#pragma unroll
      for (int i = 0; i < kRows / 16; i++)
#pragma unroll
        for (int j = 0; j < kColumns / 8; j++)
          multiply_add<T>(sums[i][j], a_part[i], b_part[j / 2][j % 2 * 2], b_part[j / 2][j % 2 * 2 + 1]);
    }
  }

  // The warps of both K groups add their sums in shared memory, where A was.
  constexpr int kPitch = size.columns + 4;
  auto* all = reinterpret_cast<float*>(a_memory);
  for (int turn = 0; turn < kSplitK; turn++) {
    __syncthreads();
    if (group != turn) continue;
#pragma unroll
    for (int i = 0; i < kRows / 16; i++)
#pragma unroll
      for (int j = 0; j < kColumns / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int r = row + i * 16 + lane / 4 + e / 2 * 8, c = column + j * 8 + lane % 4 * 2 + e % 2;
          float* to = all + r * kPitch + c;
          store<float>(to, turn == 0 ? sums[i][j][e] : load<float>(to) + sums[i][j][e]);
        }
  }
  __syncthreads();
  constexpr int kChunks = size.columns / kChunk;
  for (int i = threadIdx.x; i < size.rows * kChunks; i += blockDim.x) {
    const int r = i / kChunks, c = i % kChunks * kChunk;
    if (first_column + c >= p.columns) continue;
    const auto low = load<float4>(all + r * kPitch + c), high = load<float4>(all + r * kPitch + c + 4);
    float v[kChunk] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    apply_epilogue<W>(p, first_row + r, first_column + c, v);
  }
}

}  // namespace hydravit::cuda
