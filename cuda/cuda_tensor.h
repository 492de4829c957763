// Helpers of the CUDA operators: the current stream, errors, dtypes.

#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cuda_runtime.h>

#include "tensor.h"

// Only in libtorch_cuda, which a torch without CUDA does not have. It is weak, so that the library still loads there.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream) __attribute__((weak));

namespace wkv {

inline cudaStream_t current_stream(const torch::stable::Tensor& t) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "rwkv_pl: ", cudaGetErrorString(error));
}

// Calls f(a zero of key's dtype, a zero of the arithmetic's dtype).
template <typename F>
void dispatch(const torch::stable::Tensor& key, const F& f) {
  using torch::headeronly::ScalarType;
  switch (key.scalar_type()) {
    case ScalarType::Float: return f(0.0f, 0.0f);
    case ScalarType::Double: return f(0.0, 0.0);
    case ScalarType::Half: return f(torch::headeronly::Half(0.0f), 0.0f);
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16(0.0f), 0.0f);
    default: STD_TORCH_CHECK(false, "key must be float16, bfloat16, float32 or float64");
  }
}

}  // namespace wkv
