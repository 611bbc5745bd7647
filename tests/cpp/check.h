// The parts of a test of one launcher, and the check of its results.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "arrays.h"
#include "oracle.h"
#include "report.h"

namespace hydravit::tests {

// `run` calls the kernels on a copy of `arrays`. `plain` and `exact` are the same loops in float and in double, on the
// matrices in `arrays`. Every array must then hold their results.
struct Test {
  std::string name;
  Arrays arrays;
  std::function<void(Values<float>&)> plain;
  std::function<void(Values<double>&)> exact;
  std::function<void(Arrays&, const Threads&)> run;

  template <class Naive, class Run>
  Test(std::string name, Arrays arrays, const Naive& naive, const Run& run)
      : name(std::move(name)), arrays(std::move(arrays)), plain(naive), exact(naive), run(run) {}
};

inline std::string named(std::string name, const std::vector<int64_t>& sizes) {
  for (const int64_t size : sizes) name += ' ', name += std::to_string(size);
  return name;
}

void expect_same(const Array& a, const Array& b, const std::string& what);  // bit by bit
// Calls a launcher and expects success. It calls from a new thread: the kernels keep memory per thread, so this memory
// is no larger than the call needs, and the address sanitizer sees accesses beyond.
void launch(const std::function<int()>& launcher);

std::vector<Test> adamw_tests();
std::vector<Test> attention_tests();
std::vector<Test> head_tests();
std::vector<Test> mlp_tests();
std::vector<Test> network_tests();
std::vector<Test> stem_tests();

// ---- Absent nullable arrays ----

inline bool is_gradient(const std::string& name) { return name.starts_with("d_"); }

inline Arrays without(Arrays arrays, const std::vector<std::string>& names) {
  for (const std::string& name : names) arrays.erase(name), arrays.erase("d_" + name);
  return arrays;
}
// Keeps one gradient only.
inline Arrays only(Arrays arrays, const std::string& gradient) {
  std::erase_if(arrays, [&](const auto& entry) { return is_gradient(entry.first) && entry.first != gradient; });
  return arrays;
}

// The arrays of a block: parameters, their gradients and inputs are random, outputs are NaN.
inline Arrays arrays_of_block(unsigned seed, Arrays arrays, const Arrays& inputs, const Arrays& outputs) {
  for (const auto& [name, array] : Arrays(arrays)) arrays.emplace("d_" + name, array);
  arrays.insert(inputs.begin(), inputs.end());
  std::mt19937 generator(seed);
  for (auto& [name, array] : arrays) array = random(array, generator);
  arrays.insert(outputs.begin(), outputs.end());
  return arrays;
}

// Adds the tests of one block: on all arrays, without the nullable ones, and with each gradient by itself.
template <class Naive, class Run>
void add_tests(std::vector<Test>& tests, const std::string& name, const Arrays& arrays, const Naive& naive,
               const Run& run, const std::vector<std::string>& nullable, bool each_gradient) {
  tests.emplace_back(name, arrays, naive, run);
  if (!nullable.empty()) tests.emplace_back(name + ", nothing nullable", without(arrays, nullable), naive, run);
  for (const auto& [gradient, array] : arrays)
    if (each_gradient && is_gradient(gradient))
      tests.emplace_back(name + ", only " + gradient, only(arrays, gradient), naive, run);
}

// ---- A block, or the struct of its gradients, and its parameters in the arrays ----
// The names begin with `at`; `weight(arrays, name)` tells where a matrix lies.

template <class Block, class Find>
void set_stem(Block& block, Arrays& arrays, const std::string& at, const Find& weight) {
  block.weight = weight(arrays, at + "weight"), block.bias = data(arrays, at + "bias");
  block.cls_token = weight(arrays, at + "cls_token"), block.reg_token = weight(arrays, at + "reg_token");
  block.pos_embed = weight(arrays, at + "pos_embed");
}
template <class Block, class Find>
void set_attention(Block& block, Arrays& arrays, const std::string& at, const Find& weight) {
  block.norm_weight = data(arrays, at + "norm_weight"), block.norm_bias = data(arrays, at + "norm_bias");
  block.query_weight = weight(arrays, at + "query_weight"), block.query_bias = data(arrays, at + "query_bias");
  block.key_weight = weight(arrays, at + "key_weight"), block.key_bias = data(arrays, at + "key_bias");
  block.value_weight = weight(arrays, at + "value_weight"), block.value_bias = data(arrays, at + "value_bias");
  block.proj_weight = weight(arrays, at + "proj_weight"), block.proj_bias = data(arrays, at + "proj_bias");
  block.layer_scale = data(arrays, at + "layer_scale");
}
template <class Block, class Find>
void set_mlp(Block& block, Arrays& arrays, const std::string& at, const Find& weight) {
  block.norm_weight = data(arrays, at + "norm_weight"), block.norm_bias = data(arrays, at + "norm_bias");
  block.fc1_weight = weight(arrays, at + "fc1_weight"), block.fc1_bias = data(arrays, at + "fc1_bias");
  block.fc2_weight = weight(arrays, at + "fc2_weight"), block.fc2_bias = data(arrays, at + "fc2_bias");
  block.layer_scale = data(arrays, at + "layer_scale");
}
template <class Block, class Find>
void set_head(Block& block, Arrays& arrays, const std::string& at, const Find& weight) {
  block.norm_weight = data(arrays, at + "norm_weight"), block.norm_bias = data(arrays, at + "norm_bias");
  block.weight = weight(arrays, at + "weight"), block.bias = data(arrays, at + "bias");
}

// Points a stem or a call of the network at the images.
template <class Block>
void set_images(Block& block, Arrays& arrays) {
  const Array& images = arrays.at("images");
  block.images = data(arrays, "images"), block.image_strides[0] = images.row_axes[0].stride;
  for (int i = 0; i < 3; i++) block.image_strides[i + 1] = images.column_axes[i].stride;
}

}  // namespace hydravit::tests
