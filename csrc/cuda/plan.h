// Where weights and activations lie in memory, and which phases a call consists of. plan.cpp is plain C++ and decides
// all of this on the host; pack.cu and phases.cu work on the device.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "parameters.h"
#include "phase.h"
#include "subnetwork.h"

namespace hydravit::cuda {

// ---- Limits of the kernels: why they cannot compute it, or "" ----

std::string why_not(const NetworkSizes& sizes);
std::string why_not(const Subnetwork& subnetwork);

// ---- The packed weights: one copy serves all subnetworks ----

// A parameter on the device: (rows, columns), or a vector as (1, columns).
struct Parameter {
  const void* data;  // null: the model lacks this parameter
  Dtype dtype;
  int64_t row_stride;
};

struct Packed {
  int64_t offset;         // bytes
  int64_t rows, columns;  // of a matrix in panels (rows are a multiple of 64), or of a float matrix
  int64_t scales;         // byte offset of the row scales of an E4m3 matrix
};
struct Layout {
  const NetworkSizes sizes;
  const Dtype dtype;  // of the matrices
  int64_t bytes = 0;
  // Class and register tokens, the stem's bias and the position embedding are packed as their sum, `positions`, a row
  // for each token. Of these the bias alone also has a place of its own, which nothing reads.
  NetworkParameters<Packed> parameters;
  std::vector<Packed> in_order;  // the entries of `parameters`, in order
  Packed positions;

  Layout(const NetworkSizes& sizes, Dtype dtype);
};

// Packs all parameters, which come in the order of parameters.h. An absent bias becomes zeros, an absent layer scale
// ones. Throws std::invalid_argument if one is absent that the kernels need.
int pack(const Layout& layout, const std::vector<Parameter>& parameters, uint8_t* packed, void* stream);

// ---- The workspace: activations of at most `images` images in any subnetwork ----

struct Workspace {
  // All rows and the pooled rows have buffers of their own. They number an image's rows differently, so in a shared
  // buffer the tile of one image would overwrite residual rows that the tile of another image still reads.
  struct Rows {
    int64_t rows, residual, attended, hidden;  // byte offsets, but for `rows`
  };
  int64_t image_rows;
  Rows all, pooled;
  int64_t qkv;
  int64_t prologue;  // rows that a prologue phase makes for the next product
  int64_t bytes;

  Workspace(const NetworkSizes& sizes, int images);
};

// ---- The phases of a call ----

struct Device {
  int processors;    // SMs
  int shared_bytes;  // that one block may have
  Loader loader;
  int index;
  bool has_wgmma = false;  // sm_90a has it; the kernels use it together with bulk copies only
};

struct Call {
  const uint8_t* packed;
  uint8_t* workspace;
  int images;
  bool pooled_only = true;  // the last layer computes only the tokens that are pooled: the same bits for less work
};

// The first phase still lacks its images and the last one its logits: see CallBuffers.
std::vector<Phase> plan(const Layout& layout, const Subnetwork& subnetwork, const Workspace& workspace,
                        const Device& device, const Call& call);

// The pointers that differ between calls with the same plan.
struct CallBuffers {
  const void* pixels;
  Dtype pixel_dtype;
  float* logits;

  bool operator==(const CallBuffers&) const = default;
  void set(std::vector<Phase>& phases) const {
    phases.front().product.a = pixels;
    phases.front().product.image_dtype = pixel_dtype;
    phases.back().product.c = logits;
  }
};

// The same phase once with every tile shape that can compute it.
std::vector<Phase> in_every_tile_shape(const Phase& phase, Dtype weights, const Device& device);

// ---- Kernels ----

// Must run once before the first launch on a device: grants the kernels all shared memory that there is.
int prepare(Dtype dtype, const Device& device);
// Launches the kernel of one phase on the stream.
int launch(const Phase& phase, Dtype dtype, Loader loader, void* stream);
// The kernel of the phase as CUDA knows it.
const void* kernel_of(const Phase& phase, Dtype dtype, Loader loader);

}  // namespace hydravit::cuda
