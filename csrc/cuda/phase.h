// The contract of the CUDA kernels: a network is a list of phases, and a phase is what one kernel computes.
//
// Kernels see pointers, lengths and strides; offsets of a slice are folded into the pointers. T is the 16-bit dtype.
//
// Panels: T matrices (weights and activations alike) lie in panels of 64 channels. A panel holds all rows, 128 bytes
// each, and of every row the eight 16-byte chunks in the order (chunk ^ row % 8), so that tensor cores' loads meet no
// bank twice. So any 8 n rows of any panel are contiguous bytes that go to shared memory as they lie, and the first
// rows of the first panels are the slice of a narrower network: one packed copy serves all widths, with no gap inside a
// tile.
//
// Weights may be E4m3 instead, with a float scale for each row; T is then Fp16. Of 8 rows of a panel, the 16 channels
// that one product of the tensor cores takes lie together, 128 bytes: 16 of each row, whose n-th word holds channels
// 2 n, 2 n + 1, 2 n + 8 and 2 n + 9. So lane l of a warp needs word l. 8 n rows are contiguous bytes here too.
//
// Rows: an image has `image_rows` rows, of which the first `image_tokens` are its tokens and the others are zero.
#pragma once

#include <cstdint>

namespace hydravit::cuda {

constexpr int kPanelChannels = 64;        // channels
constexpr int kRowBytes = 128;            // of a panel's row
constexpr int kChunk = 8;                 // channels of a chunk of 16 bytes
constexpr int kHeadDim = kPanelChannels;  // a head is a panel
constexpr int kMaxEmbed = 1024;           // channels of a row that a warp normalises in registers

// Where element (row, channel) of a matrix in panels of `rows` rows lies.
constexpr int64_t panel_index(int64_t rows, int64_t row, int64_t channel) {
  const int64_t chunk = channel % kPanelChannels / kChunk;
  return (channel / kPanelChannels * rows + row) * kPanelChannels + (chunk ^ row % 8) * kChunk + channel % kChunk;
}

// Where element (row, channel) of an E4m3 matrix in panels of `rows` rows lies.
constexpr int64_t e4m3_index(int64_t rows, int64_t row, int64_t channel) {
  const int64_t word = row % 8 * 4 + channel % 8 / 2, in_word = channel % 16 / 8 * 2 + channel % 2;
  return (channel / kPanelChannels * rows + row / 8 * 8) * kPanelChannels + channel % kPanelChannels / 16 * 128 +
         word * 4 + in_word;
}

enum class Dtype : int { kFp32, kBf16, kFp16, kE4m3 };
constexpr int bytes_of(Dtype dtype) { return dtype == Dtype::kFp32 ? 4 : dtype == Dtype::kE4m3 ? 1 : 2; }

// ---- Products: C = f(A W^T) ----

// Rows and columns of one tile of C. Few rows and many columns suit a norm in front, whose float rows are the larger
// part of what a tile loads. The largest is multiplied by warpgroups (warpgroup.cuh): on sm_90a only, A in panels only.
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
// By mma, half of the warps that share a tile multiply the even and half the odd 32 channels: the order of the sum, and
// so its bits, are the same for every shape. A warpgroup keeps one sum: the bits of mma and wgmma may differ.
constexpr int kSplitK = 2;
// Tiles of W (and A) in flight: of E4m3 twice as many, for as many bytes, where A's are small.
constexpr int stages_of(TileShape shape, int weight_bytes) {
  return weight_bytes == 1 && size_of(shape).rows <= 32 ? 8 : 4;
}
constexpr int kMaxStages = 8;
constexpr int kWarpgroupStages = 6;  // these are in flight while a tile of C is finished, too
constexpr int kScratchColumns = 32,
              kScratchPitch = kScratchColumns + 8;  // of C that a warpgroup's warp finishes at a time
constexpr int threads_of(TileShape shape) {
  const int warps = size_of(shape).warps_along_rows * size_of(shape).warps_along_columns;
  return uses_wgmma(shape) ? 32 * (warps + 1) : 32 * kSplitK * warps;  // one warp has tiles copied
}

enum class Prologue : int {
  kPanels,   // A lies in panels
  kNorm,     // layer norm of float rows: each of A's rows is the norm of the mean of `pooled` rows
  kPatches,  // patches of images; rows of the tokens in front of the patches are zero
};
enum class Epilogue : int {
  kPanels,     // C + bias, in panels
  kGelu,       // gelu(C + bias), in panels
  kResidual,   // residual + layer_scale * (C + bias), float rows
  kPositions,  // C + positions, float rows
  kLogits,     // C + bias, float rows without padding
};

struct Product {
  Prologue prologue;
  Epilogue epilogue;
  int rows, columns, k;  // C is (rows, columns); columns and k are multiples of 64
  int image_rows, image_tokens;

