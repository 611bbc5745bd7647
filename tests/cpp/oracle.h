// Every block in plain loops over dense matrices, forward and backward, for the tests of all kernels in C++: in double,
// the result that the kernels must compute; in the type that the kernels store, the error that eager PyTorch makes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "hydravit.h"

namespace hydravit::tests {

// The type to compute in. A 16-bit type is for storing only: each operation reads it, computes in double, and rounds
// its result once.
template <class T>
using Computed = std::conditional_t<std::is_floating_point_v<T>, T, double>;

template <class T>
struct Matrix {
  int64_t rows = 0, columns = 0;
  std::vector<T> values;

  bool empty() const { return values.empty(); }
  const T& operator()(int64_t row, int64_t column) const { return values[row * columns + column]; }
  T& operator()(int64_t row, int64_t column) { return values[row * columns + column]; }
};

// Matrices by the names of the contract; an absent one is empty. The name of a gradient begins with `d_`.
template <class T>
using Values = std::map<std::string, Matrix<T>>;

template <class T, class Element>
Matrix<T> matrix(int64_t rows, int64_t columns, const Element& element) {
  Matrix<T> result{rows, columns, std::vector<T>(rows * columns)};
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns; j++) result(i, j) = element(i, j);
  return result;
}

template <class T, class Term>
Computed<T> sum(int64_t count, const Term& term) {
  Computed<T> total = 0;
  for (int64_t i = 0; i < count; i++) total += term(i);
  return total;
}

template <class T>
Matrix<T> transposed(const Matrix<T>& a) {
  return matrix<T>(a.columns, a.rows, [&](int64_t i, int64_t j) { return a(j, i); });
}

// a * b, plus `bias` in every row unless it is empty.
template <class T>
Matrix<T> product(const Matrix<T>& a, const Matrix<T>& b, const Matrix<T>& bias = {}) {
  Matrix<T> result{a.rows, b.columns, {}};
  for (int64_t i = 0; i < a.rows; i++) {
    std::vector<Computed<T>> row(b.columns);
    for (int64_t k = 0; k < a.columns; k++)
      for (int64_t j = 0; j < b.columns; j++) row[j] += a(i, k) * b(k, j);
    for (int64_t j = 0; j < b.columns; j++) result.values.push_back(bias.empty() ? row[j] : row[j] + bias(0, j));
  }
  return result;
}

template <class T>
Matrix<T> linear(const Matrix<T>& x, const Matrix<T>& weight, const Matrix<T>& bias) {
  return product(x, transposed(weight), bias);
}

template <class T>
Matrix<T> column_sums(const Matrix<T>& a) {
  return matrix<T>(1, a.columns,
                   [&](int64_t, int64_t j) { return sum<T>(a.rows, [&](int64_t i) { return a(i, j); }); });
}

template <class T>
Matrix<T> plus(const Matrix<T>& a, const Matrix<T>& b) {
  return matrix<T>(a.rows, a.columns, [&](int64_t i, int64_t j) { return a(i, j) + b(i, j); });
}
template <class T, class Other>
Matrix<T> times(const Matrix<T>& a, const Matrix<Other>& b) {
  return matrix<T>(a.rows, a.columns, [&](int64_t i, int64_t j) { return a(i, j) * b(i, j); });
}

// Adds to a parameter's gradient, unless it is empty: then the test does not ask for it.
template <class T>
void add(Matrix<T>& sums, const Matrix<T>& gradient) {
  if (!sums.empty()) sums = plus(sums, gradient);
}

// ---- Layer norm ----

template <class T>
struct Norm {
  Matrix<Computed<T>> centred;     // mean 0 and variance 1
  std::vector<Computed<T>> scale;  // 1 / standard deviation, by row
  Matrix<T> weight, bias;          // empty: identity

