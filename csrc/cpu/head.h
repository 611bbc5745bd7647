// The forward of the head, in the caller's memory.
#pragma once

#include "parallel.h"

namespace hydravit::HYDRAVIT_ISA {

// `scratch`: head_scratch(block, threads) floats.
void head(const Head& block, const Threads& threads, float* scratch);
int64_t head_scratch(const Head& block, const Threads& threads);

}  // namespace hydravit::HYDRAVIT_ISA
