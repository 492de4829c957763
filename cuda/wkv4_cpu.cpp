// WKV-4 on the CPU: the operator's schema, for all devices, and its CPU kernels.
//
// Letters: B sequences, T steps, C channels. C is the innermost dimension, so a loop walks LANES adjacent channels
// through time together, and the compiler vectorises over them. Tasks are sequences x blocks of LANES channels. If
// there are too few of these for the threads, time is split into chunks as well:
//
//   forward    1. (chunks) each chunk alone, from the empty state to its summary      2. (chunks) combine in order
//              3. walk: write the output, and save the state at the start of every tile of at most 32 steps
//   backward   tiles from the last to the first: walk forward again from the saved state, with the tile in cache, then
//              back through it. A chunk's result is affine in the adjoint at its end, so with chunks:
//              1. each with adjoint 0   2. combine in order   3. walk with the correct adjoint, writing gradients
//
// Each task has separate sums over time and sequences, and these are added in order: the same bits in every run.
// rwkv_pl.ops.build builds it with the LibTorch stable ABI, so one library works with every torch from 2.10.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu_lanes.h"
#include "cpu_numbers.h"
#include "wkv4_math.h"
#include "tensor.h"

namespace {

using torch::stable::Tensor;
using wkv::bfloat16;
using wkv::contiguous;
using wkv::data;

constexpr int64_t LANES = 32;
// Steps of the longest tile, so that the backward pass's arrays for a tile fit into the L1 cache.
constexpr int64_t LONGEST_TILE = 32;
// The fewest steps of a chunk, and the fewest keys of a thread (about 5 microseconds).
constexpr int64_t SHORTEST_CHUNK = 128;
constexpr int64_t LEAST_KEYS = 16384;

// LANES channels of one sequence: p[row][lane].
template <typename T>
struct Rows {
  T* p;
  int64_t stride;
  T* operator[](int64_t row) const { return p + row * stride; }
};

// LANES numbers in the type of the arithmetic: read in place, or widened from bfloat16 into `own`.
template <typename T, typename Width>
WKV_INLINE const T* load_row(const T* row, T*, Width) {
  return row;
}
template <typename Width>
WKV_INLINE const float* load_row(const bfloat16* row, float* own, Width width) {
  const int64_t lanes = width;
  WKV_SIMD
  for (int64_t c = 0; c < lanes; ++c) own[c] = wkv::widen(row[c]);
  return own;
}

// The row to write LANES results to: the output itself, or `own`, from which store_row narrows them to bfloat16.
template <typename T>
WKV_INLINE T* output_row(T* row, T*) {
  return row;
}
WKV_INLINE float* output_row(bfloat16*, float* own) { return own; }
template <typename T, typename Width>
WKV_INLINE void store_row(const T*, T*, Width) {}
template <typename Width>
WKV_INLINE void store_row(const float* own, bfloat16* row, Width width) {
  const int64_t lanes = width;
  WKV_SIMD
  for (int64_t c = 0; c < lanes; ++c) row[c] = wkv::narrow<bfloat16>(own[c]);
}

// How one call is divided. A task is a block of channels in one chunk of one sequence.
struct Plan {
  int64_t batch, steps, channels, tile, tiles, blocks, chunks, chunk_steps;

  Plan(const Tensor& key, int64_t tile_steps)
      : batch(key.size(0)), steps(key.size(1)), channels(key.size(2)), tile(tile_steps) {
    STD_TORCH_CHECK(steps >= 1 && channels >= 1, "wkv4: key has ", steps, " steps and ", channels, " channels");
    STD_TORCH_CHECK(tile >= 1 && tile <= LONGEST_TILE, "wkv4: tile must be 1 to ", LONGEST_TILE, ", not ", tile);
    blocks = (channels + LANES - 1) / LANES;
    tiles = (steps + tile - 1) / tile;
    const int64_t threads = torch::stable::get_num_threads();
    // Chunks walk time nearly twice, so two chunks on two threads gain little, and three on three gain some.
    const int64_t wanted = threads / std::max<int64_t>(batch * blocks, 1);
    chunks = wanted < 3 ? 1 : std::max<int64_t>(1, std::min(wanted, steps / SHORTEST_CHUNK));
    chunk_steps = ((steps + chunks - 1) / chunks + tile - 1) / tile * tile;
    chunks = (steps + chunk_steps - 1) / chunk_steps;
  }

