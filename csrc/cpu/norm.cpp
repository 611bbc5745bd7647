#include "norm.h"

namespace hydravit::HYDRAVIT_ISA {

namespace {

RowStatistics statistics_of(const float* x, int64_t channels, float eps) {
  const int64_t vectors = divide_up(channels, kWidth);
  const Vec total = sum_over(vectors, [&](int64_t i) { return load(x + i * kWidth, channels - i * kWidth); });
  const float mean = sum(total) / static_cast<float>(channels);
  const Vec squares = sum_over(vectors, [&](int64_t i) {
    const Vec centred = load(x + i * kWidth, channels - i * kWidth, mean) - mean;
    return centred * centred;
  });
  const float variance = sum(squares) / static_cast<float>(channels);
  return {mean, 1.0f / __builtin_sqrtf(variance + eps)};
}

}  // namespace

void normalize_rows(const Norm& norm, int64_t begin, int64_t end, float* y, int64_t y_stride, float* statistics,
                    int64_t y_panel) {
  for (int64_t row = begin; row < end; row++) {
    const float* x = norm.x + norm.x_rows.at(row);
    float* to = y + (row - begin) * y_stride;
    const RowStatistics s = statistics_of(x, norm.channels, norm.eps);
    for (int64_t c = 0; c < norm.channels; c += kWidth) {
      const int64_t count = norm.channels - c;
      const Vec normalised = (load(x + c, count) - s.mean) * s.scale;
      store(to + in_panels(c, y_panel), normalised * load(norm.weight + c, count) + load(norm.bias + c, count), count);
    }
    if (statistics != nullptr) statistics[2 * row] = s.mean, statistics[2 * row + 1] = s.scale;
  }
}

void normalize(const Threads& threads, const Norm& norm, float* y, float* statistics) {
  parallel_ranges(threads, norm.rows, 4 * norm.channels, [&](int64_t begin, int64_t end) {
    normalize_rows(norm, begin, end, y + begin * norm.channels, norm.channels, statistics);
  });
}

void normalize_backward_rows(const Norm& norm, const NormGradients& gradients, int64_t begin, int64_t end) {
  // With g = grad * weight and n = the normalised row: dx = scale * (g - mean(g) - n * mean(g * n)).
  for (int64_t row = begin; row < end; row++) {
    const float* x = norm.x + norm.x_rows.at(row);
    const float* grad = gradients.grad + row * gradients.grad_stride;
    const float centre = gradients.statistics[2 * row], scale = gradients.statistics[2 * row + 1];
    const auto weighted = [&](int64_t c, int64_t count) {
      return load(grad + c, count) * load(norm.weight + c, count);
    };
    const auto normalised = [&](int64_t c, int64_t count) { return (load(x + c, count, centre) - centre) * scale; };
    Vec total{}, product{};
    for (int64_t c = 0; c < norm.channels; c += kWidth) {
      const Vec g = weighted(c, norm.channels - c);
      total += g;
      product += g * normalised(c, norm.channels - c);
    }
    const float mean = sum(total) / static_cast<float>(norm.channels);
    const float slope = sum(product) / static_cast<float>(norm.channels);
    const float* residual =
        gradients.residual == nullptr ? nullptr : gradients.residual + gradients.residual_rows.at(row);
    float* to = gradients.x + gradients.x_rows.at(row);
    for (int64_t c = 0; c < norm.channels; c += kWidth) {
      const int64_t count = norm.channels - c;
      Vec dx = scale * (weighted(c, count) - mean - normalised(c, count) * slope);
      if (residual != nullptr) dx += load(residual + c, count);
      store(to + c, dx, count);
    }
  }
}

void add_norm_gradients(const Threads& threads, const Norm& norm, const NormGradients& gradients, float* weight,
                        float* bias) {
  const auto grad = [&](int64_t row, int64_t c, int64_t count) {
    return load(gradients.grad + row * gradients.grad_stride + c, count);
  };
  if (weight != nullptr)
    add_column_sums(threads, norm.rows, norm.channels, weight, {}, [&](int64_t row, int64_t c, int64_t count) {
      const float mean = gradients.statistics[2 * row], scale = gradients.statistics[2 * row + 1];
      return grad(row, c, count) * ((load(norm.x + norm.x_rows.at(row) + c, count, mean) - mean) * scale);
    });
  if (bias != nullptr) add_column_sums(threads, norm.rows, norm.channels, bias, {}, grad);
}

void add_column_sums(const Threads& threads, int64_t rows, int64_t channels, float* sums, const Axis& columns,
                     const float* matrix, const Axis& matrix_rows) {
  add_column_sums(threads, rows, channels, sums, columns,
                  [&](int64_t row, int64_t c, int64_t count) { return load(matrix + matrix_rows.at(row) + c, count); });
}

void scale_branch_rows(const Branch& branch, float* z, int64_t z_stride, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const float* grad = branch.grad + branch.grad_rows.at(row);
    const Vec factor = splat(branch.branch_scale == nullptr ? 1.0f : branch.branch_scale[row / branch.tokens]);
    for (int64_t c = 0; c < branch.channels; c += kWidth) {
      const int64_t count = branch.channels - c;
      Vec value = load(grad + c, count) * factor;
      if (branch.layer_scale != nullptr) value *= load(branch.layer_scale + c, count);
      store(z + row * z_stride + c, value, count);
    }
  }
}

void add_layer_scale_gradient(const Threads& threads, const Branch& branch, const float* out, int64_t out_stride,
                              float* sums) {
  add_column_sums(threads, branch.rows, branch.channels, sums, {}, [&](int64_t row, int64_t c, int64_t count) {
    const Vec factor = splat(branch.branch_scale == nullptr ? 1.0f : branch.branch_scale[row / branch.tokens]);
    return load(branch.grad + branch.grad_rows.at(row) + c, count) * load(out + row * out_stride + c, count) * factor;
  });
}

void copy_rows(int64_t begin, int64_t end, int64_t channels, const float* from, const Axis& from_rows, float* to,
               const Axis& to_rows) {
  for (int64_t row = begin; row < end; row++)
    std::memcpy(to + to_rows.at(row), from + from_rows.at(row), static_cast<size_t>(channels) * sizeof(float));
}

void copy_rows(const Threads& threads, int64_t rows, int64_t channels, const float* from, const Axis& from_rows,
               float* to, const Axis& to_rows) {
  parallel_ranges(threads, rows, channels,
                  [&](int64_t begin, int64_t end) { copy_rows(begin, end, channels, from, from_rows, to, to_rows); });
}

}  // namespace hydravit::HYDRAVIT_ISA
