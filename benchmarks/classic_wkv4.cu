// WKV-4 like every public CUDA kernel, written for the comparison: one thread per (sequence, channel) pair loops over
// time, and its backward pass stores every step's intermediate values in local memory, so T is bounded.

#include <cuda_runtime.h>

constexpr int LONGEST = 1024;

__global__ void forward(int B, int T, int C, const float* w_, const float* u_, const float* k_, const float* v_,
                        float* y_) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= B * C) return;
  const int c = i % C;
  const float w = -expf(w_[c]), u = u_[c];
  const float *k = k_ + i / C * T * C + c, *v = v_ + i / C * T * C + c;
  float* y = y_ + i / C * T * C + c;
  float p = 0, q = 0, o = -1e38f;
  for (int t = 0; t < T; ++t) {
    const float kt = k[t * C], vt = v[t * C];
    float m = fmaxf(o, u + kt), a = expf(o - m), b = expf(u + kt - m);
    y[t * C] = (a * p + b * vt) / (a * q + b);
    m = fmaxf(w + o, kt), a = expf(w + o - m), b = expf(kt - m);
    p = a * p + b * vt, q = a * q + b, o = m;
  }
}

__global__ void backward(int B, int T, int C, const float* w_, const float* u_, const float* k_, const float* v_,
                         const float* y_, const float* g_, float* gw_, float* gu_, float* gk_, float* gv_) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= B * C) return;
  const int c = i % C, at = i / C * T * C + c;
  const float w = -expf(w_[c]), u = u_[c];
  const float *k = k_ + at, *v = v_ + at, *y = y_ + at, *g = g_ + at;
  float *gk = gk_ + at, *gv = gv_ + at;
  float h[LONGEST], n[LONGEST];
  float p = 0, q = 0, dp = 0, dq = 0, o = -1e38f, gw = 0, gu = 0;
  for (int t = 0; t < T; ++t) {
    const float kt = k[t * C], vt = v[t * C], yt = y[t * C];
    float m = fmaxf(o, u + kt), a = expf(o - m), b = expf(u + kt - m);
    const float ht = g[t * C] / (a * q + b);
    h[t] = ht, n[t] = m;
    gw += ht * a * (dp - dq * yt);
    gu += ht * b * (vt - yt);
    m = fmaxf(w + o, kt), a = expf(w + o - m), b = expf(kt - m);
    dp = a * (p + dp), dq = a * (q + dq);
    p = a * p + b * vt, q = a * q + b, o = m;
  }
  float P = 0, Q = 0, r = -1e38f;
  for (int t = T - 1; t >= 0; --t) {
    const float kt = k[t * C], vt = v[t * C], yt = y[t * C];
    const float e = h[t] * expf(u + kt - n[t]), d = expf(kt + r);
    gk[t * C] = e * (vt - yt) + d * (P * vt + Q);
    gv[t * C] = e + d * P;
    const float m = fmaxf(w + r, -n[t]), a = expf(w + r - m), b = expf(-n[t] - m);
    P = a * P + b * h[t], Q = a * Q - b * h[t] * yt, r = m;
  }
  gw_[i] = gw * w, gu_[i] = gu;
}

extern "C" void classic_forward(int B, int T, int C, const float* w, const float* u, const float* k, const float* v,
                                float* y, cudaStream_t stream) {
  forward<<<(B * C + 31) / 32, 32, 0, stream>>>(B, T, C, w, u, k, v, y);
}

// gw and gu: (B, C), the contribution of each sequence.
extern "C" void classic_backward(int B, int T, int C, const float* w, const float* u, const float* k, const float* v,
                                 const float* y, const float* g, float* gw, float* gu, float* gk, float* gv,
                                 cudaStream_t stream) {
  backward<<<(B * C + 31) / 32, 32, 0, stream>>>(B, T, C, w, u, k, v, y, g, gw, gu, gk, gv);
}
