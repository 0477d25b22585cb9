// How arguments from Python become the structs of lamp.h; what both files of bindings share.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "lamp.h"

namespace lamp {

namespace py = pybind11;

// Adds the ops on CUDA addresses; there where the kernels were compiled.
void bind_cuda(py::module_& module);

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline Dtype dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::kFloat32;
  if (name == "float64") return Dtype::kFloat64;
  if (name == "float16") return Dtype::kFloat16;
  if (name == "bfloat16") return Dtype::kBFloat16;
  throw std::invalid_argument("dtype=" + name + ": expected float32, float64, float16 or bfloat16");
}

// Address of a matrix whose rows are contiguous, and the stride from one to the next.
using Matrix = std::tuple<std::uintptr_t, int64_t>;

inline RetrieveParams retrieve_params(const std::string& dtype, const Matrix& query,
                                      const Matrix& keys, std::uintptr_t bias,
                                      std::uintptr_t indices, std::uintptr_t similarity,
                                      std::uintptr_t counts, int64_t batch, int64_t pool_size,
                                      int64_t width, int64_t k, int threads) {
  const auto [query_address, query_stride] = query;
  const auto [keys_address, keys_stride] = keys;
  return {dtype_of(dtype),
          pointer<const void>(query_address),
          pointer<const void>(keys_address),
          pointer<const void>(bias),
          pointer<int64_t>(indices),
          pointer<void>(similarity),
          pointer<int64_t>(counts),
          query_stride,
          keys_stride,
          batch,
          pool_size,
          width,
          k,
          threads};
}

inline RetrieveBackwardParams retrieve_backward_params(const RetrieveParams& forward,
                                                       std::uintptr_t grad,
                                                       std::uintptr_t grad_query,
                                                       std::uintptr_t grad_keys) {
  return {forward, pointer<const void>(grad), pointer<void>(grad_query), pointer<void>(grad_keys)};
}

// Address of a tensor [N or G, H, rows, d] and its first three strides.
using Rows = std::tuple<std::uintptr_t, int64_t, int64_t, int64_t>;

inline HeadRows head_rows(const Rows& rows) {
  const auto [address, sequence_stride, head_stride, row_stride] = rows;
  return {pointer<void>(address), sequence_stride, head_stride, row_stride};
}

// N, G, H, R, L, P, d.
using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

inline PrefixAttentionParams prefix_attention_params(
    const std::string& dtype, const Rows& q, const Rows& k, const Rows& v, const Rows& prefix_k,
    const Rows& prefix_v, const Rows& out, std::uintptr_t lse, std::uintptr_t prefix_index,
    std::uintptr_t mask, const Sizes& sizes, bool causal, int64_t blind, double scale,
    int threads) {
  const auto [sequences, groups, heads, rows, length, prefix_length, width] = sizes;
  return {dtype_of(dtype),
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

inline PrefixAttentionBackwardParams prefix_attention_backward_params(
    const PrefixAttentionParams& forward, const Rows& grad, const Rows& grad_q, const Rows& grad_k,
    const Rows& grad_v, const Rows& grad_prefix_k, const Rows& grad_prefix_v) {
  return {forward,           head_rows(grad),          head_rows(grad_q),       head_rows(grad_k),
          head_rows(grad_v), head_rows(grad_prefix_k), head_rows(grad_prefix_v)};
}

inline void bind_params(py::module_& module) {
  // Local to the module, so that a second build can be loaded beside it.
  py::class_<RetrieveParams>(
      module, "RetrieveParams", py::module_local(),
      "Matrices as (address, stride of a row), in elements; addresses, 0 for none; sizes.")
      .def(py::init(&retrieve_params), py::arg("dtype"), py::arg("query"), py::arg("keys"),
           py::arg("bias"), py::arg("indices"), py::arg("similarity"), py::arg("counts"),
           py::arg("batch"), py::arg("pool_size"), py::arg("width"), py::arg("k"),
           py::arg("threads"));
  py::class_<RetrieveBackwardParams>(
      module, "RetrieveBackwardParams", py::module_local(),
      "Those of the forward, and addresses of contiguous gradients: of the similarity, the query "
      "and the keys.")
      .def(py::init(&retrieve_backward_params), py::arg("forward"), py::arg("grad"),
           py::arg("grad_query"), py::arg("grad_keys"));
  py::class_<PrefixAttentionParams>(
      module, "PrefixAttentionParams", py::module_local(),
      "Tensors as (address, strides of sequence, head and row), in elements; addresses, 0 for "
      "none; sizes (N, G, H, R, L, P, d).")
      .def(py::init(&prefix_attention_params), py::arg("dtype"), py::arg("q"), py::arg("k"),
           py::arg("v"), py::arg("prefix_k"), py::arg("prefix_v"), py::arg("out"), py::arg("lse"),
           py::arg("prefix_index"), py::arg("mask"), py::arg("sizes"), py::arg("causal"),
           py::arg("blind"), py::arg("scale"), py::arg("threads"));
  py::class_<PrefixAttentionBackwardParams>(
      module, "PrefixAttentionBackwardParams", py::module_local(),
      "Those of the forward, and gradients alike; address 0 for those that are not wanted.")
      .def(py::init(&prefix_attention_backward_params), py::arg("forward"), py::arg("grad"),
           py::arg("grad_q"), py::arg("grad_k"), py::arg("grad_v"), py::arg("grad_prefix_k"),
           py::arg("grad_prefix_v"));
}

}  // namespace lamp
