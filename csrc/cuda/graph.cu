#include <cuda_runtime.h>

#include <utility>

#include "graph.h"

namespace hydravit::cuda {

namespace {

// Finds the node of the kernel that was captured last.
int last_captured(cudaStream_t stream, void** node) {
  cudaStreamCaptureStatus capturing;
  const cudaGraphNode_t* nodes = nullptr;
  const cudaGraphEdgeData* edges = nullptr;
  size_t count = 0;
#if CUDART_VERSION >= 13000
  const cudaError_t status = cudaStreamGetCaptureInfo(stream, &capturing, nullptr, nullptr, &nodes, &edges, &count);
#else
  const cudaError_t status = cudaStreamGetCaptureInfo_v3(stream, &capturing, nullptr, nullptr, &nodes, &edges, &count);
#endif
  if (status != cudaSuccess) return status;
  if (count != 1) return cudaErrorUnknown;
  *node = nodes[0];
  return cudaSuccess;
}

int update(void* executable, void* node, Phase& phase, Dtype dtype, Loader loader) {
  void* arguments[] = {&phase.product};
  cudaKernelNodeParams parameters{};
  parameters.func = const_cast<void*>(kernel_of(phase, dtype, loader));
  parameters.gridDim = dim3(static_cast<unsigned>(phase.blocks));
  parameters.blockDim = dim3(static_cast<unsigned>(phase.threads));
  parameters.sharedMemBytes = static_cast<unsigned>(phase.shared_bytes);
  parameters.kernelParams = arguments;
  return cudaGraphExecKernelNodeSetParams(static_cast<cudaGraphExec_t>(executable), static_cast<cudaGraphNode_t>(node),
                                          &parameters);
}

}  // namespace

Graph::Graph(std::vector<Phase> phases, Dtype dtype, Loader loader)
    : phases_(std::move(phases)), dtype_(dtype), loader_(loader) {
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  const auto check = [&](int status) {
    if (status_ == 0) status_ = status;
    return status_ == 0;
  };
  recorded_.set(phases_);
  if (!check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking))) return;
  // The mode is relaxed, because other threads may allocate memory meanwhile.
  if (check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed))) {
    for (size_t i = 0; i < phases_.size() && check(cuda::launch(phases_[i], dtype, loader, stream)); i++) {
      if (i == 0) check(last_captured(stream, &first_node_));
      if (i + 1 == phases_.size()) check(last_captured(stream, &last_node_));
    }
    check(cudaStreamEndCapture(stream, &graph));
    if (status_ == 0) check(cudaGraphInstantiate(&executable, graph, 0));
  }
  graph_ = graph;  // kept, because its nodes name the nodes of the executable graph
  executable_ = executable;
  cudaStreamDestroy(stream);
}

Graph::~Graph() {
  if (executable_ != nullptr) cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(executable_));
  if (graph_ != nullptr) cudaGraphDestroy(static_cast<cudaGraph_t>(graph_));
}

int Graph::launch(const CallBuffers& buffers, void* stream) {
  if (buffers != recorded_) {
    buffers.set(phases_);
    if (const int status = update(executable_, first_node_, phases_.front(), dtype_, loader_)) return status;
    if (const int status = update(executable_, last_node_, phases_.back(), dtype_, loader_)) return status;
    recorded_ = buffers;
  }
  return cudaGraphLaunch(static_cast<cudaGraphExec_t>(executable_), static_cast<cudaStream_t>(stream));
}

}  // namespace hydravit::cuda
