// Scalar arithmetic, the same for every device and compiler: fused multiply-add, exponential.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define WKV_INLINE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define WKV_INLINE __forceinline
#else
#define WKV_INLINE inline __attribute__((always_inline))
#endif

#if defined(_MSC_VER)
#define WKV_NOINLINE __declspec(noinline)
#else
#define WKV_NOINLINE __attribute__((noinline))
#endif

namespace wkv {

// a b + c. Without an FMA instruction, std::fma is a library call, 40 times slower than a product and a sum.
template <typename T>
WKV_INLINE T multiply_add(T a, T b, T c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__CUDA_ARCH__)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

// e^x for x <= 0 (or slightly above), with an error of 2 ulp; 0 if the result would be subnormal; NaN for NaN. Adding
// 1.5 * 2^(mantissa bits) rounds to an integer n. With the exponent's bias added too, the low bits of the sum are the
// exponent bits of 2^n. x is clamped to where these bits are 0. There is no library call and no branch, so a loop
// around it can be vectorised.
WKV_INLINE float exp_negative(float x) {
#ifdef __CUDA_ARCH__
  // The relative error of __expf grows with |x|, but e^x shrinks faster, compared with the term that it is added to,
  // whose factor is 1: the error is at most 1.2e-7 of the sum.
  return __expf(x);
#else
  const float shift = 12582912.0f + 127.0f;
  x = x < -88.0f ? -88.0f : x;
  const float t = multiply_add(x, 1.44269504f, shift);
  const float n = t - shift;
  float r = multiply_add(n, -0.693359375f, x);
  r = multiply_add(n, 2.12194440e-4f, r);
  float sum = 0.00829027220606804f;
  sum = multiply_add(sum, r, 0.04189816117286682f);
  sum = multiply_add(sum, r, 0.1666763871908188f);
  sum = multiply_add(sum, r, 0.4999914765357971f);
  sum = multiply_add(sum, r, 0.9999997019767761f);
  sum = multiply_add(sum, r, 1.0f);
  std::uint32_t bits;
  std::memcpy(&bits, &t, sizeof bits);
  bits <<= 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return sum * power;
#endif
}

WKV_INLINE double exp_negative(double x) {
#ifdef __CUDA_ARCH__
  return exp(x);
#else
  const double shift = 6755399441055744.0 + 1023.0;
  x = x < -709.1 ? -709.1 : x;
  const double t = multiply_add(x, 1.4426950408889634, shift);
  const double n = t - shift;
  double r = multiply_add(n, -0.693145751953125, x);
  r = multiply_add(n, -1.42860682030941723212e-6, r);
  double sum = 1.0 / 6227020800.0;
  sum = multiply_add(sum, r, 1.0 / 479001600.0);
  sum = multiply_add(sum, r, 1.0 / 39916800.0);
  sum = multiply_add(sum, r, 1.0 / 3628800.0);
  sum = multiply_add(sum, r, 1.0 / 362880.0);
  sum = multiply_add(sum, r, 1.0 / 40320.0);
  sum = multiply_add(sum, r, 1.0 / 5040.0);
  sum = multiply_add(sum, r, 1.0 / 720.0);
  sum = multiply_add(sum, r, 1.0 / 120.0);
  sum = multiply_add(sum, r, 1.0 / 24.0);
  sum = multiply_add(sum, r, 1.0 / 6.0);
  sum = multiply_add(sum, r, 0.5);
  sum = multiply_add(sum, r, 1.0);
  sum = multiply_add(sum, r, 1.0);
  std::uint64_t bits;
  std::memcpy(&bits, &t, sizeof bits);
  bits <<= 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return sum * power;
#endif
}

}  // namespace wkv
