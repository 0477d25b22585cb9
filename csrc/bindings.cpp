#include <pybind11/pybind11.h>

#include <cstdint>

#include "build_info.h"
#include "lamp.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void retrieve(bool float64, std::uintptr_t query, std::uintptr_t keys, std::uintptr_t bias,
              std::uintptr_t indices, std::uintptr_t similarity, std::uintptr_t counts,
              int64_t query_stride, int64_t keys_stride, int64_t batch, int64_t pool_size,
              int64_t width, int64_t k, int threads) {
  lamp::retrieve_cpu({float64 ? lamp::Dtype::kFloat64 : lamp::Dtype::kFloat32,
                      pointer<const void>(query), pointer<const void>(keys),
                      pointer<const void>(bias), pointer<int64_t>(indices),
                      pointer<void>(similarity), pointer<int64_t>(counts), query_stride,
                      keys_stride, batch, pool_size, width, k, threads});
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = LAMP_COMPILER;
  info["flags"] = LAMP_FLAGS;
  info["cuda"] = static_cast<bool>(LAMP_HAS_CUDA);
  info["cuda_reason"] = LAMP_CUDA_REASON;
  info["cuda_compiler"] = LAMP_CUDA_COMPILER;
  info["cuda_architectures"] = LAMP_CUDA_ARCHITECTURES;
  return info;
}

#if LAMP_HAS_CUDA
py::list cuda_devices() {
  py::list devices;
  for (const lamp::CudaDevice& device : lamp::cuda_devices())
    devices.append(py::make_tuple(device.name, device.major, device.minor));
  return devices;
}
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native ops of lamp_fast on raw addresses; lamp_fast.ops is the public side.";
  module.def("build_info", &build_info,
             "How this build was made: compiler, flags, cuda (bool), cuda_reason (why not, or ''), "
             "cuda_compiler, cuda_architectures.");
  module.def("retrieve", &retrieve, py::arg("float64"), py::arg("query"), py::arg("keys"),
             py::arg("bias"), py::arg("indices"), py::arg("similarity"), py::arg("counts"),
             py::arg("query_stride"), py::arg("keys_stride"), py::arg("batch"),
             py::arg("pool_size"), py::arg("width"), py::arg("k"), py::arg("threads"),
             py::call_guard<py::gil_scoped_release>(),
             "lamp_fast.ops.retrieve on CPU addresses; strides in elements, rows contiguous.");
#if LAMP_HAS_CUDA
  module.def("cuda_devices", &cuda_devices,
             "(name, major, minor) of every device; RuntimeError with CUDA's reason.");
#endif
}
