// WKV-4 on a GPU: code shared by the two kernels, the scan and the walk.
//
// Letters: B sequences, T steps, C channels; as types, IO is the dtype of key and value, T that of the arithmetic.
// Everything here is plain CUDA C++ with static shared memory, so that a test can run it on a host unchanged.

#pragma once

#include <cstdint>

#include "wkv4_math.h"

namespace wkv {

// The arguments of one call. saved is (B, tiles + 1, 4, C): the state before each tile, and the one after the last
// step.
template <typename IO, typename T>
struct Call {
  int64_t batch, steps, channels, tile, tiles;
  const T *time_decay, *time_first;
  const IO *key, *value;
  T* saved;
};

// The incoming state (null: the empty state) and the results of the forward pass.
template <typename IO, typename T>
struct Results {
  const T* state;
  IO* output;
  T* new_state;
};

// The inputs (gradients of output and new_state; new_state may be null) and results of the backward pass. time_first
// and time_decay are (B, C): the partial sums of each sequence.
template <typename IO, typename T>
struct Gradients {
  const IO* output;
  const T* new_state;
  IO *key, *value;
  T *state, *time_first, *time_decay;
};

template <typename IO, typename T>
__device__ T* saved_at(const Call<IO, T>& a, int64_t sequence, int64_t tile, int64_t channel) {
  return a.saved + (sequence * (a.tiles + 1) + tile) * 4 * a.channels + channel;
}

template <typename T>
__device__ State<T> load_state(const T* from, int64_t channels) {
  return {from[0], from[channels], from[2 * channels], from[3 * channels]};
}

template <typename T>
__device__ void store_state(T* to, int64_t channels, State<T> s) {
  to[0] = s.num, to[channels] = s.den, to[2 * channels] = s.key, to[3 * channels] = s.age;
}

// The state before the first step.
template <typename IO, typename T>
__device__ State<T> first_state(const Call<IO, T>& a, const Results<IO, T>& r, int64_t sequence, int64_t channel) {
  if (!r.state) return empty_state<T>();
  const T* from = r.state + sequence * 3 * a.channels + channel;
  return {from[0], from[a.channels], from[2 * a.channels], T(0)};
}

// Stores the state after the last step, for the backward pass and as the operator's result.
template <typename IO, typename T>
__device__ void store_last(const Call<IO, T>& a, const Results<IO, T>& r, int64_t sequence, int64_t channel,
                           State<T> last, T w) {
  store_state(saved_at(a, sequence, a.tiles, channel), a.channels, last);
  const Folded<T> f = fold(last, w);
  T* to = r.new_state + sequence * 3 * a.channels + channel;
  to[0] = f.scale * last.num, to[a.channels] = f.scale * last.den, to[2 * a.channels] = f.max_exp;
}

// The adjoint of the state after the last step.
template <typename IO, typename T>
__device__ Adjoint<T> last_adjoint(const Call<IO, T>& a, const Gradients<IO, T>& g, int64_t sequence, int64_t channel,
                                   T w) {
  if (!g.new_state) return {T(0), T(0)};
  const T scale = fold(load_state(saved_at(a, sequence, a.tiles, channel), a.channels), w).scale;
  const T* from = g.new_state + sequence * 3 * a.channels + channel;
  return {scale * from[0], scale * from[a.channels]};
}

// Stores the gradient of the state before the first step, computed from its adjoint.
template <typename IO, typename T>
__device__ void store_first_gradient(const Call<IO, T>& a, const Gradients<IO, T>& g, int64_t sequence,
                                     int64_t channel, Adjoint<T> adjoint) {
  const State<T> first = load_state(saved_at(a, sequence, 0, channel), a.channels);
  T* to = g.state + sequence * 3 * a.channels + channel;
  to[0] = adjoint.num, to[a.channels] = adjoint.den;
  to[2 * a.channels] = first.num * adjoint.num + first.den * adjoint.den;
}

// The key of a padding step: lower than the exponent of any state, so that the step only ages the state.
template <typename T>
constexpr T NO_KEY = T(-3e38);

// The results of walking S steps of one channel forward, as needed for walking back.
template <typename T, int S>
struct Steps {
  T num[S], den[S], earlier[S], later[S], pull_earlier[S], pull_later[S], out[S];

  // Makes step i: s is the state before the step and becomes the one after it.
  __device__ void forward(int i, State<T>& s, T w, T u, T key, T value, T grad) {
    const Output<T> o = wkv::output(s, w, u, key, value);
    const Update<T> next = update(s, w, key, value);
    const T h = grad * o.inverse;
    num[i] = s.num, den[i] = s.den;
    earlier[i] = next.factor.earlier, later[i] = next.factor.later;
    pull_earlier[i] = h * o.factor.earlier, pull_later[i] = h * o.factor.later;
    out[i] = o.value;
    s = next.state;
  }

  __device__ StepGradient<T> backward(int i, Adjoint<T>& adjoint, T value) const {
    return step_back(adjoint, num[i], den[i], Factors<T>{earlier[i], later[i]}, pull_earlier[i], pull_later[i], value,
                     out[i]);
  }

  __device__ Pull<T> pull_of(int i) const { return {earlier[i], pull_earlier[i], -pull_earlier[i] * out[i]}; }
};

}  // namespace wkv
