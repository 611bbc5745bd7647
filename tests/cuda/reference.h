// The network in plain loops over the full parameters, in double. With a `Round` that rounds to a 16-bit dtype after
// every operation it computes what eager PyTorch does, which sets the error budget of the kernels.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <functional>
#include <random>
#include <vector>

#include "plan.h"

namespace hydravit::cuda::tests {

struct Matrix {
  int64_t rows = 0, columns = 0;  // 0: the model lacks this parameter
  std::vector<float> values;

  bool present() const { return rows > 0; }
  double at(int64_t row, int64_t column) const { return values[row * columns + column]; }
};

// Pointers to the parameters that lie in `in_order`.
template <class Matrices>
auto by_name(const NetworkSizes& sizes, Matrices& in_order) {
  auto* next = in_order.data();
  return read_parameters(sizes, [&](const ParameterSpec&) { return next++; });
}

inline Subnetwork prefix(const NetworkSizes& n, int64_t heads, int64_t hidden) {
  const int64_t embed = heads * kHeadDim;
  const AttentionSlice attention{0, embed, 0, n.embed, 2 * n.embed, 0, heads, kHeadDim, kHeadDim, kHeadDim, 0.125};
  const MlpSlice mlp{0, embed, 0, hidden};
  return {{0, embed}, std::vector(n.layers, attention), std::vector(n.layers, mlp), {0, embed, 0, n.classes}, 1e-6f};
}

// ---- E4m3 by its definition ----

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
inline float e4m3_scale(const Matrix& p, int64_t row) {
  float largest = 0;
  for (int64_t j = 0; j < p.columns; j++)
    if (const float v = p.values[row * p.columns + j]; std::isfinite(v)) largest = std::max(largest, std::fabs(v));
  return std::max(largest / 448, FLT_MIN);
}
// The parameters as a network with E4m3 weights uses them.
inline std::vector<Matrix> quantised(const NetworkSizes& sizes, std::vector<Matrix> parameters) {
  const std::vector<ParameterSpec> specs = parameter_specs(sizes);
  for (size_t i = 0; i < specs.size(); i++) {
    Matrix& p = parameters[i];
    for (int64_t row = 0; specs[i].weight && row < p.rows; row++) {
      const float scale = e4m3_scale(p, row);
      for (int64_t j = 0; j < p.columns; j++) {
        float& v = p.values[row * p.columns + j];
        v = static_cast<float>(e4m3_value(nearest_e4m3(v / scale)) * scale);
      }
    }
  }
  return parameters;
}

using Round = std::function<double(double)>;
using Rows = std::vector<std::vector<double>>;

class Reference {
 public:
  Reference(const NetworkSizes& sizes, const Subnetwork& subnetwork, const std::vector<Matrix>& in_order,
            const Round& round)
      : sizes_(sizes),
        subnetwork_(subnetwork),
        embed_(subnetwork.embed.embed),
        embed_offset_(subnetwork.embed.embed_offset),
        parameters_(by_name(sizes, in_order)),
        round_(round) {}

  // Computes the logits of one image (channels, height, width).
  std::vector<double> run(const float* image) const {
    Rows x = stem(image, parameters_.stem);
    for (int64_t i = 0; i < sizes_.layers; i++) {
      if (subnetwork_.attention[i].heads > 0) attention_block(x, parameters_.attention[i], subnetwork_.attention[i]);
      if (subnetwork_.mlp[i].hidden > 0) mlp_block(x, parameters_.mlp[i], subnetwork_.mlp[i]);
    }
    return head(x, parameters_.head);
  }

 private:
  using P = const Matrix*;

  double parameter(P p, int64_t row, int64_t column, double absent) const {
    return p->present() ? round_(p->at(row, column)) : absent;
  }

  Rows linear(const Rows& x, P weight, int64_t row, int64_t column, int64_t rows, P bias, int64_t bias_at) const {
    Rows y(x.size(), std::vector<double>(rows));
    for (size_t i = 0; i < x.size(); i++)
      for (int64_t j = 0; j < rows; j++) {
        double sum = 0;
        for (size_t k = 0; k < x[i].size(); k++) sum += x[i][k] * round_(weight->at(row + j, column + int64_t(k)));
        y[i][j] = round_(sum + parameter(bias, 0, bias_at + j, 0));
      }
    return y;
  }

