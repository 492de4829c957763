"""The WKV-7 operator: one function with several kernels, selected by device or with `backend.use_kernel`.

B  sequences    T  time steps    H  heads    N  channels of a head
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from rwkv_pl.ops.backend import KernelError, current_kernel, uses_compiled
from rwkv_pl.ops.wkv import check_arguments, register
from rwkv_pl.ops.wkv7_reference import wkv7_recurrence, wkv7_scan

__all__ = ["wkv7"]

# The channels of a head that the compiled operator supports.
HEAD_SIZE = 64

# The steps between two states that the compiled operator saves for its backward pass: at most LONGEST_STRETCH in
# wkv7_cpu.cpp, and TILE in wkv7_walk.cuh.
CPU_STRETCH, CUDA_STRETCH = 64, 16


def wkv7(
    receptance: Tensor, decay: Tensor, key: Tensor, value: Tensor, a: Tensor, b: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The WKV operator of RWKV-7 (arXiv 2503.14456, equation 17).

    Per head, with w = exp(-e^-0.5 sigmoid(decay)) and the state S, whose rows are values and whose columns are keys::

        S <- S diag(w_t) + (S a_t) b_t^T + v_t k_t^T        output_t = S receptance_t

    Args:
        receptance: (B, T, H, N).
        decay: (B, T, H, N), raw: the operator applies exp(-e^-0.5 sigmoid(decay)), in float32 or float64. It is never
            rounded to the dtype of key.
        key: (B, T, H, N), float16, bfloat16, float32 or float64. The 16-bit dtypes are computed in float32.
        value, a, b: (B, T, H, N). In RWKV-7, a is the negated, normalized key that is removed from the state, and b the
            same key times its gate. The compiled kernels support N = 64, and on a GPU not float64; other arguments
            run in plain torch.
        state: (B, H, N, N) after the steps before. None means zeros.

    Returns:
        The output (B, T, H, N) in key's dtype, and the state after the last step (B, H, N, N), in float64 if key is
        float64, else in float32.

    Differentiable with respect to every argument.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: an argument's shape or device does not match that of key.
        KernelError: `use_kernel("compiled")` is selected, and the compiled kernels do not support the arguments.
    """
    check_arguments(
        "wkv7", "(B, T, H, N) with T, H and N at least 1", 4,
        {"key": key, "receptance": receptance, "decay": decay, "value": value, "a": a, "b": b, "state": state},
        lambda B, T, H, N: {"state": (B, H, N, N)},
    )  # fmt: skip
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    receptance, value, a, b = (x.to(key.dtype) for x in (receptance, value, a, b))
    B, _, H, N = key.shape
    on_gpu = key.device.type == "cuda"
    is_supported = N == HEAD_SIZE and not (on_gpu and dtype == torch.float64)
    if not is_supported and current_kernel() == "compiled":
        raise KernelError("wkv7", f"none for heads of {N} channels in {key.dtype} on {key.device.type}")
    if is_supported and uses_compiled("wkv7", key.device.type):
        # The kernels read and write 16-bit dtypes directly, except float16 on a CPU.
        io = key.dtype if on_gpu or key.dtype != torch.float16 else dtype
        inputs = [receptance.to(io), decay.to(dtype), key.to(io), value.to(io), a.to(io), b.to(io)]
        if state is not None:
            state = state.to(dtype)
        arguments = [*inputs, state]
        is_differentiated = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments)
        stretch = 0 if not is_differentiated else CUDA_STRETCH if on_gpu else CPU_STRETCH
        output, state, *_ = torch.ops.rwkv_pl.wkv7_forward(*arguments, stretch)
        return output.to(key.dtype), state
    if state is None:
        state = key.new_zeros((B, H, N, N), dtype=dtype)
    plain = wkv7_recurrence if current_kernel() == "recurrence" else wkv7_scan
    with torch.autocast(key.device.type, enabled=False) if key.device.type != "meta" else nullcontext():
        output, state = plain(*(x.to(dtype) for x in (receptance, decay, key, value, a, b, state)))
    return output.to(key.dtype), state


def _forward_fake(
    receptance: Tensor,
    decay: Tensor,
    key: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    stretch: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, H, N = key.shape
    saved, steps = ((T + stretch - 1) // stretch, T) if stretch else (0, 0)
    state, states = decay.new_empty((B, H, N, N)), decay.new_empty((B, H, saved, N, N))
    return key.new_empty(key.shape), state, states, decay.new_empty((B, steps, H, N))


def _backward_fake(
    receptance: Tensor,
    decay: Tensor,
    key: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    states: Tensor,
    sa: Tensor,
    grad_output: Tensor,
    grad_new_state: Tensor | None,
    stretch: int,
) -> tuple[Tensor, ...]:
    B, _, H, N = key.shape
    grads = [x.new_empty(x.shape) for x in (receptance, decay, key, value, a, b)]
    return *grads, decay.new_empty((B, H, N, N))


# At the end, because it registers at once if the operators are already loaded.
register("wkv7", _forward_fake, _backward_fake)
