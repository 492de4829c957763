// The elementwise operations of RWKV-7's time mixing, fused, on the CPU; each direction is one pass over memory.
//
//   prepare   from the products of a token's mixes to the inputs of the WKV operator. Per head, with u = k k_k:
//               decay = w0 + w       rate = sigmoid(a0 + r)       kk = u / |u|
//               key   = k (1 + (rate - 1) k_a)       a = -kk       b = rate kk
//               value = v + sigmoid(v0 + m) (v_first - v), if there is a v_first
//   output    from the operator's output y to the input of the last product. Per head:
//               (GroupNorm(y) weight + bias + (sum of receptance key r_k) value) gate
//
// w, r and m are the low-rank products. A head has N = 64 of the C channels of a token. A task is ROWS tokens. Each has
// separate sums over its rows for the gradients of the parameters, and these are added in order. The tasks do not
// depend on the threads, so any number of threads gives the same bits.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu_numbers.h"
#include "tensor.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using wkv::contiguous;
using wkv::data;
using wkv::multiply_add;
using wkv::narrow;
using wkv::widen;

constexpr int64_t N = 64;
constexpr int64_t ROWS = 64;
// As in torch.nn.functional.normalize.
constexpr float SMALLEST_NORM = 1e-12f;

struct Plan {
  int64_t batch, steps, channels, rows, tasks;

  explicit Plan(const Tensor& x)
      : batch(x.size(0)), steps(x.size(1)), channels(x.size(2)), rows(batch * steps), tasks((rows + ROWS - 1) / ROWS) {
    STD_TORCH_CHECK(channels >= N && channels % N == 0, "rwkv7: channels must be a multiple of 64, not ", channels);
  }

  // Calls f(task, position of the head in the tensors, its first channel) for each head of each token.
  template <typename F>
  void parallel(const F& f) const {
    // The least work of a thread is about 20 microseconds.
    const int64_t grain = std::max<int64_t>(1, 8192 / (ROWS * channels));
    torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        for (int64_t row = task * ROWS; row < std::min(rows, (task + 1) * ROWS); ++row) {
          for (int64_t c = 0; c < channels; c += N) f(task, row * channels + c, c);
        }
      }
    });
  }

  Tensor like(const Tensor& t, ScalarType type) const {
    return torch::stable::new_empty(t, {batch, steps, channels}, type);
  }
  Tensor like(const Tensor& t) const { return like(t, t.scalar_type()); }

  // Adds the tasks' sums, (tasks, parameters, C), in order.
  void add(const std::vector<float>& sums, const std::vector<float*>& parameters) const {
    for (size_t p = 0; p < parameters.size(); ++p) {
      std::fill(parameters[p], parameters[p] + channels, 0.0f);
      for (int64_t task = 0; task < tasks; ++task) {
        const float* from = sums.data() + (task * parameters.size() + p) * channels;
        for (int64_t c = 0; c < channels; ++c) parameters[p][c] += from[c];
      }
    }
  }
};

template <typename IO>
struct Products {
  const IO *key, *value, *decay, *rate, *mix, *v_first;
};
struct Vectors {
  const float *w0, *a0, *v0, *k_k, *k_a;
};

// The key k, the rate and the direction kk of one head; scale is 1 / |u|, and fixed if |u| is too small.
struct Head {
  alignas(64) float k[N], rate[N], kk[N];
  float scale;
  bool is_fixed;

  template <typename IO>
  WKV_INLINE Head(const Products<IO>& x, const Vectors& by, int64_t at, int64_t c) {
    WKV_SIMD
    for (int64_t i = 0; i < N; ++i) {
      k[i] = widen(x.key[at + i]);
      kk[i] = k[i] * by.k_k[c + i];
      rate[i] = wkv::sigmoid(by.a0[c + i] + widen(x.rate[at + i]));
    }
    const float norm = std::sqrt(wkv::sum(N, [this](int64_t i) { return kk[i] * kk[i]; }));
    is_fixed = norm < SMALLEST_NORM;
    scale = 1.0f / (is_fixed ? SMALLEST_NORM : norm);
    WKV_SIMD
    for (int64_t i = 0; i < N; ++i) kk[i] *= scale;
  }
};

template <typename IO>
struct Prepared {
  float* decay;
  IO *key, *value, *a, *b;
};

