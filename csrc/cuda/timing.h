// Measures each phase of a chain by itself, which plan.cpp only estimates.
#pragma once

#include <string>
#include <vector>

#include "plan.h"

namespace hydravit::cuda {

struct PhaseTime {
  std::string name, tile;  // tile: "32x64" of a product, otherwise ""
  int count;               // so many phases of the call are alike
  bool planned;            // whether the plan chose this tile
  int blocks;
  double microseconds;  // the mean of these phases
};

// Times every phase with every possible tile shape, `repeats` times in a row, and waits for the stream. The outputs
// that the phases write are meaningless.
int time_phases(const std::vector<Phase>& phases, Dtype dtype, const Device& device, int repeats, void* stream,
                std::vector<PhaseTime>& times);

}  // namespace hydravit::cuda
