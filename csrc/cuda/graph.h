// The phases of one subnetwork and batch size, recorded as a CUDA graph: a call is then one launch.
#pragma once

#include <vector>

#include "plan.h"

namespace hydravit::cuda {

class Graph {
 public:
  Graph(std::vector<Phase> phases, Dtype dtype, Loader loader);
  ~Graph();
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  int status() const { return status_; }  // whether the constructor could record the graph
  int launch(const CallBuffers& buffers, void* stream);

 private:
  std::vector<Phase> phases_;
  const Dtype dtype_;
  const Loader loader_;
  CallBuffers recorded_{};
  void *first_node_ = nullptr, *last_node_ = nullptr, *graph_ = nullptr, *executable_ = nullptr;
  int status_ = 0;
};

}  // namespace hydravit::cuda
