// Helpers for torch's tensors, shared by the CPU and the CUDA code.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdio>
#include <exception>
#include <initializer_list>
#include <optional>

#include "scalar.h"

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

using BoxedOperator = void (*)(StableIValue*, std::uint64_t, std::uint64_t);
struct Message {
  char text[1024];
};

// Calls the operator. If it raises an error, stores the error's message and returns true.
template <BoxedOperator run>
WKV_NOINLINE bool fails(StableIValue* stack, std::uint64_t inputs, std::uint64_t outputs, Message& message) noexcept {
  try {
    run(stack, inputs, outputs);
    return false;
  } catch (const std::exception& error) {
    std::snprintf(message.text, sizeof message.text, "%s", error.what());
  } catch (...) {
    std::snprintf(message.text, sizeof message.text, "unknown error");
  }
  return true;
}

// An exception of another C++ runtime than torch's ends the process, and a library can have its own: zig's, MinGW's. So
// torch raises the error instead. It unwinds this function's frame, which must have nothing to destroy or to catch.
template <BoxedOperator run>
void run_operator(StableIValue* stack, std::uint64_t inputs, std::uint64_t outputs) {
  Message message;
  if (fails<run>(stack, inputs, outputs, message)) aoti_torch_check(false, __func__, __FILE__, __LINE__, message.text);
}

}  // namespace wkv

// TORCH_BOX for an operator that may raise errors.
#define WKV_BOX(operation) &wkv::run_operator<TORCH_BOX(&operation)>
