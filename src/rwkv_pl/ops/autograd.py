"""Helpers for the backward passes of the compiled operators."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def disable_autocast() -> AbstractContextManager[Any]:
    """Turn autocast off during a backward pass, whose tensors already have the forward pass's dtypes."""
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the backward of an autograd.Function without a second derivative: asking for one raises RuntimeError.

    The decorated function is `backward(ctx, saved, *gradients)`. saved is a list of ctx.saved_tensors, which under
    checkpointing can be read only once. Tensors that backward removes from the list can be freed before it returns.

    torch's own decorator raises only if an incoming gradient is differentiated; otherwise the result is silently 0.
    Here the results also depend on the saved tensors. So the forward pass must save every input that its gradients
    depend on; a cast copy of an input does not count, since it is not connected to the input.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *gradients: Tensor | None) -> Any:
        if not torch.is_grad_enabled():  # without create_graph
            saved = list(ctx.saved_tensors)
            ctx.maybe_clear_saved_tensors()
            with disable_autocast():
                return backward(ctx, saved, *gradients)
        saved = ctx.saved_tensors
        with torch.no_grad(), disable_autocast():
            found = backward(ctx, list(saved), *gradients)
        return _NoSecondDerivative.apply(type(ctx).__name__, len(found), *found, *gradients, *saved)

    return once


class _NoSecondDerivative(torch.autograd.Function):
    """Returns its first `count` tensors. Differentiating these with respect to any argument raises RuntimeError."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        raise RuntimeError(f"{ctx.name} is differentiable once; use_kernel('scan') has a second derivative")
