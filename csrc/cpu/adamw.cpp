// AdamW and the average of the weights in one pass: every element is read and written once. The file is compiled
// without contraction, so that an element's bits depend neither on its rectangle nor on the thread, and are those of
// torch's fused AdamW where the instruction set has fused multiply-add.
#include "kernels.h"
#include "parallel.h"
#include "vector.h"

namespace hydravit::HYDRAVIT_ISA {

namespace {

// Compilers turn a loop over the lanes into one instruction.
Vec square_root(Vec a) {
  Vec result{};
  for (int i = 0; i < kWidth; i++) result[i] = __builtin_sqrtf(a[i]);
  return result;
}

#ifdef __FP_FAST_FMAF
Vec multiply_add(Vec a, Vec b, Vec c) {
  Vec result{};
  for (int i = 0; i < kWidth; i++) result[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return result;
}
#else
Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
#endif

// a + weight * (b - a), computed from the nearer of a and b, so that a weight of 1 gives exactly b.
Vec interpolate(Vec a, Vec b, float weight) {
  const bool near_a = weight < 0.5f;
  return multiply_add(splat(near_a ? weight : weight - 1.0f), b - a, near_a ? a : b);
}

// Updates `count` elements from `at` on, at most a vector.
void advance(const AdamwRectangle& rectangle, int64_t at, int64_t count) {
  const AdamwStep& step = *rectangle.step;
  const Vec gradient = load(rectangle.gradient + at, count);
  Vec weight = load(rectangle.weight + at, count) * step.decay;
  const Vec first = interpolate(load(rectangle.first + at, count), gradient, step.first_weight);
  const Vec second =
      multiply_add(step.second_weight * gradient, gradient, load(rectangle.second + at, count) * step.second_decay);
  const Vec denominator = square_root(second) / step.correction + step.eps;
  weight += -step.step_size * first / denominator;
  store(rectangle.weight + at, weight, count);
  store(rectangle.first + at, first, count);
  store(rectangle.second + at, second, count);
  if (rectangle.average == nullptr) return;
  store(rectangle.average + at, interpolate(load(rectangle.average + at, count), weight, step.average_weight), count);
}

// Prefetches the next row of a rectangle: rows are short, and hardware cannot guess where the next one begins.
void fetch(const AdamwRectangle& rectangle, int64_t at) {
  __builtin_prefetch(rectangle.weight + at);
  __builtin_prefetch(rectangle.gradient + at);
  __builtin_prefetch(rectangle.first + at);
  __builtin_prefetch(rectangle.second + at);
  if (rectangle.average != nullptr) __builtin_prefetch(rectangle.average + at);
}

// Updates elements [begin, end), counted row by row.
void advance(const AdamwRectangle& rectangle, const Range& elements) {
  for (int64_t i = elements.begin; i < elements.end;) {
    const int64_t row = i / rectangle.columns, column = i % rectangle.columns;
    const int64_t stop = smaller(rectangle.columns, column + elements.end - i);
    const int64_t start = row * rectangle.row_stride;
    for (int64_t c = column; c < stop; c += kWidth) {
      if (row + 1 < rectangle.rows) fetch(rectangle, start + c + rectangle.row_stride);
      advance(rectangle, start + c, stop - c);
    }
    i += stop - column;
  }
}

}  // namespace

int adamw(const Adamw& work, const Threads& threads) {
  int64_t total = 0;
  for (int64_t i = 0; i < work.count; i++) total += work.rectangles[i].rows * work.rectangles[i].columns;
  constexpr int64_t kWorthAThread = 6500;  // elements
  const int64_t jobs = larger<int64_t>(1, smaller(threads.count, total / kWorthAThread));
  parallel(threads, jobs, [&](int64_t job) {
    const Range own = part(total, job, jobs);
    int64_t start = 0;
    for (int64_t i = 0; i < work.count; i++) {
      const AdamwRectangle& rectangle = work.rectangles[i];
      const int64_t elements = rectangle.rows * rectangle.columns;
      const auto cut = [&](int64_t at) { return smaller(elements, larger<int64_t>(0, at - start)); };
      advance(rectangle, {cut(own.begin), cut(own.end)});
      start += elements;
    }
  });
  return kOk;
}

}  // namespace hydravit::HYDRAVIT_ISA