  int64_t start(int64_t chunk) const { return chunk * chunk_steps; }
  int64_t end(int64_t chunk) const { return std::min(steps, start(chunk) + chunk_steps); }

  // Calls f(sequence, chunk, first channel, width) for every task. In all blocks except the last, the width is a
  // compile-time constant, so loops over it have no remainder.
  template <typename F>
  void parallel(const F& f) const {
    const int64_t grain = std::max<int64_t>(1, LEAST_KEYS / (LANES * std::min(steps, chunk_steps)));
    torch::stable::parallel_for(0, batch * chunks * blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t block = task % blocks, chunk = task / blocks % chunks, sequence = task / blocks / chunks;
        const int64_t channel = block * LANES, width = std::min(LANES, channels - channel);
        if (width == LANES) {
          f(sequence, chunk, channel, std::integral_constant<int64_t, LANES>());
        } else {
          f(sequence, chunk, channel, width);
        }
      }
    });
  }
};

template <typename T>
struct Lanes {
  alignas(64) T num[LANES], den[LANES], key[LANES], age[LANES];

  wkv::State<T> get(int64_t c) const { return {num[c], den[c], key[c], age[c]}; }
  void set(int64_t c, wkv::State<T> s) { num[c] = s.num, den[c] = s.den, key[c] = s.key, age[c] = s.age; }
};

// A saved state of a block of channels: rows num, den, key and age, of C numbers each.
template <typename T>
struct Saved {
  T* p;
  int64_t channels;

  wkv::State<T> get(int64_t c) const { return {p[c], p[channels + c], p[2 * channels + c], p[3 * channels + c]}; }
  void set(int64_t c, wkv::State<T> s) const {
    p[c] = s.num, p[channels + c] = s.den, p[2 * channels + c] = s.key, p[3 * channels + c] = s.age;
  }
};

// The arguments of one call. T is the type of the arithmetic, IO that of keys, values and outputs. tiles is
// (B, tiles + 1, 4, C): the state before each tile, and the one after the last step.
template <typename T, typename IO>
struct Arguments {
  Plan plan;
  const T *time_decay, *time_first;
  const IO *key, *value;
  T* tiles;

  template <typename P>
  Rows<P> rows(P* p, int64_t sequence, int64_t channel) const {
    return {p + sequence * plan.steps * plan.channels + channel, plan.channels};
  }
  // The state before step t, which is a multiple of plan.tile or the number of steps.
  Saved<T> saved(int64_t sequence, int64_t t, int64_t channel) const {
    const int64_t tile = (t + plan.tile - 1) / plan.tile;
    return {tiles + ((sequence * (plan.tiles + 1) + tile) * 4) * plan.channels + channel, plan.channels};
  }
};

