// WKV-7 on a CPU: the operator's schema, for every device, and its CPU kernels.
//
// Letters: B sequences, T steps, H heads of N = 64 channels. Rows i of a head's state S are values, columns j are keys.
//
//   S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T        y_t = S_t r_t
//
// Rows of S do not depend on each other, so a task is V rows of one head for all steps: 64, or fewer if there are fewer
// heads than threads. Sums over j use S transposed, S[j][i], so that neighbouring rows are lanes and no sum crosses
// lanes. Sums over i use S[i][j], where columns are lanes.
//
//   forward    one pass over S a step gives y_t and S_t a_{t+1}. Saved for the backward pass: S before every `stretch`
//              steps, and S a of each step.
//   backward   from the last stretch to the first. G is the adjoint of S.
//              1. S at the start of each tile of the stretch, from the saved one
//              2. per tile, from the last: G transposed, one pass a step as in the forward pass; it gives g_v and g_sa
//              3. per tile: four rows of S and G at a time, S of each step again, then back through them
//
// S is never divided by the decay to go back in time: 16 steps of decay 0.545 would amplify rounding 16,000 times.
//
// rwkv_pl.ops.build builds this file with the LibTorch stable ABI.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <type_traits>

#include "cpu_lanes.h"
#include "cpu_numbers.h"
#include "tensor.h"
#include "wkv7_math.h"

namespace {

using torch::stable::Tensor;
using wkv::bfloat16;
using wkv::contiguous;
using wkv::data;
using wkv::multiply_add;
using wkv7::Decay;
using wkv7::decay;
using wkv7::N;

// The largest number of steps between two saved states, and the steps of a tile, whose data fit the L1 cache.
constexpr int64_t LONGEST_STRETCH = 64, TILE = 8;
// Rows of S that go back through a tile together.
constexpr int64_t ROWS = 4;
// Rows of the transposed S that `walk` handles at a time: four vectors.
#if defined(__AVX512F__)
constexpr int64_t VECTOR_BYTES = 64;
#else
constexpr int64_t VECTOR_BYTES = 32;
#endif
template <typename T>
constexpr int64_t REGISTER_LANES = 4 * VECTOR_BYTES / int64_t(sizeof(T));

WKV_INLINE double widen(double x) { return x; }
template <typename IO>
WKV_INLINE float widen(IO x) {
  return wkv::widen(x);
}
template <typename IO, typename T>
WKV_INLINE IO narrow(T x) {
  if constexpr (std::is_same_v<IO, T>) {
    return x;
  } else {
    return wkv::narrow<IO>(x);
  }
}

template <typename IO, typename T>
WKV_INLINE void read(const IO* from, T* to, int64_t n = N) {
  WKV_SIMD
  for (int64_t c = 0; c < n; ++c) to[c] = widen(from[c]);
}

template <typename X>
WKV_INLINE void prefetch(const X* row) {
  for (int64_t byte = 0; byte < int64_t(N * sizeof(X)); byte += 64) {
    WKV_PREFETCH(reinterpret_cast<const char*>(row) + byte);
  }
}

// The arguments of one call. IO is the dtype of everything (B, T, H, N) but w, and T that of the arithmetic and of w.
// states (B, H, stretches, N, N) has the state before each stretch, and sa (B, T, H, N) the product S_{t-1} a_t. Both
// are only for the backward pass.
template <typename T, typename IO>
struct Arguments {
  int64_t batch, steps, heads, stretch, stretches;
  const IO* r;
  const T* w;
  const IO *k, *v, *a, *b;
  T *states, *sa;

  int64_t at(int64_t sequence, int64_t t, int64_t head) const { return ((sequence * steps + t) * heads + head) * N; }
  int64_t stride() const { return heads * N; }
  T* saved(int64_t sequence, int64_t head, int64_t t) const {
    return states + ((sequence * heads + head) * stretches + t / stretch) * N * N;
  }
  void prefetch_all(int64_t at) const {
    for (const IO* x : {r, k, v, a, b}) prefetch(x + at);
    prefetch(w + at);
  }

