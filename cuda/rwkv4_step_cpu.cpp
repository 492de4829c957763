// One step of RWKV-4's recurrence on the CPU: one token for every row of a batch, through all layers.
//
// Letters: B rows of the batch, L layers, C channels, F channels inside the feed-forward, V vocabulary.
//
// A token takes the time of reading every matrix once; the rest is small. So each matrix is read row by row, in order
// and with prefetches, and each part is multiplied with all rows of the batch as soon as it has been read. Threads
// share the rows of a matrix; one thread handles all C numbers of a vector in between. A layer has four phases:
//
//   1. key, value and receptance, then, channel by channel, the step of WKV     2. the output
//   3. the feed-forward's key and receptance                                    4. its value
//
// Every product is summed in the same order, so a row's bits do not depend on the batch or on the threads.
// Weights are float32 or bfloat16; all arithmetic is in float32.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "cpu_lanes.h"
#include "cpu_numbers.h"
#include "wkv4_math.h"
#include "tensor.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using wkv::bfloat16;
using wkv::sigmoid;
using wkv::sum;
using wkv::sum_lanes;
using wkv::widen;

constexpr int64_t LANES = 32;
// How many bytes ahead weights are prefetched.
constexpr int64_t AHEAD = 8192;
constexpr int64_t CACHE_LINE = 64;
// The least number of products for a thread, about 2 microseconds.
constexpr int64_t LEAST_PRODUCTS = 32768;
constexpr float EPSILON = 1e-5f;
// Rows of the batch that a row of a matrix is multiplied with at once; their sums fill the registers.
#if defined(__AVX512F__)
constexpr int TILE = 8;
#else
constexpr int TILE = 4;
#endif

// A row-major matrix in torch's memory, float32 or bfloat16.
struct Matrix {
  const void* data;
  int64_t rows, columns;
  bool is_bf16;
};

// Inlined, it makes the loop around its calls slower.
WKV_NOINLINE float sum_row(const float (&lanes)[LANES]) { return sum_lanes<LANES>(lanes); }

// sums += weights x, for LANES of each. FIRST: sums = weights x. (Zeros written in advance would be a memset, which
// would force the sums into memory.)
template <bool FIRST, int N, typename W>
WKV_INLINE void accumulate(const W* weight, const float* x, int64_t x_stride, float (&sums)[N][LANES]) {
  for (int n = 0; n < N; ++n) {
    const float* with = x + n * x_stride;
    float* sum = sums[n];
    WKV_SIMD
    for (int64_t l = 0; l < LANES; ++l) {
      sum[l] = FIRST ? widen(weight[l]) * with[l] : wkv::multiply_add(widen(weight[l]), with[l], sum[l]);
    }
  }
}

// The same for fewer than LANES elements, padded with zeros.
template <bool FIRST, int N, typename W>
void accumulate_rest(const W* weight, const float* x, int64_t x_stride, int64_t width, float (&sums)[N][LANES]) {
  W filled_weight[LANES] = {};
  float filled[N][LANES] = {};
  std::copy(weight, weight + width, filled_weight);
  for (int n = 0; n < N; ++n) std::copy(x + n * x_stride, x + n * x_stride + width, filled[n]);
  accumulate<FIRST>(filled_weight, filled[0], LANES, sums);
}

template <typename W>
WKV_INLINE void prefetch(const W* weight) {
  const char* ahead = reinterpret_cast<const char*>(weight) + AHEAD;
  for (int64_t line = 0; line < int64_t(LANES * sizeof(W)); line += CACHE_LINE) WKV_PREFETCH(ahead + line);
}

// One row of a matrix times N vectors; the results are y[n * y_stride].
template <int N, typename W>
void multiply_row(const W* row, const float* x, int64_t columns, float* y, int64_t y_stride) {
  alignas(64) float sums[N][LANES];
  int64_t i = std::min(columns, LANES);
  if (columns < LANES) {
    accumulate_rest<true>(row, x, columns, columns, sums);
  } else {
    prefetch(row);
    accumulate<true>(row, x, columns, sums);
  }
  for (; i + LANES <= columns; i += LANES) {
    prefetch(row + i);
    accumulate<false>(row + i, x + i, columns, sums);
  }
  if (i < columns) accumulate_rest<false>(row + i, x + i, columns, columns - i, sums);
  for (int n = 0; n < N; ++n) y[n * y_stride] = sum_row(sums[n]);
}

