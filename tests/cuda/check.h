// Tests of the CUDA kernels report by these functions.
#pragma once

#include <string>

namespace hydravit::cuda::tests {

void begin(const std::string& name);
void expect(bool right, const std::string& what);

void test_e4m3();
void test_instructions();
void test_networks();
void test_plans();
void test_products();

}  // namespace hydravit::cuda::tests
