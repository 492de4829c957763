"""max(x, 0)^2, the activation of RWKV's channel mixing."""

from typing import Any

import torch
from torch import Tensor

from rwkv_pl.ops.wkv4 import compiled_serves


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2 of any shape and floating dtype. Differentiable once: the gradient is 2 max(x, 0).

    On the CPU it may be written over x, which is then no longer to be read: the result, kept by the product that
    follows, is all that the backward pass needs. A step so keeps a third less memory for the channel mixing.
    """
    if _serves(x):
        return _SquaredReLU.apply(x)
    return torch.relu(x).square()


def _serves(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.is_contiguous()
        and not (x.is_leaf and x.requires_grad)
        and not torch.compiler.is_compiling()
        and compiled_serves("cpu")
    )


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        torch.ops.rwkv_pl.squared_relu_(x)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return torch.ops.rwkv_pl.squared_relu_backward(gradient, y)
