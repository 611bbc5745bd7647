// The ops of the MLP block on the CPU: forward and backward.
#include <tuple>

#include "arguments.h"

namespace hydravit {
namespace {

Interval hidden_of(const MlpSlice& slice) { return {slice.hidden == 0 ? 0 : slice.hidden_offset, slice.hidden}; }

}  // namespace

std::vector<MlpBlock> describe(const MlpArguments& arguments) {
  const Residual& x = arguments.x;
  const MlpParameters<Parameter>& p = arguments.parameters;
  const Tokens data = x.data(largest(arguments.slices, &MlpSlice::embed));
  const int64_t D = p.norm_weight.dim() == 1 ? p.norm_weight.size(0) : kAny;
  p.norm_weight.check_both({D});
  p.norm_bias.check_both({D});
  p.fc1_weight.check_both({kAny, D});
  const int64_t hidden = p.fc1_weight.size(0);
  p.fc1_bias.check_both({hidden});
  p.fc2_weight.check_both({D, hidden});
  p.fc2_bias.check_both({D});
  p.layer_scale.check_both({D});

  std::vector<MlpBlock> result;
  check_width_index(arguments.width_index, static_cast<int64_t>(arguments.slices.size()), x.batch);
  for (const MlpSlice& slice : arguments.slices) {
    const Interval embed = embed_of(slice), rows = hidden_of(slice);
    MlpBlock block{};
    block.batch = x.batch, block.tokens = x.tokens, block.embed = embed.length, block.hidden = rows.length;
    block.eps = static_cast<float>(arguments.eps);
    block.x = data;
    block.norm_weight = p.norm_weight.vector(embed);
    block.norm_bias = p.norm_bias.vector(embed);
    block.fc1_weight = p.fc1_weight.matrix(rows, embed);
    block.fc1_bias = p.fc1_bias.vector(rows);
    block.fc2_weight = p.fc2_weight.matrix(embed, rows);
    block.fc2_bias = p.fc2_bias.vector(embed);
    block.layer_scale = p.layer_scale.vector(embed);
    block.branch_scale = check_branch_scale(arguments.branch_scale, x.batch);
    result.push_back(block);
  }
  return result;
}

namespace {

MlpBlock of_run(MlpBlock block, int64_t image, int64_t images, const Tensor& saved) {
  block.batch = images;
  block.x = from_image(block.x, image);
  block.branch_scale = from_image(block.branch_scale, image);
  block.saved = from_image(mutable_tokens_of(saved), image);
  return block;
}

std::tuple<Tensor, Tensor> mlp_block(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                                     const Tensor& fc1_weight, const OptionalTensor& fc1_bias, const Tensor& fc2_weight,
                                     const OptionalTensor& fc2_bias, const OptionalTensor& layer_scale,
                                     const OptionalTensor& branch_scale, const Integers& slices, double eps,
                                     const OptionalTensor& width_index, bool save) {
  const MlpArguments arguments{x,
                               {{"norm_weight", norm_weight},
                                {"norm_bias", norm_bias},
                                {"fc1_weight", fc1_weight},
                                {"fc1_bias", fc1_bias},
                                {"fc2_weight", fc2_weight},
                                {"fc2_bias", fc2_bias},
                                {"layer_scale", layer_scale}},
                               branch_scale,
                               read_slices<MlpSlice>(slices),
                               eps,
                               width_index};
  const std::vector<MlpBlock> blocks = describe(arguments);
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  const Tensor y = torch::stable::new_empty(x, {batch, tokens, width});
  const Tensor saved = save ? torch::stable::new_empty(x, {batch, tokens, arguments.hidden()}) : empty_output(x);
  const MutableTokens all = mutable_tokens_of(y);
  for_each_run(width_index, batch, [&](int64_t image, int64_t count, int64_t slice) {
    MlpBlock block = of_run(blocks[static_cast<size_t>(slice)], image, count, saved);
    block.y = from_image(all, image);
    check_status(mlp_block_cpu(block, torch_threads()));
    zero_beyond(block.y, count, tokens, block.embed, width);
  });
  return {y, saved};
}

Tensor mlp_block_backward(const Tensor& grad, const Tensor& x, const Tensor& hidden, const Tensor& norm_weight,
                          const Tensor& norm_bias, const Tensor& fc1_weight, const OptionalTensor& fc1_bias,
                          const Tensor& fc2_weight, const OptionalTensor& fc2_bias, const OptionalTensor& layer_scale,
                          const OptionalTensor& branch_scale, const Integers& slices, double eps,
                          const OptionalTensor& width_index, bool x_grad, const OptionalTensor& grad_norm_weight,
                          const OptionalTensor& grad_norm_bias, const OptionalTensor& grad_fc1_weight,
                          const OptionalTensor& grad_fc1_bias, const OptionalTensor& grad_fc2_weight,
                          const OptionalTensor& grad_fc2_bias, const OptionalTensor& grad_layer_scale) {
  const MlpArguments arguments{x,
                               {{"norm_weight", norm_weight, &grad_norm_weight},
                                {"norm_bias", norm_bias, &grad_norm_bias},
                                {"fc1_weight", fc1_weight, &grad_fc1_weight},
                                {"fc1_bias", fc1_bias, &grad_fc1_bias},
                                {"fc2_weight", fc2_weight, &grad_fc2_weight},
                                {"fc2_bias", fc2_bias, &grad_fc2_bias},
                                {"layer_scale", layer_scale, &grad_layer_scale}},
                               branch_scale,
                               read_slices<MlpSlice>(slices),
                               eps,
                               width_index};
  const std::vector<MlpBlock> blocks = describe(arguments);
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  check(grad, "grad", {batch, tokens, width});
  check(hidden, "hidden", {batch, tokens, arguments.hidden()});
  const Tensor dx = x_grad ? torch::stable::new_empty(x, {batch, tokens, width}) : empty_output(x);
  for_each_run(width_index, batch, [&](int64_t image, int64_t count, int64_t index) {
    const MlpBlock block = of_run(blocks[static_cast<size_t>(index)], image, count, hidden);
    const MlpSlice& slice = arguments.slices[static_cast<size_t>(index)];
    const MlpParameters<Parameter>& p = arguments.parameters;
    const Interval embed = embed_of(slice), rows = hidden_of(slice);
    MlpBlockGradients gradients{};
    gradients.grad = from_image(tokens_of(grad), image);
    gradients.x = from_image(mutable_tokens_of(dx), image);
    gradients.norm_weight = p.norm_weight.vector_gradient(embed);
    gradients.norm_bias = p.norm_bias.vector_gradient(embed);
    gradients.fc1_weight = p.fc1_weight.matrix_gradient(rows, embed);
    gradients.fc1_bias = p.fc1_bias.vector_gradient(rows);
    gradients.fc2_weight = p.fc2_weight.matrix_gradient(embed, rows);
    gradients.fc2_bias = p.fc2_bias.vector_gradient(embed);
    gradients.layer_scale = p.layer_scale.vector_gradient(embed);
    check_status(mlp_block_backward_cpu(block, gradients, torch_threads()));
    zero_beyond(gradients.x, count, tokens, block.embed, width);
  });
  return dx;
}

}  // namespace
}  // namespace hydravit

STABLE_TORCH_LIBRARY_IMPL(hydravit, CPU, m) {
  m.impl("mlp_block_native", TORCH_BOX(&hydravit::mlp_block));
  m.impl("mlp_block_backward_native", TORCH_BOX(&hydravit::mlp_block_backward));
}
