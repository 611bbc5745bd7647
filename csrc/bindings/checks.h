// The checks that the bindings make before a kernel sees a pointer, and the call of a kernel. Only the bindings include
// this header: it needs torch.
//
// A function that returns a pointer to a slice has checked that the slice lies inside the tensor.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <functional>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "hydravit.h"
#include "parameters.h"

namespace hydravit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Integers = std::vector<int64_t>;

// The half-open range [offset, offset + length).
struct Interval {
  int64_t offset, length;
};

// A message spells a name out only when it is thrown.
inline std::ostream& operator<<(std::ostream& stream, const ParameterName& name) { return stream << name.full(); }

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

// Throws the same exception as STD_TORCH_CHECK, without the function, file and line in front of the message.
#define HYDRAVIT_CHECK(condition, ...)                                          \
  do {                                                                          \
    if (!(condition)) throw std::runtime_error(hydravit::message(__VA_ARGS__)); \
  } while (false)

constexpr int64_t kAny = -1;

inline std::string text(const Integers& values) {
  std::string result = "(";
  for (size_t i = 0; i < values.size(); i++)
    result += (i == 0 ? "" : ", ") + (values[i] == kAny ? std::string("any") : std::to_string(values[i]));
  return result + ")";
}

inline Integers shape_of(const Tensor& tensor) {
  Integers shape;
  for (int64_t i = 0; i < tensor.dim(); i++) shape.push_back(tensor.size(i));
  return shape;
}

inline Integers strides_of(const Tensor& tensor) {
  Integers strides;
  for (int64_t i = 0; i < tensor.dim(); i++) strides.push_back(tensor.stride(i));
  return strides;
}

// The dtype as torch spells it in Python.
inline std::string name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::BFloat16:
      return "bfloat16";
    default:
      return "another (torch's number " + std::to_string(static_cast<int>(type)) + ")";
  }
}

// Checks device, dtype and that there is memory.
inline void check_kind(const Tensor& tensor, const ParameterName& name, ScalarType type) {
  HYDRAVIT_CHECK(tensor.is_cpu(), name, ": a CPU tensor expected, as x is one; a tensor of another device given");
  HYDRAVIT_CHECK(tensor.scalar_type() == type, name, ": dtype ", name_of(type), " expected, ",
                 name_of(tensor.scalar_type()), " given");
  HYDRAVIT_CHECK(tensor.const_data_ptr() != nullptr || tensor.numel() == 0, name,
                 ": a tensor with memory expected, one whose storage was freed given");
}

inline void check_shape(const Tensor& tensor, const ParameterName& name, const Integers& expected) {
  check_kind(tensor, name, ScalarType::Float);
  bool right = tensor.dim() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; right && i < expected.size(); i++)
    right = expected[i] == kAny || tensor.size(static_cast<int64_t>(i)) == expected[i];
  HYDRAVIT_CHECK(right, name, ": shape ", text(expected), " expected, ", text(shape_of(tensor)), " given");
}

// Checks the shape too, and that the innermost stride is 1, but in an empty batch, where torch makes any strides. An op
// never copies a tensor to make it so.
inline void check(const Tensor& tensor, const ParameterName& name, const Integers& expected) {
  check_shape(tensor, name, expected);
  const int64_t last = tensor.dim() - 1;
  HYDRAVIT_CHECK(tensor.size(last) <= 1 || tensor.stride(last) == 1 || tensor.numel() == 0, name,
                 ": innermost stride 1 expected, ", tensor.stride(last), " given");
}

inline void check_inside(const ParameterName& name, const char* axis, const Interval& interval, int64_t size) {
  HYDRAVIT_CHECK(interval.offset >= 0 && interval.length >= 0 && interval.offset + interval.length <= size, name, ": ",
                 axis, " [", interval.offset, ", ", interval.offset + interval.length,
                 ") of the slice expected inside [0, ", size, ")");
}

