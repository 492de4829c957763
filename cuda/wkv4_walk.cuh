// WKV-4 for a batch x channels that fills the GPU: each thread walks V adjacent channels of one sequence through time.
// It reads and writes only the operator's inputs and outputs, and one state every `tile` steps. Memory bandwidth is the
// limit, so the inputs of the next steps are loaded while the current ones are computed.

#pragma once

#include <cstring>
#include <type_traits>

#include "wkv4_gpu.h"

namespace wkv {

// V adjacent channels, loaded and stored as one word.
template <int BYTES>
struct Word;
template <>
struct Word<2> {
  using Type = uint16_t;
};
template <>
struct Word<4> {
  using Type = uint32_t;
};
template <>
struct Word<8> {
  using Type = uint64_t;
};

template <typename IO, int V>
struct Pack {
  typename Word<sizeof(IO) * V>::Type word;

  __device__ IO lane(int c) const {
    IO lanes[V];
    memcpy(lanes, &word, sizeof word);
    return lanes[c];
  }
  static __device__ Pack of(const IO (&lanes)[V]) {
    Pack pack;
    memcpy(&pack.word, lanes, sizeof pack.word);
    return pack;
  }
};

// V channels of a thread's sequence in a (B, T, C) tensor. The stride is in bytes, in 32 bits, so that computing an
// address takes one instruction.
template <typename P>
struct Column {
  P* first;
  uint32_t stride;

  __device__ P* from(int64_t t) const { return reinterpret_cast<P*>(bytes(first) + t * int64_t(stride)); }
  __device__ P& at(P* from, int i) const {
    return *reinterpret_cast<P*>(bytes(from) + uint64_t(stride) * uint32_t(i));
  }

 private:
  static __device__ char* bytes(P* p) { return reinterpret_cast<char*>(const_cast<std::remove_const_t<P>*>(p)); }
};

// Asynchronous copies into shared memory, in groups: asking() starts a group, ask() requests a copy, asked() ends the
// group. arrived<N>() waits until all groups of this thread except the last N have arrived. Chips before sm_80, and
// words of two bytes, are copied synchronously.
__device__ inline void asking() {
#if defined(__CUDA_ARCH__)
  asm volatile("" ::: "memory");  // all reads of the buffer that is refilled come before this
#endif
}
template <typename P>
__device__ void ask(P* shared, const P* global) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (sizeof(P) >= 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(unsigned(__cvta_generic_to_shared(shared))),
                 "l"(global), "n"(sizeof(P)));
    return;
  }
#endif
  *shared = *global;
}
__device__ inline void asked() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;");
#endif
}
template <int N>
__device__ void arrived() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Loads S steps of a tensor into registers.
template <typename P, int S>
__device__ void load(P (&to)[S], const Column<const P>& column, int64_t t) {
  const P* from = column.from(t);
#pragma unroll
  for (int i = 0; i < S; ++i) to[i] = column.at(from, i);
}

// S steps of a tensor in shared memory, in a column that only this thread uses.
template <typename P, int S, int THREADS>
struct Rows {
  P row[S][THREADS];

  __device__ void load(const Column<const P>& column, int64_t t) {
    const P* from = column.from(t);
#pragma unroll
    for (int i = 0; i < S; ++i) ask(&row[i][threadIdx.x], &column.at(from, i));
  }
  __device__ P operator[](int i) const { return row[i][threadIdx.x]; }
};

// The position of a thread: V channels, from `channel` on, of `sequence`.
template <typename IO, typename T, int V>
struct Walker {
  int64_t sequence, channel, offset;
  uint32_t stride;
  bool inside;

  __device__ explicit Walker(const Call<IO, T>& a) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, packs = a.channels / V;
    inside = i < a.batch * packs;
    sequence = i / packs;
    channel = i % packs * V;
    offset = sequence * a.steps * a.channels + channel;
    stride = uint32_t(a.channels * sizeof(IO));
  }
  __device__ Column<const Pack<IO, V>> of(const IO* p) const {
    return {reinterpret_cast<const Pack<IO, V>*>(p + offset), stride};
  }
  __device__ Column<Pack<IO, V>> of(IO* p) const { return {reinterpret_cast<Pack<IO, V>*>(p + offset), stride}; }
};