  Norm(const Matrix<T>& x, const Matrix<T>& weight, const Matrix<T>& bias, float eps) : weight(weight), bias(bias) {
    using C = Computed<T>;
    const C count = static_cast<C>(x.columns);
    std::vector<C> means;
    for (int64_t i = 0; i < x.rows; i++) {
      const C mean = sum<T>(x.columns, [&](int64_t j) { return x(i, j); }) / count;
      const C squares = sum<T>(x.columns, [&](int64_t j) { return (x(i, j) - mean) * (x(i, j) - mean); });
      means.push_back(mean);
      scale.push_back(1 / std::sqrt(squares / count + static_cast<C>(eps)));
    }
    centred = matrix<C>(x.rows, x.columns, [&](int64_t i, int64_t j) { return (x(i, j) - means[i]) * scale[i]; });
  }

  Matrix<T> output() const {
    return matrix<T>(centred.rows, centred.columns,
                     [&](int64_t i, int64_t j) { return centred(i, j) * weight(0, j) + bias(0, j); });
  }
  // Adds the gradients of the parameters; returns the gradient of x.
  Matrix<T> backward(const Matrix<T>& grad, Values<T>& v) const {
    add(v["d_norm_weight"], column_sums(times(grad, centred)));
    add(v["d_norm_bias"], column_sums(grad));
    const int64_t channels = grad.columns;
    const Matrix<T> g = matrix<T>(grad.rows, channels, [&](int64_t i, int64_t j) { return grad(i, j) * weight(0, j); });
    using C = Computed<T>;
    std::vector<C> mean, slope;
    for (int64_t i = 0; i < g.rows; i++) {
      mean.push_back(sum<T>(channels, [&](int64_t j) { return g(i, j); }) / static_cast<C>(channels));
      slope.push_back(sum<T>(channels, [&](int64_t j) { return g(i, j) * centred(i, j); }) / static_cast<C>(channels));
    }
    return matrix<T>(g.rows, channels,
                     [&](int64_t i, int64_t j) { return scale[i] * (g(i, j) - mean[i] - centred(i, j) * slope[i]); });
  }
};

// ---- Residual branch: y = x + branch_scale * layer_scale * branch ----

template <class T>
Matrix<T> scaled(const Matrix<T>& a, int64_t tokens, const Matrix<T>& branch_scale, const Matrix<T>& layer_scale) {
  return matrix<T>(a.rows, a.columns, [&](int64_t i, int64_t j) {
    return a(i, j) * (branch_scale.empty() ? T(1) : branch_scale(0, i / tokens)) *
           (layer_scale.empty() ? T(1) : layer_scale(0, j));
  });
}

// ---- Attention block ----

// One head of one image: its rows and columns in the matrices of all heads and images.
struct HeadOf {
  int64_t row, q, v;
};

template <class T>
Matrix<T> probabilities(const AttentionBlock& block, const HeadOf& at, const Matrix<T>& q, const Matrix<T>& k,
                        Matrix<T>& logsumexp) {
  using C = Computed<T>;
  const Matrix<C> scores = matrix<C>(block.tokens, block.tokens, [&](int64_t i, int64_t j) {
    return sum<T>(block.head_dim, [&](int64_t c) { return q(at.row + i, at.q + c) * k(at.row + j, at.q + c); }) *
           static_cast<C>(block.scale);
  });
  Matrix<T> result{block.tokens, block.tokens, {}};
  for (int64_t i = 0; i < block.tokens; i++) {
    C highest = scores(i, 0);
    for (int64_t j = 0; j < block.tokens; j++) highest = std::max(highest, scores(i, j));
    const C total = sum<T>(block.tokens, [&](int64_t j) { return std::exp(scores(i, j) - highest); });
    for (int64_t j = 0; j < block.tokens; j++) result.values.push_back(std::exp(scores(i, j) - highest) / total);
    logsumexp.values.push_back(highest + std::log(total));
  }
  return result;
}

// The rows of the first `count` of every image's `tokens` tokens.
template <class T>
Matrix<T> first_of(const Matrix<T>& a, int64_t tokens, int64_t count) {
  return matrix<T>(a.rows / tokens * count, a.columns,
                   [&](int64_t i, int64_t j) { return a(i / count * tokens + i % count, j); });
}

