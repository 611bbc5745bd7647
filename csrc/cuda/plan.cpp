// Decides where parameters and activations lie, which phases a subnetwork has, and which tiles each phase takes.
#include "plan.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace hydravit::cuda {

namespace {

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
constexpr int round_up_int(int value, int unit) { return static_cast<int>(round_up(value, unit)); }

constexpr int kImageUnit = 16;  // the rows of an image are a multiple of this, the rows of an mma
constexpr int kRowUnit = 128;   // the rows of all images are a multiple of this, the rows of the largest tile

}  // namespace

// ---- Packed weights ----

Layout::Layout(const Model& model, Dtype dtype) : dtype(dtype) {
  const auto place = [&](int64_t size, int rows, int columns) {
    const Packed packed{bytes, rows, columns, 0};
    bytes += round_up(size, 1024);
    return packed;
  };
  const auto matrix = [&](int rows, int columns) {
    rows = round_up_int(rows, kPanelChannels), columns = round_up_int(columns, kPanelChannels);
    Packed packed = place(int64_t{bytes_of(dtype)} * rows * columns, rows, columns);
    if (dtype == Dtype::kE4m3) packed.scales = place(int64_t{4} * rows, 1, rows).offset;
    return packed;
  };
  const auto vector = [&](int size) {
    size = round_up_int(size, kPanelChannels);
    return place(int64_t{4} * size, 1, size);
  };
  const int embed = model.embed, hidden = model.hidden;
  stem = matrix(embed, model.patch_size());
  positions = place(int64_t{4} * model.tokens() * embed, model.tokens(), embed);
  for (int i = 0; i < model.depth; i++) {
    Block block;
    block.norm1_weight = vector(embed), block.norm1_bias = vector(embed);
    block.qkv = matrix(3 * embed, embed), block.qkv_bias = vector(3 * embed);
    block.proj = matrix(embed, embed), block.proj_bias = vector(embed), block.scale1 = vector(embed);
    block.norm2_weight = vector(embed), block.norm2_bias = vector(embed);
    block.fc1 = matrix(hidden, embed), block.fc1_bias = vector(hidden);
    block.fc2 = matrix(embed, hidden), block.fc2_bias = vector(embed), block.scale2 = vector(embed);
    blocks.push_back(block);
  }
  norm_weight = vector(embed), norm_bias = vector(embed);
  // A subnetwork with a classifier of its own may begin between two multiples of 64 rows. Its last tile then reads up
  // to 63 rows beyond the last class.
  const int class_rows = model.classes + kPanelChannels;
  head = matrix(class_rows, embed), head_bias = vector(class_rows);
}

// ---- Limits of the kernels ----

std::string why_not(const Model& model) {
  if (model.embed % kPanelChannels)
    return "channels of the model: a multiple of 64 expected, " + std::to_string(model.embed);
  if (model.embed > kMaxEmbed) return "channels of the model: at most 1024 expected, " + std::to_string(model.embed);
  if (model.hidden % kPanelChannels)
    return "hidden channels: a multiple of 64 expected, " + std::to_string(model.hidden);
  if (model.classes < 1) return "a classifier expected";
  return "";
}

std::string why_not(const Model& model, const Subnetwork& subnetwork) {
  const auto off = [](int value) { return value % kPanelChannels != 0; };
  if (static_cast<int>(subnetwork.attention.size()) != model.depth ||
      static_cast<int>(subnetwork.mlp.size()) != model.depth)
    return "one attention and one MLP slice for each block expected";
  if (off(subnetwork.embed_offset) || off(subnetwork.embed))
    return "the embed interval begins or ends inside of 64 channels";
  for (const AttentionSlice& a : subnetwork.attention)
    if (a.heads && (off(a.query_row) || off(a.key_row) || off(a.value_row) || off(a.proj_column)))
      return "the heads' rows or columns begin inside of 64 channels";
  for (const MlpSlice& m : subnetwork.mlp)
    if (off(m.hidden_offset) || off(m.hidden)) return "the hidden interval begins or ends inside of 64 channels";
  if (subnetwork.class_offset % kChunk) return "the classifier's rows begin inside of 8";
  return "";
}

