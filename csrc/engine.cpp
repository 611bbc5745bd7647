// csrc/cuda/engine.h for Python: pointers are integers, tensors stay in hydravit_kernels/engine.py.
#include "cuda/engine.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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

std::unique_ptr<Engine> make(const std::map<std::string, int>& sizes, const std::string& dtype, int most_images,
                             int device_index, const std::string& strategy, const std::string& loader) {
  const auto size = [&](const char* name) { return sizes.at(name); };
  const Model model{size("depth"),        size("embed"),       size("hidden"),     size("classes"),
                    size("channels"),     size("grid_height"), size("grid_width"), size("patch_height"),
                    size("patch_width"),  size("cls_tokens"),  size("reg_tokens"), size("pos_on_prefix") != 0,
                    size("first_pooled"), size("last_pooled")};
  Device device{};
  check(describe_device(device_index, device));
  if (loader == "async") device.loader = Loader::kAsync;
  if (loader != "async" && loader != "best")
    throw std::invalid_argument("loader: best or async expected, " + loader + " given");
  if (strategy != "chain" && strategy != "persistent")
    throw std::invalid_argument("strategy: chain or persistent expected, " + strategy + " given");
  const Strategy how = strategy == "chain" ? Strategy::kChain : Strategy::kPersistent;
  const Dtype of_engine = dtype == "float8_e4m3fn" ? Dtype::kE4m3 : dtype_of(dtype);
  return std::make_unique<Engine>(model, of_engine, most_images, device, how);
}

using Role = std::tuple<int, int, int, int, int, float>;  // rows of query, key, value; column; heads; scale

void add_width(Engine& engine, std::pair<int, int> embed, const std::vector<Role>& attention,
               const std::vector<std::pair<int, int>>& mlp, std::pair<int, int> classes, float eps) {
  Width width{embed.first, embed.second, {}, {}, classes.first, classes.second, eps};
  for (const auto& [query, key, value, column, heads, scale] : attention)
    width.attention.push_back({query, key, value, column, heads, scale});
  for (const auto& [offset, hidden] : mlp) width.mlp.push_back({offset, hidden});
  engine.add_width(width);
}

void pack_parameters(Engine& engine, const std::vector<std::tuple<uintptr_t, std::string, int64_t>>& parameters,
                     uintptr_t stream) {
  std::vector<Parameter> all;
  for (const auto& [data, dtype, row_stride] : parameters)
    all.push_back({pointer<void>(data), dtype_of(dtype), row_stride});
  check(engine.pack(all, pointer<void>(stream)));
}

}  // namespace

PYBIND11_MODULE(_engine, module) {
  py::class_<Engine>(module, "Engine", py::module_local())
      .def(py::init(&make))
      .def_property_readonly("packed_bytes", &Engine::packed_bytes)
      .def_property_readonly("workspace_bytes", &Engine::workspace_bytes)
      .def_property_readonly("schedule_bytes", &Engine::schedule_bytes)
      .def("use_memory",
           [](Engine& engine, uintptr_t packed, uintptr_t workspace, uintptr_t schedules) {
             check(
                 engine.use_memory(pointer<uint8_t>(packed), pointer<uint8_t>(workspace), pointer<uint8_t>(schedules)));
           })
      .def("add_width", &add_width)
      .def("pack", &pack_parameters)
      .def("run",
           [](Engine& engine, int width, int images, uintptr_t pixels, const std::string& pixel_dtype, uintptr_t logits,
              uintptr_t stream) {
             const Ends ends{pointer<void>(pixels), dtype_of(pixel_dtype), pointer<float>(logits)};
             check(engine.run(width, images, ends, pointer<void>(stream)));
           })
      .def("time_phases", [](Engine& engine, int width, int images, uintptr_t pixels, const std::string& pixel_dtype,
                             uintptr_t logits, int repeats, uintptr_t stream) {
        const Ends ends{pointer<void>(pixels), dtype_of(pixel_dtype), pointer<float>(logits)};
        std::vector<PhaseTime> times;
        check(engine.time_phases(width, images, ends, repeats, pointer<void>(stream), times));
        py::list result;
        for (const PhaseTime& t : times)
          result.append(py::make_tuple(t.name, t.tile, t.count, t.planned, t.blocks, t.microseconds));
        return result;
      });
}