// S: the steps that are loaded ahead; it must divide the tile.
template <typename IO, typename T, int V, int THREADS, int S>
__global__ void __launch_bounds__(THREADS) walk_forward(Call<IO, T> a, Results<IO, T> r) {
  using P = Pack<IO, V>;
  const Walker<IO, T, V> here(a);
  if (!here.inside) return;
  const Column<const P> key = here.of(a.key), value = here.of(a.value);
  const Column<P> output = here.of(r.output);
  State<T> s[V];
  T w[V], u[V];
#pragma unroll
  for (int c = 0; c < V; ++c) {
    w[c] = decay(a.time_decay[here.channel + c]);
    u[c] = a.time_first[here.channel + c];
    s[c] = first_state(a, r, here.sequence, here.channel + c);
  }
  const auto step = [&](P key, P value) {
    IO y[V];
#pragma unroll
    for (int c = 0; c < V; ++c) {
      const T k = T(key.lane(c)), v = T(value.lane(c));
      y[c] = IO(wkv::output(s[c], w[c], u[c], k, v).value);
      s[c] = update(s[c], w[c], k, v).state;
    }
    return P::of(y);
  };
  const auto save = [&](int64_t t) {
    if (t % a.tile != 0) return;
#pragma unroll
    for (int c = 0; c < V; ++c) {
      store_state(saved_at(a, here.sequence, t / a.tile, here.channel + c), a.channels, s[c]);
    }
  };

  int64_t t = 0;
  P next_key[S], next_value[S];
  if (S <= a.steps) load(next_key, key, 0), load(next_value, value, 0);
  for (; t + S <= a.steps; t += S) {
    P keys[S], values[S];
#pragma unroll
    for (int i = 0; i < S; ++i) keys[i] = next_key[i], values[i] = next_value[i];
    if (t + 2 * S <= a.steps) load(next_key, key, t + S), load(next_value, value, t + S);
    save(t);
    P* out = output.from(t);
#pragma unroll
    for (int i = 0; i < S; ++i) output.at(out, i) = step(keys[i], values[i]);
  }
  // The remaining steps, fewer than S.
  if (t < a.steps) save(t);
  for (; t < a.steps; ++t) *output.from(t) = step(*key.from(t), *value.from(t));
#pragma unroll
  for (int c = 0; c < V; ++c) store_last(a, r, here.sequence, here.channel + c, s[c], w[c]);
}

