// Products read E4m3 weights back as what they are; tests/kernels/networks compares what packing makes with PyTorch.
#include "e4m3.h"

#include <cmath>

#include "check.h"
#include "tile.cuh"

namespace hydravit::cuda::tests {

void test_e4m3() {
  begin("conversions of e4m3");
  for (int pair = 0; pair < 0x10000; pair++)
    for (const uint32_t halves :
         {convert_e4m3(static_cast<uint16_t>(pair)), convert_e4m3_bits(static_cast<uint16_t>(pair))})
      for (int i = 0; i < 2; i++) {
        const float half = to_float(Fp16{static_cast<uint16_t>(halves >> 16 * i)});
        const double value = e4m3_value(static_cast<uint8_t>(pair >> 8 * i));
        expect(std::isnan(value) ? std::isnan(half) : half == value && std::signbit(half) == std::signbit(value),
               "of " + std::to_string(pair));
      }
}

}  // namespace hydravit::cuda::tests
