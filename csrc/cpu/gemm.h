// Matrix product P (m, n) = A (m, K) B (K, n) of strided operands. They are read in place, or repacked into panels.
//
// An output element is the sum of one chain of multiply-adds for each piece of K. Where the pieces begin depends on K
// alone, so the bits of an element do not depend on the number of rows, on the tile origin or on the thread count.
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
// A panel (hydravit.h) has the columns of one register tile, which reads it line by line.
constexpr int64_t kPanel = kTileColumns;
static_assert(kPanelMultiple % kPanel == 0);

// The memory offset of index i is i * stride; or, in segments of `segment` indices (rows or columns of one head, tokens
// of one image) that lie `jump` elements apart, i / segment * jump + i % segment * stride.
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

// An operand. Where `panels` is not null, a right operand is read there instead of in `data`, see hydravit.h.
struct View {
  const float* data;
  Axis rows, columns;
  const float* panels = nullptr;
  int64_t panel_stride = 0;
};
inline View transposed(const View& view) { return {view.data, view.columns, view.rows}; }
// The columns of a right operand from `column` on, which is a multiple of kPanel.
inline View columns_from(const View& view, int64_t column) {
  const float* panels = view.panels == nullptr ? nullptr : view.panels + column / kPanel * view.panel_stride;
  return {view.data + view.columns.at(column), view.rows, view.columns, panels, view.panel_stride};
}
// The rows of a weight from `row` on, which is a multiple of kPanel.
inline Weight rows_from(const Weight& weight, int64_t row) {
  const float* panels = weight.panels == nullptr ? nullptr : weight.panels + row / kPanel * weight.panel_stride;
  return {weight.data + row * weight.row_stride, weight.row_stride, panels, weight.panel_stride};
}
// The right operand of x W^T: W (rows, columns).
inline View transposed(const Weight& weight, const Axis& rows) {
  return {weight.data, {}, rows, weight.panels, weight.panel_stride};
}
inline View transposed(const Weight& weight) { return transposed(weight, {weight.row_stride}); }

// The epilogue of a product P (m, n), with v = P + bias (one per column):
//   without `gelu`:            out = [out +] residual + row_scale * column_scale * v
//   with `gelu`:               out = v and gelu = gelu(v); gelu(v) alone if both are the same memory
//   with `gelu` and `hidden`:  out = v * gelu'(hidden) and gelu = gelu(hidden)
// An epilogue with `gelu` reads neither residual nor scales.
struct Epilogue {
  float* data;  // out
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

// Copies a right operand (K, n) to panels, one after the other: panels_size(K, n) floats.
void copy_to_panels(const Threads& threads, int64_t k, int64_t n, const View& b, float* panels);
inline int64_t panels_size(int64_t k, int64_t n) { return round_up(n, kPanel) * k; }
// The offset of the first element of a column, in memory whose groups of kPanel columns lie `panel` apart.
inline int64_t in_panels(int64_t column, int64_t panel) { return column / kPanel * panel + column % kPanel; }
// Repacks a right operand and makes `weight`, or `b` itself, refer to the panels.
inline void repack_right(const Threads& threads, int64_t k, int64_t n, const View& b, float* panels, Weight& weight) {
  copy_to_panels(threads, k, n, b, panels);
  weight.panels = panels, weight.panel_stride = kPanel * k;
}
inline void repack_right(const Threads& threads, int64_t k, int64_t n, float* panels, View& b) {
  copy_to_panels(threads, k, n, b, panels);
  b.panels = panels, b.panel_stride = kPanel * k;
}

// Row length of the kernels' own buffers. It is never a power of two: neighbouring rows would then compete for the same
// cache sets.
inline int64_t padded_row(int64_t channels) { return round_up(channels, 16) + 16; }

// a (m, K) times b (K, n), split over the threads. `scratch`: gemm_scratch(threads) floats.
void gemm(const Threads& threads, float* scratch, int64_t m, int64_t n, int64_t k, const View& a, const View& b,
          const Epilogue& epilogue);
int64_t gemm_scratch(const Threads& threads);

// K is cut into pieces of kPiece indices at most: longer chains would lose precision, and their operands would not stay
// in cache. A piece begins at a multiple of kPanel.
constexpr int64_t kPiece = 384;
static_assert(kPiece % kPanel == 0);
inline int64_t pieces_of(int64_t k) { return larger<int64_t>(1, divide_up(k, kPiece)); }
struct Piece {
  Range k;
  bool first, last;
};
inline Piece piece_of(int64_t k, int64_t i) {
  const int64_t count = pieces_of(k);
  const Range panels = part(divide_up(k, kPanel), i, count);
  return {{panels.begin * kPanel, smaller(k, panels.end * kPanel)}, i == 0, i == count - 1};
}

// Adds one piece of K to `columns` of a's first `rows` rows times b, by this thread alone. The first piece overwrites
// what is there, unless the epilogue accumulates; the last one also does the rest of the epilogue. a is contiguous
// along K and begins at the piece. `scratch`: kPieceScratch floats.
void add_piece(int64_t rows, Range columns, const Piece& piece, const float* a, const Axis& a_rows, const View& b,
               const Epilogue& epilogue, float* scratch);
constexpr int64_t kPieceScratch = kTileColumns * kPiece + kWidth;

// The same for all pieces and all columns.
inline void multiply_rows(int64_t rows, int64_t n, int64_t k, const float* a, const Axis& a_rows, const View& b,
                          const Epilogue& epilogue, float* scratch) {
  for (int64_t i = 0; i < pieces_of(k); i++) {
    const Piece piece = piece_of(k, i);
    add_piece(rows, {0, n}, piece, a + piece.k.begin, a_rows, b, epilogue, scratch);
  }
}

// Repacks lanes (rows of a left operand, columns of a right one) [lane, lane + count) and K indices [k_begin, k_end)
// into panels (K, lanes of a panel). Lanes beyond `count` repeat the last one. `to` has room for kWidth floats more
// than the panels take.
void repack_rows(const float* data, const Axis& lanes, const Axis& k_axis, int64_t lane, int64_t count, int64_t k_begin,
                 int64_t k_end, float* to);  // panels of kTileRows lanes
void repack_columns(const float* data, const Axis& lanes, const Axis& k_axis, int64_t lane, int64_t count,
                    int64_t k_begin, int64_t k_end, float* to);  // panels of kTileColumns lanes

// One register tile: out (rows, columns) [+]= a (rows, K) times b (K, columns), with at most kTileRows rows and
// kTileColumns columns. The rows of b lie kTileColumns apart and are readable up to a whole vector.
struct Tile {
  int64_t k;
  const float* a;
  int64_t a_step;
  const float* b;
  float* out;
  int64_t out_stride;
  bool accumulate;
  const float* prefetch = nullptr;  // the tile prefetches eight floats per K index from here; nullable
};
// a is contiguous along its rows, and its K indices lie `a_step` apart, as repack_rows leaves them.
void tile_across(int64_t rows, int64_t columns, const Tile& tile);
// a is contiguous along K, and its rows lie `a_step` apart.
void tile_along(int64_t rows, int64_t columns, const Tile& tile);

}  // namespace hydravit::HYDRAVIT_ISA
