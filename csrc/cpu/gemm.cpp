#include "gemm.h"

#include <array>

#include "kernels.h"

namespace hydravit::HYDRAVIT_ISA {

namespace {

// ---- Packing ----

// Lanes of `a` and `b` interleaved in groups of `group`: the even groups of both (odd = 0) or the odd ones (odd = 1).
template <int group, int odd, int... lane>
inline Vec interleave(Vec a, Vec b, std::integer_sequence<int, lane...>) {
  return shuffle<((lane / group % 2 == odd ? lane : lane ^ group) + (lane / group % 2 == 0 ? 0 : kWidth))...>(a, b);
}

template <int group>
inline void transpose_step(Vec (&rows)[kWidth]) {
  constexpr auto lanes = std::make_integer_sequence<int, kWidth>();
  for (int i = 0; i < kWidth; i++) {
    if (i / group % 2 != 0) continue;
    const Vec a = rows[i], b = rows[i + group];
    rows[i] = interleave<group, 0>(a, b, lanes);
    rows[i + group] = interleave<group, 1>(a, b, lanes);
  }
  if constexpr (group > 1) transpose_step<group / 2>(rows);
}

// Transposes kWidth K indices of `lanes` (at most kWidth) rows: K indices then lie `panel` floats apart. A store writes
// a whole vector; the store of the next K index overwrites the part beyond the panel's lanes.
template <int lanes, int panel>
inline void transpose_block(const float* const* rows, int64_t k, float* to) {
  Vec block[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; i++) block[i] = i < lanes ? load(rows[i] + k) : Vec{};
  transpose_step<kWidth / 2>(block);
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; i++) store(to + i * panel, block[i]);
}

template <int panel>
void pack_panel(const float* data, const Axis& lanes, const Axis& k_axis, int64_t lane, int64_t count, int64_t k_begin,
                int64_t k_end, float* to) {
  static_assert(panel % kWidth == 0 || panel < kWidth,
                "a whole-vector store must not reach into another vector's lanes");
  constexpr int kGroup = panel < kWidth ? panel : kWidth;
  const float* rows[panel];
  for (int64_t begin = k_begin; begin < k_end;) {
    int64_t end = k_end;  // K indices [begin, end) lie in one segment
    if (k_axis.segment != 0) end = smaller(end, (begin / k_axis.segment + 1) * k_axis.segment);
    const float* base = data + k_axis.at(begin);
    const int64_t length = end - begin;
    int64_t k = 0;
    for (int64_t i = 0; i < panel; i++) rows[i] = base + lanes.at(lane + smaller(i, count - 1));
    if (k_axis.stride == 1) {
      for (; k + kWidth <= length; k += kWidth)
        for (int group = 0; group < panel; group += kGroup)
          transpose_block<kGroup, panel>(rows + group, k, to + k * panel + group);
    }
    for (; k < length; k++)
      for (int64_t i = 0; i < panel; i++) to[k * panel + i] = rows[i][k * k_axis.stride];
    to += length * panel;
    begin = end;
  }
}

// Packs whole panels whose lanes are contiguous, several panels at a time: one K index of one panel alone is a short
// run of memory in a page of its own.
template <int panel>
void pack_neighbours(const float* data, const Axis& k_axis, int64_t panels, int64_t k_begin, int64_t k_end, float* to) {
  constexpr int64_t kTogether = 8;
  const int64_t size = panel * (k_end - k_begin);
  for (int64_t first = 0; first < panels; first += kTogether) {
    const int64_t count = smaller(kTogether, panels - first);
    float* start = to + first * size;
    for (int64_t k = k_begin; k < k_end; k++, start += panel) {
      const float* from = data + k_axis.at(k) + first * panel;
      for (int64_t i = 0; i < count; i++) std::memcpy(start + i * size, from + i * panel, panel * sizeof(float));
    }
  }
}

template <int panel>
void pack(const float* data, const Axis& lanes, const Axis& k_axis, int64_t lane, int64_t count, int64_t k_begin,
          int64_t k_end, float* to) {
  const int64_t whole = count / panel;
  int64_t i = 0;
  if (whole > 0 && lanes.at(lane + whole * panel - 1) - lanes.at(lane) == whole * panel - 1) {
    pack_neighbours<panel>(data + lanes.at(lane), k_axis, whole, k_begin, k_end, to);
    i = whole * panel;
  }
  for (; i < count; i += panel)
    pack_panel<panel>(data, lanes, k_axis, lane + i, smaller<int64_t>(panel, count - i), k_begin, k_end,
                      to + i * (k_end - k_begin));
}

// ---- The register tile ----

// The vectors along the columns of one tile.
struct ColumnVectors {
  float bias[kTileColumns], scale[kTileColumns];
};

// The tile's epilogue: its sums go to `out`, with the tile origin (row, column).
struct Finish {
  const Output* out;
  int64_t row, column;
  bool first, last;  // whether the piece is the first or the last one of K
  ColumnVectors vectors;
};

void gather(Finish& finish, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    if (finish.out->bias != nullptr)
      finish.vectors.bias[i] = finish.out->bias[finish.out->bias_axis.at(finish.column + i)];
    if (finish.out->column_scale != nullptr) finish.vectors.scale[i] = finish.out->column_scale[finish.column + i];
  }
}