// The same for a batch: N vectors at a time, then the remaining ones N / 2 at a time, and so on.
template <int N, typename W>
WKV_INLINE void multiply_row(const W* row, const float* x, int64_t batch, int64_t columns, float* y, int64_t y_stride) {
  int64_t b = 0;
  for (; b + N <= batch; b += N) multiply_row<N>(row, x + b * columns, columns, y + b * y_stride, y_stride);
  if constexpr (N > 1) multiply_row<N / 2>(row, x + b * columns, batch - b, columns, y + b * y_stride, y_stride);
}

// Computes columns begin to end of y (B, rows) = x (B, columns) m^T.
template <typename W>
void multiply(const W* w, const Matrix& m, int64_t begin, int64_t end, const float* x, int64_t batch, float* y) {
  for (int64_t row = begin; row < end; ++row) {
    multiply_row<TILE>(w + row * m.columns, x, batch, m.columns, y + row, m.rows);
  }
}
void multiply(const Matrix& m, int64_t begin, int64_t end, const float* x, int64_t batch, float* y) {
  if (m.is_bf16) {
    multiply(static_cast<const bfloat16*>(m.data), m, begin, end, x, batch, y);
  } else {
    multiply(static_cast<const float*>(m.data), m, begin, end, x, batch, y);
  }
}

// Calls f(begin, end) for ranges of 0 to n on torch's threads. products: the number of products for one of n.
template <typename F>
void parallel(int64_t n, int64_t products, const F& f) {
  torch::stable::parallel_for(0, n, std::max<int64_t>(1, LEAST_PRODUCTS / std::max<int64_t>(1, products)), f);
}

struct Norm {
  const float *weight, *bias;
};

void normalise(const Norm& norm, const float* x, int64_t channels, float* y) {
  const float mean = sum(channels, [=](int64_t c) { return x[c]; }) / float(channels);
  const float variance = sum(channels, [=](int64_t c) { return (x[c] - mean) * (x[c] - mean); }) / float(channels);
  const float scale = 1.0f / std::sqrt(variance + EPSILON);
  WKV_SIMD
  for (int64_t c = 0; c < channels; ++c) {
    y[c] = wkv::multiply_add((x[c] - mean) * scale, norm.weight[c], norm.bias[c]);
  }
}

// y = shift + by (x - shift): interpolates from the last token's x to this one's. shift is nullptr at the start of a
// text.
void mix(const float* by, const float* x, const float* shift, int64_t channels, float* y) {
  if (shift == nullptr) {
    WKV_SIMD
    for (int64_t c = 0; c < channels; ++c) y[c] = by[c] * x[c];
    return;
  }
  WKV_SIMD
  for (int64_t c = 0; c < channels; ++c) y[c] = wkv::multiply_add(by[c], x[c] - shift[c], shift[c]);
}

// wkv::decay with exp_negative, which a compiler can vectorise.
WKV_INLINE float decay(float time_decay) {
  const float e = wkv::exp_negative(-std::fabs(time_decay));
  const float power = time_decay > 0.0f ? 1.0f / e : e;
  return time_decay > 69.0f ? -1e30f : -power;
}

// For channels begin to end of one row: key, value, receptance and state -> the gated output and the new state.
void step_wkv(const float* time_decay, const float* time_first, int64_t begin, int64_t end, int64_t channels,
              const float* key, const float* value, const float* receptance, const float* state, float* output,
              float* new_state) {
  WKV_SIMD
  for (int64_t c = begin; c < end; ++c) {
    const float w = decay(time_decay[c]);
    const wkv::State<float> before = {state[c], state[channels + c], state[2 * channels + c], 0.0f};
    output[c] = sigmoid(receptance[c]) * wkv::output(before, w, time_first[c], key[c], value[c]).value;
    const wkv::State<float> after = wkv::update(before, w, key[c], value[c]).state;
    const wkv::Folded<float> folded = wkv::fold(after, w);
    new_state[c] = folded.scale * after.num;
    new_state[channels + c] = folded.scale * after.den;
    new_state[2 * channels + c] = folded.max_exp;
  }
}

