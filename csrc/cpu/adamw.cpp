// AdamW and the average of the weights in one pass: every element is read and written once, however many steps it goes
// through in between. Compiled without contraction, so that an element's bits depend neither on the rectangle it came
// in nor on the thread, and are those of torch's fused AdamW where the instruction set has fused multiply-add.
#include "kernels.h"
#include "parallel.h"
#include "vector.h"

namespace hydravit::HYDRAVIT_ISA {

namespace {

// Compilers turn these loops over the lanes into one instruction.
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

// a + weight * (b - a), from the end that is nearer: with a weight of 1 it is b, exactly.
Vec interpolate(Vec a, Vec b, float weight) {
  const bool near_a = weight < 0.5f;
  return multiply_add(splat(near_a ? weight : weight - 1.0f), b - a, near_a ? a : b);
}

// `count` elements from `at` on, at most a vector.
void advance(const AdamwRectangle& work, int64_t at, int64_t count) {
  const AdamwTensor& tensor = work.tensor;
  const bool averaged = tensor.average != nullptr;
  Vec weight = load(tensor.weight + at, count);
  Vec first = load(tensor.first + at, count), second = load(tensor.second + at, count);
  Vec average = averaged ? load(tensor.average + at, count) : Vec{};
  for (int64_t i = 0; i < work.steps; i++) {
    const AdamwStep& step = work.first_step[i];
    const bool seen = tensor.gradient != nullptr && i == work.steps - 1;
    const Vec gradient = seen ? load(tensor.gradient + at, count) : Vec{};
    weight *= step.decay;
    first = interpolate(first, gradient, step.first_weight);
    second = multiply_add(step.second_weight * gradient, gradient, second * step.second_decay);
    const Vec denominator = square_root(second) / step.correction + step.eps;
    weight += -step.step_size * first / denominator;
    if (averaged) average = interpolate(average, weight, step.average_weight);
  }
  store(tensor.weight + at, weight, count);
  store(tensor.first + at, first, count);
  store(tensor.second + at, second, count);
  if (averaged) store(tensor.average + at, average, count);
}

// Where rows are short the hardware does not see where the next one begins: it is fetched while this one is used.
void fetch(const AdamwTensor& tensor, int64_t at) {
  const float* arrays[] = {tensor.weight, tensor.gradient, tensor.first, tensor.second, tensor.average};
  for (const float* array : arrays)
    if (array != nullptr) __builtin_prefetch(array + at);
}

// Elements [begin, end), counted row by row.
void advance(const AdamwRectangle& work, const Range& elements) {
  for (int64_t i = elements.begin; i < elements.end;) {
    const int64_t row = i / work.columns, column = i % work.columns;
    const int64_t stop = smaller(work.columns, column + elements.end - i);
    const int64_t start = work.offset + row * work.row_stride;
    for (int64_t c = column; c < stop; c += kWidth) {
      if (row + 1 < work.rows) fetch(work.tensor, start + c + work.row_stride);
      advance(work, start + c, stop - c);
    }
    i += stop - column;
  }
}

// What an element costs, in steps: its way from memory and back is worth a few of them.
int64_t cost_of(const AdamwRectangle& work) { return 4 + work.steps; }

}  // namespace

int adamw(const Adamw& work, const Threads& threads) {
  int64_t total = 0;
  for (int64_t i = 0; i < work.count; i++) {
    const AdamwRectangle& rectangle = work.rectangles[i];
    total += rectangle.rows * rectangle.columns * cost_of(rectangle);
  }
  constexpr int64_t kWorthAThread = 1 << 15;
  const int64_t jobs = larger<int64_t>(1, smaller(threads.count, total / kWorthAThread));
  parallel(threads, jobs, [&](int64_t job) {
    const Range own = part(total, job, jobs);
    int64_t start = 0;
    for (int64_t i = 0; i < work.count; i++) {
      const AdamwRectangle& rectangle = work.rectangles[i];
      const int64_t elements = rectangle.rows * rectangle.columns, cost = cost_of(rectangle);
      const auto cut = [&](int64_t at) { return smaller(elements, larger<int64_t>(0, at - start) / cost); };
      advance(rectangle, {cut(own.begin), cut(own.end)});
      start += elements * cost;
    }
  });
  return kOk;
}

}  // namespace hydravit::HYDRAVIT_ISA
