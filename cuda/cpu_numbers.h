// Numbers of the CPU kernels: float32 or bfloat16 in memory, float32 in arithmetic; sums over rows.

#pragma once

#include "cpu_lanes.h"
#include "scalar.h"

namespace wkv {

using bfloat16 = std::uint16_t;

WKV_INLINE float widen(float x) { return x; }
WKV_INLINE float widen(bfloat16 x) {
  const std::uint32_t bits = std::uint32_t(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// Calls f with a zero of a tensor's element type: bfloat16 if is_bf16, else float32.
template <typename F>
void dispatch_type(bool is_bf16, const F& f) {
  is_bf16 ? f(bfloat16()) : f(float());
}

template <typename T>
WKV_INLINE T narrow(float x);
template <>
WKV_INLINE float narrow<float>(float x) {
  return x;
}
// Rounds to nearest, ties to even, as torch does. A NaN keeps its sign and becomes quiet.
template <>
WKV_INLINE bfloat16 narrow<bfloat16>(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return bfloat16(x == x ? rounded : (bits >> 16) | 0x40u);
}

// The pairwise sum of N lanes.
template <int64_t N>
WKV_INLINE float sum_lanes(const float* lanes) {
  if constexpr (N == 1) {
    return lanes[0];
  } else {
    float halves[N / 2];
    for (int64_t l = 0; l < N / 2; ++l) halves[l] = lanes[l] + lanes[l + N / 2];
    return sum_lanes<N / 2>(halves);
  }
}

// term(0) + ... + term(n - 1), accumulated in LANES partial sums.
template <typename F>
WKV_INLINE float sum(int64_t n, const F& term) {
  constexpr int64_t LANES = 32;
  alignas(64) float sums[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    WKV_SIMD
    for (int64_t l = 0; l < LANES; ++l) sums[l] += term(i + l);
  }
  for (int64_t l = 0; l < n - i; ++l) sums[l] += term(i + l);
  return sum_lanes<LANES>(sums);
}

WKV_INLINE float sigmoid(float x) {
  const float e = exp_negative(-std::fabs(x));
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

}  // namespace wkv
