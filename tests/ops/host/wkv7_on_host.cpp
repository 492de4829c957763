// The CUDA kernels of WKV-7 on a host, called through ctypes with the tensors' data pointers; 0 for a missing tensor.

#include "cuda_on_host.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "wkv7_walk.cuh"

namespace {

template <typename IO>
int call(const int64_t* sizes, void* const* p) {
  const auto io = [&](int i) { return static_cast<IO*>(p[i]); };
  const auto wide = [&](int i) { return static_cast<float*>(p[i]); };
  const wkv7::Call<IO> m = {sizes[0], sizes[1], sizes[2], io(0), wide(1), io(2), io(3), io(4), io(5), wide(6), wide(7)};
  if (sizes[3] == 0) return wkv7::launch_forward<IO>(m, {wide(8), io(9), wide(10)}, nullptr);
  return wkv7::launch_backward<IO>(
      m, {io(8), wide(9), io(10), wide(11), io(12), io(13), io(14), io(15), wide(16), wide(17)}, nullptr);
}

}  // namespace

// sizes: B, T, H, 0 for forward and 1 for backward. Forward: receptance, decay, key, value, a, b, states, sa, state,
// output, new_state. Backward: the first eight, then grad_output, grad_new_state, the gradients of the first six and of
// the state, scratch.
extern "C" int call_wkv7(int dtype, const int64_t* sizes, void* const* p) {
  switch (dtype) {
    case 0: return call<float>(sizes, p);
#ifndef FLOAT_ALONE
    case 1: return call<torch::headeronly::Half>(sizes, p);
    case 2: return call<torch::headeronly::BFloat16>(sizes, p);
#endif
    default: return cudaErrorInvalidValue;
  }
}
