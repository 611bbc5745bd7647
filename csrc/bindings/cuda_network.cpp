// csrc/cuda/network.h for Python. Pointers are integers here: hydravit_kernels/engine.py owns the tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/network.h"

namespace py = pybind11;
using namespace hydravit::cuda;

namespace {

void check(int status) {
  if (status != 0) throw std::runtime_error(std::string("CUDA: ") + error_text(status));
}

Dtype dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::kFp32;
  if (name == "bfloat16") return Dtype::kBf16;
  if (name == "float16") return Dtype::kFp16;
  throw std::invalid_argument("dtype: float32, bfloat16 or float16 expected, " + name + " given");
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

std::unique_ptr<CudaNetwork> make(const std::map<std::string, int>& sizes, const std::string& dtype, int max_images,
                                  int device_index, const std::string& loader) {
  const auto size = [&](const char* name) { return sizes.at(name); };
  Model model{};
  model.depth = size("depth"), model.embed = size("embed"), model.hidden = size("hidden");
  model.classes = size("classes"), model.channels = size("channels");
  model.grid_height = size("grid_height"), model.grid_width = size("grid_width");
  model.patch_height = size("patch_height"), model.patch_width = size("patch_width");
  model.cls_tokens = size("cls_tokens"), model.reg_tokens = size("reg_tokens");
  model.pos_on_prefix = size("pos_on_prefix") != 0;
  model.pool_start = size("pool_start"), model.pool_stop = size("pool_stop");
  Device device{};
  check(describe_device(device_index, device));
  if (loader == "async") device.loader = Loader::kAsync;
  if (loader != "async" && loader != "best")
    throw std::invalid_argument("loader: best or async expected, " + loader + " given");
  const Dtype weights = dtype == "float8_e4m3fn" ? Dtype::kE4m3 : dtype_of(dtype);
  return std::make_unique<CudaNetwork>(model, weights, max_images, device);
}

using AttentionFields = std::tuple<int, int, int, int, int, float>;  // rows of query, key, value; column; heads; scale

void add_subnetwork(CudaNetwork& network, std::pair<int, int> embed, const std::vector<AttentionFields>& attention,
                    const std::vector<std::pair<int, int>>& mlp, std::pair<int, int> classes, float eps) {
  Subnetwork subnetwork{embed.first, embed.second, {}, {}, classes.first, classes.second, eps};
  for (const auto& [query, key, value, column, heads, scale] : attention)
    subnetwork.attention.push_back({query, key, value, column, heads, scale});
  for (const auto& [offset, hidden] : mlp) subnetwork.mlp.push_back({offset, hidden});
  network.add_subnetwork(subnetwork);
}

void pack_parameters(CudaNetwork& network, const std::vector<std::tuple<uintptr_t, std::string, int64_t>>& parameters,
                     uintptr_t stream) {
  std::vector<Parameter> all;
  for (const auto& [data, dtype, row_stride] : parameters)
    all.push_back({pointer<void>(data), dtype_of(dtype), row_stride});
  check(network.pack(all, pointer<void>(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  py::class_<CudaNetwork>(module, "CudaNetwork", py::module_local())
      .def(py::init(&make))
      .def_property_readonly("packed_bytes", &CudaNetwork::packed_bytes)
      .def_property_readonly("workspace_bytes", &CudaNetwork::workspace_bytes)
      .def("use_memory",
           [](CudaNetwork& network, uintptr_t packed, uintptr_t workspace) {
             check(network.use_memory(pointer<uint8_t>(packed), pointer<uint8_t>(workspace)));
           })
      .def("add_subnetwork", &add_subnetwork)
      .def("pack", &pack_parameters)
      .def("run",
           [](CudaNetwork& network, int subnetwork, int images, uintptr_t pixels, const std::string& pixel_dtype,
              uintptr_t logits, uintptr_t stream) {
             const CallBuffers buffers{pointer<void>(pixels), dtype_of(pixel_dtype), pointer<float>(logits)};
             check(network.run(subnetwork, images, buffers, pointer<void>(stream)));
           })
      .def("time_phases", [](CudaNetwork& network, int subnetwork, int images, uintptr_t pixels,
                             const std::string& pixel_dtype, uintptr_t logits, int repeats, uintptr_t stream) {
        const CallBuffers buffers{pointer<void>(pixels), dtype_of(pixel_dtype), pointer<float>(logits)};
        std::vector<PhaseTime> times;
        check(network.time_phases(subnetwork, images, buffers, repeats, pointer<void>(stream), times));
        py::list result;
        for (const PhaseTime& t : times)
          result.append(py::make_tuple(t.name, t.tile, t.count, t.planned, t.blocks, t.microseconds));
        return result;
      });
}