// ---- Workspace ----

Workspace::Workspace(const Model& model, int images) : image_rows(round_up(model.tokens(), kImageUnit)), bytes(0) {
  all.rows = round_up(images * image_rows, kRowUnit);
  pooled.rows = round_up(int64_t{images} * (model.pool_stop - model.pool_start), kRowUnit);
  const auto place = [&](int64_t size) {
    const int64_t offset = bytes;
    bytes += round_up(size, 1024);
    return offset;
  };
  for (Rows* buffers : {&all, &pooled}) {
    buffers->residual = place(4 * buffers->rows * model.embed);
    buffers->attended = place(2 * buffers->rows * model.embed);
    buffers->hidden = place(2 * buffers->rows * model.hidden);
  }
  qkv = place(2 * all.rows * 3 * model.embed);
  prologue = place(2 * all.rows * std::max<int64_t>(model.embed, round_up(model.patch_size(), kPanelChannels)));
}

// ---- Tiles ----

namespace {

// Estimated, not measured: the least time of a tile and of each of its steps of 64 channels, and how many bytes an SM
// loads and how many multiply-adds it does by mma and by wgmma in a nanosecond.
constexpr double kTileNs = 900, kStepNs = 60, kBytesPerNs = 45, kMmaPerNs = 1500, kWgmmaPerNs = 2500;
constexpr double kKernelNs = 1500;  // from one kernel to the next

double time_of(const Product& p, TileShape shape, Dtype weights, const Device& device) {
  const TileSize size = size_of(shape);
  const int64_t tiles = tiles_of(p, shape), processors = device.processors;
  const int64_t reserved = 1024;  // bytes that CUDA takes for every block; an SM has as much beyond shared_bytes
  const int64_t fit = (device.shared_bytes + reserved) / (shared_bytes(shape, p.prologue, p.k, weights) + reserved);
  const int64_t resident = uses_wgmma(shape) ? 1 : std::clamp<int64_t>(fit, 1, 2);
  const int64_t waves = (tiles + processors * resident - 1) / (processors * resident);
  const int64_t at_once = std::min((tiles + processors - 1) / processors, resident);
  const int row_bytes = p.prologue == Prologue::kPanels ? kRowBytes : 2 * kRowBytes;  // a prologue reads float rows
  const double load = (size.rows * row_bytes + size.columns * kPanelChannels * bytes_of(weights)) / kBytesPerNs;
  const double multiply = size.rows * size.columns * kPanelChannels / (uses_wgmma(shape) ? kWgmmaPerNs : kMmaPerNs);
  const double step = std::max(kStepNs, static_cast<double>(at_once) * std::max(load, multiply));
  return static_cast<double>(waves) * (kTileNs + p.k / kPanelChannels * step);
}

// A phase and its estimated time.
struct Timed {
  Phase phase;
  double ns;
};

bool can_take(const Product& p, TileShape shape, Dtype weights, const Device& device) {
  if (shared_bytes(shape, p.prologue, p.k, weights) > device.shared_bytes) return false;
  if (!uses_wgmma(shape)) return true;
  return device.has_wgmma && device.loader == Loader::kBulk && p.prologue == Prologue::kPanels &&
         weights != Dtype::kE4m3;
}

Phase cut(const char* name, const Product& p, TileShape shape, Dtype weights, const Device& device) {
  Phase phase{};
  phase.name = name;
  phase.product = p;
  phase.shape = shape;
  phase.blocks = tiles_of(p, shape);
  if (uses_wgmma(shape)) phase.blocks = std::min(phase.blocks, device.processors);
  phase.threads = threads_of(shape);
  phase.shared_bytes = shared_bytes(shape, p.prologue, p.k, weights);
  return phase;
}

Timed product_phase(const char* name, const Product& p, Dtype weights, const Device& device) {
  TileShape fastest{};
  double best = std::numeric_limits<double>::infinity();
  for (const TileShape shape : kTileShapes) {
    if (!can_take(p, shape, weights, device)) continue;
    if (const double time = time_of(p, shape, weights, device); time < best) best = time, fastest = shape;
  }
  return {cut(name, p, fastest, weights, device), best};
}

// Runs the prologue of `p` and writes A to the panels `c`.
Timed prologue_phase(const char* name, const Product& p, void* c, int64_t c_stride, const Device& device) {
  Phase phase{};
  phase.name = name;
  phase.kind = Kind::kPrologue;
  phase.product = p;
  phase.product.c = c, phase.product.c_stride = c_stride;
  phase.blocks = (p.rows + kPrologueRows - 1) / kPrologueRows;
  phase.threads = kPrologueThreads;
  const int waves = (phase.blocks + device.processors - 1) / device.processors;
  return {phase, kKernelNs + waves * kPrologueRows * p.k * (4.0 * p.pooled + 2.0) / kBytesPerNs};
}

// ---- Phases ----

class Planner {
 public:
  Planner(const Model& model, const Layout& layout, const Subnetwork& subnetwork, const Workspace& workspace,
          const Device& device, const Call& call)
      : model_(model), layout_(layout), subnetwork_(subnetwork), workspace_(workspace), device_(device), call_(call) {}