// Computes all tokens. Tokens without a result have no gradient either: it is zero.
template <class T>
void attention_block(const AttentionBlock& block, Values<T>& v) {
  const int64_t queries = block.queries;
  const Matrix<T>& of_queries = v["grad"];
  const Matrix<T> grad =
      of_queries.empty() ? of_queries : matrix<T>(block.batch * block.tokens, block.embed, [&](int64_t i, int64_t j) {
        const int64_t image = i / block.tokens, token = i % block.tokens;
        return token < queries ? of_queries(image * queries + token, j) : T(0);
      });
  v["y"] = first_of(v["x"], block.tokens, queries);
  v["d_x"] = grad;
  if (block.heads == 0) return;
  const int64_t n = block.tokens, rows = block.batch * n, d = block.head_dim, dv = block.value_dim;
  const Norm<T> norm(v["x"], v["norm_weight"], v["norm_bias"], block.eps);
  const Matrix<T> normalised = norm.output();
  const char* const roles[3] = {"query", "key", "value"};
  Matrix<T> qkv[3], d_qkv[3];
  for (int i = 0; i < 3; i++) {
    const std::string role = roles[i];
    qkv[i] = linear(normalised, v[role + "_weight"], v[role + "_bias"]);
    d_qkv[i] = Matrix<T>{rows, qkv[i].columns, std::vector<T>(qkv[i].values.size())};
  }
  const Matrix<T>&query = qkv[0], &key = qkv[1], &value = qkv[2], untouched = v["qkv"];
  const int64_t columns = query.columns;
  v["qkv"] = matrix<T>(rows, 2 * columns + value.columns, [&](int64_t i, int64_t j) {
    if (j < columns && i % n >= queries) return untouched(i, j);
    return j < columns ? query(i, j) : j < 2 * columns ? key(i, j - columns) : value(i, j - 2 * columns);
  });

  std::vector<HeadOf> heads;
  for (int64_t image = 0; image < block.batch; image++)
    for (int64_t head = 0; head < block.heads; head++) heads.push_back({image * n, head * d, head * dv});
  std::vector<Matrix<T>> attention;
  Matrix<T> logsumexp{block.batch * block.heads, n, {}},
      attended{rows, value.columns, std::vector<T>(value.values.size())};
  for (const HeadOf& at : heads) {
    attention.push_back(probabilities(block, at, query, key, logsumexp));
    for (int64_t i = 0; i < n; i++)
      for (int64_t c = 0; c < dv; c++)
        attended(at.row + i, at.v + c) =
            sum<T>(n, [&](int64_t j) { return attention.back()(i, j) * value(at.row + j, at.v + c); });
  }
  v["logsumexp"] = matrix<T>(logsumexp.rows, queries, [&](int64_t i, int64_t j) { return logsumexp(i, j); });
  v["attended"] = first_of(attended, n, queries);
  const Matrix<T> branch = linear(attended, v["proj_weight"], v["proj_bias"]);
  v["y"] = first_of(plus(v["x"], scaled(branch, n, v["branch_scale"], v["layer_scale"])), n, queries);
  if (grad.empty()) return;

  add(v["d_layer_scale"], column_sums(times(branch, scaled(grad, n, v["branch_scale"], {}))));
  const Matrix<T> z = scaled(grad, n, v["branch_scale"], v["layer_scale"]);
  add(v["d_proj_bias"], column_sums(z));
  add(v["d_proj_weight"], product(transposed(z), attended));
  const Matrix<T> d_attended = product(z, v["proj_weight"]);
  Matrix<T>&d_query = d_qkv[0], &d_key = d_qkv[1], &d_value = d_qkv[2];
  for (size_t h = 0; h < heads.size(); h++) {
    const HeadOf& at = heads[h];
    const Matrix<T>& p = attention[h];
    const Matrix<T> d_p = matrix<T>(n, n, [&](int64_t i, int64_t j) {
      return sum<T>(dv, [&](int64_t c) { return d_attended(at.row + i, at.v + c) * value(at.row + j, at.v + c); });
    });
    std::vector<Computed<T>> mean;
    for (int64_t i = 0; i < n; i++) mean.push_back(sum<T>(n, [&](int64_t j) { return p(i, j) * d_p(i, j); }));
    const Matrix<T> d_scores = matrix<T>(n, n, [&](int64_t i, int64_t j) {
      return p(i, j) * (d_p(i, j) - mean[i]) * static_cast<Computed<T>>(block.scale);
    });
    for (int64_t i = 0; i < n; i++) {
      for (int64_t c = 0; c < d; c++) {
        d_query(at.row + i, at.q + c) =
            sum<T>(n, [&](int64_t j) { return d_scores(i, j) * key(at.row + j, at.q + c); });
        d_key(at.row + i, at.q + c) =
            sum<T>(n, [&](int64_t j) { return d_scores(j, i) * query(at.row + j, at.q + c); });
      }
      for (int64_t c = 0; c < dv; c++)
        d_value(at.row + i, at.v + c) =
            sum<T>(n, [&](int64_t j) { return p(j, i) * d_attended(at.row + j, at.v + c); });
    }
  }
  Matrix<T> d_normalised{rows, block.embed, std::vector<T>(rows * block.embed)};
  for (int i = 0; i < 3; i++) {
    const std::string role = roles[i];
    add(v["d_" + role + "_bias"], column_sums(d_qkv[i]));
    add(v["d_" + role + "_weight"], product(transposed(d_qkv[i]), normalised));
    d_normalised = plus(d_normalised, product(d_qkv[i], v[role + "_weight"]));
  }
  v["d_x"] = plus(grad, norm.backward(d_normalised, v));
}

