// The whole network: the residual of a few images stays in the workspace from the pixels to the logits.
//
// Threads wait for each other only where a row needs other rows of its image: once per layer, before attention. In
// between, each thread carries its own rows through all steps. Jobs have equal costs, not equal numbers of rows,
// because images may differ in width. Where the head pools few rows, the last layer has too few for all threads, and
// `finish_last_layer` divides the columns of its products instead.
#include "attention.h"
#include "attention_heads.h"
#include "gemm.h"
#include "head.h"
#include "kernels.h"
#include "mlp.h"
#include "norm.h"
#include "stem.h"

namespace hydravit::HYDRAVIT_ISA {

namespace {

int64_t qkv_columns(const AttentionBlock& block) { return block.heads * (2 * block.head_dim + block.value_dim); }
int64_t attended_columns(const AttentionBlock& block) { return block.heads * block.value_dim; }

// Multiply-adds per token, to divide the tokens by cost. It is positive even if a subnetwork skips every branch.
int64_t cost_of(const NetworkCall& call, const NetworkPlan& plan) {
  int64_t cost = plan.head->embed;
  for (int64_t i = 0; i < call.layers; i++) {
    const AttentionBlock& attention = plan.attention[i];
    const int64_t columns = qkv_columns(attention), values = attended_columns(attention);
    cost += attention.embed * (columns + values) + call.tokens * (columns - values);
    cost += 2 * plan.mlp[i].embed * plan.mlp[i].hidden;
  }
  return cost;
}

// Row lengths of the buffers, and the scratch of one thread and of the head, in floats; enough for every width of a
// call.
struct Sizes {
  int64_t embed = 0, qkv = 0, attended = 0, hidden = 0, thread = 0, head = 0;

  Sizes(const NetworkCall& call, const NetworkPlan& plan, const Threads& threads, int64_t images) {
    Head head = *plan.head;
    head.batch = images;
    embed = padded_row(head.embed);
    thread = stem_rows_scratch(*plan.stem);
    this->head = head_scratch(head, threads);
    for (int64_t i = 0; i < call.layers; i++) {
      qkv = larger(qkv, padded_row(qkv_columns(plan.attention[i])));
      attended = larger(attended, padded_row(attended_columns(plan.attention[i])));
      hidden = larger(hidden, padded_row(plan.mlp[i].hidden));
      thread = larger(thread, attention_rows_scratch(plan.attention[i]));
      thread = larger(thread, mlp_rows_scratch(plan.mlp[i]));
    }
  }
  void enlarge(const Sizes& other) {
    embed = larger(embed, other.embed), qkv = larger(qkv, other.qkv), attended = larger(attended, other.attended);
    hidden = larger(hidden, other.hidden), thread = larger(thread, other.thread), head = larger(head, other.head);
  }
};

struct Buffers {
  float* residual[2];  // (images, N, embed): before and after the attention block
  float* qkv[2];       // (images, N, qkv): of this layer and the next
  float* attended;     // (images, N, attended)
  float *threads, *normalised, *hidden, *gemm, *head;
};

// The forward of one chunk: images [image, image + images) of the call.
class Chunk {
 public:
  Chunk(const NetworkCall& call, const Threads& threads, const Sizes& sizes, const Buffers& buffers, int64_t image,
        int64_t images)
      : call_(call), threads_(threads), sizes_(sizes), buffers_(buffers), image_(image), images_(images) {}

  void run() const {
    const int64_t last = call_.layers - 1, tokens = call_.tokens;
    const Head& head = *of(0).head;
    const Range all{0, tokens}, pooled{head.pool_start, head.pool_stop};
    const Range wanted = call_.pooled_only ? pooled : all;
    const bool few = wanted.end - wanted.begin <= kTileRows;
    each_share(all, [&](const Share& share, float* scratch) {
      for_each_band(share.tokens, [&](const Range& band) {
        stem_rows(stem(share.image), 0, band, scratch);
        query_key_value_rows(attention(0, share.image), 0, band, last == 0 ? wanted : all, scratch);
      });
    });
    for (int64_t i = 0; i < (few ? last : call_.layers); i++)
      each_share(i == last ? wanted : all, [&](const Share& share, float* scratch) {
        const AttentionBlock block = attention(i, share.image);
        attend_rows(block, 0, share.tokens, scratch);
        for_each_band(share.tokens, [&](const Range& band) {
          project_rows(block, 0, band, scratch);
          mlp_rows(mlp(i, share.image), 0, band, scratch);
          if (i < last)
            query_key_value_rows(attention(i + 1, share.image), 0, band, i + 1 == last ? wanted : all, scratch);
        });
      });
    each_run([&](int64_t image, int64_t images) {
      if (few) finish_last_layer(image, images, wanted);
      classify(image, images);
    });
  }

