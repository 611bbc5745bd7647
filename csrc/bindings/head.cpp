// The ops of the head on the CPU: forward and backward.
#include "arguments.h"

namespace hydravit {
namespace {

Interval classes_of(const HeadSlice& slice) { return {slice.class_offset, slice.classes}; }

}  // namespace

std::vector<Head> describe(const HeadArguments& arguments) {
  const Residual& x = arguments.x;
  const HeadParameters<Parameter>& p = arguments.parameters;
  const Tokens data = x.data(largest(arguments.slices, &HeadSlice::embed));
  const int64_t start = arguments.pool_start, stop = arguments.pool_stop;
  HYDRAVIT_CHECK(0 <= start && start < stop && stop <= x.tokens,
                 "pool_start, pool_stop: 0 <= start < stop <= ", x.tokens, " tokens expected, ", start, " and ", stop,
                 " given");
  HYDRAVIT_CHECK(p.norm_weight.present() == p.norm_bias.present(), p.norm_bias.name(), ": given with ",
                 p.norm_weight.name(), " or not at all expected, one of the two given");
  HYDRAVIT_CHECK(p.weight.present() || !p.bias.present(), p.bias.name(), ": None expected, as ", p.weight.name(),
                 " is None; a tensor given");
  p.norm_weight.check_both({kAny});
  p.weight.check_both({kAny, kAny});
  int64_t D = kAny;
  if (p.weight.present()) D = p.weight.size(1);
  if (p.norm_weight.present()) {
    p.norm_weight.check_both({D});
    p.norm_bias.check_both({p.norm_weight.size(0)});
  }
  p.bias.check_both({p.weight.present() ? p.weight.size(0) : 0});

  std::vector<Head> result;
  check_width_index(arguments.width_index, static_cast<int64_t>(arguments.slices.size()), x.batch);
  for (const HeadSlice& slice : arguments.slices) {
    const Interval embed = embed_of(slice), classes = classes_of(slice);
    HYDRAVIT_CHECK(!p.weight.present() || classes.length > 0, "slices: at least 1 class expected, 0 given");
    Head block{};
    block.batch = x.batch, block.pool_start = start, block.pool_stop = stop;
    block.embed = embed.length, block.classes = p.weight.present() ? classes.length : 0;
    block.eps = static_cast<float>(arguments.eps);
    block.x = data;
    block.norm_weight = p.norm_weight.vector(embed);
    block.norm_bias = p.norm_bias.vector(embed);
    block.weight = p.weight.matrix(classes, embed);
    block.bias = p.bias.vector(classes);
    result.push_back(block);
  }
  return result;
}

namespace {

Head of_run(Head block, int64_t image, int64_t images) {
  block.batch = images;
  block.x = from_image(block.x, image);
  return block;
}

Tensor head(const Tensor& x, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
            const OptionalTensor& weight, const OptionalTensor& bias, int64_t pool_start, int64_t pool_stop,
            const Integers& slices, double eps, const OptionalTensor& width_index) {
  const HeadArguments arguments{
      x,
      {{"norm_weight", norm_weight}, {"norm_bias", norm_bias}, {"weight", weight}, {"bias", bias}},
      pool_start,
      pool_stop,
      read_slices<HeadSlice>(slices),
      eps,
      width_index};
  const std::vector<Head> blocks = describe(arguments);
  const int64_t width = arguments.width();
  const Tensor y = torch::stable::new_empty(x, {x.size(0), width});
  for_each_run(width_index, x.size(0), [&](int64_t image, int64_t count, int64_t slice) {
    Head block = of_run(blocks[static_cast<size_t>(slice)], image, count);
    block.y = mutable_floats(y) + image * width;
    block.y_row_stride = width;
    check_status(head_cpu(block, torch_threads()));
    const int64_t own = arguments.parameters.weight.present() ? block.classes : block.embed;
    zero_beyond({block.y, width, width}, count, 1, own, width);
  });
  return y;
}

Tensor head_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& norm_weight,
                     const OptionalTensor& norm_bias, const OptionalTensor& weight, const OptionalTensor& bias,
                     int64_t pool_start, int64_t pool_stop, const Integers& slices, double eps,
                     const OptionalTensor& width_index, bool x_grad, const OptionalTensor& grad_norm_weight,
                     const OptionalTensor& grad_norm_bias, const OptionalTensor& grad_weight,
                     const OptionalTensor& grad_bias) {
  const HeadArguments arguments{x,
                                {{"norm_weight", norm_weight, &grad_norm_weight},
                                 {"norm_bias", norm_bias, &grad_norm_bias},
                                 {"weight", weight, &grad_weight},
                                 {"bias", bias, &grad_bias}},
                                pool_start,
                                pool_stop,
                                read_slices<HeadSlice>(slices),
                                eps,
                                width_index};
  const std::vector<Head> blocks = describe(arguments);
  const int64_t tokens = x.size(1), width = x.size(2);
  check(grad, "grad", {x.size(0), arguments.width()});
  const Tensor dx = x_grad ? torch::stable::new_empty(x, {x.size(0), tokens, width}) : empty_output(x);
  for_each_run(width_index, x.size(0), [&](int64_t image, int64_t count, int64_t index) {
    const Head block = of_run(blocks[static_cast<size_t>(index)], image, count);
    const HeadSlice& slice = arguments.slices[static_cast<size_t>(index)];
    const HeadParameters<Parameter>& p = arguments.parameters;
    const Interval embed = embed_of(slice), classes = classes_of(slice);
    HeadGradients gradients{};
    gradients.grad = floats(grad) + image * grad.stride(0);
    gradients.grad_row_stride = grad.stride(0);
    gradients.tokens = tokens;
    gradients.x = from_image(mutable_tokens_of(dx), image);
    gradients.norm_weight = p.norm_weight.vector_gradient(embed);
    gradients.norm_bias = p.norm_bias.vector_gradient(embed);
    gradients.weight = p.weight.matrix_gradient(classes, embed);
    gradients.bias = p.bias.vector_gradient(classes);
    check_status(head_backward_cpu(block, gradients, torch_threads()));
    zero_beyond(gradients.x, count, tokens, block.embed, width);
  });
  return dx;
}

}  // namespace
}  // namespace hydravit

STABLE_TORCH_LIBRARY_IMPL(hydravit, CPU, m) {
  m.impl("head_native", TORCH_BOX(&hydravit::head));
  m.impl("head_backward_native", TORCH_BOX(&hydravit::head_backward));
}
