// Attention block: y = x + branch_scale * layer_scale * (attended proj^T + b), attended = attention of the three
// products of norm(x) with the query, key and value weights; images in chunks.
//
// The residual is added while the projection's tiles are in registers. Backward recomputes the normalised x, and the
// probabilities from the saved Q, K and log-sum-exp.
#include "attention_heads.h"
#include "kernels.h"
#include "norm.h"

namespace hydravit::HYDRAVIT_ISA {

namespace {

// The three roles of the fused product, in the order in which a row of qkv holds them.
struct Role {
  Weight weight;
  const float* bias;
  int64_t dim;     // per head
  int64_t column;  // in a row of qkv
};
struct Roles {
  Role role[3];
  int64_t columns;  // of a row of qkv

  explicit Roles(const AttentionBlock& block) {
    const int64_t d = block.heads * block.head_dim;
    role[0] = {block.query_weight, block.query_bias, block.head_dim, 0};
    role[1] = {block.key_weight, block.key_bias, block.head_dim, d};
    role[2] = {block.value_weight, block.value_bias, block.value_dim, 2 * d};
    columns = 2 * d + block.heads * block.value_dim;
  }
};

Norm norm_of(const AttentionBlock& block, int64_t image, int64_t images) {
  return {images * block.tokens,
          block.embed,
          block.eps,
          block.x.data + image * block.x.image_stride,
          token_rows(block.tokens, block.x.token_stride, block.x.image_stride),
          block.norm_weight,
          block.norm_bias};
}

const float* branch_scale_of(const AttentionBlock& block, int64_t image) {
  return block.branch_scale == nullptr ? nullptr : block.branch_scale + image;
}

MutableTokens from_image(const MutableTokens& tokens, int64_t image) {
  if (tokens.data == nullptr) return tokens;
  return {tokens.data + image * tokens.image_stride, tokens.image_stride, tokens.token_stride};
}

Tokens column_of(const MutableTokens& tokens, int64_t column) {
  return {tokens.data + column, tokens.image_stride, tokens.token_stride};
}

// `images` images from `image` on; qkv and attended are those of the chunk.
Heads heads_of(const AttentionBlock& block, int64_t image, int64_t images, const MutableTokens& qkv,
               const MutableTokens& attended) {
  const Roles roles(block);
  float* logsumexp = block.logsumexp == nullptr ? nullptr : block.logsumexp + image * block.logsumexp_image_stride;
  return {images,
          block.tokens,
          block.heads,
          block.head_dim,
          block.value_dim,
          block.scale,
          column_of(qkv, roles.role[0].column),
          column_of(qkv, roles.role[1].column),
          column_of(qkv, roles.role[2].column),
          attended,
          logsumexp,
          block.logsumexp_image_stride};
}

Axis rows_of(const AttentionBlock& block, const MutableTokens& tokens) {
  return token_rows(block.tokens, tokens.token_stride, tokens.image_stride);
}

// The projection with its bias; what becomes of the product is the caller's.
void project(const Threads& threads, float* scratch, const AttentionBlock& block, int64_t rows,
             const MutableTokens& attended, Output out) {
  out.bias = block.proj_bias;
  gemm(threads, scratch, rows, block.embed, block.heads * block.value_dim,
       {attended.data, rows_of(block, attended), {}},
       {block.proj_weight.data, segmented(1, block.value_dim, block.pitch), {block.proj_weight.row_stride}}, out);
}

}  // namespace

int attention_block(const AttentionBlock& block, const Threads& threads) {
  const int64_t tokens = block.tokens, step = images_per_chunk(block.batch, tokens);
  const int64_t rows = block.heads == 0 ? 0 : step * tokens;
  const Roles roles(block);
  const int64_t values = block.heads * block.value_dim;
  const bool save = block.qkv.data != nullptr;
  MutableTokens qkv{nullptr, tokens * roles.columns, roles.columns}, attended{nullptr, tokens * values, values};
  float *normalised, *scratch, *heads_scratch;
  Workspace workspace;
  workspace.add(&normalised, rows * block.embed);
  workspace.add(&qkv.data, save ? 0 : rows * roles.columns);
  workspace.add(&attended.data, save ? 0 : rows * values);
  workspace.add(&scratch, gemm_scratch(threads));
  workspace.add(&heads_scratch, attend_scratch(block, threads));
  if (!workspace.allocate()) return kOutOfMemory;

  for (int64_t image = 0; image < block.batch; image += step) {
    const int64_t images = smaller(step, block.batch - image);
    const Norm norm = norm_of(block, image, images);
    const MutableTokens y = from_image(block.y, image);
    if (block.heads == 0) {
      copy_rows(threads, norm.rows, block.embed, norm.x, norm.x_rows, y.data, rows_of(block, y));
      continue;
    }
    if (save) qkv = from_image(block.qkv, image), attended = from_image(block.attended, image);

    normalize(threads, norm, normalised, nullptr);
    for (const Role& role : roles.role) {
      Output out{qkv.data + role.column, rows_of(block, qkv), {}};
      const Axis weight_rows = segmented(role.weight.row_stride, role.dim, block.pitch * role.weight.row_stride);
      out.bias = role.bias;
      out.bias_axis = segmented(1, role.dim, block.pitch);
      gemm(threads, scratch, norm.rows, block.heads * role.dim, block.embed, {normalised, {block.embed}, {}},
           {role.weight.data, {}, weight_rows}, out);
    }
    attend(heads_of(block, image, images, qkv, attended), threads, heads_scratch);

    Output out{y.data, rows_of(block, y), {}};
    out.column_scale = block.layer_scale;
    out.row_scale = branch_scale_of(block, image);
    out.rows_per_scale = tokens;
    out.residual = norm.x;
    out.residual_rows = norm.x_rows;
    project(threads, scratch, block, norm.rows, attended, out);
  }
  return kOk;
}

int attention_block_backward(const AttentionBlock& block, const AttentionBlockGradients& gradients,
                             const Threads& threads) {
  const int64_t tokens = block.tokens, step = images_per_chunk(block.batch, tokens);
  const int64_t rows = block.heads == 0 ? 0 : step * tokens;
  const Roles roles(block);
  const int64_t values = block.heads * block.value_dim;
  // What is wanted of the chain of gradients, from its end.
  const bool needs_normalised =
      gradients.x.data != nullptr || gradients.norm_weight != nullptr || gradients.norm_bias != nullptr;
  const MutableWeight weight_gradients[3] = {gradients.query_weight, gradients.key_weight, gradients.value_weight};
  float* const bias_gradients[3] = {gradients.query_bias, gradients.key_bias, gradients.value_bias};
  const bool needs_qkv = needs_normalised || weight_gradients[0].data != nullptr || bias_gradients[0] != nullptr;
  MutableTokens d_qkv{nullptr, tokens * roles.columns, roles.columns}, d_attended{nullptr, tokens * values, values};
  float *normalised, *statistics, *z, *scratch, *heads_scratch;
  Workspace workspace;
  workspace.add(&normalised, rows * block.embed);
  workspace.add(&statistics, rows * 2);
  workspace.add(&z, rows * block.embed);
  workspace.add(&d_qkv.data, rows * roles.columns);
  workspace.add(&d_attended.data, rows * values);
  workspace.add(&scratch, gemm_scratch(threads));
  workspace.add(&heads_scratch, attend_backward_scratch(block, threads));
  if (!workspace.allocate()) return kOutOfMemory;

  for (int64_t image = 0; image < block.batch; image += step) {
    const int64_t images = smaller(step, block.batch - image);
    const Norm norm = norm_of(block, image, images);
    const MutableTokens dx = from_image(gradients.x, image);
    const float* grad = gradients.grad.data + image * gradients.grad.image_stride;
    const Axis grad_rows = token_rows(tokens, gradients.grad.token_stride, gradients.grad.image_stride);
    if (block.heads == 0) {
      if (dx.data == nullptr) return kOk;
      copy_rows(threads, norm.rows, block.embed, grad, grad_rows, dx.data, rows_of(block, dx));
      continue;
    }
    const MutableTokens qkv = from_image(block.qkv, image), attended = from_image(block.attended, image);
    const Branch branch{norm.rows,        block.embed, tokens, grad, grad_rows, branch_scale_of(block, image),
                        block.layer_scale};

    // Projection.
    if (gradients.layer_scale != nullptr) {
      project(threads, scratch, block, norm.rows, attended, {z, {block.embed}, {}});
      add_layer_scale_gradient(threads, branch, z, gradients.layer_scale);
    }
    scale_branch(threads, branch, z);
    const View z_view{z, {block.embed}, {}};
    const Axis proj_columns = segmented(1, block.value_dim, block.pitch);
    if (gradients.proj_bias != nullptr)
      add_column_sums(threads, norm.rows, block.embed, gradients.proj_bias, {}, z, {block.embed});
    if (gradients.proj_weight.data != nullptr)
      gemm(threads, scratch, block.embed, values, norm.rows, transposed(z_view),
           {attended.data, rows_of(block, attended), {}},
           {gradients.proj_weight.data, {gradients.proj_weight.row_stride}, proj_columns, true});
    if (!needs_qkv) continue;
    gemm(threads, scratch, norm.rows, values, block.embed, z_view,
         {block.proj_weight.data, {block.proj_weight.row_stride}, proj_columns}, {d_attended.data, {values}, {}});

    // Attention of the heads.
    const MutableTokens d_roles[3] = {{d_qkv.data + roles.role[0].column, d_qkv.image_stride, d_qkv.token_stride},
                                      {d_qkv.data + roles.role[1].column, d_qkv.image_stride, d_qkv.token_stride},
                                      {d_qkv.data + roles.role[2].column, d_qkv.image_stride, d_qkv.token_stride}};
    attend_backward(heads_of(block, image, images, qkv, attended),
                    {column_of(d_attended, 0), d_roles[0], d_roles[1], d_roles[2]}, threads, heads_scratch);

    // The three products of the normalised x.
    normalize(threads, norm, normalised, statistics);
    float* d_normalised = z;  // z is no longer needed
    for (int i = 0; i < 3; i++) {
      const Role& role = roles.role[i];
      const int64_t columns = block.heads * role.dim;
      const View d{d_roles[i].data, {roles.columns}, {}};
      if (bias_gradients[i] != nullptr)
        add_column_sums(threads, norm.rows, columns, bias_gradients[i], segmented(1, role.dim, block.pitch), d.data,
                        d.rows);
      if (weight_gradients[i].data != nullptr) {
        const int64_t stride = weight_gradients[i].row_stride;
        gemm(threads, scratch, columns, block.embed, norm.rows, transposed(d), {normalised, {block.embed}, {}},
             {weight_gradients[i].data, segmented(stride, role.dim, block.pitch * stride), {}, true});
      }
      if (!needs_normalised) continue;
      const int64_t stride = role.weight.row_stride;
      gemm(threads, scratch, norm.rows, block.embed, columns, d,
           {role.weight.data, segmented(stride, role.dim, block.pitch * stride), {}},
           {d_normalised, {block.embed}, {}, i > 0});
    }
    if (!needs_normalised) continue;
    normalize_backward(threads, norm,
                       {d_normalised, statistics, grad, grad_rows, dx.data, rows_of(block, dx), gradients.norm_weight,
                        gradients.norm_bias});
  }
  return kOk;
}

}  // namespace hydravit::HYDRAVIT_ISA