// The epilogue of any tile, from memory: sums (rows, kTileColumns).
__attribute__((noinline)) void finish_from_memory(const Finish& finish, const float* sums, int64_t rows,
                                                  int64_t columns) {
  const Output& out = *finish.out;
  const bool scattered = out.columns.segment != 0 || out.columns.stride != 1;
  for (int64_t i = 0; i < rows; i++) {
    const int64_t row = finish.row + i;
    float* to = out.data + out.rows.at(row);
    if (scattered) {
      for (int64_t j = 0; j < columns; j++) {
        float& element = to[out.columns.at(finish.column + j)];
        element = sums[i * kTileColumns + j] + (finish.first && !out.accumulate ? 0.0f : element);
      }
      continue;
    }
    for (int64_t j = 0; j < columns; j += kWidth) {
      const int64_t count = columns - j, column = finish.column + j;
      Vec value = load(sums + i * kTileColumns + j);
      if (!finish.first || out.accumulate) value += load(to + column, count);
      if (finish.last) {
        if (out.bias != nullptr) value += load(finish.vectors.bias + j);
        if (out.gelu != nullptr) {
          Vec hidden = value;
          if (out.hidden != nullptr) {
            hidden = load(out.hidden + out.hidden_rows.at(row) + column, count);
            value *= gelu_derivative(hidden);
          }
          if (out.gelu != out.data) store(to + column, value, count);
          store(out.gelu + row * out.gelu_stride + in_panels(column, out.gelu_panel), gelu(hidden), count);
          continue;
        }
        if (out.column_scale != nullptr) value *= load(finish.vectors.scale + j);
        if (out.row_scale != nullptr) value *= splat(out.row_scale[row / out.rows_per_scale]);
        if (out.residual != nullptr) value += load(out.residual + out.residual_rows.at(row) + column, count);
      }
      store(to + column, value, count);
    }
  }
}

// The epilogue with GELU, for the last piece and whole vectors. Apart from the register tile, GELU does not compete
// with it for registers.
__attribute__((noinline)) void finish_gelu(const Finish& finish, float* sums, int64_t rows, int64_t vectors) {
  const Output& out = *finish.out;
  for (int64_t i = 0; i < rows; i++) {
    const int64_t row = finish.row + i;
    float* to = out.data + out.rows.at(row) + finish.column;
    float* activated = out.gelu + row * out.gelu_stride + in_panels(finish.column, out.gelu_panel);
    const float* hidden = out.hidden == nullptr ? nullptr : out.hidden + out.hidden_rows.at(row) + finish.column;
    for (int64_t j = 0; j < vectors; j++) {
      Vec value = load(sums + i * kTileColumns + j * kWidth);
      if (!finish.first) value += load(to + j * kWidth);
      if (out.bias != nullptr) value += load(finish.vectors.bias + j * kWidth);
      if (hidden != nullptr) {
        const Vec h = load(hidden + j * kWidth);
        store(to + j * kWidth, value * gelu_derivative(h));
        store(activated + j * kWidth, gelu(h));
        continue;
      }
      if (activated != to) store(to + j * kWidth, value);
      store(activated + j * kWidth, gelu(value));
    }
  }
}

template <int rows, int vectors, class Body>
inline void for_each(const Body& body) {
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
    for (int j = 0; j < vectors; j++) body(i, j);
}

