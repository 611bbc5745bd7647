// The whole network with several widths in one batch. Image by image, with the pooled tokens only and on packed
// weights, it gives the same bits.
#include <utility>

#include "check.h"
#include "network_oracle.h"

namespace hydravit::tests {

namespace {

struct Width {
  int64_t embed, heads, hidden;
};
struct Shape {
  int64_t batch, grid, cls_tokens, head_dim, layers, classes, pool_start, pool_stop;
  std::vector<Width> widths;  // the first one contains the others, which read parts of its parameters
  std::vector<int64_t> width_index;
};

NetworkSizes sizes_of(const Shape& s) {
  constexpr int64_t kChannels = 3, kPatchHeight = 2, kPatchWidth = 3;
  const int64_t tokens = s.cls_tokens + s.grid * s.grid;
  return {s.layers,     s.widths[0].embed, s.widths[0].hidden,    kChannels,
          kPatchHeight, kPatchWidth,       s.cls_tokens,          0,
          tokens,       s.classes,         s.grid * kPatchHeight, s.grid * kPatchWidth,
          s.pool_start, s.pool_stop};
}
Subnetwork subnetwork_of(const Shape& shape, const Width& width) {
  return prefix(sizes_of(shape), width.embed, width.heads, shape.head_dim, width.hidden);
}
int64_t outputs_of(const Shape& shape) { return shape.classes == 0 ? shape.widths[0].embed : shape.classes; }
const char* const kOutputs[] = {"y", "y_alone", "y_pooled_only", "y_packed", "y_packed_pooled_only"};

// ---- The parameters ----

// Whether the network can read the parameter from panels.
bool is_packed(const std::string& name) { return name.ends_with("weight") && !name.ends_with("norm_weight"); }

Arrays arrays_of(const Shape& shape) {
  std::mt19937 generator(5);
  Arrays arrays;
  const NetworkSizes n = sizes_of(shape);
  for (const auto& [name, part] : parts_of(n, subnetwork_of(shape, shape.widths[0])))
    arrays.emplace(name, part.rows == 1 ? vector(part.columns) : weight(part.rows, part.columns));
  const int64_t area = n.image_height * n.image_width;
  arrays.emplace("images", Array({{shape.batch, n.channels * area + kGap}},
                                 {{n.channels, area}, {n.image_height, n.image_width}, {n.image_width, 1}}));
  for (auto& [name, array] : arrays) array = random(array, generator);
  for (const char* name : kOutputs) arrays.emplace(name, weight(shape.batch, outputs_of(shape)));
  return arrays;
}

// ---- Plain loops, image by image ----

template <class T>
void image_by_image(const Shape& shape, Values<T>& all) {
  Matrix<T> y{shape.batch, outputs_of(shape), {}};
  for (int64_t image = 0; image < shape.batch; image++) {
    const Subnetwork subnetwork = subnetwork_of(shape, shape.widths[shape.width_index[image]]);
    const auto beginning = [&](const std::string& name, int64_t row, int64_t rows, int64_t columns) {
      const Matrix<T>& full = all[name];
      return matrix<T>(rows, columns, [&](int64_t i, int64_t j) { return full(row + i, j); });
    };
    Values<T> parts;
    for (const auto& [name, part] : parts_of(sizes_of(shape), subnetwork))
      parts[name] = beginning(name, 0, part.rows, part.columns);
    const Matrix<T> alone =
        network(blocks_of(sizes_of(shape), subnetwork, 1), beginning("images", image, 1, all["images"].columns), parts);
    y.values.insert(y.values.end(), alone.values.begin(), alone.values.end());
  }
  for (const char* name : kOutputs) all[name] = y;
}

// ---- The kernels ----

int64_t panel() {
  int64_t rows = 0;
  launch([&] { return panel_rows(&rows); });
  return rows;
}

// The blocks of one width, with pointers: its weights are the parameters or their panels.
Blocks blocks_in(const Shape& shape, const Width& width, Arrays& arrays,
                 std::map<std::string, std::vector<float>>* panels) {
  Blocks blocks = blocks_of(sizes_of(shape), subnetwork_of(shape, width), 1);
  const auto find = [&](Arrays& arrays, const std::string& name) -> Weight {
    if (panels == nullptr || !is_packed(name)) return const_weight(arrays, name);
    return {nullptr, 0, panels->at(name).data(), arrays.at(name).column_axes[0].size * panel()};
  };
  set_stem(blocks.stem, arrays, "stem.", find);
  for (int64_t i = 0; i < shape.layers; i++) {
    set_attention(blocks.attention[i], arrays, "attention" + std::to_string(i) + ".", find);
    set_mlp(blocks.mlp[i], arrays, "mlp" + std::to_string(i) + ".", find);
  }
  set_head(blocks.head, arrays, "head.", find);
  return blocks;
}

// Packs a weight and checks that every element lies where the contract says.
std::vector<float> pack(Array& array, const std::string& name, const Threads& threads) {
  const int64_t rows = size_of(array.row_axes), columns = size_of(array.column_axes);
  const int64_t p = panel();
  std::vector<float> panels((rows + p - 1) / p * p * columns);
  const Weight weight{array.data(), array.row_stride()};
  launch([&] { return pack_weight_cpu(weight, rows, columns, panels.data(), threads); });
  bool right = true;
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns; j++)
      right &= panels[i / p * columns * p + j * p + i % p] == weight.data[i * weight.row_stride + j];
  expect(right, "panels of " + name);
  return panels;
}

void run(const Shape& shape, Arrays& arrays, const Threads& threads) {
  std::map<std::string, std::vector<float>> panels;
  for (auto& [name, array] : arrays)
    if (is_packed(name)) panels[name] = pack(array, name, threads);
  const int64_t stride = arrays.at("y").row_stride();
  for (const bool packed : {false, true}) {
    std::vector<Blocks> of_widths;
    for (const Width& width : shape.widths)
      of_widths.push_back(blocks_in(shape, width, arrays, packed ? &panels : nullptr));
    std::vector<NetworkPlan> plans;
    for (const Blocks& blocks : of_widths)
      plans.push_back({&blocks.stem, blocks.attention.data(), blocks.mlp.data(), &blocks.head});
    NetworkCall call{};
    call.batch = shape.batch, call.tokens = sizes_of(shape).tokens(), call.layers = shape.layers;
    set_images(call, arrays);
    call.plans = plans.data(), call.width_index = shape.width_index.data();
    call.y_row_stride = stride;
    for (const bool pooled_only : {false, true}) {
      call.pooled_only = pooled_only;
      call.y = data(arrays, std::string("y") + (packed ? "_packed" : "") + (pooled_only ? "_pooled_only" : ""));
      launch([&] { return network_cpu(call, threads); });
    }
    if (packed) continue;
    for (int64_t image = 0; image < shape.batch; image++) {
      NetworkCall alone = call;
      alone.batch = 1, alone.images += image * call.image_strides[0];
      alone.plans += shape.width_index[image], alone.width_index = nullptr;
      alone.pooled_only = true;
      alone.y = data(arrays, "y_alone") + image * stride;
      launch([&] { return network_cpu(alone, threads); });
    }
  }
  for (const char* name : kOutputs) expect_same(arrays.at(name), arrays.at("y"), std::string("y, but ") + name);
}

}  // namespace