template <typename IO>
void prepare(const Plan& plan, const Products<IO>& x, const Vectors& by, const Prepared<IO>& to) {
  plan.parallel([&](int64_t, int64_t at, int64_t c) {
    const Head head(x, by, at, c);
    WKV_SIMD
    for (int64_t i = 0; i < N; ++i) {
      to.decay[at + i] = by.w0[c + i] + widen(x.decay[at + i]);
      to.key[at + i] = narrow<IO>(head.k[i] * multiply_add(head.rate[i] - 1.0f, by.k_a[c + i], 1.0f));
      to.a[at + i] = narrow<IO>(-head.kk[i]);
      to.b[at + i] = narrow<IO>(head.rate[i] * head.kk[i]);
    }
    if (!x.v_first) return;
    WKV_SIMD
    for (int64_t i = 0; i < N; ++i) {
      const float v = widen(x.value[at + i]), share = wkv::sigmoid(by.v0[c + i] + widen(x.mix[at + i]));
      to.value[at + i] = narrow<IO>(multiply_add(share, widen(x.v_first[at + i]) - v, v));
    }
  });
}

// The gradients that arrive; those of key and value come from two places.
template <typename IO>
struct PreparedGradients {
  const float* decay;
  const IO *key, *key2, *value, *value2, *a, *b;
};
template <typename IO>
struct ProductGradients {
  IO *key, *value, *decay, *rate, *mix, *v_first;
};

// sums is (tasks, 5, C): w0, a0, k_k, k_a, v0.
template <typename IO>
void prepare_backward(const Plan& plan, const Products<IO>& x, const Vectors& by, const PreparedGradients<IO>& g,
                      const ProductGradients<IO>& to, float* sums) {
  plan.parallel([&](int64_t task, int64_t at, int64_t c) {
    const int64_t C = plan.channels;
    float *sum_w0 = sums + task * 5 * C + c, *sum_a0 = sum_w0 + C, *sum_k_k = sum_a0 + C, *sum_k_a = sum_k_k + C,
          *sum_v0 = sum_k_a + C;
    const Head head(x, by, at, c);
    alignas(64) float grad_kk[N];
    WKV_SIMD
    for (int64_t i = 0; i < N; ++i) grad_kk[i] = multiply_add(head.rate[i], widen(g.b[at + i]), -widen(g.a[at + i]));
    // A fixed scale does not depend on u.
    const float along = head.is_fixed ? 0.0f : wkv::sum(N, [&](int64_t i) { return head.kk[i] * grad_kk[i]; });
    WKV_SIMD
    for (int64_t i = 0; i < N; ++i) {
      const float k = head.k[i], rate = head.rate[i], k_a = by.k_a[c + i];
      const float grad_key = widen(g.key[at + i]) + widen(g.key2[at + i]);
      const float grad_u = multiply_add(-head.kk[i], along, grad_kk[i]) * head.scale;
      const float grad_rate = multiply_add(widen(g.b[at + i]), head.kk[i], grad_key * k * k_a) * rate * (1.0f - rate);
      to.key[at + i] = narrow<IO>(multiply_add(grad_u, by.k_k[c + i], grad_key * multiply_add(rate - 1.0f, k_a, 1.0f)));
      to.rate[at + i] = narrow<IO>(grad_rate);
      to.decay[at + i] = narrow<IO>(g.decay[at + i]);
      sum_w0[i] += g.decay[at + i];
      sum_a0[i] += grad_rate;
      sum_k_k[i] = multiply_add(grad_u, k, sum_k_k[i]);
      sum_k_a[i] = multiply_add(grad_key * k, rate - 1.0f, sum_k_a[i]);
    }
    if (x.v_first) {
      WKV_SIMD
      for (int64_t i = 0; i < N; ++i) {
        const float grad_value = widen(g.value[at + i]) + widen(g.value2[at + i]);
        const float share = wkv::sigmoid(by.v0[c + i] + widen(x.mix[at + i]));
        const float grad_mix =
            grad_value * (widen(x.v_first[at + i]) - widen(x.value[at + i])) * share * (1.0f - share);
        to.value[at + i] = narrow<IO>(grad_value * (1.0f - share));
        to.v_first[at + i] = narrow<IO>(grad_value * share);
        to.mix[at + i] = narrow<IO>(grad_mix);
        sum_v0[i] += grad_mix;
      }
    } else {
      WKV_SIMD
      for (int64_t i = 0; i < N; ++i) {
        to.value[at + i] = narrow<IO>(widen(g.value[at + i]) + widen(g.value2[at + i]));
      }
    }
  });
}

