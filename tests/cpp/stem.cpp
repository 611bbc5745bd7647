#include "check.h"

namespace hydravit::tests {

namespace {

Array images(const Stem& block, bool channels_last) {
  const int64_t c = block.channels, h = block.grid_height * block.patch_height;
  const int64_t w = block.grid_width * block.patch_width, row = w + kGap;
  if (channels_last) return {{{block.batch, h * w * c + kGap}}, {{c, 1}, {h, w * c}, {w, c}}};
  return {{{block.batch, c * h * row + kGap}}, {{c, h * row}, {h, row}, {w, 1}}};
}

Arrays arrays_of(const Stem& block, bool channels_last) {
  const int64_t patches = block.grid_height * block.grid_width, prefix = block.cls_tokens + block.reg_tokens;
  const int64_t height = block.grid_height * block.patch_height, width = block.grid_width * block.patch_width;
  const Arrays parameters = {{"weight", weight(block.embed, block.channels * block.patch_height * block.patch_width)},
                             {"bias", vector(block.embed)},
                             {"cls_token", weight(block.cls_tokens, block.embed)},
                             {"reg_token", weight(block.reg_tokens, block.embed)},
                             {"pos_embed", weight((block.pos_on_prefix ? prefix : 0) + patches, block.embed)}};
  const Array y = tokens(block.batch, prefix + patches, block.embed);
  const Array d_images({{block.batch, block.channels * height * width}},
                       {{block.channels, height * width}, {height, width}, {width, 1}});
  return arrays_of_block(3, parameters, {{"images", images(block, channels_last)}, {"grad", y}},
                         {{"y", y}, {"d_images", d_images}});
}

void run(Stem block, Arrays& arrays, const Threads& threads) {
  set_images(block, arrays);
  set_stem(block, arrays, "", const_weight);
  block.y = mutable_tokens(arrays, "y");
  launch([&] { return stem_cpu(block, threads); });

  block.y = {nullptr, 0, 0};
  StemGradients gradients{};
  gradients.grad = const_tokens(arrays, "grad"), gradients.images = data(arrays, "d_images");
  set_stem(gradients, arrays, "d_", mutable_weight);
  launch([&] { return stem_backward_cpu(block, gradients, threads); });
}

}  // namespace

std::vector<Test> stem_tests() {
  struct Shape {
    int64_t batch, channels, grid_height, grid_width, patch_height, patch_width, embed, cls_tokens, reg_tokens;
    bool pos_on_prefix, channels_last;
  };
  const Shape shapes[] = {
      {1, 1, 1, 1, 1, 1, 3, 0, 0, true, false},
      {3, 3, 4, 4, 2, 3, 32, 1, 0, true, false},
      {3, 3, 7, 7, 4, 4, 112, 1, 2, false, true},
      {1, 3, 7, 7, 12, 12, 80, 2, 3, true, false},  // more pixels of a patch than one piece of K
      {7, 1, 14, 14, 2, 2, 5, 1, 0, true, true},    // more images than one chunk
  };
  std::vector<Test> tests;
  for (const Shape& s : shapes) {
    Stem block{};
    block.batch = s.batch, block.channels = s.channels, block.grid_height = s.grid_height;
    block.grid_width = s.grid_width, block.patch_height = s.patch_height, block.patch_width = s.patch_width;
    block.embed = s.embed, block.cls_tokens = s.cls_tokens, block.reg_tokens = s.reg_tokens;
    block.pos_on_prefix = s.pos_on_prefix;
    const std::string name =
        named("stem", {s.batch, s.grid_height * s.grid_width, s.embed, s.cls_tokens, s.reg_tokens});
    add_tests(
        tests, name, arrays_of(block, s.channels_last), [=](auto& values) { stem(block, values); },
        [=](Arrays& arrays, const Threads& threads) { run(block, arrays, threads); }, {"bias", "pos_embed", "d_images"},
        s.reg_tokens > 0);
  }
  return tests;
}

}  // namespace hydravit::tests
