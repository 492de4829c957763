"""The WKV-7 operator: one function with several kernels, selected by device or with `backend.use_kernel`.

B  sequences    T  time steps    H  heads    N  channels of a head
"""

import torch
from torch import Tensor

from rwkv_pl.ops.backend import current_kernel
from rwkv_pl.ops.wkv7_reference import wkv7_recurrence, wkv7_scan

__all__ = ["wkv7"]


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
            same key times its gate.
        state: (B, H, N, N) after the steps before. None means zeros.

    Returns:
        The output (B, T, H, N) in key's dtype, and the state after the last step (B, H, N, N), in float64 if key is
        float64, else in float32.

    Differentiable with respect to every argument.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: an argument's shape or device does not match that of key.
    """
    _check_arguments(receptance, decay, key, value, a, b, state)
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    # As the kernels that read 16-bit dtypes do, round to key's dtype; the decay keeps its digits.
    receptance, value, a, b = (x.to(key.dtype) for x in (receptance, value, a, b))
    if state is None:
        B, _, H, N = key.shape
        state = key.new_zeros((B, H, N, N), dtype=dtype)
    plain = wkv7_recurrence if current_kernel() == "recurrence" else wkv7_scan
    with torch.autocast(key.device.type, enabled=False):
        output, state = plain(*(x.to(dtype) for x in (receptance, decay, key, value, a, b, state)))
    return output.to(key.dtype), state


def _check_arguments(
    receptance: Tensor, decay: Tensor, key: Tensor, value: Tensor, a: Tensor, b: Tensor, state: Tensor | None
) -> None:
    arguments = {"key": key, "receptance": receptance, "decay": decay, "value": value, "a": a, "b": b}
    if state is not None:
        arguments["state"] = state
    for name, tensor in arguments.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"wkv7: {name} must be a floating-point tensor, not {given}")
        if tensor.device != key.device:
            raise ValueError(f"wkv7: {name} is on {tensor.device} and key on {key.device}; move them to one device")
    if key.dim() != 4 or 0 in key.shape[1:]:
        raise ValueError(f"wkv7: key must be (B, T, H, N) with T, H and N at least 1, not {tuple(key.shape)}")
    B, _, H, N = key.shape
    for name, tensor in arguments.items():
        shape = (B, H, N, N) if name == "state" else tuple(key.shape)
        if tensor.shape != shape:
            raise ValueError(f"wkv7: {name} must be {shape} for key {tuple(key.shape)}, not {tuple(tensor.shape)}")