std::vector<Test> network_tests() {
  const Width wide{80, 3, 100}, narrow{32, 1, 36}, heads_only{48, 2, 0}, hidden_only{48, 0, 64}, nothing{16, 0, 0};
  const Shape shapes[] = {
      {1, 1, 0, 5, 1, 1, 0, 1, {{3, 1, 1}}, {0}},
      {3, 4, 1, 16, 2, 10, 0, 1, {wide, narrow}, {1, 0, 0}},
      {3, 4, 1, 40, 1, 37, 1, 4, {wide, nothing, heads_only}, {2, 1, 0}},
      {7, 4, 1, 5, 2, 10, 1, 17, {wide, hidden_only, narrow, heads_only}, {3, 1, 2, 2, 0, 1, 3}},
      {3, 7, 1, 24, 2, 0, 1, 50, {{48, 2, 400}}, {0, 0, 0}},
      {3, 14, 1, 64, 2, 100, 0, 1, {{128, 2, 400}, {64, 1, 200}}, {0, 1, 0}},
  };
  std::vector<Test> tests;
  for (const Shape& shape : shapes) {
    tests.emplace_back(
        named("network, shape", {static_cast<int64_t>(tests.size())}), arrays_of(shape),
        [=](auto& values) { image_by_image(shape, values); },
        [=](Arrays& arrays, const Threads& threads) { run(shape, arrays, threads); });
  }
  return tests;
}

}  // namespace hydravit::tests
