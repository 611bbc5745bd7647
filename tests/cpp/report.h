// What the test programs share: reporting, and the error budget.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace hydravit::tests {

inline std::string running;  // the name of the test
inline int test_count = 0, failure_count = 0;

// Prints the name at once, so that it stands there when the test ends the program.
inline void begin(const std::string& name) {
  running = name;
  test_count++;
  std::printf("%s\n", name.c_str());
  std::fflush(stdout);
}

// Counts and prints a failure of the running test.
inline void expect(bool right, const std::string& what) {
  if (right) return;
  failure_count++;
  std::printf("FAILED %s: %s\n", running.c_str(), what.c_str());
}

// Prints the counts; returns the exit status of the program.
inline int finish() {
  std::printf("%d tests, %d failures\n", test_count, failure_count);
  return failure_count == 0 ? 0 : 1;
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// The L2 norm of the difference; NaN if there is none because the sizes differ.
template <class T>
double distance(const std::vector<T>& a, const std::vector<double>& b) {
  if (a.size() != b.size()) return NAN;
  double squares = 0;
  for (size_t i = 0; i < b.size(); i++) squares += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(squares);
}

inline double norm_of(const std::vector<double>& a) { return distance(a, std::vector<double>(a.size())); }

// Allows twice the error of the plain loops in the dtype of the kernels, plus two of its units in the last place of the
// root mean square.
template <class T>
void expect_within_budget(const std::string& name, const std::vector<float>& actual, const std::vector<T>& plain,
                          const std::vector<double>& exact, double unit) {
  const double error = distance(actual, exact), of_plain = distance(plain, exact);
  const double allowed = 2 * of_plain + 2 * unit * norm_of(exact);
  char errors[96];
  std::snprintf(errors, sizeof errors, "error %.3e in L2 norm, allowed %.3e, eager's %.3e", error, allowed, of_plain);
  expect(error <= allowed, name + ": " + errors);  // false for a NaN
}

}  // namespace hydravit::tests
