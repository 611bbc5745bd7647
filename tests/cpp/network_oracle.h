// The whole network in plain loops: what a subnetwork reads of every parameter, its blocks, and their forward one after
// the other.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "oracle.h"
#include "parameters.h"
#include "subnetwork.h"

namespace hydravit::tests {

constexpr float kEps = 1e-6f;

// The subnetwork of the first heads, the first hidden channels, and so on.
inline Subnetwork prefix(const NetworkSizes& n, int64_t embed, int64_t heads, int64_t head_dim, int64_t hidden) {
  const double scale = 1 / std::sqrt(static_cast<double>(head_dim));
  const AttentionSlice attention{0, embed, 0, n.embed, 2 * n.embed, 0, heads, head_dim, head_dim, head_dim, scale};
  return {{0, embed},
          std::vector(n.layers, attention),
          std::vector(n.layers, MlpSlice{0, embed, 0, hidden}),
          {0, embed, 0, n.classes},
          kEps};
}

// Rows [row, row + rows) and columns [column, column + columns) of the full parameter of this index, in the order of
// parameters.h. A vector is one row.
struct Part {
  size_t parameter;
  int64_t row, rows, column, columns;
};

// What a subnetwork reads. A name is a block ("stem", "attention0", "mlp0", "head"), a point, and a name of the oracle.
inline std::map<std::string, Part> parts_of(const NetworkSizes& n, const Subnetwork& s) {
  size_t next = 0;
  const NetworkParameters<size_t> p = read_parameters(n, [&](const ParameterSpec&) { return next++; });
  std::map<std::string, Part> parts;
  const auto matrix = [&](const std::string& name, size_t parameter, int64_t row, int64_t rows, int64_t column,
                          int64_t columns) { parts[name] = {parameter, row, rows, column, columns}; };
  const auto vector = [&](const std::string& name, size_t parameter, int64_t column, int64_t columns) {
    matrix(name, parameter, 0, 1, column, columns);
  };
  const int64_t offset = s.embed.embed_offset, embed = s.embed.embed;
  matrix("stem.weight", p.stem.weight, offset, embed, 0, n.patch_size());
  vector("stem.bias", p.stem.bias, offset, embed);
  matrix("stem.cls_token", p.stem.cls_token, 0, n.cls_tokens, offset, embed);
  matrix("stem.reg_token", p.stem.reg_token, 0, n.reg_tokens, offset, embed);
  matrix("stem.pos_embed", p.stem.pos_embed, 0, n.positions, offset, embed);
  for (int64_t i = 0; i < n.layers; i++) {
    const auto vectors = [&](const std::string& block, const auto& of_block) {
      vector(block + "norm_weight", of_block.norm_weight, offset, embed);
      vector(block + "norm_bias", of_block.norm_bias, offset, embed);
      vector(block + "layer_scale", of_block.layer_scale, offset, embed);
    };
    const AttentionSlice& a = s.attention[i];
    const int64_t columns = a.heads * a.head_dim;
    const std::string attention = "attention" + std::to_string(i) + ".";
    vectors(attention, p.attention[i]);
    for (const auto& [role, row] : {std::pair{"query", a.query_row}, {"key", a.key_row}, {"value", a.value_row}}) {
      matrix(attention + role + "_weight", p.attention[i].qkv_weight, row, columns, offset, embed);
      vector(attention + role + "_bias", p.attention[i].qkv_bias, row, columns);
    }
    matrix(attention + "proj_weight", p.attention[i].proj_weight, offset, embed, a.proj_column, columns);
    vector(attention + "proj_bias", p.attention[i].proj_bias, offset, embed);

    const MlpSlice& m = s.mlp[i];
    const std::string mlp = "mlp" + std::to_string(i) + ".";
    vectors(mlp, p.mlp[i]);
    matrix(mlp + "fc1_weight", p.mlp[i].fc1_weight, m.hidden_offset, m.hidden, offset, embed);
    vector(mlp + "fc1_bias", p.mlp[i].fc1_bias, m.hidden_offset, m.hidden);
    matrix(mlp + "fc2_weight", p.mlp[i].fc2_weight, offset, embed, m.hidden_offset, m.hidden);
    vector(mlp + "fc2_bias", p.mlp[i].fc2_bias, offset, embed);
  }
  vector("head.norm_weight", p.head.norm_weight, offset, embed);
  vector("head.norm_bias", p.head.norm_bias, offset, embed);
  matrix("head.weight", p.head.weight, s.head.class_offset, s.head.classes, offset, embed);
  vector("head.bias", p.head.bias, s.head.class_offset, s.head.classes);
  return parts;
}

// The blocks of a subnetwork, without pointers.
struct Blocks {
  Stem stem{};
  std::vector<AttentionBlock> attention;
  std::vector<MlpBlock> mlp;
  Head head{};
};

inline Blocks blocks_of(const NetworkSizes& n, const Subnetwork& s, int64_t batch) {
  Blocks blocks;
  Stem& stem = blocks.stem;
  stem.batch = batch, stem.channels = n.channels, stem.embed = s.embed.embed;
  stem.grid_height = n.grid_height(), stem.grid_width = n.grid_width();
  stem.patch_height = n.patch_height, stem.patch_width = n.patch_width;
  stem.cls_tokens = n.cls_tokens, stem.reg_tokens = n.reg_tokens, stem.pos_on_prefix = n.pos_on_prefix();
  for (const AttentionSlice& slice : s.attention) {
    AttentionBlock& block = blocks.attention.emplace_back();
    block.batch = batch, block.tokens = block.queries = n.tokens(), block.embed = slice.embed;
    block.heads = slice.heads, block.head_dim = slice.head_dim, block.value_dim = slice.value_dim;
    block.pitch = slice.pitch, block.scale = static_cast<float>(slice.scale), block.eps = s.eps;
  }
  for (const MlpSlice& slice : s.mlp) {
    MlpBlock& block = blocks.mlp.emplace_back();
    block.batch = batch, block.tokens = n.tokens(), block.embed = slice.embed, block.hidden = slice.hidden;
    block.eps = s.eps;
  }
  Head& head = blocks.head;
  head.batch = batch, head.pool_start = n.pool_start, head.pool_stop = n.pool_stop;
  head.embed = s.head.embed, head.classes = s.head.classes, head.eps = s.eps;
  return blocks;
}

// images (batch, pixels) and the parts of all parameters -> (batch, classes or embed)
template <class T>
Matrix<T> network(const Blocks& blocks, const Matrix<T>& images, const Values<T>& parts) {
  const auto output = [&](const std::string& name, const auto& compute, const auto& block, const Matrix<T>& input) {
    Values<T> values;
    for (const auto& [part, matrix] : parts)
      if (part.starts_with(name + ".")) values[part.substr(name.size() + 1)] = matrix;
    values[name == "stem" ? "images" : "x"] = input;
    compute(block, values);
    return values["y"];
  };
  Matrix<T> x = output("stem", stem<T>, blocks.stem, images);
  for (size_t i = 0; i < blocks.mlp.size(); i++) {
    x = output("attention" + std::to_string(i), attention_block<T>, blocks.attention[i], x);
    x = output("mlp" + std::to_string(i), mlp_block<T>, blocks.mlp[i], x);
  }
  return output("head", head<T>, blocks.head, x);
}

}  // namespace hydravit::tests
