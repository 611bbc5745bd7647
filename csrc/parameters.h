// The parameters of a network, and their order. hydravit_kernels/parameters.py has the same structs with the same
// fields in the same order. Torch-free; the CPU bindings and the CUDA network share it.
//
// T is what the user of a struct knows of a parameter: a pointer, an offset or a checked tensor.
#pragma once

#include <cstdint>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace hydravit {

template <class T>
struct StemParameters {
  T weight, bias, cls_token, reg_token, pos_embed;
};
template <class T>
struct AttentionParameters {
  T norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, layer_scale;
};
template <class T>
struct MlpParameters {
  T norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale;
};
template <class T>
struct HeadParameters {
  T norm_weight, norm_bias, weight, bias;
};
template <class T>
struct NetworkParameters {
  StemParameters<T> stem;
  std::vector<AttentionParameters<T>> attention;  // one for each layer
  std::vector<MlpParameters<T>> mlp;              // one for each layer
  HeadParameters<T> head;
};

// Sizes of the full network: of its widest width.
struct NetworkSizes {
  static constexpr int64_t kIntegers = 14;
  int64_t layers, embed, hidden, channels, patch_height, patch_width;
  int64_t cls_tokens, reg_tokens;
  int64_t positions;  // rows of the position embedding: of all tokens, of the patches only, or 0 without an embedding
  int64_t classes;    // rows of all classifiers together; 0 without a classifier
  int64_t image_height, image_width;
  int64_t pool_start, pool_stop;  // the head takes the mean of tokens [pool_start, pool_stop)

  int64_t grid_height() const { return image_height / patch_height; }
  int64_t grid_width() const { return image_width / patch_width; }
  int64_t patches() const { return grid_height() * grid_width(); }
  int64_t prefix_tokens() const { return cls_tokens + reg_tokens; }
  int64_t tokens() const { return prefix_tokens() + patches(); }
  int64_t patch_size() const { return channels * patch_height * patch_width; }
  bool pos_on_prefix() const { return positions == tokens(); }

  bool operator==(const NetworkSizes&) const = default;
};

// Reads and checks sizes, given as integers in the order of the fields.
inline NetworkSizes read_sizes(const std::vector<int64_t>& integers) {
  const auto check = [](bool right, const std::string& message) {
    if (!right) throw std::runtime_error(message);
  };
  const auto text = [](int64_t value) { return std::to_string(value); };
  check(integers.size() == NetworkSizes::kIntegers, "sizes: " + text(NetworkSizes::kIntegers) + " integers expected, " +
                                                        std::to_string(integers.size()) + " given");
  for (const int64_t value : integers)
    check(value >= 0 && value < int64_t{1} << 31, "sizes: integers in [0, 2^31) expected, " + text(value) + " given");
  const int64_t* next = integers.data();
  const auto read = [&] { return *next++; };
  const NetworkSizes n{read(), read(), read(), read(), read(), read(), read(),
                       read(), read(), read(), read(), read(), read(), read()};
  check(n.layers > 0, "layers: at least 1 expected, 0 given");
  check(n.embed > 0, "embed: at least 1 expected, 0 given");
  check(n.channels > 0 && n.patch_height > 0 && n.patch_width > 0,
        "patch_embed.proj.weight: a patch of at least one pixel expected, " + text(n.channels) + " channels of " +
            text(n.patch_height) + " by " + text(n.patch_width) + " given");
  check(n.image_height > 0 && n.image_width > 0 && n.image_height % n.patch_height == 0 &&
            n.image_width % n.patch_width == 0,
        "images: height and width expected to be multiples of the patch (" + text(n.patch_height) + ", " +
            text(n.patch_width) + "), (" + text(n.image_height) + ", " + text(n.image_width) + ") given");
  return n;
}

// What an error message calls a parameter: its name in timm's state dict, where a layer's parameters begin with
// "blocks.", the layer and "."; or the name of an op's argument.
struct ParameterName {
  const char* name;
  int64_t layer;  // -1: the parameter belongs to no layer

  ParameterName(const char* name, int64_t layer = -1) : name(name), layer(layer) {}
  std::string full() const { return layer < 0 ? name : "blocks." + std::to_string(layer) + "." + name; }
};

// What is known of a parameter before there is one.
struct ParameterSpec {
  ParameterName name;
  std::vector<int64_t> shape;
  bool weight;       // of a matrix product: packing lays it out in panels
  bool optional;     // may be absent
  float absent = 0;  // a vector of this value has the effect of an absent one

  // The columns of a weight, whose rows are the first axis of `shape`.
  int64_t columns() const { return std::accumulate(shape.begin() + 1, shape.end(), int64_t{1}, std::multiplies<>()); }
};

// The order of the parameters: calls `next(spec)` once for each of them, in order, and returns its results by name.
template <class Next>
auto read_parameters(const NetworkSizes& n, Next&& next) {
  using T = decltype(next(std::declval<ParameterSpec>()));
  const auto vector = [&](ParameterName name, int64_t size) -> T { return next({name, {size}, false, false}); };
  const auto optional = [&](ParameterName name, int64_t size) -> T { return next({name, {size}, false, true}); };
  const auto scale = [&](ParameterName name) -> T { return next({name, {n.embed}, false, true, 1}); };
  const auto tokens = [&](ParameterName name, int64_t count) -> T {
    return next({name, {1, count, n.embed}, false, true});
  };
  const auto weight = [&](ParameterName name, int64_t rows, int64_t columns) -> T {
    return next({name, {rows, columns}, true, false});
  };
  // Braces, unlike parentheses, fix the order in which the members are made.
  StemParameters<T> stem{
      next({"patch_embed.proj.weight", {n.embed, n.channels, n.patch_height, n.patch_width}, true, false}),
      optional("patch_embed.proj.bias", n.embed), tokens("cls_token", n.cls_tokens), tokens("reg_token", n.reg_tokens),
      tokens("pos_embed", n.positions)};
  std::vector<AttentionParameters<T>> attention;
  std::vector<MlpParameters<T>> mlp;
  for (int64_t i = 0; i < n.layers; i++) {
    attention.push_back({vector({"norm1.weight", i}, n.embed), vector({"norm1.bias", i}, n.embed),
                         weight({"attn.qkv.weight", i}, 3 * n.embed, n.embed),
                         optional({"attn.qkv.bias", i}, 3 * n.embed), weight({"attn.proj.weight", i}, n.embed, n.embed),
                         optional({"attn.proj.bias", i}, n.embed), scale({"ls1.gamma", i})});
    mlp.push_back({vector({"norm2.weight", i}, n.embed), vector({"norm2.bias", i}, n.embed),
                   weight({"mlp.fc1.weight", i}, n.hidden, n.embed), optional({"mlp.fc1.bias", i}, n.hidden),
                   weight({"mlp.fc2.weight", i}, n.embed, n.hidden), optional({"mlp.fc2.bias", i}, n.embed),
                   scale({"ls2.gamma", i})});
  }
  HeadParameters<T> head{optional("norm.weight", n.embed), optional("norm.bias", n.embed),
                         next({"head.weight", {n.classes, n.embed}, true, true}), optional("head.bias", n.classes)};
  return NetworkParameters<T>{std::move(stem), std::move(attention), std::move(mlp), std::move(head)};
}

// All parameters in order.
inline std::vector<ParameterSpec> parameter_specs(const NetworkSizes& sizes) {
  std::vector<ParameterSpec> specs;
  read_parameters(sizes, [&](ParameterSpec spec) {
    specs.push_back(std::move(spec));
    return 0;
  });
  return specs;
}

}  // namespace hydravit