template <typename IO>
struct OutputInputs {
  const IO *wkv, *receptance, *key, *value, *gate;
  const float *r_k, *weight, *bias;
  float epsilon;
};

// The normalised output n of one head, 1 / its standard deviation, and the bonus of the present token.
struct Normalised {
  alignas(64) float n[N];
  float rstd, bonus;

  template <typename IO>
  WKV_INLINE Normalised(const OutputInputs<IO>& x, int64_t at, int64_t c) {
    WKV_SIMD
    for (int64_t i = 0; i < N; ++i) n[i] = widen(x.wkv[at + i]);
    const float mean = wkv::sum(N, [this](int64_t i) { return n[i]; }) / float(N);
    WKV_SIMD
    for (int64_t i = 0; i < N; ++i) n[i] -= mean;
    const float variance = wkv::sum(N, [this](int64_t i) { return n[i] * n[i]; }) / float(N);
    // If the variance overflows float32, the result is NaN instead of a wrong number.
    rstd = (1.0f + 0.0f * variance) / std::sqrt(variance + x.epsilon);
    WKV_SIMD
    for (int64_t i = 0; i < N; ++i) n[i] *= rstd;
    bonus = wkv::sum(N, [&](int64_t i) { return widen(x.receptance[at + i]) * widen(x.key[at + i]) * x.r_k[c + i]; });
  }
};

template <typename IO>
void output(const Plan& plan, const OutputInputs<IO>& x, IO* to) {
  plan.parallel([&](int64_t, int64_t at, int64_t c) {
    const Normalised head(x, at, c);
    WKV_SIMD
    for (int64_t i = 0; i < N; ++i) {
      const float y = multiply_add(head.n[i], x.weight[c + i], x.bias[c + i]);
      to[at + i] = narrow<IO>(multiply_add(head.bonus, widen(x.value[at + i]), y) * widen(x.gate[at + i]));
    }
  });
}

template <typename IO>
struct OutputGradients {
  IO *wkv, *receptance, *key, *value, *gate;
};

// sums is (tasks, 3, C): r_k, weight, bias.
template <typename IO>
void output_backward(const Plan& plan, const IO* grad, const OutputInputs<IO>& x, const OutputGradients<IO>& to,
                     float* sums) {
  plan.parallel([&](int64_t task, int64_t at, int64_t c) {
    float *sum_r_k = sums + task * 3 * plan.channels + c, *sum_weight = sum_r_k + plan.channels,
          *sum_bias = sum_weight + plan.channels;
    const Normalised head(x, at, c);
    alignas(64) float inner[N], grad_n[N];
    WKV_SIMD
    for (int64_t i = 0; i < N; ++i) {
      const float of = widen(grad[at + i]), v = widen(x.value[at + i]);
      const float y = multiply_add(head.n[i], x.weight[c + i], x.bias[c + i]);
      inner[i] = of * widen(x.gate[at + i]);
      grad_n[i] = inner[i] * x.weight[c + i];
      to.gate[at + i] = narrow<IO>(of * multiply_add(head.bonus, v, y));
      to.value[at + i] = narrow<IO>(inner[i] * head.bonus);
      sum_weight[i] = multiply_add(inner[i], head.n[i], sum_weight[i]);
      sum_bias[i] += inner[i];
    }
    const float mean = wkv::sum(N, [&](int64_t i) { return grad_n[i]; }) / float(N);
    const float along = wkv::sum(N, [&](int64_t i) { return grad_n[i] * head.n[i]; }) / float(N);
    const float grad_bonus = wkv::sum(N, [&](int64_t i) { return inner[i] * widen(x.value[at + i]); });
    WKV_SIMD
    for (int64_t i = 0; i < N; ++i) {
      const float r = widen(x.receptance[at + i]), k = widen(x.key[at + i]), r_k = grad_bonus * x.r_k[c + i];
      to.wkv[at + i] = narrow<IO>(head.rstd * (grad_n[i] - mean - head.n[i] * along));
      to.receptance[at + i] = narrow<IO>(r_k * k);
      to.key[at + i] = narrow<IO>(r_k * r);
      sum_r_k[i] = multiply_add(grad_bonus * r, k, sum_r_k[i]);
    }
  });
}