inline const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }
inline float* mutable_floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// A parameter comes in one of three forms: a tensor, perhaps with the buffer that its gradient is added to; a part of a
// packed network, in panels if it is a weight; or absent.
class Parameter {
 public:
  Parameter(ParameterName name, const Tensor& tensor, const OptionalTensor* gradient = nullptr)
      : name_(name), tensor_(&tensor), gradient_(given(gradient)) {}
  Parameter(ParameterName name, const OptionalTensor& tensor, const OptionalTensor* gradient = nullptr)
      : name_(name), tensor_(given(&tensor)), gradient_(given(gradient)) {}
  // `panel`: the rows of a panel; 0: the parameter does not lie in panels.
  Parameter(ParameterName name, const float* packed, Integers shape, int64_t panel)
      : name_(name), packed_(packed), packed_shape_(std::move(shape)), panel_(panel) {}

  const ParameterName& name() const { return name_; }
  bool present() const { return tensor_ != nullptr || packed_ != nullptr; }
  const Tensor* gradient() const { return gradient_; }
  const Tensor& tensor() const { return *tensor_; }
  bool packed() const { return packed_ != nullptr; }
  int64_t dim() const { return tensor_ == nullptr ? static_cast<int64_t>(packed_shape_.size()) : tensor_->dim(); }
  int64_t size(int64_t axis) const {
    return tensor_ == nullptr ? packed_shape_[static_cast<size_t>(axis)] : tensor_->size(axis);
  }
  Integers shape() const { return tensor_ == nullptr ? packed_shape_ : shape_of(*tensor_); }

  // Checks the parameter and its gradient: shape `expected`, unit innermost stride.
  void check_both(const Integers& expected) const {
    if (tensor_ != nullptr) check(*tensor_, name_, expected);
    if (packed_ != nullptr) {
      bool right = expected.size() == packed_shape_.size();
      for (size_t i = 0; right && i < expected.size(); i++)
        right = expected[i] == kAny || expected[i] == packed_shape_[i];
      HYDRAVIT_CHECK(right, "packed ", name_, ": shape ", text(expected), " expected, ", text(packed_shape_), " given");
    }
    if (gradient_ == nullptr) return;
    const std::string gradient_name = std::string("grad_") + name_.name;
    HYDRAVIT_CHECK(present(), gradient_name, ": None expected, as ", name_, " is None; a tensor given");
    check(*gradient_, gradient_name.c_str(), shape_of(*tensor_));
  }

  // (D,)
  const float* vector(const Interval& slice) const {
    if (!present()) return nullptr;
    check_inside(name_, "elements", slice, size(0));
    return (packed_ != nullptr ? packed_ : floats(*tensor_)) + slice.offset;
  }
  float* vector_gradient(const Interval& slice) const {
    return gradient_ == nullptr ? nullptr : mutable_floats(*gradient_) + slice.offset;
  }

  // The last two axes are rows and columns. `touching` says that the heads of the slice lie side by side.
  Weight matrix(const Interval& rows, const Interval& columns, bool touching = true) const {
    if (!present()) return {nullptr, 0};
    const int64_t axis = dim() - 2;
    check_inside(name_, "rows", rows, size(axis));
    check_inside(name_, "columns", columns, size(axis + 1));
    if (panel_ != 0) return panels_of(rows, columns.offset, size(axis + 1), touching);
    const int64_t stride = packed_ != nullptr ? size(axis + 1) : tensor_->stride(axis);
    return {(packed_ != nullptr ? packed_ : floats(*tensor_)) + rows.offset * stride + columns.offset, stride};
  }
  // The same for a packed weight of `width` columns.
  Weight panels_of(const Interval& rows, int64_t column, int64_t width, bool touching = true) const {
    HYDRAVIT_CHECK(rows.length == 0 || (touching && rows.offset % kPanelMultiple == 0), "packed ", name_,
                   ": rows that lie side by side from a multiple of ", kPanelMultiple, " on expected, ", rows.length,
                   " from ", rows.offset, touching ? "" : ", apart,", " given");
    return {nullptr, 0, packed_ + rows.offset * width + panel_ * column, panel_ * width};
  }
  MutableWeight matrix_gradient(const Interval& rows, const Interval& columns) const {
    if (gradient_ == nullptr) return {nullptr, 0};
    const int64_t axis = gradient_->dim() - 2;
    return {mutable_floats(*gradient_) + rows.offset * gradient_->stride(axis) + columns.offset,
            gradient_->stride(axis)};
  }

