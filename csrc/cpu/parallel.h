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

// Images that are worked on together: enough rows to amortise the packing of the weights, few enough to stay in cache.
// Independent of the thread count, because sums over rows are taken chunk by chunk.
static inline int64_t images_per_chunk(int64_t batch, int64_t tokens) {
  constexpr int64_t kRows = 1024;
  return smaller(batch, larger<int64_t>(1, kRows / tokens));
}

}  // namespace hydravit::HYDRAVIT_ISA