// The epilogue from registers, for whole vectors of contiguous columns: it decides once per tile, not once per vector.
template <int rows, int vectors>
inline void finish_from_registers(const Finish& finish, Vec (&sums)[rows][vectors]) {
  const Output& out = *finish.out;
  float* to[rows];
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++) to[i] = out.data + out.rows.at(finish.row + i) + finish.column;
  if (!finish.first || out.accumulate)
    for_each<rows, vectors>([&](int i, int j) { sums[i][j] += load(to[i] + j * kWidth); });
  if (finish.last) {
    if (out.bias != nullptr)
      for_each<rows, vectors>([&](int i, int j) { sums[i][j] += load(finish.vectors.bias + j * kWidth); });
    if (out.column_scale != nullptr)
      for_each<rows, vectors>([&](int i, int j) { sums[i][j] *= load(finish.vectors.scale + j * kWidth); });
    if (out.row_scale != nullptr)
      for_each<rows, vectors>(
          [&](int i, int j) { sums[i][j] *= splat(out.row_scale[(finish.row + i) / out.rows_per_scale]); });
    if (out.residual != nullptr)
      for_each<rows, vectors>([&](int i, int j) {
        sums[i][j] += load(out.residual + out.residual_rows.at(finish.row + i) + finish.column + j * kWidth);
      });
  }
  for_each<rows, vectors>([&](int i, int j) { store(to[i] + j * kWidth, sums[i][j]); });
}

template <int rows, int vectors, bool along>
void compute(const Tile& tile, const Finish* finish, int64_t columns) {
  Vec sums[rows][vectors];
  for_each<rows, vectors>([&](int i, int j) { sums[i][j] = Vec{}; });
  const float* a = tile.a;
  const float* b = tile.b;
  const auto step = [&](int64_t k) {
    Vec right[vectors];
    for (int j = 0; j < vectors; j++) right[j] = load(b + k * tile.b_step + j * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
      const Vec left = splat(along ? a[i * tile.a_step + k] : a[k * tile.a_step + i]);
      for (int j = 0; j < vectors; j++) sums[i][j] = left * right[j] + sums[i][j];
    }
  };
  constexpr int kUnroll = 4, kLine = 16;  // floats of a cache line
  const float* prefetch = tile.prefetch == nullptr ? tile.b : tile.prefetch;
  int64_t k = 0;
  for (; k + kUnroll <= tile.k; k += kUnroll) {
#pragma GCC unroll 16
    for (int u = 0; u < kUnroll; u++) step(u);
    __builtin_prefetch(prefetch);
    prefetch += kLine;
    a += kUnroll * (along ? 1 : tile.a_step);
    b += kUnroll * tile.b_step;
  }
  for (; k < tile.k; k++) {
    step(0);
    a += along ? 1 : tile.a_step;
    b += tile.b_step;
  }
  if (finish == nullptr) {
    for_each<rows, vectors>([&](int i, int j) {
      float* to = tile.out + i * tile.out_stride + j * kWidth;
      store(to, tile.accumulate ? load(to) + sums[i][j] : sums[i][j]);
    });
    return;
  }
  const Output& out = *finish->out;
  const bool whole = columns == vectors * kWidth && out.columns.segment == 0 && out.columns.stride == 1;
  const bool activates = out.gelu != nullptr && finish->last;
  if (whole && !activates) return finish_from_registers<rows, vectors>(*finish, sums);
  float memory[rows * kTileColumns];
  for_each<rows, vectors>([&](int i, int j) { store(memory + i * kTileColumns + j * kWidth, sums[i][j]); });
  if (whole) return finish_gelu(*finish, memory, rows, vectors);
  finish_from_memory(*finish, memory, rows, columns);
}

using Compute = void (*)(const Tile&, const Finish*, int64_t columns);

template <int vectors, bool along, int... i>
constexpr std::array<Compute, kTileRows> heights(std::integer_sequence<int, i...>) {
  return {compute<i + 1, vectors, along>...};
}
// One kernel for every tile: [vectors - 1][rows - 1].
template <bool along>
constexpr std::array<std::array<Compute, kTileRows>, 2> kComputes = {
    heights<1, along>(std::make_integer_sequence<int, kTileRows>()),
    heights<2, along>(std::make_integer_sequence<int, kTileRows>())};

// ---- Blocking ----

// Rows of `a` in one sweep: one piece of them stays in the level 2 cache.
constexpr int64_t kBlockRows = 24 * kTileRows;
// Pieces and rows of a packed left operand: as much memory as the rows above.
constexpr int64_t kSpanPieces = 3, kSpanRows = kBlockRows / kSpanPieces;
static_assert(kSpanRows % kTileRows == 0);
constexpr int64_t kRowsScratch = round_up(kSpanRows * kSpanPieces * kPiece + kWidth, 16);
constexpr int64_t kJobScratch = kRowsScratch + round_up(kTileColumns * kSpanPieces * kPiece + kWidth, 16);