  // Calls f(sequence, head, first row) for every task of V rows.
  template <int64_t V, typename F>
  void parallel(const F& f) const {
    constexpr int64_t blocks = N / V;
    torch::stable::parallel_for(0, batch * heads * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) f(task / blocks / heads, task / blocks % heads, task % blocks * V);
    });
  }
};

// Steps that are prefetched in advance.
constexpr int64_t AHEAD = 8;

// x_j <- x_j w_j + p a_j + q b_j for the columns j of a transposed matrix x (N, V), and the sums over j of the new x_j
// c_j and x_j d_j. So many rows at a time that p, q and the sums stay in registers.
template <int64_t V, typename T>
WKV_NOINLINE void walk(T (*__restrict x)[V], const T* __restrict p, const T* __restrict q, const T* __restrict w,
                       const T* __restrict a, const T* __restrict b, const T* __restrict c, const T* __restrict d,
                       T* __restrict sum_c, T* __restrict sum_d) {
  constexpr int64_t LANES = V < REGISTER_LANES<T> ? V : REGISTER_LANES<T>;
  for (int64_t first = 0; first < V; first += LANES) {
    T pi[LANES], qi[LANES], ci[LANES] = {}, di[LANES] = {};
    std::copy(p + first, p + first + LANES, pi), std::copy(q + first, q + first + LANES, qi);
    for (int64_t j = 0; j < N; ++j) {
      T* const xi = x[j] + first;
      const T wj = w[j], aj = a[j], bj = b[j], cj = c[j], dj = d[j];
      WKV_SIMD
      for (int64_t i = 0; i < LANES; ++i) {
        xi[i] = multiply_add(xi[i], wj, multiply_add(pi[i], aj, qi[i] * bj));
        ci[i] = multiply_add(xi[i], cj, ci[i]), di[i] = multiply_add(xi[i], dj, di[i]);
      }
    }
    std::copy(ci, ci + LANES, sum_c + first), std::copy(di, di + LANES, sum_d + first);
  }
}

// V rows of a matrix of N columns <-> the transposed matrix.
template <int64_t V, typename T>
WKV_NOINLINE void read_transposed(const T* __restrict rows, T (*__restrict x)[V]) {
  for (int64_t j = 0; j < N; ++j)
    for (int64_t i = 0; i < V; ++i) x[j][i] = rows[i * N + j];
}
template <int64_t V, typename T>
WKV_NOINLINE void write_transposed(const T (*__restrict x)[V], T* __restrict rows) {
  for (int64_t i = 0; i < V; ++i)
    for (int64_t j = 0; j < N; ++j) rows[i * N + j] = x[j][i];
}

template <int64_t V, typename T, typename IO>
void forward(const Arguments<T, IO>& m, const T* state, IO* output, T* new_state) {
  m.template parallel<V>([&](int64_t sequence, int64_t head, int64_t row) {
    alignas(64) T S[N][V];
    alignas(64) T r[N], w[N], k[N], b[N], next_a[N], v[V], sa[V], y[V], next_sa[V];
    const int64_t first = ((sequence * m.heads + head) * N + row) * N;
    int64_t at = m.at(sequence, 0, head);
    std::fill(sa, sa + V, T(0));
    if (state) {
      read_transposed<V>(state + first, S);
      read(m.a + at, next_a);
      for (int64_t j = 0; j < N; ++j)
        for (int64_t i = 0; i < V; ++i) sa[i] = multiply_add(S[j][i], next_a[j], sa[i]);
    } else {
      std::fill(S[0], S[0] + N * V, T(0));
    }
    for (int64_t t = 0; t < m.steps; ++t, at += m.stride()) {
      if (m.stretch && t % m.stretch == 0) write_transposed<V>(S, m.saved(sequence, head, t) + row * N);
      m.prefetch_all(at + AHEAD * m.stride());
      WKV_SIMD
      for (int64_t c = 0; c < N; ++c) w[c] = decay(m.w[at + c]).value;
      read(m.r + at, r), read(m.k + at, k), read(m.b + at, b), read(m.v + at + row, v, V);
      // After the last step, the product with a is not used.
      read(m.a + (t + 1 < m.steps ? at + m.stride() : at), next_a);
      walk<V>(S, sa, v, w, b, k, r, next_a, y, next_sa);
      WKV_SIMD
      for (int64_t i = 0; i < V; ++i) output[at + row + i] = narrow<IO>(y[i]);
      if (m.stretch) std::copy(sa, sa + V, m.sa + at + row);
      std::copy(next_sa, next_sa + V, sa);
    }
    write_transposed<V>(S, new_state + first);
  });
}