 private:
  // Below, `image` counts from the first image of the chunk.
  const NetworkPlan& of(int64_t image) const {
    return call_.plans[call_.width_index == nullptr ? 0 : call_.width_index[image_ + image]];
  }
  MutableTokens rows(float* buffer, int64_t row, int64_t image) const {
    return {buffer + image * call_.tokens * row, call_.tokens * row, row};
  }
  MutableTokens residual(int i, int64_t image) const { return rows(buffers_.residual[i], sizes_.embed, image); }

  // The plan's blocks, for the images from `image` on.
  Stem stem(int64_t image) const {
    Stem block = *of(image).stem;
    block.batch = images_ - image;
    block.images = call_.images + (image_ + image) * call_.image_strides[0];
    for (int axis = 0; axis < 4; axis++) block.image_strides[axis] = call_.image_strides[axis];
    block.y = residual(0, image);
    return block;
  }
  AttentionBlock attention(int64_t i, int64_t image) const {
    AttentionBlock block = of(image).attention[i];
    const MutableTokens x = residual(0, image);
    block.batch = images_ - image;
    block.x = {x.data, x.image_stride, x.token_stride};
    block.y = residual(1, image);
    block.qkv = rows(buffers_.qkv[i % 2], sizes_.qkv, image);
    block.attended = rows(buffers_.attended, sizes_.attended, image);
    return block;
  }
  MlpBlock mlp(int64_t i, int64_t image) const {
    MlpBlock block = of(image).mlp[i];
    const MutableTokens x = residual(1, image);
    block.batch = images_ - image;
    block.x = {x.data, x.image_stride, x.token_stride};
    block.y = residual(0, image);
    return block;
  }

  // Calls body(share, scratch of its job) for all shares of `tokens` of all images. Jobs cost the same.
  template <class Body>
  void each_share(const Range& tokens, const Body& body) const {
    const int64_t count = tokens.end - tokens.begin, jobs = smaller(threads_.count, images_ * count);
    parallel(threads_, jobs, [&](int64_t job) {
      for_each_share(
          job, jobs, images_, count, [&](int64_t image) { return cost_of(call_, of(image)); },
          [&](Share share) {
            share.tokens = {tokens.begin + share.tokens.begin, tokens.begin + share.tokens.end};
            body(share, buffers_.threads + job * sizes_.thread);
          });
    });
  }

  // Calls body(image, count) for every run [image, image + count) of images of one width.
  template <class Body>
  void each_run(const Body& body) const {
    for (int64_t image = 0, end; image < images_; image = end) {
      for (end = image + 1; end < images_ && &of(end) == &of(image);) end++;
      body(image, end - image);
    }
  }

