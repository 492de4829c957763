// WKV-4 for a batch x channels that is too small to fill the GPU: parallel in time too. A block owns CH channels of one
// sequence and walks over tiles of CHUNKS x S steps. In each tile, a thread folds the S steps of its chunk into one
// summary, the block scans the summaries, and the thread walks its steps again from the correct state. The backward
// pass does the same once more in the other direction; there a summary is the effect of the steps on an adjoint (Pull).

#pragma once

#include "wkv4_gpu.h"

namespace wkv {

constexpr int WARP = 32;

// Results of a block scan for one element: the total of the elements before it in its warp, the total of the warps
// before its warp, and the total of the block.
template <typename E>
struct Prefix {
  E in_warp, warps, all;
};

// The element of the lane that is `lanes` lanes before this one; with BACK, after it.
template <bool BACK, typename N>
__device__ N from_lane(N x, int lanes, int width = WARP) {
  return BACK ? __shfl_down_sync(0xffffffffu, x, lanes, width) : __shfl_up_sync(0xffffffffu, x, lanes, width);
}
template <bool BACK, typename T>
__device__ State<T> from_lane(State<T> s, int lanes, int width = WARP) {
  return {from_lane<BACK>(s.num, lanes, width), from_lane<BACK>(s.den, lanes, width),
          from_lane<BACK>(s.key, lanes, width), from_lane<BACK>(s.age, lanes, width)};
}
template <bool BACK, typename T>
__device__ Pull<T> from_lane(Pull<T> p, int lanes, int width = WARP) {
  return {from_lane<BACK>(p.factor, lanes, width), from_lane<BACK>(p.num, lanes, width),
          from_lane<BACK>(p.den, lanes, width)};
}

// Scans over the chunks of each channel; thread = chunk x CH + channel. join(first, second, chunks) combines two
// neighbours in the direction of the scan; the second is `chunks` chunks long. join_of does the same for the channel
// threadIdx.x / WARPS, which this thread handles in the scan over the totals of the warps. Consecutive calls need
// different `totals`.
template <bool BACK, int CH, int CHUNKS, typename E, typename Join, typename JoinOf>
__device__ Prefix<E> block_scan(E own, E none, E (*totals)[CH * CHUNKS / WARP], const Join& join,
                                const JoinOf& join_of) {
  constexpr int IN_WARP = WARP / CH, WARPS = CH * CHUNKS / WARP;
  static_assert(WARP % CH == 0 && WARPS <= WARP && CH * WARPS % WARP == 0, "whole warps scan the warps' totals");
  const int thread = threadIdx.x, lane = thread % WARP, channel = thread % CH;
  const int at = BACK ? IN_WARP - 1 - lane / CH : lane / CH, warp = BACK ? WARPS - 1 - thread / WARP : thread / WARP;
#pragma unroll
  for (int d = 1; d < IN_WARP; d *= 2) {
    const E other = from_lane<BACK>(own, d * CH);
    if (at >= d) own = join(other, own, d);
  }
  E in_warp = from_lane<BACK>(own, CH);
  if (at == 0) in_warp = none;
  if (at == IN_WARP - 1) totals[channel][warp] = own;
  __syncthreads();
  if (thread < CH * WARPS) {
    E total = totals[thread / WARPS][thread % WARPS];
#pragma unroll
    for (int d = 1; d < WARPS; d *= 2) {
      const E other = from_lane<false>(total, d, WARPS);
      if (thread % WARPS >= d) total = join_of(other, total, d * IN_WARP);
    }
    totals[thread / WARPS][thread % WARPS] = total;
  }
  __syncthreads();
  return {in_warp, warp == 0 ? none : totals[channel][warp - 1], totals[channel][WARPS - 1]};
}

// The position of a thread. Threads beyond the last channel have no steps and write nothing.
template <typename IO, typename T, int CH, int CHUNKS, int S>
struct Scanner {
  static constexpr int WARPS = CH * CHUNKS / WARP, IN_WARP = WARP / CH, TILE = CHUNKS * S;
  int64_t offset;
  int sequence, channel, chunk, stride;
  bool inside;
  // w and u of this thread's channel; w_of is w of the channel that it handles in the scan over warps.
  T w, u, w_of;

