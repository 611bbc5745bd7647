// Each call repacks K and V of one head, which then stay in cache. A whole row of scores exists at once, for any N.
// Forward takes a register tile of queries at a time, one query per row. Backward takes kQueries queries at a time, one
// per vector lane; its scores are transposed, (tokens, kQueries), so that no sum over tokens crosses lanes.
#include "attention_heads.h"

namespace hydravit::HYDRAVIT_ISA {

namespace {

constexpr int kQueries = kTileColumns;
// Queries of one register tile of the output: kQueries in the fewest equal parts that fit the tile.
constexpr int kQueryRows =
    (kQueries + (kQueries + kTileRows - 1) / kTileRows - 1) / ((kQueries + kTileRows - 1) / kTileRows);

constexpr int64_t kPad = kWidth;  // floats that repacking may write beyond the panels

int64_t padded(int64_t columns) { return round_up(columns, kTileColumns); }

const float* at(const Tokens& tokens, int64_t image, int64_t column) {
  return tokens.data + image * tokens.image_stride + column;
}
float* at(const MutableTokens& tokens, int64_t image, int64_t column) {
  return tokens.data + image * tokens.image_stride + column;
}

// scores (tokens, kQueries) = keys (from repack_rows) times queries (one panel from repack_columns)
void score(int64_t tokens, int64_t dim, const float* keys, const float* queries, float* scores) {
  for (int64_t token = 0; token < tokens; token += kTileRows)
    tile_across(smaller<int64_t>(kTileRows, tokens - token), kQueries,
                {dim, keys + token * dim, kTileRows, queries, scores + token * kQueries, kQueries, false});
}

// The buffers of forward: K (head_dim, tokens) and V (tokens, value_dim) of the head in panels of kTileColumns, and the
// scores (kTileRows, tokens) of one tile of queries.
struct ForwardSizes {
  int64_t keys, values, scores, total;
  ForwardSizes(int64_t tokens, int64_t head_dim, int64_t value_dim)
      : keys(round_up(padded(tokens) * head_dim + kPad, 16)),
        values(round_up(tokens * padded(value_dim) + kPad, 16)),
        scores(kTileRows * padded(tokens)),
        total(keys + values + scores) {}
};

Vec lane_indices() {
  Vec lanes;
  for (int i = 0; i < kWidth; i++) lanes[i] = static_cast<float>(i);
  return lanes;
}

// Replaces the scores by e^(score * scale - max), in place; returns their sum.
float exponentiate(int64_t tokens, float scale, float* scores, float* maximum) {
  const int64_t whole = tokens / kWidth * kWidth, rest = tokens - whole;
  const Vec tail = lane_indices() < static_cast<float>(rest) ? load(scores + whole) * scale : splat(-__builtin_inff());
  Vec high = tail;
  for (int64_t i = 0; i < whole; i += kWidth) high = vmax(high, load(scores + i) * scale);
  *maximum = highest(high);
  const Vec shift = splat(*maximum);
  Vec total = sum_over(whole / kWidth, [&](int64_t i) {
    const Vec value = exp(load(scores + i * kWidth) * scale - shift);
    store(scores + i * kWidth, value);
    return value;
  });
  if (rest > 0) {
    const Vec value = exp(tail - shift);
    store(scores + whole, value);
    total += value;
  }
  return sum(total);
}

struct BackwardSizes {
  int64_t key_rows, value_rows, key_columns, d_keys, d_values, query_lanes, query_rows, d_lanes, d_rows, scores, total;
  BackwardSizes(int64_t tokens, int64_t head_dim, int64_t value_dim)
      : key_rows(round_up(round_up(tokens, kTileRows) * head_dim + kPad, 16)),
        value_rows(round_up(round_up(tokens, kTileRows) * value_dim + kPad, 16)),
        key_columns(round_up(tokens * padded(head_dim) + kPad, 16)),
        d_keys(tokens * padded(head_dim)),
        d_values(tokens * padded(value_dim)),
        query_lanes(round_up(kQueries * head_dim + kPad, 16)),
        query_rows(round_up(kQueries * padded(head_dim) + kPad, 16)),
        d_lanes(round_up(kQueries * value_dim + kPad, 16)),
        d_rows(round_up(kQueries * padded(value_dim) + kPad, 16)),
        scores(tokens * kQueries),
        total(round_up(key_rows + value_rows + key_columns + d_keys + d_values + query_lanes + query_rows + d_lanes +
                           d_rows + 2 * scores,
                       16)) {}
};

struct BackwardBuffers {
  float *key_rows, *value_rows, *key_columns;          // K and V of the head, repacked
  float *d_keys, *d_values;                            // (tokens, padded): sums over all queries
  float *query_lanes, *query_rows, *d_lanes, *d_rows;  // q and d attended: lanes (dim, query), rows (query, dim)
  float *probabilities, *d_scores;                     // (tokens, kQueries)

