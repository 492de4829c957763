// One step of a recurrence on the CPU, shared by the versions of RWKV: one token for every row of a batch, through all
// layers.
//
// Letters: B rows of the batch, L layers, C channels, F channels inside the feed-forward, V vocabulary.
//
// A token takes the time of reading every matrix once; the rest is small. So each matrix is read row by row, in order
// and with prefetches, and each part is multiplied with all rows of the batch as soon as it has been read. Threads
// share the rows of a matrix; one thread handles all C numbers of a vector in between.
//
// Every product is summed in the same order, so a row's bits do not depend on the batch or on the threads.
// Weights are float32 or bfloat16; all arithmetic is in float32.
//
// A version is a class Layer, the argument of `step`, which lists its members.

#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

#include "cpu_lanes.h"
#include "cpu_numbers.h"
#include "tensor.h"

// Each library has one source that includes this file.
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using wkv::bfloat16;
using wkv::data;
using wkv::multiply_add;
using wkv::sigmoid;
using wkv::sum;
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

  // Calls f(the elements, as const float* or const bfloat16*).
  template <typename F>
  void visit(const F& f) const {
    is_bf16 ? f(static_cast<const bfloat16*>(data)) : f(static_cast<const float*>(data));
  }
};

// Inlined, it makes the loop around its calls slower.
WKV_NOINLINE inline float sum_row(const float (&lanes)[LANES]) { return wkv::sum_lanes<LANES>(lanes); }