// ---- MLP block ----

template <class T>
T gelu(T x) {
  return x / 2 * (1 + std::erf(x * std::sqrt(T(0.5))));
}
template <class T>
T gelu_derivative(T x) {
  const T density = std::exp(-x * x / 2) / std::sqrt(8 * std::atan(T(1)));
  return (1 + std::erf(x * std::sqrt(T(0.5)))) / 2 + x * density;
}

template <class T>
void mlp_block(const MlpBlock& block, Values<T>& v) {
  v["y"] = v["x"];
  v["d_x"] = v["grad"];
  if (block.hidden == 0) return;
  const int64_t n = block.tokens;
  const Norm<T> norm(v["x"], v["norm_weight"], v["norm_bias"], block.eps);
  const Matrix<T> normalised = norm.output();
  const Matrix<T> saved = v["saved"] = linear(normalised, v["fc1_weight"], v["fc1_bias"]);
  const Matrix<T> activated =
      matrix<T>(saved.rows, saved.columns, [&](int64_t i, int64_t j) { return gelu<Computed<T>>(saved(i, j)); });
  const Matrix<T> branch = linear(activated, v["fc2_weight"], v["fc2_bias"]);
  v["y"] = plus(v["x"], scaled(branch, n, v["branch_scale"], v["layer_scale"]));
  if (v["grad"].empty()) return;

  add(v["d_layer_scale"], column_sums(times(branch, scaled(v["grad"], n, v["branch_scale"], {}))));
  const Matrix<T> z = scaled(v["grad"], n, v["branch_scale"], v["layer_scale"]);
  add(v["d_fc2_bias"], column_sums(z));
  add(v["d_fc2_weight"], product(transposed(z), activated));
  const Matrix<T> d_activated = product(z, v["fc2_weight"]);
  const Matrix<T> d_hidden = matrix<T>(saved.rows, saved.columns, [&](int64_t i, int64_t j) {
    return d_activated(i, j) * gelu_derivative<Computed<T>>(saved(i, j));
  });
  add(v["d_fc1_bias"], column_sums(d_hidden));
  add(v["d_fc1_weight"], product(transposed(d_hidden), normalised));
  v["d_x"] = plus(v["grad"], norm.backward(product(d_hidden, v["fc1_weight"]), v));
}

// ---- Stem ----