// Points the tile at K indices [k.begin, k.end) of the columns from `column` on: in b's panels, or packed into
// `scratch`.
void point(Tile& tile, const View& b, int64_t column, int64_t count, const Range& k, float* scratch) {
  if (b.panels != nullptr) {
    tile.b = b.panels + column / kPanel * b.panel_stride + k.begin * kPanel + column % kPanel;
    tile.b_step = kPanel;
  } else {
    pack_columns(b.data, b.columns, b.rows, column, count, k.begin, k.end, scratch);
    tile.b = scratch, tile.b_step = kTileColumns;
  }
}

// Reads `a` in place; its data begins at the piece.
void sweep(Range rows, Range columns, const Piece& piece, const float* a, const Axis& a_rows, const View& b,
           const Output& out, float* scratch) {
  Finish finish{&out, 0, 0, piece.first, piece.last, {}};
  Tile tile{};
  tile.k = piece.k.end - piece.k.begin;
  tile.a_step = a_rows.stride;
  for (int64_t column = columns.begin; column < columns.end; column += kTileColumns) {
    const int64_t count = smaller<int64_t>(kTileColumns, columns.end - column);
    point(tile, b, column, count, piece.k, scratch);
    // Each tile prefetches a part of the next panel.
    const bool fetch = b.panels != nullptr && column + kPanel < columns.end;
    const float* next = fetch ? tile.b + b.panel_stride : nullptr;
    finish.column = column;
    if (piece.last) gather(finish, count);
    for (int64_t row = rows.begin, height; row < rows.end; row += height) {
      // A tile takes evenly spaced rows only; the tiles are as equal as possible.
      int64_t end = rows.end;
      if (a_rows.segment != 0) end = smaller(end, (row / a_rows.segment + 1) * a_rows.segment);
      height = (end - row) / divide_up(end - row, kTileRows);
      finish.row = row;
      tile.a = a + a_rows.at(row);
      tile.prefetch = fetch ? next + (row - rows.begin) * tile.k * kPanel / (rows.end - rows.begin) : nullptr;
      kComputes<true>[count <= kWidth ? 0 : 1][height - 1](tile, & finish, count);
    }
  }
}

// Packs `a`, which is not contiguous along K. The product is then the gradient of a weight: K is long and the output
// does not stay in cache, so one pass over the output serves several pieces.
void multiply_packed(Range rows, Range columns, int64_t k, const View& a, const View& b, const Output& out,
                     float* scratch) {
  float* packed_columns = scratch + kRowsScratch;
  Tile tile{};
  tile.a_step = kTileRows;
  for (int64_t row = rows.begin; row < rows.end; row += kSpanRows) {
    const int64_t row_count = smaller(kSpanRows, rows.end - row);
    for (int64_t first = 0; first < pieces_of(k); first += kSpanPieces) {
      const int64_t last = smaller(first + kSpanPieces, pieces_of(k));
      const Range span{piece_of(k, first).k.begin, piece_of(k, last - 1).k.end};
      pack_rows(a.data, a.rows, a.columns, row, row_count, span.begin, span.end, scratch);
      Finish finish{&out, 0, 0, false, false, {}};
      for (int64_t column = columns.begin; column < columns.end; column += kTileColumns) {
        const int64_t count = smaller<int64_t>(kTileColumns, columns.end - column);
        point(tile, b, column, count, span, packed_columns);
        finish.column = column;
        if (last == pieces_of(k)) gather(finish, count);
        for (int64_t i = 0; i < row_count; i += kTileRows) {
          finish.row = row + i;
          for (int64_t j = first; j < last; j++) {
            const Piece piece = piece_of(k, j);
            Tile part = tile;
            part.k = piece.k.end - piece.k.begin;
            part.a = scratch + i * (span.end - span.begin) + (piece.k.begin - span.begin) * kTileRows;
            part.b = tile.b + (piece.k.begin - span.begin) * tile.b_step;
            finish.first = piece.first, finish.last = piece.last;
            const int64_t height = smaller<int64_t>(kTileRows, row_count - i);
            kComputes<false>[count <= kWidth ? 0 : 1][height - 1](part, & finish, count);
          }
        }
      }
    }
  }
}

