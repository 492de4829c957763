// WKV-7 on a GPU: a loop over time, one block per head and sequence, one thread per channel.
//
// Letters: B sequences, T steps, H heads of N = 64 channels; IO is the dtype of everything (B, T, H, N) but w, and all
// else, the arithmetic too, is float32. Rows i of a head's state S are values, columns j are keys.
//
// Forward, a thread has a row of S in registers. Backward, it has a row and a column of the adjoint G, and a column of
// S: sums over keys need rows, sums over values need columns, and neither then needs other threads. No atomics.
//
// Everything here is plain CUDA C++ with static shared memory, so that a test can run it on a host unchanged.

#pragma once

#include <cstdint>

#include "launch.cuh"
#include "wkv7_math.h"

namespace wkv7 {

// Steps of a tile: S is saved before each, and backward its inputs are in shared memory. Backward, every KEPT-th state
// of a tile is stored in a scratch, and the states between are computed again.
constexpr int TILE = 16, KEPT = 4;

// The arguments of one call. states (B, H, ceil(T / TILE), N, N), keys by values, has the state before each tile, and sa
// (B, T, H, N) the product of S and a at each step. Both are null if there is no backward pass.
template <typename IO>
struct Call {
  int64_t batch, steps, heads;
  const IO* r;
  const float* w;
  const IO *k, *v, *a, *b;
  float *states, *sa;

  __device__ int64_t tiles() const { return (steps + TILE - 1) / TILE; }
};

// The incoming state (null: zeros) and the results of the forward pass.
template <typename IO>
struct Results {
  const float* state;
  IO* output;
  float* new_state;
};

// The inputs (gradients of output and new_state; new_state may be null) and results of the backward pass. scratch is
// (B, H, TILE / KEPT, N, N).
template <typename IO>
struct Gradients {
  const IO* output;
  const float* new_state;
  IO* r;
  float* w;
  IO *k, *v, *a, *b;
  float *state, *scratch;
};

template <typename IO>
__global__ void __launch_bounds__(N) walk_forward(Call<IO> m, Results<IO> out) {
  __shared__ float r[N], w[N], k[N], a[N], b[N];
  const int i = threadIdx.x;
  const int64_t task = blockIdx.x, sequence = task / m.heads, head = task % m.heads;
  float S[N];
#pragma unroll
  for (int j = 0; j < N; ++j) S[j] = out.state ? out.state[(task * N + i) * N + j] : 0.0f;
  int64_t at = (sequence * m.steps * m.heads + head) * N + i;
  for (int64_t t = 0; t < m.steps; ++t, at += m.heads * N) {
    if (m.states && t % TILE == 0) {
      float* to = m.states + (task * m.tiles() + t / TILE) * N * N + i;
#pragma unroll
      for (int j = 0; j < N; ++j) to[j * N] = S[j];
    }
    __syncthreads();
    r[i] = float(m.r[at]), k[i] = float(m.k[at]), a[i] = float(m.a[at]), b[i] = float(m.b[at]);
    w[i] = decay(m.w[at]).value;
    __syncthreads();
    const float v = float(m.v[at]);
    float sa = 0.0f, y = 0.0f;
#pragma unroll
    for (int j = 0; j < N; ++j) sa += S[j] * a[j];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      S[j] = S[j] * w[j] + (sa * b[j] + v * k[j]);
      y += S[j] * r[j];
    }
    out.output[at] = IO(y);
    if (m.sa) m.sa[at] = sa;
  }
#pragma unroll
  for (int j = 0; j < N; ++j) out.new_state[(task * N + i) * N + j] = S[j];
}

