// The whole network as the kernels compute it, on the emulator, compared with plain loops: the logits are within the
// error budget, depend on no weight outside the subnetwork, and within one kernel family (mma, or wgmma where the plan
// chooses it) have the same bits for every tiling, loader, batch size and interleaving.
#include <cstdio>
#include <cstring>

#include "check.h"
#include "plan.h"
#include "ptx.cuh"
#include "reference.h"

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

// Puts a parameter or an image on the device, in any dtype.
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
  NetworkSizes sizes;
  Subnetwork subnetwork;
  bool with_optional = true;
  Dtype stored = Dtype::kFp32;  // dtype of parameters and images
};

struct Way {
  Loader loader;
  int processors;  // few processors take large tiles
  bool wgmma = false;
  bool pooled_only = true;
};

class EmulatedNetwork {
 public:
  EmulatedNetwork(const Case& test, Dtype dtype, int images)
      : test_(test), dtype_(dtype), images_(images), layout_(test.sizes, dtype) {
    std::mt19937 random(7);
    expect(why_not(test.sizes).empty() && why_not(test.subnetwork).empty(), test.name + " is possible");
    parameters_ = random_parameters(test.sizes, test.subnetwork, test.with_optional, random);
    const int64_t pixels = test.sizes.channels * test.sizes.image_height * test.sizes.image_width;
    pixels_ = {images, pixels, std::vector<float>(images * pixels)};
    std::normal_distribution<float> normal;
    for (float& v : pixels_.values) v = normal(random);
  }

  std::vector<float> run(const Way& way) { return run(way, 0, images_); }

  // Returns the logits of the images [first_image, first_image + images), computed without the others.
  std::vector<float> run(const Way& way, int first_image, int images) {
    std::vector<Parameter> sources;
    for (const Matrix& p : parameters_) sources.push_back(upload(p, test_.stored));
    auto* packed = static_cast<uint8_t*>(emulator::allocate(layout_.bytes));
    const Workspace workspace(test_.sizes, images_);
    auto* memory = static_cast<uint8_t*>(emulator::allocate(workspace.bytes));
    Matrix pixels{images, pixels_.columns, {}};
    const auto from = pixels_.values.begin() + static_cast<int64_t>(first_image) * pixels_.columns;
    pixels.values.assign(from, from + static_cast<int64_t>(images) * pixels_.columns);
    const size_t count = static_cast<size_t>(images) * test_.subnetwork.head.classes;
    const CallBuffers buffers{upload(pixels, test_.stored).data, test_.stored,
                              static_cast<float*>(emulator::allocate(4 * count))};
    expect(pack(layout_, sources, packed, nullptr) == 0, "packing");
    const Device device{way.processors, way.loader == Loader::kBulk ? 232448 : 166912, way.loader, 0, way.wgmma};
    const Call call{packed, memory, images, way.pooled_only};
    std::vector<Phase> phases = plan(layout_, test_.subnetwork, workspace, device, call);
    buffers.set(phases);
    for (const Phase& phase : phases) expect(launch(phase, dtype_, way.loader, nullptr) == 0, "launching");
    emulator::synchronize();
    std::vector<float> logits(buffers.logits, buffers.logits + count);
    emulator::release_all();
    return logits;
  }

