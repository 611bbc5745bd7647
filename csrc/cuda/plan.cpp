// Decides where parameters and activations lie, which phases a subnetwork has, and which tiles each phase takes.
#include "plan.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace hydravit::cuda {

namespace {

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

constexpr int kImageUnit = 16;  // the rows of an image are a multiple of this, the rows of an mma
constexpr int kRowUnit = 128;   // the rows of all images are a multiple of this, the rows of the largest tile

}  // namespace

// ---- Packed weights ----

Layout::Layout(const NetworkSizes& sizes, Dtype dtype) : sizes(sizes), dtype(dtype) {
  const auto place = [&](int64_t element_bytes, int64_t rows, int64_t columns) {
    const Packed packed{bytes, rows, columns, 0};
    bytes += round_up(element_bytes * rows * columns, 1024);
    return packed;
  };
  const auto place_parameter = [&](const ParameterSpec& spec) {
    const int64_t rows = round_up(spec.shape[0], kPanelChannels);
    Packed packed{};
    if (spec.weight) {
      packed = place(bytes_of(dtype), rows, round_up(spec.columns(), kPanelChannels));
      if (dtype == Dtype::kE4m3) packed.scales = place(4, 1, rows).offset;
    } else if (spec.shape.size() == 1) {
      packed = place(4, 1, rows);
    }
    in_order.push_back(packed);
    return packed;
  };
  // A subnetwork with a classifier of its own may begin between two multiples of 64 rows. Its last tile then reads up
  // to 63 rows beyond the last class.
  NetworkSizes padded = sizes;
  padded.classes += kPanelChannels;
  parameters = read_parameters(padded, place_parameter);
  positions = place(4, sizes.tokens(), sizes.embed);
}

// ---- Limits of the kernels ----

std::string why_not(const NetworkSizes& sizes) {
  const auto given = [](const char* expected, int64_t value) {
    return expected + (" expected, " + std::to_string(value) + " given");
  };
  if (sizes.embed % kPanelChannels) return given("channels of the model: a multiple of 64", sizes.embed);
  if (sizes.embed > kMaxEmbed) return given("channels of the model: at most 1024", sizes.embed);
  if (sizes.hidden % kPanelChannels) return given("hidden channels: a multiple of 64", sizes.hidden);
  if (sizes.classes < 1) return "a classifier expected";
  if (sizes.positions != 0 && !sizes.pos_on_prefix() && sizes.positions != sizes.patches())
    return given("positions: one for each token, one for each patch or none", sizes.positions);
  if (sizes.pool_start >= sizes.pool_stop || sizes.pool_stop > sizes.tokens())
    return given("pool_stop: more than pool_start and no more than there are tokens", sizes.pool_stop);
  return "";
}

std::string why_not(const Subnetwork& subnetwork) {
  const auto off = [](int64_t value) { return value % kPanelChannels != 0; };
  for (const AttentionSlice& a : subnetwork.attention) {
    if (a.heads == 0) continue;
    if (a.head_dim != kHeadDim || a.value_dim != kHeadDim || (a.heads > 1 && a.pitch != kHeadDim))
      return "heads of 64 channels side by side expected";
    if (off(a.query_row) || off(a.key_row) || off(a.value_row) || off(a.proj_column))
      return "the heads' rows or columns begin inside of 64 channels";
  }
  if (off(subnetwork.embed.embed_offset) || off(subnetwork.embed.embed))
    return "the embed interval begins or ends inside of 64 channels";
  for (const MlpSlice& m : subnetwork.mlp)
    if (off(m.hidden_offset) || off(m.hidden)) return "the hidden interval begins or ends inside of 64 channels";
  if (subnetwork.head.class_offset % kChunk) return "the classifier's rows begin inside of 8";
  return "";
}

// ---- Workspace ----