  std::vector<Phase> run() {
    stem();
    for (int i = 0; i < model_.depth; i++) {
      if (subnetwork_.attention[i].heads > 0) attention_block(i);
      if (subnetwork_.mlp[i].hidden > 0) mlp_block(i);
    }
    head();
    // The first phase may not fetch weights early, because the kernels before it may still pack them.
    for (size_t i = 1; i < phases_.size(); i++) phases_[i].starts_early = device_.loader == Loader::kBulk;
    return std::move(phases_);
  }

 private:
  // The rows of the residual that are computed now. The pooled tokens of an image begin at its row pool_start.
  struct Rows {
    int per_image, tokens, pool_start;
    const Workspace::Rows* buffers;
  };

  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(call_.workspace + offset);
  }
  const float* floats(const Packed& packed, int offset) const {
    return reinterpret_cast<const float*>(call_.packed + packed.offset) + offset;
  }
  static int64_t panel_of(const Rows& rows) { return rows.buffers->rows * kPanelChannels; }
  int pooled() const { return model_.pool_stop - model_.pool_start; }
  void add(const char* name, const Product& p) {
    phases_.push_back(product_phase(name, p, layout_.dtype, device_).phase);
  }
  // Adds a product whose prologue is a norm or patches. With few rows every tile runs the prologue itself. With many
  // rows a prologue phase runs it once, and the product may take large tiles.
  void add_with_prologue(const char* prologue_name, const char* name, const Product& p) {
    const Timed fused = product_phase(name, p, layout_.dtype, device_);
    const Timed prologue = prologue_phase(prologue_name, p, at<void>(workspace_.prologue), panel_of(rows_), device_);
    Product from_panels = p;
    panels(from_panels, workspace_.prologue);
    const Timed rest = product_phase(name, from_panels, layout_.dtype, device_);
    if (fused.ns <= prologue.ns + rest.ns) {
      phases_.push_back(fused.phase);
    } else {
      phases_.push_back(prologue.phase);
      phases_.push_back(rest.phase);
    }
  }

