// WKV-4 for one channel, forward and backward: one time step, and the combination of two adjacent intervals of time.
//
// RWKV-4: arXiv 2305.13048. With w = -exp(time_decay) and u = time_first, the sums of the operator are stored as
// e^o (num, den). The exponent o = key + w age has two parts: the key of the largest term, exactly as given, and the
// number of steps since then. The difference of two exponents is (key - key) + w (age - age), which is as precise for
// keys of 1e4 as for keys of 1. With a single number for o, the error there is 4e-3.
//
// Plain scalar code, for every device and compiler. On a CPU, the compiler vectorises the loops over channels.

#pragma once

#include "scalar.h"

namespace wkv {

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
