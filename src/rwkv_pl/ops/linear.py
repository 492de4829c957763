"""The matrix products of the model: torch's own, by the faster of its two libraries.

For float32 on a CPU torch calls MKL, Intel's, which on processors of other makers keeps to 256-bit vectors: 225
GFLOP/s where oneDNN, which torch carries as well, makes 500 on the same two AVX-512 cores. torch offers oneDNN's
product to its compiler alone, by an operator without a gradient; this gives it one. On Intel's own processors MKL is
the faster: a gradient's product needs no transposed copies there.

    N  rows, all leading dimensions of x    I  in_features    O  out_features
"""

import contextlib
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwkv_pl.ops.autograd import disable_autocast

# Below this many rows oneDNN's preparation costs more than it saves.
MIN_ROWS = 32


class Linear(nn.Linear):
    """torch.nn.Linear without a bias; its parameter and its results, to rounding, are the same."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) -> (..., O)."""
        return linear(x, self.weight)


def cast_linear_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Keeps the matrices of a model's :class:`Linear` layers, and nothing else of it, in another dtype, in place.

    To generate a token is to read them all: in bfloat16 it takes little more than half of float32's time.
    """
    for layer in module.modules():
        if isinstance(layer, Linear):
            layer.to(dtype)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., I), weight (O, I) -> x weight^T (..., O), as torch.nn.functional.linear.

    A weight of another dtype is cast to x's: one that is kept in bfloat16 rounds nothing but itself.
    """
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        weight = weight.to(x.dtype)
    # The compiler chooses for itself, autocast casts what F.linear reads, and torch.func transforms torch's own.
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or torch._C._are_functorch_transforms_active():
        return F.linear(x, weight)
    return product(x, weight)


def _is_intel() -> bool:
    if sys.platform != "linux":
        return "GenuineIntel" in platform.processor()
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as file:
        return any(line.startswith("vendor_id") and "GenuineIntel" in line for line in file)
    return False


_has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_is_onednn_faster = _has_onednn and torch.backends.cpu.get_cpu_capability() == "AVX512" and not _is_intel()


def _uses_onednn(x: Tensor) -> bool:
    return (
        _is_onednn_faster
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() >= MIN_ROWS * x.shape[-1]
        and bool(torch.backends.mkldnn.enabled)
    )


# For the functions that bring their own gradient: a product, and the gradients in its two factors, of one dtype. Few
# calls each: of a thousand in a step, every one finds Python's part of the cache cold.


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., I), weight (O, I) -> (..., O)."""
    return _onednn_product(x, weight) if _uses_onednn(x) else F.linear(x, weight)


def gradient_of_input(grad_output: Tensor, weight: Tensor) -> Tensor:
    """gradient (..., O), weight (O, I) -> (..., I)."""
    return _onednn_product(grad_output, weight.T) if _uses_onednn(grad_output) else torch.matmul(grad_output, weight)


def gradient_of_weight(grad_output: Tensor, x: Tensor) -> Tensor:
    """gradient (..., O), x (..., I) -> (O, I)."""
    columns, rows = grad_output.flatten(0, -2).T, x.flatten(0, -2)
    return _onednn_product(columns, rows.T) if _uses_onednn(columns) else torch.mm(columns, rows)


def _onednn_product(x: Tensor, weight: Tensor) -> Tensor:
    if torch.is_grad_enabled():  # the operator itself has no gradient, and would break the graph silently
        return _Linear.apply(x, weight)
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        with disable_autocast():
            grad_x = gradient_of_input(grad_output, weight) if ctx.needs_input_grad[0] else None
            grad_weight = gradient_of_weight(grad_output, x) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight
