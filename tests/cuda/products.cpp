// One product by itself: every shape of tiles computes the same bits, whatever the rows, columns and depth are, where
// the segments of the weights end, and whether A is made ahead.
#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "network.h"
#include "ptx.cuh"

namespace hydravit::cuda::tests {

namespace {

using emulator::allocate;

constexpr int kRowUnit = 128;  // panels have so many rows, or a multiple

Bf16* random_panels(int rows, int channels, int panel_rows, std::mt19937& random) {
  std::normal_distribution<float> normal;
  auto* panels = static_cast<Bf16*>(allocate(sizeof(Bf16) * panel_rows * channels));
  for (int row = 0; row < rows; row++)
    for (int channel = 0; channel < channels; channel++)
      from_float(normal(random), panels[panel_index(panel_rows, row, channel)]);
  return panels;
}

float* random_floats(int count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  auto* floats = static_cast<float*>(allocate(sizeof(float) * count));
  std::generate_n(floats, count, [&] { return normal(random); });
  return floats;
}

struct Case {
  Source source;
  Sink sink;
  int rows, image_rows, image_tokens, segments, segment, depth;
  int first_token, last_token;
};

Product random_product(const Case& test, int panel_rows) {
  std::mt19937 random(3);
  Product p{};
  p.source = test.source, p.sink = test.sink;
  p.rows = test.rows, p.columns = test.segments * test.segment, p.depth = test.depth;
  p.image_rows = test.image_rows, p.image_tokens = test.image_tokens;
  const int64_t panel = int64_t{panel_rows} * kPanel;
  if (test.source == Source::kPanels)
    p.a = random_panels(test.rows, test.depth, panel_rows, random), p.a_stride = panel;
  if (test.source == Source::kNorm) {
    p.a_image_rows = 4, p.a_first = 1, p.pooled = 2, p.eps = 1e-6f;
    p.a = random_floats(4 * test.rows * test.depth, random), p.a_stride = test.depth;
    p.norm_weight = random_floats(test.depth, random), p.norm_bias = random_floats(test.depth, random);
  }
  if (test.source == Source::kPatches) {
    p.channels = 2, p.grid_height = 3, p.grid_width = 5, p.patch_height = 4, p.patch_width = 7, p.prefix_tokens = 1;
    p.image_dtype = Dtype::kFp32;
    p.a = random_floats(test.rows / test.image_rows * 2 * 3 * 5 * 4 * 7, random);
  }
  for (int i = 0; i < test.segments; i++) {
    p.weight[i] = random_panels(test.segment, test.depth, test.segment, random);
    p.bias[i] = random_floats(test.segment, random);
  }
  p.weight_stride = int64_t{test.segment} * kPanel, p.segment = test.segment;
  p.first_token = test.first_token, p.last_token = test.last_token;
  const bool panels = test.sink == Sink::kPanels || test.sink == Sink::kGelu;
  const size_t bytes = (panels ? sizeof(Bf16) : sizeof(float)) * panel_rows * p.columns;
  p.c = allocate(bytes), p.c_stride = panels ? panel : p.columns, p.c_columns = p.columns - 3;
  p.residual = random_floats(panel_rows * p.columns, random), p.layer_scale = random_floats(p.columns, random);
  p.residual_image_rows = test.image_rows;
  p.positions = random_floats(test.image_tokens * p.columns, random), p.positions_stride = p.columns;
  return p;
}

// What is wanted of C; of the rest some tiles write more than others. `ahead`: A is made by an input phase.
std::vector<float> compute(const Case& test, Shape shape, Loader loader, int processors, bool ahead = false) {
  const int panel_rows = (test.rows + kRowUnit - 1) / kRowUnit * kRowUnit;
  Product p = random_product(test, panel_rows);
  if (ahead) {
    Phase input{};
    input.kind = Kind::kInput, input.product = p;
    input.product.c = allocate(sizeof(Bf16) * panel_rows * p.depth);
    input.product.c_stride = int64_t{panel_rows} * kPanel;
    input.blocks = (p.rows + kInputRows - 1) / kInputRows, input.threads = kInputThreads;
    expect(launch(input, Dtype::kBf16, loader, nullptr) == 0, "launching");
    p.source = Source::kPanels, p.a = input.product.c, p.a_stride = input.product.c_stride;
  }
  Phase phase{};
  phase.shape = shape, phase.product = p;
  phase.blocks = by_warpgroups(shape) ? std::min(processors, tiles_of(p, shape)) : tiles_of(p, shape);
  phase.threads = threads_of(shape), phase.shared_bytes = shared_bytes(shape, p.source, p.depth, Dtype::kBf16);
  expect(launch(phase, Dtype::kBf16, loader, nullptr) == 0, "launching");
  emulator::synchronize();
  const bool panels = p.sink == Sink::kPanels || p.sink == Sink::kGelu;
  std::vector<float> c;
  for (int row = 0; row < p.rows; row++)
    for (int column = 0; column < (p.sink == Sink::kLogits ? p.c_columns : p.columns); column++) {
      const int token = row % p.image_rows;
      if (column < p.segment && (token < p.first_token || token >= p.last_token)) continue;
      c.push_back(panels ? to_float(static_cast<Bf16*>(p.c)[panel_index(panel_rows, row, column)])
                         : static_cast<float*>(p.c)[row * p.c_stride + column]);
    }
  emulator::release_all();
  return c;
}

}  // namespace

void test_products() {
  const Case cases[] = {
      // Tiles across segments, and half a tile at the end.
      {Source::kPanels, Sink::kPanels, 150, 48, 45, 3, 192, 192, 0, 45},
      // Half a tile of columns alone; more steps than stages.
      {Source::kPanels, Sink::kGelu, 96, 32, 17, 1, 64, 640, 0, 17},
      // More tiles than stages, of one step each.
      {Source::kPanels, Sink::kResidual, 300, 100, 100, 1, 320, 64, 0, 100},
      {Source::kPanels, Sink::kPositions, 130, 64, 50, 1, 128, 128, 0, 50},
      {Source::kNorm, Sink::kLogits, 5, 1, 1, 1, 192, 192, 0, 1},
      {Source::kPatches, Sink::kPanels, 64, 32, 17, 1, 128, 64, 0, 17},
      // Of the queries the first of each image only: whole tiles are left out.
      {Source::kPanels, Sink::kPanels, 600, 200, 197, 3, 128, 128, 0, 1},
  };
  for (const Case& test : cases) {
    begin("products of " + std::to_string(test.rows) + " rows");
    const auto same = [&, expected = compute(test, Shape::k32x64, Loader::kAsync, 132)](const auto& c) {
      expect(c.size() == expected.size() && std::memcmp(c.data(), expected.data(), 4 * c.size()) == 0, "the same bits");
    };
    const bool made = test.source != Source::kPanels;
    for (const Shape shape : kShapes)
      if (!by_warpgroups(shape)) same(compute(test, shape, Loader::kBulk, 132, made && shape == Shape::k128x64));
    emulator::Settings& settings = emulator::settings();
    for (const auto copies : {emulator::Copies::kAtOnce, emulator::Copies::kLate})
      for (const int processors : {1, 2, 132}) {
        settings.copies = copies;
        settings.warps_run_ahead = processors != 132;
        settings.reversed = processors == 2;
        same(compute(test, Shape::k128x128, Loader::kBulk, processors, made));
      }
    settings = {};
  }
}

}  // namespace hydravit::cuda::tests
