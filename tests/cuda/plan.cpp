// Checks plans without running them: every phase fits the device and its buffers, reads only what an earlier phase
// wrote, and takes large tiles where there are many rows.
#include "plan.h"

#include <algorithm>
#include <map>

#include "../cpp/network_oracle.h"
#include "check.h"

namespace hydravit::cuda::tests {

namespace {

// The last write to a buffer.
struct Buffer {
  int64_t stride;
  int rows, columns;
};

class Checker {
 public:
  explicit Checker(const Device& device) : device_(device) {}

  void check(const Phase& phase) {
    const Product& p = phase.product;
    const bool large = uses_wgmma(phase.shape);
    expect(phase.shared_bytes <= device_.shared_bytes, std::string(phase.name) + " fits");
    if (phase.kind == Kind::kAttention) {
      const Attention& a = phase.attention;
      reads(phase.name, a.qkv, a.qkv_stride, a.images * a.image_rows, 3 * a.heads * kHeadDim);
      written_[a.out] = {a.out_stride, a.images * a.out_image_rows, a.heads * kHeadDim};
      return;
    }
    if (p.prologue != Prologue::kPatches)
      reads(phase.name, p.a, p.a_stride, (p.rows - 1) * p.a_image_rows + p.a_first + p.pooled, p.k);
    if (phase.kind == Kind::kPrologue) {
      expect(p.prologue != Prologue::kPanels, "a prologue phase has a prologue to run");
      expect(phase.blocks * kPrologueRows >= p.rows && phase.blocks * kPrologueRows * kPanelChannels <= p.c_stride,
             "all rows are made");
      written_[p.c] = {p.c_stride, p.rows, p.k};
      return;
    }
    const TileSize size = size_of(phase.shape);
    const int64_t end = (p.rows + size.rows - 1) / size.rows * size.rows * kPanelChannels;
    const bool from_panels = p.prologue == Prologue::kPanels,
               to_panels = p.epilogue == Epilogue::kPanels || p.epilogue == Epilogue::kGelu;
    expect((!from_panels || end <= p.a_stride) && (!to_panels || end <= p.c_stride), "tiles end inside of the panels");
    expect(phase.threads == threads_of(phase.shape), "threads");
    expect(phase.blocks == (large ? std::min(tiles_of(p, phase.shape), device_.processors) : tiles_of(p, phase.shape)),
           "blocks");
    expect(!large || (device_.loader == Loader::kBulk && device_.has_wgmma && p.prologue == Prologue::kPanels),
           "wgmma only where the device has it, with A in panels");
    expect(p.segment % kPanelChannels == 0 && p.columns % p.segment == 0, "runs of 64 rows of W lie in one segment");
    if (p.epilogue != Epilogue::kLogits) written_[p.c] = {p.c_stride, p.rows, p.columns};
  }

 private:
  void reads(const std::string& name, const void* from, int64_t stride, int rows, int columns) const {
    const auto found = written_.find(from);
    const bool right = found != written_.end() && found->second.stride == stride && found->second.rows >= rows &&
                       found->second.columns == columns;
    expect(right, name + " reads what was written");
  }

  const Device& device_;
  std::map<const void*, Buffer> written_;
};

}  // namespace

void test_plans() {
  const NetworkSizes base{3, 768, 3072, 3, 16, 16, 1, 0, 197, 1000, 224, 224, 0, 1};
  NetworkSizes average = base;
  average.pool_start = 1, average.pool_stop = 197;
  const Device devices[] = {{132, 232448, Loader::kBulk, 0, true},
                            {148, 232448, Loader::kBulk, 0, false},
                            {132, 232448, Loader::kAsync, 0, true},
                            {108, 166912, Loader::kAsync, 0, false}};
  for (const int images : {1, 2, 8, 64}) {
    begin("plans for " + std::to_string(images) + " images");
    for (const NetworkSizes& sizes : {base, average})
      for (const Device& device : devices)
        for (int heads = 1; heads <= 12; heads++) {
          const Subnetwork subnetwork = prefix(sizes, heads * kHeadDim, heads, kHeadDim, 4 * heads * kHeadDim);
          const Workspace workspace(sizes, images);
          uint8_t* const nowhere = nullptr;
          const Call call{nowhere + (int64_t{1} << 40), nowhere + (int64_t{1} << 41), images};
          const auto planned = [&](Dtype weights) {
            return plan(Layout(sizes, weights), subnetwork, workspace, device, call);
          };
          const auto phases = planned(Dtype::kBf16);
          Checker checker(device);
          for (const Phase& phase : phases) checker.check(phase);
          const auto count = [&](const auto& which) { return std::count_if(phases.begin(), phases.end(), which); };
          const auto large = count([](const Phase& p) { return p.kind == Kind::kProduct && uses_wgmma(p.shape); });
          const auto prologues = count([](const Phase& p) { return p.kind == Kind::kPrologue; });
          if (images == 1 && heads <= 6) expect(prologues == 0, "with one image the tiles run the prologues");
          if (images >= 8 && heads >= 6) expect(prologues >= 2 * sizes.layers - 1, "prologue phases norm many rows");
          if (&device == &devices[0] && images == 64 && heads >= 3)
            expect(large >= 2 * (sizes.layers - 1), "wgmma multiplies many rows");
          for (const Phase& phase : planned(Dtype::kE4m3))
            expect(!uses_wgmma(phase.shape), "mma multiplies 8-bit weights");
        }
  }
}

}  // namespace hydravit::cuda::tests