  // Computes the last layer, from attention on, for a few rows of each image. They are too few to give every thread
  // some, so the jobs divide the heads, and then the columns of the products.
  void finish_last_layer(int64_t image, int64_t images, const Range& tokens) const {
    const int64_t last = call_.layers - 1, count = tokens.end - tokens.begin, m = images * count;
    AttentionBlock attention = this->attention(last, image);
    MlpBlock mlp = this->mlp(last, image);
    const auto rows = [&](int64_t stride) { return token_rows(count, stride, call_.tokens * stride); };
    const auto from = [&](const float* data, int64_t stride) { return data + tokens.begin * stride; };
    const int64_t stride = sizes_.embed;

    Epilogue proj{attention.y.data + tokens.begin * stride, rows(stride), {}};
    if (attention.heads == 0) {
      copy_rows(threads_, m, attention.embed, from(attention.x.data, stride), rows(stride), proj.data, rows(stride));
    } else {
      parallel(threads_, smaller(threads_.count, images * attention.heads), [&](int64_t job) {
        const Range tasks = part(images * attention.heads, job, smaller(threads_.count, images * attention.heads));
        for (int64_t task = tasks.begin; task < tasks.end; task++)
          attend_head(attention, task / attention.heads, task % attention.heads, tokens,
                      buffers_.threads + job * sizes_.thread);
      });
      proj.bias = attention.proj_bias;
      proj.column_scale = attention.layer_scale;
      proj.residual = from(attention.x.data, stride);
      proj.residual_rows = rows(stride);
      gemm(threads_, buffers_.gemm, m, attention.embed, attended_columns(attention),
           {from(attention.attended.data, sizes_.attended), rows(sizes_.attended), {}}, proj_of(attention), proj);
    }

    Epilogue fc2{mlp.y.data + tokens.begin * stride, rows(stride), {}};
    if (mlp.hidden == 0) {
      copy_rows(threads_, m, mlp.embed, from(mlp.x.data, stride), rows(stride), fc2.data, rows(stride));
      return;
    }
    normalize(threads_, {m, mlp.embed, mlp.eps, from(mlp.x.data, stride), rows(stride), mlp.norm_weight, mlp.norm_bias},
              buffers_.normalised, nullptr);
    Epilogue fc1{buffers_.hidden, {sizes_.hidden}, {}};
    fc1.bias = mlp.fc1_bias;
    fc1.gelu = fc1.data;
    fc1.gelu_stride = sizes_.hidden;
    gemm(threads_, buffers_.gemm, m, mlp.hidden, mlp.embed, {buffers_.normalised, {mlp.embed}, {}},
         transposed(mlp.fc1_weight), fc1);
    fc2.bias = mlp.fc2_bias;
    fc2.column_scale = mlp.layer_scale;
    fc2.residual = from(mlp.x.data, stride);
    fc2.residual_rows = rows(stride);
    gemm(threads_, buffers_.gemm, m, mlp.embed, mlp.hidden, {buffers_.hidden, {sizes_.hidden}, {}},
         transposed(mlp.fc2_weight), fc2);
  }

  void classify(int64_t image, int64_t images) const {
    Head block = *of(image).head;
    const MutableTokens x = residual(0, image);
    block.batch = images;
    block.x = {x.data, x.image_stride, x.token_stride};
    block.y = call_.y + (image_ + image) * call_.y_row_stride;
    block.y_row_stride = call_.y_row_stride;
    head(block, threads_, buffers_.head);
  }

  const NetworkCall& call_;
  const Threads& threads_;
  const Sizes& sizes_;
  const Buffers& buffers_;
  const int64_t image_, images_;
};

}  // namespace

int network(const NetworkCall& call, const Threads& threads) {
  // A chunk has one image per thread: more images would gain nothing and not stay in cache.
  const int64_t chunk_images = smaller(call.batch, threads.count), rows = chunk_images * call.tokens;
  Sizes sizes(call, call.plans[0], threads, chunk_images);
  if (call.width_index != nullptr)
    for (int64_t image = 0; image < call.batch; image++)
      sizes.enlarge(Sizes(call, call.plans[call.width_index[image]], threads, chunk_images));
  Buffers buffers;
  Workspace workspace;
  for (int i = 0; i < 2; i++) workspace.add(&buffers.residual[i], rows * sizes.embed);
  for (int i = 0; i < 2; i++) workspace.add(&buffers.qkv[i], rows * sizes.qkv);
  workspace.add(&buffers.attended, rows * sizes.attended);
  workspace.add(&buffers.threads, threads.count * sizes.thread);
  workspace.add(&buffers.normalised, chunk_images * kTileRows * sizes.embed);
  workspace.add(&buffers.hidden, chunk_images * kTileRows * sizes.hidden);
  workspace.add(&buffers.gemm, gemm_scratch(threads));
  workspace.add(&buffers.head, sizes.head);
  if (!workspace.allocate()) return kOutOfMemory;
  for (int64_t image = 0; image < call.batch; image += chunk_images)
    Chunk(call, threads, sizes, buffers, image, smaller(chunk_images, call.batch - image)).run();
  return kOk;
}

}  // namespace hydravit::HYDRAVIT_ISA
