// Runs both kernels of WKV-7 once, over two tiles, for the sanitizers.

// One dtype, since building with the sanitizer is slow.
#define FLOAT_ALONE
#include "wkv7_on_host.cpp"

int main() {
  const int64_t B = 1, T = wkv7::TILE + 3, H = 2, N = wkv7::N, tiles = 2;
  const std::vector<float> inputs(B * T * H * N, 0.1f), states(B * H * N * N, 0.1f);
  auto r = inputs, w = inputs, k = inputs, v = inputs, a = inputs, b = inputs, output = inputs, sa = inputs;
  auto g_r = inputs, g_w = inputs, g_k = inputs, g_v = inputs, g_a = inputs, g_b = inputs;
  auto state = states, new_state = states, g_state = states;
  std::vector<float> saved(B * H * tiles * N * N), scratch(B * H * wkv7::TILE / wkv7::KEPT * N * N);
  const int64_t forward[] = {B, T, H, 0}, backward[] = {B, T, H, 1};
  void* results[] = {r.data(),     w.data(),  k.data(),     v.data(),      a.data(),        b.data(),
                     saved.data(), sa.data(), state.data(), output.data(), new_state.data()};
  void* gradients[] = {r.data(),   w.data(),   k.data(),       v.data(),       a.data(),   b.data(),
                       saved.data(), sa.data(), output.data(), new_state.data(), g_r.data(), g_w.data(),
                       g_k.data(), g_v.data(), g_a.data(),     g_b.data(),     g_state.data(), scratch.data()};
  return call_wkv7(0, forward, results) || call_wkv7(0, backward, gradients);
}
