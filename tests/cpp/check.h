// The parts of a test of one launcher, and the check of its results.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "arrays.h"
#include "naive.h"

namespace hydravit::tests {

// `run` calls the kernels on a copy of `arrays`. `plain` and `exact` are the same loops in float and in double, on the
// matrices in `arrays`. Every array must then hold their results.
struct Test {
  std::string name;
  Arrays arrays;
  std::function<void(Values<float>&)> plain;
  std::function<void(Values<double>&)> exact;
  std::function<void(Arrays&, const Threads&)> run;

  template <class Naive, class Run>
  Test(std::string name, Arrays arrays, const Naive& naive, const Run& run)
      : name(std::move(name)), arrays(std::move(arrays)), plain(naive), exact(naive), run(run) {}
};

inline std::string named(std::string name, const std::vector<int64_t>& sizes) {
  for (const int64_t size : sizes) name += ' ', name += std::to_string(size);
  return name;
}

// Counts and prints a failure of the running test.
void expect(bool right, const std::string& what);
void expect_same(const Array& a, const Array& b, const std::string& what);  // bit by bit
// Calls a launcher and expects success. It calls from a new thread: the kernels keep memory per thread, so this memory
// is no larger than the call needs, and the address sanitizer sees accesses beyond.
void launch(const std::function<int()>& launcher);

std::vector<Test> adamw_tests();
std::vector<Test> attention_tests();
std::vector<Test> head_tests();
std::vector<Test> mlp_tests();
std::vector<Test> network_tests();
std::vector<Test> stem_tests();

// ---- Absent nullable arrays ----

inline bool is_gradient(const std::string& name) { return name.starts_with("d_"); }

inline Arrays without(Arrays arrays, const std::vector<std::string>& names) {
  for (const std::string& name : names) arrays.erase(name), arrays.erase("d_" + name);
  return arrays;
}
// Keeps one gradient only.
inline Arrays only(Arrays arrays, const std::string& gradient) {
  std::erase_if(arrays, [&](const auto& entry) { return is_gradient(entry.first) && entry.first != gradient; });
  return arrays;
}

}  // namespace hydravit::tests
