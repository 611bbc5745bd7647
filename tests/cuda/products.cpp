// One product by itself. Within a kernel family (all tile shapes of mma, or wgmma) it computes the same bits whatever
// the tile shape is, whether its prologue is a phase of its own, and whichever other rows are computed with them; the
// cases vary rows, columns and K, and where the segments of the weights end.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "plan.h"
#include "ptx.cuh"

namespace hydravit::cuda::tests {

namespace {

using emulator::allocate;

constexpr int kRowUnit = 128;  // the rows of a panel are a multiple of this

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
  Prologue prologue;
  Epilogue epilogue;
  int rows, image_rows, image_tokens, segments, segment, k;
  int token_start, token_stop;
};

Product random_product(const Case& test, int panel_rows) {
  // Of these generators only the last two depend on the number of rows: fewer rows draw the first of the same numbers.
  std::mt19937 random(3), random_rows(4), random_residual(5);
  Product p{};
  p.prologue = test.prologue, p.epilogue = test.epilogue;
  p.rows = test.rows, p.columns = test.segments * test.segment, p.k = test.k;
  p.image_rows = test.image_rows, p.image_tokens = test.image_tokens;
  const int64_t panel = int64_t{panel_rows} * kPanelChannels;
  if (test.prologue == Prologue::kPanels)
    p.a = random_panels(test.rows, test.k, panel_rows, random_rows), p.a_stride = panel;
  if (test.prologue == Prologue::kNorm) {
    p.a_image_rows = 4, p.a_first = 1, p.pooled = 2, p.eps = 1e-6f;
    p.a = random_floats(4 * test.rows * test.k, random_rows), p.a_stride = test.k;
    p.norm_weight = random_floats(test.k, random), p.norm_bias = random_floats(test.k, random);
  }
  if (test.prologue == Prologue::kPatches) {
    p.channels = 2, p.grid_height = 3, p.grid_width = 5, p.patch_height = 4, p.patch_width = 7, p.prefix_tokens = 1;
    p.image_dtype = Dtype::kFp32;
    p.a = random_floats(test.rows / test.image_rows * 2 * 3 * 5 * 4 * 7, random_rows);
  }
  for (int i = 0; i < test.segments; i++) {
    p.weight[i] = random_panels(test.segment, test.k, test.segment, random);
    p.bias[i] = random_floats(test.segment, random);
  }
  p.weight_stride = int64_t{test.segment} * kPanelChannels, p.segment = test.segment;
  p.token_start = test.token_start, p.token_stop = test.token_stop;
  const bool panels = test.epilogue == Epilogue::kPanels || test.epilogue == Epilogue::kGelu;
  const size_t bytes = (panels ? sizeof(Bf16) : sizeof(float)) * panel_rows * p.columns;
  p.c = allocate(bytes), p.c_stride = panels ? panel : p.columns, p.c_columns = p.columns - 3;
  p.residual = random_floats(panel_rows * p.columns, random_residual), p.layer_scale = random_floats(p.columns, random);
  p.residual_image_rows = test.image_rows;
  p.positions = random_floats(test.image_tokens * p.columns, random), p.positions_stride = p.columns;
  return p;
}

// Returns the needed elements of C; of the others some tile shapes write more than others do. `ahead`: a prologue phase
// runs the prologue.
std::vector<float> compute(const Case& test, TileShape shape, Loader loader, int processors, bool ahead = false) {
  const int panel_rows = (test.rows + kRowUnit - 1) / kRowUnit * kRowUnit;
  Product p = random_product(test, panel_rows);
  if (ahead) {
    Phase made{};
    made.kind = Kind::kPrologue, made.product = p;
    made.product.c = allocate(sizeof(Bf16) * panel_rows * p.k);
    made.product.c_stride = int64_t{panel_rows} * kPanelChannels;
    made.blocks = (p.rows + kPrologueRows - 1) / kPrologueRows, made.threads = kPrologueThreads;
    expect(launch(made, Dtype::kBf16, loader, nullptr) == 0, "launching");
    p.prologue = Prologue::kPanels, p.a = made.product.c, p.a_stride = made.product.c_stride;
  }
  Phase phase{};
  phase.shape = shape, phase.product = p;
  phase.blocks = uses_wgmma(shape) ? std::min(processors, tiles_of(p, shape)) : tiles_of(p, shape);
  phase.threads = threads_of(shape), phase.shared_bytes = shared_bytes(shape, p.prologue, p.k, Dtype::kBf16);
  expect(launch(phase, Dtype::kBf16, loader, nullptr) == 0, "launching");
  emulator::synchronize();
  const bool panels = p.epilogue == Epilogue::kPanels || p.epilogue == Epilogue::kGelu;
  std::vector<float> c;
  for (int row = 0; row < p.rows; row++)
    for (int column = 0; column < (p.epilogue == Epilogue::kLogits ? p.c_columns : p.columns); column++) {
      const int token = row % p.image_rows;
      if (column < p.segment && (token < p.token_start || token >= p.token_stop)) continue;
      c.push_back(panels ? to_float(static_cast<Bf16*>(p.c)[panel_index(panel_rows, row, column)])
                         : static_cast<float*>(p.c)[row * p.c_stride + column]);
    }
  emulator::release_all();
  return c;
}

// Compares in maximum norm: C in panels is bf16, and another order of the sum may round it to a neighbour.
bool is_close(const std::vector<float>& c, const std::vector<float>& expected) {
  float largest = 0, difference = 0;
  for (const float v : expected) largest = std::max(largest, std::fabs(v));
  for (size_t i = 0; i < c.size(); i++) difference = std::max(difference, std::fabs(c[i] - expected[i]));
  return c.size() == expected.size() && difference <= largest / 64;
}

}  // namespace

