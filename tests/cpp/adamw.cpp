#include "check.h"

namespace hydravit::tests {

namespace {

constexpr AdamwStep kSteps[] = {
    {0.999f, 0.1f, 0.99f, 0.01f, 0.1f, 1e-8f, 0.1f, 1.0f},
    {1.0f, 0.6f, 0.9f, 0.1f, 0.4f, 1e-3f, 0.02f, 0.3f},
    {0.99f, 0.2f, 0.999f, 0.001f, 0.9f, 1e-8f, 0.01f, 0.01f},
};

// Every element takes all steps; only the last step sees the gradient.
template <class T>
void adamw(const std::vector<AdamwStep>& steps, Values<T>& v) {
  for (size_t s = 0; s < steps.size(); s++)
    for (size_t i = 0; i < v["weight"].values.size(); i++) {
      const AdamwStep& step = steps[s];
      T &weight = v["weight"].values[i], &first = v["first"].values[i], &second = v["second"].values[i];
      const T gradient = s + 1 == steps.size() && !v["d_weight"].empty() ? v["d_weight"].values[i] : T(0);
      weight *= step.decay;
      first += step.first_weight * (gradient - first);
      second = step.second_decay * second + step.second_weight * gradient * gradient;
      weight -= step.step_size * first / (std::sqrt(second) / step.correction + step.eps);
      if (v["average"].empty()) continue;
      T& average = v["average"].values[i];
      average += step.average_weight * (weight - average);
    }
}

// Two rectangles: the first row, and the other rows.
void run(const std::vector<AdamwStep>& steps, Arrays& arrays, const Threads& threads) {
  const AdamwTensor tensor{data(arrays, "weight"), data(arrays, "d_weight"), data(arrays, "first"),
                           data(arrays, "second"), data(arrays, "average")};
  const Array& array = arrays.at("weight");
  const int64_t rows = array.row_axes[0].size, stride = array.row_stride(), columns = array.column_axes[0].size;
  const int64_t count = static_cast<int64_t>(steps.size());
  const AdamwRectangle work[] = {{tensor, 0, 1, stride, columns, steps.data(), count},
                                 {tensor, stride, rows - 1, stride, columns, steps.data(), count}};
  launch([&] { return adamw_cpu({work, rows == 1 ? 1 : 2}, threads); });
}

}  // namespace

std::vector<Test> adamw_tests() {
  std::vector<Test> tests;
  for (const auto& [rows, columns] : {std::pair<int64_t, int64_t>{1, 1}, {3, 17}, {1, 40000}, {50, 700}})
    for (int64_t count = 1; count <= 3; count++) {
      std::mt19937 generator(5);
      Arrays arrays;
      for (const char* name : {"weight", "d_weight", "first", "second", "average"})
        arrays.emplace(name, random(weight(rows, columns), generator));
      Array& second = arrays.at("second");
      for (const int64_t offset : second.offsets()) second.memory[offset] = std::fabs(second.memory[offset]);
      const std::vector<AdamwStep> steps(kSteps, kSteps + count);
      const auto add = [&](const std::string& what, const Arrays& some) {
        tests.emplace_back(
            named("adamw", {rows, columns, count}) + what, some, [=](auto& values) { adamw(steps, values); },
            [=](Arrays& values, const Threads& threads) { run(steps, values, threads); });
      };
      add("", arrays);
      add(", nothing nullable", without(without(arrays, {"average"}), {"d_weight"}));
    }
  return tests;
}

}  // namespace hydravit::tests
