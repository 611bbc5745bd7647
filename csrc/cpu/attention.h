// The forward of an attention block for some rows, by one thread, in three steps. The second step needs what the first
// one computed for all rows of the image.
#pragma once

#include "gemm.h"
#include "parallel.h"

namespace hydravit::HYDRAVIT_ISA {

// `tokens` are a band, at most kBandRows tokens of one image; attend_rows and attend_head take any number. `scratch`:
// attention_rows_scratch(block) floats.

// x -> qkv; only tokens in `queries` get a Q.
void query_key_value_rows(const AttentionBlock& block, int64_t image, const Range& tokens, const Range& queries,
                          float* scratch);
// qkv -> attended, for all heads or one
void attend_rows(const AttentionBlock& block, int64_t image, const Range& tokens, float* scratch);
void attend_head(const AttentionBlock& block, int64_t image, int64_t head, const Range& tokens, float* scratch);
// attended and x -> y
void project_rows(const AttentionBlock& block, int64_t image, const Range& tokens, float* scratch);
int64_t attention_rows_scratch(const AttentionBlock& block);

// The right operand of the product with proj.
View proj_of(const AttentionBlock& block);

}  // namespace hydravit::HYDRAVIT_ISA
