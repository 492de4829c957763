"""max(x, 0)^2, the activation of RWKV's channel mixing, and the product that reads it."""

from typing import Any

import torch
from torch import Tensor

from rwkv_pl.ops.fused import autocast_casts, fused_serves, is_itself, once_differentiable
from rwkv_pl.ops.linear import Linear, gradient_of_input, gradient_of_weight, product


def squared_relu_product(x: Tensor, linear: Linear) -> Tensor:
    """linear(max(x, 0)^2) of x (..., I) in any floating dtype. Differentiable once.

    On the CPU, in float32 or bfloat16, the square is written over x, which is then no longer to be read: it is all that
    the backward pass needs, whose gradient 2 max(x, 0) is twice its root.
    """
    fits = fused_serves(x, io=True) and not autocast_casts(x)
    if fits and is_itself(linear, Linear) and _may_be_written(x):
        return _SquaredReLUProduct.apply(x, linear.weight)[0]
    return linear(torch.relu(x).square())


def _may_be_written(x: Tensor) -> bool:
    """No view of a larger tensor and no parameter."""
    return x.dim() > 1 and x.is_contiguous() and not x._is_view() and not (x.is_leaf and x.requires_grad)


class _SquaredReLUProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        matrix = weight.to(x.dtype)
        torch.ops.rwkv_pl.squared_relu_(x)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x, matrix, weight)
        ctx.set_materialize_grads(False)
        return product(x, matrix), x  # autograd wants to see again what was written over

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: tuple[Tensor, ...], gradient: Tensor | None, of_square: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        square, matrix, _ = saved
        of_weight = None
        if gradient is None:
            of_x = torch.zeros_like(square)
        else:
            of_weight = gradient_of_weight(gradient, square) if ctx.needs_input_grad[1] else None
            of_x = gradient_of_input(gradient, matrix)
        if of_square is not None:
            of_x += of_square
        torch.ops.rwkv_pl.squared_relu_backward_(of_x, square)
        return of_x, of_weight
