#include <cuda_runtime.h>

#include <algorithm>
#include <utility>

#include "graph.h"
#include "timing.h"

namespace hydravit::cuda {

namespace {

bool alike(const Phase& a, const Phase& b) {
  return std::string(a.name) == b.name && a.shape == b.shape && a.blocks == b.blocks && a.product.k == b.product.k;
}

std::string tile_of(const Phase& phase) {
  if (phase.kind != Kind::kProduct) return "";
  const TileSize size = size_of(phase.shape);
  return std::to_string(size.rows) + "x" + std::to_string(size.columns);
}

// Runs the phases of all layers in turn, so that each finds as much of its weights in the cache as in a call. They run
// as a graph, because short kernels that are launched one by one would wait for the host.
int time(const std::vector<Phase>& phases, Dtype dtype, Loader loader, int repeats, cudaStream_t stream, float& ms) {
  std::vector<Phase> all;
  for (int i = 0; i < repeats; i++) all.insert(all.end(), phases.begin(), phases.end());
  all.front().starts_early = false;
  const CallBuffers buffers{all.front().product.a, all.front().product.image_dtype,
                            static_cast<float*>(all.back().product.c)};
  Graph graph(std::move(all), dtype, loader);
  int status = graph.status();
  const auto attempt = [&](int result) {
    if (status == 0) status = result;
  };
  cudaEvent_t start = nullptr, stop = nullptr;
  attempt(cudaEventCreate(&start));
  attempt(cudaEventCreate(&stop));
  for (const bool timed : {false, true}) {  // the host launches the second graph while the first one runs
    if (timed) attempt(cudaEventRecord(start, stream));
    if (status == 0) attempt(graph.launch(buffers, stream));
  }
  attempt(cudaEventRecord(stop, stream));
  attempt(cudaEventSynchronize(stop));
  attempt(cudaEventElapsedTime(&ms, start, stop));
  if (start != nullptr) cudaEventDestroy(start);
  if (stop != nullptr) cudaEventDestroy(stop);
  return status;
}

}  // namespace

int time_phases(const std::vector<Phase>& phases, Dtype dtype, const Device& device, int repeats, void* stream,
                std::vector<PhaseTime>& times) {
  for (size_t i = 0; i < phases.size(); i++) {
    const auto is_alike = [&](const Phase& other) { return alike(phases[i], other); };
    if (std::any_of(phases.begin(), phases.begin() + static_cast<int64_t>(i), is_alike)) continue;
    std::vector<std::vector<Phase>> all;  // [phase][tile shape]
    for (const Phase& phase : phases)
      if (is_alike(phase)) all.push_back(in_every_tile_shape(phase, dtype, device));
    for (size_t shape = 0; shape < all[0].size(); shape++) {
      std::vector<Phase> same;
      for (const std::vector<Phase>& shapes : all) same.push_back(shapes[shape]);
      float ms = 0;
      if (const int status = time(same, dtype, device.loader, repeats, static_cast<cudaStream_t>(stream), ms))
        return status;
      const Phase& phase = same[0];
      times.push_back({phase.name, tile_of(phase), static_cast<int>(same.size()), phase.shape == phases[i].shape,
                       phase.blocks, 1e3 * ms / (repeats * static_cast<double>(same.size()))});
    }
  }
  return 0;
}

}  // namespace hydravit::cuda
