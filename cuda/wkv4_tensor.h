// What the operator's CPU and CUDA sides do with torch's tensors.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

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

// As torch::stable::contiguous of a tensor that is there.
inline std::optional<torch::stable::Tensor> contiguous(const std::optional<torch::stable::Tensor>& t) {
  return t ? std::optional<torch::stable::Tensor>(torch::stable::contiguous(*t)) : std::nullopt;
}

}  // namespace wkv
