// Compares every launcher of csrc/hydravit.h with plain loops, on every instruction set of this CPU and with 1, 2 and 3
// threads.
#include <cstdio>
#include <thread>

#include "check.h"

// Memory begins as NaN, so that a read before the first write shows.
extern "C" const char* __asan_default_options() { return "malloc_fill_byte=255:max_malloc_fill_size=1073741824"; }

namespace hydravit::tests {

namespace {

template <int count>
void parallel_for(int64_t begin, int64_t end, int64_t, RangeBody body, void* context) {
  const auto part = [&](int64_t i) { return begin + (end - begin) * i / count; };
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < count; i++) threads.emplace_back(body, part(i), part(i + 1), context);
  body(part(0), part(1), context);
  for (std::thread& thread : threads) thread.join();
}
const Threads kThreads[] = {{parallel_for<1>, 1}, {parallel_for<2>, 2}, {parallel_for<3>, 3}};

template <class T>
Values<T> values_of(const Arrays& arrays) {
  Values<T> values;
  for (const auto& [name, array] : arrays) {
    const std::vector<float> floats = array.values();
    values[name] = {size_of(array.row_axes), size_of(array.column_axes), std::vector<T>(floats.begin(), floats.end())};
  }
  return values;
}

// Compares the outputs that the test asked for: the others are NaN in the loops and in the array.
void check_array(const std::string& name, const Array& array, const std::vector<float>& plain,
                 const std::vector<double>& exact) {
  expect(array.untouched_outside(), name + " was written outside of its slice");
  const std::vector<float> values = array.values();
  if (values.size() != exact.size()) return expect(false, name + " has no counterpart of its size");
  std::vector<float> actual, loops;
  std::vector<double> wanted;
  for (size_t i = 0; i < exact.size(); i++) {
    if (std::isnan(exact[i]) && std::isnan(values[i])) continue;
    actual.push_back(values[i]), loops.push_back(plain[i]), wanted.push_back(exact[i]);
  }
  expect_within_budget(name, actual, loops, wanted, std::numeric_limits<float>::epsilon());
}

void check(const Test& test, const std::vector<const char*>& isas) {
  Values<float> plain = values_of<float>(test.arrays);
  Values<double> exact = values_of<double>(test.arrays);
  test.plain(plain);
  test.exact(exact);
  for (const char* isa : isas) {
    set_cpu_isa(isa);
    Arrays first;
    for (const Threads& threads : kThreads) {
      begin(test.name + ", " + isa + ", threads " + std::to_string(threads.count));
      Arrays arrays = test.arrays;
      test.run(arrays, threads);
      if (threads.count == 1) {
        for (const auto& [name, array] : arrays) check_array(name, array, plain[name].values, exact[name].values);
        first = std::move(arrays);
        continue;
      }
      for (const auto& [name, array] : arrays) expect_same(array, first.at(name), name + " of one thread");
    }
  }
}

}  // namespace

void expect_same(const Array& a, const Array& b, const std::string& what) {
  expect(same_bits(a.memory, b.memory), "not the same bits as " + what);
}

void launch(const std::function<int()>& launcher) {
  int status = kOk;
  std::thread([&] { status = launcher(); }).join();
  expect(status == kOk, status_text(status));
}

}  // namespace hydravit::tests

int main() {
  using namespace hydravit;
  using namespace hydravit::tests;
  std::vector<const char*> isas;
  for (const char* isa : {"avx512", "avx2", "portable"}) {
    const int status = set_cpu_isa(isa);
    if (status == kOk) isas.push_back(isa);
    std::printf("%s: %s\n", isa, status_text(status));
  }
  for (const std::vector<Test>& tests :
       {stem_tests(), attention_tests(), mlp_tests(), head_tests(), network_tests(), adamw_tests()})
    for (const Test& test : tests) check(test, isas);
  return isas.empty() ? 1 : finish();
}