  // A product with the rows of all images, which still lacks A, W and C.
  Product product(int columns, int k) const {
    Product p{};
    p.rows = call_.images * rows_.per_image, p.columns = columns, p.k = k;
    p.image_rows = rows_.per_image, p.image_tokens = rows_.tokens;
    p.segment = columns;
    p.token_start = 0, p.token_stop = rows_.tokens;
    p.a_image_rows = 1, p.pooled = 1;
    p.eps = subnetwork_.eps;
    return p;
  }
  void weight(Product& p, int segment, const Packed& matrix, int row, int column, const float* bias) const {
    const int64_t elements = int64_t{column} * matrix.rows + int64_t{row} * kPanelChannels;  // `column` begins a panel
    p.weight[segment] = call_.packed + matrix.offset + bytes_of(layout_.dtype) * elements;
    if (layout_.dtype == Dtype::kE4m3)
      p.weight_scale[segment] = reinterpret_cast<const float*>(call_.packed + matrix.scales) + row;
    p.weight_stride = int64_t{matrix.rows} * kPanelChannels;
    p.bias[segment] = bias;
  }
  void normalised(Product& p, const Packed& norm_weight, const Packed& norm_bias) const {
    p.prologue = Prologue::kNorm;
    p.a = at<float>(rows_.buffers->residual), p.a_stride = subnetwork_.embed;
    p.norm_weight = floats(norm_weight, subnetwork_.embed_offset),
    p.norm_bias = floats(norm_bias, subnetwork_.embed_offset);
  }
  void panels(Product& p, int64_t offset) const {
    p.prologue = Prologue::kPanels;
    p.a = at<void>(offset), p.a_stride = panel_of(rows_);
  }
  void to_panels(Product& p, Epilogue epilogue, int64_t offset) const {
    p.epilogue = epilogue;
    p.c = at<void>(offset), p.c_stride = panel_of(rows_);
  }
  void add_to_residual(Product& p, const Rows& from, const Packed& layer_scale) const {
    p.epilogue = Epilogue::kResidual;
    p.c = at<float>(rows_.buffers->residual), p.c_stride = subnetwork_.embed;
    p.residual = at<float>(from.buffers->residual);
    p.residual_image_rows = from.per_image;
    p.residual_first = from.buffers == rows_.buffers ? 0 : from.pool_start;
    p.layer_scale = floats(layer_scale, subnetwork_.embed_offset);
  }

  void stem() {
    rows_ = {static_cast<int>(workspace_.image_rows), model_.tokens(), model_.pool_start, &workspace_.all};
    Product p = product(subnetwork_.embed, layout_.stem.columns);
    p.prologue = Prologue::kPatches;
    p.channels = model_.channels, p.grid_height = model_.grid_height, p.grid_width = model_.grid_width;
    p.patch_height = model_.patch_height, p.patch_width = model_.patch_width;
    p.prefix_tokens = model_.prefix_tokens();
    weight(p, 0, layout_.stem, subnetwork_.embed_offset, 0, nullptr);
    p.epilogue = Epilogue::kPositions;
    p.c = at<float>(rows_.buffers->residual), p.c_stride = subnetwork_.embed;
    p.positions = floats(layout_.positions, subnetwork_.embed_offset), p.positions_stride = model_.embed;
    add_with_prologue("patches", "stem", p);
  }

  void attention_block(int i) {
    const AttentionSlice& slice = subnetwork_.attention[i];
    const Layout::Block& block = layout_.blocks[i];
    const bool last = call_.pooled_only && i == model_.depth - 1;
    const int channels = slice.heads * kHeadDim;
    Product qkv = product(3 * channels, subnetwork_.embed);
    qkv.segment = channels;
    const int role_rows[3] = {slice.query_row, slice.key_row, slice.value_row};
    for (int role = 0; role < 3; role++)
      weight(qkv, role, block.qkv, role_rows[role], subnetwork_.embed_offset, floats(block.qkv_bias, role_rows[role]));
    normalised(qkv, block.norm1_weight, block.norm1_bias);
    to_panels(qkv, Epilogue::kPanels, workspace_.qkv);
    if (last) qkv.token_start = model_.pool_start, qkv.token_stop = model_.pool_stop;
    add_with_prologue("norm", "qkv", qkv);

    const Rows before = rows_;
    if (last) rows_ = {pooled(), pooled(), 0, &workspace_.pooled};
    attention(i, before, last);

    Product proj = product(subnetwork_.embed, channels);
    weight(proj, 0, block.proj, subnetwork_.embed_offset, slice.proj_column,
           floats(block.proj_bias, subnetwork_.embed_offset));
    panels(proj, rows_.buffers->attended);
    add_to_residual(proj, before, block.scale1);
    add("proj, residual", proj);
  }

