// Queries are taken kTileColumns at a time, one per vector lane: scores are kept transposed, (tokens, kTileColumns), so
// that the softmax over tokens never crosses lanes, and a whole row of scores is there at once for any N. K and V of
// the head are packed once per (image, head) and stay in cache.
#include "attention_heads.h"

namespace hydravit::HYDRAVIT_ISA {

namespace {

constexpr int kQueries = kTileColumns;
// Queries of one register tile of the output: as even a split of kQueries as fits the tile.
constexpr int kQueryRows =
    (kQueries + (kQueries + kTileRows - 1) / kTileRows - 1) / ((kQueries + kTileRows - 1) / kTileRows);

constexpr int64_t kPad = kWidth;  // what packing may write beyond its panels

int64_t padded(int64_t columns) { return round_up(columns, kTileColumns); }

const float* at(const Tokens& tokens, int64_t image, int64_t column) {
  return tokens.data + image * tokens.image_stride + column;
}
float* at(const MutableTokens& tokens, int64_t image, int64_t column) {
  return tokens.data + image * tokens.image_stride + column;
}

// scores (tokens, kQueries) = keys (packed rows) times queries (one packed panel)
void score(int64_t tokens, int64_t depth, const float* keys, const float* queries, float* scores) {
  for (int64_t token = 0; token < tokens; token += kTileRows)
    tile_product(smaller<int64_t>(kTileRows, tokens - token),
                 {depth, keys + token * depth, kTileRows, queries, scores + token * kQueries, kQueries, false});
}

// scores -> e^(scores * scale - max), lane by lane; the lanes' sums and maxima.
void exponentiate(int64_t tokens, float scale, float* scores, float* sums, float* maxima) {
  for (int half = 0; half < 2; half++) {
    float* lanes = scores + half * kWidth;
    Vec high = load(lanes) * scale;
    for (int64_t token = 1; token < tokens; token++) high = vmax(high, load(lanes + token * kQueries) * scale);
    const Vec total = sum_over(tokens, [&](int64_t token) {
      const Vec value = exp(load(lanes + token * kQueries) * scale - high);
      store(lanes + token * kQueries, value);
      return value;
    });
    store(sums + half * kWidth, total);
    store(maxima + half * kWidth, high);
  }
}

struct ForwardBuffers {
  float *keys, *values, *queries, *scores;
};
struct ForwardSizes {
  int64_t keys, values, queries, scores, total;
  ForwardSizes(int64_t tokens, int64_t head_dim, int64_t value_dim)
      : keys(round_up(round_up(tokens, kTileRows) * head_dim + kPad, 16)),
        values(round_up(tokens * padded(value_dim) + kPad, 16)),
        queries(round_up(kQueries * head_dim + kPad, 16)),
        scores(tokens * kQueries),
        total(round_up(keys + values + queries + scores, 16)) {}
};

// Queries [query, query + count) of one head, its K and V being packed.
void attend_queries(const Heads& heads, int64_t image, int64_t head, int64_t query, const ForwardBuffers& buffers) {
  const int64_t tokens = heads.tokens, count = smaller<int64_t>(kQueries, tokens - query);
  float sums[kQueries], maxima[kQueries], tile[kTileRows * kTileColumns];
  pack_columns(at(heads.q, image, head * heads.head_dim), {heads.q.token_stride}, {}, query, count, 0, heads.head_dim,
               buffers.queries);
  score(tokens, heads.head_dim, buffers.keys, buffers.queries, buffers.scores);
  exponentiate(tokens, heads.scale, buffers.scores, sums, maxima);
  if (heads.logsumexp != nullptr) {
    float* to = heads.logsumexp + image * heads.logsumexp_image_stride + head * tokens + query;
    for (int64_t i = 0; i < count; i++) to[i] = maxima[i] + __builtin_logf(sums[i]);
  }
  for (int64_t column = 0; column < heads.value_dim; column += kTileColumns) {
    const int64_t columns = smaller<int64_t>(kTileColumns, heads.value_dim - column);
    for (int64_t row = 0; row < count; row += kQueryRows) {
      const int64_t rows = smaller<int64_t>(kQueryRows, count - row);
      tile_product(
          rows, {tokens, buffers.scores + row, kQueries, buffers.values + column * tokens, tile, kTileColumns, false});
      for (int64_t i = 0; i < rows; i++) {
        float* to = at(heads.attended, image, head * heads.value_dim + column) +
                    (query + row + i) * heads.attended.token_stride;
        const float factor = 1.0f / sums[row + i];
        for (int64_t j = 0; j < columns; j += kWidth)
          store(to + j, load(tile + i * kTileColumns + j) * factor, columns - j);
      }
    }
  }
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
  float *key_rows, *value_rows, *key_columns;          // K and V of the head, packed
  float *d_keys, *d_values;                            // (tokens, padded): sums over the blocks of queries
  float *query_lanes, *query_rows, *d_lanes, *d_rows;  // q and d attended of the block: (dim, query), (query, dim)
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

// sums (tokens, padded(columns)) [+]= scores (tokens, kQueries) times rows (queries, columns), packed.
void add_products(int64_t tokens, int64_t queries, int64_t columns, const float* scores, const float* rows,
                  bool accumulate, float* sums) {
  for (int64_t column = 0; column < columns; column += kTileColumns)
    for (int64_t token = 0; token < tokens; token += kTileRows)
      tile_product_along(smaller<int64_t>(kTileRows, tokens - token),
                         {queries, scores + token * kQueries, 1, rows + column * queries,
                          sums + token * padded(columns) + column, padded(columns), accumulate});
}

// scores -> probabilities, and d probabilities -> d scores: p (dp - sum(p dp)) scale. The probabilities are normalised
// again, and the sum is taken over them: the saved log-sum-exp has lost digits, and where one score dominates, the
// difference must still come out as zero.
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
  const int64_t count = smaller<int64_t>(kQueries, tokens - query);
  const Axis q_rows{heads.q.token_stride}, d_rows{gradients.attended.token_stride};
  const float* q = at(heads.q, image, head * d);
  const float* d_attended = at(gradients.attended, image, head * dv);

  float logsumexp[kQueries] = {};
  const float* saved = heads.logsumexp + image * heads.logsumexp_image_stride + head * tokens + query;
  std::memcpy(logsumexp, saved, static_cast<size_t>(count) * sizeof(float));

  pack_columns(q, q_rows, {}, query, count, 0, d, buffers.query_lanes);
  pack_columns(q, {}, q_rows, 0, d, query, query + count, buffers.query_rows);
  pack_columns(d_attended, d_rows, {}, query, count, 0, dv, buffers.d_lanes);
  pack_columns(d_attended, {}, d_rows, 0, dv, query, query + count, buffers.d_rows);

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
      tile_product(rows, {tokens, buffers.d_scores + row, kQueries, buffers.key_columns + column * tokens, tile,
                          kTileColumns, false});
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
  pack_rows(k, rows, {}, 0, tokens, 0, d, buffers.key_rows);
  pack_rows(at(heads.v, image, head * dv), rows, {}, 0, tokens, 0, dv, buffers.value_rows);
  pack_columns(k, {}, rows, 0, d, 0, tokens, buffers.key_columns);
  for (int64_t query = 0; query < tokens; query += kQueries)
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

int64_t attend_scratch(const AttentionBlock& block, const Threads& threads) {
  return block.heads == 0 ? 0 : threads.count * ForwardSizes(block.tokens, block.head_dim, block.value_dim).total;
}

void attend(const Heads& heads, const Threads& threads, float* scratch) {
  // One task per block of queries, so that a single image of few heads still uses every thread; a job's tasks follow
  // each other and share the packed K and V of their head.
  const int64_t blocks = divide_up(heads.tokens, kQueries), tasks = heads.images * heads.heads * blocks;
  const int64_t jobs = smaller(threads.count, tasks);
  const ForwardSizes sizes(heads.tokens, heads.head_dim, heads.value_dim);
  parallel(threads, jobs, [&](int64_t job) {
    float* keys = scratch + job * sizes.total;
    float* values = keys + sizes.keys;
    const ForwardBuffers buffers{keys, values, values + sizes.values, values + sizes.values + sizes.queries};
    const Range range = part(tasks, job, jobs);
    int64_t packed = -1;
    for (int64_t task = range.begin; task < range.end; task++) {
      const int64_t image = task / blocks / heads.heads, head = task / blocks % heads.heads;
      if (task / blocks != packed) {
        packed = task / blocks;
        const Axis rows{heads.k.token_stride};
        pack_rows(at(heads.k, image, head * heads.head_dim), rows, {}, 0, heads.tokens, 0, heads.head_dim,
                  buffers.keys);
        pack_columns(at(heads.v, image, head * heads.value_dim), {}, rows, 0, heads.value_dim, 0, heads.tokens,
                     buffers.values);
      }
      attend_queries(heads, image, head, task % blocks * kQueries, buffers);
    }
  });
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
