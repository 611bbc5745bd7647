// Attention block: y = x + branch_scale * layer_scale * (attended proj^T + b), attended = attention of the three
// products of norm(x) with the query, key and value weights; images in chunks.
//
// Forward has two phases, between which all rows of an image are waited for: the three products; attention, projection
// and residual. In each every thread takes some rows all the way. Backward recomputes the normalised x, and the
// probabilities from the saved Q, K and log-sum-exp.
#include "attention.h"

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

Axis rows_of(const AttentionBlock& block, const Role& role) {
  return segmented(role.weight.row_stride, role.dim, block.pitch * role.weight.row_stride);
}

// The projection with its bias; what becomes of the product is the caller's.
void project(const Threads& threads, float* scratch, const AttentionBlock& block, int64_t rows,
             const MutableTokens& attended, Output out) {
  out.bias = block.proj_bias;
  gemm(threads, scratch, rows, block.embed, block.heads * block.value_dim,
       {attended.data, rows_of(block, attended), {}}, proj_of(block), out);
}

}  // namespace

View proj_of(const AttentionBlock& block) {
  const Weight& weight = block.proj_weight;
  return {
      weight.data, segmented(1, block.value_dim, block.pitch), {weight.row_stride}, weight.panels, weight.panel_stride};
}

void query_key_value_rows(const AttentionBlock& block, int64_t image, const Range& tokens, const Range& queries,
                          float* scratch) {
  const int64_t rows = tokens.end - tokens.begin, stride = padded_row(block.embed);
  const Tokens x = rows_from(block.x, image, tokens.begin);
  const MutableTokens qkv = rows_from(block.qkv, image, tokens.begin);
  float* normalised = scratch;
  float* panel = normalised + kBandRows * stride;
  normalize_rows({rows, block.embed, block.eps, x.data, {x.token_stride}, block.norm_weight, block.norm_bias}, 0, rows,
                 normalised, stride, nullptr);
  for (const Role& role : Roles(block).role) {
    Range wanted{0, rows};
    if (role.column == 0)
      wanted = {larger<int64_t>(0, queries.begin - tokens.begin), smaller(rows, queries.end - tokens.begin)};
    if (wanted.begin >= wanted.end) continue;
    Output out{qkv.data + wanted.begin * qkv.token_stride + role.column, {qkv.token_stride}, {}};
    out.bias = role.bias;
    out.bias_axis = segmented(1, role.dim, block.pitch);
    multiply_rows(wanted.end - wanted.begin, block.heads * role.dim, block.embed, normalised + wanted.begin * stride,
                  {stride}, transposed(role.weight, rows_of(block, role)), out, panel);
  }
}

void attend_head(const AttentionBlock& block, int64_t image, int64_t head, const Range& tokens, float* scratch) {
  attend(heads_of(block, 0, block.batch, block.qkv, block.attended), image, head, tokens, scratch);
}

void attend_rows(const AttentionBlock& block, int64_t image, const Range& tokens, float* scratch) {
  for (int64_t head = 0; head < block.heads; head++) attend_head(block, image, head, tokens, scratch);
}

void project_rows(const AttentionBlock& block, int64_t image, const Range& tokens, float* scratch) {
  const int64_t rows = tokens.end - tokens.begin;
  const Tokens x = rows_from(block.x, image, tokens.begin);
  const MutableTokens y = rows_from(block.y, image, tokens.begin);
  const MutableTokens attended = rows_from(block.attended, image, tokens.begin);
  if (block.heads == 0) {
    return copy_rows(0, rows, block.embed, x.data, {x.token_stride}, y.data, {y.token_stride});
  }
  Output out{y.data, {y.token_stride}, {}};
  out.bias = block.proj_bias;
  out.column_scale = block.layer_scale;
  out.row_scale = block.branch_scale == nullptr ? nullptr : block.branch_scale + image;
  out.rows_per_scale = rows;
  out.residual = x.data;
  out.residual_rows = {x.token_stride};
  multiply_rows(rows, block.embed, block.heads * block.value_dim, attended.data, {attended.token_stride},
                proj_of(block), out, scratch);
}