  void check_error(const std::vector<float>& logits) const {
    const Round exact = [](double v) { return v; }, half = [&](double v) { return rounded(v, dtype_); };
    std::vector<Matrix> stored = parameters_;
    if (test_.stored != Dtype::kFp32)
      for (Matrix& p : stored)
        for (float& v : p.values) v = static_cast<float>(rounded(v, test_.stored));
    const std::vector<Matrix> packed = dtype_ == Dtype::kE4m3 ? quantised(test_.sizes, stored) : stored;
    double ours = 0, eager = 0, squares = 0, quantisation = 0;
    for (int image = 0; image < images_; image++) {
      std::vector<float> pixels(pixels_.values.begin() + static_cast<int64_t>(image) * pixels_.columns,
                                pixels_.values.begin() + static_cast<int64_t>(image + 1) * pixels_.columns);
      if (test_.stored != Dtype::kFp32)
        for (float& v : pixels) v = static_cast<float>(rounded(v, test_.stored));
      const auto right = Reference(test_.sizes, test_.subnetwork, packed, exact).run(pixels.data());
      const auto low = Reference(test_.sizes, test_.subnetwork, packed, half).run(pixels.data());
      const auto before =
          dtype_ == Dtype::kE4m3 ? Reference(test_.sizes, test_.subnetwork, stored, exact).run(pixels.data()) : right;
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
  const NetworkSizes small{2, 192, 256, 3, 4, 4, 1, 0, 17, 10, 16, 16, 0, 1};  // 17 tokens
  std::vector<Case> result;
  for (int heads = 1; heads <= 3; heads++)
    result.push_back({"prefix of " + std::to_string(heads), small, prefix(small, heads, 64 * heads)});

  Case offsets{"offsets", small, prefix(small, 2, 128), false};
  offsets.subnetwork.embed.embed_offset = 64;
  offsets.subnetwork.attention[0] = {64, 128, 64, 256, 384, 64, 2, 64, 64, 64, 0.2};
  offsets.subnetwork.attention[1] = {64, 128, 128, 192, 448, 0, 1, 64, 64, 64, 0.125};
  offsets.subnetwork.mlp[1] = {64, 128, 64, 192};
  offsets.sizes.classes = 64, offsets.subnetwork.head = {64, 128, 48, 16};
  result.push_back(offsets);

  NetworkSizes deep = small;  // its products have more steps than tiles in flight
  deep.layers = 1, deep.hidden = 64 * (kMaxStages + 4);
  result.push_back({"long sums", deep, prefix(deep, 1, deep.hidden)});

  NetworkSizes average = small;  // 50 tokens; pools the last 49
  average.image_height = 14, average.image_width = 21, average.patch_height = 2, average.patch_width = 3;
  average.pool_start = 1, average.pool_stop = 50, average.positions = 50, average.classes = 70;
  result.push_back({"average pooling", average, prefix(average, 1, 64), true, Dtype::kBf16});

  NetworkSizes registers = small;  // 1 patch and 2 register tokens
  registers.image_height = registers.image_width = 4, registers.reg_tokens = 2, registers.cls_tokens = 0;
  registers.positions = 1, registers.pool_start = 2, registers.pool_stop = 3, registers.layers = 3;
  Case skipped{"registers and skipped branches", registers, prefix(registers, 3, 256), true, Dtype::kFp16};
  skipped.subnetwork.attention[0].heads = 0, skipped.subnetwork.mlp[1].hidden = 0,
  skipped.subnetwork.attention[2].heads = 0;
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
      EmulatedNetwork network(test, dtype, 3);
      const auto same = [&](const char* what, const std::vector<float>& expected, const Way& way) {
        const std::vector<float> other = network.run(way);
        const bool equal =
            other.size() == expected.size() && std::memcmp(other.data(), expected.data(), 4 * other.size()) == 0;
        expect(equal, std::string("the same bits ") + what);
      };
      const std::vector<float> mma = network.run({Loader::kBulk, 132});
      const std::vector<float> wgmma = network.run({Loader::kBulk, 1, true});
      network.check_error(mma);
      network.check_error(wgmma);
      same("with large tiles", mma, {Loader::kBulk, 1});
      same("with all tokens of the last layer", mma, {Loader::kBulk, 4, false, false});
      same("with the loader of sm_80", mma, {Loader::kAsync, 132});
      emulator::Settings& settings = emulator::settings();
      for (const auto copies : {emulator::Copies::kAtOnce, emulator::Copies::kLate}) {
        settings.copies = copies;
        settings.reversed = !settings.reversed;
        settings.warps_run_ahead = true;
        settings.early = true;
        same("with kernels that start early", mma, {Loader::kBulk, 132});
        same("by wgmma, with kernels that start early", wgmma, {Loader::kBulk, 1, true});
        same("with the loader of sm_80, warps apart", mma, {Loader::kAsync, 2});
      }
      const std::vector<float> alone = network.run({Loader::kBulk, 132}, 2, 1);
      const size_t classes = alone.size();
      expect(std::memcmp(alone.data(), mma.data() + 2 * classes, 4 * classes) == 0, "the same bits alone");
    }
}

}  // namespace hydravit::cuda::tests
