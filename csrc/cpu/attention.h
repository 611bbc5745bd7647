// The forward of an attention block for some rows, by one thread, in three steps. The second step needs the first
// step's results for all rows of the image.
#pragma once

#include "gemm.h"
#include "parallel.h"

namespace hydravit::HYDRAVIT_ISA {

// A step takes tokens of one image: at most kBandRows of them, but any number in `attend_rows`. `scratch`:
// attention_rows_scratch(block) floats.
// x -> qkv; only tokens in `queries` get a Q.
void query_key_value_rows(const AttentionBlock& block, int64_t image, const Range& tokens, const Range& queries,
                          float* scratch);
// qkv -> attended
void attend_rows(const AttentionBlock& block, int64_t image, const Range& tokens, float* scratch);
void attend_head(const AttentionBlock& block, int64_t image, int64_t head, const Range& tokens, float* scratch);
// attended and x -> y
void project_rows(const AttentionBlock& block, int64_t image, const Range& tokens, float* scratch);
int64_t attention_rows_scratch(const AttentionBlock& block);

// The right operand of the projection.
View proj_of(const AttentionBlock& block);

}  // namespace hydravit::HYDRAVIT_ISA
