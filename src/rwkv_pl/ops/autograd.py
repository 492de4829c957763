"""Gradients of the compiled operators: how a backward pass is called."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def disable_autocast() -> AbstractContextManager[Any]:
    """For a backward pass, whose tensors already have the dtypes of the forward pass."""
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward of an autograd.Function that has no second derivative: asking for one raises RuntimeError.

    Decorates `backward(ctx, saved, *gradients)`; saved is a list of ctx.saved_tensors, which checkpointing allows to
    read once. What backward takes out of the list can be freed before it ends.

    torch's own decorator raises only if an incoming gradient is differentiated, else the result is silently 0. Here the
    results also depend on the saved tensors, so the forward pass has to save every input that its gradients depend on
    (a cast copy of an input is not connected to it).
    """

    @functools.wraps(backward)
    def once(ctx: Any, *gradients: Tensor | None) -> Any:
        if not torch.is_grad_enabled():  # no graph of the gradients is asked for
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
    """Passes on its first `count` tensors. To differentiate these in any of its tensors raises RuntimeError."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        raise RuntimeError(f"{ctx.name} is differentiable once; use_kernel('scan') has a second derivative")
