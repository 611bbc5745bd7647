// The tests of the CUDA kernels, which use the oracle of the CPU kernels' tests.
#pragma once

#include "../cpp/report.h"

namespace hydravit::cuda::tests {

using namespace hydravit::tests;

void test_e4m3();
void test_instructions();
void test_networks();
void test_plans();
void test_products();

}  // namespace hydravit::cuda::tests
