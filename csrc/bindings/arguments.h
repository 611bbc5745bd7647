// What an op of hydravit_kernels/ops.py is given, and how that becomes its kernel's arguments.
//
// An op checks what it is given, allocates its outputs, folds the slices' offsets into base pointers and calls one
// kernel per run of consecutive images of the same slice. Parameters are never copied: what a kernel cannot read in
// place is an error. `describe` makes one kernel argument for each slice, for all images.
#pragma once

#include "checks.h"

namespace hydravit {

inline Tensor empty_output(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

inline const float* check_branch_scale(const OptionalTensor& branch_scale, int64_t batch) {
  const Parameter parameter("branch_scale", branch_scale);
  parameter.check_both({batch});
  return parameter.vector({0, batch});
}

// The residual stream: x (B, N, the widest embed), or, inside the whole network, in nobody's tensor.
struct Stream {
  int64_t batch, tokens;
  const Tensor* x;

  Stream(const Tensor& x) : batch(x.dim() == 3 ? x.size(0) : 0), tokens(x.dim() == 3 ? x.size(1) : 0), x(&x) {}
  Stream(int64_t batch, int64_t tokens) : batch(batch), tokens(tokens), x(nullptr) {}

  Tokens data(int64_t width) const {
    if (x == nullptr) return {};
    check(*x, "x", {kAny, kAny, width});
    HYDRAVIT_CHECK(tokens > 0, "x: at least one token expected, shape ", text(shape_of(*x)), " given");
    return tokens_of(*x);
  }
};

// ---- Stem ----

constexpr int64_t kEmbedIntegers = 2;

struct StemArguments {
  Tensor images;
  Parameter weight, bias, cls_token, reg_token, pos_embed;
  Integers slices;
  OptionalTensor subnet;

  int64_t batch() const { return images.size(0); }
  int64_t width() const { return largest(slices, kEmbedIntegers, 1); }
  static int64_t tokens_of(const Parameter& prefix) { return prefix.present() ? prefix.size(1) : 0; }
  int64_t tokens() const {
    return tokens_of(cls_token) + tokens_of(reg_token) +
           images.size(2) / weight.size(2) * (images.size(3) / weight.size(3));
  }
};

std::vector<Stem> describe(const StemArguments& arguments);

// ---- Attention block ----

constexpr int64_t kAttentionIntegers = 10;

struct AttentionArguments {
  Stream x;
  Parameter norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, layer_scale;
  OptionalTensor branch_scale;
  Integers slices;
  std::vector<double> scales;
  double eps;
  OptionalTensor subnet;
  int64_t queries;

  // Sizes of what forward saves: the largest of any slice.
  int64_t qkv = 0, attended = 0, heads = 0;
};

std::vector<AttentionBlock> describe(AttentionArguments& arguments);

// ---- MLP block ----

constexpr int64_t kMlpIntegers = 4;

struct MlpArguments {
  Stream x;
  Parameter norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale;
  OptionalTensor branch_scale;
  Integers slices;
  double eps;
  OptionalTensor subnet;

  int64_t hidden() const { return largest(slices, kMlpIntegers, 3); }
};

std::vector<MlpBlock> describe(const MlpArguments& arguments);

// ---- Head ----

constexpr int64_t kHeadIntegers = 4;

struct HeadArguments {
  Stream x;
  Parameter norm_weight, norm_bias, weight, bias;
  int64_t pool_start, pool_stop;
  Integers slices;
  double eps;
  OptionalTensor subnet;

  // Of the result: the largest of any slice.
  int64_t width() const { return largest(slices, kHeadIntegers, weight.present() ? 3 : 1); }
};

std::vector<Head> describe(const HeadArguments& arguments);

}  // namespace hydravit