// The inputs (gradients of output and of the new state, which may be null) and results of the backward pass.
template <typename T, typename IO>
struct Gradients {
  const IO* output;
  const T* new_state;
  IO* r;
  T* w;
  IO *k, *v, *a, *b;
  T* state;
};

// The inputs of a step, and its gradients, in float32 or float64. What a step needs is adjacent in memory: with an array
// for each of these over all steps, they would compete for the same sets of the L1 cache, and take twice the time.
template <typename T>
struct Step {
  alignas(64) T r[N], w[N], a[N], sa[N], v[N], g_y[N], k[N], b[N], slope[N];
};
template <typename T>
struct StepGradients {
  alignas(64) T r[N], w[N], k[N], a[N], b[N], sa[N], v[N];
};

// The steps of a stretch, the gradients of one of its tiles, and S at the start of each tile.
template <typename T>
struct Stretch {
  Step<T> steps[LONGEST_STRETCH];
  StepGradients<T> gradients[TILE];
  alignas(64) T starts[LONGEST_STRETCH / TILE][N][N];
};

// Four rows of S forward through these steps. KEPT: the state after each step follows the one before it in S; otherwise
// it replaces the one before.
template <bool KEPT, typename T>
WKV_NOINLINE void walk_rows(const Step<T>* steps, int64_t length, int64_t row, T (*__restrict S)[ROWS][N]) {
  for (int64_t t = 0; t < length; ++t) {
    const Step<T>& x = steps[t];
    const T *sa = x.sa + row, *v = x.v + row;
    T* const from = S[KEPT ? t : 0][0];
    T* const to = S[KEPT ? t + 1 : 0][0];
    const T sa0 = sa[0], sa1 = sa[1], sa2 = sa[2], sa3 = sa[3], v0 = v[0], v1 = v[1], v2 = v[2], v3 = v[3];
    WKV_SIMD
    for (int64_t j = 0; j < N; ++j) {
      const T w = x.w[j], k = x.k[j], b = x.b[j];
      to[j] = multiply_add(from[j], w, multiply_add(sa0, b, v0 * k));
      to[j + N] = multiply_add(from[j + N], w, multiply_add(sa1, b, v1 * k));
      to[j + 2 * N] = multiply_add(from[j + 2 * N], w, multiply_add(sa2, b, v2 * k));
      to[j + 3 * N] = multiply_add(from[j + 3 * N], w, multiply_add(sa3, b, v3 * k));
    }
  }
}

