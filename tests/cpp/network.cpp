// The whole network with several widths in one batch. Image by image, with the pooled tokens only and on packed
// weights, it gives the same bits.
#include <utility>

#include "check.h"

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
constexpr int64_t kChannels = 3, kPatchHeight = 2, kPatchWidth = 3;
constexpr float kEps = 1e-6f;

int64_t tokens_of(const Shape& shape) { return shape.cls_tokens + shape.grid * shape.grid; }
int64_t outputs_of(const Shape& shape, const Width& width) { return shape.classes == 0 ? width.embed : shape.classes; }

// ---- The blocks of one width, without pointers ----

Stem stem_of(const Shape& shape, const Width& width) {
  Stem block{};
  block.batch = 1, block.channels = kChannels, block.grid_height = block.grid_width = shape.grid;
  block.patch_height = kPatchHeight, block.patch_width = kPatchWidth;
  block.embed = width.embed, block.cls_tokens = shape.cls_tokens, block.pos_on_prefix = true;
  return block;
}
AttentionBlock attention_of(const Shape& shape, const Width& width) {
  AttentionBlock block{};
  block.batch = 1, block.tokens = block.queries = tokens_of(shape);
  block.embed = width.embed, block.heads = width.heads;
  block.head_dim = block.value_dim = block.pitch = shape.head_dim;
  block.scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim)), block.eps = kEps;
  return block;
}
MlpBlock mlp_of(const Shape& shape, const Width& width) {
  MlpBlock block{};
  block.batch = 1, block.tokens = tokens_of(shape), block.embed = width.embed, block.hidden = width.hidden;
  block.eps = kEps;
  return block;
}
Head head_of(const Shape& shape, const Width& width) {
  Head block{};
  block.batch = 1, block.pool_start = shape.pool_start, block.pool_stop = shape.pool_stop;
  block.embed = width.embed, block.classes = shape.classes, block.eps = kEps;
  return block;
}

// ---- The parameters ----

struct Size {
  int64_t rows, columns;
};
std::map<std::string, Size> parameters_of(const Shape& shape, const Width& width) {
  const int64_t embed = width.embed, columns = width.heads * shape.head_dim, hidden = width.hidden;
  std::map<std::string, Size> sizes = {{"stem.weight", {embed, kChannels * kPatchHeight * kPatchWidth}},
                                       {"stem.bias", {1, embed}},
                                       {"stem.cls_token", {shape.cls_tokens, embed}},
                                       {"stem.pos_embed", {tokens_of(shape), embed}},
                                       {"head.norm_weight", {1, embed}},
                                       {"head.norm_bias", {1, embed}},
                                       {"head.weight", {shape.classes, embed}},
                                       {"head.bias", {1, shape.classes}}};
  for (int64_t i = 0; i < shape.layers; i++) {
    const std::string attention = "attention" + std::to_string(i) + ".", mlp = "mlp" + std::to_string(i) + ".";
    for (const char* name : {"query", "key", "value"}) {
      sizes[attention + name + "_weight"] = {columns, embed};
      sizes[attention + name + "_bias"] = {1, columns};
    }
    sizes[attention + "proj_weight"] = {embed, columns};
    sizes[mlp + "fc1_weight"] = {hidden, embed};
    sizes[mlp + "fc1_bias"] = {1, hidden};
    sizes[mlp + "fc2_weight"] = {embed, hidden};
    for (const std::string& block : {attention, mlp})
      for (const char* name : {"norm_weight", "norm_bias", "layer_scale"}) sizes[block + name] = {1, embed};
    sizes[attention + "proj_bias"] = sizes[mlp + "fc2_bias"] = {1, embed};
  }
  return sizes;
}
// Whether the network can read the parameter from panels.
bool is_packed(const std::string& name) { return name.ends_with("weight") && !name.ends_with("norm_weight"); }

Arrays arrays_of(const Shape& shape) {
  std::mt19937 generator(5);
  Arrays arrays;
  for (const auto& [name, size] : parameters_of(shape, shape.widths[0]))
    arrays.emplace(name, size.rows == 1 ? vector(size.columns) : weight(size.rows, size.columns));
  const int64_t height = shape.grid * kPatchHeight, width = shape.grid * kPatchWidth;
  arrays.emplace("images", Array({{shape.batch, kChannels * height * width + kGap}},
                                 {{kChannels, height * width}, {height, width}, {width, 1}}));
  for (auto& [name, array] : arrays) array = random(array, generator);
  for (const char* name : {"y", "y_alone", "y_pooled_only", "y_packed", "y_packed_pooled_only"})
    arrays.emplace(name, weight(shape.batch, outputs_of(shape, shape.widths[0])));
  return arrays;
}

// ---- Plain loops, image by image ----

