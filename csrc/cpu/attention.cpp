// Attention block: y = x + branch_scale * layer_scale * (attended proj^T + b). `attended` is the attention of Q, K and
// V, the products of norm(x) with the query, key and value weights. The chunks go through the block one by one.
//
// In forward, a first parallel loop computes norm, Q, K and V, and a second one attention, projection and residual: the
// attention of a row needs K and V of all rows of its image. Backward has the same loops in reverse and then sums over
// rows. It recomputes the normalised x, and the probabilities from the saved Q, K and log-sum-exp.
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
  int64_t columns;  // of qkv

  explicit Roles(const AttentionBlock& block) {
    const int64_t d = block.heads * block.head_dim;
    role[0] = {block.query_weight, block.query_bias, block.head_dim, 0};
    role[1] = {block.key_weight, block.key_bias, block.head_dim, d};
    role[2] = {block.value_weight, block.value_bias, block.value_dim, 2 * d};
    columns = 2 * d + block.heads * block.value_dim;
  }
};

Tokens column_of(const MutableTokens& tokens, int64_t column) {
  return {tokens.data + column, tokens.image_stride, tokens.token_stride};
}

// The heads of images [image, image + images), whose qkv and attended are given.
Heads heads_of(const AttentionBlock& block, int64_t image, int64_t images, const MutableTokens& qkv,
               const MutableTokens& attended) {
  const Roles roles(block);
  float* logsumexp = block.logsumexp == nullptr ? nullptr : block.logsumexp + image * block.logsumexp_image_stride;
  return {images,
          block.tokens,
          block.queries,
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

// The rows of the first `tokens` tokens of every image.
Axis rows_of(int64_t tokens, const MutableTokens& data) {
  return token_rows(tokens, data.token_stride, data.image_stride);
}
Axis rows_of(int64_t tokens, const Tokens& data) { return token_rows(tokens, data.token_stride, data.image_stride); }

Axis rows_of(const AttentionBlock& block, const Role& role) {
  return segmented(role.weight.row_stride, role.dim, block.pitch * role.weight.row_stride);
}

View of_role(const AttentionBlock& block, const Role& role) { return {role.weight.data, rows_of(block, role), {}}; }

// Backward of one chunk. A buffer holds the rows of all its images, (rows, padded_row(...)); z and the gradient of
// `attended` have rows for the queries only.
struct Backward {
  AttentionBlock block;
  AttentionBlockGradients gradients;
  View proj, roles[3];  // right operands of the products with the gradients
  bool needs_qkv, needs_normalised;
  float *statistics, *z, *d_normalised;
  float* normalised;  // panels, because the sums over rows read it as a right operand
  int64_t panel_stride;
  MutableTokens d_attended, d_qkv;

  int64_t rows() const { return block.batch * block.tokens; }
  int64_t query_rows() const { return block.batch * block.queries; }
  Norm norm() const {
    const Axis x_rows = rows_of(block.tokens, block.x);
    return {rows(), block.embed, block.eps, block.x.data, x_rows, block.norm_weight, block.norm_bias};
  }
  NormGradients norm_gradients() const {
    return {d_normalised,     padded_row(block.embed),           statistics, gradients.grad.data, residual_rows(),
            gradients.x.data, rows_of(block.tokens, gradients.x)};
  }
  // An index counts all tokens, although only queries have a residual.
  Axis residual_rows() const { return rows_of(block.tokens, gradients.grad); }
  Branch branch() const {
    return {query_rows(),
            block.embed,
            block.queries,
            gradients.grad.data,
            rows_of(block.queries, gradients.grad),
            block.branch_scale,
            block.layer_scale};
  }
};

// Goes from the gradient of y to the gradient of `attended`, for a band of queries of one image, by one thread.
void project_backward_rows(const Backward& chunk, int64_t image, const Range& queries, float* panel) {
  const AttentionBlock& block = chunk.block;
  const int64_t begin = image * block.queries + queries.begin, end = image * block.queries + queries.end;
  const int64_t embed = padded_row(block.embed);
  scale_branch_rows(chunk.branch(), chunk.z, embed, begin, end);
  if (!chunk.needs_qkv) return;
  const MutableTokens to = rows_from(chunk.d_attended, image, queries.begin);
  multiply_rows(end - begin, block.heads * block.value_dim, block.embed, chunk.z + begin * embed, {embed}, chunk.proj,
                {to.data, {to.token_stride}, {}}, panel);
}

// Goes from the gradients of Q, K and V to the gradient of x, for a band of tokens of one image, by one thread.
void query_key_value_backward_rows(const Backward& chunk, int64_t image, const Range& tokens, float* panel) {
  const AttentionBlock& block = chunk.block;
  const int64_t begin = image * block.tokens + tokens.begin, end = image * block.tokens + tokens.end;
  const int64_t embed = padded_row(block.embed);
  normalize_rows(chunk.norm(), begin, end, chunk.normalised + begin * kPanel, kPanel, chunk.statistics,
                 chunk.panel_stride);
  if (!chunk.needs_normalised) return;
  const MutableTokens d = rows_from(chunk.d_qkv, image, tokens.begin);
  const Roles roles(block);
  const int64_t queries = smaller(tokens.end, larger(tokens.begin, block.queries)) - tokens.begin;
  for (const int i : {1, 2, 0}) {
    const Role& role = roles.role[i];
    const int64_t rows = i == 0 ? queries : end - begin;
    if (rows == 0) continue;
    Epilogue epilogue{chunk.d_normalised + begin * embed, {embed}, {}};
    epilogue.accumulate = i != 1;
    multiply_rows(rows, block.embed, block.heads * role.dim, d.data + role.column, {d.token_stride}, chunk.roles[i],
                  epilogue, panel);
  }
  if (chunk.gradients.x.data == nullptr) return;
  NormGradients through = chunk.norm_gradients();
  normalize_backward_rows(chunk.norm(), through, begin, begin + queries);
  through.residual = nullptr;
  normalize_backward_rows(chunk.norm(), through, begin + queries, end);
}

// Adds the gradients of the parameters, which are sums over rows.
void add_gradients(const Backward& chunk, const Threads& threads, float* scratch) {
  const AttentionBlock& block = chunk.block;
  const AttentionBlockGradients& gradients = chunk.gradients;
  const int64_t embed = padded_row(block.embed), values = block.heads * block.value_dim;
  const int64_t query_rows = chunk.query_rows();
  const View z{chunk.z, {embed}, {}};
  const Axis of_panels = segmented(1, kPanel, chunk.panel_stride);
  const View normalised{chunk.normalised, {kPanel}, of_panels, chunk.normalised, chunk.panel_stride};
  const View attended{block.attended.data, rows_of(block.queries, block.attended), {}};
  if (gradients.proj_bias != nullptr)
    add_column_sums(threads, query_rows, block.embed, gradients.proj_bias, {}, z.data, z.rows);
  if (gradients.proj_weight.data != nullptr)
    gemm(threads, scratch, block.embed, values, query_rows, transposed(z), attended,
         {gradients.proj_weight.data, {gradients.proj_weight.row_stride}, chunk.proj.columns, true});
  const MutableWeight weights[3] = {gradients.query_weight, gradients.key_weight, gradients.value_weight};
  float* const biases[3] = {gradients.query_bias, gradients.key_bias, gradients.value_bias};
  const Roles roles(block);
  for (int i = 0; i < 3; i++) {
    const Role& role = roles.role[i];
    const int64_t columns = block.heads * role.dim, stride = weights[i].row_stride;
    const bool few = i == 0 && block.queries < block.tokens;
    const int64_t rows = few ? query_rows : chunk.rows();
    const View d{chunk.d_qkv.data + role.column, rows_of(few ? block.queries : block.tokens, chunk.d_qkv), {}};
    const Axis of_queries = token_rows(block.queries, kPanel, block.tokens * kPanel);
    const View right = few ? View{chunk.normalised, of_queries, of_panels} : normalised;
    if (biases[i] != nullptr)
      add_column_sums(threads, rows, columns, biases[i], segmented(1, role.dim, block.pitch), d.data, d.rows);
    if (weights[i].data != nullptr)
      gemm(threads, scratch, columns, block.embed, rows, transposed(d), right,
           {weights[i].data, segmented(stride, role.dim, block.pitch * stride), {}, true});
  }
  add_norm_gradients(threads, chunk.norm(), chunk.norm_gradients(), gradients.norm_weight, gradients.norm_bias);
  if (gradients.layer_scale != nullptr) {
    float* out = chunk.d_normalised;  // no longer needed
    Epilogue branch{out, {embed}, {}};
    branch.bias = block.proj_bias;
    gemm(threads, scratch, query_rows, block.embed, values, attended, proj_of(block), branch);
    add_layer_scale_gradient(threads, chunk.branch(), out, embed, gradients.layer_scale);
  }
}

// A block without heads is the identity: the gradient of x is the gradient of y.
void pass_on(const AttentionBlockGradients& gradients, const AttentionBlock& block, const Threads& threads) {
  if (gradients.x.data == nullptr) return;
  parallel_ranges(threads, block.batch, block.tokens * block.embed, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; image++)
      for (int64_t token = 0; token < block.tokens; token++) {
        float* to = rows_from(gradients.x, image, token).data;
        const size_t size = static_cast<size_t>(block.embed) * sizeof(float);
        if (token < block.queries)
          std::memcpy(to, rows_from(gradients.grad, image, token).data, size);
        else
          std::memset(to, 0, size);
      }
  });
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
    Epilogue epilogue{qkv.data + wanted.begin * qkv.token_stride + role.column, {qkv.token_stride}, {}};
    epilogue.bias = role.bias;
    epilogue.bias_axis = segmented(1, role.dim, block.pitch);
    multiply_rows(wanted.end - wanted.begin, block.heads * role.dim, block.embed, normalised + wanted.begin * stride,
                  {stride}, transposed(role.weight, rows_of(block, role)), epilogue, panel);
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
  Epilogue epilogue{y.data, {y.token_stride}, {}};
  epilogue.bias = block.proj_bias;
  epilogue.column_scale = block.layer_scale;
  epilogue.row_scale = block.branch_scale == nullptr ? nullptr : block.branch_scale + image;
  epilogue.rows_per_scale = rows;
  epilogue.residual = x.data;
  epilogue.residual_rows = {x.token_stride};
  multiply_rows(rows, block.embed, block.heads * block.value_dim, attended.data, {attended.token_stride},
                proj_of(block), epilogue, scratch);
}

