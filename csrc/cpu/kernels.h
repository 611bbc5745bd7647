// The launchers of one instruction set; `dispatch.cpp` makes a table of them for each.
#pragma once

#include "../hydravit.h"

#define HYDRAVIT_DECLARE_KERNELS                                                                               \
  int network(const NetworkCall& call, const Threads& threads);                                                \
  extern const int64_t panel_rows;                                                                             \
  int pack_weight(const Weight& weight, int64_t rows, int64_t columns, float* panels, const Threads& threads); \
  int stem(const Stem& block, const Threads& threads);                                                         \
  int stem_backward(const Stem& block, const StemGradients& gradients, const Threads& threads);                \
  int attention_block(const AttentionBlock& block, const Threads& threads);                                    \
  int attention_block_backward(const AttentionBlock& block, const AttentionBlockGradients& gradients,          \
                               const Threads& threads);                                                        \
  int mlp_block(const MlpBlock& block, const Threads& threads);                                                \
  int mlp_block_backward(const MlpBlock& block, const MlpBlockGradients& gradients, const Threads& threads);   \
  int head(const Head& block, const Threads& threads);                                                         \
  int head_backward(const Head& block, const HeadGradients& gradients, const Threads& threads);                \
  int adamw(const Adamw& work, const Threads& threads);

#ifdef HYDRAVIT_ISA
namespace hydravit::HYDRAVIT_ISA {
HYDRAVIT_DECLARE_KERNELS
}
#endif
