#include "gemm.h"

#include <array>
#include <utility>

namespace hydravit::HYDRAVIT_ISA {

namespace {

// ---- Packing ----

#if defined(__clang__)
template <int... lanes>
inline Vec shuffle(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, lanes...);
}
#else
template <int... lanes>
inline Vec shuffle(Vec a, Vec b) {
  return __builtin_shuffle(a, b, IntVec{lanes...});
}
#endif

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
  const bool full = count == panel;
  const int64_t first = lanes.at(lane);
  const bool neighbours = full && lanes.at(lane + panel - 1) - first == panel - 1;

  for (int64_t begin = depth_begin; begin < depth_end;) {
    int64_t end = depth_end;  // of the depth indices in one segment
    if (depth.segment != 0) end = smaller(end, (begin / depth.segment + 1) * depth.segment);
    const float* base = data + depth.at(begin);
    const int64_t length = end - begin;
    int64_t k = 0;
    if (neighbours) {
      for (; k < length; k++) std::memcpy(to + k * panel, base + first + k * depth.stride, panel * sizeof(float));
    } else {
      for (int64_t i = 0; i < count; i++) rows[i] = base + lanes.at(lane + i);
      if (full && depth.stride == 1) {
        for (; k + kWidth <= length; k += kWidth)
          for (int group = 0; group < panel; group += kGroup)
            transpose_block<kGroup, panel>(rows + group, k, to + k * panel + group);
      }
      for (; k < length; k++)
        for (int64_t i = 0; i < panel; i++) to[k * panel + i] = i < count ? rows[i][k * depth.stride] : 0.0f;
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

template <int rows, int row_step>
void tile(const TileProduct& product) {
  Vec sums[rows][2];
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++) {
    sums[i][0] = Vec{};
    sums[i][1] = Vec{};
  }
  const float* a = product.a;
  const float* b = product.b;
  for (int64_t k = 0; k < product.depth; k++) {
    const Vec b0 = load(b), b1 = load(b + kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
      const Vec value = splat(a[i * row_step]);
      sums[i][0] = value * b0 + sums[i][0];
      sums[i][1] = value * b1 + sums[i][1];
    }
    a += product.a_step;
    b += kTileColumns;
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++) {
    float* out = product.out + i * product.out_stride;
    store(out, product.accumulate ? load(out) + sums[i][0] : sums[i][0]);
    store(out + kWidth, product.accumulate ? load(out + kWidth) + sums[i][1] : sums[i][1]);
  }
}

using Tile = void (*)(const TileProduct&);

template <int row_step, int... i>
constexpr std::array<Tile, kTileRows> tiles(std::integer_sequence<int, i...>) {
  return {tile<i + 1, row_step>...};
}
constexpr auto kTiles = tiles<1>(std::make_integer_sequence<int, kTileRows>());
constexpr auto kTilesAlong = tiles<kTileColumns>(std::make_integer_sequence<int, kTileRows>());

// ---- Blocking ----

// Rows of `a` packed at a time (level 2 cache), and the longest piece of the depth.
constexpr int64_t kBlockRows = 24 * kTileRows;
constexpr int64_t kBlockDepth = 512;
// Depth of one chain of multiply-adds: the shorter, the smaller the rounding error of the sum of all chains.
constexpr int64_t kChain = 64;
constexpr int64_t kRowsScratch = kBlockRows * kBlockDepth + kWidth;
constexpr int64_t kColumnsScratch = kTileColumns * kBlockDepth + kWidth;
constexpr int64_t kTileScratch = kTileRows * kTileColumns;
constexpr int64_t kJobScratch = (kRowsScratch + kColumnsScratch + kTileScratch + 15) / 16 * 16;

// The vectors along the columns of one panel, gathered once for all its tiles.
struct PanelVectors {
  float bias[kTileColumns], scale[kTileColumns];
};

void gather(const Output& out, int64_t column, int64_t count, PanelVectors& vectors) {
  for (int64_t i = 0; i < count; i++) {
    if (out.bias != nullptr) vectors.bias[i] = out.bias[out.bias_axis.at(column + i)];
    if (out.column_scale != nullptr) vectors.scale[i] = out.column_scale[column + i];
  }
}

struct Place {
  int64_t row, rows, column, columns;
  bool first, last;  // piece of the depth
};

// One tile of sums -> the output, see `Output`. Before the last piece of the depth, `out` holds the sums so far.
void finish(const Output& out, const float* sums, const Place& place, const PanelVectors& vectors) {
  const bool scattered = out.columns.segment != 0 || out.columns.stride != 1;
  for (int64_t i = 0; i < place.rows; i++) {
    const int64_t row = place.row + i;
    float* to = out.data + out.rows.at(row);
    if (scattered) {
      for (int64_t j = 0; j < place.columns; j++) {
        float& element = to[out.columns.at(place.column + j)];
        element = sums[i * kTileColumns + j] + (place.first && !out.accumulate ? 0.0f : element);
      }
      continue;
    }
    for (int64_t j = 0; j < place.columns; j += kWidth) {
      const int64_t count = place.columns - j, column = place.column + j;
      Vec value = load(sums + i * kTileColumns + j);
      if (!place.first || out.accumulate) value += load(to + column, count);
      if (place.last) {
        if (out.bias != nullptr) value += load(vectors.bias + j);
        if (out.gelu != nullptr) store(out.gelu + row * out.gelu_stride + column, gelu(value), count);
        if (out.gelu == out.data && out.gelu != nullptr) continue;
        if (out.column_scale != nullptr) value *= load(vectors.scale + j);
        if (out.row_scale != nullptr) value *= splat(out.row_scale[row / out.rows_per_scale]);
        if (out.residual != nullptr) value += load(out.residual + out.residual_rows.at(row) + column, count);
      }
      store(to + column, value, count);
    }
  }
}

// One job's part of the product, with memory of its own.
void multiply(Range rows, Range columns, int64_t k, const View& a, const View& b, const Output& out, float* scratch) {
  float* packed_rows = scratch;
  float* packed_columns = packed_rows + kRowsScratch;
  float* sums = packed_columns + kColumnsScratch;
  const int64_t pieces = divide_up(k, kBlockDepth), piece = divide_up(k, pieces);
  const int64_t blocks = divide_up(rows.end - rows.begin, kBlockRows);
  const int64_t block = round_up(divide_up(rows.end - rows.begin, blocks), kTileRows);
  PanelVectors vectors;

  for (int64_t row = rows.begin; row < rows.end; row += block) {
    const int64_t row_count = smaller(block, rows.end - row);
    for (int64_t depth = 0; depth < k; depth += piece) {
      const int64_t depth_end = smaller(k, depth + piece), length = depth_end - depth;
      pack_rows(a.data, a.rows, a.columns, row, row_count, depth, depth_end, packed_rows);
      for (int64_t column = columns.begin; column < columns.end; column += kTileColumns) {
        const int64_t column_count = smaller<int64_t>(kTileColumns, columns.end - column);
        pack_columns(b.data, b.columns, b.rows, column, column_count, depth, depth_end, packed_columns);
        gather(out, column, column_count, vectors);
        for (int64_t i = 0; i < row_count; i += kTileRows) {
          const int64_t tile_rows = smaller<int64_t>(kTileRows, row_count - i);
          for (int64_t k0 = 0; k0 < length; k0 += kChain)
            tile_product(tile_rows, {smaller(kChain, length - k0), packed_rows + i * length + k0 * kTileRows, kTileRows,
                                     packed_columns + k0 * kTileColumns, sums, kTileColumns, k0 > 0});
          finish(out, sums, {row + i, tile_rows, column, column_count, depth == 0, depth_end == k}, vectors);
        }
      }
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

void tile_product(int64_t rows, const TileProduct& product) { kTiles[rows - 1](product); }

void tile_product_along(int64_t rows, const TileProduct& product) { kTilesAlong[rows - 1](product); }

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

}  // namespace hydravit::HYDRAVIT_ISA