template <typename T, typename IO>
void forward(const Arguments<T, IO>& a, const T* state, IO* output, T* new_state) {
  const Plan& plan = a.plan;
  const int64_t C = plan.channels;

  // The state at the start of the first chunk, and the summary of every chunk except the last.
  plan.parallel([&](int64_t b, int64_t chunk, int64_t c0, auto width) {
    const int64_t lanes = width;
    if (chunk == 0) {
      const T* s = state ? state + b * 3 * C + c0 : nullptr;
      const Saved<T> to = a.saved(b, 0, c0);
      for (int64_t c = 0; c < lanes; ++c) {
        to.set(c, s ? wkv::State<T>{s[c], s[C + c], s[2 * C + c], T(0)} : wkv::empty_state<T>());
      }
    }
    if (chunk == plan.chunks - 1) return;
    T w[LANES];
    Lanes<T> s;
    for (int64_t c = 0; c < lanes; ++c) w[c] = wkv::decay(a.time_decay[c0 + c]);
    for (int64_t c = 0; c < lanes; ++c) s.set(c, wkv::empty_state<T>());
    const Rows<const IO> key = a.rows(a.key, b, c0), value = a.rows(a.value, b, c0);
    alignas(64) T own_k[LANES], own_v[LANES];
    for (int64_t t = plan.start(chunk); t < plan.end(chunk); ++t) {
      const T *k = load_row(key[t], own_k, width), *v = load_row(value[t], own_v, width);
      WKV_SIMD
      for (int64_t c = 0; c < lanes; ++c) s.set(c, wkv::update(s.get(c), w[c], k[c], v[c]).state);
    }
    const Saved<T> to = a.saved(b, plan.end(chunk), c0);
    for (int64_t c = 0; c < lanes; ++c) to.set(c, s.get(c));
  });

  for (int64_t b = 0; b < plan.batch; ++b) {
    for (int64_t chunk = 0; chunk + 1 < plan.chunks; ++chunk) {
      const Saved<T> earlier = a.saved(b, plan.start(chunk), 0), later = a.saved(b, plan.end(chunk), 0);
      const T steps = T(plan.end(chunk) - plan.start(chunk));
      for (int64_t c = 0; c < C; ++c) {
        later.set(c, wkv::combine(earlier.get(c), later.get(c), wkv::decay(a.time_decay[c]), steps));
      }
    }
  }

  plan.parallel([&](int64_t b, int64_t chunk, int64_t c0, auto width) {
    const int64_t lanes = width;
    T w[LANES], u[LANES];
    Lanes<T> s;
    const Saved<T> from = a.saved(b, plan.start(chunk), c0);
    for (int64_t c = 0; c < lanes; ++c) {
      w[c] = wkv::decay(a.time_decay[c0 + c]);
      u[c] = a.time_first[c0 + c];
      s.set(c, from.get(c));
    }
    const Rows<const IO> key = a.rows(a.key, b, c0), value = a.rows(a.value, b, c0);
    const Rows<IO> out = a.rows(output, b, c0);
    alignas(64) T own_k[LANES], own_v[LANES], own_y[LANES];
    for (int64_t t = plan.start(chunk); t < plan.end(chunk); ++t) {
      if (t % plan.tile == 0 && t != plan.start(chunk)) {
        const Saved<T> to = a.saved(b, t, c0);
        for (int64_t c = 0; c < lanes; ++c) to.set(c, s.get(c));
      }
      const T *k = load_row(key[t], own_k, width), *v = load_row(value[t], own_v, width);
      T* y = output_row(out[t], own_y);
      WKV_SIMD
      for (int64_t c = 0; c < lanes; ++c) {
        const wkv::State<T> before = s.get(c);
        y[c] = wkv::output(before, w[c], u[c], k[c], v[c]).value;
        s.set(c, wkv::update(before, w[c], k[c], v[c]).state);
      }
      store_row(y, out[t], width);
    }
    if (chunk == plan.chunks - 1) {
      const Saved<T> to = a.saved(b, plan.steps, c0);
      T* ns = new_state + b * 3 * C + c0;
      for (int64_t c = 0; c < lanes; ++c) {
        const wkv::State<T> last = s.get(c);
        const wkv::Folded<T> f = wkv::fold(last, w[c]);
        to.set(c, last);
        ns[c] = f.scale * last.num, ns[C + c] = f.scale * last.den, ns[2 * C + c] = f.max_exp;
      }
    }
  });
}

// The gradient of the output, and the results of the backward pass. sums is (B, chunks, 2, C): each task's gradients of
// u and w.
template <typename T, typename IO>
struct Gradients {
  const IO* output;
  IO *key, *value;
  T* sums;
};

