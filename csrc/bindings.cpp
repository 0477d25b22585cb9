#include "bindings.h"

#include "build_info.h"

namespace py = pybind11;
using lamp::pointer;

namespace {

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

void retrieve_backward(bool float64, std::uintptr_t query, std::uintptr_t keys,
                       std::uintptr_t indices, std::uintptr_t similarity, std::uintptr_t grad,
                       std::uintptr_t grad_query, std::uintptr_t grad_keys, int64_t query_stride,
                       int64_t keys_stride, int64_t batch, int64_t pool_size, int64_t width,
                       int64_t k, int threads) {
  lamp::retrieve_backward_cpu(
      {float64 ? lamp::Dtype::kFloat64 : lamp::Dtype::kFloat32, pointer<const void>(query),
       pointer<const void>(keys), pointer<const int64_t>(indices), pointer<const void>(similarity),
       pointer<const void>(grad), pointer<void>(grad_query), pointer<void>(grad_keys), query_stride,
       keys_stride, batch, pool_size, width, k, threads});
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = LAMP_COMPILER;
  info["flags"] = LAMP_FLAGS;
  info["cuda"] = static_cast<bool>(LAMP_HAS_CUDA);
  info["cuda_reason"] = LAMP_CUDA_REASON;
  info["cuda_compiler"] = LAMP_CUDA_COMPILER;
#if LAMP_HAS_CUDA
  info["cuda_architectures"] = lamp::cuda_architectures();
#else
  info["cuda_architectures"] = "";
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native ops of lamp_fast on raw addresses; lamp_fast.ops is the public side.";
  module.def("build_info", &build_info,
             "How this build was made: compiler, flags, cuda (bool), cuda_reason (why not, or ''), "
             "cuda_compiler, cuda_architectures (of the kernels, such as 'sm_80 sm_90').");
  module.def("retrieve", &retrieve, py::arg("float64"), py::arg("query"), py::arg("keys"),
             py::arg("bias"), py::arg("indices"), py::arg("similarity"), py::arg("counts"),
             py::arg("query_stride"), py::arg("keys_stride"), py::arg("batch"),
             py::arg("pool_size"), py::arg("width"), py::arg("k"), py::arg("threads"),
             py::call_guard<py::gil_scoped_release>(),
             "lamp_fast.ops.retrieve on CPU addresses; strides in elements, rows contiguous.");
  module.def("retrieve_backward", &retrieve_backward, py::arg("float64"), py::arg("query"),
             py::arg("keys"), py::arg("indices"), py::arg("similarity"), py::arg("grad"),
             py::arg("grad_query"), py::arg("grad_keys"), py::arg("query_stride"),
             py::arg("keys_stride"), py::arg("batch"), py::arg("pool_size"), py::arg("width"),
             py::arg("k"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
             "Gradients of query and keys from that of the similarity; all but query and keys are "
             "contiguous.");
  lamp::bind_params(module);
  module.def("prefix_attention", &lamp::prefix_attention_cpu,
             py::call_guard<py::gil_scoped_release>(),
             "lamp_fast.ops.prefix_attention on CPU addresses.");
  module.def("prefix_attention_backward", &lamp::prefix_attention_backward_cpu,
             py::call_guard<py::gil_scoped_release>(), "Its gradients.");
#if LAMP_HAS_CUDA
  lamp::bind_cuda(module);
#endif
}
