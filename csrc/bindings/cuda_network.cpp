// csrc/cuda/network.h for Python. Pointers come as integers: hydravit_kernels/networks/cuda.py owns the tensors.
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

std::unique_ptr<CudaNetwork> make(const std::vector<int64_t>& sizes, const std::string& dtype, int max_images,
                                  int device_index, const std::string& loader) {
  Device device{};
  check(describe_device(device_index, device));
  if (loader == "async") device.loader = Loader::kAsync;
  if (loader != "async" && loader != "best")
    throw std::invalid_argument("loader: best or async expected, " + loader + " given");
  const Dtype weights = dtype == "float8_e4m3fn" ? Dtype::kE4m3 : dtype_of(dtype);
  if (weights == Dtype::kFp32)
    throw std::invalid_argument("dtype: bfloat16, float16 or float8_e4m3fn expected, float32 given");
  return std::make_unique<CudaNetwork>(hydravit::read_sizes(sizes), weights, max_images, device);
}

void add_subnetwork(CudaNetwork& network, const std::vector<int64_t>& integers, const std::vector<double>& scales,
                    double eps) {
  network.add_subnetwork(hydravit::read_subnetwork(network.sizes().layers, integers, scales, eps));
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
