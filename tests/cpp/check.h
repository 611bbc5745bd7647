// What a test of one launcher is made of, and how its outcome is judged.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "arrays.h"
#include "naive.h"

namespace hydravit::tests {

// `run` calls the kernels on a copy of `arrays`. Then every array has to hold what `plain` and `exact`, the same loops
// in float and in double, make of the matrices in `arrays`.
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
// Calls a launcher and expects success. In a thread of its own: the kernels keep their memory by thread, so it is no
// larger than this call needs, and the address sanitizer sees what is touched beyond.
void launch(const std::function<int()>& launcher);

std::vector<Test> adamw_tests();
std::vector<Test> attention_tests();
std::vector<Test> head_tests();
std::vector<Test> mlp_tests();
std::vector<Test> network_tests();
std::vector<Test> stem_tests();

// ---- Which of the nullable arrays are there ----

inline bool is_gradient(const std::string& name) { return name.starts_with("d_"); }

inline Arrays without(Arrays arrays, const std::vector<std::string>& names) {
  for (const std::string& name : names) arrays.erase(name), arrays.erase("d_" + name);
  return arrays;
}
// Of the gradients, only this one.
inline Arrays only(Arrays arrays, const std::string& gradient) {
  std::erase_if(arrays, [&](const auto& entry) { return is_gradient(entry.first) && entry.first != gradient; });
  return arrays;
}

}  // namespace hydravit::tests
