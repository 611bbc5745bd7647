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
  int rows = 0, columns = 0;  // 0: the model lacks this parameter
  std::vector<float> values;

  bool present() const { return rows > 0; }
  double at(int row, int column) const { return values[static_cast<size_t>(row) * columns + column]; }
};

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
inline float e4m3_scale(const Matrix& p, int row) {
  float largest = 0;
  for (int j = 0; j < p.columns; j++)
    if (const float v = p.values[static_cast<size_t>(row) * p.columns + j]; std::isfinite(v))
      largest = std::max(largest, std::fabs(v));
  return std::max(largest / 448, FLT_MIN);
}
// The parameters as a network with E4m3 weights uses them.
inline std::vector<Matrix> quantised(std::vector<Matrix> parameters) {
  const size_t head = parameters.size() - 4;
  for (size_t i = 0; i < parameters.size(); i++) {
    const size_t in_block = i < 5 || i >= head ? 0 : (i - 5) % 14;
    const bool is_weight = in_block == 2 || in_block == 4 || in_block == 9 || in_block == 11;
    if (i != 0 && i != head + 2 && !is_weight) continue;
    Matrix& p = parameters[i];
    for (int row = 0; row < p.rows; row++) {
      const float scale = e4m3_scale(p, row);
      for (int j = 0; j < p.columns; j++) {
        float& v = p.values[static_cast<size_t>(row) * p.columns + j];
        v = static_cast<float>(e4m3_value(nearest_e4m3(v / scale)) * scale);
      }
    }
  }
  return parameters;
}

using Round = std::function<double(double)>;
using Rows = std::vector<std::vector<double>>;

// Takes the parameters in the order that model.h names.
class Reference {
 public:
  Reference(const Model& model, const Subnetwork& subnetwork, const std::vector<Matrix>& parameters, const Round& round)
      : model_(model), subnetwork_(subnetwork), parameters_(parameters), round_(round) {}

  // Computes the logits of one image (channels, height, width).
  std::vector<double> run(const float* image) const {
    Rows x = stem(image);
    for (int i = 0; i < model_.depth; i++) {
      const Matrix* p = &parameters_[5 + 14 * i];
      if (subnetwork_.attention[i].heads > 0) attention_block(x, p, subnetwork_.attention[i]);
      if (subnetwork_.mlp[i].hidden > 0) mlp_block(x, p + 7, subnetwork_.mlp[i]);
    }
    return head(x, &parameters_[5 + 14 * model_.depth]);
  }

 private:
  double parameter(const Matrix& p, int row, int column, double absent) const {
    return p.present() ? round_(p.at(row, column)) : absent;
  }

  Rows linear(const Rows& x, const Matrix& weight, int row, int column, int rows, const Matrix& bias,
              int bias_at) const {
    Rows y(x.size(), std::vector<double>(rows));
    for (size_t i = 0; i < x.size(); i++)
      for (int j = 0; j < rows; j++) {
        double sum = 0;
        for (size_t k = 0; k < x[i].size(); k++) sum += x[i][k] * round_(weight.at(row + j, column + int(k)));
        y[i][j] = round_(sum + parameter(bias, 0, bias_at + j, 0));
      }
    return y;
  }

  Rows norm(const Rows& x, const Matrix* p) const {
    Rows y = x;
    for (auto& row : y) {
      double mean = 0, variance = 0;
      for (const double v : row) mean += v / double(row.size());
      for (const double v : row) variance += (v - mean) * (v - mean) / double(row.size());
      const double scale = 1 / std::sqrt(variance + subnetwork_.eps);
      for (size_t j = 0; j < row.size(); j++) {
        const int channel = subnetwork_.embed_offset + int(j);
        row[j] = round_((row[j] - mean) * scale * parameter(p[0], 0, channel, 1) + parameter(p[1], 0, channel, 0));
      }
    }
    return y;
  }

