// Replaces csrc/cuda/graph.cu: a launch of a graph launches its kernels one by one.
#include "graph.h"

#include <utility>

namespace hydravit::cuda {

Graph::Graph(std::vector<Phase> phases, Dtype dtype, Loader loader)
    : phases_(std::move(phases)), dtype_(dtype), loader_(loader) {}

Graph::~Graph() = default;

int Graph::launch(const CallBuffers& buffers, void* stream) {
  buffers.set(phases_);
  for (const Phase& phase : phases_)
    if (const int status = cuda::launch(phase, dtype_, loader_, stream)) return status;
  return 0;
}

}  // namespace hydravit::cuda
