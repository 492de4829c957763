// WKV-4 on a CUDA GPU: registers the kernels for the schema in wkv4_cpu.cpp.
//
// `tile`, the steps between two saved states, selects the kernel. rwkv_pl/ops/wkv4.py chooses it from the shape and the
// chip. rwkv_pl.ops.build builds this file with the LibTorch stable ABI, so one library works with every torch from
// 2.10, and loads with a torch without CUDA too.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda_tensor.h"
#include "wkv4_launch.cuh"

namespace {

using torch::stable::Tensor;
using wkv::check;
using wkv::contiguous;
using wkv::current_stream;
using wkv::data;
using wkv::dispatch;

template <typename IO, typename T>
wkv::Call<IO, T> call(const Tensor& time_decay, const Tensor& time_first, const Tensor& key, const Tensor& value,
                      const Tensor& saved, int64_t tile) {
  const int64_t steps = key.size(1);
  return {key.size(0),      steps,         key.size(2),    tile, (steps + tile - 1) / tile, data<T>(time_decay),
          data<T>(time_first), data<IO>(key), data<IO>(value), data<T>(saved)};
}

std::tuple<Tensor, Tensor, Tensor> wkv4_forward(const Tensor& time_decay, const Tensor& time_first, const Tensor& key,
                                                const Tensor& value, const std::optional<Tensor>& state,
                                                int64_t tile) {
  using torch::stable::new_empty;
  const torch::stable::accelerator::DeviceGuard guard(key.get_device_index());
  const int64_t batch = key.size(0), steps = key.size(1), channels = key.size(2);
  const Tensor decay = contiguous(time_decay), first = contiguous(time_first),
               k = contiguous(key), v = contiguous(value);
  const std::optional<Tensor> s = contiguous(state);
  const Tensor output = new_empty(k, {batch, steps, channels});
  const Tensor new_state = new_empty(decay, {batch, 3, channels});
  const Tensor saved = new_empty(decay, {batch, (steps + tile - 1) / tile + 1, 4, channels});
  dispatch(key, [&](auto io, auto zero) {
    using IO = decltype(io);
    using T = decltype(zero);
    check(wkv::launch_forward<IO, T>(call<IO, T>(decay, first, k, v, saved, tile),
                                     {data<T>(s), data<IO>(output), data<T>(new_state)}, current_stream(key)));
  });
  return {output, new_state, saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> wkv4_backward(
    const Tensor& time_decay, const Tensor& time_first, const Tensor& key, const Tensor& value, const Tensor& saved,
    const Tensor& grad_output, const std::optional<Tensor>& grad_new_state, int64_t tile) {
  using torch::stable::new_empty;
  const torch::stable::accelerator::DeviceGuard guard(key.get_device_index());
  const int64_t batch = key.size(0), steps = key.size(1), channels = key.size(2);
  const Tensor decay = contiguous(time_decay), first = contiguous(time_first),
               k = contiguous(key), v = contiguous(value),
               tiles = contiguous(saved), gy = contiguous(grad_output);
  const std::optional<Tensor> gs = contiguous(grad_new_state);
  const Tensor grad_decay = new_empty(decay, {channels}), grad_first = new_empty(decay, {channels});
  const Tensor grad_key = new_empty(k, {batch, steps, channels}), grad_value = new_empty(k, {batch, steps, channels});
  const Tensor grad_state = new_empty(decay, {batch, 3, channels});
  // The partial sums of each sequence. If there is only one sequence, its partial sum is the result.
  const Tensor shares = new_empty(decay, {2, batch == 1 ? 0 : batch, channels});
  dispatch(key, [&](auto io, auto zero) {
    using IO = decltype(io);
    using T = decltype(zero);
    T* first_share = batch == 1 ? data<T>(grad_first) : data<T>(shares);
    T* decay_share = batch == 1 ? data<T>(grad_decay) : data<T>(shares) + batch * channels;
    const cudaStream_t stream = current_stream(key);
    check(wkv::launch_backward<IO, T>(call<IO, T>(decay, first, k, v, tiles, tile),
                                      {data<IO>(gy), data<T>(gs), data<IO>(grad_key), data<IO>(grad_value),
                                       data<T>(grad_state), first_share, decay_share},
                                      stream));
    if (batch != 1) {
      check(wkv::launch_sum(batch, channels, first_share, decay_share, data<T>(grad_first), data<T>(grad_decay),
                            stream));
    }
  });
  return {grad_decay, grad_first, grad_key, grad_value, grad_state};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rwkv_pl, CUDA, m) {
  m.impl("wkv4_forward", WKV_BOX(wkv4_forward));
  m.impl("wkv4_backward", WKV_BOX(wkv4_backward));
}
