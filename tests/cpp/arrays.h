// Arrays as the kernels see them: strided, each in its own buffer, which is NaN outside the slice.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "hydravit.h"

namespace hydravit::tests {

struct Axis {
  int64_t size, stride;
};

// The row axes and the column axes of an array make a plain matrix of it.
struct Array {
  static constexpr int64_t kLead = 3;  // floats in front of the slice

  std::vector<Axis> row_axes, column_axes;
  std::vector<float> memory;  // ends where the slice ends, so that the address sanitizer sees accesses beyond

  Array(std::vector<Axis> rows, std::vector<Axis> columns)
      : row_axes(std::move(rows)), column_axes(std::move(columns)) {
    const std::vector<int64_t> used = offsets();
    memory.assign(used.empty() ? kLead : used.back() + 1, std::numeric_limits<float>::quiet_NaN());
  }

  float* data() { return memory.data() + kLead; }
  int64_t row_stride() const { return row_axes.empty() ? 0 : row_axes.back().stride; }

  // The offsets of the elements in `memory`, row by row.
  std::vector<int64_t> offsets() const {
    std::vector<int64_t> result{kLead};
    for (const std::vector<Axis>* axes : {&row_axes, &column_axes})
      for (const Axis& axis : *axes) {
        std::vector<int64_t> next;
        for (const int64_t base : result)
          for (int64_t i = 0; i < axis.size; i++) next.push_back(base + i * axis.stride);
        result = std::move(next);
      }
    return result;
  }
  std::vector<float> values() const {
    std::vector<float> result;
    for (const int64_t offset : offsets()) result.push_back(memory[offset]);
    return result;
  }
  bool untouched_outside() const {
    std::vector<bool> inside(memory.size());
    for (const int64_t offset : offsets()) inside[offset] = true;
    for (size_t i = 0; i < memory.size(); i++)
      if (!inside[i] && !std::isnan(memory[i])) return false;
    return true;
  }
};

inline int64_t size_of(const std::vector<Axis>& axes) {
  int64_t size = 1;
  for (const Axis& axis : axes) size *= axis.size;
  return size;
}

// A weight whose rows neither touch nor are aligned.
constexpr int64_t kGap = 5;

inline Array vector(int64_t size) { return {{}, {{size, 1}}}; }
inline Array weight(int64_t rows, int64_t columns) { return {{{rows, columns + kGap}}, {{columns, 1}}}; }
inline Array tokens(int64_t batch, int64_t count, int64_t channels) {
  const int64_t stride = channels + kGap;
  return {{{batch, count * stride + kGap}, {count, stride}}, {{channels, 1}}};
}
// Heads lie `pitch` apart: along a vector, or along the rows or the columns of a weight.
inline Array head_vector(int64_t heads, int64_t dim, int64_t pitch) { return {{}, {{heads, pitch}, {dim, 1}}}; }
inline Array head_rows(int64_t heads, int64_t dim, int64_t pitch, int64_t columns) {
  const int64_t stride = columns + kGap;
  return {{{heads, pitch * stride}, {dim, stride}}, {{columns, 1}}};
}
inline Array head_columns(int64_t rows, int64_t heads, int64_t dim, int64_t pitch) {
  return {{{rows, heads * pitch + kGap}}, {{heads, pitch}, {dim, 1}}};
}

// Normally distributed values; a product with a weight keeps the variance of its operand.
inline Array random(Array array, std::mt19937& generator) {
  const int64_t columns = array.row_axes.size() == 1 || array.row_axes.size() == 2 ? size_of(array.column_axes) : 1;
  std::normal_distribution<float> normal(0.0f, 1.0f / std::sqrt(static_cast<float>(columns)));
  for (const int64_t offset : array.offsets()) array.memory[offset] = normal(generator);
  return array;
}

// Arrays by name. The kernels get a null pointer for an absent array. The name of a gradient begins with `d_`.
using Arrays = std::map<std::string, Array>;

inline float* data(Arrays& arrays, const std::string& name) {
  const auto found = arrays.find(name);
  return found == arrays.end() ? nullptr : found->second.data();
}
inline MutableTokens mutable_tokens(Arrays& arrays, const std::string& name) {
  const auto found = arrays.find(name);
  if (found == arrays.end()) return {nullptr, 0, 0};
  return {found->second.data(), found->second.row_axes[0].stride, found->second.row_axes[1].stride};
}
inline Tokens const_tokens(Arrays& arrays, const std::string& name) {
  const MutableTokens tokens = mutable_tokens(arrays, name);
  return {tokens.data, tokens.image_stride, tokens.token_stride};
}
inline MutableWeight mutable_weight(Arrays& arrays, const std::string& name) {
  const auto found = arrays.find(name);
  return found == arrays.end() ? MutableWeight{nullptr, 0}
                               : MutableWeight{found->second.data(), found->second.row_stride()};
}
inline Weight const_weight(Arrays& arrays, const std::string& name) {
  const MutableWeight weight = mutable_weight(arrays, name);
  return {weight.data, weight.row_stride};
}

}  // namespace hydravit::tests
