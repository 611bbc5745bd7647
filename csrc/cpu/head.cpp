// Head: mean over tokens [pool_start, pool_stop), then layer norm and classifier if there are any.
#include "head.h"

#include "kernels.h"
#include "norm.h"

namespace hydravit::HYDRAVIT_ISA {

namespace {

// pooled (B, Dk), contiguous.
void pool(const Threads& threads, const Head& block, float* pooled) {
  const int64_t tokens = block.pool_stop - block.pool_start;
  parallel_ranges(threads, block.batch, tokens * block.embed, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; image++)
      for (int64_t c = 0; c < block.embed; c += kWidth) {
        const float* x = block.x.data + image * block.x.image_stride + block.pool_start * block.x.token_stride + c;
        const Vec total =
            sum_over(tokens, [&](int64_t token) { return load(x + token * block.x.token_stride, block.embed - c); });
        store(pooled + image * block.embed + c, total / static_cast<float>(tokens), block.embed - c);
      }
  });
}

Norm norm_of(const Head& block, const float* pooled) {
  return {block.batch, block.embed, block.eps, pooled, {block.embed}, block.norm_weight, block.norm_bias};
}

}  // namespace

void head(const Head& block, const Threads& threads, float* scratch) {
  const int64_t size = block.batch * block.embed;
  float* pooled = scratch;
  float* normalised = pooled + size;
  pool(threads, block, pooled);
  const float* features = pooled;
  if (block.norm_weight != nullptr)
    normalize(threads, norm_of(block, pooled), normalised, nullptr), features = normalised;
  if (block.classes == 0) {
    copy_rows(threads, block.batch, block.embed, features, {block.embed}, block.y, {block.y_row_stride});
    return;
  }
  Epilogue epilogue{block.y, {block.y_row_stride}, {}};
  epilogue.bias = block.bias;
  gemm(threads, normalised + size, block.batch, block.classes, block.embed, {features, {block.embed}, {}},
       transposed(block.weight), epilogue);
}

int64_t head_scratch(const Head& block, const Threads& threads) {
  return 2 * block.batch * block.embed + gemm_scratch(threads);
}

int head(const Head& block, const Threads& threads) {
  float* scratch;
  Workspace workspace;
  workspace.add(&scratch, head_scratch(block, threads));
  if (!workspace.allocate()) return kOutOfMemory;
  head(block, threads, scratch);
  return kOk;
}

int head_backward(const Head& block, const HeadGradients& gradients, const Threads& threads) {
  const int64_t size = block.batch * block.embed;
  const bool norm = block.norm_weight != nullptr, classify = block.classes > 0;
  float *pooled, *normalised, *statistics, *d_features, *d_pooled, *scratch;
  Workspace workspace;
  workspace.add(&pooled, size);
  workspace.add(&normalised, norm ? size : 0);
  workspace.add(&statistics, norm ? 2 * block.batch : 0);
  workspace.add(&d_features, size);
  workspace.add(&d_pooled, norm ? size : 0);
  workspace.add(&scratch, gemm_scratch(threads));
  if (!workspace.allocate()) return kOutOfMemory;

  pool(threads, block, pooled);
  const float* features = pooled;
  if (norm) normalize(threads, norm_of(block, pooled), normalised, statistics), features = normalised;

  const View grad{gradients.grad, {gradients.grad_row_stride}, {}};
  if (classify) {
    if (gradients.bias != nullptr)
      add_column_sums(threads, block.batch, block.classes, gradients.bias, {}, grad.data, grad.rows);
    if (gradients.weight.data != nullptr)
      gemm(threads, scratch, block.classes, block.embed, block.batch, transposed(grad), {features, {block.embed}, {}},
           {gradients.weight.data, {gradients.weight.row_stride}, {}, true});
    gemm(threads, scratch, block.batch, block.embed, block.classes, grad,
         {block.weight.data, {block.weight.row_stride}, {}}, {d_features, {block.embed}, {}});
  } else {
    copy_rows(threads, block.batch, block.embed, grad.data, grad.rows, d_features, {block.embed});
  }
  if (norm) {
    const NormGradients d{d_features, block.embed, statistics, nullptr, {}, d_pooled, {block.embed}};
    add_norm_gradients(threads, norm_of(block, pooled), d, gradients.norm_weight, gradients.norm_bias);
    normalize_backward_rows(norm_of(block, pooled), d, 0, block.batch);
  } else {
    d_pooled = d_features;
  }

  if (gradients.x.data == nullptr) return kOk;
  const float count = static_cast<float>(block.pool_stop - block.pool_start);
  parallel_ranges(threads, block.batch, gradients.tokens * block.embed, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; image++)
      for (int64_t token = 0; token < gradients.tokens; token++) {
        const bool pooled_token = token >= block.pool_start && token < block.pool_stop;
        float* to = gradients.x.data + image * gradients.x.image_stride + token * gradients.x.token_stride;
        for (int64_t c = 0; c < block.embed; c++)
          to[c] = pooled_token ? d_pooled[image * block.embed + c] / count : 0.0f;
      }
  });
  return kOk;
}

}  // namespace hydravit::HYDRAVIT_ISA
