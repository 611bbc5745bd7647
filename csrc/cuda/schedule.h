// All phases in one kernel: which block computes which tile, and what a tile waits for.
//
// As many blocks as SMs run through the steps in order; of each step a block takes every n-th tile. A tile waits for
// the rows that it reads: every step counts, for each group of its rows, the tiles that are done. Groups of earlier
// steps only are waited for, so nothing can wait in a circle; that everything else is ordered by these waits, too, is
// tested for every width (tests/cuda/schedule.cpp). The functions here are those of the kernel and of its tests.
#pragma once

#include <vector>

#include "graph.h"
#include "network.h"

namespace hydravit::cuda {

struct Step {
  bool is_attention;
  Shape shape;
  Product product;
  Attention attention;
  int tiles, first_block;  // the block that takes tile 0
  int input;               // the step whose output this one reads; -1: none
  int counter, expected;   // of the first group; tiles of each group
};

struct Range {
  int begin, end;
};

constexpr int row_tiles(const Step& s) {
  const int rows = size_of(s.shape).rows;
  return (s.product.rows + rows - 1) / rows;
}
constexpr int groups_of(const Step& s) {
  return s.is_attention ? s.attention.images * s.attention.blocks : row_tiles(s);
}
// The group of a row of the step's output.
constexpr int group_of_row(const Step& s, int row) {
  if (!s.is_attention) return row / size_of(s.shape).rows;
  const Attention& a = s.attention;
  const int query = row % a.out_image_rows + a.first_query;
  const int block = query / (16 * a.query_tiles) - a.first_block;
  return row / a.out_image_rows * a.blocks + (block < a.blocks ? block : a.blocks - 1);  // rows behind the tokens
}
constexpr int group_of_tile(const Step& s, int tile) {
  if (!s.is_attention) return tile % row_tiles(s);
  return tile / (s.attention.heads * s.attention.blocks) * s.attention.blocks + tile % s.attention.blocks;
}
// The rows of its input that a tile reads.
constexpr Range rows_read(const Step& s, int tile) {
  if (s.is_attention) {
    const int image = tile / (s.attention.heads * s.attention.blocks);
    return {image * s.attention.image_rows, (image + 1) * s.attention.image_rows};
  }
  const Product& p = s.product;
  const int first = tile % row_tiles(s) * size_of(s.shape).rows, end = first + size_of(s.shape).rows;
  const int last = (end < p.rows ? end : p.rows) - 1;
  return {first * p.a_image_rows + p.a_first, last * p.a_image_rows + p.a_first + p.pooled};
}
// The groups of its input that a tile waits for.
constexpr Range groups_read(const Step& s, const Step& input, int tile) {
  const Range rows = rows_read(s, tile);
  return {group_of_row(input, rows.begin), group_of_row(input, rows.end - 1) + 1};
}

struct Schedule {
  std::vector<Step> steps;
  int blocks, counters;
  int64_t shared_bytes;
};
// Of phases that were planned to run together.
Schedule schedule(const std::vector<Phase>& phases, const Device& device);

// What is in front of the groups' counters: how many calls there were, and how many blocks have ended in this one.
constexpr int kCallCounters = 2;

// Before the first launch on a device: lets the kernel have as much shared memory as there is.
int prepare_schedules(Dtype dtype, const Device& device);
// One cooperative launch. `steps` are the schedule's, on the device; `counters`, zero at first, are this schedule's
// own.
int launch(const Schedule& schedule, const Step* steps, uint32_t* counters, const Ends& ends, Dtype dtype,
           Loader loader, void* stream);

}  // namespace hydravit::cuda
