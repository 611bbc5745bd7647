// The network's ops of hydravit_kernels/ops.py on the CPU, on torch's stable ABI.
//
// An op checks what it is given, allocates its outputs, folds the slices' offsets into base pointers and calls one
// kernel per run of consecutive images of the same slice. Parameters are never copied: what a kernel cannot read in
// place is an error.
#include <algorithm>
#include <tuple>

#include "checks.h"

namespace hydravit {
namespace {

Tensor empty_output(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

const float* check_branch_scale(const OptionalTensor& branch_scale, int64_t batch) {
  const Parameter parameter("branch_scale", branch_scale);
  parameter.check_both({batch});
  return parameter.vector({0, batch});
}

// The residual stream: x (B, N, the widest embed), or, inside the whole network, in nobody's tensor.
struct Stream {
  int64_t batch, tokens;
  const Tensor* x;

  Stream(const Tensor& x) : batch(x.dim() == 3 ? x.size(0) : 0), tokens(x.dim() == 3 ? x.size(1) : 0), x(&x) {}
  Stream(int64_t batch, int64_t tokens) : batch(batch), tokens(tokens), x(nullptr) {}

  Tokens data(int64_t width) const {
    if (x == nullptr) return {};
    check(*x, "x", {kAny, kAny, width});
    HYDRAVIT_CHECK(tokens > 0, "x: at least one token expected, shape ", text(shape_of(*x)), " given");
    return tokens_of(*x);
  }
};

// ---- Stem ----

constexpr int64_t kEmbedIntegers = 2;

struct StemArguments {
  Tensor images;
  Parameter weight, bias, cls_token, reg_token, pos_embed;
  Integers slices;
  OptionalTensor subnet;

  int64_t batch() const { return images.size(0); }
  int64_t width() const { return largest(slices, kEmbedIntegers, 1); }
  static int64_t tokens_of(const Parameter& prefix) { return prefix.present() ? prefix.size(1) : 0; }
  int64_t tokens() const {
    return tokens_of(cls_token) + tokens_of(reg_token) +
           images.size(2) / weight.size(2) * (images.size(3) / weight.size(3));
  }
};

// The axes of one element have strides, but no meaning for them.
void check_patch_weight(const Tensor& weight, const char* name, const Integers& expected) {
  check_shape(weight, name, expected);
  bool contiguous = true;
  int64_t stride = 1;
  for (int64_t axis = 3; axis > 0; stride *= weight.size(axis--))
    contiguous = contiguous && (weight.size(axis) == 1 || weight.stride(axis) == stride);
  HYDRAVIT_CHECK(contiguous, name, " of the patch embedding: each output channel contiguous expected, strides ",
                 text(strides_of(weight)), " for shape ", text(shape_of(weight)),
                 " given; model.to(memory_format=torch.contiguous_format) makes it so");
}

// One kernel argument per slice, for all images.
std::vector<Stem> describe(const StemArguments& arguments) {
  const Tensor& images = arguments.images;
  const Parameter& weight = arguments.weight;
  const int64_t count = check_slices(arguments.slices, kEmbedIntegers);
  check_shape(images, "images", {kAny, kAny, kAny, kAny});
  const int64_t channels = images.size(1);
  if (weight.packed())
    weight.check_both({kAny, channels, kAny, kAny});
  else
    check_patch_weight(weight.tensor(), "weight", {kAny, channels, kAny, kAny});
  const int64_t D = weight.size(0), height = weight.size(2), width = weight.size(3);
  HYDRAVIT_CHECK(channels > 0 && height > 0 && width > 0, "weight: a patch of at least one pixel expected, shape ",
                 text(weight.shape()), " given");
  if (weight.gradient() != nullptr) check_patch_weight(*weight.gradient(), "grad_weight", weight.shape());
  HYDRAVIT_CHECK(
      images.size(2) > 0 && images.size(3) > 0 && images.size(2) % height == 0 && images.size(3) % width == 0,
      "images: height and width expected to be multiples of the patch (", height, ", ", width, "), ",
      text(shape_of(images)), " given");
  arguments.bias.check_both({D});
  arguments.cls_token.check_both({1, kAny, D});
  arguments.reg_token.check_both({1, kAny, D});
  arguments.pos_embed.check_both({1, kAny, D});
  const int64_t tokens = arguments.tokens(), patches = images.size(2) / height * (images.size(3) / width);
  const int64_t positions = StemArguments::tokens_of(arguments.pos_embed);
  HYDRAVIT_CHECK(!arguments.pos_embed.present() || positions == tokens || positions == patches, "pos_embed: shape (1, ",
                 tokens, ", ", D, ") or, for the patches only, (1, ", patches, ", ", D, ") expected, ",
                 text(arguments.pos_embed.shape()), " given");

  std::vector<Stem> result;
  check_subnet(arguments.subnet, count, images.size(0));
  for (int64_t i = 0; i < count; i++) {
    const Interval embed = embed_of(&arguments.slices[static_cast<size_t>(i * kEmbedIntegers)]);
    check_inside("weight", "output channels", embed, D);
    Stem block{};
    block.batch = images.size(0), block.channels = channels;
    block.grid_height = images.size(2) / height, block.grid_width = images.size(3) / width;
    block.patch_height = height, block.patch_width = width;
    block.embed = embed.length;
    block.cls_tokens = StemArguments::tokens_of(arguments.cls_token);
    block.reg_tokens = StemArguments::tokens_of(arguments.reg_token);
    block.images = floats(images);
    for (int axis = 0; axis < 4; axis++) block.image_strides[axis] = images.stride(axis);
    if (weight.packed())
      block.weight = weight.panels_of(embed, 0, channels * height * width);
    else
      block.weight = {floats(weight.tensor()) + embed.offset * weight.tensor().stride(0), weight.tensor().stride(0)};
    block.bias = arguments.bias.vector(embed);
    block.cls_token = arguments.cls_token.matrix({0, block.cls_tokens}, embed);
    block.reg_token = arguments.reg_token.matrix({0, block.reg_tokens}, embed);
    block.pos_embed = arguments.pos_embed.matrix({0, positions}, embed);
    block.pos_on_prefix = positions == tokens;
    result.push_back(block);
  }
  return result;
}

Stem of_run(Stem block, int64_t image, int64_t images) {
  block.batch = images;
  block.images += image * block.image_strides[0];
  return block;
}

Tensor stem(const Tensor& images, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& cls_token,
            const OptionalTensor& reg_token, const OptionalTensor& pos_embed, const Integers& slices,
            const OptionalTensor& subnet) {
  const OptionalTensor weight_argument(weight);
  const StemArguments arguments{images,
                                {"weight", weight_argument},
                                {"bias", bias},
                                {"cls_token", cls_token},
                                {"reg_token", reg_token},
                                {"pos_embed", pos_embed},
                                slices,
                                subnet};
  const std::vector<Stem> blocks = describe(arguments);
  const int64_t tokens = arguments.tokens(), width = arguments.width();
  const Tensor y = torch::stable::new_empty(weight, {arguments.batch(), tokens, width});
  const MutableTokens all = mutable_tokens_of(y);
  for_each_run(subnet, arguments.batch(), [&](int64_t image, int64_t count, int64_t slice) {
    Stem block = of_run(blocks[static_cast<size_t>(slice)], image, count);
    block.y = from_image(all, image);
    check_status(stem_cpu(block, torch_threads()));
    zero_beyond(block.y, count, tokens, block.embed, width);
  });
  return y;
}

Tensor stem_backward(const Tensor& grad, const Tensor& images, const Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& cls_token, const OptionalTensor& reg_token, const OptionalTensor& pos_embed,
                     const Integers& slices, const OptionalTensor& subnet, bool x_grad,
                     const OptionalTensor& grad_weight, const OptionalTensor& grad_bias,
                     const OptionalTensor& grad_cls_token, const OptionalTensor& grad_reg_token,
                     const OptionalTensor& grad_pos_embed) {
  const OptionalTensor weight_argument(weight);
  const StemArguments arguments{images,
                                {"weight", weight_argument, &grad_weight},
                                {"bias", bias, &grad_bias},
                                {"cls_token", cls_token, &grad_cls_token},
                                {"reg_token", reg_token, &grad_reg_token},
                                {"pos_embed", pos_embed, &grad_pos_embed},
                                slices,
                                subnet};
  const std::vector<Stem> blocks = describe(arguments);
  check(grad, "grad", {arguments.batch(), arguments.tokens(), arguments.width()});
  const Tensor dx = x_grad ? torch::stable::new_empty(images, shape_of(images)) : empty_output(images);
  for_each_run(subnet, arguments.batch(), [&](int64_t image, int64_t count, int64_t slice) {
    const Stem block = of_run(blocks[static_cast<size_t>(slice)], image, count);
    const Interval embed = embed_of(&slices[static_cast<size_t>(slice * kEmbedIntegers)]);
    StemGradients gradients{};
    gradients.grad = from_image(tokens_of(grad), image);
    if (x_grad) gradients.images = mutable_floats(dx) + image * dx.stride(0);
    if (grad_weight)
      gradients.weight = {mutable_floats(*grad_weight) + embed.offset * grad_weight->stride(0), grad_weight->stride(0)};
    gradients.bias = arguments.bias.vector_gradient(embed);
    gradients.cls_token = arguments.cls_token.matrix_gradient({0, block.cls_tokens}, embed);
    gradients.reg_token = arguments.reg_token.matrix_gradient({0, block.reg_tokens}, embed);
    gradients.pos_embed = arguments.pos_embed.matrix_gradient({0, 0}, embed);
    check_status(stem_backward_cpu(block, gradients, torch_threads()));
  });
  return dx;
}

// ---- Attention block ----

constexpr int64_t kAttentionIntegers = 10;

struct AttentionIntervals {
  Interval embed, query_rows, key_rows, value_rows, proj_columns;
  int64_t heads, head_dim, value_dim, pitch;

  // Whether heads of this many channels lie side by side, as panels need them.
  bool touch(int64_t dim) const { return heads <= 1 || pitch == dim; }

  explicit AttentionIntervals(const int64_t* slice)
      : embed(embed_of(slice)), heads(slice[6]), head_dim(slice[7]), value_dim(slice[8]), pitch(slice[9]) {
    HYDRAVIT_CHECK(heads == 0 || (head_dim > 0 && value_dim > 0),
                   "slices: head_dim and value_dim of at least 1 expected, ", head_dim, " and ", value_dim,
                   " given for ", heads, " heads");
    HYDRAVIT_CHECK(heads <= 1 || pitch >= std::max(head_dim, value_dim), "slices: a pitch of at least head_dim ",
                   head_dim, " and value_dim ", value_dim, " expected, ", pitch, " given");
    const auto reach = [&](int64_t dim) { return heads == 0 ? 0 : (heads - 1) * pitch + dim; };
    query_rows = {heads == 0 ? 0 : slice[2], reach(head_dim)};
    key_rows = {heads == 0 ? 0 : slice[3], reach(head_dim)};
    value_rows = {heads == 0 ? 0 : slice[4], reach(value_dim)};
    proj_columns = {heads == 0 ? 0 : slice[5], reach(value_dim)};
  }
};

struct AttentionArguments {
  Stream x;
  Parameter norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, layer_scale;
  OptionalTensor branch_scale;
  Integers slices;
  std::vector<double> scales;
  double eps;
  OptionalTensor subnet;
  int64_t queries;

  // Sizes of what forward saves: the largest of any slice.
  int64_t qkv = 0, attended = 0, heads = 0;
};

std::vector<AttentionBlock> describe(AttentionArguments& arguments) {
  const Stream& x = arguments.x;
  const int64_t count = check_slices(arguments.slices, kAttentionIntegers);
  const Tokens data = x.data(largest(arguments.slices, kAttentionIntegers, 1));
  const int64_t D = arguments.norm_weight.dim() == 1 ? arguments.norm_weight.size(0) : kAny;
  arguments.norm_weight.check_both({D});
  arguments.norm_bias.check_both({D});
  arguments.qkv_weight.check_both({kAny, D});
  arguments.qkv_bias.check_both({arguments.qkv_weight.size(0)});
  arguments.proj_weight.check_both({D, kAny});
  arguments.proj_bias.check_both({D});
  arguments.layer_scale.check_both({D});

  std::vector<AttentionBlock> result;
  check_subnet(arguments.subnet, count, x.batch);
  HYDRAVIT_CHECK(arguments.queries >= 1 && arguments.queries <= x.tokens, "queries: 1 to ", x.tokens,
                 " tokens expected, ", arguments.queries, " given");
  HYDRAVIT_CHECK(static_cast<int64_t>(arguments.scales.size()) == count, "scales: one for each of ", count,
                 " slices expected, ", arguments.scales.size(), " given");
  for (int64_t i = 0; i < count; i++) {
    const AttentionIntervals slice(&arguments.slices[static_cast<size_t>(i * kAttentionIntegers)]);
    AttentionBlock block{};
    block.batch = x.batch, block.tokens = x.tokens, block.queries = arguments.queries;
    block.embed = slice.embed.length;
    block.heads = slice.heads, block.head_dim = slice.head_dim, block.value_dim = slice.value_dim;
    block.pitch = slice.pitch;
    block.scale = static_cast<float>(arguments.scales[static_cast<size_t>(i)]);
    block.eps = static_cast<float>(arguments.eps);
    block.x = data;
    block.norm_weight = arguments.norm_weight.vector(slice.embed);
    block.norm_bias = arguments.norm_bias.vector(slice.embed);
    const bool touching = slice.touch(slice.head_dim), values_touching = slice.touch(slice.value_dim);
    block.query_weight = arguments.qkv_weight.matrix(slice.query_rows, slice.embed, touching);
    block.key_weight = arguments.qkv_weight.matrix(slice.key_rows, slice.embed, touching);
    block.value_weight = arguments.qkv_weight.matrix(slice.value_rows, slice.embed, values_touching);
    block.query_bias = arguments.qkv_bias.vector(slice.query_rows);
    block.key_bias = arguments.qkv_bias.vector(slice.key_rows);
    block.value_bias = arguments.qkv_bias.vector(slice.value_rows);
    block.proj_weight = arguments.proj_weight.matrix(slice.embed, slice.proj_columns, values_touching);
    block.proj_bias = arguments.proj_bias.vector(slice.embed);
    block.layer_scale = arguments.layer_scale.vector(slice.embed);
    block.branch_scale = check_branch_scale(arguments.branch_scale, x.batch);
    arguments.qkv = std::max(arguments.qkv, slice.heads * (2 * slice.head_dim + slice.value_dim));
    arguments.attended = std::max(arguments.attended, slice.heads * slice.value_dim);
    arguments.heads = std::max(arguments.heads, slice.heads);
    result.push_back(block);
  }
  return result;
}

// The block of one run; the saved tensors may be empty.
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
    const std::vector<double>& scales, double eps, const OptionalTensor& subnet, int64_t queries, bool save) {
  AttentionArguments arguments{x,
                               {"norm_weight", norm_weight},
                               {"norm_bias", norm_bias},
                               {"qkv_weight", qkv_weight},
                               {"qkv_bias", qkv_bias},
                               {"proj_weight", proj_weight},
                               {"proj_bias", proj_bias},
                               {"layer_scale", layer_scale},
                               branch_scale,
                               slices,
                               scales,
                               eps,
                               subnet,
                               queries};
  const std::vector<AttentionBlock> blocks = describe(arguments);
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  const Tensor y = torch::stable::new_empty(x, {batch, queries, width});
  const auto saved = [&](const Integers& shape) { return save ? torch::stable::new_empty(x, shape) : empty_output(x); };
  const Tensor qkv = saved({batch, tokens, arguments.qkv}), attended = saved({batch, queries, arguments.attended});
  const Tensor logsumexp = saved({batch, arguments.heads * tokens});
  const MutableTokens all = mutable_tokens_of(y);
  for_each_run(subnet, batch, [&](int64_t image, int64_t count, int64_t slice) {
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
                                const std::vector<double>& scales, double eps, const OptionalTensor& subnet,
                                int64_t queries, bool x_grad, const OptionalTensor& grad_norm_weight,
                                const OptionalTensor& grad_norm_bias, const OptionalTensor& grad_qkv_weight,
                                const OptionalTensor& grad_qkv_bias, const OptionalTensor& grad_proj_weight,
                                const OptionalTensor& grad_proj_bias, const OptionalTensor& grad_layer_scale) {
  AttentionArguments arguments{x,
                               {"norm_weight", norm_weight, &grad_norm_weight},
                               {"norm_bias", norm_bias, &grad_norm_bias},
                               {"qkv_weight", qkv_weight, &grad_qkv_weight},
                               {"qkv_bias", qkv_bias, &grad_qkv_bias},
                               {"proj_weight", proj_weight, &grad_proj_weight},
                               {"proj_bias", proj_bias, &grad_proj_bias},
                               {"layer_scale", layer_scale, &grad_layer_scale},
                               branch_scale,
                               slices,
                               scales,
                               eps,
                               subnet,
                               queries};
  const std::vector<AttentionBlock> blocks = describe(arguments);
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  check(grad, "grad", {batch, queries, width});
  check(qkv, "qkv", {batch, tokens, arguments.qkv});
  check(attended, "attended", {batch, queries, arguments.attended});
  check(logsumexp, "logsumexp", {batch, arguments.heads * tokens});
  HYDRAVIT_CHECK(logsumexp.is_contiguous(), "logsumexp: a contiguous tensor expected, as forward returned it");
  const Tensor dx = x_grad ? torch::stable::new_empty(x, {batch, tokens, width}) : empty_output(x);
  for_each_run(subnet, batch, [&](int64_t image, int64_t count, int64_t index) {
    const AttentionBlock block = of_run(blocks[static_cast<size_t>(index)], image, count, qkv, attended, logsumexp);
    const AttentionIntervals slice(&slices[static_cast<size_t>(index * kAttentionIntegers)]);
    AttentionBlockGradients gradients{};
    gradients.grad = from_image(tokens_of(grad), image);
    gradients.x = from_image(mutable_tokens_of(dx), image);
    gradients.norm_weight = arguments.norm_weight.vector_gradient(slice.embed);
    gradients.norm_bias = arguments.norm_bias.vector_gradient(slice.embed);
    gradients.query_weight = arguments.qkv_weight.matrix_gradient(slice.query_rows, slice.embed);
    gradients.key_weight = arguments.qkv_weight.matrix_gradient(slice.key_rows, slice.embed);
    gradients.value_weight = arguments.qkv_weight.matrix_gradient(slice.value_rows, slice.embed);
    gradients.query_bias = arguments.qkv_bias.vector_gradient(slice.query_rows);
    gradients.key_bias = arguments.qkv_bias.vector_gradient(slice.key_rows);
    gradients.value_bias = arguments.qkv_bias.vector_gradient(slice.value_rows);
    gradients.proj_weight = arguments.proj_weight.matrix_gradient(slice.embed, slice.proj_columns);
    gradients.proj_bias = arguments.proj_bias.vector_gradient(slice.embed);
    gradients.layer_scale = arguments.layer_scale.vector_gradient(slice.embed);
    check_status(attention_block_backward_cpu(block, gradients, torch_threads()));
    zero_beyond(gradients.x, count, tokens, block.embed, width);
  });
  return dx;
}

// ---- MLP block ----

constexpr int64_t kMlpIntegers = 4;

struct MlpArguments {
  Stream x;
  Parameter norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale;
  OptionalTensor branch_scale;
  Integers slices;
  double eps;
  OptionalTensor subnet;

  int64_t hidden() const { return largest(slices, kMlpIntegers, 3); }
};

Interval hidden_of(const int64_t* slice) { return {slice[3] == 0 ? 0 : slice[2], slice[3]}; }

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

// ---- Head ----

constexpr int64_t kHeadIntegers = 4;

Interval classes_of(const int64_t* slice) { return {slice[2], slice[3]}; }

struct HeadArguments {
  Stream x;
  Parameter norm_weight, norm_bias, weight, bias;
  int64_t pool_start, pool_stop;
  Integers slices;
  double eps;
  OptionalTensor subnet;

  // Of the result: the largest of any slice.
  int64_t width() const { return largest(slices, kHeadIntegers, weight.present() ? 3 : 1); }
};

std::vector<Head> describe(const HeadArguments& arguments) {
  const Stream& x = arguments.x;
  const int64_t count = check_slices(arguments.slices, kHeadIntegers);
  const Tokens data = x.data(largest(arguments.slices, kHeadIntegers, 1));
  const int64_t start = arguments.pool_start, stop = arguments.pool_stop;
  HYDRAVIT_CHECK(0 <= start && start < stop && stop <= x.tokens,
                 "pool_start, pool_stop: 0 <= start < stop <= ", x.tokens, " tokens expected, ", start, " and ", stop,
                 " given");
  HYDRAVIT_CHECK(arguments.norm_weight.present() == arguments.norm_bias.present(),
                 "norm_bias: given with norm_weight or not at all expected, one of the two given");
  HYDRAVIT_CHECK(arguments.weight.present() || !arguments.bias.present(),
                 "bias: None expected, as weight is None; a tensor given");
  arguments.norm_weight.check_both({kAny});
  arguments.weight.check_both({kAny, kAny});
  int64_t D = kAny;
  if (arguments.weight.present()) D = arguments.weight.size(1);
  if (arguments.norm_weight.present()) {
    arguments.norm_weight.check_both({D});
    arguments.norm_bias.check_both({arguments.norm_weight.size(0)});
  }
  arguments.bias.check_both({arguments.weight.present() ? arguments.weight.size(0) : 0});

  std::vector<Head> result;
  check_subnet(arguments.subnet, count, x.batch);
  for (int64_t i = 0; i < count; i++) {
    const int64_t* slice = &arguments.slices[static_cast<size_t>(i * kHeadIntegers)];
    const Interval embed = embed_of(slice), classes = classes_of(slice);
    HYDRAVIT_CHECK(!arguments.weight.present() || classes.length > 0, "slices: at least 1 class expected, 0 given");
    Head block{};
    block.batch = x.batch, block.pool_start = start, block.pool_stop = stop;
    block.embed = embed.length, block.classes = arguments.weight.present() ? classes.length : 0;
    block.eps = static_cast<float>(arguments.eps);
    block.x = data;
    block.norm_weight = arguments.norm_weight.vector(embed);
    block.norm_bias = arguments.norm_bias.vector(embed);
    block.weight = arguments.weight.matrix(classes, embed);
    block.bias = arguments.bias.vector(classes);
    result.push_back(block);
  }
  return result;
}

Head of_run(Head block, int64_t image, int64_t images) {
  block.batch = images;
  block.x = from_image(block.x, image);
  return block;
}

Tensor head(const Tensor& x, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
            const OptionalTensor& weight, const OptionalTensor& bias, int64_t pool_start, int64_t pool_stop,
            const Integers& slices, double eps, const OptionalTensor& subnet) {
  const HeadArguments arguments{x,
                                {"norm_weight", norm_weight},
                                {"norm_bias", norm_bias},
                                {"weight", weight},
                                {"bias", bias},
                                pool_start,
                                pool_stop,
                                slices,
                                eps,
                                subnet};
  const std::vector<Head> blocks = describe(arguments);
  const int64_t width = arguments.width();
  const Tensor y = torch::stable::new_empty(x, {x.size(0), width});
  for_each_run(subnet, x.size(0), [&](int64_t image, int64_t count, int64_t slice) {
    Head block = of_run(blocks[static_cast<size_t>(slice)], image, count);
    block.y = mutable_floats(y) + image * width;
    block.y_row_stride = width;
    check_status(head_cpu(block, torch_threads()));
    const int64_t own = arguments.weight.present() ? block.classes : block.embed;
    zero_beyond({block.y, width, width}, count, 1, own, width);
  });
  return y;
}

Tensor head_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& norm_weight,
                     const OptionalTensor& norm_bias, const OptionalTensor& weight, const OptionalTensor& bias,
                     int64_t pool_start, int64_t pool_stop, const Integers& slices, double eps,
                     const OptionalTensor& subnet, bool x_grad, const OptionalTensor& grad_norm_weight,
                     const OptionalTensor& grad_norm_bias, const OptionalTensor& grad_weight,
                     const OptionalTensor& grad_bias) {
  const HeadArguments arguments{x,
                                {"norm_weight", norm_weight, &grad_norm_weight},
                                {"norm_bias", norm_bias, &grad_norm_bias},
                                {"weight", weight, &grad_weight},
                                {"bias", bias, &grad_bias},
                                pool_start,
                                pool_stop,
                                slices,
                                eps,
                                subnet};
  const std::vector<Head> blocks = describe(arguments);
  const int64_t tokens = x.size(1), width = x.size(2);
  check(grad, "grad", {x.size(0), arguments.width()});
  const Tensor dx = x_grad ? torch::stable::new_empty(x, {x.size(0), tokens, width}) : empty_output(x);
  for_each_run(subnet, x.size(0), [&](int64_t image, int64_t count, int64_t index) {
    const Head block = of_run(blocks[static_cast<size_t>(index)], image, count);
    const int64_t* slice = &slices[static_cast<size_t>(index * kHeadIntegers)];
    const Interval embed = embed_of(slice), classes = classes_of(slice);
    HeadGradients gradients{};
    gradients.grad = floats(grad) + image * grad.stride(0);
    gradients.grad_row_stride = grad.stride(0);
    gradients.tokens = tokens;
    gradients.x = from_image(mutable_tokens_of(dx), image);
    gradients.norm_weight = arguments.norm_weight.vector_gradient(embed);
    gradients.norm_bias = arguments.norm_bias.vector_gradient(embed);
    gradients.weight = arguments.weight.matrix_gradient(classes, embed);
    gradients.bias = arguments.bias.vector_gradient(classes);
    check_status(head_backward_cpu(block, gradients, torch_threads()));
    zero_beyond(gradients.x, count, tokens, block.embed, width);
  });
  return dx;
}

// ---- The whole network ----

// Where the parameters of a packed network begin: in the order of hydravit_kernels/packed.py, -1 for one that is
// absent.
class PackedParameters {
 public:
  PackedParameters(const Tensor& packed, const Integers& offsets) : packed_(packed), offsets_(offsets) {
    check(packed, "packed", {kAny});
  }
  Parameter vector(const char* name, Integers shape) { return required(name, next(name, std::move(shape), false)); }
  Parameter weight(const char* name, Integers shape) { return required(name, next(name, std::move(shape), true)); }
  Parameter optional_vector(const char* name, Integers shape) { return next(name, std::move(shape), false); }
  Parameter optional_weight(const char* name, Integers shape) { return next(name, std::move(shape), true); }
  size_t left() const { return offsets_.size() - used_; }

 private:
  static Parameter required(const char* name, Parameter parameter) {
    HYDRAVIT_CHECK(parameter.present(), "offsets: ", name, " expected, -1 (absent) given");
    return parameter;
  }
  Parameter next(const char* name, Integers shape, bool panels) {
    HYDRAVIT_CHECK(left() > 0, "offsets: one for ", name, " expected, none given");
    const int64_t offset = offsets_[used_++];
    if (offset == -1) return {name, nullptr, {}, false};
    int64_t size = panels ? (shape[0] + kPanel - 1) / kPanel * kPanel : shape[0];
    bool fits = true;
    for (size_t axis = 1; axis < shape.size(); axis++) fits = fits && !__builtin_mul_overflow(size, shape[axis], &size);
    HYDRAVIT_CHECK(fits, "packed ", name, ": a shape of fewer than 2^63 elements expected, ", text(shape), " given");
    HYDRAVIT_CHECK(offset >= 0 && offset <= packed_.size(0) && size <= packed_.size(0) - offset, "offsets: ", name,
                   " with ", size, " elements at ", offset, " expected inside [0, ", packed_.size(0), ")");
    return {name, floats(packed_) + offset, std::move(shape), panels};
  }

  const Tensor& packed_;
  const Integers& offsets_;
  size_t used_ = 0;
};

Tensor network(const Tensor& images, const Tensor& packed, const Integers& offsets, int64_t embed, int64_t hidden,
               int64_t patch_height, int64_t patch_width, int64_t cls_tokens, int64_t reg_tokens, int64_t positions,
               int64_t class_rows, int64_t pool_start, int64_t pool_stop, int64_t depth, const Integers& stem_slices,
               const Integers& attention_slices, const Integers& mlp_slices, const Integers& head_slices,
               const std::vector<double>& scales, double eps, const OptionalTensor& subnet, bool pooled_only) {
  check_shape(images, "images", {kAny, kAny, kAny, kAny});
  HYDRAVIT_CHECK(depth > 0, "depth: at least 1 expected, ", depth, " given");
  for (const int64_t size : {embed, hidden, patch_height, patch_width, cls_tokens, reg_tokens, positions, class_rows})
    HYDRAVIT_CHECK(size >= 0 && size < int64_t{1} << 31, "sizes in [0, 2^31) expected, ", size, " given");
  PackedParameters p(packed, offsets);
  const int64_t widths = check_slices(stem_slices, kEmbedIntegers);
  const auto of_block = [&](const auto& values, int64_t i) {
    const int64_t count = static_cast<int64_t>(values.size()) / depth;
    HYDRAVIT_CHECK(count > 0 && count % widths == 0 && count * depth == static_cast<int64_t>(values.size()),
                   "slices: as many for each of ", depth, " blocks and ", widths, " widths expected, ", values.size(),
                   " integers or scales given");
    return std::decay_t<decltype(values)>(values.begin() + i * count, values.begin() + (i + 1) * count);
  };

  const StemArguments stem{images,
                           p.weight("weight", {embed, images.size(1), patch_height, patch_width}),
                           p.optional_vector("bias", {embed}),
                           p.optional_vector("cls_token", {1, cls_tokens, embed}),
                           p.optional_vector("reg_token", {1, reg_tokens, embed}),
                           p.optional_vector("pos_embed", {1, positions, embed}),
                           stem_slices,
                           subnet};
  const std::vector<Stem> stems = describe(stem);
  const Stream stream(stem.batch(), stem.tokens());
  std::vector<std::vector<AttentionBlock>> attention(static_cast<size_t>(widths));
  std::vector<std::vector<MlpBlock>> mlp(static_cast<size_t>(widths));
  for (int64_t i = 0; i < depth; i++) {
    AttentionArguments attention_arguments{stream,
                                           p.vector("norm1.weight", {embed}),
                                           p.vector("norm1.bias", {embed}),
                                           p.weight("qkv.weight", {3 * embed, embed}),
                                           p.optional_vector("qkv.bias", {3 * embed}),
                                           p.weight("proj.weight", {embed, embed}),
                                           p.optional_vector("proj.bias", {embed}),
                                           p.optional_vector("ls1.gamma", {embed}),
                                           {},
                                           of_block(attention_slices, i),
                                           of_block(scales, i),
                                           eps,
                                           subnet,
                                           stream.tokens};
    const MlpArguments mlp_arguments{stream,
                                     p.vector("norm2.weight", {embed}),
                                     p.vector("norm2.bias", {embed}),
                                     p.weight("fc1.weight", {hidden, embed}),
                                     p.optional_vector("fc1.bias", {hidden}),
                                     p.weight("fc2.weight", {embed, hidden}),
                                     p.optional_vector("fc2.bias", {embed}),
                                     p.optional_vector("ls2.gamma", {embed}),
                                     {},
                                     of_block(mlp_slices, i),
                                     eps,
                                     subnet};
    const std::vector<AttentionBlock> attention_blocks = describe(attention_arguments);
    const std::vector<MlpBlock> mlp_blocks = describe(mlp_arguments);
    for (size_t width = 0; width < static_cast<size_t>(widths); width++) {
      attention[width].push_back(attention_blocks.at(width));
      mlp[width].push_back(mlp_blocks.at(width));
    }
  }
  const HeadArguments head{stream,
                           p.optional_vector("norm_weight", {embed}),
                           p.optional_vector("norm_bias", {embed}),
                           p.optional_weight("head.weight", {class_rows, embed}),
                           p.optional_vector("head.bias", {class_rows}),
                           pool_start,
                           pool_stop,
                           head_slices,
                           eps,
                           subnet};
  const std::vector<Head> heads = describe(head);
  HYDRAVIT_CHECK(p.left() == 0, "offsets: ", p.left(), " too many given");

  std::vector<Network> networks;
  for (size_t i = 0; i < static_cast<size_t>(widths); i++) {
    for (size_t block = 0; block < static_cast<size_t>(depth); block++)
      HYDRAVIT_CHECK(attention[i][block].embed == stems[i].embed && mlp[i][block].embed == stems[i].embed &&
                         heads.at(i).embed == stems[i].embed,
                     "slices: one embed for the stem, every block and the head of a width expected");
    networks.push_back({&stems[i], attention[i].data(), mlp[i].data(), &heads[i]});
  }
  const int64_t columns = head.width();
  const Tensor y = torch::stable::new_empty(images, {stream.batch, columns});
  NetworkCall call{};
  call.batch = stream.batch, call.tokens = stream.tokens, call.depth = depth;
  call.networks = networks.data();
  call.width_of = subnet.has_value() ? static_cast<const int64_t*>(subnet->const_data_ptr()) : nullptr;
  call.pooled_only = pooled_only;
  call.y = mutable_floats(y), call.y_row_stride = columns;
  check_status(network_cpu(call, torch_threads()));
  for_each_run(subnet, stream.batch, [&](int64_t image, int64_t count, int64_t width) {
    const int64_t own =
        class_rows > 0 ? heads[static_cast<size_t>(width)].classes : stems[static_cast<size_t>(width)].embed;
    zero_beyond({call.y + image * columns, columns, columns}, count, 1, own, columns);
  });
  return y;
}

// weight (rows, ...) -> panels, of the size that hydravit.h names.
void pack_weight(const Tensor& weight, Tensor panels) {
  HYDRAVIT_CHECK(weight.dim() >= 2, "weight: at least 2 axes expected, shape ", text(shape_of(weight)), " given");
  check_kind(weight, "weight", ScalarType::Float);
  const int64_t rows = weight.size(0);
  int64_t columns = 1;
  for (int64_t axis = weight.dim() - 1; axis > 0; columns *= weight.size(axis--))
    HYDRAVIT_CHECK(weight.size(axis) <= 1 || weight.stride(axis) == columns,
                   "weight: contiguous rows expected, strides ", text(strides_of(weight)), " given");
  check(panels, "panels", {(rows + kPanel - 1) / kPanel * kPanel * columns});
  check_status(
      pack_weight_cpu({floats(weight), weight.stride(0)}, rows, columns, mutable_floats(panels), torch_threads()));
}

// ---- Instruction set ----

std::string cpu_isa_name() {
  const char* name = "";
  check_status(cpu_isa(&name));
  return name;
}

void set_cpu_isa_name(std::string isa) {
  const int status = set_cpu_isa(isa.c_str());
  HYDRAVIT_CHECK(status == kOk, "isa: ", status_text(status), "; '", isa, "' given");
}

}  // namespace
}  // namespace hydravit

STABLE_TORCH_LIBRARY_IMPL(hydravit, CPU, m) {
  m.impl("network_native", TORCH_BOX(&hydravit::network));
  m.impl("pack_weight_native", TORCH_BOX(&hydravit::pack_weight));
  m.impl("stem_native", TORCH_BOX(&hydravit::stem));
  m.impl("stem_backward_native", TORCH_BOX(&hydravit::stem_backward));
  m.impl("attention_block_native", TORCH_BOX(&hydravit::attention_block));
  m.impl("attention_block_backward_native", TORCH_BOX(&hydravit::attention_block_backward));
  m.impl("mlp_block_native", TORCH_BOX(&hydravit::mlp_block));
  m.impl("mlp_block_backward_native", TORCH_BOX(&hydravit::mlp_block_backward));
  m.impl("head_native", TORCH_BOX(&hydravit::head));
  m.impl("head_backward_native", TORCH_BOX(&hydravit::head_backward));
}

STABLE_TORCH_LIBRARY_IMPL(hydravit, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&hydravit::cpu_isa_name));
  m.impl("set_cpu_isa", TORCH_BOX(&hydravit::set_cpu_isa_name));
}