// sums += weights x, for LANES of each. FIRST: sums = weights x. (Zeros written in advance would be a memset, which
// would force the sums into memory.)
template <bool FIRST, int N, typename W>
WKV_INLINE void accumulate(const W* weight, const float* x, int64_t x_stride, float (&sums)[N][LANES]) {
  for (int n = 0; n < N; ++n) {
    const float* with = x + n * x_stride;
    float* sum = sums[n];
    WKV_SIMD
    for (int64_t l = 0; l < LANES; ++l) {
      sum[l] = FIRST ? widen(weight[l]) * with[l] : multiply_add(widen(weight[l]), with[l], sum[l]);
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

// Prefetches LANES weights.
template <typename W>
WKV_INLINE void prefetch(const W* weight) {
  for (int64_t line = 0; line < int64_t(LANES * sizeof(W)); line += CACHE_LINE) {
    WKV_PREFETCH(reinterpret_cast<const char*>(weight) + line);
  }
}
template <typename W>
WKV_INLINE void prefetch_ahead(const W* weight) {
  prefetch(weight + AHEAD / int64_t(sizeof(W)));
}

// One row of a matrix times N vectors; the results are y[n * y_stride].
template <int N, typename W>
void multiply_row(const W* row, const float* x, int64_t columns, float* y, int64_t y_stride) {
  alignas(64) float sums[N][LANES];
  int64_t i = std::min(columns, LANES);
  if (columns < LANES) {
    accumulate_rest<true>(row, x, columns, columns, sums);
  } else {
    prefetch_ahead(row);
    accumulate<true>(row, x, columns, sums);
  }
  for (; i + LANES <= columns; i += LANES) {
    prefetch_ahead(row + i);
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
inline void multiply(const Matrix& m, int64_t begin, int64_t end, const float* x, int64_t batch, float* y) {
  m.visit([&](const auto* w) {
    for (int64_t row = begin; row < end; ++row) {
      multiply_row<TILE>(w + row * m.columns, x, batch, m.columns, y + row, m.rows);
    }
  });
}

// sums += a weight of x times the row, for WIDTH columns. FIRST is as above.
template <bool FIRST, int N, int64_t WIDTH, typename W>
WKV_INLINE void add_row(const W* row, const float* x, int64_t x_stride, float (&sums)[N][WIDTH]) {
  for (int n = 0; n < N; ++n) {
    const float with = x[n * x_stride];
    float* sum = sums[n];
    WKV_SIMD
    for (int64_t l = 0; l < WIDTH; ++l) {
      sum[l] = FIRST ? widen(row[l]) * with : multiply_add(widen(row[l]), with, sum[l]);
    }
  }
}

// The sum of `rows` rows, at least one, weighted with each of N vectors x[n * x_stride]; for WIDTH columns. The results
// are y[n * y_stride]. ahead: how many elements ahead weights are prefetched.
template <int N, int64_t WIDTH, typename W>
void add_rows(const W* row, int64_t rows, int64_t columns, int64_t ahead, const float* x, int64_t x_stride, float* y,
              int64_t y_stride) {
  alignas(64) float sums[N][WIDTH];
  prefetch(row + ahead);
  add_row<true>(row, x, x_stride, sums);
  for (int64_t i = 1; i < rows; ++i) {
    row += columns;
    prefetch(row + ahead);
    add_row<false>(row, x + i, x_stride, sums);
  }
  for (int n = 0; n < N; ++n) std::copy(sums[n], sums[n] + WIDTH, y + n * y_stride);
}

// The same for a batch, as in multiply_row.
template <int N, int64_t WIDTH, typename W>
WKV_INLINE void add_rows(const W* row, int64_t rows, int64_t columns, int64_t ahead, const float* x, int64_t x_stride,
                         int64_t batch, float* y, int64_t y_stride) {
  int64_t b = 0;
  for (; b + N <= batch; b += N) {
    add_rows<N, WIDTH>(row, rows, columns, ahead, x + b * x_stride, x_stride, y + b * y_stride, y_stride);
  }
  if constexpr (N > 1) {
    add_rows<N / 2, WIDTH>(row, rows, columns, ahead, x + b * x_stride, x_stride, batch - b, y + b * y_stride,
                           y_stride);
  }
}

// Computes columns begin to end of y (B, columns) = x m, with only the rows first to last of m and columns of
// x (B, rows).
inline void multiply_transposed(const Matrix& m, int64_t first, int64_t last, int64_t begin, int64_t end,
                                const float* x, int64_t batch, float* y) {
  m.visit([&](const auto* w) {
    const int64_t C = m.columns, rows = last - first;
    const auto* from = w + first * C;
    int64_t c = begin;
    for (; c + LANES <= end; c += LANES) {
      // The same rows of the next columns, or the rows after these.
      const int64_t ahead = c + 2 * LANES <= end ? LANES : rows * C + begin - c;
      add_rows<TILE, LANES>(from + c, rows, C, ahead, x + first, m.rows, batch, y + c, C);
    }
    // Official sizes are multiples of LANES.
    for (; c < end; ++c) add_rows<TILE, 1>(from + c, rows, C, 0, x + first, m.rows, batch, y + c, C);
  });
}

// Calls f(begin, end) for ranges of 0 to n on torch's threads. products: the number of products for one of n.
template <typename F>
void parallel(int64_t n, int64_t products, const F& f) {
  torch::stable::parallel_for(0, n, std::max<int64_t>(1, LEAST_PRODUCTS / std::max<int64_t>(1, products)), f);
}

struct Norm {
  const float *weight, *bias;
};

inline void normalise(const Norm& norm, float epsilon, const float* x, int64_t channels, float* y) {
  const float mean = sum(channels, [=](int64_t c) { return x[c]; }) / float(channels);
  const float variance = sum(channels, [=](int64_t c) { return (x[c] - mean) * (x[c] - mean); }) / float(channels);
  // If the variance overflows float32, the result is NaN instead of a wrong number.
  const float scale = (1.0f + 0.0f * variance) / std::sqrt(variance + epsilon);
  WKV_SIMD
  for (int64_t c = 0; c < channels; ++c) {
    y[c] = multiply_add((x[c] - mean) * scale, norm.weight[c], norm.bias[c]);
  }
}

// y = from + by (to - from): interpolates.
inline void mix(const float* by, const float* from, const float* to, int64_t channels, float* y) {
  WKV_SIMD
  for (int64_t c = 0; c < channels; ++c) y[c] = multiply_add(by[c], to[c] - from[c], from[c]);
}

// Owns arrays of numbers, which are not initialised.
class Arrays {
 public:
  float* operator()(int64_t n) {
    arrays_.emplace_back(new float[n]);
    return arrays_.back().get();
  }

 private:
  std::vector<std::unique_ptr<float[]>> arrays_;
};

// Reads the model's parameters in order and checks each; copies those that are not contiguous or need widening.
class Reader {
 public:
  Reader(const char* name, const std::vector<Tensor>& tensors) : name_(name), tensors_(tensors) {}

  const Tensor& peek() const { return tensors_[next_]; }

  // A matrix of these sizes; -1 is any size.
  Matrix matrix(int64_t rows, int64_t columns) {
    const Tensor& t = take();
    STD_TORCH_CHECK(t.dim() == 2 && (rows < 0 || t.size(0) == rows) && (columns < 0 || t.size(1) == columns), name_,
                    ": parameter ", next_ - 1, " has not the shape of its place");
    const ScalarType type = t.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, name_, ": parameter ", next_ - 1,
                    " is neither float32 nor bfloat16");
    return {t.data_ptr(), t.size(0), t.size(1), type == ScalarType::BFloat16};
  }

  const float* vector(int64_t channels) {
    const Tensor& t = take();
    STD_TORCH_CHECK(t.numel() == channels, name_, ": parameter ", next_ - 1, " has not ", channels, " numbers");
    if (t.scalar_type() == ScalarType::Float) return data<const float>(t);
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::BFloat16, name_, ": parameter ", next_ - 1,
                    " is neither float32 nor bfloat16");
    float* wide = widened_(channels);
    const bfloat16* source = data<const bfloat16>(t);
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

  const char* name_;
  const std::vector<Tensor>& tensors_;
  size_t next_ = 0;
  std::vector<std::unique_ptr<Tensor>> copies_;
  Arrays widened_;
};

// The B rows of a batch, of C channels each.
struct Batch {
  int64_t rows, channels;

  // Calls f(a row's place in an array (B, C)) for every row.
  template <typename F>
  void each_row(const F& f) const {
    parallel(rows, 16 * channels, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) f(b * channels);
    });
  }

  // x += m y for the residual stream x (B, C) and y (B, m.columns). product: space for (B, C).
  void add_product(const Matrix& m, const float* y, float* product, float* x) const {
    parallel(channels, m.columns * rows, [&](int64_t begin, int64_t end) {
      multiply(m, begin, end, y, rows, product);
      for (int64_t b = 0; b < rows; ++b) {
        WKV_SIMD
        for (int64_t c = b * channels + begin; c < b * channels + end; ++c) x[c] += product[c];
      }
    });
  }

  // Columns begin to end of y (B, m.rows) = max(m x, 0)^2.
  void multiply_and_square(const Matrix& m, int64_t begin, int64_t end, const float* x, float* y) const {
    multiply(m, begin, end, x, rows, y);
    for (int64_t b = 0; b < rows; ++b) {
      WKV_SIMD
      for (int64_t f = b * m.rows + begin; f < b * m.rows + end; ++f) {
        const float root = y[f] < 0.0f ? 0.0f : y[f];
        y[f] = root * root;
      }
    }
  }
};

// The state of a layer, before the step and after it: att_shift (B, C), wkv (B, ...), ffn_shift (B, C).
struct State {
  const float *att_shift, *wkv, *ffn_shift;
  float *new_att_shift, *new_wkv, *new_ffn_shift;
};

// parameters: those of the model, in order. state: att_shift (B, C), wkv (B, ...) and ffn_shift (B, C) of each layer, or
// empty at the start of a text. Returns logits (B, V), the shifts (2 L, B, C) and wkv (L, B, ...).
//
// A Layer has:
//
//   NAME, VERSION                        of the operator and of the version, for messages
//   PARAMETERS                           their number in a layer
//   FEWER_IN_FIRST                       how many fewer the first layer has
//   Layer(reader, C, first)              reads the parameters; first is the first layer, null in that layer itself
//   wkv_shape()                          of one row's part of the state
//   fill_empty(wkv)                      sets it to that at the start of a text
//   Scratch(arrays, batch, layers)       space for intermediate results, which all layers use
//   step(batch, state, scratch, x)       the step of the residual stream x (B, C)
template <typename Layer>
std::tuple<Tensor, Tensor, Tensor> step(std::vector<Tensor> parameters, const Tensor& tokens,
                                        std::vector<Tensor> state) {
  using torch::stable::new_empty;
  const char* const name = Layer::NAME;
  // Those of the embedding, its norm, the last norm and the head.
  constexpr int64_t OUTSIDE_LAYERS = 6;
  const int64_t in_layers = int64_t(parameters.size()) - OUTSIDE_LAYERS + Layer::FEWER_IN_FIRST;
  const int64_t L = in_layers / Layer::PARAMETERS;
  STD_TORCH_CHECK(in_layers > 0 && in_layers % Layer::PARAMETERS == 0, name, ": ", parameters.size(),
                  " parameters are not those of an ", Layer::VERSION, " model");
  Reader reader(name, parameters);
  const Matrix emb = reader.matrix(-1, -1);
  const int64_t C = emb.columns;
  // The norm of the embedding is the first module of the first block.
  const Norm ln0 = reader.norm(C);
  std::vector<Layer> layers;
  layers.reserve(L);
  for (int64_t l = 0; l < L; ++l) layers.emplace_back(reader, C, l ? &layers[0] : nullptr);
  const Norm ln_out = reader.norm(C);
  const Matrix head = reader.matrix(-1, C);

  STD_TORCH_CHECK(tokens.dim() == 1 && tokens.scalar_type() == ScalarType::Long, name, ": tokens must be (B,) int64");
  const int64_t B = tokens.size(0);
  const Batch batch = {B, C};
  std::vector<int64_t> wkv_shape = layers[0].wkv_shape();
  int64_t wkv_size = 1;
  for (int64_t size : wkv_shape) wkv_size *= size;
  wkv_shape.insert(wkv_shape.begin(), {L, B});
  STD_TORCH_CHECK(state.empty() || int64_t(state.size()) == 3 * L, name, ": a state of ", state.size(), " tensors for ",
                  L, " layers");
  for (size_t i = 0; i < state.size(); ++i) {
    const bool is_wkv = i % 3 == 1;
    STD_TORCH_CHECK(state[i].scalar_type() == ScalarType::Float &&
                        state[i].dim() == (is_wkv ? int64_t(wkv_shape.size()) - 1 : 2) && state[i].size(0) == B &&
                        state[i].numel() == B * (is_wkv ? wkv_size : C),
                    name, ": tensor ", i, " of the state has not the shape of its place, or is not float32");
    state[i] = torch::stable::contiguous(state[i]);
  }
  const Tensor contiguous = torch::stable::contiguous(tokens);
  const int64_t* const ids = data<const int64_t>(contiguous);
  for (int64_t b = 0; b < B; ++b) {
    STD_TORCH_CHECK(ids[b] >= 0 && ids[b] < emb.rows, name, ": token ", ids[b], " of a vocabulary of ", emb.rows);
  }

  const Tensor logits = new_empty(tokens, {B, head.rows}, ScalarType::Float);
  const Tensor new_shifts = new_empty(tokens, {2 * L, B, C}, ScalarType::Float);
  const Tensor new_wkv = new_empty(tokens, wkv_shape, ScalarType::Float);
  Arrays arrays;
  float *const x = arrays(B * C), *const normal = arrays(B * C);
  const float *no_shift = nullptr, *no_wkv = nullptr;
  if (state.empty()) {
    float *const shift = arrays(B * C), *const wkv = arrays(B * wkv_size);
    std::fill(shift, shift + B * C, 0.0f);
    for (int64_t b = 0; b < B; ++b) layers[0].fill_empty(wkv + b * wkv_size);
    no_shift = shift, no_wkv = wkv;
  }
  typename Layer::Scratch scratch(arrays, batch, layers);

  for (int64_t b = 0; b < B; ++b) {
    emb.visit([&](const auto* w) {
      for (int64_t c = 0; c < C; ++c) normal[b * C + c] = widen(w[ids[b] * C + c]);
    });
  }
  batch.each_row([&](int64_t at) { normalise(ln0, EPSILON, normal + at, C, x + at); });
  for (int64_t l = 0; l < L; ++l) {
    const auto before = [&](int64_t part, const float* none) {
      return state.empty() ? none : data<const float>(state[3 * l + part]);
    };
    float* const shifts = data<float>(new_shifts) + 2 * l * B * C;
    layers[l].step(batch,
                   {before(0, no_shift), before(1, no_wkv), before(2, no_shift), shifts,
                    data<float>(new_wkv) + l * B * wkv_size, shifts + B * C},
                   scratch, x);
  }
  batch.each_row([&](int64_t at) { normalise(ln_out, EPSILON, x + at, C, normal + at); });
  parallel(head.rows, C * B, [&](int64_t begin, int64_t end) {
    multiply(head, begin, end, normal, B, data<float>(logits));
  });
  return {logits, new_shifts, new_wkv};
}

}  // namespace
