// A subnetwork: what one width reads of every layer. hydravit_kernels/subnetwork.py has the same structs with the same
// fields in the same order. Torch-free; the CPU bindings and the CUDA network share it.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace hydravit {

// Channels [embed_offset, embed_offset + embed) of the residual. The stem needs to know no more.
struct EmbedSlice {
  static constexpr int64_t kIntegers = 2;
  int64_t embed_offset, embed;
};

// Head h reads rows [role_row + h * pitch, ... + head_dim) of the qkv weight for its query and key (value_dim rows for
// its value) and columns [proj_column + h * pitch, ... + value_dim) of the proj weight. Without heads, the block is the
// identity.
struct AttentionSlice {
  static constexpr int64_t kIntegers = 10;  // `scale` travels apart
  int64_t embed_offset, embed, query_row, key_row, value_row, proj_column, heads, head_dim, value_dim, pitch;
  double scale;
};

// Rows [hidden_offset, hidden_offset + hidden) of fc1 and the same columns of fc2. With a hidden of 0, the block is the
// identity.
struct MlpSlice {
  static constexpr int64_t kIntegers = 4;
  int64_t embed_offset, embed, hidden_offset, hidden;
};

// Rows [class_offset, class_offset + classes) of the classifier.
struct HeadSlice {
  static constexpr int64_t kIntegers = 4;
  int64_t embed_offset, embed, class_offset, classes;
};

struct Subnetwork {
  EmbedSlice embed;
  std::vector<AttentionSlice> attention;  // one for each layer
  std::vector<MlpSlice> mlp;              // one for each layer
  HeadSlice head;
  float eps;
};

// ---- The flat form ----
// Python hands over slices as integers in the order of the fields, and the scales of the attention slices apart.

// Reads slice after slice. The caller has checked that there are enough numbers.
class SliceReader {
 public:
  SliceReader(const std::vector<int64_t>& integers, const std::vector<double>& scales)
      : integer_(integers.data()), scale_(scales.data()) {}

  void read(EmbedSlice& slice) { slice = {next(), next()}; }
  void read(AttentionSlice& slice) {
    slice = {next(), next(), next(), next(), next(), next(), next(), next(), next(), next(), *scale_++};
  }
  void read(MlpSlice& slice) { slice = {next(), next(), next(), next()}; }
  void read(HeadSlice& slice) { slice = {next(), next(), next(), next()}; }

 private:
  int64_t next() {
    const int64_t value = *integer_++;
    constexpr int64_t kLimit = int64_t{1} << 31;  // keeps every product of two integers inside int64
    if (value < 0 || value >= kLimit)
      throw std::runtime_error("slices: integers in [0, 2^31) expected, " + std::to_string(value) + " given");
    return value;
  }

  const int64_t* integer_;
  const double* scale_;
};

// Several slices of one kind, one for every width, as the op of one block takes them.
template <class Slice>
std::vector<Slice> read_slices(const std::vector<int64_t>& integers, const std::vector<double>& scales) {
  const size_t count = integers.size() / Slice::kIntegers;
  if (count == 0 || integers.size() % Slice::kIntegers != 0)
    throw std::runtime_error("slices: a positive multiple of " + std::to_string(Slice::kIntegers) +
                             " integers expected, " + std::to_string(integers.size()) + " given");
  if (scales.size() != count)
    throw std::runtime_error("scales: one for each of " + std::to_string(count) + " slices expected, " +
                             std::to_string(scales.size()) + " given");
  std::vector<Slice> slices(count);
  SliceReader reader(integers, scales);
  for (Slice& slice : slices) reader.read(slice);
  return slices;
}
template <class Slice>
std::vector<Slice> read_slices(const std::vector<int64_t>& integers) {
  return read_slices<Slice>(integers, std::vector<double>(integers.size() / Slice::kIntegers));
}

// One subnetwork: the embed slice; for every layer its attention slice, then its MLP slice; the head slice.
inline Subnetwork read_subnetwork(int64_t layers, const std::vector<int64_t>& integers,
                                  const std::vector<double>& scales, double eps) {
  const size_t count = static_cast<size_t>(layers);
  const size_t expected =
      EmbedSlice::kIntegers + HeadSlice::kIntegers + count * (AttentionSlice::kIntegers + MlpSlice::kIntegers);
  if (integers.size() != expected || scales.size() != count)
    throw std::runtime_error("subnetwork: " + std::to_string(expected) + " integers and " + std::to_string(count) +
                             " scales expected for " + std::to_string(count) + " layers, " +
                             std::to_string(integers.size()) + " and " + std::to_string(scales.size()) + " given");
  Subnetwork subnetwork{};
  subnetwork.attention.resize(count);
  subnetwork.mlp.resize(count);
  subnetwork.eps = static_cast<float>(eps);
  SliceReader reader(integers, scales);
  reader.read(subnetwork.embed);
  for (size_t i = 0; i < count; i++) {
    reader.read(subnetwork.attention[i]);
    reader.read(subnetwork.mlp[i]);
  }
  reader.read(subnetwork.head);
  return subnetwork;
}

}  // namespace hydravit