// Back through these steps, with the same rows of G. Their terms are added to the gradients.
template <typename T>
WKV_NOINLINE void walk_rows_back(const Step<T>* steps, StepGradients<T>* gradients, int64_t length, int64_t row,
                                 const T (*__restrict S)[ROWS][N], T* __restrict G) {
  for (int64_t t = length - 1; t >= 0; --t) {
    const Step<T>& x = steps[t];
    StepGradients<T>& g = gradients[t];
    const T *sa = x.sa + row, *v = x.v + row, *gy = x.g_y + row, *gsa = g.sa + row;
    const T *before = S[t][0], *after = S[t + 1][0];
    const T sa0 = sa[0], sa1 = sa[1], sa2 = sa[2], sa3 = sa[3], v0 = v[0], v1 = v[1], v2 = v[2], v3 = v[3];
    const T y0 = gy[0], y1 = gy[1], y2 = gy[2], y3 = gy[3], q0 = gsa[0], q1 = gsa[1], q2 = gsa[2], q3 = gsa[3];
    WKV_SIMD
    for (int64_t j = 0; j < N; ++j) {
      const T r = x.r[j], w = x.w[j], a = x.a[j];
      const T G0 = multiply_add(y0, r, G[j]), G1 = multiply_add(y1, r, G[j + N]);
      const T G2 = multiply_add(y2, r, G[j + 2 * N]), G3 = multiply_add(y3, r, G[j + 3 * N]);
      const T S0 = before[j], S1 = before[j + N], S2 = before[j + 2 * N], S3 = before[j + 3 * N];
      T sum = multiply_add(y2, after[j + 2 * N], multiply_add(y3, after[j + 3 * N], g.r[j]));
      g.r[j] = multiply_add(y0, after[j], multiply_add(y1, after[j + N], sum));
      g.k[j] = multiply_add(v0, G0, multiply_add(v1, G1, multiply_add(v2, G2, multiply_add(v3, G3, g.k[j]))));
      g.b[j] = multiply_add(sa0, G0, multiply_add(sa1, G1, multiply_add(sa2, G2, multiply_add(sa3, G3, g.b[j]))));
      g.w[j] = multiply_add(S0, G0, multiply_add(S1, G1, multiply_add(S2, G2, multiply_add(S3, G3, g.w[j]))));
      g.a[j] = multiply_add(q0, S0, multiply_add(q1, S1, multiply_add(q2, S2, multiply_add(q3, S3, g.a[j]))));
      G[j] = multiply_add(G0, w, q0 * a), G[j + N] = multiply_add(G1, w, q1 * a);
      G[j + 2 * N] = multiply_add(G2, w, q2 * a), G[j + 3 * N] = multiply_add(G3, w, q3 * a);
    }
  }
}