struct TimeMix {
  const float *time_decay, *time_first, *mix_k, *mix_v, *mix_r;
  Matrix key, value, receptance, output;
};

struct ChannelMix {
  const float *mix_k, *mix_r;
  Matrix key, receptance, value;
};

struct Layer {
  Norm ln1, ln2;
  TimeMix att;
  ChannelMix ffn;
};

// Reads the model's parameters in order and checks each; copies those that are not contiguous or need widening.
class Reader {
 public:
  explicit Reader(const std::vector<Tensor>& tensors) : tensors_(tensors) {}

  int64_t left() const { return int64_t(tensors_.size() - next_); }

  Matrix matrix(int64_t rows, int64_t columns) {
    const Tensor& t = take();
    STD_TORCH_CHECK(t.dim() == 2 && (rows < 0 || t.size(0) == rows) && (columns < 0 || t.size(1) == columns),
                    "rwkv4_step: parameter ", next_ - 1, " has not the shape of its place");
    const ScalarType type = t.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "rwkv4_step: parameter ", next_ - 1,
                    " is neither float32 nor bfloat16");
    return {t.data_ptr(), t.size(0), t.size(1), type == ScalarType::BFloat16};
  }

  const float* vector(int64_t channels) {
    const Tensor& t = take();
    STD_TORCH_CHECK(t.numel() == channels, "rwkv4_step: parameter ", next_ - 1, " has not ", channels, " numbers");
    if (t.scalar_type() == ScalarType::Float) return wkv::data<const float>(t);
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::BFloat16, "rwkv4_step: parameter ", next_ - 1,
                    " is neither float32 nor bfloat16");
    widened_.emplace_back(new float[channels]);
    float* wide = widened_.back().get();
    const bfloat16* source = wkv::data<const bfloat16>(t);
    for (int64_t c = 0; c < channels; ++c) wide[c] = widen(source[c]);
    return wide;
  }

  Norm norm(int64_t channels) {
    const float* weight = vector(channels);
    return {weight, vector(channels)};
  }

 private:
  const Tensor& take() {
    const Tensor& t = tensors_[next_++];
    if (t.is_contiguous()) return t;
    copies_.push_back(std::make_unique<Tensor>(torch::stable::contiguous(t)));
    return *copies_.back();
  }

  const std::vector<Tensor>& tensors_;
  size_t next_ = 0;
  std::vector<std::unique_ptr<Tensor>> copies_;
  std::vector<std::unique_ptr<float[]>> widened_;
};

// The numbers of parameters outside of the blocks, and in each block.
constexpr int64_t PARAMS_OUTSIDE_BLOCKS = 6, PARAMS_PER_BLOCK = 18;

struct Model {
  Reader reader;
  Matrix emb, head;
  Norm ln0, ln_out;
  std::vector<Layer> layers;
  int64_t channels, inner = 0;

  explicit Model(const std::vector<Tensor>& parameters) : reader(parameters) {
    const int64_t count = reader.left();
    STD_TORCH_CHECK(count >= PARAMS_OUTSIDE_BLOCKS && (count - PARAMS_OUTSIDE_BLOCKS) % PARAMS_PER_BLOCK == 0,
                    "rwkv4_step: ", count, " parameters are not those of an RWKV-4 model");
    emb = reader.matrix(-1, -1);
    const int64_t C = channels = emb.columns;
    layers.reserve((count - PARAMS_OUTSIDE_BLOCKS) / PARAMS_PER_BLOCK);
    // The norm of the embedding is the first module of the first block.
    ln0 = reader.norm(C);
    for (int64_t l = 0; l < (count - PARAMS_OUTSIDE_BLOCKS) / PARAMS_PER_BLOCK; ++l) {
      Layer layer;
      layer.ln1 = reader.norm(C);
      layer.ln2 = reader.norm(C);
      for (const float** p : {&layer.att.time_decay, &layer.att.time_first, &layer.att.mix_k, &layer.att.mix_v,
                              &layer.att.mix_r}) {
        *p = reader.vector(C);
      }
      for (Matrix* m : {&layer.att.key, &layer.att.value, &layer.att.receptance, &layer.att.output}) {
        *m = reader.matrix(C, C);
      }
      layer.ffn.mix_k = reader.vector(C);
      layer.ffn.mix_r = reader.vector(C);
      layer.ffn.key = reader.matrix(-1, C);
      layer.ffn.receptance = reader.matrix(C, C);
      layer.ffn.value = reader.matrix(C, layer.ffn.key.rows);
      inner = std::max(inner, layer.ffn.key.rows);
      layers.push_back(layer);
    }
    ln_out = reader.norm(C);
    head = reader.matrix(-1, C);
  }
};