  void add_branch(Rows& x, const Rows& branch, const Matrix& layer_scale) const {
    for (size_t i = 0; i < x.size(); i++)
      for (size_t j = 0; j < x[i].size(); j++) {
        const double scale = parameter(layer_scale, 0, subnetwork_.embed_offset + int(j), 1);
        x[i][j] = round_(x[i][j] + round_(scale * branch[i][j]));
      }
  }

  Rows stem(const float* image) const {
    const Matrix* p = parameters_.data();
    const int height = model_.grid_height * model_.patch_height, width = model_.grid_width * model_.patch_width;
    Rows patches;
    for (int y = 0; y < model_.grid_height; y++)
      for (int x = 0; x < model_.grid_width; x++) {
        patches.emplace_back();
        for (int c = 0; c < model_.channels; c++)
          for (int i = 0; i < model_.patch_height; i++)
            for (int j = 0; j < model_.patch_width; j++)
              patches.back().push_back(
                  round_(image[(c * height + y * model_.patch_height + i) * width + x * model_.patch_width + j]));
      }
    Rows rows = linear(patches, p[0], subnetwork_.embed_offset, 0, subnetwork_.embed, p[1], subnetwork_.embed_offset),
         x;
    for (int token = 0; token < model_.tokens(); token++) {
      x.emplace_back();
      for (int j = 0; j < subnetwork_.embed; j++) {
        const int channel = subnetwork_.embed_offset + j, unplaced = model_.pos_on_prefix ? 0 : model_.prefix_tokens();
        const double value = token < model_.cls_tokens        ? parameter(p[2], token, channel, 0)
                             : token < model_.prefix_tokens() ? parameter(p[3], token - model_.cls_tokens, channel, 0)
                                                              : rows[token - model_.prefix_tokens()][j];
        x.back().push_back(round_(value + (token < unplaced ? 0 : parameter(p[4], token - unplaced, channel, 0))));
      }
    }
    return x;
  }

  void attention_block(Rows& x, const Matrix* p, const AttentionSlice& s) const {
    const Rows normed = norm(x, p);
    const int columns = s.heads * kHeadDim;
    const auto role = [&](int row) { return linear(normed, p[2], row, subnetwork_.embed_offset, columns, p[3], row); };
    const Rows q = role(s.query_row), k = role(s.key_row), v = role(s.value_row);
    Rows attended(x.size(), std::vector<double>(columns));
    for (int head = 0; head < s.heads; head++)
      for (size_t i = 0; i < x.size(); i++) {
        std::vector<double> scores(x.size());
        double highest = -INFINITY, sum = 0;
        for (size_t j = 0; j < x.size(); j++) {
          for (int c = head * kHeadDim; c < (head + 1) * kHeadDim; c++) scores[j] += q[i][c] * k[j][c];
          scores[j] *= s.scale;
          highest = std::max(highest, scores[j]);
        }
        for (double& score : scores) sum += score = std::exp(score - highest);
        for (int c = head * kHeadDim; c < (head + 1) * kHeadDim; c++) {
          for (size_t j = 0; j < x.size(); j++) attended[i][c] += round_(scores[j] / sum) * v[j][c];
          attended[i][c] = round_(attended[i][c]);
        }
      }
    const int first = subnetwork_.embed_offset;
    add_branch(x, linear(attended, p[4], first, s.proj_column, subnetwork_.embed, p[5], first), p[6]);
  }

  void mlp_block(Rows& x, const Matrix* p, const MlpSlice& s) const {
    const int first = subnetwork_.embed_offset;
    Rows hidden = linear(norm(x, p), p[2], s.hidden_offset, first, s.hidden, p[3], s.hidden_offset);
    for (auto& row : hidden)
      for (double& v : row) v = round_(v / 2 * (1 + std::erf(v * std::sqrt(0.5))));
    add_branch(x, linear(hidden, p[4], first, s.hidden_offset, subnetwork_.embed, p[5], first), p[6]);
  }

