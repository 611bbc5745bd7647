#include "check.h"

namespace hydravit::tests {

namespace {

Arrays arrays_of(const Head& block, int64_t token_count) {
  const int64_t outputs = block.classes == 0 ? block.embed : block.classes;
  const Arrays parameters = {{"norm_weight", vector(block.embed)},
                             {"norm_bias", vector(block.embed)},
                             {"weight", weight(block.classes, block.embed)},
                             {"bias", vector(block.classes)}};
  const Array x = tokens(block.batch, token_count, block.embed), y = weight(block.batch, outputs);
  return arrays_of_block(4, parameters, {{"x", x}, {"grad", y}}, {{"y", y}, {"d_x", x}});
}

void run(Head block, int64_t token_count, Arrays& arrays, const Threads& threads) {
  block.x = const_tokens(arrays, "x");
  set_head(block, arrays, "", const_weight);
  block.y = data(arrays, "y"), block.y_row_stride = arrays.at("y").row_stride();
  launch([&] { return head_cpu(block, threads); });

  block.y = nullptr;
  HeadGradients gradients{};
  gradients.grad = data(arrays, "grad"), gradients.grad_row_stride = arrays.at("grad").row_stride();
  gradients.tokens = token_count;
  gradients.x = mutable_tokens(arrays, "d_x");
  set_head(gradients, arrays, "d_", mutable_weight);
  launch([&] { return head_backward_cpu(block, gradients, threads); });
}

}  // namespace

std::vector<Test> head_tests() {
  struct Shape {
    int64_t batch, tokens, pool_start, pool_stop, embed, classes;
  };
  const Shape shapes[] = {
      {1, 1, 0, 1, 3, 1},       {3, 17, 0, 1, 32, 10},    {3, 50, 1, 50, 48, 0},
      {1, 50, 2, 49, 80, 1000}, {3, 17, 1, 17, 400, 700},
  };
  std::vector<Test> tests;
  for (const Shape& s : shapes) {
    Head block{};
    block.batch = s.batch, block.pool_start = s.pool_start, block.pool_stop = s.pool_stop;
    block.embed = s.embed, block.classes = s.classes, block.eps = 1e-6f;
    const std::string name = named("head", {s.batch, s.tokens, s.pool_start, s.pool_stop, s.embed, s.classes});
    add_tests(
        tests, name, arrays_of(block, s.tokens), [=](auto& values) { head(block, values); },
        [=](Arrays& arrays, const Threads& threads) { run(block, s.tokens, arrays, threads); },
        {"norm_weight", "norm_bias", "bias", "d_x"}, true);
  }
  return tests;
}

}  // namespace hydravit::tests