  Rows norm(const Rows& x, P weight, P bias) const {
    Rows y = x;
    for (auto& row : y) {
      double mean = 0, variance = 0;
      for (const double v : row) mean += v / double(row.size());
      for (const double v : row) variance += (v - mean) * (v - mean) / double(row.size());
      const double scale = 1 / std::sqrt(variance + subnetwork_.eps);
      for (int64_t j = 0; j < embed_; j++) {
        const int64_t channel = embed_offset_ + j;
        row[j] = round_((row[j] - mean) * scale * parameter(weight, 0, channel, 1) + parameter(bias, 0, channel, 0));
      }
    }
    return y;
  }

  void add_branch(Rows& x, const Rows& branch, P layer_scale) const {
    for (size_t i = 0; i < x.size(); i++)
      for (int64_t j = 0; j < embed_; j++)
        x[i][j] = round_(x[i][j] + round_(parameter(layer_scale, 0, embed_offset_ + j, 1) * branch[i][j]));
  }

  Rows stem(const float* image, const StemParameters<P>& p) const {
    const NetworkSizes& n = sizes_;
    Rows patches;
    for (int64_t y = 0; y < n.image_height; y += n.patch_height)
      for (int64_t x = 0; x < n.image_width; x += n.patch_width) {
        patches.emplace_back();
        for (int64_t c = 0; c < n.channels; c++)
          for (int64_t i = 0; i < n.patch_height; i++)
            for (int64_t j = 0; j < n.patch_width; j++)
              patches.back().push_back(round_(image[(c * n.image_height + y + i) * n.image_width + x + j]));
      }
    const Rows rows = linear(patches, p.weight, embed_offset_, 0, embed_, p.bias, embed_offset_);
    const int64_t prefix = n.prefix_tokens(), unplaced = n.pos_on_prefix() ? 0 : prefix;
    Rows x;
    for (int64_t token = 0; token < n.tokens(); token++) {
      x.emplace_back();
      for (int64_t j = 0; j < embed_; j++) {
        const int64_t channel = embed_offset_ + j;
        const double value = token < n.cls_tokens ? parameter(p.cls_token, token, channel, 0)
                             : token < prefix     ? parameter(p.reg_token, token - n.cls_tokens, channel, 0)
                                                  : rows[token - prefix][j];
        const double position = token < unplaced ? 0 : parameter(p.pos_embed, token - unplaced, channel, 0);
        x.back().push_back(round_(value + position));
      }
    }
    return x;
  }

  void attention_block(Rows& x, const AttentionParameters<P>& p, const AttentionSlice& s) const {
    const Rows normed = norm(x, p.norm_weight, p.norm_bias);
    const int64_t columns = s.heads * s.head_dim;
    const auto role = [&](int64_t row) {
      return linear(normed, p.qkv_weight, row, embed_offset_, columns, p.qkv_bias, row);
    };
    const Rows q = role(s.query_row), k = role(s.key_row), v = role(s.value_row);
    Rows attended(x.size(), std::vector<double>(columns));
    for (int64_t head = 0; head < s.heads; head++)
      for (size_t i = 0; i < x.size(); i++) {
        std::vector<double> scores(x.size());
        double highest = -INFINITY, sum = 0;
        for (size_t j = 0; j < x.size(); j++) {
          for (int64_t c = head * s.head_dim; c < (head + 1) * s.head_dim; c++) scores[j] += q[i][c] * k[j][c];
          scores[j] *= s.scale;
          highest = std::max(highest, scores[j]);
        }
        for (double& score : scores) sum += score = std::exp(score - highest);
        for (int64_t c = head * s.head_dim; c < (head + 1) * s.head_dim; c++) {
          for (size_t j = 0; j < x.size(); j++) attended[i][c] += round_(scores[j] / sum) * v[j][c];
          attended[i][c] = round_(attended[i][c]);
        }
      }
    const Rows branch =
        linear(attended, p.proj_weight, embed_offset_, s.proj_column, embed_, p.proj_bias, embed_offset_);
    add_branch(x, branch, p.layer_scale);
  }

  void mlp_block(Rows& x, const MlpParameters<P>& p, const MlpSlice& s) const {
    const Rows normed = norm(x, p.norm_weight, p.norm_bias);
    Rows hidden = linear(normed, p.fc1_weight, s.hidden_offset, embed_offset_, s.hidden, p.fc1_bias, s.hidden_offset);
    for (auto& row : hidden)
      for (double& v : row) v = round_(v / 2 * (1 + std::erf(v * std::sqrt(0.5))));
    const Rows branch = linear(hidden, p.fc2_weight, embed_offset_, s.hidden_offset, embed_, p.fc2_bias, embed_offset_);
    add_branch(x, branch, p.layer_scale);
  }

