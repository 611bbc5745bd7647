// The whole network as one op on the CPU, from packed weights; and their packing.
#include "arguments.h"

namespace hydravit {
namespace {

// Where the parameters of a packed network begin: in the order of hydravit_kernels/parameters.py; -1: it is
// absent.
class PackedParameters {
 public:
  PackedParameters(const Tensor& packed, const Integers& offsets) : packed_(packed), offsets_(offsets) {
    check(packed, "packed", {kAny});
  }
  Parameter vector(const char* name, Integers shape) { return required(name, next(name, std::move(shape), false)); }
  Parameter weight(const char* name, Integers shape) { return required(name, next(name, std::move(shape), true)); }
  Parameter optional_vector(const char* name, Integers shape) { return next(name, std::move(shape), false); }
  Parameter optional_weight(const char* name, Integers shape) { return next(name, std::move(shape), true); }
  size_t left() const { return offsets_.size() - used_; }

 private:
  static Parameter required(const char* name, Parameter parameter) {
    HYDRAVIT_CHECK(parameter.present(), "offsets: ", name, " expected, -1 (absent) given");
    return parameter;
  }
  Parameter next(const char* name, Integers shape, bool panels) {
    HYDRAVIT_CHECK(left() > 0, "offsets: one for ", name, " expected, none given");
    const int64_t offset = offsets_[used_++];
    if (offset == -1) return {name, nullptr, {}, false};
    int64_t size = panels ? (shape[0] + kPanel - 1) / kPanel * kPanel : shape[0];
    bool fits = true;
    for (size_t axis = 1; axis < shape.size(); axis++) fits = fits && !__builtin_mul_overflow(size, shape[axis], &size);
    HYDRAVIT_CHECK(fits, "packed ", name, ": a shape of fewer than 2^63 elements expected, ", text(shape), " given");
    HYDRAVIT_CHECK(offset >= 0 && offset <= packed_.size(0) && size <= packed_.size(0) - offset, "offsets: ", name,
                   " with ", size, " elements at ", offset, " expected inside [0, ", packed_.size(0), ")");
    return {name, floats(packed_) + offset, std::move(shape), panels};
  }

  const Tensor& packed_;
  const Integers& offsets_;
  size_t used_ = 0;
};

// Of the full network, in the order of hydravit_kernels/parameters.py.
struct NetworkSizes {
  int64_t depth, embed, hidden, channels, patch_height, patch_width, cls_tokens, reg_tokens, positions, classes;

  static NetworkSizes of(const Integers& s) {
    HYDRAVIT_CHECK(s.size() == 10, "sizes: 10 integers expected, ", s.size(), " given");
    for (const int64_t size : s)
      HYDRAVIT_CHECK(size >= 0 && size < int64_t{1} << 31, "sizes in [0, 2^31) expected, ", size, " given");
    HYDRAVIT_CHECK(s[0] > 0, "depth: at least 1 expected, 0 given");
    return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9]};
  }
};

