// The lower bound on the time per token: read every weight once. Summing keeps the compiler from removing the reads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <vector>

#include "cpu_lanes.h"

namespace {

using torch::stable::Tensor;

constexpr int64_t LANES = 64, AHEAD = 8192;

double read_weights(std::vector<Tensor> weights) {
  const int64_t threads = torch::stable::get_num_threads();
  std::atomic<double> total = 0;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    float sums[LANES] = {};
    for (const Tensor& weight : weights) {
      const float* p = static_cast<const float*>(weight.data_ptr());
      const int64_t begin = first * weight.numel() / threads, end = last * weight.numel() / threads;
      for (int64_t i = begin; i + LANES <= end; i += LANES) {
        for (int64_t line = 0; line < LANES; line += 16) WKV_PREFETCH(reinterpret_cast<const char*>(p + i + line) + AHEAD);
        WKV_SIMD
        for (int64_t l = 0; l < LANES; ++l) sums[l] += p[i + l];
      }
    }
    double sum = 0;
    for (const float x : sums) sum += x;
    total = total + sum;
  });
  return total;
}

}  // namespace

STABLE_TORCH_LIBRARY(rwkv_pl_benchmarks, m) { m.def("read_weights(Tensor[] weights) -> float"); }

STABLE_TORCH_LIBRARY_IMPL(rwkv_pl_benchmarks, CPU, m) { m.impl("read_weights", TORCH_BOX(&read_weights)); }