  __device__ explicit Scanner(const Call<IO, T>& a) {
    const int64_t groups = (a.channels + CH - 1) / CH, first = blockIdx.x % groups * CH;
    const int thread = threadIdx.x;
    sequence = int(blockIdx.x / groups);
    chunk = thread / CH;
    inside = first + thread % CH < a.channels;
    channel = int(clamp(first + thread % CH, a.channels));
    offset = int64_t(sequence) * a.steps * a.channels + channel;
    stride = int(a.channels);
    w = decay(a.time_decay[channel]);
    u = a.time_first[channel];
    w_of = thread < CH * WARPS ? decay(a.time_decay[clamp(first + thread / WARPS, a.channels)]) : T(0);
  }
  static __device__ int64_t clamp(int64_t channel, int64_t channels) {
    return channel < channels ? channel : channels - 1;
  }

  // How many of this thread's S steps exist in the tile that starts at t0; the others are padding.
  __device__ int count(const Call<IO, T>& a, int64_t t0) const {
    const int64_t left = a.steps - t0 - chunk * S;
    return left < 0 || !inside ? 0 : left < S ? int(left) : S;
  }

  // The offset of this thread's first step in that tile.
  __device__ int64_t at(int64_t t0) const { return offset + (t0 + chunk * S) * stride; }

  __device__ void load(T (&to)[S], const IO* from, int64_t t0, int count, T padding) const {
    from += at(t0);
#pragma unroll
    for (int i = 0; i < S; ++i) to[i] = i < count ? T(from[i * stride]) : padding;
  }

