// MLP block: y = x + branch_scale * layer_scale * (gelu(norm(x) fc1^T + b1) fc2^T + b2), images in chunks.
//
// GELU and the residual are applied while the products' tiles are in registers. Backward recomputes the normalised x
// and GELU from x and the saved (B, N, hidden) input of GELU.
#include "kernels.h"
#include "norm.h"

namespace hydravit::HYDRAVIT_ISA {

namespace {

// The part of the block that works on images [image, image + images).
struct Chunk {
  int64_t image, images, rows;
  Norm norm;
  Axis saved_rows;
  const float* branch_scale;
};

Chunk chunk_of(const MlpBlock& block, int64_t image, int64_t images) {
  const Axis x_rows = token_rows(block.tokens, block.x.token_stride, block.x.image_stride);
  return {image,
          images,
          images * block.tokens,
          {images * block.tokens, block.embed, block.eps, block.x.data + image * block.x.image_stride, x_rows,
           block.norm_weight, block.norm_bias},
          token_rows(block.tokens, block.saved.token_stride, block.saved.image_stride),
          block.branch_scale == nullptr ? nullptr : block.branch_scale + image};
}

// fc2 with its bias; what becomes of the product is the caller's.
void project(const Threads& threads, float* scratch, const MlpBlock& block, int64_t rows, const float* activated,
             Output out) {
  out.bias = block.fc2_bias;
  gemm(threads, scratch, rows, block.embed, block.hidden, {activated, {block.hidden}, {}},
       {block.fc2_weight.data, {}, {block.fc2_weight.row_stride}}, out);
}

}  // namespace

int mlp_block(const MlpBlock& block, const Threads& threads) {
  const Axis y_rows = token_rows(block.tokens, block.y.token_stride, block.y.image_stride);
  const int64_t step = images_per_chunk(block.batch, block.tokens);
  float *normalised, *activated, *scratch;
  Workspace workspace;
  workspace.add(&normalised, step * block.tokens * block.embed);
  workspace.add(&activated, step * block.tokens * block.hidden);
  workspace.add(&scratch, gemm_scratch(threads));
  if (!workspace.allocate()) return kOutOfMemory;

  for (int64_t image = 0; image < block.batch; image += step) {
    const Chunk chunk = chunk_of(block, image, smaller(step, block.batch - image));
    float* y = block.y.data + image * block.y.image_stride;
    if (block.hidden == 0) {
      copy_rows(threads, chunk.rows, block.embed, chunk.norm.x, chunk.norm.x_rows, y, y_rows);
      continue;
    }
    normalize(threads, chunk.norm, normalised, nullptr);

    Output hidden{activated, {block.hidden}, {}};
    if (block.saved.data != nullptr)
      hidden.data = block.saved.data + image * block.saved.image_stride, hidden.rows = chunk.saved_rows;
    hidden.bias = block.fc1_bias;
    hidden.gelu = activated;
    hidden.gelu_stride = block.hidden;
    gemm(threads, scratch, chunk.rows, block.hidden, block.embed, {normalised, {block.embed}, {}},
         {block.fc1_weight.data, {}, {block.fc1_weight.row_stride}}, hidden);

    Output out{y, y_rows, {}};
    out.column_scale = block.layer_scale;
    out.row_scale = chunk.branch_scale;
    out.rows_per_scale = block.tokens;
    out.residual = chunk.norm.x;
    out.residual_rows = chunk.norm.x_rows;
    project(threads, scratch, block, chunk.rows, activated, out);
  }
  return kOk;
}

int mlp_block_backward(const MlpBlock& block, const MlpBlockGradients& gradients, const Threads& threads) {
  const Axis grad_rows = token_rows(block.tokens, gradients.grad.token_stride, gradients.grad.image_stride);
  const Axis dx_rows = token_rows(block.tokens, gradients.x.token_stride, gradients.x.image_stride);
  const int64_t step = images_per_chunk(block.batch, block.tokens);
  const int64_t rows = block.hidden == 0 ? 0 : step * block.tokens;
  // What is wanted of the chain of gradients, from its end.
  const bool needs_normalised =
      gradients.x.data != nullptr || gradients.norm_weight != nullptr || gradients.norm_bias != nullptr;
  const bool needs_hidden = needs_normalised || gradients.fc1_weight.data != nullptr || gradients.fc1_bias != nullptr;
  const bool needs_activated = gradients.fc2_weight.data != nullptr || gradients.layer_scale != nullptr;
  float *normalised, *statistics, *z, *d_hidden, *activated, *scratch;
  Workspace workspace;
  workspace.add(&normalised, rows * block.embed);
  workspace.add(&statistics, rows * 2);
  workspace.add(&z, rows * block.embed);
  workspace.add(&d_hidden, rows * block.hidden);
  workspace.add(&activated, needs_activated ? rows * block.hidden : 0);
  workspace.add(&scratch, gemm_scratch(threads));
  if (!workspace.allocate()) return kOutOfMemory;

  for (int64_t image = 0; image < block.batch; image += step) {
    const Chunk chunk = chunk_of(block, image, smaller(step, block.batch - image));
    const float* grad = gradients.grad.data + image * gradients.grad.image_stride;
    float* dx = gradients.x.data == nullptr ? nullptr : gradients.x.data + image * gradients.x.image_stride;
    if (block.hidden == 0) {
      if (dx == nullptr) return kOk;
      copy_rows(threads, chunk.rows, block.embed, grad, grad_rows, dx, dx_rows);
      continue;
    }
    const Branch branch{chunk.rows, block.embed, block.tokens, grad, grad_rows, chunk.branch_scale, block.layer_scale};
    const float* saved = block.saved.data + image * block.saved.image_stride;
    normalize(threads, chunk.norm, normalised, statistics);
    if (needs_activated)
      parallel_ranges(threads, chunk.rows, 8 * block.hidden, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++)
          for (int64_t c = 0; c < block.hidden; c += kWidth) {
            const Vec value = load(saved + chunk.saved_rows.at(row) + c, block.hidden - c);
            store(activated + row * block.hidden + c, gelu(value), block.hidden - c);
          }
      });

