// The contract between the CPU bindings, which see torch, and the CPU kernels, which do not. CUDA's is cuda/phase.h.
//
// A kernel sees one slice of the weights: base pointers that include the slice's offsets, lengths and element strides.
// It never sees the sizes of the full tensors, so it cannot read or write anything outside the slice. One call serves
// consecutive images of one subnetwork; only a network call serves several subnetworks. Innermost strides are 1 unless
// a stride is named. Everything is float32.
//
// Names: B images, N tokens, k active heads, Dk active channels of the residual, d = head_dim, dv = value_dim.
// A "nullable" pointer may be null: the input is then absent, or the kernel does not compute the output.
// A kernel adds the gradients of parameters to what the buffers hold; it overwrites the gradients of activations.
#pragma once

#include <cstdint>

namespace hydravit {

// Every launcher returns one of these; `status_text` describes it.
enum Status : int { kOk = 0, kOutOfMemory = 1, kUnknownIsa = 2, kUnsupportedIsa = 3 };
const char* status_text(int status);

// The caller's thread pool. `parallel_for` splits [begin, end) into disjoint ranges, calls `body` on each of them, on
// up to `count` threads, and returns when all calls have returned. A body never throws.
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

// A packed weight lies in panels of P output channels (rows), with P = panel_rows(), which depends on the instruction
// set: element (row, column) lies at panels[row / P * panel_stride + column * P + row % P]. A kernel reads the first
// columns of a panel without a gap, whatever the width, so one packed copy serves all widths.
//
// Every P divides kPanelMultiple: a slice whose rows begin at a multiple of it begins on a panel everywhere.
constexpr int64_t kPanelMultiple = 32;

// A weight matrix (or its gradient) whose rows lie `row_stride` apart. Where `panels` is not null, the kernel reads the
// same rows there and ignores `data`.
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
// Head h uses rows [h * pitch, h * pitch + d) of the query and key weights and biases, rows [h * pitch, h * pitch + dv)
// of the value weight and bias, and columns [h * pitch, h * pitch + dv) of the proj weight. `heads == 0`: y = x.
// Every token is a key and a value, but only the first `queries` tokens, Nq of them, are queries and get a y.
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
  // Forward writes these for backward where they are not null; backward reads them.
  MutableTokens qkv;       // (B, N, k * (2 d + dv)): Q | K | V, each head by head; only queries have a Q
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
// One subnetwork's blocks, made once per width. Their pointers to images, y and activations are null: every call has
// its own.
struct NetworkPlan {
  const Stem* stem;
  const AttentionBlock* attention;  // one for each layer
  const MlpBlock* mlp;              // one for each layer
  const Head* head;
};
struct NetworkCall {
  int64_t batch, tokens, layers;
  const float* images;  // (B, channels, grid_height * patch_height, grid_width * patch_width), any strides
  int64_t image_strides[4];
  const NetworkPlan* plans;
  const int64_t* width_index;  // (B), an index into `plans`; nullable: all images use the only plan
  bool pooled_only;            // the last block computes only the tokens that the head pools: the same bits, less work
  float* y;                    // (B, classes) or (B, Dk), rows `y_row_stride` apart
  int64_t y_row_stride;
};

// ---- AdamW (arXiv 1711.05101) and the moving average of the weights, on rectangles of full-size parameters ----
// The numbers of one step. For every element, with its gradient g:
//   weight *= decay; first += first_weight * (g - first); second = second_decay * second + second_weight * g * g
//   weight -= step_size * first / (sqrt(second) / correction + eps); average += average_weight * (weight - average)
struct AdamwStep {
  float decay, first_weight, second_decay, second_weight, correction, eps, step_size, average_weight;
};
// Pointers point to the rectangle's first element; element (row, column) lies row * row_stride + column further on.
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
// Packs weight (rows, columns) into panels, one after the other: `rows`, rounded up to whole panels, times `columns`
// floats.
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
// The output channels of a panel in this instruction set: what is packed serves only instruction sets with the same.
int panel_rows(int64_t* rows);
int set_cpu_isa(const char* name);

}  // namespace hydravit