// Walks back through one chunk, from the adjoint of the state after it (num and den of LANES channels) to that of the
// state before it. WRITE: also writes the gradients.
template <bool WRITE, typename T, typename IO, typename Width>
void backward_chunk(const Arguments<T, IO>& a, const Gradients<T, IO>& g, int64_t b, int64_t chunk, int64_t c0,
                    Width width, T* adjoint_num, T* adjoint_den) {
  const int64_t lanes = width;
  const Plan& plan = a.plan;
  // The results of walking forward through a tile: 7 arrays that stay in the L1 cache, and the values if they are
  // widened.
  using Tile = T[LONGEST_TILE][LANES];
  alignas(64) T own_k[LANES], own_g[LANES], own_gk[LANES], own_gv[LANES];
  alignas(64) Tile own_v;
  alignas(64) Tile num, den, earlier, later, pull_earlier, pull_later, out;
  alignas(64) T w[LANES], u[LANES], sum_u[LANES], sum_w[LANES];
  Lanes<T> s;
  for (int64_t c = 0; c < lanes; ++c) {
    w[c] = wkv::decay(a.time_decay[c0 + c]);
    u[c] = a.time_first[c0 + c];
    sum_u[c] = sum_w[c] = T(0);
  }
  const Rows<const IO> key = a.rows(a.key, b, c0), value = a.rows(a.value, b, c0), grad = a.rows(g.output, b, c0);
  const Rows<IO> grad_key = a.rows(g.key, b, c0), grad_value = a.rows(g.value, b, c0);

  const int64_t begin = plan.start(chunk), end = plan.end(chunk);
  for (int64_t t0 = begin + (end - begin - 1) / plan.tile * plan.tile; t0 >= begin; t0 -= plan.tile) {
    const int64_t length = std::min(plan.tile, end - t0);
    const Saved<T> from = a.saved(b, t0, c0);
    for (int64_t c = 0; c < lanes; ++c) s.set(c, from.get(c));
    for (int64_t i = 0; i < length; ++i) {
      const T *k = load_row(key[t0 + i], own_k, width), *v = load_row(value[t0 + i], own_v[i], width);
      const T* gy = load_row(grad[t0 + i], own_g, width);
      WKV_SIMD
      for (int64_t c = 0; c < lanes; ++c) {
        const wkv::State<T> before = s.get(c);
        const wkv::Output<T> o = wkv::output(before, w[c], u[c], k[c], v[c]);
        const wkv::Update<T> next = wkv::update(before, w[c], k[c], v[c]);
        const T h = gy[c] * o.inverse;
        num[i][c] = before.num, den[i][c] = before.den;
        earlier[i][c] = next.factor.earlier, later[i][c] = next.factor.later;
        pull_earlier[i][c] = h * o.factor.earlier, pull_later[i][c] = h * o.factor.later;
        out[i][c] = o.value;
        s.set(c, next.state);
      }
    }
    for (int64_t i = length - 1; i >= 0; --i) {
      const T* v = std::is_same_v<T, IO> ? load_row(value[t0 + i], own_v[i], width) : own_v[i];
      T *gk = WRITE ? output_row(grad_key[t0 + i], own_gk) : nullptr;
      T *gv = WRITE ? output_row(grad_value[t0 + i], own_gv) : nullptr;
      WKV_SIMD
      for (int64_t c = 0; c < lanes; ++c) {
        wkv::Adjoint<T> adjoint = {adjoint_num[c], adjoint_den[c]};
        const wkv::StepGradient<T> step =
            wkv::step_back(adjoint, num[i][c], den[i][c], wkv::Factors<T>{earlier[i][c], later[i][c]},
                           pull_earlier[i][c], pull_later[i][c], v[c], out[i][c]);
        adjoint_num[c] = adjoint.num, adjoint_den[c] = adjoint.den;
        if (WRITE) {
          gk[c] = step.key, gv[c] = step.value;
          sum_u[c] += step.u, sum_w[c] += step.w;
        }
      }
      if (WRITE) store_row(gk, grad_key[t0 + i], width), store_row(gv, grad_value[t0 + i], width);
    }
  }
  if (WRITE) {
    T* sums = g.sums + ((b * plan.chunks + chunk) * 2) * plan.channels + c0;
    for (int64_t c = 0; c < lanes; ++c) sums[c] = sum_u[c], sums[plan.channels + c] = sum_w[c];
  }
}

