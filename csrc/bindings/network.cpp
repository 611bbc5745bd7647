// The whole network on the CPU: packing its weights, planning one subnetwork, and the forward as one op.
#include <cstring>
#include <tuple>
#include <type_traits>

#include "arguments.h"

namespace hydravit {
namespace {

// ---- Packing: every parameter in one tensor, weights in panels ----

constexpr int64_t kAlignment = 16;  // floats: a parameter begins on a cache line of `packed`

int64_t current_panel() {
  int64_t rows = 0;
  check_status(panel_rows(&rows));
  return rows;
}

// Computes how many floats a parameter takes, where panels of `panel` rows are whole. Returns false if the number is
// beyond int64.
bool packed_size(const ParameterSpec& spec, int64_t panel, int64_t& size) {
  const int64_t unit = spec.weight ? panel : 1;
  size = (spec.shape[0] + unit - 1) / unit * unit;
  for (size_t axis = 1; axis < spec.shape.size(); axis++)
    if (__builtin_mul_overflow(size, spec.shape[axis], &size)) return false;
  return true;
}

void pack_weight(const ParameterName& name, const Tensor& weight, float* panels) {
  check_kind(weight, name, ScalarType::Float);
  int64_t columns = 1;
  for (int64_t axis = weight.dim() - 1; axis > 0; columns *= weight.size(axis--))
    HYDRAVIT_CHECK(weight.size(axis) <= 1 || weight.stride(axis) == columns, name,
                   ": contiguous rows expected, strides ", text(strides_of(weight)), " given");
  check_status(pack_weight_cpu({floats(weight), weight.stride(0)}, weight.size(0), columns, panels, torch_threads()));
}

// Takes the parameters in the order of parameters.h. Returns the packed tensor, the offset of each parameter in it, or
// -1 where it is absent, and the rows of a panel.
std::tuple<Tensor, Integers, int64_t> pack_network(const std::vector<OptionalTensor>& parameters,
                                                   const Integers& sizes) {
  const int64_t panel = current_panel();
  const NetworkSizes n = read_sizes(sizes);
  const std::vector<ParameterSpec> specs = parameter_specs(n);
  HYDRAVIT_CHECK(parameters.size() == specs.size(), "parameters: ", specs.size(), " expected for ", n.layers,
                 " layers, ", parameters.size(), " given");
  Integers offsets;
  int64_t stop = 0;
  for (size_t i = 0; i < specs.size(); i++) {
    const ParameterSpec& spec = specs[i];
    HYDRAVIT_CHECK(parameters[i].has_value() || spec.optional, spec.name, ": a tensor expected, None given");
    offsets.push_back(parameters[i].has_value() ? stop : -1);
    if (!parameters[i].has_value()) continue;
    const Integers shape = shape_of(*parameters[i]);
    HYDRAVIT_CHECK(shape == spec.shape, spec.name, ": shape ", text(spec.shape), " expected, ", text(shape), " given");
    int64_t size = 0;
    HYDRAVIT_CHECK(packed_size(spec, panel, size) && !__builtin_add_overflow(stop, size + kAlignment - 1, &stop),
                   spec.name, ": a shape of fewer than 2^63 elements expected, ", text(shape), " given");
    stop = stop / kAlignment * kAlignment;
  }

  Tensor packed = torch::stable::empty(Integers{stop}, ScalarType::Float);
  for (size_t i = 0; i < specs.size(); i++) {
    if (!parameters[i].has_value()) continue;
    const Tensor& parameter = *parameters[i];
    if (specs[i].weight) {
      pack_weight(specs[i].name, parameter, mutable_floats(packed) + offsets[i]);
    } else {
      const Tensor place = torch::stable::narrow(packed, 0, offsets[i], parameter.numel());
      Tensor shaped = torch::stable::view(place, specs[i].shape);
      torch::stable::copy_(shaped, parameter);  // of any dtype, device and strides
    }
  }
  return {packed, offsets, panel};
}

// Finds a parameter in `packed`; called once for each of them, in order.
class PackedParameters {
 public:
  PackedParameters(const Tensor& packed, const Integers& offsets, int64_t panel)
      : packed_(packed), offsets_(offsets), panel_(panel) {
    check(packed, "packed", {kAny});
    HYDRAVIT_CHECK(panel > 0 && kPanelMultiple % panel == 0, "panel: a divisor of ", kPanelMultiple, " expected, ",
                   panel, " given");
  }
  Parameter operator()(ParameterSpec spec) {
    HYDRAVIT_CHECK(left() > 0, "offsets: one for ", spec.name, " expected, none given");
    const int64_t offset = offsets_[used_++];
    if (offset == -1) {
      HYDRAVIT_CHECK(spec.optional, "offsets: ", spec.name, " expected, -1 (absent) given");
      return {spec.name, nullptr, {}, 0};
    }
    int64_t size = 0;
    HYDRAVIT_CHECK(packed_size(spec, panel_, size), "packed ", spec.name,
                   ": a shape of fewer than 2^63 elements expected, ", text(spec.shape), " given");
    HYDRAVIT_CHECK(offset >= 0 && offset <= packed_.size(0) && size <= packed_.size(0) - offset, "offsets: ", spec.name,
                   " with ", size, " elements at ", offset, " expected inside [0, ", packed_.size(0), ")");
    return {spec.name, floats(packed_) + offset, std::move(spec.shape), spec.weight ? panel_ : 0};
  }
  size_t left() const { return offsets_.size() - used_; }

