// E4m3 weights: packing rounds them and puts them in their places, and products read them back.
#include <algorithm>
#include <cfloat>
#include <set>

#include "check.h"
#include "plan.h"
#include "reference.h"
#include "tile.cuh"

namespace hydravit::cuda::tests {

namespace {

void test_places() {
  begin("places of e4m3 weights");
  constexpr int kRows = 64, kColumns = 128;
  std::set<int64_t> places;
  for (int row = 0; row < kRows; row++)
    for (int column = 0; column < kColumns; column++) {
      const int64_t at = e4m3_index(kRows, row, column),
                    first = (column / kPanelChannels * kRows + row / 8 * 8) * kPanelChannels;
      places.insert(at);
      expect(at >= first && at < first + 8 * kPanelChannels, "8 rows of a panel are contiguous");
    }
  expect(places.size() == kRows * kColumns && *places.rbegin() == kRows * kColumns - 1, "each place is used once");
}

void test_conversions() {
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

// A matrix that needs every kind of rounding.
Matrix difficult(int rows, int columns) {
  Matrix p{rows, columns, std::vector<float>(static_cast<size_t>(rows) * columns)};
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (float& v : p.values) v = normal(random);
  const auto row = [&](int i) { return p.values.begin() + static_cast<int64_t>(i) * columns; };
  std::fill_n(row(0), columns, 0.0f);
  row(1)[3] = NAN, row(1)[5] = INFINITY, row(1)[columns - 1] = -INFINITY;
  for (int j = 0; j < columns; j++) row(2)[j] *= 1e-37f, row(3)[j] *= 1e-42f, row(4)[j] *= 1e38f / 8;
  // The other rows have the scale 1 and hold all values, the points halfway between them, and the neighbours of these.
  std::vector<float> values;
  for (int code = 0; code < 127; code++) {
    const auto value = static_cast<float>(e4m3_value(static_cast<uint8_t>(code)));
    const auto next = static_cast<float>(code < 126 ? e4m3_value(static_cast<uint8_t>(code + 1)) : 448);
    const float middle = (value + next) / 2;
    for (const float v : {value, middle, std::nextafter(middle, value), std::nextafter(middle, next)})
      for (const float sign : {1.0f, -1.0f}) values.push_back(sign * v);
  }
  for (int i = 5; !values.empty(); i++) {
    row(i)[0] = -448.0f;
    for (int j = 1; j < columns && !values.empty(); j++, values.pop_back()) row(i)[j] = values.back();
  }
  return p;
}

void test_packing() {
  begin("packing to e4m3");
  const NetworkSizes sizes{1, 192, 256, 3, 4, 4, 1, 0, 17, 10, 16, 16, 0, 1};
  const Layout layout(sizes, Dtype::kE4m3);
  std::mt19937 random(7);
  std::vector<Matrix> matrices = random_parameters(sizes, prefix(sizes, 3, sizes.hidden), true, random);
  *by_name(sizes, matrices).mlp[0].fc1_weight = difficult(sizes.hidden, sizes.embed);
  std::vector<Parameter> parameters;
  for (const Matrix& p : matrices) {
    auto* values = static_cast<float*>(p.present() ? emulator::allocate(4 * p.values.size()) : nullptr);
    std::copy(p.values.begin(), p.values.end(), values);
    parameters.push_back({values, Dtype::kFp32, p.columns});
  }
  auto* memory = static_cast<uint8_t*>(emulator::allocate(layout.bytes));
  expect(pack(layout, parameters, memory, nullptr) == 0, "packing");
  emulator::synchronize();

  const std::vector<ParameterSpec> specs = parameter_specs(sizes);
  for (size_t i = 0; i < specs.size(); i++) {
    if (!specs[i].weight) continue;
    const Matrix& p = matrices[i];
    const Packed& to = layout.in_order[i];
    const auto* scales = reinterpret_cast<const float*>(memory + to.scales);
    for (int64_t row = 0; row < to.rows; row++) {
      if (row < p.rows) expect(scales[row] == e4m3_scale(p, row), "the scale of row " + std::to_string(row));
      for (int64_t column = 0; column < to.columns; column++) {
        const uint8_t code = memory[to.offset + e4m3_index(to.rows, row, column)];
        const bool inside = row < p.rows && column < p.columns;
        const uint8_t right = inside ? nearest_e4m3(p.values[row * p.columns + column] / scales[row]) : 0;
        expect(std::isnan(e4m3_value(right)) ? std::isnan(e4m3_value(code)) : code == right,
               "row " + std::to_string(row) + ", column " + std::to_string(column));
      }
    }
  }
  emulator::release_all();
}

}  // namespace

void test_e4m3() {
  test_places();
  test_conversions();
  test_packing();
}

}  // namespace hydravit::cuda::tests
