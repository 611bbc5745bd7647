// Tests the CUDA kernels on the emulator, which runs them on any CPU as the PTX ISA says. A kernel that fails here is
// wrong on a GPU, too; a kernel that passes may still fail there.
#include <cstdio>

#include "check.h"

namespace hydravit::cuda::tests {

namespace {

std::string running;
int tests = 0, failures = 0;

}  // namespace

void begin(const std::string& name) {
  running = name;
  tests++;
  std::printf("%s\n", name.c_str());
  std::fflush(stdout);
}

void expect(bool right, const std::string& what) {
  if (right) return;
  failures++;
  std::printf("FAILED %s: %s\n", running.c_str(), what.c_str());
}

}  // namespace hydravit::cuda::tests

int main() {
  using namespace hydravit::cuda::tests;
  test_instructions();
  test_e4m3();
  test_products();
  test_plans();
  test_networks();
  std::printf("%d tests, %d failures\n", tests, failures);
  return failures == 0 ? 0 : 1;
}
