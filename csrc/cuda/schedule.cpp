#include "schedule.h"

#include <algorithm>

namespace hydravit::cuda {

namespace {

const void* output_of(const Step& step) { return step.is_attention ? step.attention.out : step.product.c; }
const void* input_of(const Step& step) { return step.is_attention ? step.attention.qkv : step.product.a; }

}  // namespace

Schedule schedule(const std::vector<Phase>& phases, const Device& device) {
  Schedule result{{}, device.processors, kCallCounters, 0};
  int tiles = 0;
  for (const Phase& phase : phases) {
    Step step{};
    step.is_attention = phase.kind == Kind::kAttention;
    step.shape = phase.shape;
    step.product = phase.product;
    step.attention = phase.attention;
    step.tiles = phase.blocks;
    // Where the step in front ended: blocks that had one tile less begin.
    step.first_block = tiles % device.processors;
    tiles += step.tiles;
    step.input = -1;
    for (size_t i = 0; i < result.steps.size(); i++)
      if (output_of(result.steps[i]) == input_of(step)) step.input = static_cast<int>(i);
    step.counter = result.counters;
    result.counters += groups_of(step);
    step.expected = step.tiles / groups_of(step);
    result.shared_bytes = std::max(result.shared_bytes, phase.shared_bytes);
    result.steps.push_back(step);
  }
  return result;
}

}  // namespace hydravit::cuda
