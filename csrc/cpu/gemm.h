// Matrix product over strided operands, read where they lie: packing is the only pass over them.
//
// Every output element is the sum of chains of multiply-adds along the depth, cut at places that depend on the depth
// alone. So its bits do not depend on the number of rows, on where its tile lies, or on the thread count.
#pragma once

#include <cstdint>

#include "../hydravit.h"
#include "parallel.h"
#include "vector.h"

namespace hydravit::HYDRAVIT_ISA {

// The register tile: kTileRows rows (one broadcast each) by kTileColumns columns (two vectors).
#if defined(__AVX512F__)
constexpr int kTileRows = 14;
#elif defined(__AVX__)
constexpr int kTileRows = 6;
#elif defined(__aarch64__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileColumns = 2 * kWidth;
static_assert(kPanel % kTileColumns == 0);

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
  const float* panels = nullptr;  // of a right operand: packed, see kPanel; `data` is then not read
  int64_t panel_stride = 0;
};
inline View transposed(const View& view) { return {view.data, view.columns, view.rows}; }
// A right operand's columns from `column` on, a multiple of kPanel.
inline View columns_from(const View& view, int64_t column) {
  const float* panels = view.panels == nullptr ? nullptr : view.panels + column / kPanel * view.panel_stride;
  return {view.data + view.columns.at(column), view.rows, view.columns, panels, view.panel_stride};
}
// A weight's rows from `row` on, a multiple of kPanel.
inline Weight rows_from(const Weight& weight, int64_t row) {
  const float* panels = weight.panels == nullptr ? nullptr : weight.panels + row / kPanel * weight.panel_stride;
  return {weight.data + row * weight.row_stride, weight.row_stride, panels, weight.panel_stride};
}
// The right operand of x W^T: W (rows, columns).
inline View transposed(const Weight& weight, const Axis& rows) {
  return {weight.data, {}, rows, weight.panels, weight.panel_stride};
}
inline View transposed(const Weight& weight) { return transposed(weight, {weight.row_stride}); }

// What becomes of a product P (m, n). With v = P + bias (by column):
//   out = [out +] residual + row_scale * column_scale * v;
//   where `gelu` is given: out = v and gelu = gelu(v), or that alone if they are one. The others are then not;
//   where `hidden` is given as well: out = v * gelu'(hidden) and gelu = gelu(hidden).
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
  float* gelu = nullptr;  // rows `gelu_stride` apart, kPanel columns `gelu_panel` apart; may be `data`
  int64_t gelu_stride = 0, gelu_panel = kPanel;
  const float* hidden = nullptr;
  Axis hidden_rows = {};
};

// A right operand (k, n) -> panels, one after the other: panels_size(k, n) floats.
void pack_right(const Threads& threads, int64_t k, int64_t n, const View& b, float* panels);
inline int64_t panels_size(int64_t k, int64_t n) { return round_up(n, kPanel) * k; }
// Where a column's first element lies in panels, or in anything whose every kPanel columns are `panel` apart.
inline int64_t in_panels(int64_t column, int64_t panel) { return column / kPanel * panel + column % kPanel; }
// The same, and `weight`, or `b` itself, is read from there.
inline void use_packed(const Threads& threads, int64_t k, int64_t n, const View& b, float* panels, Weight& weight) {
  pack_right(threads, k, n, b, panels);
  weight.panels = panels, weight.panel_stride = kPanel * k;
}
inline void use_packed(const Threads& threads, int64_t k, int64_t n, float* panels, View& b) {
  pack_right(threads, k, n, b, panels);
  b.panels = panels, b.panel_stride = kPanel * k;
}

// Rows of a buffer of our own: 16 floats longer than a power of two could be, or neighbouring rows would share cache
// sets.
inline int64_t padded_row(int64_t channels) { return round_up(channels, 16) + 16; }

// out = a (m, k) times b (k, n), split over the threads. `scratch`: gemm_scratch(threads) floats.
void gemm(const Threads& threads, float* scratch, int64_t m, int64_t n, int64_t k, const View& a, const View& b,
          const Output& out);
int64_t gemm_scratch(const Threads& threads);

// The depth is cut into equal pieces of whole panels: longer chains would cost precision and leave the cache.
constexpr int64_t kPiece = 384;
static_assert(kPiece % kPanel == 0);
inline int64_t pieces_of(int64_t depth) { return larger<int64_t>(1, divide_up(depth, kPiece)); }
struct Piece {
  Range depth;
  bool first, last;
};
inline Piece piece_of(int64_t depth, int64_t i) {
  const int64_t count = pieces_of(depth);
  const Range panels = part(divide_up(depth, kPanel), i, count);
  return {{panels.begin * kPanel, smaller(depth, panels.end * kPanel)}, i == 0, i == count - 1};
}

// This thread alone: out's `columns` [+]= one piece of the product of a's first `rows` rows with b. Every depth index
// of a row is a neighbour of the next in `a`, whose data begins at the piece. `scratch`: kSweepScratch floats.
void sweep(int64_t rows, Range columns, const Piece& piece, const float* a, const Axis& a_rows, const View& b,
           const Output& out, float* scratch);
constexpr int64_t kSweepScratch = kTileColumns * kPiece + kWidth;

// All pieces, all columns: rows of a contiguous.
inline void multiply_rows(int64_t rows, int64_t n, int64_t k, const float* a, const Axis& a_rows, const View& b,
                          const Output& out, float* scratch) {
  for (int64_t i = 0; i < pieces_of(k); i++) {
    const Piece piece = piece_of(k, i);
    sweep(rows, {0, n}, piece, a + piece.depth.begin, a_rows, b, out, scratch);
  }
}

// Lanes [lane, lane + count) and indices [depth_begin, depth_end) of an operand -> panels (depth, panel lanes), lanes
// beyond `count` as the last one. `to` has room for kWidth floats more than the panels take.
void pack_rows(const float* data, const Axis& lanes, const Axis& depth, int64_t lane, int64_t count,
               int64_t depth_begin, int64_t depth_end, float* to);  // panels of kTileRows lanes
void pack_columns(const float* data, const Axis& lanes, const Axis& depth, int64_t lane, int64_t count,
                  int64_t depth_begin, int64_t depth_end, float* to);  // panels of kTileColumns lanes

// One register tile: out (rows, columns) [+]= a (rows, depth) times b (depth, columns), rows <= kTileRows, columns <=
// kTileColumns. b's rows are `b_step` apart and readable up to a whole vector.
struct Tile {
  int64_t depth;
  const float* a;
  int64_t a_step;
  const float* b;
  int64_t b_step;
  float* out;
  int64_t out_stride;
  bool accumulate;
  const float* prefetch = nullptr;  // what will be needed next: four floats are fetched per depth index; nullable
};
// a's rows are neighbours, its depth indices `a_step` apart (packed by pack_rows; columns of a row-major tile).
void tile_across(int64_t rows, int64_t columns, const Tile& tile);
// a's depth indices are neighbours, its rows `a_step` apart: row-major.
void tile_along(int64_t rows, int64_t columns, const Tile& tile);

}  // namespace hydravit::HYDRAVIT_ISA
