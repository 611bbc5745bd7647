// How long the phases of a chain take, each by itself: what plan.cpp estimates, measured.
#pragma once

#include <string>
#include <vector>

#include "plan.h"

namespace hydravit::cuda {

struct PhaseTime {
  std::string name, tile;  // the tile of a product, "32x64"
  int count;               // phases of a call that are alike
  bool planned;            // whether the plan has this tile
  int blocks;
  double microseconds;  // the mean of these phases
};

// Of all phases, in every shape that their tiles can have, `repeats` times one behind the other. What they write is
// worthless. Waits for the stream.
int time_phases(const std::vector<Phase>& phases, Dtype dtype, const Device& device, int repeats, void* stream,
                std::vector<PhaseTime>& times);

}  // namespace hydravit::cuda
