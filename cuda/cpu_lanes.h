// How the CPU's kernels tell a compiler what it may do.

#pragma once

// Before a loop over lanes: its iterations are independent. Not `omp simd`, which gcc 12 turns into arrays of structs.
#if defined(__clang__)
#define WKV_SIMD _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define WKV_SIMD _Pragma("GCC ivdep")
#elif defined(_MSC_VER)
#define WKV_SIMD __pragma(loop(ivdep))
#else
#define WKV_SIMD
#endif

// A function apart, where mixed into a loop over its calls it would be made worse.
#if defined(_MSC_VER)
#define WKV_NOINLINE __declspec(noinline)
#else
#define WKV_NOINLINE __attribute__((noinline))
#endif

// Asks for the cache line at p ahead of its use, into the second cache: the first one's few places for lines on their
// way are then free for what is used now. p may lie past the end of what is read.
#if defined(__GNUC__)
#define WKV_PREFETCH(p) __builtin_prefetch(p, 0, 2)
#else
#define WKV_PREFETCH(p) (void)(p)
#endif
