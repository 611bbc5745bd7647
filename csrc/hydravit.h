// The contract between the bindings (the only files that see torch) and the kernels of every device.
//
// A kernel sees one slice of the weights: base pointers with the slice's offsets already folded in, lengths and element
// strides. It never sees the full tensors' sizes, so nothing outside the slice can be read or written. One call serves
// consecutive images of one subnetwork. Innermost strides are 1 unless a stride is named. Everything is float32.
//
// Names: B images, N tokens, k active heads, Dk active channels of the residual stream, d = head_dim, dv = value_dim.
// "nullable" pointers may be null: an input is then absent, an output is then not wanted and not computed.
// Gradients of parameters are added to what the buffers hold; gradients of activations are written.
#pragma once

#include <cstdint>

namespace hydravit {

// Every launcher returns one of these; `status_text` puts it in words.
enum Status : int { kOk = 0, kOutOfMemory = 1, kUnknownIsa = 2, kUnsupportedIsa = 3 };
const char* status_text(int status);

// The caller's thread pool. `parallel_for` calls `body` on disjoint ranges that cover [begin, end), on up to `count`
// threads, and returns when all are done. A body never throws.
using RangeBody = void (*)(int64_t begin, int64_t end, void* context);
struct Threads {
  void (*parallel_for)(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context);
  int64_t count;
};

// Activations of shape (B, N, channels).
struct Tokens {
  const float* data;
  int64_t image_stride;
  int64_t token_stride;
};
struct MutableTokens {
  float* data;
  int64_t image_stride;
  int64_t token_stride;
};

// Channels of one panel of a packed weight: element (row, column) lies at panels[row / kPanel * panel_stride +
// column * kPanel + row % kPanel]. So the first columns of the first rows, at any width, are read without a gap, and
// one packed copy serves all widths.
constexpr int64_t kPanel = 32;

// A weight matrix (or its gradient) whose rows lie `row_stride` apart; the same rows as panels where they were packed.
struct Weight {
  const float* data;
  int64_t row_stride;
  const float* panels = nullptr;
  int64_t panel_stride = 0;
};
struct MutableWeight {
  float* data;  // nullable
  int64_t row_stride;
};

// ---- Stem: patch embedding, prefix tokens (class, then registers), position embedding -> y (B, N, Dk) ----
struct Stem {
  int64_t batch, channels, grid_height, grid_width;  // patches per image: grid_height * grid_width, row by row
  int64_t patch_height, patch_width;
  int64_t embed;        // Dk
  int64_t cls_tokens;   // 0 or more
  int64_t reg_tokens;   // 0 or more; N = cls_tokens + reg_tokens + patches
  const float* images;  // (B, channels, grid_height * patch_height, grid_width * patch_width), any strides
  int64_t image_strides[4];
  Weight weight;                // (Dk, channels * patch_height * patch_width)
  const float* bias;            // (Dk), nullable
  Weight cls_token, reg_token;  // (cls_tokens, Dk), (reg_tokens, Dk)
  Weight pos_embed;             // (N, Dk), or (patches, Dk) with `pos_on_prefix` false; data nullable
  bool pos_on_prefix;
  MutableTokens y;  // (B, N, Dk); unused by backward
};
struct StemGradients {
  Tokens grad;    // of y
  float* images;  // contiguous, like `Stem::images`; nullable
  MutableWeight weight, cls_token, reg_token, pos_embed;
  float* bias;  // nullable
};

// ---- Attention block: y = x + branch_scale * layer_scale * (proj(attention(qkv(norm(x))))) ----
// Head h uses rows [h * pitch, h * pitch + d) of the query and key weights and biases, dv rows of the value's, and
// columns [h * pitch, h * pitch + dv) of the projection. `heads == 0`: y = x. Only the first `queries` tokens' results
// are wanted, Nq of them: every token is a key and a value, but no others a query.
struct AttentionBlock {
  int64_t batch, tokens, queries, embed, heads, head_dim, value_dim, pitch;
  float scale, eps;
  Tokens x;                              // (B, N, Dk)
  const float *norm_weight, *norm_bias;  // (Dk)
  Weight query_weight, key_weight, value_weight;
  const float *query_bias, *key_bias, *value_bias;  // nullable, all or none
  Weight proj_weight;                               // (Dk, k * pitch)
  const float* proj_bias;                           // (Dk), nullable
  const float* layer_scale;                         // (Dk), nullable
  const float* branch_scale;                        // (B), nullable
  MutableTokens y;                                  // (B, Nq, Dk); unused by backward
  // What backward needs; forward writes it where not null, backward reads it.
  MutableTokens qkv;       // (B, N, k * (2 d + dv)): Q | K | V, each head by head; Q of the queries only
  MutableTokens attended;  // (B, Nq, k * dv)
  float* logsumexp;        // (B, k, Nq), images `logsumexp_image_stride` apart
  int64_t logsumexp_image_stride;
};
struct AttentionBlockGradients {
  Tokens grad;      // of y
  MutableTokens x;  // (B, N, Dk), data nullable
  float *norm_weight, *norm_bias, *query_bias, *key_bias, *value_bias, *proj_bias, *layer_scale;  // nullable
  MutableWeight query_weight, key_weight, value_weight, proj_weight;
};

// ---- MLP block: y = x + branch_scale * layer_scale * fc2(gelu(fc1(norm(x)))), gelu by the error function ----
// `hidden == 0`: y = x.
struct MlpBlock {
  int64_t batch, tokens, embed, hidden;
  float eps;
  Tokens x;                              // (B, N, Dk)
  const float *norm_weight, *norm_bias;  // (Dk)
  Weight fc1_weight;                     // (hidden, Dk)
  const float* fc1_bias;                 // (hidden), nullable
  Weight fc2_weight;                     // (Dk, hidden)
  const float* fc2_bias;                 // (Dk), nullable
  const float* layer_scale;              // (Dk), nullable
  const float* branch_scale;             // (B), nullable
  MutableTokens y;                       // (B, N, Dk); unused by backward
  MutableTokens saved;  // (B, N, hidden) before GELU: forward writes it where not null, backward reads it
};
struct MlpBlockGradients {
  Tokens grad;                                                         // of y
  MutableTokens x;                                                     // (B, N, Dk), data nullable
  float *norm_weight, *norm_bias, *fc1_bias, *fc2_bias, *layer_scale;  // nullable
  MutableWeight fc1_weight, fc2_weight;
};

// ---- Head: mean over tokens [pool_start, pool_stop), then norm, then classifier, the last two where given ----
struct Head {
  int64_t batch, pool_start, pool_stop, embed;
  int64_t classes;  // 0: no classifier, y is the pooled, normalised x
  float eps;
  Tokens x;                              // (B, N, Dk)
  const float *norm_weight, *norm_bias;  // (Dk), nullable (both or none): no norm
  Weight weight;                         // (classes, Dk)
  const float* bias;                     // (classes), nullable
  float* y;                              // (B, classes) or (B, Dk), rows `y_row_stride` apart; unused by backward
  int64_t y_row_stride;
};
struct HeadGradients {
  const float* grad;  // of y, rows `grad_row_stride` apart
  int64_t grad_row_stride;
  int64_t tokens;                         // N
  MutableTokens x;                        // (B, N, Dk), zero outside the pooled tokens; data nullable
  float *norm_weight, *norm_bias, *bias;  // nullable
  MutableWeight weight;
};

// ---- The whole network, for inference ----
// The blocks' x, y and saved activations are unused: the stream stays in the workspace.
struct Network {
  const Stem* stem;
  const AttentionBlock* attention;  // `depth` of them
  const MlpBlock* mlp;              // `depth` of them
  const Head* head;
};
struct NetworkCall {
  int64_t batch, tokens, depth;
  const Network* networks;  // one for each width
  const int64_t* width_of;  // (B), an index into `networks`; nullable: all images use the first
  bool pooled_only;         // the last block computes only what the head pools; the same bits, less work
  float* y;                 // (B, classes) or (B, Dk), rows `y_row_stride` apart
  int64_t y_row_stride;
};

// ---- AdamW (arXiv 1711.05101) and the moving average of the weights, on rectangles of full-size parameters ----
// The numbers of one step. With the gradient g, for every element:
//   weight *= decay; first += first_weight * (g - first); second = second_decay * second + second_weight * g * g
//   weight -= step_size * first / (sqrt(second) / correction + eps); average += average_weight * (weight - average)
struct AdamwStep {
  float decay, first_weight, second_decay, second_weight, correction, eps, step_size, average_weight;
};
// Pointers are those of the rectangle's first element; element row * row_stride + column goes through `step`.
// Rectangles do not overlap.
struct AdamwRectangle {
  float* weight;
  const float* gradient;
  float *first, *second;
  float* average;  // nullable
  int64_t rows, row_stride, columns;
  const AdamwStep* step;
};
struct Adamw {
  const AdamwRectangle* rectangles;
  int64_t count;
};

// ---- CPU launchers; the instruction set is chosen at run time ----
int network_cpu(const NetworkCall& call, const Threads& threads);
// weight (rows, columns) -> panels, one after the other: `columns` times `rows`, rounded up to whole panels, floats.
int pack_weight_cpu(const Weight& weight, int64_t rows, int64_t columns, float* panels, const Threads& threads);
int stem_cpu(const Stem& block, const Threads& threads);
int stem_backward_cpu(const Stem& block, const StemGradients& gradients, const Threads& threads);
int attention_block_cpu(const AttentionBlock& block, const Threads& threads);
int attention_block_backward_cpu(const AttentionBlock& block, const AttentionBlockGradients& gradients,
                                 const Threads& threads);
int mlp_block_cpu(const MlpBlock& block, const Threads& threads);
int mlp_block_backward_cpu(const MlpBlock& block, const MlpBlockGradients& gradients, const Threads& threads);
int head_cpu(const Head& block, const Threads& threads);
int head_backward_cpu(const Head& block, const HeadGradients& gradients, const Threads& threads);
int adamw_cpu(const Adamw& work, const Threads& threads);

// "avx512", "avx2" or "portable". The best the CPU has, unless HYDRAVIT_CPU_ISA or `set_cpu_isa` names another.
int cpu_isa(const char** name);
int set_cpu_isa(const char* name);

}  // namespace hydravit
