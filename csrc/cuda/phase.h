// The contract of the CUDA kernels: a network is a list of phases, and one kernel computes one phase.
//
// Kernels see pointers, lengths and strides; the planner folds the offsets of a slice into the pointers. T is the
// 16-bit dtype.
//
// Panels: T matrices (weights and activations alike) lie in panels of 64 channels. A panel holds all rows with 128
// bytes each, and stores the eight 16-byte chunks of a row in the order (chunk ^ row % 8), so that ldmatrix and wgmma
// read shared memory without bank conflicts. Any 8 n rows of a panel are contiguous bytes, which a copy moves to shared
// memory unchanged. The first rows of the first panels are the slice of a narrower subnetwork: one packed copy serves
// all widths, and a tile has no gaps.
//
// Weights may be E4m3 instead, with a float scale for each row; T is then Fp16. A panel stores the 16 channels of 8
// rows that one mma reads as 128 contiguous bytes: 16 bytes for each row, whose n-th 4-byte word holds the channels
// 2 n, 2 n + 1, 2 n + 8 and 2 n + 9. Lane l of a warp therefore needs word l. Here, too, 8 n rows are contiguous bytes.
//
// Rows: an image has `image_rows` rows. The first `image_tokens` are its tokens, the others are zero.
#pragma once

#include <cstdint>

namespace hydravit::cuda {

constexpr int kPanelChannels = 64;
constexpr int kRowBytes = 128;            // of one row in a panel
constexpr int kChunk = 8;                 // channels in a 16-byte chunk
constexpr int kHeadDim = kPanelChannels;  // a head is a panel
constexpr int kMaxEmbed = 1024;           // channels; a warp normalises a row of at most this size in registers

// The index of element (row, channel) in a matrix whose panels have `rows` rows.
constexpr int64_t panel_index(int64_t rows, int64_t row, int64_t channel) {
  const int64_t chunk = channel % kPanelChannels / kChunk;
  return (channel / kPanelChannels * rows + row) * kPanelChannels + (chunk ^ row % 8) * kChunk + channel % kChunk;
}

// The same for an E4m3 matrix.
constexpr int64_t e4m3_index(int64_t rows, int64_t row, int64_t channel) {
  const int64_t word = row % 8 * 4 + channel % 8 / 2, in_word = channel % 16 / 8 * 2 + channel % 2;
  return (channel / kPanelChannels * rows + row / 8 * 8) * kPanelChannels + channel % kPanelChannels / 16 * 128 +
         word * 4 + in_word;
}

enum class Dtype : int { kFp32, kBf16, kFp16, kE4m3 };
constexpr int bytes_of(Dtype dtype) { return dtype == Dtype::kFp32 ? 4 : dtype == Dtype::kE4m3 ? 1 : 2; }

// ---- Products: C = f(A W^T) ----

// The rows and columns of one tile of C. A norm in the prologue favours few rows and many columns, because its float
// rows are the larger part of what a tile loads. wgmma multiplies the largest tile (warpgroup.cuh), which needs sm_90a
// and A in panels; mma multiplies the others.
enum class TileShape : int { k16x32, k32x32, k32x64, k32x128, k128x64, k128x128 };
constexpr TileShape kTileShapes[] = {TileShape::k16x32,  TileShape::k32x32,  TileShape::k32x64,
                                     TileShape::k32x128, TileShape::k128x64, TileShape::k128x128};
constexpr bool uses_wgmma(TileShape shape) { return shape == TileShape::k128x128; }
struct TileSize {
  int rows, columns, warps_along_rows, warps_along_columns;
};
constexpr TileSize size_of(TileShape shape) {
  switch (shape) {
    case TileShape::k16x32:
      return {16, 32, 1, 2};
    case TileShape::k32x32:
      return {32, 32, 2, 2};
    case TileShape::k32x64:
      return {32, 64, 2, 2};
    case TileShape::k32x128:
      return {32, 128, 2, 2};
    case TileShape::k128x64:
      return {128, 64, 2, 2};
    default:
      return {128, 128, 8, 1};
  }
}
// In an mma tile, half of the warps multiply the even groups of 32 channels and the other half the odd ones. Every
// shape adds in this order, so an element of C has the same bits in every mma tile, and a network has the same bits at
// every batch size as long as mma computes it. A wgmma tile adds in another order: its bits may differ.
constexpr int kSplitK = 2;
// How many tiles of W (and A) are in flight. An E4m3 tile has half the bytes, so twice as many tiles fit when the tiles
// of A are small.
constexpr int stages_of(TileShape shape, int weight_bytes) {
  return weight_bytes == 1 && size_of(shape).rows <= 32 ? 8 : 4;
}
constexpr int kMaxStages = 8;
constexpr int kWarpgroupStages = 6;  // copies into them go on while the epilogue of a tile runs
// A warp of a warpgroup passes C through its scratch memory to the epilogue, this many columns at a time.
constexpr int kScratchColumns = 32, kScratchPitch = kScratchColumns + 8;
constexpr int threads_of(TileShape shape) {
  const int warps = size_of(shape).warps_along_rows * size_of(shape).warps_along_columns;
  return uses_wgmma(shape) ? 32 * (warps + 1) : 32 * kSplitK * warps;  // one more warp issues the copies
}

// How a product gets A.
enum class Prologue : int {
  kPanels,   // A lies in panels
  kNorm,     // each row of A is the layer norm of the mean of `pooled` float rows
  kPatches,  // each row of A is a patch of an image; the rows of class and register tokens are zero
};
// How a product makes C of A W^T.
enum class Epilogue : int {
  kPanels,     // writes A W^T + bias to panels
  kGelu,       // writes gelu(A W^T + bias) to panels
  kResidual,   // writes residual + layer_scale * (A W^T + bias) to float rows
  kPositions,  // writes A W^T + positions to float rows
  kLogits,     // writes A W^T + bias to float rows without padding
};

struct Product {
  Prologue prologue;
  Epilogue epilogue;
  int rows, columns, k;  // C is (rows, columns); columns and k are multiples of 64
  int image_rows, image_tokens;

