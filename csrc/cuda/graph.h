// The phases of one width and number of images, recorded as one CUDA graph: a call is then one launch.
#pragma once

#include <vector>

#include "network.h"

namespace hydravit::cuda {

// What differs from call to call.
struct Ends {
  const void* pixels;
  Dtype pixel_dtype;
  float* logits;

  bool operator==(const Ends&) const = default;
  void set(std::vector<Phase>& phases) const {
    phases.front().product.a = pixels;
    phases.front().product.image_dtype = pixel_dtype;
    phases.back().product.c = logits;
  }
};

class Graph {
 public:
  Graph(std::vector<Phase> phases, Dtype dtype, Loader loader);
  ~Graph();
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  int status() const { return status_; }  // of recording
  int launch(const Ends& ends, void* stream);

 private:
  std::vector<Phase> phases_;
  const Dtype dtype_;
  const Loader loader_;
  Ends recorded_{};
  void *first_node_ = nullptr, *last_node_ = nullptr, *graph_ = nullptr, *executable_ = nullptr;
  int status_ = 0;
};

}  // namespace hydravit::cuda