  BackwardBuffers(const BackwardSizes& sizes, float* scratch) {
    const auto take = [&](float** buffer, int64_t size) { *buffer = scratch, scratch += size; };
    take(&key_rows, sizes.key_rows), take(&value_rows, sizes.value_rows), take(&key_columns, sizes.key_columns);
    take(&d_keys, sizes.d_keys), take(&d_values, sizes.d_values);
    take(&query_lanes, sizes.query_lanes), take(&query_rows, sizes.query_rows);
    take(&d_lanes, sizes.d_lanes), take(&d_rows, sizes.d_rows);
    take(&probabilities, sizes.scores), take(&d_scores, sizes.scores);
  }
};

// sums (tokens, padded(columns)) [+]= scores (tokens, kQueries) times rows (queries, columns), from repack_columns.
void add_products(int64_t tokens, int64_t queries, int64_t columns, const float* scores, const float* rows,
                  bool accumulate, float* sums) {
  for (int64_t column = 0; column < columns; column += kTileColumns)
    for (int64_t token = 0; token < tokens; token += kTileRows)
      tile_along(smaller<int64_t>(kTileRows, tokens - token), kTileColumns,
                 {queries, scores + token * kQueries, kQueries, rows + column * queries,
                  sums + token * padded(columns) + column, padded(columns), accumulate});
}

// Replaces scores by probabilities p, and gradients dp of the probabilities by gradients of the scores,
// p (dp - sum(p dp)) scale. It divides the probabilities by their sum once more, because the saved log-sum-exp has lost
// digits: where one score dominates, dp - sum(p dp) must still be zero.
void differentiate(int64_t tokens, float scale, const float* logsumexp, float* scores, float* gradients) {
  for (int half = 0; half < 2; half++) {
    float* lanes = scores + half * kWidth;
    float* d_lanes = gradients + half * kWidth;
    const Vec shift = load(logsumexp + half * kWidth);
    const Vec factor = 1.0f / sum_over(tokens, [&](int64_t token) {
                         const Vec value = exp(load(lanes + token * kQueries) * scale - shift);
                         store(lanes + token * kQueries, value);
                         return value;
                       });
    const Vec mean = sum_over(tokens, [&](int64_t token) {
      const Vec probability = load(lanes + token * kQueries) * factor;
      store(lanes + token * kQueries, probability);
      return probability * load(d_lanes + token * kQueries);
    });
    for (int64_t token = 0; token < tokens; token++) {
      const Vec probability = load(lanes + token * kQueries);
      store(d_lanes + token * kQueries, probability * (load(d_lanes + token * kQueries) - mean) * scale);
    }
  }
}

void attend_queries_backward(const Heads& heads, const HeadsGradients& gradients, int64_t image, int64_t head,
                             int64_t query, const BackwardBuffers& buffers) {
  const int64_t tokens = heads.tokens, d = heads.head_dim, dv = heads.value_dim;
  const int64_t count = smaller<int64_t>(kQueries, heads.queries - query);
  const Axis q_rows{heads.q.token_stride}, d_rows{gradients.attended.token_stride};
  const float* q = at(heads.q, image, head * d);
  const float* d_attended = at(gradients.attended, image, head * dv);

  float logsumexp[kQueries] = {};
  const float* saved = heads.logsumexp + image * heads.logsumexp_image_stride + head * heads.queries + query;
  std::memcpy(logsumexp, saved, static_cast<size_t>(count) * sizeof(float));

  repack_columns(q, q_rows, {}, query, count, 0, d, buffers.query_lanes);
  repack_columns(q, {}, q_rows, 0, d, query, query + count, buffers.query_rows);
  repack_columns(d_attended, d_rows, {}, query, count, 0, dv, buffers.d_lanes);
  repack_columns(d_attended, {}, d_rows, 0, dv, query, query + count, buffers.d_rows);

  score(tokens, d, buffers.key_rows, buffers.query_lanes, buffers.probabilities);
  score(tokens, dv, buffers.value_rows, buffers.d_lanes, buffers.d_scores);
  differentiate(tokens, heads.scale, logsumexp, buffers.probabilities, buffers.d_scores);
  add_products(tokens, count, dv, buffers.probabilities, buffers.d_rows, query > 0, buffers.d_values);
  add_products(tokens, count, d, buffers.d_scores, buffers.query_rows, query > 0, buffers.d_keys);
  float tile[kTileRows * kTileColumns];
  for (int64_t column = 0; column < d; column += kTileColumns)
    for (int64_t row = 0; row < count; row += kQueryRows) {
      const int64_t rows = smaller<int64_t>(kQueryRows, count - row),
                    columns = smaller<int64_t>(kTileColumns, d - column);
      tile_across(
          rows, kTileColumns,
          {tokens, buffers.d_scores + row, kQueries, buffers.key_columns + column * tokens, tile, kTileColumns, false});
      for (int64_t i = 0; i < rows; i++) {
        float* to = at(gradients.q, image, head * d + column) + (query + row + i) * gradients.q.token_stride;
        for (int64_t j = 0; j < columns; j += kWidth) store(to + j, load(tile + i * kTileColumns + j), columns - j);
      }
    }
}

void attend_head_backward(const Heads& heads, const HeadsGradients& gradients, int64_t image, int64_t head,
                          const BackwardBuffers& buffers) {
  const int64_t tokens = heads.tokens, d = heads.head_dim, dv = heads.value_dim;
  const Axis rows{heads.k.token_stride};
  const float* k = at(heads.k, image, head * d);
  repack_rows(k, rows, {}, 0, tokens, 0, d, buffers.key_rows);
  repack_rows(at(heads.v, image, head * dv), rows, {}, 0, tokens, 0, dv, buffers.value_rows);
  repack_columns(k, {}, rows, 0, d, 0, tokens, buffers.key_columns);
  for (int64_t query = 0; query < heads.queries; query += kQueries)
    attend_queries_backward(heads, gradients, image, head, query, buffers);
  float* d_k = at(gradients.k, image, head * d);
  float* d_v = at(gradients.v, image, head * dv);
  for (int64_t token = 0; token < tokens; token++) {
    std::memcpy(d_k + token * gradients.k.token_stride, buffers.d_keys + token * padded(d),
                static_cast<size_t>(d) * sizeof(float));
    std::memcpy(d_v + token * gradients.v.token_stride, buffers.d_values + token * padded(dv),
                static_cast<size_t>(dv) * sizeof(float));
  }
}

}  // namespace

int64_t attend_scratch(const AttentionBlock& block) {
  return ForwardSizes(block.tokens, block.head_dim, block.value_dim).total;
}

void attend(const Heads& heads, int64_t image, int64_t head, const Range& queries, float* scratch) {
  const int64_t tokens = heads.tokens, d = heads.head_dim, dv = heads.value_dim;
  const ForwardSizes sizes(tokens, d, dv);
  float* keys = scratch;
  float* values = keys + sizes.keys;
  float* scores = values + sizes.values;
  const Axis token_axis{heads.k.token_stride};
  repack_columns(at(heads.k, image, head * d), token_axis, {}, 0, tokens, 0, d, keys);
  repack_columns(at(heads.v, image, head * dv), {}, token_axis, 0, dv, 0, tokens, values);

  const float* q = at(heads.q, image, head * d);
  float* attended = at(heads.attended, image, head * dv);
  float sums[kTileRows], maxima[kTileRows], tile[kTileRows * kTileColumns];
  for (int64_t query = queries.begin; query < queries.end;) {
    const int64_t left = queries.end - query, rows = left / divide_up(left, kTileRows);
    for (int64_t key = 0; key < tokens; key += kTileColumns)
      tile_along(rows, tokens - key,
                 {d, q + query * heads.q.token_stride, heads.q.token_stride, keys + key * d, scores + key,
                  padded(tokens), false});
    for (int64_t i = 0; i < rows; i++)
      sums[i] = exponentiate(tokens, heads.scale, scores + i * padded(tokens), &maxima[i]);
    if (heads.logsumexp != nullptr) {
      float* to = heads.logsumexp + image * heads.logsumexp_image_stride + head * heads.queries + query;
      for (int64_t i = 0; i < rows; i++) to[i] = maxima[i] + __builtin_logf(sums[i]);
    }
    for (int64_t column = 0; column < dv; column += kTileColumns) {
      const int64_t columns = smaller<int64_t>(kTileColumns, dv - column);
      tile_along(rows, columns, {tokens, scores, padded(tokens), values + column * tokens, tile, kTileColumns, false});
      for (int64_t i = 0; i < rows; i++) {
        float* to = attended + column + (query + i) * heads.attended.token_stride;
        const float factor = 1.0f / sums[i];
        for (int64_t j = 0; j < columns; j += kWidth)
          store(to + j, load(tile + i * kTileColumns + j) * factor, columns - j);
      }
    }
    query += rows;
  }
}

int64_t attend_backward_scratch(const AttentionBlock& block, const Threads& threads) {
  return block.heads == 0 ? 0 : threads.count * BackwardSizes(block.tokens, block.head_dim, block.value_dim).total;
}

void attend_backward(const Heads& heads, const HeadsGradients& gradients, const Threads& threads, float* scratch) {
  const int64_t tasks = heads.images * heads.heads, jobs = smaller(threads.count, tasks);
  const BackwardSizes sizes(heads.tokens, heads.head_dim, heads.value_dim);
  parallel(threads, jobs, [&](int64_t job) {
    const BackwardBuffers buffers(sizes, scratch + job * sizes.total);
    const Range range = part(tasks, job, jobs);
    for (int64_t task = range.begin; task < range.end; task++)
      attend_head_backward(heads, gradients, task / heads.heads, task % heads.heads, buffers);
  });
}

}  // namespace hydravit::HYDRAVIT_ISA
