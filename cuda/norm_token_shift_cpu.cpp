// LayerNorm, token shift and mixes, fused, on the CPU; forward and backward are one pass over memory each.
//
//   y_t = (x_t - mean) / sqrt(variance + epsilon) weight + bias          over the C channels of a token
//   mixed_j,t = y_{t-1} + mix_j (y_t - y_{t-1})                          y_{-1} = shift, or 0 at the start of a text
//
// Letters: B sequences, T steps, C channels, j the mixes. A task is STEPS consecutive steps of
// one sequence; each row and the one before stay in the L1 cache. y is never written to memory: the backward pass
// recomputes it from x and each row's mean and rstd. Each task has separate sums over its rows, and these are added in
// order. The tasks do not depend on the threads, so any number of threads gives the same bits.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "cpu_numbers.h"
#include "tensor.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using wkv::contiguous;
using wkv::data;
using wkv::multiply_add;

// Rows of a task. Each task also computes the row before its own.
constexpr int64_t STEPS = 64;

struct Norm {
  const float *weight, *bias;
  int64_t channels;

  void write(const float* x, float mean, float scale, float* y) const {
    WKV_SIMD
    for (int64_t c = 0; c < channels; ++c) y[c] = multiply_add((x[c] - mean) * scale, weight[c], bias[c]);
  }
};

struct Plan {
  int64_t batch, steps, channels, tasks;

  explicit Plan(const Tensor& x)
      : batch(x.size(0)), steps(x.size(1)), channels(x.size(2)), tasks((steps + STEPS - 1) / STEPS) {
    STD_TORCH_CHECK(steps >= 1 && channels >= 1, "norm_token_shift: x has ", steps, " steps, ", channels, " channels");
  }

  // Calls f(task, sequence, first step, end) for all tasks.
  template <typename F>
  void parallel(const F& f) const {
    // The least work of a thread is about 20 microseconds.
    const int64_t grain = std::max<int64_t>(1, 32768 / (STEPS * channels));
    torch::stable::parallel_for(0, batch * tasks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % tasks * STEPS;
        f(task, task / tasks, first, std::min(steps, first + STEPS));
      }
    });
  }
};

// Rows of C numbers, padded: with a stride of a power of two, rows would map to the same cache sets.
class Buffer {
 public:
  Buffer(int64_t rows, int64_t channels) : stride_((channels + 15) / 16 * 16 + 16), all_(rows * stride_) {}
  float* operator[](int64_t row) { return all_.data() + row * stride_; }

 private:
  int64_t stride_;
  std::vector<float> all_;
};

template <typename Out>
void forward(const Plan& plan, const Norm& norm, const float* x, const std::vector<const float*>& mix,
             const float* shift, float epsilon, const std::vector<Out*>& mixed, float* new_shift, float* mean_rstd) {
  const int64_t C = plan.channels;
  plan.parallel([&](int64_t, int64_t b, int64_t begin, int64_t end) {
    Buffer rows(2, C);
    float *y = rows[0], *before = rows[1];
    for (int64_t t = std::max<int64_t>(0, begin - 1); t < end; ++t) {
      const int64_t row = b * plan.steps + t;
      const float* xt = x + row * C;
      const float mean = wkv::sum(C, [=](int64_t c) { return xt[c]; }) / float(C);
      const float variance = wkv::sum(C, [=](int64_t c) { return (xt[c] - mean) * (xt[c] - mean); }) / float(C);
      // If the variance overflows float32, the result is NaN instead of a wrong number.
      const float scale = (1.0f + 0.0f * variance) / std::sqrt(variance + epsilon);
      norm.write(xt, mean, scale, y);
      if (t >= begin) {
        mean_rstd[2 * row] = mean, mean_rstd[2 * row + 1] = scale;
        // `before` is 0 at the start of a text, because Buffer initialises its rows to 0.
        if (t == 0 && shift) std::copy(shift + b * C, shift + (b + 1) * C, before);
        for (size_t j = 0; j < mix.size(); ++j) {
          const float* by = mix[j];
          Out* out = mixed[j] + row * C;
          WKV_SIMD
          for (int64_t c = 0; c < C; ++c) out[c] = wkv::narrow<Out>(multiply_add(by[c], y[c] - before[c], before[c]));
        }
      }
      std::swap(y, before);
    }
    if (end == plan.steps) std::copy(before, before + C, new_shift + b * C);
  });
}

