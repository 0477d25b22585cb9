#include "bindings.h"

#include "build_info.h"

namespace py = pybind11;

namespace {

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

template <lamp::Activation kind>
void activate(std::uintptr_t x, std::uintptr_t out, int64_t count, int threads) {
  using lamp::pointer;
  lamp::activate_bf16(kind, pointer<const void>(x), pointer<void>(out), count, threads);
}

template <lamp::Activation kind>
void activate_backward(std::uintptr_t grad, std::uintptr_t x, std::uintptr_t out, int64_t count,
                       int threads) {
  using lamp::pointer;
  lamp::activate_bf16_backward(kind, pointer<const void>(grad), pointer<const void>(x),
                               pointer<void>(out), count, threads);
}

template <lamp::Activation kind>
void bind_activation(py::module_& module, const std::string& name) {
  module.def((name + "_bf16").c_str(), &activate<kind>, py::arg("x"), py::arg("out"),
             py::arg("count"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
             ("lamp_fast.ops." + name + " on CPU addresses of contiguous bfloat16.").c_str());
  module.def((name + "_bf16_backward").c_str(), &activate_backward<kind>, py::arg("grad"),
             py::arg("x"), py::arg("out"), py::arg("count"), py::arg("threads"),
             py::call_guard<py::gil_scoped_release>(), "Its gradient.");
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native ops of lamp_fast on raw addresses; lamp_fast.ops is the public side.";
  module.def("build_info", &build_info,
             "How this build was made: compiler, flags, cuda (bool), cuda_reason (why not, or ''), "
             "cuda_compiler, cuda_architectures (of the kernels, such as 'sm_80 sm_90').");
  module.def("multiplies_bfloat16", &lamp::multiplies_bfloat16,
             "Whether this build and this CPU have instructions for products of bfloat16.");
  lamp::bind_params(module);
  module.def("retrieve", &lamp::retrieve_cpu, py::call_guard<py::gil_scoped_release>(),
             "lamp_fast.ops.retrieve on CPU addresses.");
  module.def("retrieve_backward", &lamp::retrieve_backward_cpu,
             py::call_guard<py::gil_scoped_release>(), "Its gradients.");
  module.def("prefix_attention", &lamp::prefix_attention_cpu,
             py::call_guard<py::gil_scoped_release>(),
             "lamp_fast.ops.prefix_attention on CPU addresses.");
  module.def("prefix_attention_backward", &lamp::prefix_attention_backward_cpu,
             py::call_guard<py::gil_scoped_release>(), "Its gradients.");
  bind_activation<lamp::Activation::kQuickGelu>(module, "quick_gelu");
  bind_activation<lamp::Activation::kGelu>(module, "gelu");
#if LAMP_HAS_CUDA
  lamp::bind_cuda(module);
#endif
}