template <typename IO>
__global__ void __launch_bounds__(N) walk_backward(Call<IO> m, Gradients<IO> g) {
  __shared__ float r[TILE][N], w[TILE][N], k[TILE][N], a[TILE][N], b[TILE][N], v[TILE][N], sa[TILE][N], gy[TILE][N];
  __shared__ float slope[TILE][N], g_v[TILE][N], g_sa[N];
  const int j = threadIdx.x;
  const int64_t task = blockIdx.x, sequence = task / m.heads, head = task % m.heads;
  const int64_t base = (sequence * m.steps * m.heads + head) * N + j;
  float S[N], column[N], row[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    column[i] = g.new_state ? g.new_state[(task * N + i) * N + j] : 0.0f;
    row[i] = g.new_state ? g.new_state[(task * N + j) * N + i] : 0.0f;
  }
  float* const kept = g.scratch + task * (TILE / KEPT) * N * N + j;
  // int, not int64_t: every register is in use.
  const int steps = int(m.steps);
  for (int t0 = (steps - 1) / TILE * TILE; t0 >= 0; t0 -= TILE) {
    const int length = steps - t0 < TILE ? steps - t0 : TILE;
    __syncthreads();
    for (int t = 0; t < length; ++t) {
      const int64_t at = base + int64_t(t0 + t) * m.heads * N;
      const Decay<float> d = decay(m.w[at]);
      w[t][j] = d.value, slope[t][j] = d.slope;
      r[t][j] = float(m.r[at]), k[t][j] = float(m.k[at]), a[t][j] = float(m.a[at]), b[t][j] = float(m.b[at]);
      v[t][j] = float(m.v[at]), sa[t][j] = m.sa[at], gy[t][j] = float(g.output[at]);
    }
    __syncthreads();
    // This thread's column of S before every KEPT-th step of the tile.
    const float* saved = m.states + (task * m.tiles() + t0 / TILE) * N * N + j * N;
#pragma unroll
    for (int i = 0; i < N; ++i) S[i] = saved[i];
    for (int t = 0; t < length; ++t) {
      if (t % KEPT == 0) {
#pragma unroll
        for (int i = 0; i < N; ++i) kept[t / KEPT * N * N + i * N] = S[i];
      }
#pragma unroll
      for (int i = 0; i < N; ++i) S[i] = S[i] * w[t][j] + (sa[t][i] * b[t][j] + v[t][i] * k[t][j]);
    }
    for (int t = length - 1; t >= 0; --t) {
      // S before step t.
#pragma unroll
      for (int i = 0; i < N; ++i) S[i] = kept[t / KEPT * N * N + i * N];
      for (int u = t / KEPT * KEPT; u < t; ++u) {
#pragma unroll
        for (int i = 0; i < N; ++i) S[i] = S[i] * w[u][j] + (sa[u][i] * b[u][j] + v[u][i] * k[u][j]);
      }
      const float my_gy = gy[t][j];
      float my_g_v = 0.0f, my_g_sa = 0.0f;
#pragma unroll
      for (int c = 0; c < N; ++c) {
        row[c] += my_gy * r[t][c];
        my_g_v += row[c] * k[t][c];
        my_g_sa += row[c] * b[t][c];
      }
      g_v[t][j] = my_g_v;
#pragma unroll
      for (int c = 0; c < N; ++c) row[c] = row[c] * w[t][c] + my_g_sa * a[t][c];
      __syncthreads();
      g_sa[j] = my_g_sa;
      __syncthreads();
      const float wj = w[t][j], kj = k[t][j], bj = b[t][j], rj = r[t][j], aj = a[t][j];
      float g_r = 0.0f, g_w = 0.0f, g_k = 0.0f, g_a = 0.0f, g_b = 0.0f;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float gyi = gy[t][i], sai = sa[t][i], vi = v[t][i], gsai = g_sa[i];
        g_r += gyi * (S[i] * wj + (sai * bj + vi * kj));
        const float G = column[i] + gyi * rj;
        g_k += G * vi, g_b += G * sai, g_w += G * S[i], g_a += gsai * S[i];
        column[i] = G * wj + gsai * aj;
      }
      // The other threads have read these rows before the last barrier. The gradients wait there for the end of the tile,
      // since no register is left for their addresses.
      r[t][j] = g_r, w[t][j] = g_w, k[t][j] = g_k, a[t][j] = g_a, b[t][j] = g_b;
    }
    for (int t = 0; t < length; ++t) {
      const int64_t at = base + int64_t(t0 + t) * m.heads * N;
      g.r[at] = IO(r[t][j]), g.w[at] = w[t][j] * slope[t][j], g.k[at] = IO(k[t][j]), g.v[at] = IO(g_v[t][j]);
      g.a[at] = IO(a[t][j]), g.b[at] = IO(b[t][j]);
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) g.state[(task * N + i) * N + j] = column[i];
}

template <typename IO>
cudaError_t launch_forward(const Call<IO>& m, const Results<IO>& r, cudaStream_t stream) {
  return wkv::launch(walk_forward<IO>, m.batch * m.heads, N, stream, m, r);
}

template <typename IO>
cudaError_t launch_backward(const Call<IO>& m, const Gradients<IO>& g, cudaStream_t stream) {
  return wkv::launch(walk_backward<IO>, m.batch * m.heads, N, stream, m, g);
}

}  // namespace wkv7