Workspace::Workspace(const NetworkSizes& sizes, int images)
    : image_rows(round_up(sizes.tokens(), kImageUnit)), bytes(0) {
  all.rows = round_up(images * image_rows, kRowUnit);
  pooled.rows = round_up(images * (sizes.pool_stop - sizes.pool_start), kRowUnit);
  const auto place = [&](int64_t size) {
    const int64_t offset = bytes;
    bytes += round_up(size, 1024);
    return offset;
  };
  for (Rows* buffers : {&all, &pooled}) {
    buffers->residual = place(4 * buffers->rows * sizes.embed);
    buffers->attended = place(2 * buffers->rows * sizes.embed);
    buffers->hidden = place(2 * buffers->rows * sizes.hidden);
  }
  qkv = place(2 * all.rows * 3 * sizes.embed);
  prologue = place(2 * all.rows * std::max(sizes.embed, round_up(sizes.patch_size(), kPanelChannels)));
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

// The one place where sizes and slices, which are int64_t, become what kernels count in int: read_sizes and
// read_subnetwork keep each of them below 2^31.
class Planner {
 public:
  Planner(const Layout& layout, const Subnetwork& subnetwork, const Workspace& workspace, const Device& device,
          const Call& call)
      : sizes_(layout.sizes),
        layout_(layout),
        subnetwork_(subnetwork),
        embed_offset_(subnetwork.embed.embed_offset),
        embed_(subnetwork.embed.embed),
        workspace_(workspace),
        device_(device),
        call_(call) {}

  std::vector<Phase> run() {
    stem();
    for (int64_t i = 0; i < sizes_.layers; i++) {
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
    int64_t per_image, tokens, pool_start;
    const Workspace::Rows* buffers;
  };

  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(call_.workspace + offset);
  }
  const float* floats(const Packed& packed, int64_t offset) const {
    return reinterpret_cast<const float*>(call_.packed + packed.offset) + offset;
  }
  static int64_t panel_of(const Rows& rows) { return rows.buffers->rows * kPanelChannels; }
  int64_t pooled() const { return sizes_.pool_stop - sizes_.pool_start; }
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
  Product product(int64_t columns, int64_t k) const {
    Product p{};
    p.rows = call_.images * rows_.per_image, p.columns = columns, p.k = k;
    p.image_rows = rows_.per_image, p.image_tokens = rows_.tokens;
    p.segment = columns;
    p.token_start = 0, p.token_stop = rows_.tokens;
    p.a_image_rows = 1, p.pooled = 1;
    p.eps = subnetwork_.eps;
    return p;
  }
  void weight(Product& p, int segment, const Packed& matrix, int64_t row, int64_t column, const float* bias) const {
    const int64_t elements = column * matrix.rows + row * kPanelChannels;  // `column` begins a panel
    p.weight[segment] = call_.packed + matrix.offset + bytes_of(layout_.dtype) * elements;
    if (layout_.dtype == Dtype::kE4m3)
      p.weight_scale[segment] = reinterpret_cast<const float*>(call_.packed + matrix.scales) + row;
    p.weight_stride = matrix.rows * kPanelChannels;
    p.bias[segment] = bias;
  }
  void normalised(Product& p, const Packed& norm_weight, const Packed& norm_bias) const {
    p.prologue = Prologue::kNorm;
    p.a = at<float>(rows_.buffers->residual), p.a_stride = embed_;
    p.norm_weight = floats(norm_weight, embed_offset_), p.norm_bias = floats(norm_bias, embed_offset_);
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
    p.c = at<float>(rows_.buffers->residual), p.c_stride = embed_;
    p.residual = at<float>(from.buffers->residual);
    p.residual_image_rows = from.per_image;
    p.residual_first = from.buffers == rows_.buffers ? 0 : from.pool_start;
    p.layer_scale = floats(layer_scale, embed_offset_);
  }

  void stem() {
    rows_ = {workspace_.image_rows, sizes_.tokens(), sizes_.pool_start, &workspace_.all};
    Product p = product(embed_, layout_.parameters.stem.weight.columns);
    p.prologue = Prologue::kPatches;
    p.channels = sizes_.channels, p.grid_height = sizes_.grid_height(), p.grid_width = sizes_.grid_width();
    p.patch_height = sizes_.patch_height, p.patch_width = sizes_.patch_width;
    p.prefix_tokens = sizes_.prefix_tokens();
    weight(p, 0, layout_.parameters.stem.weight, embed_offset_, 0, nullptr);
    p.epilogue = Epilogue::kPositions;
    p.c = at<float>(rows_.buffers->residual), p.c_stride = embed_;
    p.positions = floats(layout_.positions, embed_offset_), p.positions_stride = sizes_.embed;
    add_with_prologue("patches", "stem", p);
  }

  void attention_block(int64_t i) {
    const AttentionSlice& slice = subnetwork_.attention[i];
    const AttentionParameters<Packed>& p = layout_.parameters.attention[i];
    const bool last = call_.pooled_only && i == sizes_.layers - 1;
    const int64_t channels = slice.heads * kHeadDim;
    Product qkv = product(3 * channels, embed_);
    qkv.segment = channels;
    const int64_t role_rows[3] = {slice.query_row, slice.key_row, slice.value_row};
    for (int role = 0; role < 3; role++)
      weight(qkv, role, p.qkv_weight, role_rows[role], embed_offset_, floats(p.qkv_bias, role_rows[role]));
    normalised(qkv, p.norm_weight, p.norm_bias);
    to_panels(qkv, Epilogue::kPanels, workspace_.qkv);
    if (last) qkv.token_start = sizes_.pool_start, qkv.token_stop = sizes_.pool_stop;
    add_with_prologue("norm", "qkv", qkv);

    const Rows before = rows_;
    if (last) rows_ = {pooled(), pooled(), 0, &workspace_.pooled};
    attention(slice, before, last);

    Product proj = product(embed_, channels);
    weight(proj, 0, p.proj_weight, embed_offset_, slice.proj_column, floats(p.proj_bias, embed_offset_));
    panels(proj, rows_.buffers->attended);
    add_to_residual(proj, before, p.layer_scale);
    add("proj, residual", proj);
  }

  void attention(const AttentionSlice& slice, const Rows& before, bool last) {
    Attention a{};
    a.images = call_.images, a.heads = slice.heads;
    a.image_rows = before.per_image, a.image_tokens = before.tokens;
    a.query_start = last ? sizes_.pool_start : 0, a.query_stop = last ? sizes_.pool_stop : before.tokens;
    a.scale = static_cast<float>(slice.scale);
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

  void mlp_block(int64_t i) {
    const MlpSlice& slice = subnetwork_.mlp[i];
    const MlpParameters<Packed>& p = layout_.parameters.mlp[i];
    Product fc1 = product(slice.hidden, embed_);
    weight(fc1, 0, p.fc1_weight, slice.hidden_offset, embed_offset_, floats(p.fc1_bias, slice.hidden_offset));
    normalised(fc1, p.norm_weight, p.norm_bias);
    to_panels(fc1, Epilogue::kGelu, rows_.buffers->hidden);
    add_with_prologue("norm", "fc1, gelu", fc1);

    Product fc2 = product(embed_, slice.hidden);
    weight(fc2, 0, p.fc2_weight, embed_offset_, slice.hidden_offset, floats(p.fc2_bias, embed_offset_));
    panels(fc2, rows_.buffers->hidden);
    add_to_residual(fc2, rows_, p.layer_scale);
    add("fc2, residual", fc2);
  }

  void head() {
    const HeadSlice& slice = subnetwork_.head;
    const HeadParameters<Packed>& packed = layout_.parameters.head;
    const Rows rows = rows_;
    rows_ = {1, 1, 0, rows.buffers};
    Product p = product(round_up(slice.classes, kPanelChannels), embed_);
    weight(p, 0, packed.weight, slice.class_offset, embed_offset_, floats(packed.bias, slice.class_offset));
    normalised(p, packed.norm_weight, packed.norm_bias);
    p.a_image_rows = rows.per_image, p.a_first = rows.pool_start, p.pooled = pooled();
    p.epilogue = Epilogue::kLogits;
    p.c_stride = slice.classes, p.c_columns = slice.classes;
    add_with_prologue("norm", "head", p);
  }

  const NetworkSizes& sizes_;
  const Layout& layout_;
  const Subnetwork& subnetwork_;
  const int64_t embed_offset_, embed_;
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

std::vector<Phase> plan(const Layout& layout, const Subnetwork& subnetwork, const Workspace& workspace,
                        const Device& device, const Call& call) {
  return Planner(layout, subnetwork, workspace, device, call).run();
}

}  // namespace hydravit::cuda
