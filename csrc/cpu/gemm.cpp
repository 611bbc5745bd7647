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

// kWidth depth indices of `lanes` (at most kWidth) rows -> depth-major, `panel` floats apart. The store is a whole
// vector: what it writes beyond the panel's lanes, the next depth index overwrites.
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
void pack_panel(const float* data, const Axis& lanes, const Axis& depth, int64_t lane, int64_t count,
                int64_t depth_begin, int64_t depth_end, float* to) {
  static_assert(panel % kWidth == 0 || panel < kWidth,
                "a whole-vector store must not reach into another vector's lanes");
  constexpr int kGroup = panel < kWidth ? panel : kWidth;
  const float* rows[panel];
  const int64_t first = lanes.at(lane);
  const bool neighbours = count == panel && lanes.at(lane + panel - 1) - first == panel - 1;

  for (int64_t begin = depth_begin; begin < depth_end;) {
    int64_t end = depth_end;  // of the depth indices in one segment
    if (depth.segment != 0) end = smaller(end, (begin / depth.segment + 1) * depth.segment);
    const float* base = data + depth.at(begin);
    const int64_t length = end - begin;
    int64_t k = 0;
    if (neighbours) {
      for (; k < length; k++) std::memcpy(to + k * panel, base + first + k * depth.stride, panel * sizeof(float));
    } else {
      for (int64_t i = 0; i < panel; i++) rows[i] = base + lanes.at(lane + smaller(i, count - 1));
      if (depth.stride == 1) {
        for (; k + kWidth <= length; k += kWidth)
          for (int group = 0; group < panel; group += kGroup)
            transpose_block<kGroup, panel>(rows + group, k, to + k * panel + group);
      }
      for (; k < length; k++)
        for (int64_t i = 0; i < panel; i++) to[k * panel + i] = rows[i][k * depth.stride];
    }
    to += length * panel;
    begin = end;
  }
}

template <int panel>
void pack(const float* data, const Axis& lanes, const Axis& depth, int64_t lane, int64_t count, int64_t depth_begin,
          int64_t depth_end, float* to) {
  for (int64_t i = 0; i < count; i += panel) {
    pack_panel<panel>(data, lanes, depth, lane + i, smaller<int64_t>(panel, count - i), depth_begin, depth_end, to);
    to += panel * (depth_end - depth_begin);
  }
}

// ---- The register tile ----

// The vectors along the columns of one tile.
struct ColumnVectors {
  float bias[kTileColumns], scale[kTileColumns];
};

// Where a tile's sums go: `out`, from `row` and `column` on.
struct Finish {
  const Output* out;
  int64_t row, column;
  bool first, last;  // piece of the depth
  ColumnVectors vectors;
};

void gather(Finish& finish, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    if (finish.out->bias != nullptr)
      finish.vectors.bias[i] = finish.out->bias[finish.out->bias_axis.at(finish.column + i)];
    if (finish.out->column_scale != nullptr) finish.vectors.scale[i] = finish.out->column_scale[finish.column + i];
  }
}

// Any tile, from memory: sums (rows, kTileColumns).
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
          if (out.gelu != out.data) store(to + column, value, count);
          store(out.gelu + row * out.gelu_stride + column, gelu(value), count);
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

