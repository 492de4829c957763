// WKV-4 for one channel, forward and backward: one time step, and the combination of two adjacent intervals of time.
//
// RWKV-4: arXiv 2305.13048. With w = -exp(time_decay) and u = time_first, the sums of the operator are stored as
// e^o (num, den). The exponent o = key + w age has two parts: the key of the largest term, exactly as given, and the
// number of steps since then. The difference of two exponents is (key - key) + w (age - age), which is as precise for
// keys of 1e4 as for keys of 1. With a single number for o, the error there is 4e-3.
//
// Plain scalar code, for every device and compiler. On a CPU, the compiler vectorises the loops over channels.

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

// w from the raw parameter. A decay of e^69 (about 1e30) forgets everything; with a larger one, w * 0 could be NaN.
template <typename T>
WKV_INLINE T decay(T time_decay) {
  return time_decay > T(69) ? T(-1e30) : T(-std::exp(time_decay));
}

// The factors of two terms with different exponents, relative to the larger one: one factor is 1, the other is an exp.
template <typename T>
struct Factors {
  T earlier, later;
};

// lead: the later term's exponent minus the earlier one's. A NaN lead makes the later factor NaN.
template <typename T>
WKV_INLINE Factors<T> factors(T lead) {
  const T e = exp_negative(-std::fabs(lead));
  return {lead > T(0) ? e : T(1), lead > T(0) ? T(1) : e};
}

// Represents e^(key + w age) (num, den).
template <typename T>
struct State {
  T num, den, key, age;
};

// The state before any step. Its exponent is so low that it vanishes next to any key.
template <typename T>
WKV_INLINE State<T> empty_state() {
  return {T(0), T(0), T(-1e38), T(0)};
}

// value = (earlier num + later value) inverse, with 1 / inverse = earlier den + later.
template <typename T>
struct Output {
  Factors<T> factor;
  T inverse, value;
};

template <typename T>
WKV_INLINE Output<T> output(State<T> s, T w, T u, T key, T value) {
  const Factors<T> f = factors((key - s.key) + multiply_add(-w, s.age, u));
  const T inverse = T(1) / multiply_add(f.earlier, s.den, f.later);
  return {f, inverse, multiply_add(f.earlier, s.num, f.later * value) * inverse};
}

// The state after one more step, and the factors by which the old state and the step were scaled.
template <typename T>
struct Update {
  Factors<T> factor;
  State<T> state;
};

template <typename T>
WKV_INLINE Update<T> update(State<T> s, T w, T key, T value) {
  const T age = s.age + T(1);
  const T lead = multiply_add(-w, age, key - s.key);
  const Factors<T> f = factors(lead);
  return {f,
          {multiply_add(f.earlier, s.num, f.later * value), multiply_add(f.earlier, s.den, f.later),
           lead > T(0) ? key : s.key, lead > T(0) ? T(0) : age}};
}

// The exponent of `later` minus that of `earlier` aged by `steps` more steps.
template <typename T>
WKV_INLINE T lead_of(State<T> earlier, State<T> later, T w, T steps) {
  return multiply_add(w, later.age - (earlier.age + steps), later.key - earlier.key);
}

// Combines two adjacent intervals of time; the later one has `steps` steps.
template <typename T>
WKV_INLINE State<T> combine(State<T> earlier, State<T> later, T w, T steps) {
  const T lead = lead_of(earlier, later, w, steps);
  const Factors<T> f = factors(lead);
  return {multiply_add(f.earlier, earlier.num, f.later * later.num),
          multiply_add(f.earlier, earlier.den, f.later * later.den), lead > T(0) ? later.key : earlier.key,
          lead > T(0) ? later.age : earlier.age + steps};
}

// A state in the form of the operator's results, with the exponent as one number, max_exp. Multiply num and den by
// `scale`, which corrects the rounding of max_exp. A NaN in den makes max_exp NaN too.
template <typename T>
struct Folded {
  T max_exp, scale;
};

template <typename T>
WKV_INLINE Folded<T> fold(State<T> s, T w) {
  const T max_exp = multiply_add(w, s.age, s.key);
  return {max_exp + (s.den - s.den), exp_negative(multiply_add(w, s.age, s.key - max_exp))};
}

// The gradients of the loss with respect to a state's num and den, with its exponent held constant.
template <typename T>
struct Adjoint {
  T num, den;
};

// The gradients with respect to one step's key, value and u, and to w through the decay of the state before the step:
// d/dw = sum over steps of earlier (after.num num + after.den den). So the forward pass carries nothing extra for w.
template <typename T>
struct StepGradient {
  T key, value, u, w;
};

// One step back in time. `after` is the adjoint of the state after the step and becomes that of the state before.
// num, den: of the state before. push: the factors of the step's update. pull_earlier, pull_later: the factors of its
// output, times the output's gradient and inverse. value, out: the step's value and output.
// The adjoint is scaled by the exponent of its state, so every factor is at most 1: nothing overflows, and walking back
// needs no exponential.
template <typename T>
WKV_INLINE StepGradient<T> step_back(Adjoint<T>& after, T num, T den, Factors<T> push, T pull_earlier,
                                     T pull_later, T value, T out) {
  const T bonus = pull_later * (value - out);
  const T through_state = multiply_add(after.num, value, after.den);
  const StepGradient<T> gradient = {multiply_add(push.later, through_state, bonus),
                                    multiply_add(push.later, after.num, pull_later), bonus,
                                    push.earlier * multiply_add(after.num, num, after.den * den)};
  after.num = multiply_add(push.earlier, after.num, pull_earlier);
  after.den = multiply_add(push.earlier, after.den, -pull_earlier * out);
  return gradient;
}

// The effect of walking back over any number of steps on an adjoint: factor adjoint + (num, den).
template <typename T>
struct Pull {
  T factor, num, den;
};

template <typename T>
WKV_INLINE Adjoint<T> pull(Pull<T> over, Adjoint<T> after) {
  return {multiply_add(over.factor, after.num, over.num), multiply_add(over.factor, after.den, over.den)};
}

// Combines two adjacent intervals.
template <typename T>
WKV_INLINE Pull<T> pull(Pull<T> earlier, Pull<T> later) {
  const Adjoint<T> offset = pull(earlier, Adjoint<T>{later.num, later.den});
  return {earlier.factor * later.factor, offset.num, offset.den};
}

}  // namespace wkv
