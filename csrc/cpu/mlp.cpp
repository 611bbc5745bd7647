// MLP block: y = x + branch_scale * layer_scale * (gelu(norm(x) fc1^T + b1) fc2^T + b2).
//
// In forward, a row needs no other row: every thread carries its own rows through the whole block. The epilogues of the
// products apply GELU and add the residual while a tile is in cache. Backward does the same for the gradient of x,
// chunk by chunk, and then sums over the rows of the chunk for the gradients of the parameters. It recomputes the
// normalised x and GELU from x and the saved (B, N, hidden) input of GELU.
#include "mlp.h"

#include "kernels.h"
#include "norm.h"

namespace hydravit::HYDRAVIT_ISA {

namespace {

// Backward of one chunk. A buffer holds the rows of all its images, (rows, padded_row(...)).
struct Backward {
  MlpBlock block;
  MlpBlockGradients gradients;
  View fc1, fc2;  // right operands of the products with the gradients
  bool needs_hidden, needs_normalised;
  float *statistics, *z, *d_hidden, *d_normalised;
  float *normalised, *activated;  // panels, because the sums over rows read them as right operands
  int64_t panel_stride;

  int64_t rows() const { return block.batch * block.tokens; }
  Axis rows_of(const Tokens& tokens) const {
    return token_rows(block.tokens, tokens.token_stride, tokens.image_stride);
  }
  Norm norm() const {
    return {rows(), block.embed, block.eps, block.x.data, rows_of(block.x), block.norm_weight, block.norm_bias};
  }
  NormGradients norm_gradients() const {
    const Tokens& grad = gradients.grad;
    const MutableTokens& dx = gradients.x;
    return {d_normalised,
            padded_row(block.embed),
            statistics,
            grad.data,
            rows_of(grad),
            dx.data,
            rows_of({dx.data, dx.image_stride, dx.token_stride})};
  }
  Branch branch() const {
    return {
        rows(),           block.embed, block.tokens, gradients.grad.data, rows_of(gradients.grad), block.branch_scale,
        block.layer_scale};
  }
};

// Goes from the gradient of y to the gradient of x, for a band of tokens of one image, by one thread, and fills the
// buffers for the sums over rows.
void backward_rows(const Backward& chunk, int64_t image, const Range& tokens, float* panel) {
  const MlpBlock& block = chunk.block;
  const int64_t begin = image * block.tokens + tokens.begin, rows = tokens.end - tokens.begin, end = begin + rows;
  const int64_t embed = padded_row(block.embed), hidden = padded_row(block.hidden);
  const MutableTokens saved = rows_from(block.saved, image, tokens.begin);
  float* activated = chunk.activated + begin * kPanel;
  scale_branch_rows(chunk.branch(), chunk.z, embed, begin, end);
  if (!chunk.needs_hidden) {
    for (int64_t row = 0; row < rows; row++)
      for (int64_t c = 0; c < block.hidden; c += kWidth) {
        const int64_t count = block.hidden - c;
        store(activated + row * kPanel + in_panels(c, chunk.panel_stride),
              gelu(load(saved.data + row * saved.token_stride + c, count)), count);
      }
    return;
  }
  normalize_rows(chunk.norm(), begin, end, chunk.normalised + begin * kPanel, kPanel, chunk.statistics,
                 chunk.panel_stride);
  for (int64_t i = 0; i < pieces_of(block.hidden); i++) {
    const Piece piece = piece_of(block.hidden, i);
    const int64_t first = piece.k.begin;
    float* d_hidden = chunk.d_hidden + begin * hidden + first;
    Epilogue epilogue{d_hidden, {hidden}, {}};
    epilogue.hidden = saved.data + first, epilogue.hidden_rows = {saved.token_stride};
    epilogue.gelu = activated + in_panels(first, chunk.panel_stride);
    epilogue.gelu_stride = kPanel, epilogue.gelu_panel = chunk.panel_stride;
    multiply_rows(rows, piece.k.end - first, block.embed, chunk.z + begin * embed, {embed},
                  columns_from(chunk.fc2, first), epilogue, panel);
    if (chunk.needs_normalised)
      add_piece(rows, {0, block.embed}, piece, d_hidden, {hidden}, chunk.fc1,
                {chunk.d_normalised + begin * embed, {embed}, {}}, panel);
  }
  if (chunk.gradients.x.data != nullptr) normalize_backward_rows(chunk.norm(), chunk.norm_gradients(), begin, end);
}

// Adds the gradients of the parameters, which are sums over rows.
void add_gradients(const Backward& chunk, const Threads& threads, float* scratch) {
  const MlpBlock& block = chunk.block;
  const MlpBlockGradients& gradients = chunk.gradients;
  const int64_t rows = chunk.rows(), embed = padded_row(block.embed), hidden = padded_row(block.hidden);
  const View z{chunk.z, {embed}, {}}, d_hidden{chunk.d_hidden, {hidden}, {}};
  const Axis of_panels = segmented(1, kPanel, chunk.panel_stride);
  const View normalised{chunk.normalised, {kPanel}, of_panels, chunk.normalised, chunk.panel_stride};
  const View activated{chunk.activated, {kPanel}, of_panels, chunk.activated, chunk.panel_stride};
  if (gradients.fc2_bias != nullptr)
    add_column_sums(threads, rows, block.embed, gradients.fc2_bias, {}, z.data, z.rows);
  if (gradients.fc2_weight.data != nullptr)
    gemm(threads, scratch, block.embed, block.hidden, rows, transposed(z), activated,
         {gradients.fc2_weight.data, {gradients.fc2_weight.row_stride}, {}, true});
  if (gradients.fc1_bias != nullptr)
    add_column_sums(threads, rows, block.hidden, gradients.fc1_bias, {}, d_hidden.data, d_hidden.rows);
  if (gradients.fc1_weight.data != nullptr)
    gemm(threads, scratch, block.hidden, block.embed, rows, transposed(d_hidden), normalised,
         {gradients.fc1_weight.data, {gradients.fc1_weight.row_stride}, {}, true});
  add_norm_gradients(threads, chunk.norm(), chunk.norm_gradients(), gradients.norm_weight, gradients.norm_bias);
  if (gradients.layer_scale != nullptr) {
    float* out = chunk.d_normalised;  // no longer needed
    Epilogue branch{out, {embed}, {}};
    branch.bias = block.fc2_bias;
    gemm(threads, scratch, rows, block.embed, block.hidden, activated, transposed(block.fc2_weight), branch);
    add_layer_scale_gradient(threads, chunk.branch(), out, embed, gradients.layer_scale);
  }
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

  Epilogue fc2{y.data, {y.token_stride}, {}};
  fc2.bias = block.fc2_bias;
  fc2.column_scale = block.layer_scale;
  fc2.row_scale = block.branch_scale == nullptr ? nullptr : block.branch_scale + image;
  fc2.rows_per_scale = rows;
  fc2.residual = x.data;
  fc2.residual_rows = {x.token_stride};
  // One piece of the hidden channels at a time goes through both products, so that it stays in cache between them.
  for (int64_t i = 0; i < pieces_of(block.hidden); i++) {
    const Piece piece = piece_of(block.hidden, i);
    const int64_t first = piece.k.begin, count = piece.k.end - first;
    Epilogue fc1{activated, {activated_stride}, {}};
    if (saved.data != nullptr) fc1.data = saved.data + first, fc1.rows = {saved.token_stride};
    if (block.fc1_bias != nullptr) fc1.bias = block.fc1_bias + first;
    fc1.gelu = activated;
    fc1.gelu_stride = activated_stride;
    multiply_rows(rows, count, block.embed, normalised, {normalised_stride},
                  transposed(rows_from(block.fc1_weight, first)), fc1, panel);
    add_piece(rows, {0, block.embed}, piece, activated, {activated_stride}, transposed(block.fc2_weight), fc2, panel);
  }
}

int64_t mlp_rows_scratch(const MlpBlock& block) {
  return kBandRows * (padded_row(block.embed) + padded_row(kPiece)) + round_up(kPieceScratch, 16);
}

int mlp_block(const MlpBlock& block, const Threads& threads) {
  const int64_t jobs = jobs_for(threads, block.batch * block.tokens, block.embed * block.hidden);
  const int64_t size = mlp_rows_scratch(block);
  const bool repack = worth_repacking(block.batch * block.tokens, jobs);
  const int64_t fc1_size = panels_size(block.embed, block.hidden), fc2_size = panels_size(block.hidden, block.embed);
  float *scratch, *fc1, *fc2;
  Workspace workspace;
  workspace.add(&scratch, jobs * size);
  workspace.add(&fc1, repack ? fc1_size : 0);
  workspace.add(&fc2, repack ? fc2_size : 0);
  if (!workspace.allocate()) return kOutOfMemory;
  MlpBlock repacked = block;
  if (repack && block.hidden > 0) {
    repack_right(threads, block.embed, block.hidden, transposed(block.fc1_weight), fc1, repacked.fc1_weight);
    repack_right(threads, block.hidden, block.embed, transposed(block.fc2_weight), fc2, repacked.fc2_weight);
  }
  parallel(threads, jobs, [&](int64_t job) {
    for_each_share(job, jobs, block.batch, block.tokens, [&](const Share& share) {
      for_each_band(share.tokens,
                    [&](const Range& band) { mlp_rows(repacked, share.image, band, scratch + job * size); });
    });
  });
  return kOk;
}

int mlp_block_backward(const MlpBlock& block, const MlpBlockGradients& gradients, const Threads& threads) {
  const int64_t tokens = block.tokens, chunk_images = images_per_chunk(block.batch, tokens);
  Backward backward{};
  // An intermediate gradient is needed where one that follows from it is wanted.
  backward.needs_normalised =
      gradients.x.data != nullptr || gradients.norm_weight != nullptr || gradients.norm_bias != nullptr;
  backward.needs_hidden =
      backward.needs_normalised || gradients.fc1_weight.data != nullptr || gradients.fc1_bias != nullptr;
  backward.fc1 = {block.fc1_weight.data, {block.fc1_weight.row_stride}, {}};
  backward.fc2 = {block.fc2_weight.data, {block.fc2_weight.row_stride}, {}};
  const int64_t jobs = jobs_for(threads, chunk_images * tokens, 2 * block.embed * block.hidden);
  const bool repack = backward.needs_hidden && worth_repacking(block.batch * tokens, jobs);
  const int64_t rows = block.hidden == 0 ? 0 : chunk_images * tokens;
  const int64_t by_embed = rows * padded_row(block.embed), by_hidden = rows * padded_row(block.hidden);
  backward.panel_stride = rows * kPanel;
  float *panels, *scratch, *fc1, *fc2;
  Workspace workspace;
  workspace.add(&backward.normalised, backward.needs_hidden ? panels_size(rows, block.embed) : 0);
  workspace.add(&backward.statistics, backward.needs_hidden ? rows * 2 : 0);
  workspace.add(&backward.z, by_embed);
  workspace.add(&backward.activated, panels_size(rows, block.hidden));
  workspace.add(&backward.d_hidden, backward.needs_hidden ? by_hidden : 0);
  workspace.add(&backward.d_normalised, by_embed);
  workspace.add(&panels, jobs * round_up(kPieceScratch, 16));
  workspace.add(&scratch, gemm_scratch(threads));
  workspace.add(&fc1, repack ? panels_size(block.hidden, block.embed) : 0);
  workspace.add(&fc2, repack ? panels_size(block.embed, block.hidden) : 0);
  if (!workspace.allocate()) return kOutOfMemory;
  if (repack && block.hidden > 0) {
    repack_right(threads, block.hidden, block.embed, fc1, backward.fc1);
    repack_right(threads, block.embed, block.hidden, fc2, backward.fc2);
  }

  for (int64_t image = 0; image < block.batch; image += chunk_images) {
    MlpBlock& chunk = backward.block = block;
    backward.gradients = gradients;
    chunk.batch = smaller(chunk_images, block.batch - image);
    chunk.x = rows_from(block.x, image, 0);
    chunk.saved = rows_from(block.saved, image, 0);
    if (block.branch_scale != nullptr) chunk.branch_scale += image;
    backward.gradients.grad = rows_from(gradients.grad, image, 0);
    backward.gradients.x = rows_from(gradients.x, image, 0);
    if (block.hidden == 0) {
      const NormGradients d = backward.norm_gradients();
      if (d.x != nullptr) copy_rows(threads, backward.rows(), block.embed, d.residual, d.residual_rows, d.x, d.x_rows);
      continue;
    }
    parallel(threads, jobs, [&](int64_t job) {
      for_each_share(job, jobs, chunk.batch, tokens, [&](const Share& share) {
        for_each_band(share.tokens, [&](const Range& band) {
          backward_rows(backward, share.image, band, panels + job * round_up(kPieceScratch, 16));
        });
      });
    });
    add_gradients(backward, threads, scratch);
  }
  return kOk;
}

}  // namespace hydravit::HYDRAVIT_ISA
