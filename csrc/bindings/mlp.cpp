// The ops of the MLP block on the CPU.
#include <tuple>

#include "arguments.h"

namespace hydravit {
namespace {

Interval hidden_of(const int64_t* slice) { return {slice[3] == 0 ? 0 : slice[2], slice[3]}; }

}  // namespace

std::vector<MlpBlock> describe(const MlpArguments& arguments) {
  const Stream& x = arguments.x;
  const int64_t count = check_slices(arguments.slices, kMlpIntegers);
  const Tokens data = x.data(largest(arguments.slices, kMlpIntegers, 1));
  const int64_t D = arguments.norm_weight.dim() == 1 ? arguments.norm_weight.size(0) : kAny;
  arguments.norm_weight.check_both({D});
  arguments.norm_bias.check_both({D});
  arguments.fc1_weight.check_both({kAny, D});
  const int64_t hidden = arguments.fc1_weight.size(0);
  arguments.fc1_bias.check_both({hidden});
  arguments.fc2_weight.check_both({D, hidden});
  arguments.fc2_bias.check_both({D});
  arguments.layer_scale.check_both({D});

  std::vector<MlpBlock> result;
  check_subnet(arguments.subnet, count, x.batch);
  for (int64_t i = 0; i < count; i++) {
    const int64_t* slice = &arguments.slices[static_cast<size_t>(i * kMlpIntegers)];
    const Interval embed = embed_of(slice), rows = hidden_of(slice);
    MlpBlock block{};
    block.batch = x.batch, block.tokens = x.tokens, block.embed = embed.length, block.hidden = rows.length;
    block.eps = static_cast<float>(arguments.eps);
    block.x = data;
    block.norm_weight = arguments.norm_weight.vector(embed);
    block.norm_bias = arguments.norm_bias.vector(embed);
    block.fc1_weight = arguments.fc1_weight.matrix(rows, embed);
    block.fc1_bias = arguments.fc1_bias.vector(rows);
    block.fc2_weight = arguments.fc2_weight.matrix(embed, rows);
    block.fc2_bias = arguments.fc2_bias.vector(embed);
    block.layer_scale = arguments.layer_scale.vector(embed);
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
                                     const OptionalTensor& subnet, bool save) {
  const MlpArguments arguments{x,
                               {"norm_weight", norm_weight},
                               {"norm_bias", norm_bias},
                               {"fc1_weight", fc1_weight},
                               {"fc1_bias", fc1_bias},
                               {"fc2_weight", fc2_weight},
                               {"fc2_bias", fc2_bias},
                               {"layer_scale", layer_scale},
                               branch_scale,
                               slices,
                               eps,
                               subnet};
  const std::vector<MlpBlock> blocks = describe(arguments);
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  const Tensor y = torch::stable::new_empty(x, {batch, tokens, width});
  const Tensor saved = save ? torch::stable::new_empty(x, {batch, tokens, arguments.hidden()}) : empty_output(x);
  const MutableTokens all = mutable_tokens_of(y);
  for_each_run(subnet, batch, [&](int64_t image, int64_t count, int64_t slice) {
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
                          const OptionalTensor& subnet, bool x_grad, const OptionalTensor& grad_norm_weight,
                          const OptionalTensor& grad_norm_bias, const OptionalTensor& grad_fc1_weight,
                          const OptionalTensor& grad_fc1_bias, const OptionalTensor& grad_fc2_weight,
                          const OptionalTensor& grad_fc2_bias, const OptionalTensor& grad_layer_scale) {
  const MlpArguments arguments{x,
                               {"norm_weight", norm_weight, &grad_norm_weight},
                               {"norm_bias", norm_bias, &grad_norm_bias},
                               {"fc1_weight", fc1_weight, &grad_fc1_weight},
                               {"fc1_bias", fc1_bias, &grad_fc1_bias},
                               {"fc2_weight", fc2_weight, &grad_fc2_weight},
                               {"fc2_bias", fc2_bias, &grad_fc2_bias},
                               {"layer_scale", layer_scale, &grad_layer_scale},
                               branch_scale,
                               slices,
                               eps,
                               subnet};
  const std::vector<MlpBlock> blocks = describe(arguments);
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  check(grad, "grad", {batch, tokens, width});
  check(hidden, "hidden", {batch, tokens, arguments.hidden()});
  const Tensor dx = x_grad ? torch::stable::new_empty(x, {batch, tokens, width}) : empty_output(x);
  for_each_run(subnet, batch, [&](int64_t image, int64_t count, int64_t index) {
    const MlpBlock block = of_run(blocks[static_cast<size_t>(index)], image, count, hidden);
    const int64_t* slice = &slices[static_cast<size_t>(index * kMlpIntegers)];
    const Interval embed = embed_of(slice), rows = hidden_of(slice);
    MlpBlockGradients gradients{};
    gradients.grad = from_image(tokens_of(grad), image);
    gradients.x = from_image(mutable_tokens_of(dx), image);
    gradients.norm_weight = arguments.norm_weight.vector_gradient(embed);
    gradients.norm_bias = arguments.norm_bias.vector_gradient(embed);
    gradients.fc1_weight = arguments.fc1_weight.matrix_gradient(rows, embed);
    gradients.fc1_bias = arguments.fc1_bias.vector_gradient(rows);
    gradients.fc2_weight = arguments.fc2_weight.matrix_gradient(embed, rows);
    gradients.fc2_bias = arguments.fc2_bias.vector_gradient(embed);
    gradients.layer_scale = arguments.layer_scale.vector_gradient(embed);
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
