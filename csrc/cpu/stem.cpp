// Stem: the prefix tokens, then patches times the patch embedding, plus bias; position embedding for all.
//
// A patch is first gathered into a row of channels * patch_height * patch_width pixels: images may have any strides,
// and products need rows.
#include "stem.h"

#include "kernels.h"
#include "norm.h"

namespace hydravit::HYDRAVIT_ISA {

namespace {

int64_t patches_of(const Stem& block) { return block.grid_height * block.grid_width; }
int64_t prefix_of(const Stem& block) { return block.cls_tokens + block.reg_tokens; }
int64_t patch_size(const Stem& block) { return block.channels * block.patch_height * block.patch_width; }

// Calls body(offset in the patch, image, channel, y, x) for every row of pixels of patch `row`, which counts from the
// first patch of image `image`.
template <class Body>
void for_each_pixel_row(const Stem& block, int64_t image, int64_t row, const Body& body) {
  const int64_t patch = row % patches_of(block);
  const int64_t top = patch / block.grid_width * block.patch_height;
  const int64_t left = patch % block.grid_width * block.patch_width;
  int64_t offset = 0;
  for (int64_t channel = 0; channel < block.channels; channel++)
    for (int64_t y = 0; y < block.patch_height; y++, offset += block.patch_width)
      body(offset, image + row / patches_of(block), channel, top + y, left);
}

// Gathers patches [begin, end), counted from the first patch of image `image`, into rows `stride` apart.
void gather_rows(const Stem& block, int64_t image, int64_t begin, int64_t end, float* patches, int64_t stride) {
  const int64_t* strides = block.image_strides;
  for (int64_t row = begin; row < end; row++) {
    float* to = patches + (row - begin) * stride;
    for_each_pixel_row(block, image, row, [&](int64_t offset, int64_t b, int64_t channel, int64_t y, int64_t x) {
      const float* from = block.images + b * strides[0] + channel * strides[1] + y * strides[2] + x * strides[3];
      if (strides[3] == 1)
        std::memcpy(to + offset, from, static_cast<size_t>(block.patch_width) * sizeof(float));
      else
        for (int64_t i = 0; i < block.patch_width; i++) to[offset + i] = from[i * strides[3]];
    });
  }
}

void gather_patches(const Threads& threads, const Stem& block, int64_t image, int64_t rows, float* patches) {
  parallel_ranges(threads, rows, patch_size(block), [&](int64_t begin, int64_t end) {
    gather_rows(block, image, begin, end, patches + begin * patch_size(block), patch_size(block));
  });
}

// The reverse of gather_patches, for the gradient of the images. It overwrites, because patches do not overlap.
void scatter_patches(const Threads& threads, const Stem& block, int64_t image, int64_t rows, const float* patches,
                     float* images) {
  const int64_t height = block.grid_height * block.patch_height, width = block.grid_width * block.patch_width;
  parallel_ranges(threads, rows, patch_size(block), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const float* from = patches + row * patch_size(block);
      for_each_pixel_row(block, image, row, [&](int64_t offset, int64_t b, int64_t channel, int64_t y, int64_t x) {
        float* to = images + ((b * block.channels + channel) * height + y) * width + x;
        std::memcpy(to, from + offset, static_cast<size_t>(block.patch_width) * sizeof(float));
      });
    }
  });
}

// A class or register token of one image, with its position embedding.
void write_prefix(const Stem& block, int64_t token, float* to) {
  const float* value = token < block.cls_tokens
                           ? block.cls_token.data + token * block.cls_token.row_stride
                           : block.reg_token.data + (token - block.cls_tokens) * block.reg_token.row_stride;
  const float* position = block.pos_embed.data != nullptr && block.pos_on_prefix
                              ? block.pos_embed.data + token * block.pos_embed.row_stride
                              : nullptr;
  for (int64_t c = 0; c < block.embed; c++) to[c] = value[c] + (position == nullptr ? 0.0f : position[c]);
}

// to[t] += the sum over images of grad[:, token + t], for `count` tokens.
void add_token_sums(const Threads& threads, const Stem& block, const Tokens& grad, int64_t token, int64_t count,
                    const MutableWeight& to) {
  if (to.data == nullptr) return;
  parallel_ranges(threads, count, block.batch * block.embed, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      for (int64_t c = 0; c < block.embed; c += kWidth) {
        const int64_t channels = block.embed - c;
        Vec total{};
        for (int64_t image = 0; image < block.batch; image++)
          total += load(grad.data + image * grad.image_stride + (token + t) * grad.token_stride + c, channels);
        float* sum = to.data + t * to.row_stride + c;
        store(sum, load(sum, channels) + total, channels);
      }
  });
}

}  // namespace

