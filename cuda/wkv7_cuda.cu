// WKV-7 on a CUDA GPU: registers the kernels for the schema in wkv7_cpu.cpp.
//
// rwkv_pl.ops.build builds this file with the LibTorch stable ABI, so one library works with every torch from 2.10, and
// loads with a torch without CUDA too.

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>

#include "cuda_tensor.h"
#include "wkv7_walk.cuh"

namespace {

using torch::stable::Tensor;
using wkv::check;
using wkv::contiguous;
using wkv::current_stream;
using wkv::data;
using wkv7::N;
using wkv7::TILE;

// Calls f(a zero of key's dtype). A head's state in float64 does not fit the registers.
template <typename F>
void dispatch(const Tensor& key, const F& f) {
  wkv::dispatch(key, [&](auto io, auto) {
    if constexpr (std::is_same_v<decltype(io), double>) {
      STD_TORCH_CHECK(false, "wkv7: on a GPU key must be float16, bfloat16 or float32");
    } else {
      f(io);
    }
  });
}

// The arguments that forward and backward have in common, checked and contiguous.
struct Inputs {
  int64_t batch, steps, heads;
  Tensor r, w, k, v, a, b;

  Inputs(const Tensor& receptance, const Tensor& decay, const Tensor& key, const Tensor& value, const Tensor& a,
         const Tensor& b, int64_t stretch)
      : batch(key.size(0)), steps(key.size(1)), heads(key.size(2)), r(contiguous(receptance)), w(contiguous(decay)),
        k(contiguous(key)), v(contiguous(value)), a(contiguous(a)), b(contiguous(b)) {
    STD_TORCH_CHECK(key.dim() == 4 && key.size(3) == N, "wkv7: key must be (B, T, H, ", N, ")");
    STD_TORCH_CHECK(stretch == TILE || stretch == 0, "wkv7: on a GPU stretch must be 0 or ", TILE, ", not ", stretch);
  }

  template <typename IO>
  wkv7::Call<IO> call(const Tensor& states, const Tensor& sa, int64_t stretch) const {
    return {batch,
            steps,
            heads,
            data<IO>(r),
            data<float>(w),
            data<IO>(k),
            data<IO>(v),
            data<IO>(a),
            data<IO>(b),
            stretch ? data<float>(states) : nullptr,
            stretch ? data<float>(sa) : nullptr};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> wkv7_forward(const Tensor& receptance, const Tensor& decay,
                                                        const Tensor& key, const Tensor& value, const Tensor& a,
                                                        const Tensor& b, const std::optional<Tensor>& state,
                                                        int64_t stretch) {
  using torch::stable::new_empty;
  const torch::stable::accelerator::DeviceGuard guard(key.get_device_index());
  const Inputs x(receptance, decay, key, value, a, b, stretch);
  const std::optional<Tensor> s = contiguous(state);
  const Tensor output = new_empty(x.k, {x.batch, x.steps, x.heads, N});
  const Tensor new_state = new_empty(x.w, {x.batch, x.heads, N, N});
  const Tensor states = new_empty(x.w, {x.batch, x.heads, stretch ? (x.steps + TILE - 1) / TILE : 0, N, N});
  const Tensor sa = new_empty(x.w, {x.batch, stretch ? x.steps : 0, x.heads, N});
  dispatch(key, [&](auto io) {
    using IO = decltype(io);
    check(wkv7::launch_forward<IO>(x.call<IO>(states, sa, stretch),
                                   {data<float>(s), data<IO>(output), data<float>(new_state)}, current_stream(key)));
  });
  return {output, new_state, states, sa};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> wkv7_backward(
    const Tensor& receptance, const Tensor& decay, const Tensor& key, const Tensor& value, const Tensor& a,
    const Tensor& b, const Tensor& states, const Tensor& sa, const Tensor& grad_output,
    const std::optional<Tensor>& grad_new_state, int64_t stretch) {
  using torch::stable::new_empty;
  const torch::stable::accelerator::DeviceGuard guard(key.get_device_index());
  const Inputs x(receptance, decay, key, value, a, b, stretch);
  const Tensor saved = contiguous(states), removed = contiguous(sa), gy = contiguous(grad_output);
  const std::optional<Tensor> gs = contiguous(grad_new_state);
  const auto like = [&](const Tensor& t) { return new_empty(t, {x.batch, x.steps, x.heads, N}); };
  const Tensor gr = like(x.k), gw = like(x.w), gk = like(x.k), gv = like(x.k), ga = like(x.k), gb = like(x.k);
  const Tensor grad_state = new_empty(x.w, {x.batch, x.heads, N, N});
  const Tensor scratch = new_empty(x.w, {x.batch, x.heads, TILE / wkv7::KEPT, N, N});
  dispatch(key, [&](auto io) {
    using IO = decltype(io);
    check(wkv7::launch_backward<IO>(
        x.call<IO>(saved, removed, stretch),
        {data<IO>(gy), data<float>(gs), data<IO>(gr), data<float>(gw), data<IO>(gk), data<IO>(gv), data<IO>(ga),
         data<IO>(gb), data<float>(grad_state), data<float>(scratch)},
        current_stream(key)));
  });
  return {gr, gw, gk, gv, ga, gb, grad_state};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rwkv_pl, CUDA, m) {
  m.impl("wkv7_forward", WKV_BOX(wkv7_forward));
  m.impl("wkv7_backward", WKV_BOX(wkv7_backward));
}
