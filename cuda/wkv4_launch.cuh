// Selects the WKV-4 kernel for a call, and launches it.

#pragma once

#include "launch.cuh"
#include "wkv4_scan.cuh"
#include "wkv4_walk.cuh"

namespace wkv {

// rwkv_pl/ops/wkv4.py chooses the tile: WALK_TILE selects the walk, the others are CHUNKS x S of a scan.
constexpr int64_t WALK_TILE = 64;
// One warp per block, so that warps spread evenly over the multiprocessors.
constexpr int WALK_THREADS = 32;

// Can V channels be loaded as one word? They can if V divides C and every tensor is aligned to the word.
template <typename IO, int V, typename... Pointers>
bool packs(int64_t channels, Pointers... p) {
  return channels % V == 0 && ((reinterpret_cast<std::uintptr_t>(p) % (sizeof(IO) * V) == 0) && ...);
}

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename IO, typename T, int CH, int CHUNKS, int S>
cudaError_t launch_scan(const Call<IO, T>& a, const Results<IO, T>& r, cudaStream_t stream) {
  return launch(scan_forward<IO, T, CH, CHUNKS, S>, a.batch * ceil_divide(a.channels, CH), CH * CHUNKS, stream, a, r);
}
template <typename IO, typename T, int CH, int CHUNKS, int S>
cudaError_t launch_scan(const Call<IO, T>& a, const Gradients<IO, T>& g, cudaStream_t stream) {
  return launch(scan_backward<IO, T, CH, CHUNKS, S>, a.batch * ceil_divide(a.channels, CH), CH * CHUNKS, stream, a, g);
}

template <typename IO, typename T, int V>
cudaError_t launch_walk(const Call<IO, T>& a, const Results<IO, T>& r, cudaStream_t stream) {
  const int64_t blocks = ceil_divide(a.batch * (a.channels / V), WALK_THREADS);
  return launch(walk_forward<IO, T, V, WALK_THREADS, 16>, blocks, WALK_THREADS, stream, a, r);
}
template <typename IO, typename T, int V>
cudaError_t launch_walk(const Call<IO, T>& a, const Gradients<IO, T>& g, cudaStream_t stream) {
  // Steps in registers; more would not fit.
  constexpr int S = sizeof(T) == 8 ? 4 : 8;
  const int64_t blocks = ceil_divide(a.batch * (a.channels / V), WALK_THREADS);
  return launch(walk_backward<IO, T, V, WALK_THREADS, S, WALK_TILE / S, 3>, blocks, WALK_THREADS, stream, a, g);
}

// Work: Results or Gradients.
template <typename IO, typename T, typename Work>
cudaError_t launch_tile(const Call<IO, T>& a, const Work& work, bool packed, cudaStream_t stream) {
  if (a.tile == WALK_TILE) {
    if constexpr (sizeof(IO) == 2) {
      if (packed) return launch_walk<IO, T, 2>(a, work, stream);
    }
    return launch_walk<IO, T, 1>(a, work, stream);
  }
  if constexpr (sizeof(T) == 8) {
    if (a.tile == 128) return launch_scan<IO, T, 8, 32, 4>(a, work, stream);
  } else {
    if (a.tile == 1024) return launch_scan<IO, T, 4, 128, 8>(a, work, stream);
    if (a.tile == 256) return launch_scan<IO, T, 16, 32, 8>(a, work, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename IO, typename T>
cudaError_t launch_forward(const Call<IO, T>& a, const Results<IO, T>& r, cudaStream_t stream) {
  return launch_tile(a, r, packs<IO, 2>(a.channels, a.key, a.value, r.output), stream);
}

template <typename IO, typename T>
cudaError_t launch_backward(const Call<IO, T>& a, const Gradients<IO, T>& g, cudaStream_t stream) {
  return launch_tile(a, g, packs<IO, 2>(a.channels, a.key, a.value, g.output, g.key, g.value), stream);
}

// Sums two arrays (batch, C) of partial sums over the batch, in order: first SLICES slices of the batch, then the
// slices.
template <typename T, int CH, int SLICES>
__global__ void __launch_bounds__(CH* SLICES)
    sum_shares(int64_t batch, int64_t channels, const T* first, const T* decay, T* sum_first, T* sum_decay) {
  __shared__ T slices[2][SLICES][CH];
  const int64_t channel = int64_t(blockIdx.x) * CH + threadIdx.x % CH;
  const int slice = threadIdx.x / CH;
  T u = T(0), w = T(0);
  if (channel < channels) {
    const int64_t begin = batch * slice / SLICES, end = batch * (slice + 1) / SLICES;
#pragma unroll 4
    for (int64_t b = begin; b < end; ++b) u += first[b * channels + channel], w += decay[b * channels + channel];
  }
  slices[0][slice][threadIdx.x % CH] = u, slices[1][slice][threadIdx.x % CH] = w;
  __syncthreads();
  if (slice == 0 && channel < channels) {
    u = w = T(0);
    for (int i = 0; i < SLICES; ++i) u += slices[0][i][threadIdx.x], w += slices[1][i][threadIdx.x];
    sum_first[channel] = u, sum_decay[channel] = w;
  }
}

template <typename T>
cudaError_t launch_sum(int64_t batch, int64_t channels, const T* first, const T* decay, T* sum_first, T* sum_decay,
                       cudaStream_t stream) {
  constexpr int CH = 32, SLICES = 8;
  return launch(sum_shares<T, CH, SLICES>, ceil_divide(channels, CH), CH * SLICES, stream, batch, channels, first,
                decay, sum_first, sum_decay);
}

}  // namespace wkv
