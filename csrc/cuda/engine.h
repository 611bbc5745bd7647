// An engine: one packed copy of a model's weights and a workspace, both in memory of the caller's, and for every width
// and number of images what is to be run, prepared so that a call is one launch. One call at a time. Calls use the same
// workspace: their streams have to be ordered by the caller.
#pragma once

#include <map>
#include <memory>
#include <utility>

#include "graph.h"
#include "schedule.h"
#include "timing.h"

namespace hydravit::cuda {

int describe_device(int index, Device& device);
const char* error_text(int status);

// A kernel for each phase, recorded as a graph; or one kernel for all of them.
enum class Strategy { kChain, kPersistent };

class Engine {
 public:
  // Up to so many images everything is made before the first call; of more, a chain's graph in their first call.
  static constexpr int kMostImagesPrepared = 8;
  // So many graphs; calls that find none launch kernel by kernel. None is given up, for it may still run.
  static constexpr size_t kMostGraphsOfCalls = 256;

  // Throws std::invalid_argument for a model that the kernels cannot compute.
  Engine(const Model& model, Dtype dtype, int most_images, const Device& device, Strategy strategy);
  // Throws std::invalid_argument where the kernels cannot compute it. Widths are numbered from 0.
  void add_width(const Width& width);

  // What use_memory has to be given, behind the last add_width.
  int64_t packed_bytes() const { return layout_.bytes; }
  int64_t workspace_bytes() const { return workspace_.bytes; }
  int64_t schedule_bytes() const;
  // Memory on the device, aligned to 16 bytes; the schedules' is written here, once.
  int use_memory(uint8_t* packed, uint8_t* workspace, uint8_t* schedules);

  int pack(const std::vector<Parameter>& parameters, void* stream);
  // pixels (images, channels, height, width), contiguous, to logits (images, classes).
  int run(int width, int images, const Ends& ends, void* stream);
  // Of the phases of a chain, whatever the strategy.
  int time_phases(int width, int images, const Ends& ends, int repeats, void* stream, std::vector<PhaseTime>& times);

 private:
  struct Prepared {
    std::unique_ptr<Graph> graph;  // kChain
    Schedule schedule;             // kPersistent
    const Step* steps;
    uint32_t* counters;
  };
  int make_graph(int width, int images, std::unique_ptr<Graph>& graph) const;
  std::vector<Phase> phases(int width, int images, const Ends& ends, bool together) const;
  int most_prepared() const { return most_images_ < kMostImagesPrepared ? most_images_ : kMostImagesPrepared; }

  const Model model_;
  const Layout layout_;
  const Dtype dtype_;
  const int most_images_;
  const Device device_;
  const Strategy strategy_;
  const Workspace workspace_;
  uint8_t *packed_ = nullptr, *workspace_memory_ = nullptr;
  std::vector<Width> widths_;
  std::vector<std::vector<Prepared>> prepared_;                            // by width and number of images - 1
  std::map<std::pair<int, int>, std::unique_ptr<Graph>> graphs_of_calls_;  // by width and number of images
};

}  // namespace hydravit::cuda
