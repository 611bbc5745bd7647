// The contract between an engine and the CUDA part: sizes of the model, one width's slices, where things are packed.
// Plain C++; plan.cpp turns it into phases, pack.cu and phases.cu work on the device.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "phase.h"

namespace hydravit::cuda {

// The full model. Its parameters come in the order of hydravit_kernels/parameters.py: 5 of the stem, 14 of every block,
// 4 of the head; each as (rows, columns), a vector as (1, columns).
struct Model {
  int depth, embed, hidden, classes;  // classes: rows of all classifiers together
  int channels, grid_height, grid_width, patch_height, patch_width;
  int cls_tokens, reg_tokens;
  bool pos_on_prefix;
  int first_pooled, last_pooled;  // tokens the head takes the mean of: the first and the first behind

  int prefix_tokens() const { return cls_tokens + reg_tokens; }
  int tokens() const { return prefix_tokens() + grid_height * grid_width; }
  int patch_size() const { return channels * patch_height * patch_width; }
};

// One subnetwork, as hydravit_kernels/slices.py names it.
struct AttentionSlice {
  int query_row, key_row, value_row, proj_column, heads;
  float scale;
};
struct MlpSlice {
  int hidden_offset, hidden;
};
struct Width {
  int embed_offset, embed;
  std::vector<AttentionSlice> attention;  // one for each block
  std::vector<MlpSlice> mlp;
  int class_offset, classes;
  float eps;
};

// "" or why these kernels cannot compute it.
std::string why_not(const Model& model);
std::string why_not(const Model& model, const Width& width);

// ---- The packed weights, one copy for all widths ----

// A matrix in panels of `rows` rows (a multiple of 64), or a float matrix of `columns` columns.
struct Packed {
  int64_t offset;  // bytes
  int rows, columns;
  int64_t scales;  // of an E4m3 matrix: where its rows' scales begin, bytes
};
struct Layout {
  struct Block {
    Packed norm1_weight, norm1_bias, qkv, qkv_bias, proj, proj_bias, scale1;
    Packed norm2_weight, norm2_bias, fc1, fc1_bias, fc2, fc2_bias, scale2;
  };
  Packed stem, positions;
  std::vector<Block> blocks;
  Packed norm_weight, norm_bias, head, head_bias;
  int64_t bytes = 0;
  Dtype dtype;  // of the matrices

  Layout(const Model& model, Dtype dtype);
};

struct Parameter {   // a parameter on the device
  const void* data;  // null: absent
  Dtype dtype;
  int64_t row_stride;
};
// Packs all parameters; absent biases become zeros, absent layer scales ones.
int pack(const Model& model, const Layout& layout, const std::vector<Parameter>& parameters, uint8_t* packed,
         void* stream);

// ---- The phases of one call ----

struct Device {
  int processors;    // SMs
  int shared_bytes;  // of one block at most
  Loader loader;
  int index;
  bool warpgroups = false;  // of sm_90a, which has wgmma; with bulk copies only
};

// Offsets into the workspace: activations of at most `images` images at any width.
struct Workspace {
  // Those of all rows, and those of the pooled rows alone, behind the last attention. Their rows are numbered apart, so
  // in one buffer a tile of one image would overwrite what another image still needs.
  struct Rows {
    int64_t rows, stream, attended, hidden;
  };
  int64_t image_rows;
  Rows all, pooled;
  int64_t qkv[2];  // of this block and the next
  int64_t input;   // of a product, made ahead of it
  int64_t bytes;

  Workspace(const Model& model, int images);
};

struct Call {
  const uint8_t* packed;
  uint8_t* workspace;
  int images;
  bool pooled_only = true;  // the last block computes only what the head pools; the same bits, less work
  bool together = false;    // for one kernel: all blocks have 256 threads, and no product's input is made ahead
};

// The first phase still lacks its images, the last one its logits.
std::vector<Phase> plan(const Model& model, const Layout& layout, const Width& width, const Workspace& workspace,
                        const Device& device, const Call& call);

// A phase of a chain in every shape that its tiles can have.
std::vector<Phase> in_every_shape(const Phase& phase, Dtype weights, const Device& device);

// Before the first launch on a device: lets its kernels have as much shared memory as there is, and all the same.
int prepare(Dtype dtype, const Device& device);
// One phase as one kernel on the stream.
int launch(const Phase& phase, Dtype dtype, Loader loader, void* stream);
// The kernel that computes the phase, as CUDA knows it.
const void* kernel_of(const Phase& phase, Dtype dtype, Loader loader);

}  // namespace hydravit::cuda