    if (gradients.layer_scale != nullptr) {
      project(threads, scratch, block, chunk.rows, activated, {z, {block.embed}, {}});
      add_layer_scale_gradient(threads, branch, z, gradients.layer_scale);
    }
    scale_branch(threads, branch, z);
    const View z_view{z, {block.embed}, {}};
    if (gradients.fc2_bias != nullptr)
      add_column_sums(threads, chunk.rows, block.embed, gradients.fc2_bias, {}, z, {block.embed});
    if (gradients.fc2_weight.data != nullptr)
      gemm(threads, scratch, block.embed, block.hidden, chunk.rows, transposed(z_view), {activated, {block.hidden}, {}},
           {gradients.fc2_weight.data, {gradients.fc2_weight.row_stride}, {}, true});

    if (!needs_hidden) continue;
    gemm(threads, scratch, chunk.rows, block.hidden, block.embed, z_view,
         {block.fc2_weight.data, {block.fc2_weight.row_stride}, {}}, {d_hidden, {block.hidden}, {}});
    parallel_ranges(threads, chunk.rows, 8 * block.hidden, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++)
        for (int64_t c = 0; c < block.hidden; c += kWidth) {
          float* d = d_hidden + row * block.hidden + c;
          const int64_t count = block.hidden - c;
          store(d, load(d, count) * gelu_derivative(load(saved + chunk.saved_rows.at(row) + c, count)), count);
        }
    });

    const View d_hidden_view{d_hidden, {block.hidden}, {}};
    if (gradients.fc1_bias != nullptr)
      add_column_sums(threads, chunk.rows, block.hidden, gradients.fc1_bias, {}, d_hidden, {block.hidden});
    if (gradients.fc1_weight.data != nullptr)
      gemm(threads, scratch, block.hidden, block.embed, chunk.rows, transposed(d_hidden_view),
           {normalised, {block.embed}, {}}, {gradients.fc1_weight.data, {gradients.fc1_weight.row_stride}, {}, true});

    if (!needs_normalised) continue;
    float* d_normalised = z;  // z is no longer needed
    gemm(threads, scratch, chunk.rows, block.embed, block.hidden, d_hidden_view,
         {block.fc1_weight.data, {block.fc1_weight.row_stride}, {}}, {d_normalised, {block.embed}, {}});
    normalize_backward(
        threads, chunk.norm,
        {d_normalised, statistics, grad, grad_rows, dx, dx_rows, gradients.norm_weight, gradients.norm_bias});
  }
  return kOk;
}

}  // namespace hydravit::HYDRAVIT_ISA
