// The forward of an MLP block for some rows, by one thread.
#pragma once

#include "parallel.h"

namespace hydravit::HYDRAVIT_ISA {

// Computes a band: at most kBandRows tokens of one image. `scratch`: mlp_rows_scratch(block) floats.
void mlp_rows(const MlpBlock& block, int64_t image, const Range& tokens, float* scratch);
int64_t mlp_rows_scratch(const MlpBlock& block);

}  // namespace hydravit::HYDRAVIT_ISA
