// The ops of the attention block on the CPU: forward and backward.
#include <tuple>

#include "arguments.h"

namespace hydravit {
namespace {

// The intervals of rows and columns in which the heads of a slice lie.
struct AttentionIntervals {
  Interval embed, query_rows, key_rows, value_rows, proj_columns;
  int64_t heads, head_dim, value_dim, pitch;

  // Whether heads of `dim` channels lie side by side: a packed weight can serve no others.
  bool touch(int64_t dim) const { return heads <= 1 || pitch == dim; }

  explicit AttentionIntervals(const AttentionSlice& slice)
      : embed(embed_of(slice)),
        heads(slice.heads),
        head_dim(slice.head_dim),
        value_dim(slice.value_dim),
        pitch(slice.pitch) {
    HYDRAVIT_CHECK(heads == 0 || (head_dim > 0 && value_dim > 0),
                   "slices: head_dim and value_dim of at least 1 expected, ", head_dim, " and ", value_dim,
                   " given for ", heads, " heads");
    HYDRAVIT_CHECK(heads <= 1 || pitch >= std::max(head_dim, value_dim), "slices: a pitch of at least head_dim ",
                   head_dim, " and value_dim ", value_dim, " expected, ", pitch, " given");
    const auto reach = [&](int64_t dim) { return heads == 0 ? 0 : (heads - 1) * pitch + dim; };
    query_rows = {heads == 0 ? 0 : slice.query_row, reach(head_dim)};
    key_rows = {heads == 0 ? 0 : slice.key_row, reach(head_dim)};
    value_rows = {heads == 0 ? 0 : slice.value_row, reach(value_dim)};
    proj_columns = {heads == 0 ? 0 : slice.proj_column, reach(value_dim)};
  }
};

}  // namespace

std::vector<AttentionBlock> describe(const AttentionArguments& arguments) {
  const Residual& x = arguments.x;
  const AttentionParameters<Parameter>& p = arguments.parameters;
  const int64_t count = static_cast<int64_t>(arguments.slices.size());
  const Tokens data = x.data(largest(arguments.slices, &AttentionSlice::embed));
  const int64_t D = p.norm_weight.dim() == 1 ? p.norm_weight.size(0) : kAny;
  p.norm_weight.check_both({D});
  p.norm_bias.check_both({D});
  p.qkv_weight.check_both({kAny, D});
  p.qkv_bias.check_both({p.qkv_weight.size(0)});
  p.proj_weight.check_both({D, kAny});
  p.proj_bias.check_both({D});
  p.layer_scale.check_both({D});

  std::vector<AttentionBlock> result;
  check_width_index(arguments.width_index, count, x.batch);
  HYDRAVIT_CHECK(arguments.queries >= 1 && arguments.queries <= x.tokens, "queries: 1 to ", x.tokens,
                 " tokens expected, ", arguments.queries, " given");
  for (const AttentionSlice& given : arguments.slices) {
    const AttentionIntervals slice(given);
    AttentionBlock block{};
    block.batch = x.batch, block.tokens = x.tokens, block.queries = arguments.queries;
    block.embed = slice.embed.length;
    block.heads = slice.heads, block.head_dim = slice.head_dim, block.value_dim = slice.value_dim;
    block.pitch = slice.pitch;
    block.scale = static_cast<float>(given.scale);
    block.eps = static_cast<float>(arguments.eps);
    block.x = data;
    block.norm_weight = p.norm_weight.vector(slice.embed);
    block.norm_bias = p.norm_bias.vector(slice.embed);
    const bool touching = slice.touch(slice.head_dim), values_touching = slice.touch(slice.value_dim);
    block.query_weight = p.qkv_weight.matrix(slice.query_rows, slice.embed, touching);
    block.key_weight = p.qkv_weight.matrix(slice.key_rows, slice.embed, touching);
    block.value_weight = p.qkv_weight.matrix(slice.value_rows, slice.embed, values_touching);
    block.query_bias = p.qkv_bias.vector(slice.query_rows);
    block.key_bias = p.qkv_bias.vector(slice.key_rows);
    block.value_bias = p.qkv_bias.vector(slice.value_rows);
    block.proj_weight = p.proj_weight.matrix(slice.embed, slice.proj_columns, values_touching);
    block.proj_bias = p.proj_bias.vector(slice.embed);
    block.layer_scale = p.layer_scale.vector(slice.embed);
    block.branch_scale = check_branch_scale(arguments.branch_scale, x.batch);
    result.push_back(block);
  }
  return result;
}

namespace {

// The block for one run of images. The saved tensors are empty where forward saves nothing.
AttentionBlock of_run(AttentionBlock block, int64_t image, int64_t images, const Tensor& qkv, const Tensor& attended,
                      const Tensor& logsumexp) {
  block.batch = images;
  block.x = from_image(block.x, image);
  block.branch_scale = from_image(block.branch_scale, image);
  block.qkv = from_image(mutable_tokens_of(qkv), image);
  block.attended = from_image(mutable_tokens_of(attended), image);
  if (logsumexp.dim() == 2) {
    block.logsumexp = mutable_floats(logsumexp) + image * logsumexp.stride(0);
    block.logsumexp_image_stride = logsumexp.stride(0);
  }
  return block;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_block(
    const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& qkv_weight,
    const OptionalTensor& qkv_bias, const Tensor& proj_weight, const OptionalTensor& proj_bias,
    const OptionalTensor& layer_scale, const OptionalTensor& branch_scale, const Integers& slices,
    const std::vector<double>& scales, double eps, const OptionalTensor& width_index, int64_t queries, bool save) {
  const AttentionArguments arguments{x,
                                     {{"norm_weight", norm_weight},
                                      {"norm_bias", norm_bias},
                                      {"qkv_weight", qkv_weight},
                                      {"qkv_bias", qkv_bias},
                                      {"proj_weight", proj_weight},
                                      {"proj_bias", proj_bias},
                                      {"layer_scale", layer_scale}},
                                     branch_scale,
                                     read_slices<AttentionSlice>(slices, scales),
                                     eps,
                                     width_index,
                                     queries};
  const std::vector<AttentionBlock> blocks = describe(arguments);
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  const Tensor y = torch::stable::new_empty(x, {batch, queries, width});
  const auto saved = [&](const Integers& shape) { return save ? torch::stable::new_empty(x, shape) : empty_output(x); };
  const Tensor qkv = saved({batch, tokens, arguments.qkv()}), attended = saved({batch, queries, arguments.attended()});
  const Tensor logsumexp = saved({batch, arguments.heads() * tokens});
  const MutableTokens all = mutable_tokens_of(y);
  for_each_run(width_index, batch, [&](int64_t image, int64_t count, int64_t slice) {
    AttentionBlock block = of_run(blocks[static_cast<size_t>(slice)], image, count, qkv, attended, logsumexp);
    block.y = from_image(all, image);
    check_status(attention_block_cpu(block, torch_threads()));
    zero_beyond(block.y, count, queries, block.embed, width);
  });
  return {y, qkv, attended, logsumexp};
}

Tensor attention_block_backward(const Tensor& grad, const Tensor& x, const Tensor& qkv, const Tensor& attended,
                                const Tensor& logsumexp, const Tensor& norm_weight, const Tensor& norm_bias,
                                const Tensor& qkv_weight, const OptionalTensor& qkv_bias, const Tensor& proj_weight,
                                const OptionalTensor& proj_bias, const OptionalTensor& layer_scale,
                                const OptionalTensor& branch_scale, const Integers& slices,
                                const std::vector<double>& scales, double eps, const OptionalTensor& width_index,
                                int64_t queries, bool x_grad, const OptionalTensor& grad_norm_weight,
                                const OptionalTensor& grad_norm_bias, const OptionalTensor& grad_qkv_weight,
                                const OptionalTensor& grad_qkv_bias, const OptionalTensor& grad_proj_weight,
                                const OptionalTensor& grad_proj_bias, const OptionalTensor& grad_layer_scale) {
  const AttentionArguments arguments{x,
                                     {{"norm_weight", norm_weight, &grad_norm_weight},
                                      {"norm_bias", norm_bias, &grad_norm_bias},
                                      {"qkv_weight", qkv_weight, &grad_qkv_weight},
                                      {"qkv_bias", qkv_bias, &grad_qkv_bias},
                                      {"proj_weight", proj_weight, &grad_proj_weight},
                                      {"proj_bias", proj_bias, &grad_proj_bias},
                                      {"layer_scale", layer_scale, &grad_layer_scale}},
                                     branch_scale,
                                     read_slices<AttentionSlice>(slices, scales),
                                     eps,
                                     width_index,
                                     queries};
  const std::vector<AttentionBlock> blocks = describe(arguments);
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  check(grad, "grad", {batch, queries, width});
  check(qkv, "qkv", {batch, tokens, arguments.qkv()});
  check(attended, "attended", {batch, queries, arguments.attended()});
  check(logsumexp, "logsumexp", {batch, arguments.heads() * tokens});
  HYDRAVIT_CHECK(logsumexp.is_contiguous(), "logsumexp: a contiguous tensor expected, as forward returned it");
  const Tensor dx = x_grad ? torch::stable::new_empty(x, {batch, tokens, width}) : empty_output(x);
  for_each_run(width_index, batch, [&](int64_t image, int64_t count, int64_t index) {
    const AttentionBlock block = of_run(blocks[static_cast<size_t>(index)], image, count, qkv, attended, logsumexp);
    const AttentionIntervals slice(arguments.slices[static_cast<size_t>(index)]);
    const AttentionParameters<Parameter>& p = arguments.parameters;
    AttentionBlockGradients gradients{};
    gradients.grad = from_image(tokens_of(grad), image);
    gradients.x = from_image(mutable_tokens_of(dx), image);
    gradients.norm_weight = p.norm_weight.vector_gradient(slice.embed);
    gradients.norm_bias = p.norm_bias.vector_gradient(slice.embed);
    gradients.query_weight = p.qkv_weight.matrix_gradient(slice.query_rows, slice.embed);
    gradients.key_weight = p.qkv_weight.matrix_gradient(slice.key_rows, slice.embed);
    gradients.value_weight = p.qkv_weight.matrix_gradient(slice.value_rows, slice.embed);
    gradients.query_bias = p.qkv_bias.vector_gradient(slice.query_rows);
    gradients.key_bias = p.qkv_bias.vector_gradient(slice.key_rows);
    gradients.value_bias = p.qkv_bias.vector_gradient(slice.value_rows);
    gradients.proj_weight = p.proj_weight.matrix_gradient(slice.embed, slice.proj_columns);
    gradients.proj_bias = p.proj_bias.vector_gradient(slice.embed);
    gradients.layer_scale = p.layer_scale.vector_gradient(slice.embed);
    check_status(attention_block_backward_cpu(block, gradients, torch_threads()));
    zero_beyond(gradients.x, count, tokens, block.embed, width);
  });
  return dx;
}

}  // namespace
}  // namespace hydravit

STABLE_TORCH_LIBRARY_IMPL(hydravit, CPU, m) {
  m.impl("attention_block_native", TORCH_BOX(&hydravit::attention_block));
  m.impl("attention_block_backward_native", TORCH_BOX(&hydravit::attention_block_backward));
}