void stem_rows(const Stem& block, int64_t image, const Range& tokens, float* scratch) {
  const int64_t prefix = prefix_of(block), size = patch_size(block), stride = padded_row(size);
  const auto y = [&](int64_t token) { return rows_from(block.y, image, token).data; };
  for (int64_t token = tokens.begin; token < smaller(prefix, tokens.end); token++) write_prefix(block, token, y(token));
  const int64_t first = larger(prefix, tokens.begin), rows = tokens.end - first;
  if (rows <= 0) return;
  float* panel = scratch + kBandRows * stride;
  gather_rows(block, image, first - prefix, tokens.end - prefix, scratch, stride);
  Epilogue epilogue{y(first), {block.y.token_stride}, {}};
  epilogue.bias = block.bias;
  if (block.pos_embed.data != nullptr) {
    epilogue.residual =
        block.pos_embed.data + (block.pos_on_prefix ? first : first - prefix) * block.pos_embed.row_stride;
    epilogue.residual_rows = {block.pos_embed.row_stride};
  }
  multiply_rows(rows, block.embed, size, scratch, {stride}, transposed(block.weight), epilogue, panel);
}

int64_t stem_rows_scratch(const Stem& block) {
  return kBandRows * padded_row(patch_size(block)) + round_up(kPieceScratch, 16);
}

int stem(const Stem& block, const Threads& threads) {
  const int64_t tokens = prefix_of(block) + patches_of(block);
  const int64_t jobs = jobs_for(threads, block.batch * tokens, block.embed * patch_size(block));
  const int64_t size = stem_rows_scratch(block);
  float* scratch;
  Workspace workspace;
  workspace.add(&scratch, jobs * size);
  if (!workspace.allocate()) return kOutOfMemory;
  parallel(threads, jobs, [&](int64_t job) {
    for_each_share(job, jobs, block.batch, tokens, [&](const Share& share) {
      for_each_band(share.tokens,
                    [&](const Range& band) { stem_rows(block, share.image, band, scratch + job * size); });
    });
  });
  return kOk;
}

int stem_backward(const Stem& block, const StemGradients& gradients, const Threads& threads) {
  const int64_t patches = patches_of(block), prefix = prefix_of(block), size = patch_size(block);
  const Tokens& grad = gradients.grad;
  const Axis grad_rows = token_rows(patches, grad.token_stride, grad.image_stride);
  const int64_t chunk_images = images_per_chunk(block.batch, patches);
  float *rows, *scratch;
  Workspace workspace;
  workspace.add(&rows, chunk_images * patches * size);
  workspace.add(&scratch, gemm_scratch(threads));
  if (!workspace.allocate()) return kOutOfMemory;

  add_token_sums(threads, block, grad, 0, block.cls_tokens, gradients.cls_token);
  add_token_sums(threads, block, grad, block.cls_tokens, block.reg_tokens, gradients.reg_token);
  const int64_t first = block.pos_on_prefix ? 0 : prefix;
  add_token_sums(threads, block, grad, first, prefix + patches - first, gradients.pos_embed);

  for (int64_t image = 0; image < block.batch; image += chunk_images) {
    const int64_t count = smaller(chunk_images, block.batch - image) * patches;
    const View d{grad.data + image * grad.image_stride + prefix * grad.token_stride, grad_rows, {}};
    if (gradients.bias != nullptr) add_column_sums(threads, count, block.embed, gradients.bias, {}, d.data, grad_rows);
    if (gradients.weight.data != nullptr) {
      gather_patches(threads, block, image, count, rows);
      gemm(threads, scratch, block.embed, size, count, transposed(d), {rows, {size}, {}},
           {gradients.weight.data, {gradients.weight.row_stride}, {}, true});
    }
    if (gradients.images != nullptr) {
      gemm(threads, scratch, count, size, block.embed, d, {block.weight.data, {block.weight.row_stride}, {}},
           {rows, {size}, {}});
      scatter_patches(threads, block, image, count, rows, gradients.images);
    }
  }
  return kOk;
}

}  // namespace hydravit::HYDRAVIT_ISA
