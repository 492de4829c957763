// Runs every kernel once, with two of its tiles, for ThreadSanitizer.

// One dtype, since building with the sanitizer is slow.
#define FLOAT_ALONE
#include "wkv4_on_host.cpp"

int main() {
  const int kernels[][2] = {{0, 64}, {1, 8}, {2, 32}, {3, 256}};
  for (const auto& [kernel, tile] : kernels) {
    const int64_t B = 2, T = tile + 3, C = 5, tiles = 2;
    std::vector<float> key(B * T * C, 0.5f), saved(B * (tiles + 1) * 4 * C), channel(C, -1.0f), state(B * 3 * C);
    auto value = key, output = key, grad_key = key, grad_value = key, new_state = state, grad_state = state;
    std::vector<float> share(B * C), share_2(B * C), sum(C), sum_2(C);
    const int64_t forward[] = {B, T, C, tile, 0}, backward[] = {B, T, C, tile, 1};
    void* results[] = {channel.data(), channel.data(), key.data(),    value.data(),
                       saved.data(),   state.data(),   output.data(), new_state.data()};
    void* gradients[] = {channel.data(),   channel.data(),    key.data(),        value.data(), saved.data(),
                         output.data(),    new_state.data(),  grad_key.data(),   grad_value.data(),
                         grad_state.data(), share.data(),     share_2.data(),    sum.data(),   sum_2.data()};
    if (wkv4(0, kernel, forward, results) || wkv4(0, kernel, backward, gradients)) return 1;
  }
}