int64_t attention_rows_scratch(const AttentionBlock& block) {
  const int64_t products = kBandRows * padded_row(block.embed) + round_up(kPieceScratch, 16);
  return block.heads == 0 ? products : larger(products, attend_scratch(block));
}

int attention_block(const AttentionBlock& block, const Threads& threads) {
  const int64_t tokens = block.tokens, chunk_images = images_per_chunk(block.batch, tokens);
  const int64_t values = block.heads * block.value_dim, columns = Roles(block).columns;
  const bool save = block.qkv.data != nullptr;
  const int64_t jobs =
      jobs_for(threads, chunk_images * tokens, block.embed * (columns + values) + tokens * (columns - values));
  const int64_t size = attention_rows_scratch(block);
  MutableTokens qkv{nullptr, tokens * padded_row(columns), padded_row(columns)};
  MutableTokens attended{nullptr, block.queries * padded_row(values), padded_row(values)};
  const bool repack = block.heads > 0 && worth_repacking(block.batch * tokens, jobs);
  const Roles roles(block);
  float *scratch, *role_panels[3], *proj_panels;
  Workspace workspace;
  workspace.add(&qkv.data, save ? 0 : chunk_images * qkv.image_stride);
  workspace.add(&attended.data, save ? 0 : chunk_images * attended.image_stride);
  workspace.add(&scratch, jobs * size);
  for (int i = 0; i < 3; i++)
    workspace.add(&role_panels[i], repack ? panels_size(block.embed, block.heads * roles.role[i].dim) : 0);
  workspace.add(&proj_panels, repack ? panels_size(values, block.embed) : 0);
  if (!workspace.allocate()) return kOutOfMemory;
  AttentionBlock repacked = block;
  if (repack) {
    Weight* const weights[3] = {&repacked.query_weight, &repacked.key_weight, &repacked.value_weight};
    for (int i = 0; i < 3; i++) {
      const Role& role = roles.role[i];
      repack_right(threads, block.embed, block.heads * role.dim, transposed(role.weight, rows_of(block, role)),
                   role_panels[i], *weights[i]);
    }
    repack_right(threads, values, block.embed, proj_of(block), proj_panels, repacked.proj_weight);
  }

  for (int64_t image = 0; image < block.batch; image += chunk_images) {
    AttentionBlock chunk = repacked;
    chunk.batch = smaller(chunk_images, block.batch - image);
    chunk.x = rows_from(block.x, image, 0);
    chunk.y = rows_from(block.y, image, 0);
    chunk.qkv = save ? rows_from(block.qkv, image, 0) : qkv;
    chunk.attended = save ? rows_from(block.attended, image, 0) : attended;
    if (block.branch_scale != nullptr) chunk.branch_scale += image;
    if (block.logsumexp != nullptr) chunk.logsumexp += image * block.logsumexp_image_stride;
    const auto each_share = [&](int64_t count, const auto& body) {
      parallel(threads, jobs, [&](int64_t job) {
        for_each_share(job, jobs, chunk.batch, count, [&](const Share& share) { body(share, scratch + job * size); });
      });
    };
    if (block.heads > 0)
      each_share(tokens, [&](const Share& share, float* own) {
        for_each_band(share.tokens, [&](const Range& band) {
          query_key_value_rows(chunk, share.image, band, {0, block.queries}, own);
        });
      });
    each_share(block.queries, [&](const Share& share, float* own) {
      attend_rows(chunk, share.image, share.tokens, own);
      for_each_band(share.tokens, [&](const Range& band) { project_rows(chunk, share.image, band, own); });
    });
  }
  return kOk;
}

