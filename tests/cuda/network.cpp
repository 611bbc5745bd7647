// The whole network as the kernels compute it, on the emulator, against plain loops: every way of tiling, loading and
// interleaving gives the same bits, within the error budget, and nothing outside of the slice is read.
#include <cstdio>
#include <cstring>

#include "check.h"
#include "ptx.cuh"
#include "reference.h"
#include "schedule.h"

namespace hydravit::cuda::tests {

namespace {

double rounded(double value, Dtype dtype) {
  if (dtype == Dtype::kBf16) {
    Bf16 half;
    from_float(static_cast<float>(value), half);
    return to_float(half);
  }
  Fp16 half;
  from_float(static_cast<float>(value), half);
  return to_float(half);
}

// A parameter or an image on the device, in any dtype.
Parameter upload(const Matrix& p, Dtype dtype) {
  if (!p.present()) return {nullptr, dtype, 0};
  const size_t count = p.values.size();
  auto* memory = static_cast<uint8_t*>(emulator::allocate(count * (dtype == Dtype::kFp32 ? 4 : 2)));
  for (size_t i = 0; i < count; i++) {
    if (dtype == Dtype::kFp32)
      std::memcpy(memory + 4 * i, &p.values[i], 4);
    else if (dtype == Dtype::kBf16)
      from_float(p.values[i], *reinterpret_cast<Bf16*>(memory + 2 * i));
    else
      from_float(p.values[i], *reinterpret_cast<Fp16*>(memory + 2 * i));
  }
  return {memory, dtype, p.columns};
}

struct Case {
  std::string name;
  Model model;
  Width width;
  bool with_optional = true;
  Dtype stored = Dtype::kFp32;  // of parameters and images
};

Width prefix(const Model& m, int heads, int hidden) {
  const AttentionSlice a{0, m.embed, 2 * m.embed, 0, heads, 0.125f};
  Width w{0, heads * kHeadDim, {}, {}, 0, m.classes, 1e-6f};
  w.attention.assign(m.depth, a);
  w.mlp.assign(m.depth, {0, hidden});
  return w;
}

class Network {
 public:
  Network(const Case& test, Dtype dtype, int images)
      : test_(test), dtype_(dtype), images_(images), layout_(test.model, dtype) {
    std::mt19937 random(7);
    expect(why_not(test.model).empty() && why_not(test.model, test.width).empty(), test.name + " is possible");
    parameters_ = random_parameters(test.model, test.width, test.with_optional, random);
    const Model& m = test.model;
    const int area = m.grid_height * m.patch_height * m.grid_width * m.patch_width;
    pixels_ = {images, m.channels * area, std::vector<float>(static_cast<size_t>(images) * m.channels * area)};
    std::normal_distribution<float> normal;
    for (float& v : pixels_.values) v = normal(random);
  }

