// The ops of the head on the CPU.
#include "arguments.h"

namespace hydravit {
namespace {

Interval classes_of(const int64_t* slice) { return {slice[2], slice[3]}; }

}  // namespace

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

namespace {

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

}  // namespace
}  // namespace hydravit

STABLE_TORCH_LIBRARY_IMPL(hydravit, CPU, m) {
  m.impl("head_native", TORCH_BOX(&hydravit::head));
  m.impl("head_backward_native", TORCH_BOX(&hydravit::head_backward));
}
