// The layers of RWKV-7 in a step of the recurrence on the CPU. rwkv_step.h has everything that versions share.
//
// Letters: N channels of a head, H = C / N heads. A function of low rank has two matrices, down (C, rank) and
// up (rank, C), which are transposed compared with those of the linear layers: a row is multiplied with one number.
//
// A layer has five phases, in which threads share the matrices:
//
//   1. by blocks of channels: receptance, key and value, and a block's part of the products with `down`
//   2. by heads: the products with `up`, then the step of WKV     3. the output
//   4. the feed-forward's key                                     5. its value
//
// The parts of phase 1 do not depend on the threads, and are added in order.

#include "rwkv_step.h"
#include "wkv7_math.h"

namespace {

// Channels of a block, the rows of `down` in a part of its product.
constexpr int64_t BLOCK = 32;
constexpr float HEAD_EPSILON = 64e-5f;
// As in torch.nn.functional.normalize.
constexpr float SMALLEST_NORM = 1e-12f;

// The functions of low rank: decay, in-context learning rate, gate, and, in all layers but the first, the share of the
// first layer's values.
enum { DECAY, RATE, GATE, SHARE, FUNCTIONS };

WKV_INLINE float activate(int function, float x) {
  return function == DECAY ? std::tanh(x) : function == GATE ? sigmoid(x) : x;
}

struct Layer {
  static constexpr const char *NAME = "rwkv7_step", *VERSION = "RWKV-7";
  static constexpr int64_t PARAMETERS = 33, FEWER_IN_FIRST = 3;

  Norm ln1, ln2;
  struct {
    const float *mix_r, *mix_k, *mix_v, *mix[FUNCTIONS], *w0, *a0, *v0, *k_k, *k_a, *r_k;
    Matrix down[FUNCTIONS], up[FUNCTIONS], receptance, key, value, output;
    Norm ln_x;
  } att;
  struct {
    const float* mix_k;
    Matrix key, value;
  } ffn;
  bool is_first;
  int64_t channels, head_size;

  Layer(Reader& reader, int64_t C, const Layer* first)
      : ln1(reader.norm(C)), ln2(reader.norm(C)), att(), is_first(!first), channels(C) {
    for (const float** p : {&att.mix_r, &att.mix[DECAY], &att.mix_k, &att.mix_v, &att.mix[RATE], &att.mix[GATE]}) {
      *p = reader.vector(C);
    }
    att.mix[SHARE] = att.mix_v;
    const auto read_function = [&](int function) {
      att.down[function] = reader.matrix(C, -1);
      STD_TORCH_CHECK(att.down[function].columns > 0, NAME, ": a function has rank 0");
      att.up[function] = reader.matrix(att.down[function].columns, C);
    };
    att.w0 = reader.vector(C), read_function(DECAY);
    att.a0 = reader.vector(C), read_function(RATE);
    if (!is_first) att.v0 = reader.vector(C), read_function(SHARE);
    read_function(GATE);
    att.k_k = reader.vector(C);
    att.k_a = reader.vector(C);
    head_size = reader.peek().dim() == 2 ? reader.peek().size(1) : 0;
    STD_TORCH_CHECK(head_size > 0 && C % head_size == 0 && (is_first || head_size == first->head_size), NAME,
                    ": r_k is not (heads, channels of a head)");
    att.r_k = reader.vector(C);
    for (Matrix* m : {&att.receptance, &att.key, &att.value, &att.output}) *m = reader.matrix(C, C);
    att.ln_x = reader.norm(C);
    ffn.mix_k = reader.vector(C);
    ffn.key = reader.matrix(-1, C);
    ffn.value = reader.matrix(C, ffn.key.rows);
  }

  int functions() const { return is_first ? SHARE : FUNCTIONS; }

  std::vector<int64_t> wkv_shape() const { return {channels / head_size, head_size, head_size}; }

  void fill_empty(float* wkv) const { std::fill(wkv, wkv + channels * head_size, 0.0f); }

