// MLP block: y = x + branch_scale * layer_scale * (gelu(norm(x) fc1^T + b1) fc2^T + b2).
//
// Forward needs no other row than its own: every thread takes some rows through the whole block. GELU and the residual
// are applied to the products' tiles before they leave the cache. Backward takes images in chunks; it recomputes the
// normalised x and GELU from x and the saved (B, N, hidden) input of GELU.
#include "mlp.h"

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
  gemm(threads, scratch, rows, block.embed, block.hidden, {activated, {block.hidden}, {}}, transposed(block.fc2_weight),
       out);
}

}  // namespace

void mlp_rows(const MlpBlock& block, int64_t image, const Range& tokens, float* scratch) {
  const int64_t rows = tokens.end - tokens.begin;
  const Tokens x = rows_from(block.x, image, tokens.begin);
  const MutableTokens y = rows_from(block.y, image, tokens.begin), saved = rows_from(block.saved, image, tokens.begin);
  if (block.hidden == 0) {
    return copy_rows(0, rows, block.embed, x.data, {x.token_stride}, y.data, {y.token_stride});
  }
  const int64_t normalised_stride = padded_row(block.embed), activated_stride = padded_row(kPiece);
  float* normalised = scratch;
  float* activated = normalised + kBandRows * normalised_stride;
  float* panel = activated + kBandRows * activated_stride;
  normalize_rows({rows, block.embed, block.eps, x.data, {x.token_stride}, block.norm_weight, block.norm_bias}, 0, rows,
                 normalised, normalised_stride, nullptr);

  Output out{y.data, {y.token_stride}, {}};
  out.bias = block.fc2_bias;
  out.column_scale = block.layer_scale;
  out.row_scale = block.branch_scale == nullptr ? nullptr : block.branch_scale + image;
  out.rows_per_scale = rows;
  out.residual = x.data;
  out.residual_rows = {x.token_stride};
  // Hidden channels a piece at a time, so that they stay in cache between the two products.
  for (int64_t i = 0; i < pieces_of(block.hidden); i++) {
    const Piece piece = piece_of(block.hidden, i);
    const int64_t first = piece.depth.begin, count = piece.depth.end - first;
    Output hidden{activated, {activated_stride}, {}};
    if (saved.data != nullptr) hidden.data = saved.data + first, hidden.rows = {saved.token_stride};
    if (block.fc1_bias != nullptr) hidden.bias = block.fc1_bias + first;
    hidden.gelu = activated;
    hidden.gelu_stride = activated_stride;
    multiply_rows(rows, count, block.embed, normalised, {normalised_stride},
                  transposed(rows_from(block.fc1_weight, first)), hidden, panel);
    sweep(rows, {0, block.embed}, piece, activated, {activated_stride}, transposed(block.fc2_weight), out, panel);
  }
}

int64_t mlp_rows_scratch(const MlpBlock& block) {
  return kBandRows * (padded_row(block.embed) + padded_row(kPiece)) + round_up(kSweepScratch, 16);
}

int mlp_block(const MlpBlock& block, const Threads& threads) {
  const int64_t jobs = jobs_for(threads, block.batch * block.tokens, block.embed * block.hidden);
  const int64_t size = mlp_rows_scratch(block);
  const bool pack = many_bands(block.batch * block.tokens, jobs);
  const int64_t fc1_size = panels_size(block.embed, block.hidden), fc2_size = panels_size(block.hidden, block.embed);
  float *scratch, *fc1, *fc2;
  Workspace workspace;
  workspace.add(&scratch, jobs * size);
  workspace.add(&fc1, pack ? fc1_size : 0);
  workspace.add(&fc2, pack ? fc2_size : 0);
  if (!workspace.allocate()) return kOutOfMemory;
  MlpBlock packed = block;
  if (pack && block.hidden > 0) {
    use_packed(threads, block.embed, block.hidden, transposed(block.fc1_weight), fc1, packed.fc1_weight);
    use_packed(threads, block.hidden, block.embed, transposed(block.fc2_weight), fc2, packed.fc2_weight);
  }
  parallel(threads, jobs, [&](int64_t job) {
    for_each_share(job, jobs, block.batch, block.tokens, [&](const Share& share) {
      for_each_band(share.tokens,
                    [&](const Range& band) { mlp_rows(packed, share.image, band, scratch + job * size); });
    });
  });
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