// The last piece with GELU, for a tile of whole vectors: out of the register tile's way, but in a loop of its own.
__attribute__((noinline)) void finish_gelu(const Finish& finish, float* sums, int64_t rows, int64_t vectors) {
  const Output& out = *finish.out;
  for (int64_t i = 0; i < rows; i++) {
    const int64_t row = finish.row + i;
    float* to = out.data + out.rows.at(row) + finish.column;
    float* activated = out.gelu + row * out.gelu_stride + finish.column;
    for (int64_t j = 0; j < vectors; j++) {
      Vec value = load(sums + i * kTileColumns + j * kWidth);
      if (!finish.first) value += load(to + j * kWidth);
      if (out.bias != nullptr) value += load(finish.vectors.bias + j * kWidth);
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

// The same from registers, for whole vectors of contiguous columns: one decision per tile, not per vector.
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
  for (; k + kUnroll <= tile.depth; k += kUnroll) {
#pragma GCC unroll 16
    for (int u = 0; u < kUnroll; u++) step(u);
    __builtin_prefetch(prefetch);
    prefetch += kLine;
    a += kUnroll * (along ? 1 : tile.a_step);
    b += kUnroll * tile.b_step;
  }
  for (; k < tile.depth; k++) {
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
// By columns: one vector or two; then by rows.
template <bool along>
constexpr std::array<std::array<Compute, kTileRows>, 2> kComputes = {
    heights<1, along>(std::make_integer_sequence<int, kTileRows>()),
    heights<2, along>(std::make_integer_sequence<int, kTileRows>())};

// ---- Blocking ----

// Rows of `a` that are swept at a time: one piece of them stays in the level 2 cache.
constexpr int64_t kBlockRows = 24 * kTileRows;
constexpr int64_t kRowsScratch = round_up(kBlockRows * kPiece + kWidth, 16);
constexpr int64_t kJobScratch = kRowsScratch + round_up(kSweepScratch, 16);

// Rows read in place (`packed` false) or from panels of kTileRows rows.
struct Left {
  const float* data;
  Axis rows;
  bool packed;
};

void sweep(Range rows, Range columns, const Piece& piece, const Left& a, const View& b, const Output& out,
           float* scratch) {
  const int64_t depth = piece.depth.end - piece.depth.begin;
  Finish finish{&out, 0, 0, piece.first, piece.last, {}};
  Tile tile{};
  tile.depth = depth;
  for (int64_t column = columns.begin; column < columns.end; column += kTileColumns) {
    const int64_t count = smaller<int64_t>(kTileColumns, columns.end - column);
    const float* next = nullptr;  // panel: fetched bit by bit while this one is used
    tile.prefetch = nullptr;
    if (b.panels != nullptr) {
      tile.b = b.panels + column / kPanel * b.panel_stride + piece.depth.begin * kPanel + column % kPanel;
      tile.b_step = kPanel;
      if (column + kPanel < columns.end) next = tile.b + b.panel_stride;
    } else {
      pack_columns(b.data, b.columns, b.rows, column, count, piece.depth.begin, piece.depth.end, scratch);
      tile.b = scratch, tile.b_step = kTileColumns;
    }
    finish.column = column;
    if (piece.last) gather(finish, count);
    const int64_t vectors = count <= kWidth ? 0 : 1;
    for (int64_t row = rows.begin; row < rows.end;) {
      // Rows that are evenly spaced, in tiles as equal as can be.
      int64_t end = rows.end;
      if (!a.packed && a.rows.segment != 0) end = smaller(end, (row / a.rows.segment + 1) * a.rows.segment);
      const int64_t tiles = divide_up(end - row, kTileRows);
      const int64_t height = a.packed ? smaller<int64_t>(kTileRows, end - row) : (end - row) / tiles;
      finish.row = row;
      tile.a = a.packed ? a.data + (row - rows.begin) * depth : a.data + a.rows.at(row);
      if (next != nullptr) tile.prefetch = next + (row - rows.begin) * depth * kPanel / (rows.end - rows.begin);
      tile.a_step = a.packed ? kTileRows : a.rows.stride;
      (a.packed ? kComputes<false> : kComputes<true>)[vectors][height - 1](tile, & finish, count);
      row += height;
    }
  }
}

// One job's part of the product, with memory of its own.
void multiply(Range rows, Range columns, int64_t k, const View& a, const View& b, const Output& out, float* scratch) {
  const bool in_place = a.columns.segment == 0 && a.columns.stride == 1;
  const int64_t blocks = divide_up(rows.end - rows.begin, kBlockRows);
  const int64_t block = round_up(divide_up(rows.end - rows.begin, blocks), kTileRows);
  for (int64_t row = rows.begin; row < rows.end; row += block) {
    const Range band{row, smaller(rows.end, row + block)};
    for (int64_t i = 0; i < pieces_of(k); i++) {
      const Piece piece = piece_of(k, i);
      Left left{a.data + piece.depth.begin, a.rows, false};
      if (!in_place) {
        pack_rows(a.data, a.rows, a.columns, band.begin, band.end - band.begin, piece.depth.begin, piece.depth.end,
                  scratch);
        left = {scratch, {}, true};
      }
      sweep(band, columns, piece, left, b, out, scratch + kRowsScratch);
    }
  }
}

}  // namespace

void pack_rows(const float* data, const Axis& lanes, const Axis& depth, int64_t lane, int64_t count,
               int64_t depth_begin, int64_t depth_end, float* to) {
  pack<kTileRows>(data, lanes, depth, lane, count, depth_begin, depth_end, to);
}

void pack_columns(const float* data, const Axis& lanes, const Axis& depth, int64_t lane, int64_t count,
                  int64_t depth_begin, int64_t depth_end, float* to) {
  pack<kTileColumns>(data, lanes, depth, lane, count, depth_begin, depth_end, to);
}

void tile_across(int64_t rows, int64_t columns, const Tile& tile) {
  kComputes<false>[columns <= kWidth ? 0 : 1][rows - 1](tile, nullptr, columns);
}
void tile_along(int64_t rows, int64_t columns, const Tile& tile) {
  kComputes<true>[columns <= kWidth ? 0 : 1][rows - 1](tile, nullptr, columns);
}

void sweep(int64_t rows, Range columns, const Piece& piece, const float* a, const Axis& a_rows, const View& b,
           const Output& out, float* scratch) {
  sweep({0, rows}, columns, piece, {a, a_rows, false}, b, out, scratch);
}

int64_t gemm_scratch(const Threads& threads) { return threads.count * kJobScratch; }

void gemm(const Threads& threads, float* scratch, int64_t m, int64_t n, int64_t k, const View& a, const View& b,
          const Output& out) {
  // A grid of jobs, each of which packs what it reads: choose the one whose largest job costs least.
  constexpr int64_t kWorthAThread = 1 << 18;  // multiply-adds
  constexpr int64_t kPackCost = 16;           // of one packed element per depth index, in multiply-adds of the tile
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

int pack_weight(const Weight& weight, int64_t rows, int64_t columns, float* panels, const Threads& threads) {
  const int64_t count = divide_up(rows, kPanel);
  prefer_huge_pages(panels, count * kPanel * columns);
  parallel_ranges(threads, count, columns * kPanel, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; panel++)
      pack_panel<kPanel>(weight.data, {weight.row_stride}, {}, panel * kPanel, smaller(kPanel, rows - panel * kPanel),
                         0, columns, panels + panel * kPanel * columns);
  });
  return kOk;
}

}  // namespace hydravit::HYDRAVIT_ISA
