// Cross-entropy and the largest logit of each row, on the CPU; forward and backward each read the logits once.
//
//   largest = x_top                                      d/dx_v = [v = top], top the first index of the largest logit
//   log_sum = log sum_v e^{x_v - largest}
//   nats = log_sum + largest - x_target                  d/dx_v = softmax_v - [v = target]
//
// Letters: N rows, V vocabulary.

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cpu_numbers.h"
#include "tensor.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using wkv::data;
using wkv::widen;

constexpr int64_t IGNORED = -1;
constexpr int64_t LANES = 32;
// Terms per partial sum in float32; the partial sums are added in double.
constexpr int64_t BLOCK = 4096;
// The least work of a thread, about 10 microseconds.
constexpr int64_t LEAST_LOGITS = 16384;

// Calls f(begin, end) for ranges of the N rows of V logits, on torch's threads.
template <typename F>
void parallel(int64_t N, int64_t V, const F& f) {
  torch::stable::parallel_for(0, N, std::max<int64_t>(1, LEAST_LOGITS / V), f);
}

template <typename T>
float largest_of(const T* x, int64_t V) {
  if (V < LANES) {
    float most = widen(x[0]);
    for (int64_t v = 1; v < V; ++v) most = std::max(most, widen(x[v]));
    return most;
  }
  alignas(64) float most[LANES];
  for (int64_t l = 0; l < LANES; ++l) most[l] = widen(x[l]);
  // The last piece overlaps the one before, which does not change the maximum.
  for (int64_t v = LANES; v < V; v += LANES) {
    const T* piece = x + std::min(v, V - LANES);
    WKV_SIMD
    for (int64_t l = 0; l < LANES; ++l) most[l] = widen(piece[l]) > most[l] ? widen(piece[l]) : most[l];
  }
  return *std::max_element(most, most + LANES);
}

template <typename T>
void forward(const T* logits, const int64_t* targets, int64_t N, int64_t V, float* nats, float* largest, float* log_sum,
             int64_t* top) {
  parallel(N, V, [=](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const T* x = logits + n * V;
      const float most = largest_of(x, V);
      double total = 0.0;
      for (int64_t v = 0; v < V; v += BLOCK) {
        const T* piece = x + v;
        total += wkv::sum(std::min(BLOCK, V - v), [=](int64_t i) { return wkv::exp_negative(widen(piece[i]) - most); });
      }
      log_sum[n] = float(std::log(total));
      nats[n] = targets[n] == IGNORED ? 0.0f : float(double(most) - double(widen(x[targets[n]])) + std::log(total));
      // A NaN never becomes the maximum, but it makes the sum NaN.
      largest[n] = total == total ? most : log_sum[n];
      top[n] = std::find_if(x, x + V, [=](T y) { return !(widen(y) < most); }) - x;
    }
  });
}

template <typename T>
void backward(const T* logits, const int64_t* targets, int64_t N, int64_t V, const float* largest, const float* log_sum,
              const int64_t* top, const float* grad_nats, const float* grad_largest, T* grad) {
  parallel(N, V, [=](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const T* x = logits + n * V;
      T* to = grad + n * V;
      const bool counts = targets[n] != IGNORED;
      const float of = counts ? grad_nats[n] : 0.0f, most = largest[n], log_sum_n = log_sum[n];
      // most and log_sum_n are subtracted one after the other: their sum would lose the bits of the smaller one.
      const auto softmax = [=](int64_t v) { return of * wkv::exp_negative(widen(x[v]) - most - log_sum_n); };
      WKV_SIMD
      for (int64_t v = 0; v < V; ++v) to[v] = wkv::narrow<T>(softmax(v));
      // The gradients of the target and of top have more terms. They are computed again, so that each is rounded once.
      for (int64_t v : {counts ? targets[n] : top[n], top[n]}) {
        const float pull = v == top[n] ? grad_largest[n] : 0.0f;
        to[v] = wkv::narrow<T>(softmax(v) - (counts && v == targets[n] ? of : 0.0f) + pull);
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& targets) {
  using torch::stable::new_empty;
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, "cross_entropy: logits must be (N, V) with V at least 1");
  const int64_t N = logits.size(0), V = logits.size(1);
  wkv::expect("cross_entropy: targets", targets, {N}, ScalarType::Long);
  const Tensor x = torch::stable::contiguous(logits), t = torch::stable::contiguous(targets);
  const int64_t* target = data<int64_t>(t);
  for (int64_t n = 0; n < N; ++n) {
    STD_TORCH_CHECK(target[n] == IGNORED || (target[n] >= 0 && target[n] < V), "cross_entropy: target ", target[n],
                    " for a vocabulary of ", V);
  }
  const Tensor nats = new_empty(x, {N}, ScalarType::Float), largest = new_empty(x, {N}, ScalarType::Float);
  const Tensor log_sum = new_empty(x, {N}, ScalarType::Float), top = new_empty(x, {N}, ScalarType::Long);
  wkv::dispatch_type(x.scalar_type() == ScalarType::BFloat16, [&](auto zero) {
    forward(data<decltype(zero)>(x), target, N, V, data<float>(nats), data<float>(largest), data<float>(log_sum),
            data<int64_t>(top));
  });
  return {nats, largest, log_sum, top};
}

Tensor cross_entropy_backward(const Tensor& logits, const Tensor& targets, const Tensor& largest, const Tensor& log_sum,
                              const Tensor& top, const Tensor& grad_nats, const Tensor& grad_largest) {
  const int64_t N = logits.size(0), V = logits.size(1);
  const Tensor x = torch::stable::contiguous(logits), t = torch::stable::contiguous(targets),
               gn = torch::stable::contiguous(grad_nats), gl = torch::stable::contiguous(grad_largest);
  const Tensor grad = torch::stable::empty_like(x);
  wkv::dispatch_type(x.scalar_type() == ScalarType::BFloat16, [&](auto zero) {
    using T = decltype(zero);
    backward(data<T>(x), data<int64_t>(t), N, V, data<float>(largest), data<float>(log_sum), data<int64_t>(top),
             data<float>(gn), data<float>(gl), data<T>(grad));
  });
  return grad;
}

}  // namespace

// logits (N, V) and their gradient are float32 or bfloat16; targets and top (N,) int64; everything else (N,) float32.
STABLE_TORCH_LIBRARY_FRAGMENT(rwkv_pl, m) {
  m.def("cross_entropy(Tensor logits, Tensor targets) -> (Tensor nats, Tensor largest, Tensor log_sum, Tensor top)");
  m.def("cross_entropy_backward(Tensor logits, Tensor targets, Tensor largest, Tensor log_sum, Tensor top,"
        " Tensor grad_nats, Tensor grad_largest) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rwkv_pl, CPU, m) {
  m.impl("cross_entropy", WKV_BOX(cross_entropy));
  m.impl("cross_entropy_backward", WKV_BOX(cross_entropy_backward));
}
