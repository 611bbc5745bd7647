#include "check.h"

namespace hydravit::tests {

namespace {

Arrays arrays_of(const AttentionBlock& block) {
  const int64_t batch = block.batch, n = block.tokens, queries = block.queries, embed = block.embed, k = block.heads;
  const int64_t d = block.head_dim, dv = block.value_dim, pitch = block.pitch;
  const Arrays parameters = {{"norm_weight", vector(embed)},
                             {"norm_bias", vector(embed)},
                             {"query_weight", head_rows(k, d, pitch, embed)},
                             {"key_weight", head_rows(k, d, pitch, embed)},
                             {"value_weight", head_rows(k, dv, pitch, embed)},
                             {"query_bias", head_vector(k, d, pitch)},
                             {"key_bias", head_vector(k, d, pitch)},
                             {"value_bias", head_vector(k, dv, pitch)},
                             {"proj_weight", head_columns(embed, k, dv, pitch)},
                             {"proj_bias", vector(embed)},
                             {"layer_scale", vector(embed)}};
  const Array x = tokens(batch, n, embed), y = tokens(batch, queries, embed);
  const Arrays inputs = {{"x", x}, {"grad", y}, {"branch_scale", vector(batch)}};
  const Arrays outputs = {{"y", y},
                          {"d_x", x},
                          {"qkv", tokens(batch, n, k * (2 * d + dv))},
                          {"attended", tokens(batch, queries, k * dv)},
                          {"logsumexp", Array({{batch, k * queries + kGap}, {k, queries}}, {{queries, 1}})}};
  return arrays_of_block(1, parameters, inputs, outputs);
}

void run(AttentionBlock block, Arrays& arrays, const Threads& threads) {
  block.x = const_tokens(arrays, "x");
  set_attention(block, arrays, "", const_weight);
  block.branch_scale = data(arrays, "branch_scale");

  block.y = mutable_tokens(arrays, "y");
  launch([&] { return attention_block_cpu(block, threads); });
  const Array unsaved = arrays.at("y");
  block.qkv = mutable_tokens(arrays, "qkv"), block.attended = mutable_tokens(arrays, "attended");
  block.logsumexp = data(arrays, "logsumexp");
  block.logsumexp_image_stride = arrays.at("logsumexp").row_axes[0].stride;
  launch([&] { return attention_block_cpu(block, threads); });
  expect_same(arrays.at("y"), unsaved, "y where the activations are not saved");

  block.y = {nullptr, 0, 0};
  AttentionBlockGradients gradients{};
  gradients.grad = const_tokens(arrays, "grad"), gradients.x = mutable_tokens(arrays, "d_x");
  set_attention(gradients, arrays, "d_", mutable_weight);
  launch([&] { return attention_block_backward_cpu(block, gradients, threads); });
}

}  // namespace

std::vector<Test> attention_tests() {
  struct Shape {
    int64_t batch, tokens, embed, heads, head_dim, value_dim, pitch, queries = tokens;
  };
  const Shape shapes[] = {
      {1, 1, 3, 1, 5, 5, 5},         {3, 17, 32, 2, 16, 16, 24},
      {1, 50, 48, 3, 16, 24, 24},    {3, 50, 80, 2, 24, 5, 40},
      {2, 17, 32, 0, 16, 16, 16},    {1, 17, 400, 1, 8, 8, 8},  // more channels than one piece of K
      {3, 197, 80, 2, 64, 64, 64},   {7, 197, 3, 1, 5, 3, 9},   // more images than one chunk
      {3, 17, 32, 2, 16, 8, 24, 1},  {2, 50, 48, 3, 16, 24, 24, 37},
      {2, 17, 32, 0, 16, 16, 16, 5}, {7, 197, 40, 1, 16, 16, 16, 1},
  };
  std::vector<Test> tests;
  for (const Shape& s : shapes) {
    AttentionBlock block{};
    block.batch = s.batch, block.tokens = s.tokens, block.queries = s.queries;
    block.embed = s.embed, block.heads = s.heads;
    block.head_dim = s.head_dim, block.value_dim = s.value_dim, block.pitch = s.pitch;
    block.scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim)), block.eps = 1e-6f;
    const std::string name =
        named("attention", {s.batch, s.tokens, s.embed, s.heads, s.head_dim, s.value_dim, s.pitch, s.queries});
    std::vector<std::string> nullable;
    if (s.tokens == 17)
      nullable = {"query_bias", "key_bias", "value_bias", "proj_bias", "layer_scale", "branch_scale", "d_x"};
    add_tests(
        tests, name, arrays_of(block), [=](auto& values) { attention_block(block, values); },
        [=](Arrays& arrays, const Threads& threads) { run(block, arrays, threads); }, nullable, s.tokens == 17);
  }
  return tests;
}

}  // namespace hydravit::tests
