// An engine: one packed copy of a model's weights and a workspace, both given by the caller, and for every width and
// number of images the phases to run, recorded as a graph where launching would take longer than computing.
// One call at a time. Calls use the same workspace: their streams have to be ordered by the caller.
#pragma once

#include <memory>

#include "graph.h"
#include "network.h"

namespace hydravit::cuda {

int describe_device(int index, Device& device);
const char* error_text(int status);

class Engine {
 public:
  static constexpr int kMostImagesRecorded = 8;

  // Throws std::invalid_argument for a model that the kernels cannot compute.
  Engine(const Model& model, Dtype dtype, int most_images, const Device& device);

  int64_t packed_bytes() const { return layout_.bytes; }
  int64_t workspace_bytes() const { return workspace_.bytes; }
  // Memory on the device, aligned to 16 bytes; before everything that follows.
  void use_memory(uint8_t* packed, uint8_t* workspace);

  // Returns the width's index; throws std::invalid_argument where the kernels cannot compute it.
  int add_width(const Width& width);
  int pack(const std::vector<Parameter>& parameters, void* stream);
  // Records every width with every number of images up to kMostImagesRecorded: later calls allocate nothing.
  int record();
  // pixels (images, channels, height, width), contiguous, to logits (images, classes).
  int run(int width, int images, const Ends& ends, void* stream);

 private:
  std::vector<Phase> phases(int width, int images, const Ends& ends) const;

  const Model model_;
  const Layout layout_;
  const Dtype dtype_;
  const int most_images_;
  const Device device_;
  const Workspace workspace_;
  uint8_t *packed_ = nullptr, *workspace_memory_ = nullptr;
  std::vector<Width> widths_;
  std::vector<std::vector<std::unique_ptr<Graph>>> graphs_;  // by width and number of images - 1
};

}  // namespace hydravit::cuda
