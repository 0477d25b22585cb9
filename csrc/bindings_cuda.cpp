#include "bindings.h"

namespace lamp {
namespace {

void retrieve(const RetrieveParams& params, std::uintptr_t stream) {
  retrieve_cuda(params, pointer<void>(stream));
}

void prefix_attention(const PrefixAttentionParams& params, std::uintptr_t seen_keys,
                      std::uintptr_t stream) {
  PrefixAttentionScratch scratch = {};
  scratch.seen_keys = pointer<int32_t>(seen_keys);
  prefix_attention_cuda(params, scratch, pointer<void>(stream));
}

void prefix_attention_backward(const PrefixAttentionBackwardParams& params,
                               std::uintptr_t seen_keys, std::uintptr_t seeing_rows,
                               std::uintptr_t delta, std::uintptr_t order, std::uintptr_t offsets,
                               std::uintptr_t partial, int64_t parts, std::uintptr_t stream) {
  prefix_attention_backward_cuda(params,
                                 {pointer<int32_t>(seen_keys), pointer<int32_t>(seeing_rows),
                                  pointer<float>(delta), pointer<const int64_t>(order),
                                  pointer<const int64_t>(offsets), pointer<float>(partial), parts},
                                 pointer<void>(stream));
}

py::list devices() {
  py::list list;
  for (const CudaDevice& device : cuda_devices())
    list.append(py::make_tuple(device.name, device.major, device.minor));
  return list;
}

}  // namespace

void bind_cuda(py::module_& module) {
  module.def("cuda_devices", &devices,
             "(name, major, minor) of every device; RuntimeError with CUDA's reason.");
  module.def("retrieve_cuda", &retrieve, py::arg("params"), py::arg("stream"),
             py::call_guard<py::gil_scoped_release>(),
             "lamp_fast.ops.retrieve on float32 addresses of the current device, enqueued.");
  module.def("prefix_attention_cuda", &prefix_attention, py::arg("params"), py::arg("seen_keys"),
             py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
             "lamp_fast.ops.prefix_attention on addresses of the current device, enqueued; for the "
             "scratch memory see PrefixAttentionScratch in lamp.h.");
  module.def("prefix_attention_backward_cuda", &prefix_attention_backward, py::arg("params"),
             py::arg("seen_keys"), py::arg("seeing_rows"), py::arg("delta"), py::arg("order"),
             py::arg("offsets"), py::arg("partial"), py::arg("parts"), py::arg("stream"),
             py::call_guard<py::gil_scoped_release>(), "Its gradients, enqueued.");
}

}  // namespace lamp