void test_products() {
  const Case cases[] = {
      // Tiles cross segments, and the last tile is half full.
      {Prologue::kPanels, Epilogue::kPanels, 150, 48, 45, 3, 192, 192, 0, 45},
      // The only tile is half full, and there are more steps than stages.
      {Prologue::kPanels, Epilogue::kGelu, 96, 32, 17, 1, 64, 640, 0, 17},
      // There are more tiles than stages, with one step each.
      {Prologue::kPanels, Epilogue::kResidual, 300, 100, 100, 1, 320, 64, 0, 100},
      {Prologue::kPanels, Epilogue::kPositions, 130, 64, 50, 1, 128, 128, 0, 50},
      {Prologue::kNorm, Epilogue::kLogits, 5, 1, 1, 1, 192, 192, 0, 1},
      {Prologue::kPatches, Epilogue::kPanels, 64, 32, 17, 1, 128, 64, 0, 17},
      // Only the first query of each image is needed, so whole tiles are left out.
      {Prologue::kPanels, Epilogue::kPanels, 600, 200, 197, 3, 128, 128, 0, 1},
  };
  for (const Case& test : cases) {
    begin("products of " + std::to_string(test.rows) + " rows");
    const auto same = [](const std::vector<float>& c, const std::vector<float>& expected) {
      expect(same_bits(c, expected), "the same bits");
    };
    // C of the first image alone is where C of all images begins.
    Case first_image = test;
    first_image.rows = test.image_rows;
    const auto same_alone = [&](const std::vector<float>& alone, std::vector<float> expected) {
      expected.resize(alone.size());
      same(alone, expected);
    };
    const bool has_prologue = test.prologue != Prologue::kPanels;

    const std::vector<float> mma = compute(test, TileShape::k32x64, Loader::kAsync, 132);
    for (const TileShape shape : kTileShapes) {
      if (uses_wgmma(shape)) continue;
      same(compute(test, shape, Loader::kBulk, 132, has_prologue && shape == TileShape::k128x64), mma);
      same_alone(compute(first_image, shape, Loader::kBulk, 132), mma);
    }

    const std::vector<float> wgmma = compute(test, TileShape::k128x128, Loader::kBulk, 132, has_prologue);
    expect(is_close(wgmma, mma), "mma and wgmma agree but for the order of the sum");
    same_alone(compute(first_image, TileShape::k128x128, Loader::kBulk, 132, has_prologue), wgmma);
    emulator::Settings& settings = emulator::settings();
    for (const auto copies : {emulator::Copies::kAtOnce, emulator::Copies::kLate})
      for (const int processors : {1, 2, 132}) {
        settings.copies = copies;
        settings.warps_run_ahead = processors != 132;
        settings.reversed = processors == 2;
        same(compute(test, TileShape::k128x128, Loader::kBulk, processors, has_prologue), wgmma);
      }
    settings = {};
  }
}

}  // namespace hydravit::cuda::tests
