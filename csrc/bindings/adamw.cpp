// The op of the optimizer on the CPU.
#include "checks.h"

namespace hydravit {
namespace {

constexpr int64_t kRectangleIntegers = 6;  // tensor, step, offset, rows, row stride, columns
constexpr int64_t kStepNumbers = sizeof(AdamwStep) / sizeof(float);

using Tensors = std::vector<Tensor>;

// The number of elements from the first to the last one of a tensor, with the gaps between them.
int64_t extent_of(const Tensor& tensor) {
  int64_t extent = 1;
  for (int64_t axis = 0; axis < tensor.dim(); axis++) extent += (tensor.size(axis) - 1) * tensor.stride(axis);
  return tensor.numel() == 0 ? 0 : extent;
}

void check_like(const Tensors& tensors, const char* name, const Tensors& weights) {
  HYDRAVIT_CHECK(tensors.size() == weights.size(), name, ": as many tensors as weights expected, ", tensors.size(),
                 " for ", weights.size(), " given");
  for (size_t i = 0; i < tensors.size(); i++) {
    check_kind(tensors[i], name, ScalarType::Float);
    HYDRAVIT_CHECK(shape_of(tensors[i]) == shape_of(weights[i]) && strides_of(tensors[i]) == strides_of(weights[i]),
                   name, "[", i, "]: shape ", text(shape_of(weights[i])), " and strides ", text(strides_of(weights[i])),
                   " of the weight expected, ", text(shape_of(tensors[i])), " and ", text(strides_of(tensors[i])),
                   " given");
  }
}

void check_table(const Tensor& table, const char* name, ScalarType type, int64_t columns) {
  check_kind(table, name, type);
  HYDRAVIT_CHECK(table.dim() == 2 && table.size(1) == columns && table.is_contiguous(), name,
                 ": a contiguous tensor of shape ", text({kAny, columns}), " expected, ", text(shape_of(table)),
                 " given");
}

void adamw(const Tensors& weights, const Tensors& gradients, const Tensors& firsts, const Tensors& seconds,
           const Tensors& averages, const Tensor& rectangles, const Tensor& steps) {
  check_like(weights, "weights", weights);
  check_like(gradients, "gradients", weights);
  check_like(firsts, "firsts", weights);
  check_like(seconds, "seconds", weights);
  if (!averages.empty()) check_like(averages, "averages", weights);
  check_table(rectangles, "rectangles", ScalarType::Long, kRectangleIntegers);
  check_table(steps, "steps", ScalarType::Float, kStepNumbers);

  Integers extents;
  for (const Tensor& weight : weights) extents.push_back(extent_of(weight));
  const auto* all_steps = static_cast<const AdamwStep*>(steps.const_data_ptr());
  const auto* row = static_cast<const int64_t*>(rectangles.const_data_ptr());
  std::vector<AdamwRectangle> work;
  work.reserve(static_cast<size_t>(rectangles.size(0)));
  for (int64_t i = 0; i < rectangles.size(0); i++, row += kRectangleIntegers) {
    const int64_t tensor = row[0], step = row[1], offset = row[2], rows = row[3], stride = row[4], columns = row[5];
    HYDRAVIT_CHECK(tensor >= 0 && tensor < static_cast<int64_t>(weights.size()) && step >= 0 && step < steps.size(0),
                   "rectangles: tensor in [0, ", weights.size(), ") and step in [0, ", steps.size(0), ") expected, ",
                   tensor, " and ", step, " given");
    const auto t = static_cast<size_t>(tensor);
    const int64_t extent = extents[t];
    HYDRAVIT_CHECK(offset >= 0 && rows > 0 && columns > 0 && offset <= extent - columns &&
                       (rows == 1 || (stride >= columns && stride <= (extent - columns - offset) / (rows - 1))),
                   "rectangles: rows of columns inside the ", extent, " elements of tensor ", tensor,
                   " expected; offset ", offset, ", ", rows, " rows ", stride, " apart, ", columns, " columns given");
    work.push_back({mutable_floats(weights[t]) + offset, floats(gradients[t]) + offset,
                    mutable_floats(firsts[t]) + offset, mutable_floats(seconds[t]) + offset,
                    averages.empty() ? nullptr : mutable_floats(averages[t]) + offset, rows, stride, columns,
                    all_steps + step});
  }
  check_status(adamw_cpu({work.data(), static_cast<int64_t>(work.size())}, torch_threads()));
}

}  // namespace
}  // namespace hydravit

STABLE_TORCH_LIBRARY_IMPL(hydravit, CPU, m) { m.impl("adamw_native", TORCH_BOX(&hydravit::adamw)); }