int64_t attention_rows_scratch(const AttentionBlock& block) {
  const int64_t products = kBandRows * padded_row(block.embed) + round_up(kSweepScratch, 16);
  return block.heads == 0 ? products : larger(products, attend_scratch(block));
}

int attention_block(const AttentionBlock& block, const Threads& threads) {
  const int64_t tokens = block.tokens, step = images_per_chunk(block.batch, tokens);
  const int64_t values = block.heads * block.value_dim, columns = Roles(block).columns;
  const bool save = block.qkv.data != nullptr;
  const int64_t jobs = jobs_for(threads, step * tokens, block.embed * (columns + values) + tokens * (columns - values));
  const int64_t size = attention_rows_scratch(block);
  MutableTokens qkv{nullptr, tokens * padded_row(columns), padded_row(columns)};
  MutableTokens attended{nullptr, tokens * padded_row(values), padded_row(values)};
  const bool pack = block.heads > 0 && many_bands(block.batch * tokens, jobs);
  const Roles roles(block);
  float *scratch, *role_panels[3], *proj_panels;
  Workspace workspace;
  workspace.add(&qkv.data, save ? 0 : step * qkv.image_stride);
  workspace.add(&attended.data, save ? 0 : step * attended.image_stride);
  workspace.add(&scratch, jobs * size);
  for (int i = 0; i < 3; i++)
    workspace.add(&role_panels[i], pack ? panels_size(block.embed, block.heads * roles.role[i].dim) : 0);
  workspace.add(&proj_panels, pack ? panels_size(values, block.embed) : 0);
  if (!workspace.allocate()) return kOutOfMemory;
  AttentionBlock packed = block;
  if (pack) {
    Weight* const weights[3] = {&packed.query_weight, &packed.key_weight, &packed.value_weight};
    for (int i = 0; i < 3; i++) {
      const Role& role = roles.role[i];
      use_packed(threads, block.embed, block.heads * role.dim, transposed(role.weight, rows_of(block, role)),
                 role_panels[i], *weights[i]);
    }
    use_packed(threads, values, block.embed, proj_of(block), proj_panels, packed.proj_weight);
  }

  for (int64_t image = 0; image < block.batch; image += step) {
    AttentionBlock chunk = packed;
    chunk.batch = smaller(step, block.batch - image);
    chunk.x = rows_from(block.x, image, 0);
    chunk.y = rows_from(block.y, image, 0);
    chunk.qkv = save ? rows_from(block.qkv, image, 0) : qkv;
    chunk.attended = save ? rows_from(block.attended, image, 0) : attended;
    if (block.branch_scale != nullptr) chunk.branch_scale += image;
    if (block.logsumexp != nullptr) chunk.logsumexp += image * block.logsumexp_image_stride;
    const auto each_share = [&](const auto& body) {
      parallel(threads, jobs, [&](int64_t job) {
        for_each_share(job, jobs, chunk.batch, tokens, [&](const Share& share) { body(share, scratch + job * size); });
      });
    };
    if (block.heads > 0)
      each_share([&](const Share& share, float* own) {
        for_each_band(share.tokens,
                      [&](const Range& band) { query_key_value_rows(chunk, share.image, band, {0, tokens}, own); });
      });
    each_share([&](const Share& share, float* own) {
      attend_rows(chunk, share.image, share.tokens, own);
      for_each_band(share.tokens, [&](const Range& band) { project_rows(chunk, share.image, band, own); });
    });
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
  bool needs_qkv = needs_normalised;
  for (int i = 0; i < 3; i++) needs_qkv |= weight_gradients[i].data != nullptr || bias_gradients[i] != nullptr;
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
    const MutableTokens dx = rows_from(gradients.x, image, 0);
    const float* grad = gradients.grad.data + image * gradients.grad.image_stride;
    const Axis grad_rows = token_rows(tokens, gradients.grad.token_stride, gradients.grad.image_stride);
    if (block.heads == 0) {
      if (dx.data == nullptr) return kOk;
      copy_rows(threads, norm.rows, block.embed, grad, grad_rows, dx.data, rows_of(block, dx));
      continue;
    }
    const MutableTokens qkv = rows_from(block.qkv, image, 0), attended = rows_from(block.attended, image, 0);
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
