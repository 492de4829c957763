"""The WKV-4 operator: one function with several kernels, selected by device or with `backend.use_kernel`.

B  sequences    T  time steps    C  channels
"""

import torch
from torch import Tensor

from rwkv_pl.ops.backend import current_kernel, uses_compiled
from rwkv_pl.ops.wkv import check_arguments, register
from rwkv_pl.ops.wkv4_reference import EMPTY, wkv4_recurrence, wkv4_scan

# Tile lengths: the steps between two states that the compiled operator saves for its backward pass. On the CPU the
# limit is LONGEST_TILE in wkv4_cpu.cpp. On a GPU the tile also selects the kernel in wkv4_launch.cuh: WALK loops over
# time, the others scan it in parallel.
CPU_TILE = 32
WALK, SCAN, LONG_SCAN, DOUBLE_SCAN = 64, 256, 1024, 128


def wkv4(
    time_decay: Tensor, time_first: Tensor, key: Tensor, value: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The WKV operator of RWKV-4 (arXiv 2305.13048, equation 16, in its numerically stable form).

    Per channel, with w = -exp(time_decay), u = time_first and the state (num p, den q, max_exp o)::

        n = max(o, u + k_t)    output_t  = (e^{o-n} p + e^{u+k_t-n} v_t) / (e^{o-n} q + e^{u+k_t-n})
        m = max(w + o, k_t)    (p, q, o) <- (e^{w+o-m} p + e^{k_t-m} v_t,  e^{w+o-m} q + e^{k_t-m},  m)

    Args:
        time_decay: (C,), the raw parameter: the operator applies -exp.
        time_first: (C,), the bonus of the present step.
        key: (B, T, C), float16, bfloat16, float32 or float64. The 16-bit dtypes are computed in float32.
        value: (B, T, C).
        state: (B, 3, C), the rows num, den and max_exp after the steps before. None means the empty state,
            (0, 0, -1e38).

    Returns:
        The output (B, T, C) in key's dtype, and the state after the last step (B, 3, C), in float64 if key is
        float64, else in float32.

    Differentiable with respect to every argument. max_exp is only a scale: the one in the result has no gradient, and
    the gradient of the one in the argument is num * grad_num + den * grad_den. That is exact for any function of
    e^max_exp num and e^max_exp den.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: an argument's shape or device does not match that of key.
    """
    arguments = {"key": key, "time_decay": time_decay, "time_first": time_first, "value": value, "state": state}
    check_arguments(
        "wkv4", "(B, T, C) with T and C at least 1", 3, arguments,
        lambda B, T, C: {"time_decay": (C,), "time_first": (C,), "state": (B, 3, C)},
    )  # fmt: skip
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    compiled = uses_compiled("wkv4", key.device.type)
    # The kernels read and write 16-bit dtypes directly, except float16 on a CPU.
    io = key.dtype if compiled and (key.device.type == "cuda" or key.dtype != torch.float16) else dtype
    weights, inputs = (time_decay.to(dtype), time_first.to(dtype)), (key.to(io), value.to(io))
    if state is not None:
        state = state.to(dtype)
    if compiled:
        output, state, _ = torch.ops.rwkv_pl.wkv4_forward(*weights, *inputs, state, _choose_tile(key))
        return output.to(key.dtype), state
    if state is None:
        batch, _, channels = key.shape
        state = key.new_zeros((batch, 3, channels), dtype=dtype)
        state[:, 2] = EMPTY
    plain = wkv4_recurrence if current_kernel() == "recurrence" else wkv4_scan
    output, state = plain(*weights, *inputs, state)
    return output.to(key.dtype), state


def _choose_tile(key: Tensor) -> int:
    """The steps between two saved states. For GPUs, the fastest on an H100: `python -m benchmarks.wkv_gpu --tiles`."""
    batch, steps, channels = key.shape
    if key.device.type != "cuda":
        return CPU_TILE
    rows = batch * channels / _count_multiprocessors(key.device.index)
    # A loop over time needs about a hundred channels per multiprocessor, or few steps.
    if rows >= 100 or steps <= 16 or (steps <= 64 and rows >= 16):
        return WALK
    if key.dtype == torch.float64:
        return DOUBLE_SCAN
    return LONG_SCAN if rows <= 8 and steps > 256 else SCAN


@torch.compiler.assume_constant_result
def _count_multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _forward_fake(
    time_decay: Tensor, time_first: Tensor, key: Tensor, value: Tensor, state: Tensor | None, tile: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, steps, channels = key.shape
    saved = (steps + tile - 1) // tile + 1
    state, tiles = time_decay.new_empty((batch, 3, channels)), time_decay.new_empty((batch, saved, 4, channels))
    return key.new_empty(key.shape), state, tiles


def _backward_fake(
    time_decay: Tensor,
    time_first: Tensor,
    key: Tensor,
    value: Tensor,
    tiles: Tensor,
    grad_output: Tensor,
    grad_new_state: Tensor | None,
    tile: int,
) -> tuple[Tensor, ...]:
    batch, _, channels = key.shape
    grads = [x.new_empty(x.shape) for x in (time_decay, time_first, key, value)]
    return *grads, time_decay.new_empty((batch, 3, channels))


# At the end, because it registers at once if the operators are already loaded.
register("wkv4", _forward_fake, _backward_fake)
