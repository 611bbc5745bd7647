#include "check.h"

namespace hydravit::tests {

namespace {

Arrays arrays_of(const MlpBlock& block) {
  const int64_t batch = block.batch, n = block.tokens, embed = block.embed, hidden = block.hidden;
  const Arrays parameters = {{"norm_weight", vector(embed)},        {"norm_bias", vector(embed)},
                             {"fc1_weight", weight(hidden, embed)}, {"fc1_bias", vector(hidden)},
                             {"fc2_weight", weight(embed, hidden)}, {"fc2_bias", vector(embed)},
                             {"layer_scale", vector(embed)}};
  const Array activations = tokens(batch, n, embed);
  return arrays_of_block(2, parameters, {{"x", activations}, {"grad", activations}, {"branch_scale", vector(batch)}},
                         {{"y", activations}, {"d_x", activations}, {"saved", tokens(batch, n, hidden)}});
}

void run(MlpBlock block, Arrays& arrays, const Threads& threads) {
  block.x = const_tokens(arrays, "x");
  set_mlp(block, arrays, "", const_weight);
  block.branch_scale = data(arrays, "branch_scale");

  block.y = mutable_tokens(arrays, "y");
  launch([&] { return mlp_block_cpu(block, threads); });
  const Array unsaved = arrays.at("y");
  block.saved = mutable_tokens(arrays, "saved");
  launch([&] { return mlp_block_cpu(block, threads); });
  expect_same(arrays.at("y"), unsaved, "y where the activations are not saved");

  block.y = {nullptr, 0, 0};
  MlpBlockGradients gradients{};
  gradients.grad = const_tokens(arrays, "grad"), gradients.x = mutable_tokens(arrays, "d_x");
  set_mlp(gradients, arrays, "d_", mutable_weight);
  launch([&] { return mlp_block_backward_cpu(block, gradients, threads); });
}

}  // namespace

std::vector<Test> mlp_tests() {
  struct Shape {
    int64_t batch, tokens, embed, hidden;
  };
  const Shape shapes[] = {
      {1, 1, 3, 1},      {3, 17, 32, 5},   {1, 50, 48, 100}, {3, 50, 80, 64}, {2, 17, 32, 0},
      {3, 197, 80, 320}, {1, 17, 400, 20}, {1, 17, 20, 801},  // more channels than one piece of K, in either product
      {7, 197, 3, 5},                                         // more images than one chunk
  };
  std::vector<Test> tests;
  for (const Shape& s : shapes) {
    MlpBlock block{};
    block.batch = s.batch, block.tokens = s.tokens, block.embed = s.embed, block.hidden = s.hidden, block.eps = 1e-6f;
    const std::string name = named("mlp", {s.batch, s.tokens, s.embed, s.hidden});
    std::vector<std::string> nullable;
    if (s.tokens == 17) nullable = {"fc1_bias", "fc2_bias", "layer_scale", "branch_scale", "d_x"};
    add_tests(
        tests, name, arrays_of(block), [=](auto& values) { mlp_block(block, values); },
        [=](Arrays& arrays, const Threads& threads) { run(block, arrays, threads); }, nullable, s.tokens == 17);
  }
  return tests;
}

}  // namespace hydravit::tests