  // `together`: as one kernel, and twice, for its counters go on.
  std::vector<float> run(Loader loader, int processors, bool pooled_only, int first_image = 0, int images = -1,
                         bool together = false) {
    if (images < 0) images = images_;
    const Model& model = test_.model;
    std::vector<Parameter> sources;
    for (const Matrix& p : parameters_) sources.push_back(upload(p, test_.stored));
    auto* packed = static_cast<uint8_t*>(emulator::allocate(layout_.bytes));
    const Workspace workspace(model, images_);
    auto* memory = static_cast<uint8_t*>(emulator::allocate(workspace.bytes));
    Matrix pixels{images, pixels_.columns, {}};
    const auto from = pixels_.values.begin() + static_cast<int64_t>(first_image) * pixels_.columns;
    pixels.values.assign(from, from + static_cast<int64_t>(images) * pixels_.columns);
    const size_t count = static_cast<size_t>(images) * test_.width.classes;
    const Ends ends{upload(pixels, test_.stored).data, test_.stored,
                    static_cast<float*>(emulator::allocate(4 * count))};
    expect(pack(model, layout_, sources, packed, nullptr) == 0, "packing");
    const bool bulk = loader == Loader::kBulk;
    const Device device{processors, bulk ? 232448 : 166912, loader, 0, bulk};
    const Call call{packed, memory, images, pooled_only, together};
    std::vector<Phase> phases = plan(model, layout_, test_.width, workspace, device, call);
    ends.set(phases);
    if (together) {
      const Schedule all = schedule(phases, device);
      auto* steps = static_cast<Step*>(emulator::allocate(all.steps.size() * sizeof(Step)));
      std::copy(all.steps.begin(), all.steps.end(), steps);
      auto* counters = static_cast<uint32_t*>(emulator::allocate(all.counters * sizeof(uint32_t)));
      std::fill_n(counters, all.counters, 0);
      for (int i = 0; i < 2; i++) expect(launch(all, steps, counters, ends, dtype_, loader, nullptr) == 0, "launching");
    } else {
      for (const Phase& phase : phases) expect(launch(phase, dtype_, loader, nullptr) == 0, "launching");
    }
    emulator::synchronize();
    std::vector<float> logits(ends.logits, ends.logits + count);
    emulator::release_all();
    return logits;
  }

  void check_error(const std::vector<float>& logits) const {
    const Round exact = [](double v) { return v; }, half = [&](double v) { return rounded(v, dtype_); };
    std::vector<Matrix> stored = parameters_;
    if (test_.stored != Dtype::kFp32)
      for (Matrix& p : stored)
        for (float& v : p.values) v = static_cast<float>(rounded(v, test_.stored));
    const std::vector<Matrix> packed = dtype_ == Dtype::kE4m3 ? quantised(stored) : stored;
    double ours = 0, eager = 0, squares = 0, quantisation = 0;
    for (int image = 0; image < images_; image++) {
      std::vector<float> pixels(pixels_.values.begin() + static_cast<int64_t>(image) * pixels_.columns,
                                pixels_.values.begin() + static_cast<int64_t>(image + 1) * pixels_.columns);
      if (test_.stored != Dtype::kFp32)
        for (float& v : pixels) v = static_cast<float>(rounded(v, test_.stored));
      const auto right = Reference(test_.model, test_.width, packed, exact).run(pixels.data());
      const auto low = Reference(test_.model, test_.width, packed, half).run(pixels.data());
      const auto before =
          dtype_ == Dtype::kE4m3 ? Reference(test_.model, test_.width, stored, exact).run(pixels.data()) : right;
      for (size_t i = 0; i < right.size(); i++) {
        const double error = logits[image * right.size() + i] - right[i];
        ours += error * error;
        eager += (low[i] - right[i]) * (low[i] - right[i]);
        squares += right[i] * right[i];
        quantisation += (right[i] - before[i]) * (right[i] - before[i]);
      }
    }
    const double unit = dtype_ == Dtype::kBf16 ? 1.0 / 128 : 1.0 / 1024;
    const double allowed = 2 * std::sqrt(eager) + 2 * unit * std::sqrt(squares);
    char text[96];
    std::snprintf(text, sizeof text, "error %.2e, allowed %.2e, eager's %.2e", std::sqrt(ours), allowed,
                  std::sqrt(eager));
    expect(std::sqrt(ours) <= allowed, text);
    if (dtype_ == Dtype::kE4m3)
      std::printf("  rounding the weights moves the logits by %.1f %%\n", 100 * std::sqrt(quantisation / squares));
  }

