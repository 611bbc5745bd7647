// Work split over the caller's threads, and the memory that a call works in.
#pragma once

#include <cstdint>

#include "../hydravit.h"
#include "vector.h"

namespace hydravit::HYDRAVIT_ISA {

struct Range {
  int64_t begin, end;
};

// Part `job` of [0, total), split as evenly as whole numbers allow.
static inline Range part(int64_t total, int64_t job, int64_t jobs) {
  return {total * job / jobs, total * (job + 1) / jobs};
}

// body(job) for every job in [0, jobs).
template <class Body>
void parallel(const Threads& threads, int64_t jobs, const Body& body) {
  if (jobs == 1) return body(0);
  const auto run = [](int64_t begin, int64_t end, void* context) {
    for (int64_t job = begin; job < end; job++) (*static_cast<const Body*>(context))(job);
  };
  threads.parallel_for(0, jobs, 1, run, const_cast<Body*>(&body));
}

// body(begin, end) on parts of [0, total); `cost` is the number of floats that one item touches.
template <class Body>
void parallel_ranges(const Threads& threads, int64_t total, int64_t cost, const Body& body) {
  constexpr int64_t kWorthAThread = 16384;
  const int64_t jobs = larger<int64_t>(1, smaller(threads.count, smaller(total, total * cost / kWorthAThread)));
  parallel(threads, jobs, [&](int64_t job) {
    const Range range = part(total, job, jobs);
    body(range.begin, range.end);
  });
}

// How many jobs are worth their threads for `rows` rows of `cost` multiply-adds each.
static inline int64_t jobs_for(const Threads& threads, int64_t rows, int64_t cost) {
  constexpr int64_t kWorthAThread = 1 << 18;
  return larger<int64_t>(1, smaller(smaller(threads.count, rows), rows * cost / kWorthAThread));
}

// Tokens of one image from one on.
static inline Tokens rows_from(const Tokens& x, int64_t image, int64_t token) {
  return {x.data + image * x.image_stride + token * x.token_stride, x.image_stride, x.token_stride};
}
static inline MutableTokens rows_from(const MutableTokens& x, int64_t image, int64_t token) {
  if (x.data == nullptr) return x;
  return {x.data + image * x.image_stride + token * x.token_stride, x.image_stride, x.token_stride};
}

// Rows of one image, the work of one thread.
struct Share {
  int64_t image;
  Range tokens;
};

// body(share) for every image's part of job `job`: the tokens of all images in one line, `weight(image)` each, are cut
// into `jobs` parts of equal weight.
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

// A share in as few equal bands as keep a band's activations in the level 2 cache.
constexpr int64_t kBandRows = 112;
template <class Body>
void for_each_band(const Range& tokens, const Body& body) {
  const int64_t count = tokens.end - tokens.begin, bands = divide_up(count, kBandRows);
  for (int64_t i = 0; i < bands; i++) {
    const Range band = part(count, i, bands);
    body(Range{tokens.begin + band.begin, tokens.begin + band.end});
  }
}

// Asks for pages of 2 MB around memory that was not touched yet, where the system has them: weights of hundreds of
// megabytes are read at random panels, and small pages miss in the processor's table of addresses.
void prefer_huge_pages(float* data, int64_t size);

// Whether each job has so many bands that the weights are better packed once for all: alone, every band packs them.
static inline bool many_bands(int64_t rows, int64_t jobs) { return rows >= 3 * kBandRows * jobs; }

// The calling thread's memory: one aligned block that only ever grows, so that a call after the first of its size
// allocates nothing. Name the buffers first, then allocate them together. Empty buffers are null.
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

// Images that are worked on together: enough rows to amortise what is done once for all of them, few enough to stay in
// cache, and chunks as equal as can be. Independent of the thread count: sums over rows are taken chunk by chunk.
static inline int64_t images_per_chunk(int64_t batch, int64_t tokens) {
  constexpr int64_t kRows = 1024;
  return divide_up(batch, divide_up(batch, larger<int64_t>(1, kRows / tokens)));
}

}  // namespace hydravit::HYDRAVIT_ISA