// The sums over rows of a task with fewer than N rows go to `shares` (N / V, 5, B, T, H, N), and are added at the end.
template <int64_t V, typename T, typename IO>
void backward(const Arguments<T, IO>& m, const Gradients<T, IO>& g, T* shares) {
  const int64_t size = m.batch * m.steps * m.heads * N;
  m.template parallel<V>([&](int64_t sequence, int64_t head, int64_t row) {
    alignas(64) T columns[N][V], G[V * N], S[TILE + 1][ROWS][N];
    // Of the step after the current one: its w, a and g_sa.
    alignas(64) T later_w[N], later_a[N] = {}, later_g_sa[V] = {};
    static thread_local Stretch<T> stretch;
    Step<T>* const steps = stretch.steps;
    StepGradients<T>* const gradients = stretch.gradients;
    std::fill(later_w, later_w + N, T(1));
    const int64_t first = ((sequence * m.heads + head) * N + row) * N;
    if (g.new_state) {
      std::copy(g.new_state + first, g.new_state + first + V * N, G);
    } else {
      std::fill(G, G + V * N, T(0));
    }
    read_transposed<V>(G, columns);
    for (int64_t begin = (m.steps - 1) / m.stretch * m.stretch; begin >= 0; begin -= m.stretch) {
      const int64_t n_steps = std::min(m.stretch, m.steps - begin);
      int64_t at = m.at(sequence, begin, head);
      for (int64_t t = 0; t < n_steps; ++t, at += m.stride()) {
        const int64_t ahead = at + AHEAD * m.stride();
        m.prefetch_all(ahead);
        prefetch(g.output + ahead), prefetch(m.sa + ahead);
        Step<T>& x = steps[t];
        WKV_SIMD
        for (int64_t c = 0; c < N; ++c) {
          const Decay<T> d = decay(m.w[at + c]);
          x.w[c] = d.value, x.slope[c] = d.slope;
        }
        read(m.r + at, x.r), read(m.k + at, x.k), read(m.a + at, x.a), read(m.b + at, x.b);
        read(m.v + at + row, x.v, V), read(g.output + at + row, x.g_y, V);
        std::copy(m.sa + at + row, m.sa + at + row + V, x.sa);
      }
      const T* saved = m.saved(sequence, head, begin) + row * N;
      for (int64_t i = 0; i < V; i += ROWS) {
        std::copy(saved + i * N, saved + (i + ROWS) * N, S[0][0]);
        std::copy(S[0][0], S[0][0] + ROWS * N, stretch.starts[0][i]);
        for (int64_t t0 = TILE; t0 < n_steps; t0 += TILE) {
          walk_rows<false>(steps + t0 - TILE, TILE, i, S);
          std::copy(S[0][0], S[0][0] + ROWS * N, stretch.starts[t0 / TILE][i]);
        }
      }

      for (int64_t t0 = (n_steps - 1) / TILE * TILE; t0 >= 0; t0 -= TILE) {
        const int64_t length = std::min(TILE, n_steps - t0);
        // A pass over G makes the second half of the step after t (times w, plus g_sa a) and the first half of step t
        // (plus g_y r).
        const T *w = later_w, *a = later_a, *g_sa = later_g_sa;
        for (int64_t t = length - 1; t >= 0; --t) {
          const Step<T>& x = steps[t0 + t];
          StepGradients<T>& to = gradients[t];
          for (T* sums : {to.r, to.w, to.k, to.a, to.b}) std::fill(sums, sums + N, T(0));
          walk<V>(columns, g_sa, x.g_y, w, a, x.r, x.k, x.b, to.v, to.sa);
          w = x.w, a = x.a, g_sa = to.sa;
        }
        std::copy(w, w + N, later_w), std::copy(a, a + N, later_a), std::copy(g_sa, g_sa + V, later_g_sa);

        for (int64_t i = 0; i < V; i += ROWS) {
          std::copy(stretch.starts[t0 / TILE][i], stretch.starts[t0 / TILE][i] + ROWS * N, S[0][0]);
          walk_rows<true>(steps + t0, length, i, S);
          walk_rows_back(steps + t0, gradients, length, i, S, G + i * N);
        }

        for (int64_t t = 0; t < length; ++t) {
          const StepGradients<T>& from = gradients[t];
          const int64_t to = m.at(sequence, begin + t0 + t, head);
          WKV_SIMD
          for (int64_t i = 0; i < V; ++i) g.v[to + row + i] = narrow<IO>(from.v[i]);
          if constexpr (V == N) {
            WKV_SIMD
            for (int64_t c = 0; c < N; ++c) {
              g.r[to + c] = narrow<IO>(from.r[c]), g.k[to + c] = narrow<IO>(from.k[c]);
              g.a[to + c] = narrow<IO>(from.a[c]), g.b[to + c] = narrow<IO>(from.b[c]);
              g.w[to + c] = steps[t0 + t].slope[c] * from.w[c];
            }
          } else {
            T* share = shares + row / V * 5 * size + to;
            for (const T* sums : {from.r, from.w, from.k, from.a, from.b}) {
              std::copy(sums, sums + N, share);
              share += size;
            }
          }
        }
      }
    }
    std::copy(G, G + V * N, g.state + first);
  });
  if constexpr (V != N) {
    torch::stable::parallel_for(0, m.batch * m.steps * m.heads, 64, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin * N; at < end * N; at += N) {
        WKV_SIMD
        for (int64_t c = at; c < at + N; ++c) {
          T sums[5] = {};
          for (int64_t block = 0; block < N / V; ++block)
            for (int64_t which = 0; which < 5; ++which) sums[which] += shares[(block * 5 + which) * size + c];
          g.r[c] = narrow<IO>(sums[0]), g.w[c] = decay(m.w[c]).slope * sums[1], g.k[c] = narrow<IO>(sums[2]);
          g.a[c] = narrow<IO>(sums[3]), g.b[c] = narrow<IO>(sums[4]);
        }
      }
    });
  }
}

// The rows of a task: 64, or fewer so that every thread has one.
int64_t choose_rows(int64_t batch, int64_t heads) {
  const int64_t threads = torch::stable::get_num_threads();
  return batch * heads >= threads ? 64 : 2 * batch * heads >= threads ? 32 : 16;
}

using torch::headeronly::ScalarType;