template <typename T, typename IO>
void backward(const Arguments<T, IO>& a, const Gradients<T, IO>& g, const T* grad_new_state, T* grad_time_decay,
              T* grad_time_first, T* grad_state) {
  const Plan& plan = a.plan;
  const int64_t C = plan.channels;

  // The adjoints of the state after each chunk, (B, chunks, 2, C); after the last one, the gradient of the new state.
  std::vector<T> adjoints(plan.batch * plan.chunks * 2 * C);
  const auto adjoint = [&](int64_t b, int64_t chunk) { return adjoints.data() + (b * plan.chunks + chunk) * 2 * C; };

  plan.parallel([&](int64_t b, int64_t chunk, int64_t c0, auto width) {
    const int64_t lanes = width;
    if (chunk == plan.chunks - 1) {
      const Saved<T> last = a.saved(b, plan.steps, c0);
      const T* gs = grad_new_state ? grad_new_state + b * 3 * C + c0 : nullptr;
      T* to = adjoint(b, chunk) + c0;
      for (int64_t c = 0; gs && c < lanes; ++c) {
        const T scale = wkv::fold(last.get(c), wkv::decay(a.time_decay[c0 + c])).scale;
        to[c] = scale * gs[c], to[C + c] = scale * gs[C + c];
      }
    }
    if (chunk == 0) return;
    alignas(64) T num[LANES] = {}, den[LANES] = {};
    backward_chunk<false>(a, g, b, chunk, c0, width, num, den);
    T* to = adjoint(b, chunk - 1) + c0;
    for (int64_t c = 0; c < lanes; ++c) to[c] = num[c], to[C + c] = den[c];
  });

  for (int64_t b = 0; b < plan.batch; ++b) {
    for (int64_t chunk = plan.chunks - 1; chunk > 0; --chunk) {
      const Saved<T> before = a.saved(b, plan.start(chunk), 0), after = a.saved(b, plan.end(chunk), 0);
      const T steps = T(plan.end(chunk) - plan.start(chunk));
      const T* from = adjoint(b, chunk);
      T* to = adjoint(b, chunk - 1);
      for (int64_t c = 0; c < C; ++c) {
        const T lead = wkv::lead_of(before.get(c), after.get(c), wkv::decay(a.time_decay[c]), steps);
        const T factor = wkv::exp_negative(-lead);
        to[c] += factor * from[c], to[C + c] += factor * from[C + c];
      }
    }
  }

  plan.parallel([&](int64_t b, int64_t chunk, int64_t c0, auto width) {
    const int64_t lanes = width;
    alignas(64) T num[LANES], den[LANES];
    const T* from = adjoint(b, chunk) + c0;
    for (int64_t c = 0; c < lanes; ++c) num[c] = from[c], den[c] = from[C + c];
    backward_chunk<true>(a, g, b, chunk, c0, width, num, den);
    if (chunk == 0) {
      const Saved<T> first = a.saved(b, 0, c0);
      T* gs = grad_state + b * 3 * C + c0;
      for (int64_t c = 0; c < lanes; ++c) {
        const wkv::State<T> s = first.get(c);
        gs[c] = num[c], gs[C + c] = den[c], gs[2 * C + c] = s.num * num[c] + s.den * den[c];
      }
    }
  });

  for (int64_t c = 0; c < C; ++c) grad_time_first[c] = grad_time_decay[c] = T(0);
  for (int64_t i = 0; i < plan.batch * plan.chunks; ++i) {
    const T* sums = g.sums + i * 2 * C;
    for (int64_t c = 0; c < C; ++c) grad_time_first[c] += sums[c], grad_time_decay[c] += sums[C + c];
  }
  for (int64_t c = 0; c < C; ++c) grad_time_decay[c] *= wkv::decay(a.time_decay[c]);
}

using torch::headeronly::ScalarType;

