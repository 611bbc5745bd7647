// Tests the CUDA kernels on the emulator, which runs them on any CPU as the PTX ISA says. A kernel that fails here is
// wrong on a GPU, too; a kernel that passes may still fail there.
#include "check.h"

int main() {
  using namespace hydravit::cuda::tests;
  test_instructions();
  test_e4m3();
  test_products();
  test_plans();
  test_networks();
  return finish();
}
