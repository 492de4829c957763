// Compiler hints for the CPU kernels.

#pragma once

// Placed before a loop over lanes: its iterations are independent. Not `omp simd`, with which gcc 12 makes arrays of
// structs.
#if defined(__clang__)
#define WKV_SIMD _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define WKV_SIMD _Pragma("GCC ivdep")
#elif defined(_MSC_VER)
#define WKV_SIMD __pragma(loop(ivdep))
#else
#define WKV_SIMD
#endif

// Prefetches the cache line at p into the L2 cache, which leaves the few fill buffers of the L1 cache to the current
// loads. p may be past the end of the array.
#if defined(__GNUC__)
#define WKV_PREFETCH(p) __builtin_prefetch(p, 0, 2)
#else
#define WKV_PREFETCH(p) (void)(p)
#endif