 private:
  const Case& test_;
  const Dtype dtype_;
  const int images_;
  const Layout layout_;
  std::vector<Matrix> parameters_;
  Matrix pixels_;
};

std::vector<Case> cases() {
  const Model small{2, 192, 256, 10, 3, 4, 4, 4, 4, 1, 0, true, 0, 1};  // 17 tokens
  std::vector<Case> result;
  for (int heads = 1; heads <= 3; heads++)
    result.push_back({"prefix of " + std::to_string(heads), small, prefix(small, heads, 64 * heads)});

  Case offsets{"offsets", small, prefix(small, 2, 128), false};
  offsets.width.embed_offset = 64;
  offsets.width.attention[0] = {64, 256, 384, 64, 2, 0.2f};
  offsets.width.attention[1] = {128, 192, 448, 0, 1, 0.125f};
  offsets.width.mlp[1] = {64, 192};
  offsets.model.classes = 64, offsets.width.class_offset = 48, offsets.width.classes = 16;
  result.push_back(offsets);

  Model deep = small;  // products of more steps than tiles are in flight
  deep.depth = 1, deep.hidden = 64 * (kMostStages + 4);
  result.push_back({"long sums", deep, prefix(deep, 1, deep.hidden)});

  Model average = small;  // 50 tokens, of which the mean of the last 49
  average.grid_height = 7, average.grid_width = 7, average.patch_height = 2, average.patch_width = 3;
  average.first_pooled = 1, average.last_pooled = 50, average.classes = 70;
  result.push_back({"average pooling", average, prefix(average, 1, 64), true, Dtype::kBf16});

  Model registers = small;  // 1 token in all but the registers
  registers.grid_height = registers.grid_width = 1, registers.reg_tokens = 2, registers.cls_tokens = 0;
  registers.pos_on_prefix = false, registers.first_pooled = 2, registers.last_pooled = 3, registers.depth = 3;
  Case skipped{"registers and skipped branches", registers, prefix(registers, 3, 256), true, Dtype::kFp16};
  skipped.width.attention[0].heads = 0, skipped.width.mlp[1].hidden = 0, skipped.width.attention[2].heads = 0;
  result.push_back(skipped);
  return result;
}

}  // namespace

void test_networks() {
  for (const Case& test : cases())
    for (const auto& [dtype, dtype_name] :
         {std::pair{Dtype::kBf16, ", bf16"}, {Dtype::kFp16, ", fp16"}, {Dtype::kE4m3, ", e4m3"}}) {
      begin(test.name + dtype_name);
      emulator::settings() = {};
      Network network(test, dtype, 3);
      const std::vector<float> logits = network.run(Loader::kBulk, 132, true);
      network.check_error(logits);
      const auto same = [&](const char* what, const std::vector<float>& other) {
        const bool equal =
            other.size() == logits.size() && std::memcmp(other.data(), logits.data(), 4 * other.size()) == 0;
        expect(equal, std::string("the same bits ") + what);
      };
      // Few processors take large tiles.
      same("with large tiles", network.run(Loader::kBulk, 1, true));
      same("with all tokens of the last block", network.run(Loader::kBulk, 4, false));
      same("with the loader of sm_80", network.run(Loader::kAsync, 132, true));
      emulator::Settings& settings = emulator::settings();
      for (const auto copies : {emulator::Copies::kAtOnce, emulator::Copies::kLate}) {
        settings.copies = copies;
        settings.reversed = !settings.reversed;
        settings.warps_run_ahead = true;
        settings.early = true;
        settings.processors = 132;
        same("with kernels that start early", network.run(Loader::kBulk, 132, true));
        same("with large tiles, in kernels that start early", network.run(Loader::kBulk, 1, true));
        same("with the loader of sm_80, warps apart", network.run(Loader::kAsync, 2, true));
        settings.processors = 5;
        same("in one kernel", network.run(Loader::kBulk, 5, true, 0, 3, true));
        settings.warps_run_ahead = false;
        same("in one kernel, with the loader of sm_80", network.run(Loader::kAsync, 5, true, 0, 3, true));
      }
      const std::vector<float> alone = network.run(Loader::kBulk, 132, true, 2, 1);
      const size_t classes = alone.size();
      expect(std::memcmp(alone.data(), logits.data() + 2 * classes, 4 * classes) == 0, "the same bits alone");
    }
}

}  // namespace hydravit::cuda::tests