// A contiguous (B, T, C) tensor of the type of the products.
Tensor rows(const char* what, const Plan& plan, const Tensor& t, ScalarType type) {
  wkv::expect(what, t, {plan.batch, plan.steps, plan.channels}, type);
  return torch::stable::contiguous(t);
}
std::optional<Tensor> rows(const char* what, const Plan& plan, const std::optional<Tensor>& t, ScalarType type) {
  return t ? std::optional<Tensor>(rows(what, plan, *t, type)) : std::nullopt;
}
// A contiguous parameter with C numbers of float32.
Tensor vector(const char* what, const Plan& plan, const Tensor& t) {
  STD_TORCH_CHECK(t.numel() == plan.channels && t.scalar_type() == ScalarType::Float, what, " has not ", plan.channels,
                  " numbers of float32");
  return torch::stable::contiguous(t);
}

// The checked, contiguous arguments of prepare and of its backward pass.
struct PrepareArguments {
  Plan plan;
  ScalarType type;
  Tensor k, v, w, r, w0, a0, k_k, k_a;
  std::optional<Tensor> m, first, v0;

  PrepareArguments(const Tensor& key, const Tensor& value, const Tensor& decay, const Tensor& rate,
                   const std::optional<Tensor>& mix, const std::optional<Tensor>& v_first, const Tensor& w0,
                   const Tensor& a0, const std::optional<Tensor>& v0, const Tensor& k_k, const Tensor& k_a)
      : plan(key),
        type(key.scalar_type()),
        k(rows("rwkv7_prepare: key", plan, key, type)),
        v(rows("rwkv7_prepare: value", plan, value, type)),
        w(rows("rwkv7_prepare: decay", plan, decay, type)),
        r(rows("rwkv7_prepare: rate", plan, rate, type)),
        w0(vector("rwkv7_prepare: w0", plan, w0)),
        a0(vector("rwkv7_prepare: a0", plan, a0)),
        k_k(vector("rwkv7_prepare: k_k", plan, k_k)),
        k_a(vector("rwkv7_prepare: k_a", plan, k_a)),
        m(rows("rwkv7_prepare: mix", plan, mix, type)),
        first(rows("rwkv7_prepare: v_first", plan, v_first, type)) {
    STD_TORCH_CHECK(bool(mix) == bool(v_first) && bool(v0) == bool(v_first),
                    "rwkv7_prepare: mix, v_first and v0 go together");
    if (v0) this->v0 = vector("rwkv7_prepare: v0", plan, *v0);
  }