// One job's part of the product, in the job's own memory.
void multiply(Range rows, Range columns, int64_t k, const View& a, const View& b, const Output& out, float* scratch) {
  if (a.columns.segment != 0 || a.columns.stride != 1) return multiply_packed(rows, columns, k, a, b, out, scratch);
  const int64_t blocks = divide_up(rows.end - rows.begin, kBlockRows);
  for (int64_t block = 0; block < blocks; block++) {
    const Range part_of_rows = part(rows.end - rows.begin, block, blocks);
    const Range band{rows.begin + part_of_rows.begin, rows.begin + part_of_rows.end};
    for (int64_t i = 0; i < pieces_of(k); i++) {
      const Piece piece = piece_of(k, i);
      sweep(band, columns, piece, a.data + piece.k.begin, a.rows, b, out, scratch);
    }
  }
}

}  // namespace

void pack_rows(const float* data, const Axis& lanes, const Axis& k_axis, int64_t lane, int64_t count, int64_t k_begin,
               int64_t k_end, float* to) {
  pack<kTileRows>(data, lanes, k_axis, lane, count, k_begin, k_end, to);
}

void pack_columns(const float* data, const Axis& lanes, const Axis& k_axis, int64_t lane, int64_t count,
                  int64_t k_begin, int64_t k_end, float* to) {
  pack<kTileColumns>(data, lanes, k_axis, lane, count, k_begin, k_end, to);
}

void tile_across(int64_t rows, int64_t columns, const Tile& tile) {
  kComputes<false>[columns <= kWidth ? 0 : 1][rows - 1](tile, nullptr, columns);
}
void tile_along(int64_t rows, int64_t columns, const Tile& tile) {
  kComputes<true>[columns <= kWidth ? 0 : 1][rows - 1](tile, nullptr, columns);
}

void sweep(int64_t rows, Range columns, const Piece& piece, const float* a, const Axis& a_rows, const View& b,
           const Output& out, float* scratch) {
  sweep({0, rows}, columns, piece, a, a_rows, b, out, scratch);
}

int64_t gemm_scratch(const Threads& threads) { return threads.count * kJobScratch; }

void gemm(const Threads& threads, float* scratch, int64_t m, int64_t n, int64_t k, const View& a, const View& b,
          const Output& out) {
  // Every job packs its own operands, so the shape of the grid of jobs matters: choose the one whose largest job costs
  // least.
  constexpr int64_t kWorthAThread = 1 << 18;  // multiply-adds
  constexpr int64_t kPackCost = 16;           // multiply-adds of a tile that cost as much as packing one element
  const int64_t row_tiles = divide_up(m, kTileRows), column_tiles = divide_up(n, kTileColumns);
  const int64_t jobs = larger<int64_t>(1, smaller(threads.count, m * n * k / kWorthAThread));
  int64_t across = 1, down = 1, best = INT64_MAX;
  for (int64_t i = 1; i <= jobs; i++) {
    const int64_t tall = divide_up(row_tiles, i) * kTileRows;
    const int64_t wide = divide_up(column_tiles, jobs / i) * kTileColumns;
    const int64_t cost = tall * wide + kPackCost * (tall + wide);
    if (cost < best) best = cost, down = i, across = jobs / i;
  }
  parallel(threads, down * across, [&](int64_t job) {
    const Range tall = part(row_tiles, job / across, down), wide = part(column_tiles, job % across, across);
    if (tall.begin == tall.end || wide.begin == wide.end) return;
    multiply({tall.begin * kTileRows, smaller(m, tall.end * kTileRows)},
             {wide.begin * kTileColumns, smaller(n, wide.end * kTileColumns)}, k, a, b, out,
             scratch + job * kJobScratch);
  });
}

void pack_right(const Threads& threads, int64_t k, int64_t n, const View& b, float* panels) {
  prefer_huge_pages(panels, panels_size(k, n));
  parallel_ranges(threads, divide_up(n, kPanel), k * kPanel, [&](int64_t begin, int64_t end) {
    pack<kPanel>(b.data, b.columns, b.rows, begin * kPanel, smaller(n, end * kPanel) - begin * kPanel, 0, k,
                 panels + begin * kPanel * k);
  });
}

int pack_weight(const Weight& weight, int64_t rows, int64_t columns, float* panels, const Threads& threads) {
  pack_right(threads, columns, rows, transposed(weight), panels);
  return kOk;
}

}  // namespace hydravit::HYDRAVIT_ISA
