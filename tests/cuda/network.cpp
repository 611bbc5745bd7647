// The whole network as the kernels compute it, on the emulator, compared with plain loops: the logits are within the
// error budget, depend on no weight outside the subnetwork, and within one kernel family (mma, or wgmma where the plan
// chooses it) have the same bits for every tiling, loader, batch size and interleaving.
#include <cstdio>
#include <cstring>
#include <random>

#include "../cpp/network_oracle.h"
#include "check.h"
#include "e4m3.h"
#include "plan.h"
#include "ptx.cuh"

namespace hydravit::cuda::tests {

namespace {

// A 16-bit float in the matrices of the oracle, which computes with doubles.
template <class Half>
struct Stored {
  Half half{};

  Stored() = default;
  Stored(double value) { from_float(static_cast<float>(value), half); }
  operator double() const { return to_float(half); }
};

Matrix<float> rounded(Matrix<float> matrix, Dtype dtype) {
  for (float& v : matrix.values) {
    if (dtype == Dtype::kBf16) v = static_cast<float>(Stored<Bf16>(v));
    if (dtype == Dtype::kFp16) v = static_cast<float>(Stored<Fp16>(v));
  }
  return matrix;
}

// Puts a parameter or an image on the device, in any dtype.
Parameter upload(const Matrix<float>& p, Dtype dtype) {
  if (p.empty()) return {nullptr, dtype, 0};
  const size_t count = p.values.size();
  auto* memory = static_cast<uint8_t*>(emulator::allocate(count * bytes_of(dtype)));
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

// All parameters in order: random in the parts that the subnetwork reads and NaN outside, so that a kernel that reads
// too much is found.
std::vector<Matrix<float>> random_parameters(const Case& test, std::mt19937& random) {
  std::vector<Matrix<float>> parameters;
  for (const ParameterSpec& spec : parameter_specs(test.sizes)) {
    const int64_t columns = spec.weight ? spec.columns() : spec.shape.back();
    const int64_t rows = spec.shape[0] * spec.columns() / columns;
    parameters.push_back(matrix<float>(rows, columns, [](int64_t, int64_t) { return NAN; }));
  }
  for (const auto& [name, part] : parts_of(test.sizes, test.subnetwork)) {
    Matrix<float>& p = parameters[part.parameter];
    const bool norm = name.ends_with("norm_weight") || name.ends_with("norm_bias");
    const bool bias = name.ends_with("bias"), scale = name.ends_with("layer_scale");
    if (!test.with_optional && (scale || (bias && !norm))) {
      p = {};
      continue;
    }
    std::normal_distribution<float> normal(scale || (norm && !bias) ? 1.0f : 0.0f,
                                           part.rows == 1 ? 0.3f : 1 / std::sqrt(static_cast<float>(part.columns)));
    for (int64_t i = 0; i < part.rows; i++)
      for (int64_t j = 0; j < part.columns; j++) p(part.row + i, part.column + j) = normal(random);
  }
  return parameters;
}

class EmulatedNetwork {
 public:
  EmulatedNetwork(const Case& test, Dtype dtype, int images)
      : test_(test), dtype_(dtype), images_(images), layout_(test.sizes, dtype) {
    std::mt19937 random(7);
    expect(why_not(test.sizes).empty() && why_not(test.subnetwork).empty(), test.name + " is possible");
    for (const Matrix<float>& p : random_parameters(test, random)) parameters_.push_back(rounded(p, test.stored));
    std::normal_distribution<float> normal;
    const int64_t pixels = test.sizes.channels * test.sizes.image_height * test.sizes.image_width;
    pixels_ = rounded(matrix<float>(images, pixels, [&](int64_t, int64_t) { return normal(random); }), test.stored);
  }

  std::vector<float> run(const Way& way) { return run(way, 0, images_); }

  // Returns the logits of the images [first_image, first_image + images), computed without the others.
  std::vector<float> run(const Way& way, int first_image, int images) {
    std::vector<Parameter> sources;
    for (const Matrix<float>& p : parameters_) sources.push_back(upload(p, test_.stored));
    auto* packed = static_cast<uint8_t*>(emulator::allocate(layout_.bytes));
    const Workspace workspace(test_.sizes, images_);
    auto* memory = static_cast<uint8_t*>(emulator::allocate(workspace.bytes));
    const Matrix<float> pixels = matrix<float>(
        images, pixels_.columns, [&](int64_t image, int64_t i) { return pixels_(first_image + image, i); });
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
    const bool e4m3 = dtype_ == Dtype::kE4m3;
    const std::vector<Matrix<float>> used = e4m3 ? quantised(test_.sizes, parameters_) : parameters_;
    const std::vector<double> exact = oracle<double>(used);
    if (dtype_ == Dtype::kBf16)
      expect_within_budget("logits", logits, oracle<Stored<Bf16>>(used), exact, 1.0 / 128);
    else
      expect_within_budget("logits", logits, oracle<Stored<Fp16>>(used), exact, 1.0 / 1024);
    if (e4m3)
      std::printf("  rounding the weights moves the logits by %.1f %%\n",
                  100 * distance(oracle<double>(parameters_), exact) / norm_of(exact));
  }

 private:
  // The logits of all images in plain loops over matrices of T.
  template <class T>
  std::vector<T> oracle(const std::vector<Matrix<float>>& parameters) const {
    Values<T> parts;
    for (const auto& [name, part] : parts_of(test_.sizes, test_.subnetwork))
      if (const Matrix<float>& p = parameters[part.parameter]; !p.empty())
        parts[name] = matrix<T>(part.rows, part.columns,
                                [&, &part = part](int64_t i, int64_t j) { return p(part.row + i, part.column + j); });
    const Matrix<T> images{images_, pixels_.columns, std::vector<T>(pixels_.values.begin(), pixels_.values.end())};
    return network(blocks_of(test_.sizes, test_.subnetwork, images_), images, parts).values;
  }

  const Case& test_;
  const Dtype dtype_;
  const int images_;
  const Layout layout_;
  std::vector<Matrix<float>> parameters_;
  Matrix<float> pixels_;
};

Subnetwork first_heads(const NetworkSizes& sizes, int64_t heads, int64_t hidden) {
  return prefix(sizes, heads * kHeadDim, heads, kHeadDim, hidden);
}

std::vector<Case> cases() {
  const NetworkSizes small{2, 192, 256, 3, 4, 4, 1, 0, 17, 10, 16, 16, 0, 1};  // 17 tokens
  std::vector<Case> result;
  for (int heads = 1; heads <= 3; heads++)
    result.push_back({"prefix of " + std::to_string(heads), small, first_heads(small, heads, 64 * heads)});

  Case offsets{"offsets", small, first_heads(small, 2, 128), false};
  offsets.subnetwork.embed.embed_offset = 64;
  offsets.subnetwork.attention[0] = {64, 128, 64, 256, 384, 64, 2, 64, 64, 64, 0.2};
  offsets.subnetwork.attention[1] = {64, 128, 128, 192, 448, 0, 1, 64, 64, 64, 0.125};
  offsets.subnetwork.mlp[1] = {64, 128, 64, 192};
  offsets.sizes.classes = 64, offsets.subnetwork.head = {64, 128, 48, 16};
  result.push_back(offsets);

  NetworkSizes deep = small;  // its products have more steps than tiles in flight
  deep.layers = 1, deep.hidden = 64 * (kMaxStages + 4);
  result.push_back({"long sums", deep, first_heads(deep, 1, deep.hidden)});

  NetworkSizes average = small;  // 50 tokens; pools the last 49
  average.image_height = 14, average.image_width = 21, average.patch_height = 2, average.patch_width = 3;
  average.pool_start = 1, average.pool_stop = 50, average.positions = 50, average.classes = 70;
  result.push_back({"average pooling", average, first_heads(average, 1, 64), true, Dtype::kBf16});

  NetworkSizes registers = small;  // 1 patch and 2 register tokens
  registers.image_height = registers.image_width = 4, registers.reg_tokens = 2, registers.cls_tokens = 0;
  registers.positions = 1, registers.pool_start = 2, registers.pool_stop = 3, registers.layers = 3;
  Case skipped{"registers and skipped branches", registers, first_heads(registers, 3, 256), true, Dtype::kFp16};
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
        expect(same_bits(network.run(way), expected), std::string("the same bits ") + what);
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
      const std::vector<float> last(mma.end() - static_cast<int64_t>(alone.size()), mma.end());
      expect(same_bits(alone, last), "the same bits alone");
    }
}

}  // namespace hydravit::cuda::tests
