#include <cuda_runtime.h>

#include <stdexcept>

#include "engine.h"

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
  return status;
}

const char* error_text(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

Engine::Engine(const Model& model, Dtype dtype, int most_images, const Device& device)
    : model_(model),
      layout_(model),
      dtype_(dtype),
      most_images_(most_images),
      device_(device),
      workspace_(model, most_images) {
  if (const std::string reason = why_not(model); !reason.empty()) throw std::invalid_argument(reason);
}

void Engine::use_memory(uint8_t* packed, uint8_t* workspace) {
  packed_ = packed;
  workspace_memory_ = workspace;
}

int Engine::add_width(const Width& width) {
  if (const std::string reason = why_not(model_, width); !reason.empty()) throw std::invalid_argument(reason);
  widths_.push_back(width);
  graphs_.emplace_back();
  const int index = static_cast<int>(widths_.size()) - 1;
  for (const Phase& phase : phases(index, most_images_, {}))
    if (phase.shared_bytes > device_.shared_bytes)
      throw std::invalid_argument(std::string(phase.name) + " needs " + std::to_string(phase.shared_bytes) +
                                  " bytes of shared memory, this device has " + std::to_string(device_.shared_bytes));
  return index;
}

int Engine::pack(const std::vector<Parameter>& parameters, void* stream) {
  if (const int status = cudaSetDevice(device_.index)) return status;
  return cuda::pack(model_, layout_, parameters, dtype_, packed_, stream);
}

std::vector<Phase> Engine::phases(int width, int images, const Ends& ends) const {
  std::vector<Phase> phases =
      plan(model_, layout_, widths_[width], workspace_, device_, {packed_, workspace_memory_, images});
  ends.set(phases);
  return phases;
}

int Engine::record() {
  if (const int status = cudaSetDevice(device_.index)) return status;
  if (const int status = prepare(dtype_, device_)) return status;
  for (size_t width = 0; width < widths_.size(); width++) {
    graphs_[width].clear();
    for (int images = 1; images <= most_images_ && images <= kMostImagesRecorded; images++) {
      auto graph = std::make_unique<Graph>(phases(static_cast<int>(width), images, {}), dtype_, device_.loader);
      if (graph->status() != 0) return graph->status();
      graphs_[width].push_back(std::move(graph));
    }
  }
  return 0;
}

int Engine::run(int width, int images, const Ends& ends, void* stream) {
  if (const int status = cudaSetDevice(device_.index)) return status;
  if (images <= static_cast<int>(graphs_[width].size())) return graphs_[width][images - 1]->launch(ends, stream);
  // Launching hides behind the arithmetic of so many images.
  for (const Phase& phase : phases(width, images, ends))
    if (const int status = launch(phase, dtype_, device_.loader, stream)) return status;
  return 0;
}

}  // namespace hydravit::cuda
