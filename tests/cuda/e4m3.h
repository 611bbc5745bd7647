// E4m3 by its definition, and what packing makes of weights.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "../cpp/oracle.h"
#include "parameters.h"

namespace hydravit::cuda::tests {

using hydravit::tests::Matrix;

inline double e4m3_value(uint8_t code) {
  const int exponent = code >> 3 & 15, fraction = code & 7;
  const double magnitude = exponent > 0 ? std::ldexp(1 + fraction / 8.0, exponent - 7) : std::ldexp(fraction / 8.0, -6);
  return std::copysign((code & 0x7f) == 0x7f ? NAN : magnitude, code & 0x80 ? -1.0 : 1.0);
}
// Ties go to even. 464 is halfway between the largest number and the next one, if there were one; more than that is
// NaN.
inline uint8_t nearest_e4m3(double value) {
  int nearest = 0x7f;
  double least = INFINITY;
  for (int code = 0; code < 0x7f && std::fabs(value) <= 464; code++) {
    const double distance = std::fabs(std::fabs(value) - e4m3_value(static_cast<uint8_t>(code)));
    if (distance < least || (distance == least && code % 2 == 0)) least = distance, nearest = code;
  }
  return static_cast<uint8_t>(nearest | (std::signbit(value) ? 0x80 : 0));
}
// The largest finite weight of the row becomes 448.
inline float e4m3_scale(const Matrix<float>& p, int64_t row) {
  float largest = 0;
  for (int64_t j = 0; j < p.columns; j++)
    if (const float v = p(row, j); std::isfinite(v)) largest = std::max(largest, std::fabs(v));
  return std::max(largest / 448, FLT_MIN);
}
// The parameters as a network with E4m3 weights uses them.
inline std::vector<Matrix<float>> quantised(const NetworkSizes& sizes, std::vector<Matrix<float>> parameters) {
  const std::vector<ParameterSpec> specs = parameter_specs(sizes);
  for (size_t i = 0; i < specs.size(); i++) {
    Matrix<float>& p = parameters[i];
    for (int64_t row = 0; specs[i].weight && row < p.rows; row++) {
      const float scale = e4m3_scale(p, row);
      for (int64_t j = 0; j < p.columns; j++) {
        float& v = p(row, j);
        v = static_cast<float>(e4m3_value(nearest_e4m3(v / scale)) * scale);
      }
    }
  }
  return parameters;
}

}  // namespace hydravit::cuda::tests