int attention_block_backward(const AttentionBlock& block, const AttentionBlockGradients& gradients,
                             const Threads& threads) {
  const int64_t tokens = block.tokens, chunk_images = images_per_chunk(block.batch, tokens);
  const Roles roles(block);
  const int64_t values = block.heads * block.value_dim;
  Backward backward{};
  // An intermediate gradient is needed where one that follows from it is wanted.
  backward.needs_normalised =
      gradients.x.data != nullptr || gradients.norm_weight != nullptr || gradients.norm_bias != nullptr;
  backward.needs_qkv = backward.needs_normalised;
  for (const MutableWeight& weight : {gradients.query_weight, gradients.key_weight, gradients.value_weight})
    backward.needs_qkv |= weight.data != nullptr;
  for (const float* bias : {gradients.query_bias, gradients.key_bias, gradients.value_bias})
    backward.needs_qkv |= bias != nullptr;
  backward.proj = transposed(proj_of(block));
  for (int i = 0; i < 3; i++) backward.roles[i] = of_role(block, roles.role[i]);
  backward.d_qkv = {nullptr, tokens * padded_row(roles.columns), padded_row(roles.columns)};
  backward.d_attended = {nullptr, block.queries * padded_row(values), padded_row(values)};

  const int64_t jobs = jobs_for(threads, chunk_images * tokens, block.embed * (roles.columns + values));
  const bool repack = backward.needs_qkv && block.heads > 0 && worth_repacking(block.batch * tokens, jobs);
  const int64_t images = block.heads == 0 ? 0 : chunk_images, rows = images * tokens,
                by_embed = rows * padded_row(block.embed);
  backward.panel_stride = rows * kPanel;
  float *panels, *scratch, *heads_scratch, *proj, *of_roles[3];
  Workspace workspace;
  workspace.add(&backward.normalised, panels_size(rows, block.embed));
  workspace.add(&backward.statistics, rows * 2);
  workspace.add(&backward.z, images * block.queries * padded_row(block.embed));
  workspace.add(&backward.d_normalised, by_embed);
  workspace.add(&backward.d_qkv.data, images * backward.d_qkv.image_stride);
  workspace.add(&backward.d_attended.data, images * backward.d_attended.image_stride);
  workspace.add(&panels, jobs * round_up(kPieceScratch, 16));
  workspace.add(&scratch, gemm_scratch(threads));
  workspace.add(&heads_scratch, attend_backward_scratch(block, threads));
  workspace.add(&proj, repack ? panels_size(block.embed, values) : 0);
  for (int i = 0; i < 3; i++)
    workspace.add(&of_roles[i], repack ? panels_size(block.heads * roles.role[i].dim, block.embed) : 0);
  if (!workspace.allocate()) return kOutOfMemory;
  if (repack) {
    repack_right(threads, block.embed, values, proj, backward.proj);
    for (int i = 0; i < 3; i++)
      repack_right(threads, block.heads * roles.role[i].dim, block.embed, of_roles[i], backward.roles[i]);
  }

  for (int64_t image = 0; image < block.batch; image += chunk_images) {
    AttentionBlock& chunk = backward.block = block;
    backward.gradients = gradients;
    chunk.batch = smaller(chunk_images, block.batch - image);
    chunk.x = rows_from(block.x, image, 0);
    chunk.qkv = rows_from(block.qkv, image, 0);
    chunk.attended = rows_from(block.attended, image, 0);
    if (block.branch_scale != nullptr) chunk.branch_scale += image;
    if (block.logsumexp != nullptr) chunk.logsumexp += image * block.logsumexp_image_stride;
    backward.gradients.grad = rows_from(gradients.grad, image, 0);
    backward.gradients.x = rows_from(gradients.x, image, 0);
    if (block.heads == 0) {
      pass_on(backward.gradients, chunk, threads);
      continue;
    }
    const auto each_band = [&](int64_t count, const auto& body) {
      parallel(threads, jobs, [&](int64_t job) {
        for_each_share(job, jobs, chunk.batch, count, [&](const Share& share) {
          for_each_band(share.tokens, [&](const Range& band) {
            body(backward, share.image, band, panels + job * round_up(kPieceScratch, 16));
          });
        });
      });
    };
    each_band(block.queries, project_backward_rows);
    if (backward.needs_qkv) {
      const MutableTokens& d = backward.d_qkv;
      const auto column = [&](int i) {
        return MutableTokens{d.data + roles.role[i].column, d.image_stride, d.token_stride};
      };
      attend_backward(heads_of(chunk, 0, chunk.batch, chunk.qkv, chunk.attended),
                      {column_of(backward.d_attended, 0), column(0), column(1), column(2)}, threads, heads_scratch);
      each_band(tokens, query_key_value_backward_rows);
    }
    add_gradients(backward, threads, scratch);
  }
  return kOk;
}

}  // namespace hydravit::HYDRAVIT_ISA
