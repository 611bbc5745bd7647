#include "check.h"

namespace hydravit::tests {

namespace {

constexpr AdamwStep kSteps[] = {
    {0.999f, 0.1f, 0.99f, 0.01f, 0.1f, 1e-8f, 0.1f, 1.0f},
    {1.0f, 0.6f, 0.9f, 0.1f, 0.4f, 1e-3f, 0.02f, 0.3f},
    {0.99f, 0.2f, 0.999f, 0.001f, 0.9f, 1e-8f, 0.01f, 0.01f},
};

// All elements of all arrays, one after the other.
template <class T>
void adamw(const AdamwStep& step, Values<T>& v) {
  for (size_t i = 0; i < v["weight"].values.size(); i++) {
    T &weight = v["weight"].values[i], &first = v["first"].values[i], &second = v["second"].values[i];
    const T gradient = v["d_weight"].values[i];
    weight *= step.decay;
    first += step.first_weight * (gradient - first);
    second = step.second_decay * second + step.second_weight * gradient * gradient;
    weight -= step.step_size * first / (std::sqrt(second) / step.correction + step.eps);
    if (v["average"].empty()) continue;
    T& average = v["average"].values[i];
    average += step.average_weight * (weight - average);
  }
}

// Two rectangles: the first row, and the others.
void run(const AdamwStep& step, Arrays& arrays, const Threads& threads) {
  const Array& array = arrays.at("weight");
  const int64_t rows = array.row_axes[0].size, stride = array.row_stride(), columns = array.column_axes[0].size;
  float* average = data(arrays, "average");
  const auto rectangle = [&](int64_t offset, int64_t count) {
    return AdamwRectangle{data(arrays, "weight") + offset,
                          data(arrays, "d_weight") + offset,
                          data(arrays, "first") + offset,
                          data(arrays, "second") + offset,
                          average == nullptr ? nullptr : average + offset,
                          count,
                          stride,
                          columns,
                          &step};
  };
  const AdamwRectangle work[] = {rectangle(0, 1), rectangle(rows == 1 ? 0 : stride, rows - 1)};
  launch([&] { return adamw_cpu({work, rows == 1 ? 1 : 2}, threads); });
}

}  // namespace

std::vector<Test> adamw_tests() {
  std::vector<Test> tests;
  for (const auto& [rows, columns] : {std::pair<int64_t, int64_t>{1, 1}, {3, 17}, {1, 40000}, {50, 700}})
    for (const AdamwStep& step : kSteps) {
      std::mt19937 generator(5);
      Arrays arrays;
      for (const char* name : {"weight", "d_weight", "first", "second", "average"})
        arrays.emplace(name, random(weight(rows, columns), generator));
      Array& second = arrays.at("second");
      for (const int64_t offset : second.offsets()) second.memory[offset] = std::fabs(second.memory[offset]);
      const auto add = [&](const std::string& what, const Arrays& some) {
        tests.emplace_back(
            named("adamw", {rows, columns, &step - kSteps}) + what, some, [=](auto& values) { adamw(step, values); },
            [=](Arrays& values, const Threads& threads) { run(step, values, threads); });
      };
      add("", arrays);
      add(", no average", without(arrays, {"average"}));
    }
  return tests;
}

}  // namespace hydravit::tests