ScalarType arithmetic_type(const Tensor& key) {
  return key.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f(a zero of the arithmetic's dtype, a zero of key's dtype).
template <typename F>
void dispatch_types(const Tensor& key, const F& f) {
  switch (key.scalar_type()) {
    case ScalarType::Float: return f(0.0f, 0.0f);
    case ScalarType::Double: return f(0.0, 0.0);
    case ScalarType::BFloat16: return f(0.0f, bfloat16());
    default: STD_TORCH_CHECK(false, "wkv7: on a CPU key must be bfloat16, float32 or float64");
  }
}

template <typename F>
void dispatch_rows(int64_t rows, const F& f) {
  switch (rows) {
    case 64: return f(std::integral_constant<int64_t, 64>());
    case 32: return f(std::integral_constant<int64_t, 32>());
    default: return f(std::integral_constant<int64_t, 16>());
  }
}

// The arguments that forward and backward have in common, checked and contiguous.
struct Inputs {
  int64_t batch, steps, heads, stretch, stretches;
  Tensor r, w, k, v, a, b;

  Inputs(const Tensor& receptance, const Tensor& decay, const Tensor& key, const Tensor& value, const Tensor& a,
         const Tensor& b, int64_t stretch)
      : batch(key.dim() == 4 ? key.size(0) : 0), steps(key.dim() == 4 ? key.size(1) : 0),
        heads(key.dim() == 4 ? key.size(2) : 0), stretch(stretch),
        stretches(stretch > 0 ? (steps + stretch - 1) / stretch : 0), r(contiguous(receptance)), w(contiguous(decay)),
        k(contiguous(key)), v(contiguous(value)), a(contiguous(a)), b(contiguous(b)) {
    STD_TORCH_CHECK(steps > 0 && heads > 0 && key.size(3) == N, "wkv7: key must be (B, T, H, ", N,
                    ") with T and H at least 1");
    wkv::expect("wkv7: receptance", receptance, {batch, steps, heads, N}, key.scalar_type());
    wkv::expect("wkv7: decay", decay, {batch, steps, heads, N}, arithmetic_type(key));
    wkv::expect("wkv7: value", value, {batch, steps, heads, N}, key.scalar_type());
    wkv::expect("wkv7: a", a, {batch, steps, heads, N}, key.scalar_type());
    wkv::expect("wkv7: b", b, {batch, steps, heads, N}, key.scalar_type());
  }

  template <typename T, typename IO>
  Arguments<T, IO> arguments(const Tensor& states, const Tensor& sa) const {
    return {batch,       steps,       heads,       stretch,     stretches,       data<IO>(r), data<T>(w),
            data<IO>(k), data<IO>(v), data<IO>(a), data<IO>(b), data<T>(states), data<T>(sa)};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> wkv7_forward(const Tensor& receptance, const Tensor& decay,
                                                        const Tensor& key, const Tensor& value, const Tensor& a,
                                                        const Tensor& b, const std::optional<Tensor>& state,
                                                        int64_t stretch) {
  using torch::stable::new_empty;
  STD_TORCH_CHECK(stretch >= 0 && stretch <= LONGEST_STRETCH, "wkv7: stretch must be 0 to ", LONGEST_STRETCH, ", not ",
                  stretch);
  const Inputs x(receptance, decay, key, value, a, b, stretch);
  wkv::expect("wkv7: state", state, {x.batch, x.heads, N, N}, arithmetic_type(key));
  const std::optional<Tensor> s = contiguous(state);
  const Tensor output = new_empty(x.k, {x.batch, x.steps, x.heads, N});
  const Tensor new_state = new_empty(x.w, {x.batch, x.heads, N, N});
  const Tensor states = new_empty(x.w, {x.batch, x.heads, x.stretches, N, N});
  const Tensor sa = new_empty(x.w, {x.batch, stretch ? x.steps : 0, x.heads, N});
  dispatch_types(key, [&](auto zero, auto io_zero) {
    using T = decltype(zero);
    using IO = decltype(io_zero);
    dispatch_rows(choose_rows(x.batch, x.heads), [&](auto rows) {
      forward<decltype(rows)::value>(x.arguments<T, IO>(states, sa), data<T>(s), data<IO>(output), data<T>(new_state));
    });
  });
  return {output, new_state, states, sa};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> wkv7_backward(
    const Tensor& receptance, const Tensor& decay, const Tensor& key, const Tensor& value, const Tensor& a,
    const Tensor& b, const Tensor& states, const Tensor& sa, const Tensor& grad_output,
    const std::optional<Tensor>& grad_new_state, int64_t stretch) {
  using torch::stable::new_empty;
  STD_TORCH_CHECK(stretch >= 1 && stretch <= LONGEST_STRETCH, "wkv7: stretch must be 1 to ", LONGEST_STRETCH, ", not ",
                  stretch);
  const Inputs x(receptance, decay, key, value, a, b, stretch);
  const ScalarType wide = arithmetic_type(key);
  wkv::expect("wkv7: states", states, {x.batch, x.heads, x.stretches, N, N}, wide);
  wkv::expect("wkv7: sa", sa, {x.batch, x.steps, x.heads, N}, wide);
  wkv::expect("wkv7: grad_output", grad_output, {x.batch, x.steps, x.heads, N}, key.scalar_type());
  wkv::expect("wkv7: grad_new_state", grad_new_state, {x.batch, x.heads, N, N}, wide);
  const Tensor saved = contiguous(states), removed = contiguous(sa), gy = contiguous(grad_output);
  const std::optional<Tensor> gs = contiguous(grad_new_state);
  const auto like = [&](const Tensor& t) { return new_empty(t, {x.batch, x.steps, x.heads, N}); };
  const Tensor gr = like(x.k), gw = like(x.w), gk = like(x.k), gv = like(x.k), ga = like(x.k), gb = like(x.k);
  const Tensor grad_state = new_empty(x.w, {x.batch, x.heads, N, N});
  const int64_t rows = choose_rows(x.batch, x.heads);
  const Tensor shares = new_empty(x.w, {rows == N ? 0 : N / rows, 5, x.batch, x.steps, x.heads, N});
  dispatch_types(key, [&](auto zero, auto io_zero) {
    using T = decltype(zero);
    using IO = decltype(io_zero);
    const Gradients<T, IO> g = {data<IO>(gy), data<T>(gs),  data<IO>(gr), data<T>(gw),        data<IO>(gk),
                                data<IO>(gv), data<IO>(ga), data<IO>(gb), data<T>(grad_state)};
    dispatch_rows(rows, [&](auto lanes) {
      backward<decltype(lanes)::value>(x.arguments<T, IO>(saved, removed), g, data<T>(shares));
    });
  });
  return {gr, gw, gk, gv, ga, gb, grad_state};
}

}  // namespace

// All tensors are float32, or all are float64. Or receptance, key, value, a, b, output and their gradients are bfloat16
// (on a GPU also float16), and everything else is float32. The inputs are (B, T, H, 64); states (B, H, 64, 64) are
// values by keys. stretch: the steps between two saved states; 0 saves nothing, if there is no backward pass. states
// (B, H, ceil(T / stretch), 64, 64) and sa (B, T, H, 64) are only for the backward pass.
STABLE_TORCH_LIBRARY_FRAGMENT(rwkv_pl, m) {
  m.def("wkv7_forward(Tensor receptance, Tensor decay, Tensor key, Tensor value, Tensor a, Tensor b, Tensor? state,"
        " int stretch) -> (Tensor output, Tensor state, Tensor states, Tensor sa)");
  m.def("wkv7_backward(Tensor receptance, Tensor decay, Tensor key, Tensor value, Tensor a, Tensor b, Tensor states,"
        " Tensor sa, Tensor grad_output, Tensor? grad_new_state, int stretch)"
        " -> (Tensor grad_receptance, Tensor grad_decay, Tensor grad_key, Tensor grad_value, Tensor grad_a,"
        " Tensor grad_b, Tensor grad_state)");
}

STABLE_TORCH_LIBRARY_IMPL(rwkv_pl, CPU, m) {
  m.impl("wkv7_forward", WKV_BOX(wkv7_forward));
  m.impl("wkv7_backward", WKV_BOX(wkv7_backward));
}
