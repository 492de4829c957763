// The elementwise operations between RWKV-4's matrix products, on the CPU; each is one pass over memory.
//
//   squared ReLU   y = max(x, 0)^2, in place        dx = 2 sqrt(y) dy, in place; the next product saves y anyway
//   gate           y = residual + sigmoid(r) x      dr = x s (1 - s) dy, dx = s dy, with s = sigmoid(r)

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cpu_numbers.h"
#include "tensor.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using wkv::data;
using wkv::narrow;
using wkv::dispatch_type;
using wkv::widen;

// The least work of a thread, about 10 microseconds.
constexpr int64_t GRAIN = 16384;

// Calls f(begin, end) for ranges of the elements of t, on torch's threads.
template <typename F>
void parallel(const Tensor& t, const F& f) {
  torch::stable::parallel_for(0, t.numel(), GRAIN, f);
}

bool is_bf16(const Tensor& t) { return t.scalar_type() == ScalarType::BFloat16; }

void squared_relu_(Tensor x) {
  dispatch_type(is_bf16(x), [&](auto zero) {
    using T = decltype(zero);
    T* p = data<T>(x);
    parallel(x, [=](int64_t begin, int64_t end) {
      WKV_SIMD
      for (int64_t i = begin; i < end; ++i) {
        const float root = widen(p[i]) < 0.0f ? 0.0f : widen(p[i]);
        p[i] = narrow<T>(root * root);
      }
    });
  });
}

void expect_alike(const char* what, const Tensor& a, const Tensor& b, bool same_type = true) {
  bool fits = a.dim() == b.dim() && (!same_type || a.scalar_type() == b.scalar_type());
  for (int64_t axis = 0; fits && axis < a.dim(); ++axis) fits = a.size(axis) == b.size(axis);
  STD_TORCH_CHECK(fits, what, " are not alike");
}

void squared_relu_backward_(Tensor grad, const Tensor& y) {
  expect_alike("squared_relu_backward_: grad and y", grad, y);
  dispatch_type(is_bf16(y), [&](auto zero) {
    using T = decltype(zero);
    const T* out = data<T>(y);
    T* g = data<T>(grad);
    parallel(y, [=](int64_t begin, int64_t end) {
      WKV_SIMD
      for (int64_t i = begin; i < end; ++i) g[i] = narrow<T>(2.0f * std::sqrt(widen(out[i])) * widen(g[i]));
    });
  });
}

Tensor gate(const Tensor& receptance, const Tensor& x, const std::optional<Tensor>& residual) {
  expect_alike("gate: receptance and x", receptance, x);
  if (residual) expect_alike("gate: residual and x", *residual, x, /*same_type=*/false);
  const Tensor r = torch::stable::contiguous(receptance), xc = torch::stable::contiguous(x);
  const std::optional<Tensor> rest = wkv::contiguous(residual);
  const Tensor y = torch::stable::empty_like(rest ? *rest : xc);
  dispatch_type(is_bf16(x), [&](auto zero) {
    using T = decltype(zero);
    const T *by = data<T>(r), *value = data<T>(xc);
    const float* old = data<float>(rest);
    T* out = rest ? nullptr : data<T>(y);
    float* sum = rest ? data<float>(y) : nullptr;
    parallel(xc, [=](int64_t begin, int64_t end) {
      if (old) {
        WKV_SIMD
        for (int64_t i = begin; i < end; ++i) {
          sum[i] = wkv::multiply_add(wkv::sigmoid(widen(by[i])), widen(value[i]), old[i]);
        }
      } else {
        WKV_SIMD
        for (int64_t i = begin; i < end; ++i) out[i] = narrow<T>(wkv::sigmoid(widen(by[i])) * widen(value[i]));
      }
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> gate_backward(const Tensor& grad, const Tensor& receptance, const Tensor& x) {
  expect_alike("gate_backward: grad and x", grad, x, /*same_type=*/false);
  const Tensor g = torch::stable::contiguous(grad), r = torch::stable::contiguous(receptance),
               xc = torch::stable::contiguous(x);
  const Tensor grad_receptance = torch::stable::empty_like(r), grad_x = torch::stable::empty_like(xc);
  dispatch_type(is_bf16(x), [&](auto zero) {
    dispatch_type(is_bf16(g), [&](auto grad_zero) {
      using T = decltype(zero);
      using G = decltype(grad_zero);
      const T *by = data<T>(r), *value = data<T>(xc);
      const G* of = data<G>(g);
      T *to_r = data<T>(grad_receptance), *to_x = data<T>(grad_x);
      parallel(xc, [=](int64_t begin, int64_t end) {
        WKV_SIMD
        for (int64_t i = begin; i < end; ++i) {
          const float s = wkv::sigmoid(widen(by[i])), dx_i = s * widen(of[i]);
          to_x[i] = narrow<T>(dx_i);
          to_r[i] = narrow<T>(dx_i * (1.0f - s) * widen(value[i]));
        }
      });
    });
  });
  return {grad_receptance, grad_x};
}

}  // namespace

// All tensors are float32, or all bfloat16, except that residual and, if there is one, y and its gradient are float32.
STABLE_TORCH_LIBRARY_FRAGMENT(rwkv_pl, m) {
  m.def("squared_relu_(Tensor(a!) x) -> ()");
  m.def("squared_relu_backward_(Tensor(a!) grad, Tensor y) -> ()");
  m.def("gate(Tensor receptance, Tensor x, Tensor? residual) -> Tensor");
  m.def("gate_backward(Tensor grad, Tensor receptance, Tensor x) -> (Tensor grad_receptance, Tensor grad_x)");
}

STABLE_TORCH_LIBRARY_IMPL(rwkv_pl, CPU, m) {
  m.impl("squared_relu_", WKV_BOX(squared_relu_));
  m.impl("squared_relu_backward_", WKV_BOX(squared_relu_backward_));
  m.impl("gate", WKV_BOX(gate));
  m.impl("gate_backward", WKV_BOX(gate_backward));
}
