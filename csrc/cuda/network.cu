#include <cuda_runtime.h>

#include <stdexcept>

#include "network.h"

// Whether the library has kernels for sm_90a; kernels for sm_90 have no wgmma.
#ifndef HYDRAVIT_HAS_SM90A
#define HYDRAVIT_HAS_SM90A 1
#endif

namespace hydravit::cuda {

int describe_device(int index, Device& device) {
  int major = 0;
  const auto attribute = [&](int& value, cudaDeviceAttr name) { return cudaDeviceGetAttribute(&value, name, index); };
  device.index = index;
  cudaError_t status = cudaSetDevice(index);
  if (status == cudaSuccess) status = attribute(device.processors, cudaDevAttrMultiProcessorCount);
  if (status == cudaSuccess) status = attribute(device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (status == cudaSuccess) status = attribute(major, cudaDevAttrComputeCapabilityMajor);
  device.loader = major >= 9 ? Loader::kBulk : Loader::kAsync;
  device.has_wgmma = major == 9 && HYDRAVIT_HAS_SM90A;
  return status;
}

const char* error_text(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

CudaNetwork::CudaNetwork(const NetworkSizes& sizes, Dtype dtype, int max_images, const Device& device)
    : layout_(sizes, dtype), max_images_(max_images), device_(device), workspace_(sizes, max_images) {
  if (const std::string reason = why_not(sizes); !reason.empty()) throw std::invalid_argument(reason);
}

void CudaNetwork::add_subnetwork(const Subnetwork& subnetwork) {
  if (const std::string reason = why_not(subnetwork); !reason.empty()) throw std::invalid_argument(reason);
  subnetworks_.push_back(subnetwork);
  for (const Phase& phase : phases(static_cast<int>(subnetworks_.size()) - 1, max_images_, {}))
    if (phase.shared_bytes > device_.shared_bytes)
      throw std::invalid_argument(std::string(phase.name) + " needs " + std::to_string(phase.shared_bytes) +
                                  " bytes of shared memory, this device has " + std::to_string(device_.shared_bytes));
}

std::vector<Phase> CudaNetwork::phases(int subnetwork, int images, const CallBuffers& buffers) const {
  const Call call{packed_, workspace_memory_, images};
  std::vector<Phase> phases = plan(layout_, subnetworks_[subnetwork], workspace_, device_, call);
  buffers.set(phases);
  return phases;
}

int CudaNetwork::make_graph(int subnetwork, int images, std::unique_ptr<Graph>& graph) const {
  graph = std::make_unique<Graph>(phases(subnetwork, images, {}), layout_.dtype, device_.loader);
  return graph->status();
}

int CudaNetwork::use_memory(uint8_t* packed, uint8_t* workspace) {
  packed_ = packed;
  workspace_memory_ = workspace;
  prepared_.clear();
  call_graphs_.clear();
  if (const int status = cudaSetDevice(device_.index)) return status;
  if (const int status = prepare(layout_.dtype, device_)) return status;
  for (size_t i = 0; i < subnetworks_.size(); i++) {
    prepared_.emplace_back();
    for (int images = 1; images <= max_prepared(); images++)
      if (const int status = make_graph(static_cast<int>(i), images, prepared_.back().emplace_back())) return status;
  }
  return cudaDeviceSynchronize();
}

int CudaNetwork::pack(const std::vector<Parameter>& parameters, void* stream) {
  if (const int status = cudaSetDevice(device_.index)) return status;
  return cuda::pack(layout_, parameters, packed_, stream);
}

int CudaNetwork::run(int subnetwork, int images, const CallBuffers& buffers, void* stream) {
  if (const int status = cudaSetDevice(device_.index)) return status;
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  if (const int status = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capturing)) return status;
  if (capturing == cudaStreamCaptureStatusNone) {  // because a graph cannot be launched into another one
    if (images <= max_prepared()) return prepared_[subnetwork][images - 1]->launch(buffers, stream);
    const std::pair call{subnetwork, images};
    if (call_graphs_.size() < kMaxCallGraphs && !call_graphs_.contains(call))
      if (const int status = make_graph(subnetwork, images, call_graphs_[call])) return status;
    if (const auto found = call_graphs_.find(call); found != call_graphs_.end())
      return found->second->launch(buffers, stream);
  }
  for (const Phase& phase : phases(subnetwork, images, buffers))
    if (const int status = launch(phase, layout_.dtype, device_.loader, stream)) return status;
  return 0;
}

int CudaNetwork::time_phases(int subnetwork, int images, const CallBuffers& buffers, int repeats, void* stream,
                             std::vector<PhaseTime>& times) {
  if (const int status = cudaSetDevice(device_.index)) return status;
  return cuda::time_phases(phases(subnetwork, images, buffers), layout_.dtype, device_, repeats, stream, times);
}

}  // namespace hydravit::cuda