  std::vector<double> head(const Rows& x, const Matrix* p) const {
    Rows pooled(1, std::vector<double>(subnetwork_.embed));
    const int count = model_.pool_stop - model_.pool_start;
    for (int j = 0; j < subnetwork_.embed; j++) {
      for (int token = model_.pool_start; token < model_.pool_stop; token++) pooled[0][j] += x[token][j] / count;
      pooled[0][j] = round_(pooled[0][j]);
    }
    return linear(norm(pooled, p), p[2], subnetwork_.class_offset, subnetwork_.embed_offset, subnetwork_.classes, p[3],
                  subnetwork_.class_offset)[0];
  }

  const Model& model_;
  const Subnetwork& subnetwork_;
  const std::vector<Matrix>& parameters_;
  const Round& round_;
};

// Full parameters of the model: random inside the slices of the subnetwork and NaN outside, so that a kernel that reads
// too much is found.
inline std::vector<Matrix> random_parameters(const Model& m, const Subnetwork& w, bool with_optional,
                                             std::mt19937& random) {
  using Runs = std::vector<std::pair<int, int>>;  // (offset, length)
  const auto make = [&](int rows, int columns, const Runs& row_runs, const Runs& column_runs, float mean = 0) {
    int terms = 0;
    for (const auto& [offset, length] : column_runs) terms += length;
    const bool vector = rows == 1;
    std::normal_distribution<float> normal(mean, vector ? 0.3f : 1 / std::sqrt(static_cast<float>(terms)));
    Matrix p{rows, columns, std::vector<float>(static_cast<size_t>(rows) * columns, NAN)};
    for (const auto& [row, row_count] : row_runs)
      for (const auto& [column, count] : column_runs)
        for (int i = row; i < row + row_count; i++)
          for (int j = column; j < column + count; j++) p.values[static_cast<size_t>(i) * columns + j] = normal(random);
    return p;
  };
  const auto optional = [&](Matrix p) { return with_optional ? p : Matrix{}; };
  const Runs one{{0, 1}}, embed{{w.embed_offset, w.embed}}, classes{{w.class_offset, w.classes}};
  const auto all = [](int count) { return Runs{{0, count}}; };
  const auto of_embed = [&](float mean = 0) { return make(1, m.embed, one, embed, mean); };

  const int placed = m.tokens() - (m.pos_on_prefix ? 0 : m.prefix_tokens());
  std::vector<Matrix> result{make(m.embed, m.patch_size(), embed, all(m.patch_size())), optional(of_embed()),
                             m.cls_tokens ? make(m.cls_tokens, m.embed, all(m.cls_tokens), embed) : Matrix{},
                             m.reg_tokens ? make(m.reg_tokens, m.embed, all(m.reg_tokens), embed) : Matrix{},
                             make(placed, m.embed, all(placed), embed)};
  for (int i = 0; i < m.depth; i++) {
    const AttentionSlice& a = w.attention[i];
    const int columns = a.heads * kHeadDim;
    const Runs roles{{a.query_row, columns}, {a.key_row, columns}, {a.value_row, columns}};
    const Runs hidden{{w.mlp[i].hidden_offset, w.mlp[i].hidden}};
    for (Matrix p :
         {of_embed(1), of_embed(), make(3 * m.embed, m.embed, roles, embed), optional(make(1, 3 * m.embed, one, roles)),
          make(m.embed, m.embed, embed, {{a.proj_column, columns}}), optional(of_embed()), optional(of_embed(1)),
          of_embed(1), of_embed(), make(m.hidden, m.embed, hidden, embed), optional(make(1, m.hidden, one, hidden)),
          make(m.embed, m.hidden, embed, hidden), optional(of_embed()), optional(of_embed(1))})
      result.push_back(std::move(p));
  }
  result.push_back(of_embed(1));
  result.push_back(of_embed());
  result.push_back(make(m.classes, m.embed, classes, embed));
  result.push_back(optional(make(1, m.classes, one, classes)));
  return result;
}

}  // namespace hydravit::cuda::tests