// Other inputs and outputs of the backward pass. sums is (tasks, J + 2, C): the gradients of mixes, weight and bias.
struct Gradients {
  const float *residual, *new_shift;
  float *x, *shift, *sums;
};

// J: the number of mixes, a compile-time constant, so that one loop over C handles all of them.
template <int64_t J, typename Out>
void backward(const Plan& plan, const Norm& norm, const float* x, const std::vector<const float*>& mix,
              const float* shift, const float* mean_rstd, const std::vector<const Out*>& grad, const Gradients& to) {
  const int64_t C = plan.channels;
  plan.parallel([&](int64_t task, int64_t b, int64_t begin, int64_t end) {
    Buffer rows(4 + J + 2, C);
    // y and the row before it; the gradient of y; pull, the part of it that comes from the mixes of the next step.
    float *y = rows[0], *before = rows[1], *grad_y = rows[2], *pull = rows[3];
    float *sum_weight = rows[4 + J], *sum_bias = rows[5 + J], *sum_mix[J];
    for (int64_t j = 0; j < J; ++j) sum_mix[j] = rows[4 + j];
    const auto normalised = [&](int64_t t, float* out) {
      const int64_t row = b * plan.steps + t;
      norm.write(x + row * C, mean_rstd[2 * row], mean_rstd[2 * row + 1], out);
    };
    // Sets g[j] to the gradient of mixed j at step t, and by[j] to its mix.
    const auto gradients = [&](int64_t t, const Out** g, const float** by) {
      for (int64_t j = 0; j < J; ++j) g[j] = grad[j] + (b * plan.steps + t) * C, by[j] = mix[j];
    };
    const Out* g[J];
    const float* by[J];
    if (end < plan.steps) {
      gradients(end, g, by);
      WKV_SIMD
      for (int64_t c = 0; c < C; ++c) {
        float to_previous = 0.0f;
        for (int64_t j = 0; j < J; ++j) to_previous += (1.0f - by[j][c]) * wkv::widen(g[j][c]);
        pull[c] = to_previous;
      }
    } else if (to.new_shift) {
      std::copy(to.new_shift + b * C, to.new_shift + (b + 1) * C, pull);
    }
    normalised(end - 1, y);
    for (int64_t t = end - 1; t >= begin; --t) {
      const int64_t row = b * plan.steps + t;
      const float *xt = x + row * C, mean = mean_rstd[2 * row], scale = mean_rstd[2 * row + 1];
      if (t > 0) {
        normalised(t - 1, before);
      } else if (shift) {
        std::copy(shift + b * C, shift + (b + 1) * C, before);
      } else {
        std::fill(before, before + C, 0.0f);
      }
      gradients(t, g, by);
      WKV_SIMD
      for (int64_t c = 0; c < C; ++c) {
        const float step = y[c] - before[c];
        float here = pull[c], to_previous = 0.0f;
        for (int64_t j = 0; j < J; ++j) {
          const float of = wkv::widen(g[j][c]);
          sum_mix[j][c] = multiply_add(of, step, sum_mix[j][c]);
          here = multiply_add(by[j][c], of, here);
          to_previous += multiply_add(-by[j][c], of, of);
        }
        grad_y[c] = here;
        pull[c] = to_previous;
      }
      // LayerNorm's gradient: dx = scale (dn - mean(dn) - n mean(dn n)), with n the normalised x and dn its gradient.
      const float* weight = norm.weight;
      const float mean_grad = wkv::sum(C, [=](int64_t c) { return grad_y[c] * weight[c]; }) / float(C);
      const float mean_grad_x =
          wkv::sum(C, [=](int64_t c) { return grad_y[c] * weight[c] * ((xt[c] - mean) * scale); }) / float(C);
      float* grad_x = to.x + row * C;
      const float* residual_grad = to.residual + row * C;
      WKV_SIMD
      for (int64_t c = 0; c < C; ++c) {
        const float n = (xt[c] - mean) * scale;
        sum_weight[c] = multiply_add(grad_y[c], n, sum_weight[c]);
        sum_bias[c] += grad_y[c];
        grad_x[c] =
            multiply_add(scale, multiply_add(grad_y[c], weight[c], -mean_grad) - n * mean_grad_x, residual_grad[c]);
      }
      std::swap(y, before);
    }
    if (begin == 0) std::copy(pull, pull + C, to.shift + b * C);
    for (int64_t j = 0; j < J + 2; ++j) std::copy(rows[4 + j], rows[4 + j] + C, to.sums + (task * (J + 2) + j) * C);
  });
}