 private:
  static const Tensor* given(const OptionalTensor* tensor) {
    return tensor != nullptr && tensor->has_value() ? &**tensor : nullptr;
  }

  ParameterName name_;
  const Tensor* tensor_ = nullptr;
  const Tensor* gradient_ = nullptr;
  const float* packed_ = nullptr;
  Integers packed_shape_;
  int64_t panel_ = 0;
};

// A tensor (B, N, channels), or empty where an output is not wanted.
inline Tokens tokens_of(const Tensor& tensor) { return {floats(tensor), tensor.stride(0), tensor.stride(1)}; }
inline MutableTokens mutable_tokens_of(const Tensor& tensor) {
  if (tensor.dim() != 3) return {nullptr, 0, 0};
  return {mutable_floats(tensor), tensor.stride(0), tensor.stride(1)};
}

// ---- Which images share a kernel call ----

// Checks `width_index`, which says which of `count` slices every image uses. Without it, there is only one slice.
inline void check_width_index(const OptionalTensor& width_index, int64_t count, int64_t batch) {
  if (!width_index.has_value()) {
    HYDRAVIT_CHECK(count == 1, "width_index: an int64 tensor (", batch, ",) expected for ", count,
                   " slices, None given");
    return;
  }
  check_kind(*width_index, "width_index", ScalarType::Long);
  HYDRAVIT_CHECK(width_index->dim() == 1 && width_index->size(0) == batch, "width_index: shape (", batch,
                 ",) expected, ", text(shape_of(*width_index)), " given");
  HYDRAVIT_CHECK(width_index->is_contiguous(), "width_index: a contiguous tensor expected");
  const int64_t* values = static_cast<const int64_t*>(width_index->const_data_ptr());
  for (int64_t image = 0; image < batch; image++)
    HYDRAVIT_CHECK(values[image] >= 0 && values[image] < count, "width_index: values in [0, ", count, ") expected, ",
                   values[image], " given for image ", image);
}

// Calls body(image, count, slice) for every run [image, image + count) of images of one slice.
template <class Body>
void for_each_run(const OptionalTensor& width_index, int64_t batch, const Body& body) {
  const int64_t* values =
      width_index.has_value() ? static_cast<const int64_t*>(width_index->const_data_ptr()) : nullptr;
  for (int64_t image = 0; image < batch;) {
    int64_t end = batch;
    if (values != nullptr)
      for (end = image + 1; end < batch && values[end] == values[image];) end++;
    body(image, end - image, values == nullptr ? 0 : values[image]);
    image = end;
  }
}

inline Tokens from_image(const Tokens& tokens, int64_t image) {
  return {tokens.data + image * tokens.image_stride, tokens.image_stride, tokens.token_stride};
}
inline MutableTokens from_image(const MutableTokens& tokens, int64_t image) {
  if (tokens.data == nullptr) return tokens;
  return {tokens.data + image * tokens.image_stride, tokens.image_stride, tokens.token_stride};
}
inline const float* from_image(const float* values, int64_t image) {
  return values == nullptr ? nullptr : values + image;
}

// Zeroes channels [embed, width) of `images` images, beyond what a narrower width computes.
inline void zero_beyond(const MutableTokens& tokens, int64_t images, int64_t count, int64_t embed, int64_t width) {
  if (tokens.data == nullptr || embed == width) return;
  for (int64_t image = 0; image < images; image++)
    for (int64_t token = 0; token < count; token++) {
      float* row = tokens.data + image * tokens.image_stride + token * tokens.token_stride;
      std::fill(row + embed, row + width, 0.0f);
    }
}

// ---- The call ----

inline Threads torch_threads() {
  const auto parallel_for = [](int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context) {
    STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
  };
  return {parallel_for, static_cast<int64_t>(torch::stable::get_num_threads())};
}

inline void check_status(int status) { HYDRAVIT_CHECK(status == kOk, "hydravit: ", status_text(status)); }

}  // namespace hydravit
