// Matrix product over strided operands, read where they lie: packing is the only pass over them.
//
// Every output element is the sum of chains of multiply-adds along the depth, cut at places that depend on the depth
// alone. So its bits do not depend on the number of rows, on where its tile lies, or on the thread count.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "vector.h"

namespace hydravit::HYDRAVIT_ISA {

// The register tile: kTileRows rows (one broadcast each) by kTileColumns columns (two vectors).
#if defined(__AVX512F__)
constexpr int kTileRows = 14;
#elif defined(__AVX__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileColumns = 2 * kWidth;

// Where index i lies: i * stride, or in segments of `segment` indices that are `jump` elements apart (per-head rows
// or columns, the tokens of one image).
struct Axis {
  int64_t stride = 1;
  int64_t segment = 0;  // 0: one segment
  int64_t jump = 0;

  int64_t at(int64_t i) const { return segment == 0 ? i * stride : i / segment * jump + i % segment * stride; }
};
inline Axis segmented(int64_t stride, int64_t segment, int64_t jump) {
  return segment * stride == jump ? Axis{stride} : Axis{stride, segment, jump};
}
inline Axis token_rows(int64_t tokens, int64_t token_stride, int64_t image_stride) {
  return segmented(token_stride, tokens, image_stride);
}

struct View {
  const float* data;
  Axis rows, columns;
};
inline View transposed(const View& view) { return {view.data, view.columns, view.rows}; }

// What becomes of a product P (m, n). With v = P + bias (by column):
//   out = [out +] residual + row_scale * column_scale * v;   gelu_out = gelu(v), where wanted.
struct Output {
  float* data;
  Axis rows, columns;
  bool accumulate = false;
  const float* bias = nullptr;
  Axis bias_axis = {};
  const float* column_scale = nullptr;
  const float* row_scale = nullptr;  // one for `rows_per_scale` rows
  int64_t rows_per_scale = 1;
  const float* residual = nullptr;
  Axis residual_rows = {};
  float* gelu = nullptr;  // rows `gelu_stride` apart; may be `data`
  int64_t gelu_stride = 0;
};

// out = a (m, k) times b (k, n). `scratch`: gemm_scratch(threads) floats.
void gemm(const Threads& threads, float* scratch, int64_t m, int64_t n, int64_t k, const View& a, const View& b,
          const Output& out);
int64_t gemm_scratch(const Threads& threads);

// Lanes [lane, lane + count) and indices [depth_begin, depth_end) of an operand -> panels (depth, panel lanes), lanes
// beyond `count` zero. `to` has room for kWidth floats more than the panels take.
void pack_rows(const float* data, const Axis& lanes, const Axis& depth, int64_t lane, int64_t count,
               int64_t depth_begin, int64_t depth_end, float* to);  // panels of kTileRows lanes
void pack_columns(const float* data, const Axis& lanes, const Axis& depth, int64_t lane, int64_t count,
                  int64_t depth_begin, int64_t depth_end, float* to);  // panels of kTileColumns lanes

// out (rows, kTileColumns) [+]= a (rows, depth) times one packed panel b (depth, kTileColumns); rows <= kTileRows.
struct TileProduct {
  int64_t depth;
  const float* a;
  int64_t a_step;  // from one depth index to the next
  const float* b;
  float* out;
  int64_t out_stride;
  bool accumulate;
};
// a's rows are neighbours (packed by pack_rows, or columns of a tile stored depth by depth).
void tile_product(int64_t rows, const TileProduct& product);
// a's rows are kTileColumns apart, its depth contiguous: a tile with kTileColumns columns read along its rows.
void tile_product_along(int64_t rows, const TileProduct& product);

}  // namespace hydravit::HYDRAVIT_ISA