  const void* a;     // T panels, float rows or images
  int64_t a_stride;  // elements from panel to panel or from row to row
  int a_image_rows;  // kNorm: row i of A is made of rows i * a_image_rows + a_first, ... of `a`
  int a_first, pooled;
  const float *norm_weight, *norm_bias;
  float eps;

  // kPatches: images (B, channels, grid_height * patch_height, grid_width * patch_width), contiguous
  Dtype image_dtype;
  int channels, grid_height, grid_width, patch_height, patch_width, prefix_tokens;

  // W has up to three runs of `segment` rows each, panels of `weight_stride` elements.
  const void* weight[3];
  const float *weight_scale[3], *bias[3];  // scales: of E4m3, one for each row
  int64_t weight_stride;
  int segment;
  // Only these tokens' rows of the first segment are wanted (the queries of the last block).
  int token_start, token_stop;

  void* c;                                  // T panels or float rows
  int64_t c_stride;                         // elements from panel to panel or from row to row
  int c_columns;                            // kLogits: those without padding
  const float *residual, *layer_scale;      // residual row of C's row i: (i / image_rows) * residual_image_rows +
  int residual_image_rows, residual_first;  // residual_first + i % image_rows; rows as long as C's
  const float* positions;                   // (image_tokens, ...), rows `positions_stride` apart
  int64_t positions_stride;
};

constexpr int tiles_of(const Product& p, TileShape shape) {
  const TileSize size = size_of(shape);
  return (p.rows + size.rows - 1) / size.rows * ((p.columns + size.columns - 1) / size.columns);
}

// ---- Attention: every head of every image, some queries at a time, all keys ----

constexpr int kKeyGroups = 4;  // warps that share the keys of 16 queries
struct Attention {
  int images, heads, image_rows, image_tokens;
  int query_tiles;              // of 16 queries in a block
  int first_block, blocks;      // of each head
  int query_start, query_stop;  // that are wanted: the first and the first behind
  float scale;
  const void* qkv;  // T panels: the heads' queries, then keys, then values
  int64_t qkv_stride;
  void* out;  // T panels, one for a head; query i of an image goes to row i - query_start of its `out_image_rows`
  int64_t out_stride;
  int out_image_rows;
};
constexpr int threads_of(const Attention& a) { return 32 * kKeyGroups * a.query_tiles; }

// ---- Phases ----

// An input phase makes A of a product that norms or gathers, once for all of its tiles: it has that product's A, and as
// C the panels that take its place.
enum class Kind : int { kProduct, kPrologue, kAttention };
constexpr int kPrologueRows = 8, kPrologueThreads = 128;  // of a block of an input phase

struct Phase {
  const char* name;
  Kind kind;
  bool starts_early;  // its kernel may start, and fetch weights, before the kernel in front has ended
  TileShape shape;    // of a product
  int blocks, threads;
  int64_t shared_bytes;
  Product product;
  Attention attention;
};

// How tiles come to shared memory: by every thread, 16 bytes each (sm_80); or by one thread in bulk (sm_90).
enum class Loader : int { kAsync, kBulk };

// Bytes of shared memory; the same layout is in the kernels.
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t kBarrierBytes = 1024;  // barriers, and what keeps the tiles behind them aligned
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