  // (B, C) each, except low (B, rank), its parts (blocks, B, rank) and inner (B, F). v_first: the values of the first
  // layer.
  struct Scratch {
    float *mixed_r, *mixed_k, *mixed_v, *mixed[FUNCTIONS], *parts[FUNCTIONS], *low[FUNCTIONS], *full[FUNCTIONS];
    float *receptance, *key, *value, *v_first, *removed, *gated, *product, *inner;

    Scratch(Arrays& array, const Batch& batch, const std::vector<Layer>& layers) {
      const int64_t B = batch.rows, C = batch.channels;
      for (float** p : {&mixed_r, &mixed_k, &mixed_v, &mixed[DECAY], &mixed[RATE], &mixed[GATE], &receptance, &key,
                        &value, &v_first, &removed, &gated, &product}) {
        *p = array(B * C);
      }
      mixed[SHARE] = mixed_v;
      int64_t width = 0, ranks[FUNCTIONS] = {};
      for (const Layer& layer : layers) {
        width = std::max(width, layer.ffn.key.rows);
        for (int f = 0; f < FUNCTIONS; ++f) ranks[f] = std::max(ranks[f], layer.att.down[f].columns);
      }
      inner = array(B * width);
      for (int f = 0; f < FUNCTIONS; ++f) {
        parts[f] = array((C + BLOCK - 1) / BLOCK * B * ranks[f]);
        low[f] = array(B * ranks[f]);
        full[f] = array(B * C);
      }
    }
  };

  void step(const Batch& batch, const State& state, const Scratch& s, float* x) const {
    const int64_t B = batch.rows, C = channels, N = head_size, blocks = (C + BLOCK - 1) / BLOCK;
    float* const value = is_first ? s.v_first : s.value;
    int64_t ranks = 0;
    for (int f = 0; f < functions(); ++f) ranks += att.down[f].columns;

    batch.each_row([&](int64_t at) {
      float* normal = state.new_att_shift + at;
      const float* shift = state.att_shift + at;
      normalise(ln1, EPSILON, x + at, C, normal);
      mix(att.mix_r, normal, shift, C, s.mixed_r + at);
      mix(att.mix_k, normal, shift, C, s.mixed_k + at);
      mix(att.mix_v, normal, shift, C, s.mixed_v + at);
      for (int f : {DECAY, RATE, GATE}) mix(att.mix[f], normal, shift, C, s.mixed[f] + at);
    });
    parallel(blocks, BLOCK * (3 * C + ranks) * B, [&](int64_t first, int64_t last) {
      const int64_t begin = first * BLOCK, end = std::min(last * BLOCK, C);
      multiply(att.receptance, begin, end, s.mixed_r, B, s.receptance);
      multiply(att.key, begin, end, s.mixed_k, B, s.key);
      multiply(att.value, begin, end, s.mixed_v, B, value);
      for (int f = 0; f < functions(); ++f) {
        const Matrix& down = att.down[f];
        for (int64_t block = first; block < last; ++block) {
          multiply_transposed(down, block * BLOCK, std::min((block + 1) * BLOCK, C), 0, down.columns, s.mixed[f], B,
                              s.parts[f] + block * B * down.columns);
        }
      }
    });
    batch.each_row([&](int64_t at) {
      for (int f = 0; f < functions(); ++f) {
        const int64_t rank = att.down[f].columns, row = at / C * rank;
        float* low = s.low[f] + row;
        std::copy(s.parts[f] + row, s.parts[f] + row + rank, low);
        for (int64_t block = 1; block < blocks; ++block) {
          const float* part = s.parts[f] + block * B * rank + row;
          WKV_SIMD
          for (int64_t i = 0; i < rank; ++i) low[i] += part[i];
        }
        for (int64_t i = 0; i < rank; ++i) low[i] = activate(f, low[i]);
      }
    });
    parallel(C / N, N * (ranks + 3 * N) * B, [&](int64_t first, int64_t last) {
      for (int f = 0; f < functions(); ++f) {
        multiply_transposed(att.up[f], 0, att.up[f].rows, first * N, last * N, s.low[f], B, s.full[f]);
      }
      for (int64_t b = 0; b < B; ++b) {
        for (int64_t c = first * N; c < last * N; c += N) {
          // The compiler vectorises better for a constant.
          N == 64 ? step_head(64, b * C + c, c, state, s, value) : step_head(N, b * C + c, c, state, s, value);
        }
      }
    });
    batch.add_product(att.output, s.gated, s.product, x);

    batch.each_row([&](int64_t at) {
      float* normal = state.new_ffn_shift + at;
      normalise(ln2, EPSILON, x + at, C, normal);
      mix(ffn.mix_k, normal, state.ffn_shift + at, C, s.mixed_k + at);
    });
    parallel(ffn.key.rows, C * B, [&](int64_t begin, int64_t end) {
      batch.multiply_and_square(ffn.key, begin, end, s.mixed_k, s.inner);
    });
    batch.add_product(ffn.value, s.inner, s.product, x);
  }