// Walks forward through a tile once, to get the state before each group of S steps. Then, from the last group to the
// first, walks each group forward and back. GROUPS: the groups in a tile. AHEAD: the groups of inputs that are being
// loaded, into shared memory. (A warp can track only six pending loads separately. With as many loads into registers,
// it would have to wait for a newer load to get an older one.)
template <typename IO, typename T, int V, int THREADS, int S, int GROUPS, int AHEAD>
__global__ void __launch_bounds__(THREADS) walk_backward(Call<IO, T> a, Gradients<IO, T> g) {
  using P = Pack<IO, V>;
  __shared__ Rows<P, S, THREADS> keys[AHEAD + 1], values[AHEAD + 1], grads[AHEAD + 1];
  __shared__ T kept[GROUPS][4][V][THREADS];
  const Walker<IO, T, V> here(a);
  if (!here.inside) return;
  const Column<const P> key = here.of(a.key), value = here.of(a.value), grad = here.of(g.output);
  const Column<P> grad_key = here.of(g.key), grad_value = here.of(g.value);
  State<T> s[V];
  Adjoint<T> adjoint[V];
  T w[V], u[V], sum_u[V], sum_w[V];
#pragma unroll
  for (int c = 0; c < V; ++c) {
    w[c] = decay(a.time_decay[here.channel + c]);
    u[c] = a.time_first[here.channel + c];
    adjoint[c] = last_adjoint(a, g, here.sequence, here.channel + c, w[c]);
    sum_u[c] = sum_w[c] = T(0);
  }
  const auto load_saved = [&](int64_t tile) {
#pragma unroll
    for (int c = 0; c < V; ++c) {
      s[c] = load_state(saved_at(a, here.sequence, tile, here.channel + c), a.channels);
    }
  };
  const auto advance = [&](P k, P v) {
#pragma unroll
    for (int c = 0; c < V; ++c) s[c] = update(s[c], w[c], T(k.lane(c)), T(v.lane(c))).state;
  };
  // Walks N steps from t on, forward and back; s is the state before them.
  const auto forward_and_back = [&](int64_t t, const auto& keys, const auto& values, const auto& grads, auto n) {
    constexpr int N = decltype(n)::value;
    Steps<T, N> steps[V];
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
      for (int c = 0; c < V; ++c) {
        steps[c].forward(i, s[c], w[c], u[c], T(keys[i].lane(c)), T(values[i].lane(c)), T(grads[i].lane(c)));
      }
    }
    P *out_key = grad_key.from(t), *out_value = grad_value.from(t);
#pragma unroll
    for (int i = N - 1; i >= 0; --i) {
      IO gk[V], gv[V];
#pragma unroll
      for (int c = 0; c < V; ++c) {
        const StepGradient<T> step = steps[c].backward(i, adjoint[c], T(values[i].lane(c)));
        gk[c] = IO(step.key), gv[c] = IO(step.value);
        sum_u[c] += step.u, sum_w[c] += step.w;
      }
      grad_key.at(out_key, i) = P::of(gk), grad_value.at(out_value, i) = P::of(gv);
    }
  };

  // The last steps, fewer than S: one at a time, each from the saved state at the start of its tile.
  const int64_t whole = a.steps / S * S;
  for (int64_t t = a.steps - 1; t >= whole; --t) {
    load_saved(t / a.tile);
    for (int64_t i = t / a.tile * a.tile; i < t; ++i) advance(*key.from(i), *value.from(i));
    const P keys[1] = {*key.from(t)}, values[1] = {*value.from(t)}, grads[1] = {*grad.from(t)};
    forward_and_back(t, keys, values, grads, std::integral_constant<int, 1>());
  }

  // A tile of n groups takes 2 n - 1 rounds: groups 0 to n - 2 forward, then groups n - 1 to 0 forward and back.
  const int64_t groups = whole / S, last = (groups - 1) / GROUPS;
  const auto groups_of = [&](int64_t tile) { return tile == last ? int(groups - last * GROUPS) : GROUPS; };
  int64_t asked_tile = groups == 0 ? -1 : last;
  int asked_round = 0;
  const auto request = [&](int slot) {
    asking();
    if (asked_tile >= 0) {
      const int n = groups_of(asked_tile), back = asked_round - (n - 1);
      const int64_t t = (asked_tile * GROUPS + (back < 0 ? asked_round : n - 1 - back)) * S;
      keys[slot].load(key, t), values[slot].load(value, t);
      if (back >= 0) grads[slot].load(grad, t);
      asked_round = back == n - 1 ? 0 : asked_round + 1;
      if (back == n - 1) --asked_tile;
    }
    asked();
  };
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) request(i);
  int slot = 0;
  const auto next = [&]() {
    request(slot == 0 ? AHEAD : slot - 1);
    arrived<AHEAD>();
  };
  for (int64_t tile = groups == 0 ? -1 : last; tile >= 0; --tile) {
    const int n = groups_of(tile);
    load_saved(tile);
    for (int group = 0; group < n; ++group) {
#pragma unroll
      for (int c = 0; c < V; ++c) {
        kept[group][0][c][threadIdx.x] = s[c].num, kept[group][1][c][threadIdx.x] = s[c].den;
        kept[group][2][c][threadIdx.x] = s[c].key, kept[group][3][c][threadIdx.x] = s[c].age;
      }
      if (group + 1 == n) break;
      next();
#pragma unroll
      for (int i = 0; i < S; ++i) advance(keys[slot][i], values[slot][i]);
      slot = slot == AHEAD ? 0 : slot + 1;
    }
    for (int group = n - 1; group >= 0; --group) {
      next();
#pragma unroll
      for (int c = 0; c < V; ++c) {
        s[c] = {kept[group][0][c][threadIdx.x], kept[group][1][c][threadIdx.x], kept[group][2][c][threadIdx.x],
                kept[group][3][c][threadIdx.x]};
      }
      forward_and_back((tile * GROUPS + group) * S, keys[slot], values[slot], grads[slot],
                       std::integral_constant<int, S>());
      slot = slot == AHEAD ? 0 : slot + 1;
    }
  }

#pragma unroll
  for (int c = 0; c < V; ++c) {
    const int64_t at = here.sequence * a.channels + here.channel + c;
    store_first_gradient(a, g, here.sequence, here.channel + c, adjoint[c]);
    g.time_first[at] = sum_u[c], g.time_decay[at] = sum_w[c] * w[c];
  }
}

}  // namespace wkv