  void attention(int i, const Rows& before, bool last) {
    const AttentionSlice& slice = subnetwork_.attention[i];
    Attention a{};
    a.images = call_.images, a.heads = slice.heads;
    a.image_rows = before.per_image, a.image_tokens = before.tokens;
    a.query_start = last ? model_.pool_start : 0, a.query_stop = last ? model_.pool_stop : before.tokens;
    a.scale = slice.scale;
    a.qkv = at<void>(workspace_.qkv), a.qkv_stride = panel_of(before);
    a.out = at<void>(rows_.buffers->attended), a.out_stride = panel_of(rows_);
    a.out_image_rows = rows_.per_image;
    const auto blocks_of = [&](int query_tiles) {
      const int queries = 16 * query_tiles;
      return (a.query_stop + queries - 1) / queries - a.query_start / queries;
    };
    // Every block loads all keys and values, so blocks are small only while there are SMs for all of them.
    const bool few = a.images * a.heads * blocks_of(1) <= 2 * device_.processors;
    a.query_tiles = few ? 1 : 2;
    a.first_block = a.query_start / (16 * a.query_tiles), a.blocks = blocks_of(a.query_tiles);
    Phase phase{};
    phase.name = "attention";
    phase.kind = Kind::kAttention;
    phase.attention = a;
    phase.blocks = a.images * a.heads * a.blocks;
    phase.threads = threads_of(a);
    phase.shared_bytes = shared_bytes(a);
    phases_.push_back(phase);
  }

  void mlp_block(int i) {
    const MlpSlice& slice = subnetwork_.mlp[i];
    const Layout::Block& block = layout_.blocks[i];
    Product fc1 = product(slice.hidden, subnetwork_.embed);
    weight(fc1, 0, block.fc1, slice.hidden_offset, subnetwork_.embed_offset,
           floats(block.fc1_bias, slice.hidden_offset));
    normalised(fc1, block.norm2_weight, block.norm2_bias);
    to_panels(fc1, Epilogue::kGelu, rows_.buffers->hidden);
    add_with_prologue("norm", "fc1, gelu", fc1);

    Product fc2 = product(subnetwork_.embed, slice.hidden);
    weight(fc2, 0, block.fc2, subnetwork_.embed_offset, slice.hidden_offset,
           floats(block.fc2_bias, subnetwork_.embed_offset));
    panels(fc2, rows_.buffers->hidden);
    add_to_residual(fc2, rows_, block.scale2);
    add("fc2, residual", fc2);
  }

  void head() {
    const Rows rows = rows_;
    rows_ = {1, 1, 0, rows.buffers};
    Product p = product(round_up_int(subnetwork_.classes, kPanelChannels), subnetwork_.embed);
    weight(p, 0, layout_.head, subnetwork_.class_offset, subnetwork_.embed_offset,
           floats(layout_.head_bias, subnetwork_.class_offset));
    normalised(p, layout_.norm_weight, layout_.norm_bias);
    p.a_image_rows = rows.per_image, p.a_first = rows.pool_start, p.pooled = pooled();
    p.epilogue = Epilogue::kLogits;
    p.c_stride = subnetwork_.classes, p.c_columns = subnetwork_.classes;
    add_with_prologue("norm", "head", p);
  }

  const Model& model_;
  const Layout& layout_;
  const Subnetwork& subnetwork_;
  const Workspace& workspace_;
  const Device& device_;
  const Call& call_;
  Rows rows_{};
  std::vector<Phase> phases_;
};

}  // namespace

std::vector<Phase> in_every_tile_shape(const Phase& phase, Dtype weights, const Device& device) {
  if (phase.kind != Kind::kProduct) return {phase};
  std::vector<Phase> all;
  for (const TileShape shape : kTileShapes)
    if (can_take(phase.product, shape, weights, device)) {
      all.push_back(cut(phase.name, phase.product, shape, weights, device));
      all.back().starts_early = phase.starts_early;
    }
  return all;
}

std::vector<Phase> plan(const Model& model, const Layout& layout, const Subnetwork& subnetwork,
                        const Workspace& workspace, const Device& device, const Call& call) {
  return Planner(model, layout, subnetwork, workspace, device, call).run();
}

}  // namespace hydravit::cuda