  template <typename IO>
  Products<IO> products() const {
    return {data<IO>(k), data<IO>(v), data<IO>(w), data<IO>(r), data<IO>(m), data<IO>(first)};
  }
  Vectors vectors() const {
    return {data<float>(w0), data<float>(a0), data<float>(v0), data<float>(k_k), data<float>(k_a)};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rwkv7_prepare(
    const Tensor& key, const Tensor& value, const Tensor& decay, const Tensor& rate, const std::optional<Tensor>& mix,
    const std::optional<Tensor>& v_first, const Tensor& w0, const Tensor& a0, const std::optional<Tensor>& v0,
    const Tensor& k_k, const Tensor& k_a) {
  const PrepareArguments x(key, value, decay, rate, mix, v_first, w0, a0, v0, k_k, k_a);
  const Plan& plan = x.plan;
  const Tensor to_decay = plan.like(key, ScalarType::Float), to_key = plan.like(key), to_a = plan.like(key),
               to_b = plan.like(key);
  const Tensor to_value = v_first ? plan.like(key) : torch::stable::new_empty(key, {0});
  wkv::dispatch_type(x.type == ScalarType::BFloat16, [&](auto zero) {
    using IO = decltype(zero);
    prepare<IO>(plan, x.products<IO>(), x.vectors(),
                {data<float>(to_decay), data<IO>(to_key), data<IO>(to_value), data<IO>(to_a), data<IO>(to_b)});
  });
  return {to_decay, to_key, to_value, to_a, to_b};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>> rwkv7_prepare_backward(
    const Tensor& key, const Tensor& value, const Tensor& decay, const Tensor& rate, const std::optional<Tensor>& mix,
    const std::optional<Tensor>& v_first, const Tensor& w0, const Tensor& a0, const std::optional<Tensor>& v0,
    const Tensor& k_k, const Tensor& k_a, const Tensor& grad_decay, std::vector<Tensor> grad_key,
    std::vector<Tensor> grad_value, const Tensor& grad_a, const Tensor& grad_b) {
  using torch::stable::new_empty;
  const PrepareArguments x(key, value, decay, rate, mix, v_first, w0, a0, v0, k_k, k_a);
  const Plan& plan = x.plan;
  STD_TORCH_CHECK(grad_key.size() == 2 && grad_value.size() == 2, "rwkv7_prepare: key and value have two gradients");
  const auto gradient = [&](const Tensor& t, ScalarType type) {
    return rows("rwkv7_prepare: a gradient", plan, t, type);
  };
  const Tensor gw = gradient(grad_decay, ScalarType::Float), gk = gradient(grad_key[0], x.type),
               gk2 = gradient(grad_key[1], x.type), gv = gradient(grad_value[0], x.type),
               gv2 = gradient(grad_value[1], x.type), ga = gradient(grad_a, x.type), gb = gradient(grad_b, x.type);
  const Tensor to_key = plan.like(key), to_value = plan.like(key), to_decay = plan.like(key), to_rate = plan.like(key);
  const Tensor to_mix = v_first ? plan.like(key) : new_empty(key, {0});
  const Tensor to_first = v_first ? plan.like(key) : new_empty(key, {0});
  std::vector<Tensor> parameters;
  std::vector<float*> pointers;
  for (const Tensor* of : {&x.w0, &x.a0, &x.k_k, &x.k_a}) parameters.push_back(new_empty(*of, of->sizes()));
  // Without v_first, its sums are 0 and belong to no parameter.
  parameters.push_back(new_empty(x.w0, v0 ? v0->sizes() : x.w0.sizes()));
  for (const Tensor& of : parameters) pointers.push_back(data<float>(of));
  std::vector<float> sums(plan.tasks * 5 * plan.channels);
  wkv::dispatch_type(x.type == ScalarType::BFloat16, [&](auto zero) {
    using IO = decltype(zero);
    prepare_backward<IO>(plan, x.products<IO>(), x.vectors(),
                         {data<float>(gw), data<IO>(gk), data<IO>(gk2), data<IO>(gv), data<IO>(gv2), data<IO>(ga),
                          data<IO>(gb)},
                         {data<IO>(to_key), data<IO>(to_value), data<IO>(to_decay), data<IO>(to_rate),
                          data<IO>(to_mix), data<IO>(to_first)},
                         sums.data());
  });
  plan.add(sums, pointers);
  return {to_key, to_value, to_decay, to_rate, to_mix, to_first, parameters};
}

// The checked, contiguous arguments of output and of its backward pass.
struct OutputArguments {
  Plan plan;
  ScalarType type;
  Tensor y, r, k, v, g, r_k, weight, bias;
  float epsilon;

  OutputArguments(const Tensor& wkv, const Tensor& receptance, const Tensor& key, const Tensor& value,
                  const Tensor& gate, const Tensor& r_k, const Tensor& weight, const Tensor& bias, double epsilon)
      : plan(wkv),
        type(wkv.scalar_type()),
        y(rows("rwkv7_output: wkv", plan, wkv, type)),
        r(rows("rwkv7_output: receptance", plan, receptance, type)),
        k(rows("rwkv7_output: key", plan, key, type)),
        v(rows("rwkv7_output: value", plan, value, type)),
        g(rows("rwkv7_output: gate", plan, gate, type)),
        r_k(vector("rwkv7_output: r_k", plan, r_k)),
        weight(vector("rwkv7_output: weight", plan, weight)),
        bias(vector("rwkv7_output: bias", plan, bias)),
        epsilon(float(epsilon)) {}

  template <typename IO>
  OutputInputs<IO> inputs() const {
    return {data<IO>(y), data<IO>(r), data<IO>(k), data<IO>(v), data<IO>(g),
            data<float>(r_k), data<float>(weight), data<float>(bias), epsilon};
  }
};

Tensor rwkv7_output(const Tensor& wkv, const Tensor& receptance, const Tensor& key, const Tensor& value,
                    const Tensor& gate, const Tensor& r_k, const Tensor& weight, const Tensor& bias, double epsilon) {
  const OutputArguments x(wkv, receptance, key, value, gate, r_k, weight, bias, epsilon);
  const Tensor to = x.plan.like(wkv);
  wkv::dispatch_type(x.type == ScalarType::BFloat16, [&](auto zero) {
    using IO = decltype(zero);
    output<IO>(x.plan, x.inputs<IO>(), data<IO>(to));
  });
  return to;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rwkv7_output_backward(
    const Tensor& grad, const Tensor& wkv, const Tensor& receptance, const Tensor& key, const Tensor& value,
    const Tensor& gate, const Tensor& r_k, const Tensor& weight, const Tensor& bias, double epsilon) {
  using torch::stable::new_empty;
  const OutputArguments x(wkv, receptance, key, value, gate, r_k, weight, bias, epsilon);
  const Tensor g = rows("rwkv7_output: the gradient", x.plan, grad, x.type);
  const Tensor to_wkv = x.plan.like(wkv), to_r = x.plan.like(wkv), to_k = x.plan.like(wkv), to_v = x.plan.like(wkv),
               to_g = x.plan.like(wkv);
  const Tensor to_r_k = new_empty(x.r_k, x.r_k.sizes()), to_weight = new_empty(x.weight, x.weight.sizes()),
               to_bias = new_empty(x.bias, x.bias.sizes());
  std::vector<float> sums(x.plan.tasks * 3 * x.plan.channels);
  wkv::dispatch_type(x.type == ScalarType::BFloat16, [&](auto zero) {
    using IO = decltype(zero);
    output_backward<IO>(x.plan, data<IO>(g), x.inputs<IO>(),
                        {data<IO>(to_wkv), data<IO>(to_r), data<IO>(to_k), data<IO>(to_v), data<IO>(to_g)},
                        sums.data());
  });
  x.plan.add(sums, {data<float>(to_r_k), data<float>(to_weight), data<float>(to_bias)});
  return {to_wkv, to_r, to_k, to_v, to_g, to_r_k, to_weight, to_bias};
}

}  // namespace

// Tensors of products (B, T, C) and their gradients are float32, or all bfloat16; parameters, decay of the result and
// its gradient are float32. C is a multiple of 64. mix, v_first and v0 are given in all layers but the first; without
// them, the value of the result and the gradients of mix and v_first are empty. The gradients of parameters are those
// of w0, a0, k_k, k_a and v0.
STABLE_TORCH_LIBRARY_FRAGMENT(rwkv_pl, m) {
  m.def("rwkv7_prepare(Tensor key, Tensor value, Tensor decay, Tensor rate, Tensor? mix, Tensor? v_first, Tensor w0,"
        " Tensor a0, Tensor? v0, Tensor k_k, Tensor k_a)"
        " -> (Tensor decay, Tensor key, Tensor value, Tensor a, Tensor b)");
  m.def("rwkv7_prepare_backward(Tensor key, Tensor value, Tensor decay, Tensor rate, Tensor? mix, Tensor? v_first,"
        " Tensor w0, Tensor a0, Tensor? v0, Tensor k_k, Tensor k_a, Tensor grad_decay, Tensor[] grad_key,"
        " Tensor[] grad_value, Tensor grad_a, Tensor grad_b) -> (Tensor grad_key, Tensor grad_value,"
        " Tensor grad_decay, Tensor grad_rate, Tensor grad_mix, Tensor grad_v_first, Tensor[] grad_parameters)");
  m.def("rwkv7_output(Tensor wkv, Tensor receptance, Tensor key, Tensor value, Tensor gate, Tensor r_k, Tensor weight,"
        " Tensor bias, float epsilon) -> Tensor");
  m.def("rwkv7_output_backward(Tensor grad, Tensor wkv, Tensor receptance, Tensor key, Tensor value, Tensor gate,"
        " Tensor r_k, Tensor weight, Tensor bias, float epsilon) -> (Tensor grad_wkv, Tensor grad_receptance,"
        " Tensor grad_key, Tensor grad_value, Tensor grad_gate, Tensor grad_r_k, Tensor grad_weight,"
        " Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(rwkv_pl, CPU, m) {
  m.impl("rwkv7_prepare", WKV_BOX(rwkv7_prepare));
  m.impl("rwkv7_prepare_backward", WKV_BOX(rwkv7_prepare_backward));
  m.impl("rwkv7_output", WKV_BOX(rwkv7_output));
  m.impl("rwkv7_output_backward", WKV_BOX(rwkv7_output_backward));
}
