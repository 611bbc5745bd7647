// The network on one device: it packs the weights once, plans every subnetwork, and keeps the plans of small batches as
// CUDA graphs, so that a call is one launch. The caller owns the memory. All calls use the same workspace, so calls
// must not run at the same time, and the caller has to order their streams.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "graph.h"
#include "plan.h"
#include "timing.h"

namespace hydravit::cuda {

int describe_device(int index, Device& device);
const char* error_text(int status);

class CudaNetwork {
 public:
  // Graphs for batches up to this size are made by use_memory; the graph of a larger batch is made by its first call.
  static constexpr int kMaxPreparedImages = 8;
  // Calls beyond this many graphs launch kernel by kernel. No graph is destroyed early, because it may still run.
  static constexpr size_t kMaxCallGraphs = 256;

  // Throws std::invalid_argument for a network that the kernels cannot compute.
  CudaNetwork(const NetworkSizes& sizes, Dtype dtype, int max_images, const Device& device);
  // Throws std::invalid_argument for a subnetwork that the kernels cannot compute. Numbers subnetworks from 0.
  void add_subnetwork(const Subnetwork& subnetwork);
  const NetworkSizes& sizes() const { return layout_.sizes; }

  // The sizes of the two buffers that use_memory takes.
  int64_t packed_bytes() const { return layout_.bytes; }
  int64_t workspace_bytes() const { return workspace_.bytes; }
  // Memory on the device, aligned to 16 bytes. Must follow the last add_subnetwork.
  int use_memory(uint8_t* packed, uint8_t* workspace);

  int pack(const std::vector<Parameter>& parameters, void* stream);
  // Reads pixels (images, channels, height, width), contiguous, and writes logits (images, classes).
  int run(int subnetwork, int images, const CallBuffers& buffers, void* stream);
  int time_phases(int subnetwork, int images, const CallBuffers& buffers, int repeats, void* stream,
                  std::vector<PhaseTime>& times);

 private:
  int make_graph(int subnetwork, int images, std::unique_ptr<Graph>& graph) const;
  std::vector<Phase> phases(int subnetwork, int images, const CallBuffers& buffers) const;
  int max_prepared() const { return max_images_ < kMaxPreparedImages ? max_images_ : kMaxPreparedImages; }

  const Layout layout_;
  const int max_images_;
  const Device device_;
  const Workspace workspace_;
  uint8_t *packed_ = nullptr, *workspace_memory_ = nullptr;
  std::vector<Subnetwork> subnetworks_;
  std::vector<std::vector<std::unique_ptr<Graph>>> prepared_;          // [subnetwork][images - 1]
  std::map<std::pair<int, int>, std::unique_ptr<Graph>> call_graphs_;  // {subnetwork, images}
};

}  // namespace hydravit::cuda
