// Attention within each (image, head): softmax(q k^T * scale) v, forward and backward. Q, K and V are read in place.
#pragma once

#include "gemm.h"
#include "parallel.h"

namespace hydravit::HYDRAVIT_ISA {

// Head h has columns [h * head_dim, (h + 1) * head_dim) of q and k, and [h * value_dim, (h + 1) * value_dim) of v and
// attended.
struct Heads {
  int64_t images, tokens, queries, heads, head_dim, value_dim;
  float scale;
  Tokens q, k, v;          // same strides
  MutableTokens attended;  // (images, queries, heads * value_dim); unused by backward
  float* logsumexp;        // (images, heads, queries), images `logsumexp_image_stride` apart; forward: nullable
  int64_t logsumexp_image_stride;
};
// Computes some queries of one head of one image, by one thread. `scratch`: attend_scratch(block) floats.
void attend(const Heads& heads, int64_t image, int64_t head, const Range& queries, float* scratch);
int64_t attend_scratch(const AttentionBlock& block);

// `attended` is read, q, k and v are written. They are laid out like q, k and v; only queries have a gradient of q.
struct HeadsGradients {
  Tokens attended;
  MutableTokens q, k, v;
};
int64_t attend_backward_scratch(const AttentionBlock& block, const Threads& threads);
void attend_backward(const Heads& heads, const HeadsGradients& gradients, const Threads& threads, float* scratch);

}  // namespace hydravit::HYDRAVIT_ISA