ScalarType arithmetic_type(const Tensor& key) {
  return key.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Raises unless the arguments of both operators go with key.
void expect_all(const Plan& plan, const Tensor& decay, const Tensor& first, const Tensor& key, const Tensor& value) {
  wkv::expect("wkv4: time_decay", decay, {plan.channels}, arithmetic_type(key));
  wkv::expect("wkv4: time_first", first, {plan.channels}, arithmetic_type(key));
  wkv::expect("wkv4: value", value, {plan.batch, plan.steps, plan.channels}, key.scalar_type());
}

// Calls f(a zero of the arithmetic's type, a zero of key's type).
template <typename F>
void dispatch_types(const Tensor& key, const F& f) {
  const ScalarType type = key.scalar_type();
  if (type == ScalarType::Double) return f(0.0, 0.0);
  if (type == ScalarType::BFloat16) return f(0.0f, bfloat16());
  f(0.0f, 0.0f);
}

std::tuple<Tensor, Tensor, Tensor> wkv4_forward(const Tensor& time_decay, const Tensor& time_first, const Tensor& key,
                                                const Tensor& value, const std::optional<Tensor>& state,
                                                int64_t tile) {
  using torch::stable::new_empty;
  const Plan plan(key, tile);
  expect_all(plan, time_decay, time_first, key, value);
  wkv::expect("wkv4: state", state, {plan.batch, 3, plan.channels}, arithmetic_type(key));
  const Tensor decay = contiguous(time_decay), first = contiguous(time_first), k = contiguous(key),
               v = contiguous(value);
  const std::optional<Tensor> s = contiguous(state);
  const Tensor output = new_empty(key, {plan.batch, plan.steps, plan.channels});
  const Tensor new_state = new_empty(decay, {plan.batch, 3, plan.channels});
  const Tensor tiles = new_empty(decay, {plan.batch, plan.tiles + 1, 4, plan.channels});
  dispatch_types(key, [&](auto zero, auto io_zero) {
    using T = decltype(zero);
    using IO = decltype(io_zero);
    forward<T, IO>({plan, data<T>(decay), data<T>(first), data<IO>(k), data<IO>(v), data<T>(tiles)}, data<T>(s),
                   data<IO>(output), data<T>(new_state));
  });
  return {output, new_state, tiles};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> wkv4_backward(const Tensor& time_decay, const Tensor& time_first,
                                                                 const Tensor& key, const Tensor& value,
                                                                 const Tensor& tiles, const Tensor& grad_output,
                                                                 const std::optional<Tensor>& grad_new_state,
                                                                 int64_t tile) {
  using torch::stable::new_empty;
  const Plan plan(key, tile);
  expect_all(plan, time_decay, time_first, key, value);
  wkv::expect("wkv4: tiles", tiles, {plan.batch, plan.tiles + 1, 4, plan.channels}, arithmetic_type(key));
  wkv::expect("wkv4: grad_output", grad_output, {plan.batch, plan.steps, plan.channels}, key.scalar_type());
  wkv::expect("wkv4: grad_new_state", grad_new_state, {plan.batch, 3, plan.channels}, arithmetic_type(key));
  const Tensor decay = contiguous(time_decay), first = contiguous(time_first), k = contiguous(key),
               v = contiguous(value), saved = contiguous(tiles),
               gy = contiguous(grad_output);
  const std::optional<Tensor> gs = contiguous(grad_new_state);
  const Tensor grad_decay = new_empty(decay, {plan.channels}), grad_first = new_empty(decay, {plan.channels});
  const Tensor grad_key = new_empty(key, {plan.batch, plan.steps, plan.channels});
  const Tensor grad_value = new_empty(key, {plan.batch, plan.steps, plan.channels});
  const Tensor grad_state = new_empty(decay, {plan.batch, 3, plan.channels});
  const Tensor sums = new_empty(decay, {plan.batch, plan.chunks, 2, plan.channels});
  dispatch_types(key, [&](auto zero, auto io_zero) {
    using T = decltype(zero);
    using IO = decltype(io_zero);
    backward<T, IO>({plan, data<T>(decay), data<T>(first), data<IO>(k), data<IO>(v), data<T>(saved)},
                    {data<IO>(gy), data<IO>(grad_key), data<IO>(grad_value), data<T>(sums)}, data<T>(gs),
                    data<T>(grad_decay), data<T>(grad_first), data<T>(grad_state));
  });
  return {grad_decay, grad_first, grad_key, grad_value, grad_state};
}

}  // namespace

// state is (B, 3, C), or None for the empty state. All tensors have one dtype, float32 or float64; or key, value,
// output and their gradients are bfloat16, on a GPU also float16, and everything else is float32. tiles (B, ceil(T /
// tile) + 1, 4, C) is only for the backward pass: the states before each tile and after the last step. tile is an
// argument, not a constant, so that a graph in torch.compile's disk cache contains the value that its shapes need.
STABLE_TORCH_LIBRARY_FRAGMENT(rwkv_pl, m) {
  m.def("wkv4_forward(Tensor time_decay, Tensor time_first, Tensor key, Tensor value, Tensor? state, int tile)"
        " -> (Tensor output, Tensor state, Tensor tiles)");
  m.def("wkv4_backward(Tensor time_decay, Tensor time_first, Tensor key, Tensor value, Tensor tiles,"
        " Tensor grad_output, Tensor? grad_new_state, int tile)"
        " -> (Tensor grad_time_decay, Tensor grad_time_first, Tensor grad_key, Tensor grad_value, Tensor grad_state)");
}

STABLE_TORCH_LIBRARY_IMPL(rwkv_pl, CPU, m) {
  m.impl("wkv4_forward", WKV_BOX(wkv4_forward));
  m.impl("wkv4_backward", WKV_BOX(wkv4_backward));
}