  std::vector<double> head(const Rows& x, const HeadParameters<P>& p) const {
    const HeadSlice& s = subnetwork_.head;
    Rows pooled(1, std::vector<double>(embed_));
    const int64_t count = sizes_.pool_stop - sizes_.pool_start;
    for (int64_t j = 0; j < embed_; j++) {
      for (int64_t token = sizes_.pool_start; token < sizes_.pool_stop; token++)
        pooled[0][j] += x[token][j] / double(count);
      pooled[0][j] = round_(pooled[0][j]);
    }
    const Rows normed = norm(pooled, p.norm_weight, p.norm_bias);
    return linear(normed, p.weight, s.class_offset, embed_offset_, s.classes, p.bias, s.class_offset)[0];
  }

  const NetworkSizes& sizes_;
  const Subnetwork& subnetwork_;
  const int64_t embed_, embed_offset_;
  const NetworkParameters<P> parameters_;
  const Round& round_;
};

// All parameters in order: random inside the slices of the subnetwork and NaN outside, so that a kernel that reads too
// much is found.
inline std::vector<Matrix> random_parameters(const NetworkSizes& n, const Subnetwork& s, bool with_optional,
                                             std::mt19937& random) {
  using Runs = std::vector<std::pair<int64_t, int64_t>>;  // (offset, length)
  const auto all = [](int64_t count) { return Runs{{0, count}}; };
  const auto make = [&](int64_t rows, int64_t columns, const Runs& row_runs, const Runs& column_runs, float mean = 0) {
    int64_t terms = 0;
    for (const auto& [offset, length] : column_runs) terms += length;
    const bool vector = rows == 1;
    std::normal_distribution<float> normal(mean, vector ? 0.3f : 1 / std::sqrt(static_cast<float>(terms)));
    Matrix p{rows, columns, std::vector<float>(rows * columns, NAN)};
    for (const auto& [row, row_count] : row_runs)
      for (const auto& [column, count] : column_runs)
        for (int64_t i = row; i < row + row_count; i++)
          for (int64_t j = column; j < column + count; j++) p.values[i * columns + j] = normal(random);
    return p;
  };
  const auto optional = [&](int64_t size, const Runs& runs, float mean = 0) {
    return with_optional ? make(1, size, all(1), runs, mean) : Matrix{};
  };
  const Runs embed{{s.embed.embed_offset, s.embed.embed}}, classes{{s.head.class_offset, s.head.classes}};
  const auto of_embed = [&](float mean) { return make(1, n.embed, all(1), embed, mean); };
  const auto tokens = [&](int64_t count) { return count ? make(count, n.embed, all(count), embed) : Matrix{}; };

  std::vector<Matrix> result(parameter_specs(n).size());
  const NetworkParameters<Matrix*> p = by_name(n, result);
  *p.stem.weight = make(n.embed, n.patch_size(), embed, all(n.patch_size()));
  *p.stem.bias = optional(n.embed, embed);
  *p.stem.cls_token = tokens(n.cls_tokens), *p.stem.reg_token = tokens(n.reg_tokens);
  *p.stem.pos_embed = tokens(n.positions);
  for (int64_t i = 0; i < n.layers; i++) {
    const AttentionSlice& a = s.attention[i];
    const int64_t columns = a.heads * a.head_dim;
    const Runs roles{{a.query_row, columns}, {a.key_row, columns}, {a.value_row, columns}};
    const AttentionParameters<Matrix*>& attention = p.attention[i];
    *attention.norm_weight = of_embed(1), *attention.norm_bias = of_embed(0);
    *attention.qkv_weight = make(3 * n.embed, n.embed, roles, embed);
    *attention.qkv_bias = optional(3 * n.embed, roles);
    *attention.proj_weight = make(n.embed, n.embed, embed, {{a.proj_column, columns}});
    *attention.proj_bias = optional(n.embed, embed), *attention.layer_scale = optional(n.embed, embed, 1);
    const Runs hidden{{s.mlp[i].hidden_offset, s.mlp[i].hidden}};
    const MlpParameters<Matrix*>& mlp = p.mlp[i];
    *mlp.norm_weight = of_embed(1), *mlp.norm_bias = of_embed(0);
    *mlp.fc1_weight = make(n.hidden, n.embed, hidden, embed), *mlp.fc1_bias = optional(n.hidden, hidden);
    *mlp.fc2_weight = make(n.embed, n.hidden, embed, hidden), *mlp.fc2_bias = optional(n.embed, embed);
    *mlp.layer_scale = optional(n.embed, embed, 1);
  }
  *p.head.norm_weight = of_embed(1), *p.head.norm_bias = of_embed(0);
  *p.head.weight = make(n.classes, n.embed, classes, embed), *p.head.bias = optional(n.classes, classes);
  return result;
}

}  // namespace hydravit::cuda::tests
