// The ops of the stem on the CPU: forward and backward.
#include "arguments.h"

namespace hydravit {
namespace {

// Checks that every output channel is contiguous. The stride of an axis of one element means nothing.
void check_patch_weight(const Tensor& weight, const ParameterName& name, const Integers& expected) {
  check_shape(weight, name, expected);
  bool contiguous = true;
  int64_t stride = 1;
  for (int64_t axis = 3; axis > 0; stride *= weight.size(axis--))
    contiguous = contiguous && (weight.size(axis) == 1 || weight.stride(axis) == stride);
  HYDRAVIT_CHECK(contiguous, name, " of the patch embedding: each output channel contiguous expected, strides ",
                 text(strides_of(weight)), " for shape ", text(shape_of(weight)),
                 " given; model.to(memory_format=torch.contiguous_format) makes it so");
}

}  // namespace

std::vector<Stem> describe(const StemArguments& arguments) {
  const Images& images = arguments.images;
  const StemParameters<Parameter>& p = arguments.parameters;
  const Parameter& weight = p.weight;
  const int64_t channels = images.channels;
  if (weight.packed())
    weight.check_both({kAny, channels, kAny, kAny});
  else
    check_patch_weight(weight.tensor(), weight.name(), {kAny, channels, kAny, kAny});
  const int64_t D = weight.size(0), height = weight.size(2), width = weight.size(3);
  HYDRAVIT_CHECK(channels > 0 && height > 0 && width > 0, weight.name(),
                 ": a patch of at least one pixel expected, shape ", text(weight.shape()), " given");
  if (weight.gradient() != nullptr) check_patch_weight(*weight.gradient(), "grad_weight", weight.shape());
  HYDRAVIT_CHECK(images.height > 0 && images.width > 0 && images.height % height == 0 && images.width % width == 0,
                 "images: height and width expected to be multiples of the patch (", height, ", ", width, "), ",
                 text({images.batch, channels, images.height, images.width}), " given");
  p.bias.check_both({D});
  p.cls_token.check_both({1, kAny, D});
  p.reg_token.check_both({1, kAny, D});
  p.pos_embed.check_both({1, kAny, D});
  const int64_t tokens = arguments.tokens(), patches = images.height / height * (images.width / width);
  const int64_t positions = StemArguments::tokens_of(p.pos_embed);
  HYDRAVIT_CHECK(!p.pos_embed.present() || positions == tokens || positions == patches, p.pos_embed.name(),
                 ": shape (1, ", tokens, ", ", D, ") or, for the patches only, (1, ", patches, ", ", D, ") expected, ",
                 text(p.pos_embed.shape()), " given");

  std::vector<Stem> result;
  check_width_index(arguments.width_index, static_cast<int64_t>(arguments.slices.size()), images.batch);
  for (const EmbedSlice& slice : arguments.slices) {
    const Interval embed = embed_of(slice);
    check_inside(weight.name(), "output channels", embed, D);
    Stem block{};
    block.batch = images.batch, block.channels = channels;
    block.grid_height = images.height / height, block.grid_width = images.width / width;
    block.patch_height = height, block.patch_width = width;
    block.embed = embed.length;
    block.cls_tokens = StemArguments::tokens_of(p.cls_token);
    block.reg_tokens = StemArguments::tokens_of(p.reg_token);
    if (images.tensor != nullptr) {
      block.images = floats(*images.tensor);
      for (int axis = 0; axis < 4; axis++) block.image_strides[axis] = images.tensor->stride(axis);
    }
    if (weight.packed())
      block.weight = weight.panels_of(embed, 0, channels * height * width);
    else
      block.weight = {floats(weight.tensor()) + embed.offset * weight.tensor().stride(0), weight.tensor().stride(0)};
    block.bias = p.bias.vector(embed);
    block.cls_token = p.cls_token.matrix({0, block.cls_tokens}, embed);
    block.reg_token = p.reg_token.matrix({0, block.reg_tokens}, embed);
    block.pos_embed = p.pos_embed.matrix({0, positions}, embed);
    block.pos_on_prefix = positions == tokens;
    result.push_back(block);
  }
  return result;
}

namespace {

Stem of_run(Stem block, int64_t image, int64_t images) {
  block.batch = images;
  block.images += image * block.image_strides[0];
  return block;
}

Tensor stem(const Tensor& images, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& cls_token,
            const OptionalTensor& reg_token, const OptionalTensor& pos_embed, const Integers& slices,
            const OptionalTensor& width_index) {
  const OptionalTensor weight_argument(weight);
  const StemArguments arguments{images,
                                {{"weight", weight_argument},
                                 {"bias", bias},
                                 {"cls_token", cls_token},
                                 {"reg_token", reg_token},
                                 {"pos_embed", pos_embed}},
                                read_slices<EmbedSlice>(slices),
                                width_index};
  const std::vector<Stem> blocks = describe(arguments);
  const int64_t tokens = arguments.tokens(), width = arguments.width();
  const Tensor y = torch::stable::new_empty(weight, {arguments.images.batch, tokens, width});
  const MutableTokens all = mutable_tokens_of(y);
  for_each_run(width_index, arguments.images.batch, [&](int64_t image, int64_t count, int64_t slice) {
    Stem block = of_run(blocks[static_cast<size_t>(slice)], image, count);
    block.y = from_image(all, image);
    check_status(stem_cpu(block, torch_threads()));
    zero_beyond(block.y, count, tokens, block.embed, width);
  });
  return y;
}

Tensor stem_backward(const Tensor& grad, const Tensor& images, const Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& cls_token, const OptionalTensor& reg_token, const OptionalTensor& pos_embed,
                     const Integers& slices, const OptionalTensor& width_index, bool x_grad,
                     const OptionalTensor& grad_weight, const OptionalTensor& grad_bias,
                     const OptionalTensor& grad_cls_token, const OptionalTensor& grad_reg_token,
                     const OptionalTensor& grad_pos_embed) {
  const OptionalTensor weight_argument(weight);
  const StemArguments arguments{images,
                                {{"weight", weight_argument, &grad_weight},
                                 {"bias", bias, &grad_bias},
                                 {"cls_token", cls_token, &grad_cls_token},
                                 {"reg_token", reg_token, &grad_reg_token},
                                 {"pos_embed", pos_embed, &grad_pos_embed}},
                                read_slices<EmbedSlice>(slices),
                                width_index};
  const std::vector<Stem> blocks = describe(arguments);
  check(grad, "grad", {arguments.images.batch, arguments.tokens(), arguments.width()});
  const Tensor dx = x_grad ? torch::stable::new_empty(images, shape_of(images)) : empty_output(images);
  for_each_run(width_index, arguments.images.batch, [&](int64_t image, int64_t count, int64_t slice) {
    const Stem block = of_run(blocks[static_cast<size_t>(slice)], image, count);
    const Interval embed = embed_of(arguments.slices[static_cast<size_t>(slice)]);
    const StemParameters<Parameter>& p = arguments.parameters;
    StemGradients gradients{};
    gradients.grad = from_image(tokens_of(grad), image);
    if (x_grad) gradients.images = mutable_floats(dx) + image * dx.stride(0);
    if (grad_weight)
      gradients.weight = {mutable_floats(*grad_weight) + embed.offset * grad_weight->stride(0), grad_weight->stride(0)};
    gradients.bias = p.bias.vector_gradient(embed);
    gradients.cls_token = p.cls_token.matrix_gradient({0, block.cls_tokens}, embed);
    gradients.reg_token = p.reg_token.matrix_gradient({0, block.reg_tokens}, embed);
    gradients.pos_embed = p.pos_embed.matrix_gradient({0, 0}, embed);
    check_status(stem_backward_cpu(block, gradients, torch_threads()));
  });
  return dx;
}

}  // namespace
}  // namespace hydravit

STABLE_TORCH_LIBRARY_IMPL(hydravit, CPU, m) {
  m.impl("stem_native", TORCH_BOX(&hydravit::stem));
  m.impl("stem_backward_native", TORCH_BOX(&hydravit::stem_backward));
}