template <class T>
void network(const Shape& shape, Values<T>& all) {
  Matrix<T> y{shape.batch, outputs_of(shape, shape.widths[0]), {}};
  for (int64_t image = 0; image < shape.batch; image++) {
    const Width& width = shape.widths[shape.width_index[image]];
    const std::map<std::string, Size> sizes = parameters_of(shape, width);
    const auto values_of = [&](const std::string& block) {
      Values<T> values;
      for (const auto& [name, size] : sizes)
        if (const Matrix<T>& full = all[name]; name.starts_with(block + "."))
          values[name.substr(block.size() + 1)] =
              matrix<T>(size.rows, size.columns, [&](int64_t i, int64_t j) { return full(i, j); });
      return values;
    };
    Values<T> values = values_of("stem");
    const Matrix<T>& images = all["images"];
    values["images"] = matrix<T>(1, images.columns, [&](int64_t, int64_t j) { return images(image, j); });
    stem(stem_of(shape, width), values);
    Matrix<T> x = values["y"];
    const auto apply = [&](const std::string& block, const auto& body) {
      values = values_of(block);
      values["x"] = x;
      body();
      x = values["y"];
    };
    for (int64_t i = 0; i < shape.layers; i++) {
      apply("attention" + std::to_string(i), [&] { attention_block(attention_of(shape, width), values); });
      apply("mlp" + std::to_string(i), [&] { mlp_block(mlp_of(shape, width), values); });
    }
    apply("head", [&] { head(head_of(shape, width), values); });
    y.values.insert(y.values.end(), x.values.begin(), x.values.end());
  }
  for (const char* name : {"y", "y_alone", "y_pooled_only", "y_packed", "y_packed_pooled_only"}) all[name] = y;
}

// ---- The kernels ----

// The plan of one width: its weights are the parameters or their panels.
class Plan {
 public:
  Plan(const Shape& shape, const Width& width, Arrays& arrays, std::map<std::string, std::vector<float>>* panels)
      : stem_(stem_of(shape, width)),
        attention_(shape.layers, attention_of(shape, width)),
        mlp_(shape.layers, mlp_of(shape, width)),
        head_(head_of(shape, width)) {
    const auto matrix = [&](const std::string& name) -> Weight {
      if (panels == nullptr) return const_weight(arrays, name);
      return {nullptr, 0, panels->at(name).data(), arrays.at(name).column_axes[0].size * kPanel};
    };
    stem_.weight = matrix("stem.weight"), stem_.bias = data(arrays, "stem.bias");
    stem_.cls_token = const_weight(arrays, "stem.cls_token");
    stem_.pos_embed = const_weight(arrays, "stem.pos_embed");
    for (int64_t i = 0; i < shape.layers; i++) {
      set_parameters(attention_[i], arrays, "attention" + std::to_string(i) + ".", matrix);
      set_parameters(mlp_[i], arrays, "mlp" + std::to_string(i) + ".", matrix);
    }
    head_.norm_weight = data(arrays, "head.norm_weight"), head_.norm_bias = data(arrays, "head.norm_bias");
    head_.weight = matrix("head.weight"), head_.bias = data(arrays, "head.bias");
  }

  NetworkPlan plan() const { return {&stem_, attention_.data(), mlp_.data(), &head_}; }

 private:
  Stem stem_;
  std::vector<AttentionBlock> attention_;
  std::vector<MlpBlock> mlp_;
  Head head_;
};

// Packs a weight and checks that every element lies where the contract says.
std::vector<float> pack(Array& array, const std::string& name, const Threads& threads) {
  const int64_t rows = size_of(array.row_axes), columns = size_of(array.column_axes);
  std::vector<float> panels((rows + kPanel - 1) / kPanel * kPanel * columns);
  const Weight weight{array.data(), array.row_stride()};
  launch([&] { return pack_weight_cpu(weight, rows, columns, panels.data(), threads); });
  bool right = true;
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns; j++)
      right &=
          panels[i / kPanel * columns * kPanel + j * kPanel + i % kPanel] == weight.data[i * weight.row_stride + j];
  expect(right, "panels of " + name);
  return panels;
}

void run(const Shape& shape, Arrays& arrays, const Threads& threads) {
  std::map<std::string, std::vector<float>> panels;
  for (auto& [name, array] : arrays)
    if (is_packed(name)) panels[name] = pack(array, name, threads);
  const int64_t stride = arrays.at("y").row_stride();
  for (const bool packed : {false, true}) {
    std::vector<Plan> of_widths;
    for (const Width& width : shape.widths) of_widths.emplace_back(shape, width, arrays, packed ? &panels : nullptr);
    std::vector<NetworkPlan> plans;
    for (const Plan& of_width : of_widths) plans.push_back(of_width.plan());
    const Array& images = arrays.at("images");
    NetworkCall call{};
    call.batch = shape.batch, call.tokens = tokens_of(shape), call.layers = shape.layers;
    call.images = data(arrays, "images");
    call.image_strides[0] = images.row_axes[0].stride;
    for (int i = 0; i < 3; i++) call.image_strides[i + 1] = images.column_axes[i].stride;
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
  for (const char* name : {"y_alone", "y_pooled_only", "y_packed", "y_packed_pooled_only"})
    expect_same(arrays.at(name), arrays.at("y"), std::string("y, but ") + name);
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
        [=](auto& values) { network(shape, values); },
        [=](Arrays& arrays, const Threads& threads) { run(shape, arrays, threads); });
  }
  return tests;
}

}  // namespace hydravit::tests
