// Helpers for torch's tensors, shared by the CPU and the CUDA code.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

namespace wkv {

template <typename T>
T* data(const torch::stable::Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}
template <typename T>
T* data(const std::optional<torch::stable::Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

// Raises unless t has this shape and type.
inline void expect(const char* what, const torch::stable::Tensor& t, std::initializer_list<int64_t> shape,
                   torch::headeronly::ScalarType type) {
  bool fits = t.dim() == int64_t(shape.size()) && t.scalar_type() == type;
  int64_t axis = 0;
  for (int64_t size : shape) fits = fits && t.size(axis++) == size;
  STD_TORCH_CHECK(fits, what, " has not the shape or the dtype that goes with the other arguments");
}
inline void expect(const char* what, const std::optional<torch::stable::Tensor>& t,
                   std::initializer_list<int64_t> shape, torch::headeronly::ScalarType type) {
  if (t) expect(what, *t, shape, type);
}

// torch::stable::contiguous for an optional tensor.
inline std::optional<torch::stable::Tensor> contiguous(const std::optional<torch::stable::Tensor>& t) {
  return t ? std::optional<torch::stable::Tensor>(torch::stable::contiguous(*t)) : std::nullopt;
}

}  // namespace wkv
