#include <cuda_runtime.h>

#include <stdexcept>

#include "engine.h"

// Whether kernels for sm_90a are built; those of sm_90 have no wgmma.
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
  device.warpgroups = major == 9 && HYDRAVIT_HAS_SM90A;
  return status;
}

const char* error_text(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

Engine::Engine(const Model& model, Dtype dtype, int most_images, const Device& device, Strategy strategy)
    : model_(model),
      layout_(model, dtype),
      dtype_(dtype),
      most_images_(most_images),
      device_(device),
      strategy_(strategy),
      workspace_(model, most_images) {
  if (const std::string reason = why_not(model); !reason.empty()) throw std::invalid_argument(reason);
}

void Engine::add_width(const Width& width) {
  if (const std::string reason = why_not(model_, width); !reason.empty()) throw std::invalid_argument(reason);
  widths_.push_back(width);
  for (const bool together : {false, strategy_ == Strategy::kPersistent})
    for (const Phase& phase : phases(static_cast<int>(widths_.size()) - 1, most_images_, {}, together))
      if (phase.shared_bytes > device_.shared_bytes)
        throw std::invalid_argument(std::string(phase.name) + " needs " + std::to_string(phase.shared_bytes) +
                                    " bytes of shared memory, this device has " + std::to_string(device_.shared_bytes));
}

std::vector<Phase> Engine::phases(int width, int images, const Ends& ends, bool together) const {
  const Call call{packed_, workspace_memory_, images, true, together};
  std::vector<Phase> phases = plan(model_, layout_, widths_[width], workspace_, device_, call);
  ends.set(phases);
  return phases;
}

// ---- What is prepared ----

namespace {

int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }
int64_t bytes_of_steps(const Schedule& schedule) {
  return aligned(static_cast<int64_t>(schedule.steps.size() * sizeof(Step)));
}
int64_t bytes_of_counters(const Schedule& schedule) {
  return aligned(int64_t{schedule.counters} * static_cast<int64_t>(sizeof(uint32_t)));
}

}  // namespace

int64_t Engine::schedule_bytes() const {
  int64_t bytes = 0;
  if (strategy_ == Strategy::kChain) return bytes;
  for (size_t width = 0; width < widths_.size(); width++)
    for (int images = 1; images <= most_prepared(); images++) {
      const Schedule all = schedule(phases(static_cast<int>(width), images, {}, true), device_);
      bytes += bytes_of_steps(all) + bytes_of_counters(all);
    }
  return bytes;
}

int Engine::make_graph(int width, int images, std::unique_ptr<Graph>& graph) const {
  graph = std::make_unique<Graph>(phases(width, images, {}, false), dtype_, device_.loader);
  return graph->status();
}

int Engine::use_memory(uint8_t* packed, uint8_t* workspace, uint8_t* schedules) {
  packed_ = packed;
  workspace_memory_ = workspace;
  prepared_.clear();
  graphs_of_calls_.clear();
  if (const int status = cudaSetDevice(device_.index)) return status;
  if (const int status = prepare(dtype_, device_)) return status;
  if (const int status = prepare_schedules(dtype_, device_)) return status;
  for (size_t width = 0; width < widths_.size(); width++) {
    prepared_.emplace_back();
    for (int images = 1; images <= most_prepared(); images++) {
      Prepared& prepared = prepared_.back().emplace_back();
      if (strategy_ == Strategy::kChain) {
        if (const int status = make_graph(static_cast<int>(width), images, prepared.graph)) return status;
        continue;
      }
      prepared.schedule = schedule(phases(static_cast<int>(width), images, {}, true), device_);
      const auto& steps = prepared.schedule.steps;
      prepared.steps = reinterpret_cast<const Step*>(schedules);
      const cudaError_t copied =
          cudaMemcpy(schedules, steps.data(), steps.size() * sizeof(Step), cudaMemcpyHostToDevice);
      if (copied != cudaSuccess) return copied;
      schedules += bytes_of_steps(prepared.schedule);
      prepared.counters = reinterpret_cast<uint32_t*>(schedules);
      const int64_t counters = bytes_of_counters(prepared.schedule);
      if (const int status = cudaMemset(schedules, 0, static_cast<size_t>(counters))) return status;
      schedules += counters;
    }
  }
  return cudaDeviceSynchronize();
}

int Engine::pack(const std::vector<Parameter>& parameters, void* stream) {
  if (const int status = cudaSetDevice(device_.index)) return status;
  return cuda::pack(model_, layout_, parameters, packed_, stream);
}

int Engine::run(int width, int images, const Ends& ends, void* stream) {
  if (const int status = cudaSetDevice(device_.index)) return status;
  const bool is_prepared = images <= most_prepared();
  if (is_prepared && strategy_ == Strategy::kPersistent) {
    const Prepared& prepared = prepared_[width][images - 1];
    return launch(prepared.schedule, prepared.steps, prepared.counters, ends, dtype_, device_.loader, stream);
  }
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  if (const int status = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capturing)) return status;
  if (capturing == cudaStreamCaptureStatusNone) {  // a graph cannot be launched into another one
    if (is_prepared) return prepared_[width][images - 1].graph->launch(ends, stream);
    const std::pair call{width, images};
    if (graphs_of_calls_.size() < kMostGraphsOfCalls && !graphs_of_calls_.contains(call))
      if (const int status = make_graph(width, images, graphs_of_calls_[call])) return status;
    if (const auto found = graphs_of_calls_.find(call); found != graphs_of_calls_.end())
      return found->second->launch(ends, stream);
  }
  for (const Phase& phase : phases(width, images, ends, false))
    if (const int status = launch(phase, dtype_, device_.loader, stream)) return status;
  return 0;
}

int Engine::time_phases(int width, int images, const Ends& ends, int repeats, void* stream,
                        std::vector<PhaseTime>& times) {
  if (const int status = cudaSetDevice(device_.index)) return status;
  return cuda::time_phases(phases(width, images, ends, false), dtype_, device_, repeats, stream, times);
}

}  // namespace hydravit::cuda
