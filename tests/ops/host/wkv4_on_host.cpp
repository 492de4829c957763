// The CUDA kernels on a host, called through ctypes with the tensors' data pointers; 0 for a missing tensor.

#include "cuda_on_host.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "wkv4_launch.cuh"

namespace {

using namespace wkv;

// kernel: 0 selects by tile as on a GPU; the others are too small for a GPU and quick here.
template <typename IO, typename T, typename Work>
cudaError_t run(int kernel, const Call<IO, T>& a, const Work& work) {
  switch (kernel) {
    case 0:
      if constexpr (std::is_same_v<Work, Results<IO, T>>) {
        return launch_forward(a, work, nullptr);
      } else {
        return launch_backward(a, work, nullptr);
      }
    case 1: return launch_scan<IO, T, 16, 4, 2>(a, work, nullptr);
    case 2: return launch_scan<IO, T, 8, 16, 2>(a, work, nullptr);
    case 3: return launch_scan<IO, T, 4, 64, 4>(a, work, nullptr);
    default: return cudaErrorInvalidValue;
  }
}

template <typename IO, typename T>
int call(int kernel, const int64_t* sizes, void* const* p) {
  const Call<IO, T> a = {sizes[0],
                         sizes[1],
                         sizes[2],
                         sizes[3],
                         ceil_divide(sizes[1], sizes[3]),
                         static_cast<T*>(p[0]),
                         static_cast<T*>(p[1]),
                         static_cast<IO*>(p[2]),
                         static_cast<IO*>(p[3]),
                         static_cast<T*>(p[4])};
  if (sizes[4] == 0) {
    return run(kernel, a, Results<IO, T>{static_cast<T*>(p[5]), static_cast<IO*>(p[6]), static_cast<T*>(p[7])});
  }
  T *first = static_cast<T*>(p[10]), *decay = static_cast<T*>(p[11]);
  const Gradients<IO, T> g = {static_cast<IO*>(p[5]), static_cast<T*>(p[6]), static_cast<IO*>(p[7]),
                              static_cast<IO*>(p[8]), static_cast<T*>(p[9]), first, decay};
  const cudaError_t error = run(kernel, a, g);
  if (error != cudaSuccess) return error;
  return launch_sum(a.batch, a.channels, first, decay, static_cast<T*>(p[12]), static_cast<T*>(p[13]), nullptr);
}

}  // namespace

// sizes: B, T, C, tile, 0 for forward and 1 for backward. Forward: time_decay, time_first, key, value, saved, state,
// output, new_state. Backward: the first five, then grad_output, grad_new_state, grad_key, grad_value, grad_state, the
// contributions (B, C) to the gradients of time_first and time_decay, and their sums.
extern "C" int wkv4(int dtype, int kernel, const int64_t* sizes, void* const* p) {
  switch (dtype) {
    case 0: return call<float, float>(kernel, sizes, p);
#ifndef FLOAT_ALONE
    case 1: return call<double, double>(kernel, sizes, p);
    case 2: return call<torch::headeronly::Half, float>(kernel, sizes, p);
    case 3: return call<torch::headeronly::BFloat16, float>(kernel, sizes, p);
#endif
    default: return cudaErrorInvalidValue;
  }
}
