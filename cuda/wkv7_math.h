// WKV-7: the size of a head and its decay, for every device.
//
// RWKV-7: arXiv 2503.14456.

#pragma once

#include "scalar.h"

namespace wkv7 {

using wkv::multiply_add;

// Channels of a head.
constexpr int N = 64;

// e^x for -0.607 <= x <= 0. The coefficients minimise the largest relative error, 2e-9.
WKV_INLINE float exp_small(float x) {
  float sum = 1.045963960e-03f;
  sum = multiply_add(sum, x, 8.082785644e-03f);
  sum = multiply_add(sum, x, 4.157760739e-02f);
  sum = multiply_add(sum, x, 1.666517258e-01f);
  sum = multiply_add(sum, x, 4.999990761e-01f);
  sum = multiply_add(sum, x, 1.0f);
  return multiply_add(sum, x, 1.0f);
}
WKV_INLINE double exp_small(double x) { return wkv::exp_negative(x); }

// exp(-e^-0.5 sigmoid(x)), from 0.545 to 1, and its derivative.
template <typename T>
struct Decay {
  T value, slope;
};
template <typename T>
WKV_INLINE Decay<T> decay(T x) {
  constexpr T RATE = T(0.60653065971263342);
  const T e = wkv::exp_negative(-std::fabs(x)), inverse = T(1) / (T(1) + e);
  const T value = exp_small(-RATE * (x < T(0) ? e : T(1)) * inverse);
  return {value, -RATE * e * inverse * inverse * value};
}

}  // namespace wkv7
