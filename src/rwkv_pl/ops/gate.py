"""The receptance's gate, by which RWKV-4 lets a mixing's result through, and the product that reads it."""

from typing import Any

import torch
from torch import Tensor

from rwkv_pl.ops.fused import autocast_casts, fused_serves, is_itself, once_differentiable
from rwkv_pl.ops.linear import Linear, gradient_of_input, gradient_of_weight, product


def gate(receptance: Tensor, x: Tensor, residual: Tensor) -> Tensor:
    """residual + sigmoid(receptance) * x, all of one shape.

    Differentiable once. On the CPU, in float32 or bfloat16 with a residual in float32, one pass over memory each way.
    """
    fits = receptance.shape == x.shape == residual.shape and residual.dtype == torch.float32
    if fits and fused_serves(x, receptance, io=True):
        return _Gate.apply(receptance, x, residual)
    return residual + torch.sigmoid(receptance) * x


def gated_product(receptance: Tensor, x: Tensor, linear: Linear) -> Tensor:
    """linear(sigmoid(receptance) * x) of receptance and x (..., I). Differentiable once.

    On the CPU, in float32 or bfloat16, what the product reads is not kept for the backward pass, but made again there.
    """
    fits = receptance.shape == x.shape and is_itself(linear, Linear)
    if fits and fused_serves(x, receptance, io=True) and not autocast_casts(x):
        return _GatedProduct.apply(receptance, x, linear.weight)
    return linear(torch.sigmoid(receptance) * x)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, receptance: Tensor, x: Tensor, residual: Tensor) -> Tensor:
        ctx.save_for_backward(receptance, x)
        return torch.ops.rwkv_pl.gate(receptance, x, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        of_receptance, of_x = torch.ops.rwkv_pl.gate_backward(gradient, *saved)
        return of_receptance, of_x, gradient


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, receptance: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        matrix = weight.to(x.dtype)
        ctx.save_for_backward(receptance, x, matrix, weight)
        return product(torch.ops.rwkv_pl.gate(receptance, x, None), matrix)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        receptance, x, matrix, _ = saved
        of_weight = None
        if ctx.needs_input_grad[2]:
            of_weight = gradient_of_weight(gradient, torch.ops.rwkv_pl.gate(receptance, x, None))
        of_gated = gradient_of_input(gradient, matrix)
        return *torch.ops.rwkv_pl.gate_backward(of_gated, receptance, x), of_weight
