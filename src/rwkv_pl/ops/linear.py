"""The matrix products of the model, with the faster of torch's two CPU libraries.

For float32 on a CPU, torch calls Intel's MKL. On processors that are not Intel's, MKL uses only 256-bit vectors: 225
GFLOP/s, compared with 500 for oneDNN on the same two AVX-512 cores. torch includes oneDNN, but exposes its product only
to torch.compile, as an operator without a gradient. This file adds the gradient. On Intel's processors MKL is faster,
since a gradient's product needs no transposed copies there.

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

# With fewer rows, oneDNN's setup costs more than it saves.
MIN_ROWS = 32


class Linear(nn.Linear):
    """torch.nn.Linear without a bias; the same parameter, and the same results to rounding."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) -> (..., O)."""
        return linear(x, self.weight)


def cast_linear_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of all :class:`Linear` layers, and nothing else, to another dtype, in place.

    Generating a token reads every weight, so bfloat16 takes little more than half of the time of float32.
    """
    for layer in module.modules():
        if isinstance(layer, Linear):
            layer.to(dtype)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., I), weight (O, I) -> x weight^T (..., O), as torch.nn.functional.linear does.

    A weight of another dtype is cast to that of x, so a bfloat16 weight rounds only itself, not the activations.
    """
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        weight = weight.to(x.dtype)
    # torch.compile selects the library itself, autocast casts the inputs of F.linear, and torch.func transforms only
    # torch's own operators.
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


# For autograd Functions: a product and its gradients with respect to both factors, all of one dtype. Each makes few
# Python calls, because a step calls them about a thousand times, and every call runs with cold CPU caches.


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., I), weight (O, I) -> (..., O)."""
    return _onednn_product(x, weight) if _uses_onednn(x) else F.linear(x, weight)


def gradient_of_input(grad_output: Tensor, weight: Tensor) -> Tensor:
    """grad_output (..., O), weight (O, I) -> the gradient of x, (..., I)."""
    return _onednn_product(grad_output, weight.T) if _uses_onednn(grad_output) else torch.matmul(grad_output, weight)


def gradient_of_weight(grad_output: Tensor, x: Tensor) -> Tensor:
    """grad_output (..., O), x (..., I) -> the gradient of the weight, (O, I)."""
    columns, rows = grad_output.flatten(0, -2).T, x.flatten(0, -2)
    return _onednn_product(columns, rows.T) if _uses_onednn(columns) else torch.mm(columns, rows)


def _onednn_product(x: Tensor, weight: Tensor) -> Tensor:
    if torch.is_grad_enabled():  # the operator itself has no gradient and would silently break the graph
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
