// Layer norm over the active channels, and sums over rows. A row is a token; rows are ordered by (image, token).
#pragma once

#include "gemm.h"
#include "parallel.h"
#include "vector.h"

namespace hydravit::HYDRAVIT_ISA {

// Mean and 1 / standard deviation of one row.
struct RowStatistics {
  float mean, scale;
};

struct Norm {
  int64_t rows, channels;
  float eps;
  const float* x;  // (rows, channels)
  Axis x_rows;
  const float *weight, *bias;  // (channels)
};

// Normalises rows [begin, end), by one thread. y begins with row `begin`; its rows lie `y_stride` apart, its groups of
// kPanel channels `y_panel` apart. `statistics` (rows, 2) is nullable.
void normalize_rows(const Norm& norm, int64_t begin, int64_t end, float* y, int64_t y_stride, float* statistics,
                    int64_t y_panel = kPanel);
// Normalises all rows into y (rows, channels), which is contiguous.
void normalize(const Threads& threads, const Norm& norm, float* y, float* statistics);

// dx = residual + the gradient through the norm (residual nullable).
struct NormGradients {
  const float* grad;  // of the normalised rows, `grad_stride` apart
  int64_t grad_stride;
  const float* statistics;  // (rows, 2)
  const float* residual;
  Axis residual_rows;
  float* x;
  Axis x_rows;
};
// Writes dx of rows [begin, end), by one thread.
void normalize_backward_rows(const Norm& norm, const NormGradients& gradients, int64_t begin, int64_t end);
// Adds the gradients of the norm's weight and bias to `weight` and `bias`, which are nullable.
void add_norm_gradients(const Threads& threads, const Norm& norm, const NormGradients& gradients, float* weight,
                        float* bias);

// sums[columns.at(c)] += the sum over rows of term(row, c, count), one vector of columns [c, c + count) at a time. The
// order of the terms does not depend on the thread count. Rows are summed kTerms at a time, and then these sums, which
// keeps the precision of long sums.
template <class Term>
void add_column_sums(const Threads& threads, int64_t rows, int64_t channels, float* sums, const Axis& columns,
                     const Term& term) {
  constexpr int64_t kTerms = 16;
  parallel_ranges(threads, divide_up(channels, kWidth), rows * kWidth, [&](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < rows; row += kTerms) {
      const int64_t last = smaller(rows, row + kTerms);
      for (int64_t c = begin * kWidth; c < smaller(channels, end * kWidth); c += kWidth) {
        const int64_t count = smaller<int64_t>(kWidth, channels - c);
        Vec total{};
        for (int64_t r = row; r < last; r++) total += term(r, c, count);
        float lanes[kWidth];
        store(lanes, total);
        for (int64_t i = 0; i < count; i++) sums[columns.at(c + i)] += lanes[i];
      }
    }
  });
}

// The same sums for a plain matrix (rows, channels).
void add_column_sums(const Threads& threads, int64_t rows, int64_t channels, float* sums, const Axis& columns,
                     const float* matrix, const Axis& matrix_rows);

// The gradient z (rows, channels) that enters a residual branch: grad * branch_scale * layer_scale. The scales are
// nullable.
struct Branch {
  int64_t rows, channels, tokens;
  const float* grad;
  Axis grad_rows;
  const float *branch_scale, *layer_scale;
};
// Writes z of rows [begin, end), by one thread.
void scale_branch_rows(const Branch& branch, float* z, int64_t z_stride, int64_t begin, int64_t end);
// Adds the gradient of the layer scale: sums[c] += the sum over rows of grad * branch_scale * out.
void add_layer_scale_gradient(const Threads& threads, const Branch& branch, const float* out, int64_t out_stride,
                              float* sums);

// Copies a matrix to other strides: rows [begin, end) by one thread, or all rows split over the threads.
void copy_rows(int64_t begin, int64_t end, int64_t channels, const float* from, const Axis& from_rows, float* to,
               const Axis& to_rows);
void copy_rows(const Threads& threads, int64_t rows, int64_t channels, const float* from, const Axis& from_rows,
               float* to, const Axis& to_rows);

}  // namespace hydravit::HYDRAVIT_ISA