void expect_all(const Plan& plan, const Tensor& x, const Tensor& weight, const Tensor& bias,
                const std::vector<Tensor>& mix, const std::optional<Tensor>& shift) {
  wkv::expect("norm_token_shift: x", x, {plan.batch, plan.steps, plan.channels}, ScalarType::Float);
  wkv::expect("norm_token_shift: weight", weight, {plan.channels}, ScalarType::Float);
  wkv::expect("norm_token_shift: bias", bias, {plan.channels}, ScalarType::Float);
  wkv::expect("norm_token_shift: shift", shift, {plan.batch, plan.channels}, ScalarType::Float);
  for (const Tensor& by : mix) {
    STD_TORCH_CHECK(by.numel() == plan.channels && by.scalar_type() == ScalarType::Float,
                    "norm_token_shift: a mix has not ", plan.channels, " numbers of float32");
  }
}

std::vector<Tensor> contiguous_all(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> all;
  for (const Tensor& t : tensors) all.push_back(torch::stable::contiguous(t));
  return all;
}

template <typename T>
std::vector<T*> pointers(const std::vector<Tensor>& tensors) {
  std::vector<T*> all;
  for (const Tensor& t : tensors) all.push_back(data<T>(t));
  return all;
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> norm_token_shift(
    const Tensor& x, const Tensor& weight, const Tensor& bias, std::vector<Tensor> mix,
    const std::optional<Tensor>& shift, double epsilon, bool is_bf16) {
  using torch::stable::new_empty;
  const Plan plan(x);
  expect_all(plan, x, weight, bias, mix, shift);
  const Tensor xc = torch::stable::contiguous(x), w = torch::stable::contiguous(weight),
               b = torch::stable::contiguous(bias);
  const std::optional<Tensor> l = contiguous(shift);
  const std::vector<Tensor> m = contiguous_all(mix);
  std::vector<Tensor> mixed;
  for (size_t j = 0; j < m.size(); ++j) {
    mixed.push_back(new_empty(x, {plan.batch, plan.steps, plan.channels},
                              is_bf16 ? ScalarType::BFloat16 : ScalarType::Float));
  }
  const Tensor new_shift = new_empty(x, {plan.batch, plan.channels});
  const Tensor mean_rstd = new_empty(x, {plan.batch, plan.steps, 2});
  wkv::dispatch_type(is_bf16, [&](auto zero) {
    using Out = decltype(zero);
    forward<Out>(plan, {data<float>(w), data<float>(b), plan.channels}, data<float>(xc), pointers<const float>(m),
                 data<float>(l), float(epsilon), pointers<Out>(mixed), data<float>(new_shift), data<float>(mean_rstd));
  });
  return {mixed, new_shift, mean_rstd};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>, Tensor> norm_token_shift_backward(
    const Tensor& x, const Tensor& weight, const Tensor& bias, std::vector<Tensor> mix,
    const std::optional<Tensor>& shift, const Tensor& mean_rstd, std::vector<Tensor> grad, const Tensor& grad_residual,
    const std::optional<Tensor>& grad_new_shift) {
  using torch::stable::new_empty;
  const Plan plan(x);
  const int64_t C = plan.channels, J = int64_t(mix.size());
  expect_all(plan, x, weight, bias, mix, shift);
  STD_TORCH_CHECK(J == 1 || J == 2 || J == 3 || J == 6,
                  "norm_token_shift: 1, 2, 3 or 6 mixes have a gradient, not ", J);
  STD_TORCH_CHECK(int64_t(grad.size()) == J, "norm_token_shift: ", grad.size(), " gradients of ", J, " mixes");
  for (const Tensor& of : grad) {
    wkv::expect("norm_token_shift: a gradient", of, {plan.batch, plan.steps, C}, grad[0].scalar_type());
  }
  wkv::expect("norm_token_shift: mean_rstd", mean_rstd, {plan.batch, plan.steps, 2}, ScalarType::Float);
  wkv::expect("norm_token_shift: the residual's gradient", grad_residual, {plan.batch, plan.steps, C},
              ScalarType::Float);
  wkv::expect("norm_token_shift: the gradient of shift", grad_new_shift, {plan.batch, C}, ScalarType::Float);
  const Tensor xc = torch::stable::contiguous(x), w = torch::stable::contiguous(weight),
               b = torch::stable::contiguous(bias), residual_grad = torch::stable::contiguous(grad_residual);
  const std::optional<Tensor> l = contiguous(shift), gl = contiguous(grad_new_shift);
  const std::vector<Tensor> m = contiguous_all(mix), g = contiguous_all(grad);
  const Tensor grad_x = new_empty(x, {plan.batch, plan.steps, C}), grad_shift = new_empty(x, {plan.batch, C});
  const Tensor grad_weight = new_empty(x, {C}), grad_bias = new_empty(x, {C});
  std::vector<Tensor> grad_mix;
  for (const Tensor& of : mix) grad_mix.push_back(new_empty(x, of.sizes()));
  std::vector<float> sums(plan.batch * plan.tasks * (J + 2) * C);
  const auto of = [&](auto j) {
    wkv::dispatch_type(g[0].scalar_type() == ScalarType::BFloat16, [&](auto zero) {
      using Out = decltype(zero);
      backward<j, Out>(plan, {data<float>(w), data<float>(b), C}, data<float>(xc), pointers<const float>(m),
                       data<float>(l), data<float>(mean_rstd), pointers<const Out>(g),
                       {data<float>(residual_grad), data<float>(gl), data<float>(grad_x),
                        data<float>(grad_shift), sums.data()});
    });
  };
  if (J == 1) of(std::integral_constant<int64_t, 1>());
  if (J == 2) of(std::integral_constant<int64_t, 2>());
  if (J == 3) of(std::integral_constant<int64_t, 3>());
  if (J == 6) of(std::integral_constant<int64_t, 6>());
  for (int64_t j = 0; j < J + 2; ++j) {
    float* to = data<float>(j < J ? grad_mix[j] : j == J ? grad_weight : grad_bias);
    std::fill(to, to + C, 0.0f);
    for (int64_t task = 0; task < plan.batch * plan.tasks; ++task) {
      const float* from = sums.data() + (task * (J + 2) + j) * C;
      for (int64_t c = 0; c < C; ++c) to[c] += from[c];
    }
  }
  return {grad_x, grad_weight, grad_bias, grad_mix, grad_shift};
}

}  // namespace

// x (B, T, C), weight and bias (C,), each mix with C numbers, shift (B, C), mean_rstd (B, T, 2) and their gradients are
// float32. The mixed (B, T, C) and their gradients are float32, or bfloat16 if is_bf16. grad_residual is the gradient
// of x from the residual connection around the norm; grad_x includes it.
STABLE_TORCH_LIBRARY_FRAGMENT(rwkv_pl, m) {
  m.def("norm_token_shift(Tensor x, Tensor weight, Tensor bias, Tensor[] mix, Tensor? shift, float epsilon,"
        " bool is_bf16)"
        " -> (Tensor[] mixed, Tensor shift, Tensor mean_rstd)");
  m.def("norm_token_shift_backward(Tensor x, Tensor weight, Tensor bias, Tensor[] mix, Tensor? shift, Tensor mean_rstd,"
        " Tensor[] grad, Tensor grad_residual, Tensor? grad_new_shift)"
        " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor[] grad_mix, Tensor grad_shift)");
}

STABLE_TORCH_LIBRARY_IMPL(rwkv_pl, CPU, m) {
  m.impl("norm_token_shift", WKV_BOX(norm_token_shift));
  m.impl("norm_token_shift_backward", WKV_BOX(norm_token_shift_backward));
}