void embed(const Matrix& emb, int64_t token, float* x) {
  const int64_t first = token * emb.columns;
  if (emb.is_bf16) {
    for (int64_t c = 0; c < emb.columns; ++c) x[c] = widen(static_cast<const bfloat16*>(emb.data)[first + c]);
  } else {
    std::memcpy(x, static_cast<const float*>(emb.data) + first, emb.columns * sizeof(float));
  }
}

// parameters: those of the model, in order. state: att_shift (B, C), wkv (B, 3, C) and ffn_shift (B, C) of each layer,
// or empty at the start of a text. Returns logits (B, V), the shifts (2 L, B, C) and wkv (L, B, 3, C).
std::tuple<Tensor, Tensor, Tensor> rwkv4_step(std::vector<Tensor> parameters, const Tensor& tokens,
                                              std::vector<Tensor> state) {
  using torch::stable::new_empty;
  const Model model(parameters);
  const int64_t L = int64_t(model.layers.size()), C = model.channels, F = model.inner;
  STD_TORCH_CHECK(tokens.dim() == 1 && tokens.scalar_type() == ScalarType::Long,
                  "rwkv4_step: tokens must be (B,) int64");
  const int64_t B = tokens.size(0);
  STD_TORCH_CHECK(state.empty() || int64_t(state.size()) == 3 * L, "rwkv4_step: a state of ", state.size(),
                  " tensors for ", L, " layers");
  for (size_t i = 0; i < state.size(); ++i) {
    STD_TORCH_CHECK(state[i].scalar_type() == ScalarType::Float && state[i].dim() == (i % 3 == 1 ? 3 : 2) &&
                        state[i].size(0) == B && state[i].numel() == B * C * (i % 3 == 1 ? 3 : 1),
                    "rwkv4_step: tensor ", i, " of the state has not the shape of its place, or is not float32");
    state[i] = torch::stable::contiguous(state[i]);
  }
  const Tensor ids = torch::stable::contiguous(tokens);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t id = wkv::data<const int64_t>(ids)[b];
    STD_TORCH_CHECK(id >= 0 && id < model.emb.rows, "rwkv4_step: token ", id, " of a vocabulary of ", model.emb.rows);
  }

  const Tensor logits = new_empty(tokens, {B, model.head.rows}, ScalarType::Float);
  const Tensor new_shifts = new_empty(tokens, {2 * L, B, C}, ScalarType::Float);
  const Tensor new_wkv = new_empty(tokens, {L, B, 3, C}, ScalarType::Float);

  // Intermediate results, shared by the threads: (B, C) each, except inner (B, F).
  const std::unique_ptr<float[]> scratch(new float[B * (9 * C + F) + 3 * C]);
  float* place = scratch.get();
  const auto array = [&](int64_t n) { return std::exchange(place, place + n); };
  float *x = array(B * C), *mixed_k = array(B * C), *mixed_v = array(B * C), *mixed_r = array(B * C);
  float *key = array(B * C), *value = array(B * C), *receptance = array(B * C), *gated = array(B * C);
  float *product = array(B * C), *inner = array(B * F), *empty = array(3 * C);
  for (int64_t c = 0; c < C; ++c) {
    const wkv::State<float> nothing = wkv::empty_state<float>();
    empty[c] = nothing.num, empty[C + c] = nothing.den, empty[2 * C + c] = nothing.key;
  }
  // Row b of part 0, 1 or 2 (att_shift, wkv, ffn_shift) of a layer's state.
  const auto before = [&](int64_t layer, int64_t part, int64_t b) -> const float* {
    return state.empty() ? nullptr : wkv::data<const float>(state[3 * layer + part]) + b * (part == 1 ? 3 : 1) * C;
  };
  // Calls f(b) for every row.
  const auto each_row = [&](const auto& f) {
    parallel(B, 16 * C, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) f(b);
    });
  };

  each_row([&](int64_t b) {
    embed(model.emb, wkv::data<const int64_t>(ids)[b], key + b * C);
    normalise(model.ln0, key + b * C, C, x + b * C);
  });

  for (int64_t l = 0; l < L; ++l) {
    const Layer& layer = model.layers[l];
    const TimeMix& att = layer.att;
    const ChannelMix& ffn = layer.ffn;

    each_row([&](int64_t b) {
      float* normal = wkv::data<float>(new_shifts) + (2 * l * B + b) * C;
      const float* shift = before(l, 0, b);
      normalise(layer.ln1, x + b * C, C, normal);
      mix(att.mix_k, normal, shift, C, mixed_k + b * C);
      mix(att.mix_v, normal, shift, C, mixed_v + b * C);
      mix(att.mix_r, normal, shift, C, mixed_r + b * C);
    });
    parallel(C, 3 * C * B, [&](int64_t begin, int64_t end) {
      multiply(att.key, begin, end, mixed_k, B, key);
      multiply(att.value, begin, end, mixed_v, B, value);
      multiply(att.receptance, begin, end, mixed_r, B, receptance);
      for (int64_t b = 0; b < B; ++b) {
        const float* from = state.empty() ? empty : before(l, 1, b);
        step_wkv(att.time_decay, att.time_first, begin, end, C, key + b * C, value + b * C, receptance + b * C, from,
                 gated + b * C, wkv::data<float>(new_wkv) + (l * B + b) * 3 * C);
      }
    });
    parallel(C, C * B, [&](int64_t begin, int64_t end) {
      multiply(att.output, begin, end, gated, B, product);
      for (int64_t b = 0; b < B; ++b) {
        WKV_SIMD
        for (int64_t c = b * C + begin; c < b * C + end; ++c) x[c] += product[c];
      }
    });

    each_row([&](int64_t b) {
      float* normal = wkv::data<float>(new_shifts) + ((2 * l + 1) * B + b) * C;
      const float* shift = before(l, 2, b);
      normalise(layer.ln2, x + b * C, C, normal);
      mix(ffn.mix_k, normal, shift, C, mixed_k + b * C);
      mix(ffn.mix_r, normal, shift, C, mixed_r + b * C);
    });
    const int64_t width = ffn.key.rows;
    parallel(C, (C + width) * B, [&](int64_t begin, int64_t end) {
      // The key's rows are divided among the C channels, so that both matrices are split at the same points.
      const int64_t first = begin * width / C, last = end * width / C;
      multiply(ffn.key, first, last, mixed_k, B, inner);
      multiply(ffn.receptance, begin, end, mixed_r, B, receptance);
      for (int64_t b = 0; b < B; ++b) {
        WKV_SIMD
        for (int64_t f = b * width + first; f < b * width + last; ++f) {
          const float root = inner[f] < 0.0f ? 0.0f : inner[f];
          inner[f] = root * root;
        }
      }
    });
    parallel(C, width * B, [&](int64_t begin, int64_t end) {
      multiply(ffn.value, begin, end, inner, B, product);
      for (int64_t b = 0; b < B; ++b) {
        WKV_SIMD
        for (int64_t c = b * C + begin; c < b * C + end; ++c) {
          x[c] = wkv::multiply_add(sigmoid(receptance[c]), product[c], x[c]);
        }
      }
    });
  }

  each_row([&](int64_t b) { normalise(model.ln_out, x + b * C, C, key + b * C); });
  parallel(model.head.rows, C * B, [&](int64_t begin, int64_t end) {
    multiply(model.head, begin, end, key, B, wkv::data<float>(logits));
  });
  return {logits, new_shifts, new_wkv};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rwkv_pl, m) {
  m.def("rwkv4_step(Tensor[] parameters, Tensor tokens, Tensor[] state)"
        " -> (Tensor logits, Tensor shifts, Tensor wkv)");
}

STABLE_TORCH_LIBRARY_IMPL(rwkv_pl, CPU, m) { m.impl("rwkv4_step", WKV_BOX(rwkv4_step)); }
