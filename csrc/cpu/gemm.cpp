#include "gemm.h"

#include <array>

#include "kernels.h"

namespace hydravit::HYDRAVIT_ISA {

namespace {

// ---- Copies to panels ----

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

// Transposes kWidth K indices of `lanes` (at most kWidth) rows, so that K indices lie `panel` floats apart. A store
// writes a whole vector; the store of the next K index overwrites what lies beyond the panel's lanes.
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
void copy_panel(const float* data, const Axis& lanes, const Axis& k_axis, int64_t lane, int64_t count, int64_t k_begin,
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

// Copies whole panels whose lanes are contiguous, several panels at a time: one K index of a single panel would be a
// few floats in a page of memory of their own.
template <int panel>
void copy_neighbours(const float* data, const Axis& k_axis, int64_t panels, int64_t k_begin, int64_t k_end, float* to) {
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
void copy_to_panels(const float* data, const Axis& lanes, const Axis& k_axis, int64_t lane, int64_t count,
                    int64_t k_begin, int64_t k_end, float* to) {
  const int64_t whole = count / panel;
  int64_t i = 0;
  if (whole > 0 && lanes.at(lane + whole * panel - 1) - lanes.at(lane) == whole * panel - 1) {
    copy_neighbours<panel>(data + lanes.at(lane), k_axis, whole, k_begin, k_end, to);
    i = whole * panel;
  }
  for (; i < count; i += panel)
    copy_panel<panel>(data, lanes, k_axis, lane + i, smaller<int64_t>(panel, count - i), k_begin, k_end,
                      to + i * (k_end - k_begin));
}

// ---- The register tile ----

// The product's epilogue for one tile and one piece of K.
struct TileEpilogue {
  const Epilogue* epilogue;
  int64_t row, column;  // the tile origin
  bool first, last;     // whether the piece is the first or the last one of K
  float bias[kTileColumns], scale[kTileColumns];
};

// Reads bias and column scale of the tile's columns.
void read_columns(TileEpilogue& tile, int64_t count) {
  const Epilogue& epilogue = *tile.epilogue;
  for (int64_t i = 0; i < count; i++) {
    if (epilogue.bias != nullptr) tile.bias[i] = epilogue.bias[epilogue.bias_axis.at(tile.column + i)];
    if (epilogue.column_scale != nullptr) tile.scale[i] = epilogue.column_scale[tile.column + i];
  }
}

// The epilogue of any tile, whose sums (rows, kTileColumns) are in memory.
__attribute__((noinline)) void epilogue_from_memory(const TileEpilogue& tile, const float* sums, int64_t rows,
                                                    int64_t columns) {
  const Epilogue& epilogue = *tile.epilogue;
  const bool scattered = epilogue.columns.segment != 0 || epilogue.columns.stride != 1;
  for (int64_t i = 0; i < rows; i++) {
    const int64_t row = tile.row + i;
    float* to = epilogue.data + epilogue.rows.at(row);
    if (scattered) {
      for (int64_t j = 0; j < columns; j++) {
        float& element = to[epilogue.columns.at(tile.column + j)];
        element = sums[i * kTileColumns + j] + (tile.first && !epilogue.accumulate ? 0.0f : element);
      }
      continue;
    }
    for (int64_t j = 0; j < columns; j += kWidth) {
      const int64_t count = columns - j, column = tile.column + j;
      Vec value = load(sums + i * kTileColumns + j);
      if (!tile.first || epilogue.accumulate) value += load(to + column, count);
      if (tile.last) {
        if (epilogue.bias != nullptr) value += load(tile.bias + j);
        if (epilogue.gelu != nullptr) {
          Vec hidden = value;
          if (epilogue.hidden != nullptr) {
            hidden = load(epilogue.hidden + epilogue.hidden_rows.at(row) + column, count);
            value *= gelu_derivative(hidden);
          }
          if (epilogue.gelu != epilogue.data) store(to + column, value, count);
          store(epilogue.gelu + row * epilogue.gelu_stride + in_panels(column, epilogue.gelu_panel), gelu(hidden),
                count);
          continue;
        }
        if (epilogue.column_scale != nullptr) value *= load(tile.scale + j);
        if (epilogue.row_scale != nullptr) value *= splat(epilogue.row_scale[row / epilogue.rows_per_scale]);
        if (epilogue.residual != nullptr)
          value += load(epilogue.residual + epilogue.residual_rows.at(row) + column, count);
      }
      store(to + column, value, count);
    }
  }
}

// The epilogue with GELU, for the last piece and whole vectors. It is not inlined, so that GELU does not take registers
// from the register tile.
__attribute__((noinline)) void epilogue_gelu(const TileEpilogue& tile, float* sums, int64_t rows, int64_t vectors) {
  const Epilogue& epilogue = *tile.epilogue;
  for (int64_t i = 0; i < rows; i++) {
    const int64_t row = tile.row + i;
    float* to = epilogue.data + epilogue.rows.at(row) + tile.column;
    float* activated = epilogue.gelu + row * epilogue.gelu_stride + in_panels(tile.column, epilogue.gelu_panel);
    const float* hidden =
        epilogue.hidden == nullptr ? nullptr : epilogue.hidden + epilogue.hidden_rows.at(row) + tile.column;
    for (int64_t j = 0; j < vectors; j++) {
      Vec value = load(sums + i * kTileColumns + j * kWidth);
      if (!tile.first) value += load(to + j * kWidth);
      if (epilogue.bias != nullptr) value += load(tile.bias + j * kWidth);
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

// Calls body(i) for i in [0, count), where every i is a constant: an array that is indexed by it stays in registers,
// which a loop that the compiler unrolls does not promise.
template <int count, class Body>
inline void unrolled(const Body& body) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (body(std::integral_constant<int, i>()), ...);
  }(std::make_integer_sequence<int, count>());
}
template <int rows, int vectors, class Body>
inline void for_each(const Body& body) {
  unrolled<rows * vectors>([&](auto i) { body(i / vectors, i % vectors); });
}

// The epilogue of sums in registers, for whole vectors of contiguous columns: it decides once per tile, not once per
// vector.
template <int rows, int vectors>
inline void epilogue_from_registers(const TileEpilogue& tile, Vec (&sums)[rows][vectors]) {
  const Epilogue& epilogue = *tile.epilogue;
  float* to[rows];
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++) to[i] = epilogue.data + epilogue.rows.at(tile.row + i) + tile.column;
  if (!tile.first || epilogue.accumulate)
    for_each<rows, vectors>([&](int i, int j) { sums[i][j] += load(to[i] + j * kWidth); });
  if (tile.last) {
    if (epilogue.bias != nullptr)
      for_each<rows, vectors>([&](int i, int j) { sums[i][j] += load(tile.bias + j * kWidth); });
    if (epilogue.column_scale != nullptr)
      for_each<rows, vectors>([&](int i, int j) { sums[i][j] *= load(tile.scale + j * kWidth); });
    if (epilogue.row_scale != nullptr)
      for_each<rows, vectors>(
          [&](int i, int j) { sums[i][j] *= splat(epilogue.row_scale[(tile.row + i) / epilogue.rows_per_scale]); });
    if (epilogue.residual != nullptr)
      for_each<rows, vectors>([&](int i, int j) {
        sums[i][j] += load(epilogue.residual + epilogue.residual_rows.at(tile.row + i) + tile.column + j * kWidth);
      });
  }
  for_each<rows, vectors>([&](int i, int j) { store(to[i] + j * kWidth, sums[i][j]); });
}

// It is flattened, because sums that a function captures are in memory until the compiler has inlined that function.
// With the checks of a sanitizer in it, compiling the flat code would take many minutes.
#ifndef __SANITIZE_ADDRESS__
#define HYDRAVIT_FLATTEN __attribute__((flatten))
#else
#define HYDRAVIT_FLATTEN
#endif
template <int rows, int vectors, bool along>
HYDRAVIT_FLATTEN void compute(const Tile& tile, const TileEpilogue* tile_epilogue, int64_t columns) {
  Vec sums[rows][vectors];
  for_each<rows, vectors>([&](int i, int j) { sums[i][j] = Vec{}; });
  // Along K, the address of a row is a pointer plus zero, one or two steps, which x86 and ARM compute inside of the
  // load: kGroup rows share a pointer. Across K, every step of the loop has one.
  constexpr int kUnroll = 2;  // more would not leave the compiler enough registers
  constexpr int kGroup = 3, kPointers = along ? divide_up(rows, kGroup) : kUnroll;
  int64_t a_step = tile.a_step;
  const float *a[kPointers], *b;
  const auto go_to = [&](int64_t k) {
    unrolled<kPointers>([&](auto i) { a[i] = tile.a + i * (along ? kGroup : 1) * a_step + k * (along ? 1 : a_step); });
    b = tile.b + k * kTileColumns;
  };
  const auto left = [&](auto i, auto k) {
    if constexpr (along)
      return splat(a[i / kGroup][i % kGroup * a_step + k]);
    else
      return splat(a[k][i]);
  };
  const auto step = [&](auto k) {
    Vec right[vectors];
    unrolled<vectors>([&](auto j) { right[j] = load(b + k * kTileColumns + j * kWidth); });
    unrolled<rows>([&](auto i) {
      const Vec value = left(i, k);
      unrolled<vectors>([&](auto j) { sums[i][j] = value * right[j] + sums[i][j]; });
    });
  };
  constexpr int kLine = 16;  // floats of a cache line
  const float* prefetch = tile.prefetch == nullptr ? tile.b : tile.prefetch;
  go_to(0);
  for (int64_t turns = tile.k / kUnroll; turns > 0; turns--) {
    // To the compiler the step may change here. Else it would precompute an index for every row and turn, more than
    // there are registers.
    __asm__("" : "+r"(a_step));
    unrolled<kUnroll>(step);
    __builtin_prefetch(prefetch);
    prefetch += kLine;
    unrolled<kPointers>([&](auto i) { a[i] += kUnroll * (along ? 1 : a_step); });
    b += kUnroll * kTileColumns;
  }
  for (int64_t k = tile.k / kUnroll * kUnroll; k < tile.k; k++) {
    go_to(k);
    step(std::integral_constant<int, 0>());
  }
  if (tile_epilogue == nullptr) {
    for_each<rows, vectors>([&](int i, int j) {
      float* to = tile.out + i * tile.out_stride + j * kWidth;
      store(to, tile.accumulate ? load(to) + sums[i][j] : sums[i][j]);
    });
    return;
  }
  const Epilogue& epilogue = *tile_epilogue->epilogue;
  const bool whole = columns == vectors * kWidth && epilogue.columns.segment == 0 && epilogue.columns.stride == 1;
  const bool activates = epilogue.gelu != nullptr && tile_epilogue->last;
  if (whole && !activates) return epilogue_from_registers<rows, vectors>(*tile_epilogue, sums);
  float memory[rows * kTileColumns];
  for_each<rows, vectors>([&](int i, int j) { store(memory + i * kTileColumns + j * kWidth, sums[i][j]); });
  if (whole) return epilogue_gelu(*tile_epilogue, memory, rows, vectors);
  epilogue_from_memory(*tile_epilogue, memory, rows, columns);
}

using Compute = void (*)(const Tile&, const TileEpilogue*, int64_t columns);

template <int vectors, bool along, int... i>
constexpr std::array<Compute, kTileRows> heights(std::integer_sequence<int, i...>) {
  return {compute<i + 1, vectors, along>...};
}
// One kernel for every size of a tile: [vectors - 1][rows - 1].
template <bool along>
constexpr std::array<std::array<Compute, kTileRows>, 2> kComputes = {
    heights<1, along>(std::make_integer_sequence<int, kTileRows>()),
    heights<2, along>(std::make_integer_sequence<int, kTileRows>())};

// ---- Bands, pieces and spans ----

// Rows of a band: one piece of them stays in the level 2 cache.
constexpr int64_t kGemmBandRows = 24 * kTileRows;
// A span has kSpanPieces pieces and a band of repacked rows has kSpanRows rows, so that a span of the band takes as
// much memory as a piece of kGemmBandRows rows.
constexpr int64_t kSpanPieces = 3, kSpanRows = kGemmBandRows / kSpanPieces;
static_assert(kSpanRows % kTileRows == 0);
constexpr int64_t kRowsScratch = round_up(kSpanRows * kSpanPieces * kPiece + kWidth, 16);
constexpr int64_t kJobScratch = kRowsScratch + round_up(kTileColumns * kSpanPieces * kPiece + kWidth, 16);

// Makes the tile read K indices [k.begin, k.end) of b's columns [column, column + count): in b's panels, or repacked in
// `scratch`.
void point(Tile& tile, const View& b, int64_t column, int64_t count, const Range& k, float* scratch) {
  if (b.panels != nullptr) {
    tile.b = b.panels + column / kPanel * b.panel_stride + k.begin * kPanel;
  } else {
    repack_columns(b.data, b.columns, b.rows, column, count, k.begin, k.end, scratch);
    tile.b = scratch;
  }
}

void add_piece(Range rows, Range columns, const Piece& piece, const float* a, const Axis& a_rows, const View& b,
               const Epilogue& epilogue, float* scratch) {
  TileEpilogue tile_epilogue{&epilogue, 0, 0, piece.first, piece.last, {}, {}};
  Tile tile{};
  tile.k = piece.k.end - piece.k.begin;
  tile.a_step = a_rows.stride;
  for (int64_t column = columns.begin; column < columns.end; column += kTileColumns) {
    const int64_t count = smaller<int64_t>(kTileColumns, columns.end - column);
    point(tile, b, column, count, piece.k, scratch);
    // Each tile prefetches a part of the next panel.
    const bool fetch = b.panels != nullptr && column + kPanel < columns.end;
    const float* next = fetch ? tile.b + b.panel_stride : nullptr;
    tile_epilogue.column = column;
    if (piece.last) read_columns(tile_epilogue, count);
    for (int64_t row = rows.begin, height; row < rows.end; row += height) {
      // A tile takes evenly spaced rows only; the tiles are as equal as possible.
      int64_t end = rows.end;
      if (a_rows.segment != 0) end = smaller(end, (row / a_rows.segment + 1) * a_rows.segment);
      height = (end - row) / divide_up(end - row, kTileRows);
      tile_epilogue.row = row;
      tile.a = a + a_rows.at(row);
      tile.prefetch = fetch ? next + (row - rows.begin) * tile.k * kPanel / (rows.end - rows.begin) : nullptr;
      kComputes<true>[count <= kWidth ? 0 : 1][height - 1](tile, & tile_epilogue, count);
    }
  }
}

// Repacks a, which is not contiguous along K. The product is then the gradient of a weight: K is long and the result
// does not stay in cache, so one pass over the result serves all pieces of a span.
void multiply_repacked(Range rows, Range columns, int64_t k, const View& a, const View& b, const Epilogue& epilogue,
                       float* scratch) {
  float* repacked_columns = scratch + kRowsScratch;
  Tile tile{};
  tile.a_step = kTileRows;
  for (int64_t row = rows.begin; row < rows.end; row += kSpanRows) {
    const int64_t row_count = smaller(kSpanRows, rows.end - row);
    for (int64_t first = 0; first < pieces_of(k); first += kSpanPieces) {
      const int64_t last = smaller(first + kSpanPieces, pieces_of(k));
      const Range span{piece_of(k, first).k.begin, piece_of(k, last - 1).k.end};
      repack_rows(a.data, a.rows, a.columns, row, row_count, span.begin, span.end, scratch);
      TileEpilogue tile_epilogue{&epilogue, 0, 0, false, false, {}, {}};
      for (int64_t column = columns.begin; column < columns.end; column += kTileColumns) {
        const int64_t count = smaller<int64_t>(kTileColumns, columns.end - column);
        point(tile, b, column, count, span, repacked_columns);
        tile_epilogue.column = column;
        if (last == pieces_of(k)) read_columns(tile_epilogue, count);
        for (int64_t i = 0; i < row_count; i += kTileRows) {
          tile_epilogue.row = row + i;
          for (int64_t j = first; j < last; j++) {
            const Piece piece = piece_of(k, j);
            Tile of_piece = tile;
            of_piece.k = piece.k.end - piece.k.begin;
            of_piece.a = scratch + i * (span.end - span.begin) + (piece.k.begin - span.begin) * kTileRows;
            of_piece.b = tile.b + (piece.k.begin - span.begin) * kTileColumns;
            tile_epilogue.first = piece.first, tile_epilogue.last = piece.last;
            const int64_t height = smaller<int64_t>(kTileRows, row_count - i);
            kComputes<false>[count <= kWidth ? 0 : 1][height - 1](of_piece, & tile_epilogue, count);
          }
        }
      }
    }
  }
}

// The rows and columns of one job, in the job's own memory.
void multiply(Range rows, Range columns, int64_t k, const View& a, const View& b, const Epilogue& epilogue,
              float* scratch) {
  if (a.columns.segment != 0 || a.columns.stride != 1)
    return multiply_repacked(rows, columns, k, a, b, epilogue, scratch);
  const int64_t bands = divide_up(rows.end - rows.begin, kGemmBandRows);
  for (int64_t i = 0; i < bands; i++) {
    const Range of_rows = part(rows.end - rows.begin, i, bands);
    const Range band{rows.begin + of_rows.begin, rows.begin + of_rows.end};
    for (int64_t j = 0; j < pieces_of(k); j++) {
      const Piece piece = piece_of(k, j);
      add_piece(band, columns, piece, a.data + piece.k.begin, a.rows, b, epilogue, scratch);
    }
  }
}

}  // namespace

void repack_rows(const float* data, const Axis& lanes, const Axis& k_axis, int64_t lane, int64_t count, int64_t k_begin,
                 int64_t k_end, float* to) {
  copy_to_panels<kTileRows>(data, lanes, k_axis, lane, count, k_begin, k_end, to);
}

void repack_columns(const float* data, const Axis& lanes, const Axis& k_axis, int64_t lane, int64_t count,
                    int64_t k_begin, int64_t k_end, float* to) {
  copy_to_panels<kTileColumns>(data, lanes, k_axis, lane, count, k_begin, k_end, to);
}

void tile_across(int64_t rows, int64_t columns, const Tile& tile) {
  kComputes<false>[columns <= kWidth ? 0 : 1][rows - 1](tile, nullptr, columns);
}
void tile_along(int64_t rows, int64_t columns, const Tile& tile) {
  kComputes<true>[columns <= kWidth ? 0 : 1][rows - 1](tile, nullptr, columns);
}

void add_piece(int64_t rows, Range columns, const Piece& piece, const float* a, const Axis& a_rows, const View& b,
               const Epilogue& epilogue, float* scratch) {
  add_piece({0, rows}, columns, piece, a, a_rows, b, epilogue, scratch);
}

int64_t gemm_scratch(const Threads& threads) { return threads.count * kJobScratch; }

void gemm(const Threads& threads, float* scratch, int64_t m, int64_t n, int64_t k, const View& a, const View& b,
          const Epilogue& epilogue) {
  // Every job repacks its own operands, so the shape of the grid of jobs matters: the best is the one whose largest job
  // costs least.
  constexpr int64_t kWorthAThread = 1 << 18;  // multiply-adds
  constexpr int64_t kRepackCost = 16;         // multiply-adds of a tile that cost as much as repacking one element
  const int64_t row_tiles = divide_up(m, kTileRows), column_tiles = divide_up(n, kTileColumns);
  const int64_t jobs = larger<int64_t>(1, smaller(threads.count, m * n * k / kWorthAThread));
  int64_t across = 1, down = 1, best = INT64_MAX;
  for (int64_t i = 1; i <= jobs; i++) {
    const int64_t tall = divide_up(row_tiles, i) * kTileRows;
    const int64_t wide = divide_up(column_tiles, jobs / i) * kTileColumns;
    const int64_t cost = tall * wide + kRepackCost * (tall + wide);
    if (cost < best) best = cost, down = i, across = jobs / i;
  }
  parallel(threads, down * across, [&](int64_t job) {
    const Range tall = part(row_tiles, job / across, down), wide = part(column_tiles, job % across, across);
    if (tall.begin == tall.end || wide.begin == wide.end) return;
    multiply({tall.begin * kTileRows, smaller(m, tall.end * kTileRows)},
             {wide.begin * kTileColumns, smaller(n, wide.end * kTileColumns)}, k, a, b, epilogue,
             scratch + job * kJobScratch);
  });
}

void copy_to_panels(const Threads& threads, int64_t k, int64_t n, const View& b, float* panels) {
  prefer_huge_pages(panels, panels_size(k, n));
  parallel_ranges(threads, divide_up(n, kPanel), k * kPanel, [&](int64_t begin, int64_t end) {
    copy_to_panels<kPanel>(b.data, b.columns, b.rows, begin * kPanel, smaller(n, end * kPanel) - begin * kPanel, 0, k,
                           panels + begin * kPanel * k);
  });
}

const int64_t panel_rows = kPanel;
int pack_weight(const Weight& weight, int64_t rows, int64_t columns, float* panels, const Threads& threads) {
  copy_to_panels(threads, columns, rows, transposed(weight), panels);
  return kOk;
}

}  // namespace hydravit::HYDRAVIT_ISA
