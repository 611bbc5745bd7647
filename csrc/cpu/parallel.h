// How work is split over the caller's threads, and the memory that a call works in.
//
// The words for the levels of division, from the outside in:
//
//   run     consecutive images of one width, which the bindings give to one kernel call; a network call takes several
//   chunk   images of a call that all threads work on together, before the next chunk begins
//   job     what one thread does between two meetings of the threads; there is at most one job per thread
//   share   the rows of one image that belong to one job
//   task    the attention of one head in one image; jobs may divide tasks instead of rows
//   band    rows of a share, or of a job of a gemm, that are computed together so that they stay in cache
//   tile    rows x columns of a product whose sums one loop holds in registers
//
// Columns are divided into panels (hydravit.h), the K axis of a product (gemm.h) into spans and pieces:
//
//   span    consecutive pieces whose operands are repacked together
//   piece   the K indices whose multiply-adds form one chain in registers
//
// `part` cuts a range into parts that are as equal as possible, at any level.
#pragma once

#include <cstdint>

#include "../hydravit.h"
#include "vector.h"

namespace hydravit::HYDRAVIT_ISA {

struct Range {
  int64_t begin, end;
};

// Part `i` of [0, total) in `count` parts, whose lengths differ by 1 at most.
static inline Range part(int64_t total, int64_t i, int64_t count) {
  return {total * i / count, total * (i + 1) / count};
}

// Calls body(job) for every job in [0, jobs), and returns when all calls have returned.
template <class Body>
void parallel(const Threads& threads, int64_t jobs, const Body& body) {
  if (jobs == 1) return body(0);
  const auto run = [](int64_t begin, int64_t end, void* context) {
    for (int64_t job = begin; job < end; job++) (*static_cast<const Body*>(context))(job);
  };
  threads.parallel_for(0, jobs, 1, run, const_cast<Body*>(&body));
}

// Calls body(begin, end) on parts of [0, total), one per job. `cost` is the number of floats that one item touches: a
// small job is not worth a thread.
template <class Body>
void parallel_ranges(const Threads& threads, int64_t total, int64_t cost, const Body& body) {
  constexpr int64_t kWorthAThread = 16384;
  const int64_t jobs = larger<int64_t>(1, smaller(threads.count, smaller(total, total * cost / kWorthAThread)));
  parallel(threads, jobs, [&](int64_t job) {
    const Range range = part(total, job, jobs);
    body(range.begin, range.end);
  });
}

// The number of jobs for `rows` rows of `cost` multiply-adds each.
static inline int64_t jobs_for(const Threads& threads, int64_t rows, int64_t cost) {
  constexpr int64_t kWorthAThread = 1 << 18;
  return larger<int64_t>(1, smaller(smaller(threads.count, rows), rows * cost / kWorthAThread));
}

// The same activations, from token `token` of image `image` on.
static inline Tokens rows_from(const Tokens& x, int64_t image, int64_t token) {
  return {x.data + image * x.image_stride + token * x.token_stride, x.image_stride, x.token_stride};
}
static inline MutableTokens rows_from(const MutableTokens& x, int64_t image, int64_t token) {
  if (x.data == nullptr) return x;
  return {x.data + image * x.image_stride + token * x.token_stride, x.image_stride, x.token_stride};
}

struct Share {
  int64_t image;
  Range tokens;
};

// Divides the tokens of all images, in order, into `jobs` jobs of equal weight, where a token weighs `weight(image)`.
// Calls body(share) for every share of job `job`.
template <class Weight, class Body>
void for_each_share(int64_t job, int64_t jobs, int64_t images, int64_t tokens, const Weight& weight, const Body& body) {
  int64_t total = 0;
  for (int64_t image = 0; image < images; image++) total += weight(image) * tokens;
  const Range own = part(total, job, jobs);
  int64_t start = 0;
  for (int64_t image = 0; image < images; image++) {
    const auto cut = [&](int64_t at) {
      return smaller(tokens, larger<int64_t>(0, at - start + weight(image) / 2) / weight(image));
    };
    const Range rows{cut(own.begin), cut(own.end)};
    if (rows.begin < rows.end) body(Share{image, rows});
    start += weight(image) * tokens;
  }
}
template <class Body>
void for_each_share(int64_t job, int64_t jobs, int64_t images, int64_t tokens, const Body& body) {
  for_each_share(job, jobs, images, tokens, [](int64_t) { return int64_t{1}; }, body);
}

// Calls body(band) for the bands of a share. The activations of a band stay in the level 2 cache.
constexpr int64_t kBandRows = 112;
template <class Body>
void for_each_band(const Range& tokens, const Body& body) {
  const int64_t count = tokens.end - tokens.begin, bands = divide_up(count, kBandRows);
  for (int64_t i = 0; i < bands; i++) {
    const Range band = part(count, i, bands);
    body(Range{tokens.begin + band.begin, tokens.begin + band.end});
  }
}

// Asks the system for pages of 2 MB, for memory that was not touched yet. Kernels read panels all over hundreds of
// megabytes of weights; with small pages, most of these reads would miss the cache of address translations.
void prefer_huge_pages(float* data, int64_t size);

// Whether each job has so many bands that it pays to repack the weights once for all of them. Otherwise every band
// repacks the columns that it multiplies, tile by tile.
static inline bool worth_repacking(int64_t rows, int64_t jobs) { return rows >= 3 * kBandRows * jobs; }

// The calling thread's memory. It only grows, so that only the first call of a size allocates. A kernel adds all its
// buffers first and then allocates them together. Empty buffers are null.
class Workspace {
 public:
  void add(float** buffer, int64_t count) {
    buffers_[size_++] = {buffer, total_, count > 0};
    total_ += round_up(count, 16);
  }
  bool allocate();

 private:
  struct Buffer {
    float** pointer;
    int64_t offset;
    bool used;
  };
  static constexpr int kBuffers = 16;
  Buffer buffers_[kBuffers];
  int size_ = 0;
  int64_t total_ = 0;
};

// The number of images of a chunk. A chunk has enough rows to amortise its fixed costs and few enough to stay in cache;
// chunks are as equal as possible. Gradients are summed chunk by chunk, so the number must not depend on the thread
// count: their bits would depend on it, too.
static inline int64_t images_per_chunk(int64_t batch, int64_t tokens) {
  constexpr int64_t kRows = 1024;
  return divide_up(batch, divide_up(batch, larger<int64_t>(1, kRows / tokens)));
}

}  // namespace hydravit::HYDRAVIT_ISA
