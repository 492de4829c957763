// The part of CUDA that cuda/*.cuh use, for g++ -std=c++20: one CPU thread per CUDA thread, one block after another.
// Invalid launches fail like real ones.
//
// ThreadSanitizer reports a race between two threads of a block unless __syncthreads orders them. A real shuffle does not
// order memory, so the synchronisation inside the shuffle below is hidden from the sanitizer.

#pragma once

#include <barrier>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static
#define __launch_bounds__(...)

#if defined(__SANITIZE_THREAD__)
extern "C" {
void AnnotateIgnoreSyncBegin(const char*, int);
void AnnotateIgnoreSyncEnd(const char*, int);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
struct Unseen {
  Unseen() { AnnotateIgnoreSyncBegin("", 0), AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
  ~Unseen() { AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0), AnnotateIgnoreSyncEnd("", 0); }
};
#else
struct Unseen {
  ~Unseen() {}
};
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim;

struct Block {
  static constexpr int WARP = 32;
  std::barrier<> all;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  std::vector<double> lanes;

  explicit Block(int threads) : all(threads), lanes(threads) {
    for (int first = 0; first < threads; first += WARP) {
      warps.push_back(std::make_unique<std::barrier<>>(threads - first < WARP ? threads - first : WARP));
    }
  }
};
inline Block* the_block;

inline void __syncthreads() { the_block->all.arrive_and_wait(); }

template <typename N>
N shuffle(N x, int from_lane) {
  const Unseen unseen;
  const int thread = threadIdx.x, first = thread / Block::WARP * Block::WARP;
  std::barrier<>& warp = *the_block->warps[thread / Block::WARP];
  the_block->lanes[thread] = x;
  warp.arrive_and_wait();
  const N other = N(the_block->lanes[first + from_lane]);
  warp.arrive_and_wait();
  return other;
}

template <typename N>
N __shfl_up_sync(unsigned, N x, int lanes, int width = Block::WARP) {
  const int lane = threadIdx.x % Block::WARP;
  return shuffle(x, lane % width >= lanes ? lane - lanes : lane);
}

template <typename N>
N __shfl_down_sync(unsigned, N x, int lanes, int width = Block::WARP) {
  const int lane = threadIdx.x % Block::WARP;
  return shuffle(x, lane % width + lanes < width ? lane + lanes : lane);
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const int threads = config->blockDim.x;
  if (config->gridDim.x == 0 || threads == 0 || threads > 1024) return cudaErrorInvalidConfiguration;
  for (unsigned block = 0; block < config->gridDim.x; ++block) {
    Block here(threads);
    the_block = &here;
    std::vector<std::thread> running;
    for (int i = 0; i < threads; ++i) {
      running.emplace_back([&, i] {
        threadIdx = {unsigned(i)}, blockIdx = {block}, blockDim = config->blockDim;
        kernel(arguments...);
        // A thread that has returned counts as arrived at every barrier.
        here.warps[i / Block::WARP]->arrive_and_drop();
        here.all.arrive_and_drop();
      });
    }
    for (std::thread& thread : running) thread.join();
  }
  return cudaSuccess;
}