template <class T>
void stem(const Stem& block, Values<T>& v) {
  const int64_t patches = block.grid_height * block.grid_width, prefix = block.cls_tokens + block.reg_tokens;
  const int64_t n = prefix + patches, area = block.patch_height * block.patch_width, size = block.channels * area;
  const int64_t width = block.grid_width * block.patch_width, height = block.grid_height * block.patch_height;
  const auto pixel = [&](int64_t patch, int64_t i) {  // the offset of element i of a patch in its image
    const int64_t y = patch / block.grid_width * block.patch_height + i % area / block.patch_width;
    const int64_t x = patch % block.grid_width * block.patch_width + i % block.patch_width;
    return (i / area * height + y) * width + x;
  };
  const Matrix<T>&images = v["images"], &position = v["pos_embed"];
  const Matrix<T> rows = matrix<T>(block.batch * patches, size,
                                   [&](int64_t i, int64_t j) { return images(i / patches, pixel(i % patches, j)); });
  const Matrix<T> embedded = linear(rows, v["weight"], v["bias"]);
  const int64_t unplaced = block.pos_on_prefix ? 0 : prefix;  // tokens without a position
  v["y"] = matrix<T>(block.batch * n, block.embed, [&](int64_t i, int64_t j) {
    const int64_t token = i % n;
    const T value = token < block.cls_tokens ? v["cls_token"](token, j)
                    : token < prefix         ? v["reg_token"](token - block.cls_tokens, j)
                                             : embedded(i / n * patches + token - prefix, j);
    return value + (position.empty() || token < unplaced ? T(0) : position(token - unplaced, j));
  });
  const Matrix<T>& grad = v["grad"];
  if (grad.empty()) return;

  const auto token_sums = [&](int64_t first, int64_t count) {
    return matrix<T>(count, block.embed, [&](int64_t i, int64_t j) {
      return sum<T>(block.batch, [&](int64_t image) { return grad(image * n + first + i, j); });
    });
  };
  add(v["d_cls_token"], token_sums(0, block.cls_tokens));
  add(v["d_reg_token"], token_sums(block.cls_tokens, block.reg_tokens));
  add(v["d_pos_embed"], token_sums(unplaced, n - unplaced));
  const Matrix<T> d = matrix<T>(rows.rows, block.embed,
                                [&](int64_t i, int64_t j) { return grad(i / patches * n + prefix + i % patches, j); });
  add(v["d_bias"], column_sums(d));
  add(v["d_weight"], product(transposed(d), rows));
  const Matrix<T> d_rows = product(d, v["weight"]);
  v["d_images"] = v["images"];
  for (int64_t i = 0; i < d_rows.rows; i++)
    for (int64_t j = 0; j < size; j++) v["d_images"](i / patches, pixel(i % patches, j)) = d_rows(i, j);
}

// ---- Head ----

template <class T>
void head(const Head& block, Values<T>& v) {
  const Matrix<T> x = v["x"];
  const int64_t n = x.rows / block.batch, pooled_tokens = block.pool_stop - block.pool_start;
  const Matrix<T> pooled = matrix<T>(block.batch, block.embed, [&](int64_t i, int64_t j) {
    return sum<T>(pooled_tokens, [&](int64_t token) { return x(i * n + block.pool_start + token, j); }) /
           static_cast<Computed<T>>(pooled_tokens);
  });
  const bool with_norm = !v["norm_weight"].empty();
  const Norm<T> norm(pooled, v["norm_weight"], v["norm_bias"], block.eps);
  const Matrix<T> features = with_norm ? norm.output() : pooled;
  v["y"] = block.classes == 0 ? features : linear(features, v["weight"], v["bias"]);
  if (v["grad"].empty()) return;

  Matrix<T> d = v["grad"];
  if (block.classes > 0) {
    add(v["d_bias"], column_sums(d));
    add(v["d_weight"], product(transposed(d), features));
    d = product(d, v["weight"]);
  }
  if (with_norm) d = norm.backward(d, v);
  v["d_x"] = matrix<T>(x.rows, x.columns, [&](int64_t i, int64_t j) {
    const bool in_pool = i % n >= block.pool_start && i % n < block.pool_stop;
    return in_pool ? T(d(i / n, j) / static_cast<Computed<T>>(pooled_tokens)) : T(0);
  });
}

}  // namespace hydravit::tests
