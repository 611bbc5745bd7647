// The caller describes a network by these structs: the sizes of the model, its parameters, and the slices that each
// subnetwork reads.
#pragma once

#include <string>
#include <vector>

#include "phase.h"

namespace hydravit::cuda {

// The full model.
struct Model {
  int depth;  // layers
  int embed, hidden;
  int classes;  // rows of all classifiers together
  int channels, grid_height, grid_width, patch_height, patch_width;
  int cls_tokens, reg_tokens;
  bool pos_on_prefix;
  int pool_start, pool_stop;  // the classifier reads the mean of the tokens [pool_start, pool_stop)

  int prefix_tokens() const { return cls_tokens + reg_tokens; }
  int tokens() const { return prefix_tokens() + grid_height * grid_width; }
  int patch_size() const { return channels * patch_height * patch_width; }
};

// A parameter on the device: (rows, columns), or a vector as (1, columns). Parameters come in the order of
// hydravit_kernels/parameters.py: 5 of the stem, 14 of every layer, 4 of the classifier.
struct Parameter {
  const void* data;  // null: the model lacks this parameter
  Dtype dtype;
  int64_t row_stride;
};

// One subnetwork, as hydravit_kernels/slices.py describes it.
struct AttentionSlice {
  int query_row, key_row, value_row, proj_column;
  int heads;  // 0: the layer skips its attention
  float scale;
};
struct MlpSlice {
  int hidden_offset;
  int hidden;  // 0: the layer skips its MLP
};
struct Subnetwork {
  int embed_offset, embed;
  std::vector<AttentionSlice> attention;  // one for each layer
  std::vector<MlpSlice> mlp;
  int class_offset, classes;
  float eps;
};

// Why the kernels cannot compute it, or "".
std::string why_not(const Model& model);
std::string why_not(const Model& model, const Subnetwork& subnetwork);

}  // namespace hydravit::cuda