Tensor network(const Tensor& images, const Tensor& packed, const Integers& offsets, const Integers& sizes,
               int64_t pool_start, int64_t pool_stop, const Integers& stem_slices, const Integers& attention_slices,
               const Integers& mlp_slices, const Integers& head_slices, const std::vector<double>& scales, double eps,
               const OptionalTensor& subnet, bool pooled_only) {
  check_shape(images, "images", {kAny, kAny, kAny, kAny});
  const NetworkSizes n = NetworkSizes::of(sizes);
  PackedParameters p(packed, offsets);
  const int64_t widths = check_slices(stem_slices, kEmbedIntegers);
  const auto of_block = [&](const auto& values, int64_t i) {
    const int64_t count = static_cast<int64_t>(values.size()) / n.depth;
    HYDRAVIT_CHECK(count > 0 && count % widths == 0 && count * n.depth == static_cast<int64_t>(values.size()),
                   "slices: as many for each of ", n.depth, " blocks and ", widths, " widths expected, ", values.size(),
                   " integers or scales given");
    return std::decay_t<decltype(values)>(values.begin() + i * count, values.begin() + (i + 1) * count);
  };

  const StemArguments stem{images,
                           p.weight("weight", {n.embed, n.channels, n.patch_height, n.patch_width}),
                           p.optional_vector("bias", {n.embed}),
                           p.optional_vector("cls_token", {1, n.cls_tokens, n.embed}),
                           p.optional_vector("reg_token", {1, n.reg_tokens, n.embed}),
                           p.optional_vector("pos_embed", {1, n.positions, n.embed}),
                           stem_slices,
                           subnet};
  const std::vector<Stem> stems = describe(stem);
  const Stream stream(stem.batch(), stem.tokens());
  std::vector<std::vector<AttentionBlock>> attention(static_cast<size_t>(widths));
  std::vector<std::vector<MlpBlock>> mlp(static_cast<size_t>(widths));
  for (int64_t i = 0; i < n.depth; i++) {
    AttentionArguments attention_arguments{stream,
                                           p.vector("norm1.weight", {n.embed}),
                                           p.vector("norm1.bias", {n.embed}),
                                           p.weight("qkv.weight", {3 * n.embed, n.embed}),
                                           p.optional_vector("qkv.bias", {3 * n.embed}),
                                           p.weight("proj.weight", {n.embed, n.embed}),
                                           p.optional_vector("proj.bias", {n.embed}),
                                           p.optional_vector("ls1.gamma", {n.embed}),
                                           {},
                                           of_block(attention_slices, i),
                                           of_block(scales, i),
                                           eps,
                                           subnet,
                                           stream.tokens};
    const MlpArguments mlp_arguments{stream,
                                     p.vector("norm2.weight", {n.embed}),
                                     p.vector("norm2.bias", {n.embed}),
                                     p.weight("fc1.weight", {n.hidden, n.embed}),
                                     p.optional_vector("fc1.bias", {n.hidden}),
                                     p.weight("fc2.weight", {n.embed, n.hidden}),
                                     p.optional_vector("fc2.bias", {n.embed}),
                                     p.optional_vector("ls2.gamma", {n.embed}),
                                     {},
                                     of_block(mlp_slices, i),
                                     eps,
                                     subnet};
    const std::vector<AttentionBlock> attention_blocks = describe(attention_arguments);
    const std::vector<MlpBlock> mlp_blocks = describe(mlp_arguments);
    for (size_t width = 0; width < static_cast<size_t>(widths); width++) {
      attention[width].push_back(attention_blocks.at(width));
      mlp[width].push_back(mlp_blocks.at(width));
    }
  }
  const HeadArguments head{stream,
                           p.optional_vector("norm_weight", {n.embed}),
                           p.optional_vector("norm_bias", {n.embed}),
                           p.optional_weight("head.weight", {n.classes, n.embed}),
                           p.optional_vector("head.bias", {n.classes}),
                           pool_start,
                           pool_stop,
                           head_slices,
                           eps,
                           subnet};
  const std::vector<Head> heads = describe(head);
  HYDRAVIT_CHECK(p.left() == 0, "offsets: ", p.left(), " too many given");

  std::vector<Network> networks;
  for (size_t i = 0; i < static_cast<size_t>(widths); i++) {
    for (size_t block = 0; block < static_cast<size_t>(n.depth); block++)
      HYDRAVIT_CHECK(attention[i][block].embed == stems[i].embed && mlp[i][block].embed == stems[i].embed &&
                         heads.at(i).embed == stems[i].embed,
                     "slices: one embed for the stem, every block and the head of a width expected");
    networks.push_back({&stems[i], attention[i].data(), mlp[i].data(), &heads[i]});
  }
  const int64_t columns = head.width();
  const Tensor y = torch::stable::new_empty(images, {stream.batch, columns});
  NetworkCall call{};
  call.batch = stream.batch, call.tokens = stream.tokens, call.depth = n.depth;
  call.networks = networks.data();
  call.width_of = subnet.has_value() ? static_cast<const int64_t*>(subnet->const_data_ptr()) : nullptr;
  call.pooled_only = pooled_only;
  call.y = mutable_floats(y), call.y_row_stride = columns;
  check_status(network_cpu(call, torch_threads()));
  for_each_run(subnet, stream.batch, [&](int64_t image, int64_t count, int64_t width) {
    const int64_t own =
        n.classes > 0 ? heads[static_cast<size_t>(width)].classes : stems[static_cast<size_t>(width)].embed;
    zero_beyond({call.y + image * columns, columns, columns}, count, 1, own, columns);
  });
  return y;
}

// weight (rows, ...) -> panels, of the size that hydravit.h names.
void pack_weight(const Tensor& weight, Tensor panels) {
  HYDRAVIT_CHECK(weight.dim() >= 2, "weight: at least 2 axes expected, shape ", text(shape_of(weight)), " given");
  check_kind(weight, "weight", ScalarType::Float);
  const int64_t rows = weight.size(0);
  int64_t columns = 1;
  for (int64_t axis = weight.dim() - 1; axis > 0; columns *= weight.size(axis--))
    HYDRAVIT_CHECK(weight.size(axis) <= 1 || weight.stride(axis) == columns,
                   "weight: contiguous rows expected, strides ", text(strides_of(weight)), " given");
  check(panels, "panels", {(rows + kPanel - 1) / kPanel * kPanel * columns});
  check_status(
      pack_weight_cpu({floats(weight), weight.stride(0)}, rows, columns, mutable_floats(panels), torch_threads()));
}

}  // namespace
}  // namespace hydravit

STABLE_TORCH_LIBRARY_IMPL(hydravit, CPU, m) {
  m.impl("network_native", TORCH_BOX(&hydravit::network));
  m.impl("pack_weight_native", TORCH_BOX(&hydravit::pack_weight));
}
