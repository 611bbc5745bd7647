// The arguments of the ops of hydravit_kernels/ops.py, and how they become the arguments of a kernel.
//
// An op checks its arguments, allocates its outputs, folds the slices' offsets into base pointers and calls the kernel
// once for each run of images. It never copies a parameter: a parameter that a kernel cannot read in place is an error.
// `describe` makes one kernel argument for each slice, for all images.
#pragma once

#include "checks.h"
#include "parameters.h"
#include "subnetwork.h"

namespace hydravit {

inline Tensor empty_output(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

inline const float* check_branch_scale(const OptionalTensor& branch_scale, int64_t batch) {
  const Parameter parameter("branch_scale", branch_scale);
  parameter.check_both({batch});
  return parameter.vector({0, batch});
}

// The largest `field` of any slice.
template <class Slice, class Field>
int64_t largest(const std::vector<Slice>& slices, const Field& field) {
  int64_t result = 0;
  for (const Slice& slice : slices) result = std::max(result, static_cast<int64_t>(std::invoke(field, slice)));
  return result;
}

template <class Slice>
Interval embed_of(const Slice& slice) {
  HYDRAVIT_CHECK(slice.embed > 0, "slices: an embed of at least 1 expected, 0 given");
  return {slice.embed_offset, slice.embed};
}

// Images (B, channels, height, width) of any strides. A plan is made without them: it knows only the sizes of one
// image.
struct Images {
  int64_t batch, channels, height, width;
  const Tensor* tensor;

  Images(const Tensor& images) : tensor(&images) {
    check_shape(images, "images", {kAny, kAny, kAny, kAny});
    batch = images.size(0), channels = images.size(1), height = images.size(2), width = images.size(3);
  }
  explicit Images(const NetworkSizes& n)
      : batch(0), channels(n.channels), height(n.image_height), width(n.image_width), tensor(nullptr) {}
};

// The residual: x (B, N, the widest embed). A plan is made without it: it knows only the number of tokens.
struct Residual {
  int64_t batch, tokens;
  const Tensor* x;

  Residual(const Tensor& x) : batch(x.dim() == 3 ? x.size(0) : 0), tokens(x.dim() == 3 ? x.size(1) : 0), x(&x) {}
  explicit Residual(const NetworkSizes& n) : batch(0), tokens(n.tokens()), x(nullptr) {}

  Tokens data(int64_t width) const {
    if (x == nullptr) return {};
    check(*x, "x", {kAny, kAny, width});
    HYDRAVIT_CHECK(tokens > 0, "x: at least one token expected, shape ", text(shape_of(*x)), " given");
    return tokens_of(*x);
  }
};

// ---- Stem ----

struct StemArguments {
  Images images;
  StemParameters<Parameter> parameters;
  std::vector<EmbedSlice> slices;
  OptionalTensor width_index;

  int64_t width() const { return largest(slices, &EmbedSlice::embed); }
  static int64_t tokens_of(const Parameter& prefix) { return prefix.present() ? prefix.size(1) : 0; }
  int64_t tokens() const {
    return tokens_of(parameters.cls_token) + tokens_of(parameters.reg_token) +
           images.height / parameters.weight.size(2) * (images.width / parameters.weight.size(3));
  }
};

std::vector<Stem> describe(const StemArguments& arguments);

// ---- Attention block ----

struct AttentionArguments {
  Residual x;
  AttentionParameters<Parameter> parameters;
  OptionalTensor branch_scale;
  std::vector<AttentionSlice> slices;
  double eps;
  OptionalTensor width_index;
  int64_t queries;

  // Sizes of the tensors that forward saves for backward, which the largest slice determines. `describe` has checked
  // the slices.
  int64_t qkv() const {
    return largest(slices, [](const AttentionSlice& s) { return s.heads * (2 * s.head_dim + s.value_dim); });
  }
  int64_t attended() const {
    return largest(slices, [](const AttentionSlice& s) { return s.heads * s.value_dim; });
  }
  int64_t heads() const { return largest(slices, &AttentionSlice::heads); }
};

std::vector<AttentionBlock> describe(const AttentionArguments& arguments);

// ---- MLP block ----

struct MlpArguments {
  Residual x;
  MlpParameters<Parameter> parameters;
  OptionalTensor branch_scale;
  std::vector<MlpSlice> slices;
  double eps;
  OptionalTensor width_index;

  int64_t hidden() const { return largest(slices, &MlpSlice::hidden); }
};

std::vector<MlpBlock> describe(const MlpArguments& arguments);

// ---- Head ----

struct HeadArguments {
  Residual x;
  HeadParameters<Parameter> parameters;
  int64_t pool_start, pool_stop;
  std::vector<HeadSlice> slices;
  double eps;
  OptionalTensor width_index;

  // The number of columns of the result, which the largest slice determines.
  int64_t width() const {
    return largest(slices, parameters.weight.present() ? &HeadSlice::classes : &HeadSlice::embed);
  }
};

std::vector<Head> describe(const HeadArguments& arguments);

}  // namespace hydravit