  // The state before this thread's first step. `state` is the state before the tile and becomes the one after it.
  __device__ State<T> start(State<T>& state, const T (&key)[S], const T (&value)[S],
                            State<T> (*totals)[WARPS]) const {
    State<T> own = empty_state<T>();
#pragma unroll
    for (int i = 0; i < S; ++i) own = update(own, w, key[i], value[i]).state;
    const T decay = w, decay_of = w_of;
    const Prefix<State<T>> before = block_scan<false, CH, CHUNKS>(
        own, empty_state<T>(), totals,
        [=](State<T> x, State<T> y, int chunks) { return combine(x, y, decay, T(chunks * S)); },
        [=](State<T> x, State<T> y, int chunks) { return combine(x, y, decay_of, T(chunks * S)); });
    const int in_warp = chunk % IN_WARP;
    const State<T> warp = combine(state, before.warps, w, T((chunk - in_warp) * S));
    state = combine(state, before.all, w, T(TILE));
    return combine(warp, before.in_warp, w, T(in_warp * S));
  }
};

template <typename IO, typename T, int CH, int CHUNKS, int S>
__global__ void __launch_bounds__(CH* CHUNKS) scan_forward(Call<IO, T> a, Results<IO, T> r) {
  // Two, used alternately: one thread may still read the first while another already writes the second.
  __shared__ State<T> totals[2][CH][CH * CHUNKS / WARP];
  using Place = Scanner<IO, T, CH, CHUNKS, S>;
  const Place here(a);
  State<T> state = first_state(a, r, here.sequence, here.channel);
  const bool writes_state = here.chunk == 0 && here.inside;
  T key[S], value[S];
  int count = here.count(a, 0);
  here.load(key, a.key, 0, count, NO_KEY<T>);
  here.load(value, a.value, 0, count, T(0));
  for (int64_t tile = 0; tile < a.tiles; ++tile) {
    const int64_t t0 = tile * Place::TILE;
    if (writes_state) store_state(saved_at(a, here.sequence, tile, here.channel), a.channels, state);
    State<T> s = here.start(state, key, value, totals[tile % 2]);
    IO* output = r.output + here.at(t0);
#pragma unroll
    for (int i = 0; i < S; ++i) {
      const T y = wkv::output(s, here.w, here.u, key[i], value[i]).value;
      if (i < count) output[i * here.stride] = IO(y);
      s = update(s, here.w, key[i], value[i]).state;
    }
    // Loading here, not at the start of the loop, needs only 64 registers, so two blocks fit on a multiprocessor.
    if (tile + 1 < a.tiles) {
      count = here.count(a, t0 + Place::TILE);
      here.load(key, a.key, t0 + Place::TILE, count, NO_KEY<T>);
      here.load(value, a.value, t0 + Place::TILE, count, T(0));
    }
  }
  if (writes_state) {
    state.age -= T(a.tiles * Place::TILE - a.steps);
    store_last(a, r, here.sequence, here.channel, state, here.w);
  }
}

template <typename IO, typename T, int CH, int CHUNKS, int S>
__global__ void __launch_bounds__(CH* CHUNKS) scan_backward(Call<IO, T> a, Gradients<IO, T> g) {
  using Place = Scanner<IO, T, CH, CHUNKS, S>;
  constexpr int WARPS = Place::WARPS;
  // One of each is enough: the scan over the other has barriers between two writes to the same one.
  __shared__ State<T> states[CH][WARPS];
  __shared__ Pull<T> pulls[CH][WARPS];
  const Place here(a);
  Adjoint<T> adjoint = last_adjoint(a, g, here.sequence, here.channel, here.w);
  T sum_u = T(0), sum_w = T(0);
  for (int tile = int(a.tiles) - 1; tile >= 0; --tile) {
    const int64_t t0 = int64_t(tile) * Place::TILE;
    const int count = here.count(a, t0);
    T key[S], value[S], grad[S];
    here.load(key, a.key, t0, count, NO_KEY<T>);
    here.load(value, a.value, t0, count, T(0));
    here.load(grad, g.output, t0, count, T(0));
    State<T> state = load_state(saved_at(a, here.sequence, tile, here.channel), a.channels);
    State<T> s = here.start(state, key, value, states);

    Steps<T, S> steps;
#pragma unroll
    for (int i = 0; i < S; ++i) {
      steps.forward(i, s, here.w, here.u, key[i], value[i], grad[i]);
    }
    const Pull<T> none = {T(1), T(0), T(0)};
    Pull<T> own = none;
#pragma unroll
    for (int i = S - 1; i >= 0; --i) {
      own = pull(steps.pull_of(i), own);
    }
    const auto join = [](Pull<T> later, Pull<T> earlier, int) { return pull(earlier, later); };
    const Prefix<Pull<T>> after = block_scan<true, CH, CHUNKS>(own, none, pulls, join, join);
    Adjoint<T> mine = pull(after.in_warp, pull(after.warps, adjoint));
    adjoint = pull(after.all, adjoint);

    IO *grad_key = g.key + here.at(t0), *grad_value = g.value + here.at(t0);
#pragma unroll
    for (int i = S - 1; i >= 0; --i) {
      const StepGradient<T> step = steps.backward(i, mine, value[i]);
      if (i < count) {
        grad_key[i * here.stride] = IO(step.key);
        grad_value[i * here.stride] = IO(step.value);
        sum_u += step.u, sum_w += step.w;
      }
    }
  }

  // Sum over the chunks of each channel, in order.
  __shared__ T sums[2][CH][WARPS];
#pragma unroll
  for (int d = CH; d < WARP; d *= 2) {
    sum_u += from_lane<true>(sum_u, d);
    sum_w += from_lane<true>(sum_w, d);
  }
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  if (lane < CH) sums[0][lane][warp] = sum_u, sums[1][lane][warp] = sum_w;
  __syncthreads();
  if (here.chunk == 0 && here.inside) {
    sum_u = sum_w = T(0);
    for (int i = 0; i < WARPS; ++i) sum_u += sums[0][lane][i], sum_w += sums[1][lane][i];
    store_first_gradient(a, g, here.sequence, here.channel, adjoint);
    g.time_first[here.sequence * a.channels + here.channel] = sum_u;
    g.time_decay[here.sequence * a.channels + here.channel] = sum_w * here.w;
  }
}

}  // namespace wkv