  const void* a;     // T panels, float rows or images
  int64_t a_stride;  // elements from panel to panel or from row to row
  int a_image_rows;  // kNorm: row i of A reads the `pooled` rows of `a` from i * a_image_rows + a_first on
  int a_first, pooled;
  const float *norm_weight, *norm_bias;
  float eps;

  // kPatches: images (B, channels, grid_height * patch_height, grid_width * patch_width), contiguous
  Dtype image_dtype;
  int channels, grid_height, grid_width, patch_height, patch_width, prefix_tokens;

  // W consists of up to three segments (query, key, value) of `segment` rows each, `weight_stride` elements from panel
  // to panel.
  const void* weight[3];
  const float *weight_scale[3], *bias[3];  // weight_scale: E4m3 only, one for each row
  int64_t weight_stride;
  int segment;
  // In the first segment only the rows of the tokens [token_start, token_stop) are needed: the queries of the last
  // layer.
  int token_start, token_stop;

  void* c;           // T panels or float rows
  int64_t c_stride;  // elements from panel to panel or from row to row
  int c_columns;     // kLogits: the columns without padding
  // Row i of C adds row (i / image_rows) * residual_image_rows + residual_first + i % image_rows of `residual`, whose
  // rows are c_stride elements apart.
  const float *residual, *layer_scale;
  int residual_image_rows, residual_first;
  const float* positions;  // (image_tokens, ...), rows `positions_stride` apart
  int64_t positions_stride;
};

constexpr int tiles_of(const Product& p, TileShape shape) {
  const TileSize size = size_of(shape);
  return (p.rows + size.rows - 1) / size.rows * ((p.columns + size.columns - 1) / size.columns);
}

// ---- Attention: a block computes some queries of one head of one image with all keys ----

constexpr int kKeyGroups = 4;  // four warps share 16 queries: each takes a part of the keys
struct Attention {
  int images, heads, image_rows, image_tokens;
  int query_tiles;              // tiles of 16 queries that a block computes
  int first_block, blocks;      // blocks of a head; those before first_block have no needed query
  int query_start, query_stop;  // the needed queries [query_start, query_stop) of an image
  float scale;
  const void* qkv;  // T panels, one for each head: all queries, then all keys, then all values
  int64_t qkv_stride;
  void* out;  // T panels, one for each head; query i of an image goes to row i - query_start of its rows
  int64_t out_stride;
  int out_image_rows;  // rows of an image in `out`
};
constexpr int threads_of(const Attention& a) { return 32 * kKeyGroups * a.query_tiles; }

// ---- Phases ----

// A prologue phase runs the prologue of a product once for all of its tiles: its Product has A of that product, and its
// C are the panels that the product then reads as A.
enum class Kind : int { kProduct, kPrologue, kAttention };
constexpr int kPrologueRows = 8, kPrologueThreads = 128;  // of one block

struct Phase {
  const char* name;
  Kind kind;
  bool starts_early;  // the kernel may start, and fetch weights, before the preceding kernel has ended
  TileShape shape;    // kProduct
  int blocks, threads;
  int64_t shared_bytes;
  Product product;
  Attention attention;
};

// Which instruction copies tiles to shared memory: cp.async, 16 bytes by every thread (sm_80), or cp.async.bulk by one
// thread (sm_90).
enum class Loader : int { kAsync, kBulk };

// Bytes of shared memory. The kernels divide it in the same way.
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t kBarrierBytes = 1024;  // the barriers; what is left over keeps the tiles aligned
constexpr int64_t shared_bytes(TileShape shape, Prologue prologue, int k, Dtype weights) {
  const TileSize size = size_of(shape);
  if (uses_wgmma(shape)) {
    const int64_t scratch = size.rows * kScratchPitch * int64_t{sizeof(float)};
    return kBarrierBytes + kWarpgroupStages * (size.rows + size.columns) * kRowBytes + scratch;
  }
  const int64_t stages = stages_of(shape, bytes_of(weights));
  const int64_t panels = prologue == Prologue::kPanels ? stages : k / kPanelChannels;
  const int64_t sums = size.rows * (size.columns + 4) * int64_t{sizeof(float)};
  return kBarrierBytes + stages * size.columns * kPanelChannels * bytes_of(weights) +
         larger(panels * size.rows * kRowBytes, sums);
}
constexpr int64_t shared_bytes(const Attention& a) {
  const int64_t queries = 16 * a.query_tiles;
  const int64_t sums = kKeyGroups * queries * (kHeadDim + 8 + 2) * int64_t{sizeof(float)};
  return kBarrierBytes + queries * kRowBytes + larger(2 * a.image_rows * int64_t{kRowBytes}, sums);
}

}  // namespace hydravit::cuda
