"""Measures whether bfloat16 is faster than float32 on this device; most laptops have no instructions for it.

Without these instructions, a product can take hundreds of times as long. No flag reports that reliably: oneDNN claims
support on processors that only emulate it too.
"""

import os
import time

import torch
from torch import Tensor

from rwkv_pl.ops.linear import gradient_of_input, gradient_of_weight, product

# If bfloat16 is slower than this share of float32 on a small product, that decides: a large one would take seconds.
HOPELESS = 0.25
# Ratios closer to 1 than this are printed as equal.
SIMILAR = 1.1
SMALL_TOKENS, SMALL_EMBD = 64, 128
MOST_TOKENS = 1024
CALLS = 3
# The CPU time of the thread, which other jobs on the cores do not increase. On Windows its resolution is only 16 ms.
CLOCK = time.perf_counter if os.name == "nt" else time.thread_time


def measure_product_rates(device: torch.device, tokens: int, n_embd: int) -> dict[torch.dtype, float]:
    """Measure the floating-point operations per second of a product and its two gradients, in float32 and bfloat16.

    On a CPU, the rates are those of one thread. The product is the first one of the channel mixing, (tokens, n_embd)
    by (n_embd, 4 n_embd). The measurement takes a few milliseconds, or a second for a large model.
    """
    small = _measure_rates(device, SMALL_TOKENS, min(n_embd, SMALL_EMBD))
    if small[torch.bfloat16] < HOPELESS * small[torch.float32]:
        return small
    return _measure_rates(device, min(tokens, MOST_TOKENS), n_embd)


@torch.no_grad()
def _measure_rates(device: torch.device, tokens: int, n_embd: int) -> dict[torch.dtype, float]:
    numbers = torch.Generator(device).manual_seed(0)
    shapes = (tokens, n_embd), (4 * n_embd, n_embd), (tokens, 4 * n_embd)
    float32 = [torch.randn(shape, device=device, generator=numbers) for shape in shapes]
    factors = {torch.float32: float32, torch.bfloat16: [x.bfloat16() for x in float32]}
    best = dict.fromkeys(factors, float("inf"))
    threads = torch.get_num_threads()
    # One thread, because CLOCK measures only this one.
    torch.set_num_threads(1)
    try:
        for call in range(CALLS + 1):
            for dtype, (x, weight, gradient) in factors.items():
                seconds = _time_product(x, weight, gradient)
                if call:  # the first call is a warm-up
                    best[dtype] = min(best[dtype], seconds)
    finally:
        torch.set_num_threads(threads)
    return {dtype: 3 * 2 * tokens * n_embd * 4 * n_embd / seconds for dtype, seconds in best.items()}


def _time_product(x: Tensor, weight: Tensor, gradient: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    clock = time.perf_counter if x.is_cuda else CLOCK
    started = clock()
    product(x, weight)
    gradient_of_input(gradient, weight)
    gradient_of_weight(gradient, x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return clock() - started


def describe_speedup(speedup: float) -> str:
    """Format a speed ratio as "2.1 times as fast as", "about as fast as" or "15 times slower than"."""
    if 1 / SIMILAR < speedup < SIMILAR:
        return "about as fast as"
    return f"{speedup:.1f} times as fast as" if speedup >= 1 else f"{1 / speedup:.2g} times slower than"
