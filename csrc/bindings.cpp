#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>

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

// Address of a tensor [N or G, H, rows, d] and its first three strides.
using Rows = std::tuple<std::uintptr_t, int64_t, int64_t, int64_t>;

lamp::HeadRows head_rows(const Rows& rows) {
  const auto [address, sequence_stride, head_stride, row_stride] = rows;
  return {pointer<void>(address), sequence_stride, head_stride, row_stride};
}

// N, G, H, R, L, P, d.
using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

lamp::PrefixAttentionParams prefix_attention_params(bool float64, const Rows& q, const Rows& k,
                                                    const Rows& v, const Rows& prefix_k,
                                                    const Rows& prefix_v, const Rows& out,
                                                    std::uintptr_t lse, std::uintptr_t prefix_index,
                                                    std::uintptr_t mask, const Sizes& sizes,
                                                    bool causal, int64_t blind, double scale,
                                                    int threads) {
  const auto [sequences, groups, heads, rows, length, prefix_length, width] = sizes;
  return {float64 ? lamp::Dtype::kFloat64 : lamp::Dtype::kFloat32,
          head_rows(q),
          head_rows(k),
          head_rows(v),
          head_rows(prefix_k),
          head_rows(prefix_v),
          head_rows(out),
          pointer<void>(lse),
          pointer<const int64_t>(prefix_index),
          pointer<const bool>(mask),
          sequences,
          groups,
          heads,
          rows,
          length,
          prefix_length,
          width,
          causal,
          blind,
          scale,
          threads};
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
  module.def("retrieve_backward", &retrieve_backward, py::arg("float64"), py::arg("query"),
             py::arg("keys"), py::arg("indices"), py::arg("similarity"), py::arg("grad"),
             py::arg("grad_query"), py::arg("grad_keys"), py::arg("query_stride"),
             py::arg("keys_stride"), py::arg("batch"), py::arg("pool_size"), py::arg("width"),
             py::arg("k"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
             "Gradients of query and keys from that of the similarity; all but query and keys are "
             "contiguous.");
  py::class_<lamp::PrefixAttentionParams>(
      module, "PrefixAttentionParams",
      "Tensors as (address, strides of sequence, head and row), in elements; addresses, 0 for "
      "none; sizes (N, G, H, R, L, P, d).")
      .def(py::init(&prefix_attention_params), py::arg("float64"), py::arg("q"), py::arg("k"),
           py::arg("v"), py::arg("prefix_k"), py::arg("prefix_v"), py::arg("out"), py::arg("lse"),
           py::arg("prefix_index"), py::arg("mask"), py::arg("sizes"), py::arg("causal"),
           py::arg("blind"), py::arg("scale"), py::arg("threads"));
  module.def("prefix_attention", &lamp::prefix_attention_cpu,
             py::call_guard<py::gil_scoped_release>(),
             "lamp_fast.ops.prefix_attention on CPU addresses.");
  module.def(
      "prefix_attention_backward",
      [](const lamp::PrefixAttentionParams& forward, const Rows& grad, const Rows& grad_q,
         const Rows& grad_k, const Rows& grad_v, const Rows& grad_prefix_k,
         const Rows& grad_prefix_v) {
        lamp::prefix_attention_backward_cpu({forward, head_rows(grad), head_rows(grad_q),
                                             head_rows(grad_k), head_rows(grad_v),
                                             head_rows(grad_prefix_k), head_rows(grad_prefix_v)});
      },
      py::arg("forward"), py::arg("grad"), py::arg("grad_q"), py::arg("grad_k"), py::arg("grad_v"),
      py::arg("grad_prefix_k"), py::arg("grad_prefix_v"), py::call_guard<py::gil_scoped_release>(),
      "Its gradients; address 0 for those that are not wanted.");
#if LAMP_HAS_CUDA
  module.def("cuda_devices", &cuda_devices,
             "(name, major, minor) of every device; RuntimeError with CUDA's reason.");
#endif
}