  // From the products of one head of one row to the input of the output matrix, and the new state. at: the head's place
  // in arrays (B, C); c: its first channel.
  WKV_INLINE void step_head(int64_t N, int64_t at, int64_t c, const State& state, const Scratch& s,
                            float* values) const {
    const float *r = s.receptance + at, *gate = s.full[GATE] + at, *w0 = att.w0 + c, *a0 = att.a0 + c;
    const float *k_k = att.k_k + c, *k_a = att.k_a + c, *r_k = att.r_k + c;
    float *k = s.key + at, *v = values + at, *w = s.full[DECAY] + at, *b = s.full[RATE] + at, *a = s.removed + at;
    float* y = s.gated + at;
    if (!is_first) {
      const float *v0 = att.v0 + c, *share = s.full[SHARE] + at, *v_first = s.v_first + at;
      WKV_SIMD
      for (int64_t i = 0; i < N; ++i) v[i] = multiply_add(sigmoid(v0[i] + share[i]), v_first[i] - v[i], v[i]);
    }
    const float norm = std::sqrt(sum(N, [=](int64_t i) { return (k[i] * k_k[i]) * (k[i] * k_k[i]); }));
    const float scale = 1.0f / (norm < SMALLEST_NORM ? SMALLEST_NORM : norm);
    WKV_SIMD
    for (int64_t i = 0; i < N; ++i) {
      const float rate = sigmoid(a0[i] + b[i]), kk = k[i] * k_k[i] * scale;
      a[i] = -kk;
      b[i] = rate * kk;
      k[i] *= multiply_add(rate - 1.0f, k_a[i], 1.0f);
      w[i] = wkv7::decay(w0[i] + w[i]).value;
    }
    // S <- S diag(w) + (S a) b^T + v k^T and y = S r, a row of S at a time.
    for (int64_t i = 0; i < N; ++i) {
      const float* S = state.wkv + (at + i) * N;
      float* new_S = state.new_wkv + (at + i) * N;
      const float Sa = sum(N, [=](int64_t j) { return S[j] * a[j]; }), value = v[i];
      WKV_SIMD
      for (int64_t j = 0; j < N; ++j) new_S[j] = multiply_add(S[j], w[j], multiply_add(Sa, b[j], value * k[j]));
      y[i] = sum(N, [=](int64_t j) { return new_S[j] * r[j]; });
    }
    const float bonus = sum(N, [=](int64_t i) { return r[i] * k[i] * r_k[i]; });
    normalise({att.ln_x.weight + c, att.ln_x.bias + c}, HEAD_EPSILON, y, N, y);
    WKV_SIMD
    for (int64_t i = 0; i < N; ++i) y[i] = multiply_add(bonus, v[i], y[i]) * gate[i];
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rwkv_pl, m) {
  m.def("rwkv7_step(Tensor[] parameters, Tensor tokens, Tensor[] state)"
        " -> (Tensor logits, Tensor shifts, Tensor wkv)");
}

STABLE_TORCH_LIBRARY_IMPL(rwkv_pl, CPU, m) { m.impl("rwkv7_step", WKV_BOX(step<Layer>)); }
