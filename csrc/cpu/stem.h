// The forward of the stem for some tokens, by one thread.
#pragma once

#include "parallel.h"

namespace hydravit::HYDRAVIT_ISA {

// Computes a band: at most kBandRows tokens of one image. `scratch`: stem_rows_scratch(block) floats.
void stem_rows(const Stem& block, int64_t image, const Range& tokens, float* scratch);
int64_t stem_rows_scratch(const Stem& block);

}  // namespace hydravit::HYDRAVIT_ISA