 private:
  const Tensor& packed_;
  const Integers& offsets_;
  const int64_t panel_;
  size_t used_ = 0;
};

// ---- The plan: one subnetwork's slices as addresses in `packed`, in a tensor of bytes ----
// The tensor holds PlanHeader | Stem | AttentionBlock, one for each layer | MlpBlock, one for each layer | Head. The
// size of each struct is a multiple of the alignment of all, so there are no gaps.

constexpr uint64_t kPlanMagic = 0x68796472'61706c61;  // tells a plan from other bytes

struct PlanHeader {
  uint64_t magic;
  int64_t bytes;        // of the whole plan
  const float* packed;  // the plan's addresses lie in [packed, packed + packed_size)
  int64_t packed_size;
  int64_t panel;  // rows of a panel
  NetworkSizes sizes;
};

constexpr size_t kPlanAlignment = alignof(PlanHeader);
template <class Struct>
constexpr bool fits_in_plan() {
  return std::is_trivially_copyable_v<Struct> && alignof(Struct) == kPlanAlignment;
}
static_assert(fits_in_plan<PlanHeader>() && fits_in_plan<Stem>() && fits_in_plan<AttentionBlock>() &&
              fits_in_plan<MlpBlock>() && fits_in_plan<Head>());

int64_t plan_bytes(int64_t layers) {
  return static_cast<int64_t>(sizeof(PlanHeader) + sizeof(Stem) + sizeof(Head)) +
         layers * static_cast<int64_t>(sizeof(AttentionBlock) + sizeof(MlpBlock));
}

Tensor plan_network(const Tensor& packed, const Integers& offsets, int64_t panel, const Integers& sizes,
                    const Integers& subnetwork, const std::vector<double>& scales, double eps) {
  const NetworkSizes n = read_sizes(sizes);
  const Subnetwork s = read_subnetwork(n.layers, subnetwork, scales, eps);
  PackedParameters packed_parameters(packed, offsets, panel);
  const NetworkParameters<Parameter> p = read_parameters(n, packed_parameters);
  HYDRAVIT_CHECK(packed_parameters.left() == 0, "offsets: ", packed_parameters.left(), " too many given");

  const Tensor plan = torch::stable::new_empty(packed, {plan_bytes(n.layers)}, ScalarType::Byte);
  auto* place = static_cast<uint8_t*>(plan.mutable_data_ptr());
  HYDRAVIT_CHECK(reinterpret_cast<uintptr_t>(place) % kPlanAlignment == 0, "plan: aligned memory expected");
  const auto write = [&](const auto& value) {
    std::memcpy(place, &value, sizeof(value));
    place += sizeof(value);
  };
  const auto write_block = [&](const auto& arguments) {
    const auto block = describe(arguments).front();
    HYDRAVIT_CHECK(block.embed == s.embed.embed, "slices: one embed for the stem, every block and the head expected, ",
                   s.embed.embed, " and ", block.embed, " given");
    write(block);
  };
  const Residual residual(n);
  write(PlanHeader{kPlanMagic, plan_bytes(n.layers), floats(packed), packed.size(0), panel, n});
  write_block(StemArguments{Images(n), p.stem, {s.embed}, {}});
  for (size_t i = 0; i < p.attention.size(); i++)
    write_block(AttentionArguments{residual, p.attention[i], {}, {s.attention[i]}, s.eps, {}, residual.tokens});
  for (size_t i = 0; i < p.mlp.size(); i++) write_block(MlpArguments{residual, p.mlp[i], {}, {s.mlp[i]}, s.eps, {}});
  write_block(HeadArguments{residual, p.head, n.pool_start, n.pool_stop, {s.head}, s.eps, {}});
  return plan;
}

const PlanHeader& header_of(const Tensor& plan, const Tensor& packed) {
  check_kind(plan, "plans", ScalarType::Byte);
  HYDRAVIT_CHECK(plan.dim() == 1 && plan.is_contiguous() && plan.size(0) >= static_cast<int64_t>(sizeof(PlanHeader)) &&
                     reinterpret_cast<uintptr_t>(plan.const_data_ptr()) % kPlanAlignment == 0,
                 "plans: a tensor of plan_network_native expected, shape ", text(shape_of(plan)), " given");
  const auto& header = *static_cast<const PlanHeader*>(plan.const_data_ptr());
  HYDRAVIT_CHECK(header.magic == kPlanMagic && header.bytes == plan.size(0),
                 "plans: a tensor of plan_network_native expected, other bytes given");
  HYDRAVIT_CHECK(header.packed == floats(packed) && header.packed_size == packed.size(0),
                 "plans: plans of this packed tensor expected, a plan of another one given");
  HYDRAVIT_CHECK(header.panel == current_panel(), "plans: panels of ", current_panel(),
                 " rows expected, as this instruction set has, panels of ", header.panel, " rows given");
  return header;
}

NetworkPlan blocks_of(const PlanHeader& header) {
  NetworkPlan plan{};
  plan.stem = reinterpret_cast<const Stem*>(&header + 1);
  plan.attention = reinterpret_cast<const AttentionBlock*>(plan.stem + 1);
  plan.mlp = reinterpret_cast<const MlpBlock*>(plan.attention + header.sizes.layers);
  plan.head = reinterpret_cast<const Head*>(plan.mlp + header.sizes.layers);
  return plan;
}

// ---- The forward ----

Tensor network(const Tensor& images, const Tensor& packed, const std::vector<Tensor>& plans, int64_t columns,
               const OptionalTensor& width_index, bool pooled_only) {
  check(packed, "packed", {kAny});
  HYDRAVIT_CHECK(!plans.empty(), "plans: at least one expected, none given");
  const NetworkSizes& n = header_of(plans[0], packed).sizes;
  const auto columns_of = [&](const NetworkPlan& plan) {
    return plan.head->classes > 0 ? plan.head->classes : plan.head->embed;
  };
  std::vector<NetworkPlan> blocks;
  int64_t most = 0;
  for (const Tensor& plan : plans) {
    const PlanHeader& header = header_of(plan, packed);
    HYDRAVIT_CHECK(header.sizes == n, "plans: plans of one network expected, of networks of two sizes given");
    blocks.push_back(blocks_of(header));
    most = std::max(most, columns_of(blocks.back()));
  }
  HYDRAVIT_CHECK(columns == most, "columns: ", most, " expected, as the widest plan has, ", columns, " given");
  check_shape(images, "images", {kAny, n.channels, n.image_height, n.image_width});
  const int64_t batch = images.size(0);
  check_width_index(width_index, static_cast<int64_t>(plans.size()), batch);

  const Tensor y = torch::stable::new_empty(images, {batch, columns});
  NetworkCall call{};
  call.batch = batch, call.tokens = n.tokens(), call.layers = n.layers;
  call.images = floats(images);
  for (int axis = 0; axis < 4; axis++) call.image_strides[axis] = images.stride(axis);
  call.plans = blocks.data();
  call.width_index = width_index.has_value() ? static_cast<const int64_t*>(width_index->const_data_ptr()) : nullptr;
  call.pooled_only = pooled_only;
  call.y = mutable_floats(y), call.y_row_stride = columns;
  check_status(network_cpu(call, torch_threads()));
  for_each_run(width_index, batch, [&](int64_t image, int64_t count, int64_t width) {
    const int64_t own = columns_of(blocks[static_cast<size_t>(width)]);
    zero_beyond({call.y + image * columns, columns, columns}, count, 1, own, columns);
  });
  return y;
}

}  // namespace
}  // namespace hydravit

STABLE_TORCH_LIBRARY_IMPL(hydravit, CPU, m) {
  m.impl("plan_network_native", TORCH_BOX(&hydravit::plan_network));
  m.impl("network_native", TORCH_BOX(&hydravit::network));
}
// Parameters may lie on several devices, and there may be none: the op itself says what it expects.
STABLE_TORCH_LIBRARY_IMPL(hydravit, CompositeExplicitAutograd, m) {
  m.impl("pack_network_native", TORCH_BOX(&hydravit::pack_network));
}
