"""The receptance's gate, by which RWKV-4 lets a mixing's result through."""

from typing import Any

import torch
from torch import Tensor

from rwkv_pl.ops.linear import remade
from rwkv_pl.ops.wkv4 import compiled_serves


def gate(receptance: Tensor, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """sigmoid(receptance) * x, and the residual stream's x added where one is given: all of one shape.

    Differentiable once. On the CPU, in float32 or bfloat16 with a residual in float32, one pass over memory each way.
    """
    if _serves(receptance, x, residual):
        gated = _Gate.apply(receptance, x, residual)
        return gated if residual is not None else remade(gated, _gated, receptance, x)
    gated = torch.sigmoid(receptance) * x
    return gated if residual is None else residual + gated


def _gated(receptance: Tensor, x: Tensor) -> Tensor:
    return torch.ops.rwkv_pl.gate(receptance, x, None)


def _serves(receptance: Tensor, x: Tensor, residual: Tensor | None) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == receptance.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and (residual is None or residual.dtype == torch.float32)
        and not torch.compiler.is_compiling()
        and compiled_serves("cpu")
    )


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, receptance: Tensor, x: Tensor, residual: Tensor | None) -> Tensor:
        ctx.save_for_backward(receptance, x)
        ctx.has_residual = residual is not None
        return torch.ops.rwkv_pl.gate(receptance, x, residual)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        of_receptance, of_x = torch.ops.rwkv_pl.gate_backward(gradient, *ctx.saved_tensors)
        return of_receptance, of_x, gradient if ctx.has_residual else None
