"""What the operators between the matrix products share: where they serve, and how their gradients are called."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_pl.ops.wkv4 import compiled_serves


def fused_serves(*tensors: Tensor, io: bool = False) -> bool:
    """Whether the operators between the matrix products take these: compiled ones, on the CPU, all in float32.

    io: bfloat16 too, if all are. Under torch.compile they are left to it; under an autocast to float16, in torch.func's
    transforms and for subclasses of Tensor to torch.
    """
    dtype = tensors[0].dtype
    return (
        (dtype == torch.float32 or (io and dtype == torch.bfloat16))
        and not torch.compiler.is_compiling()
        and all(
            type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.dtype == dtype
            for tensor in tensors
        )
        and (not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") == torch.bfloat16)
        and compiled_serves("cpu")
    )


def is_itself(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module does what its class does: neither replaced nor parametrised, and without hooks."""
    return type(module) is kind and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward of an autograd.Function that itself has no gradient: to differentiate its results raises RuntimeError.

    torch's own decorator raises only where an incoming gradient is differentiated, else the result is wrongly 0.
    Autocast is off in it, as what it computes has the dtypes of the forward pass.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *gradients: Tensor | None) -> Any:
        again = torch.is_grad_enabled()  # asked for by create_graph
        autocast_off = torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()
        with torch.no_grad(), autocast_off:
            found = backward(ctx, *gradients)
        if not again:
            return found
        why = f"{type(ctx).__name__} is differentiable once; use_kernel('scan') has a second derivative"
        refuse: Any = torch._C._functions.DelayedError(why, len(found))
        refused = refuse(*(None if g is None else g.detach().requires_grad_() for g in found))
        return tuple(None if g is None else one for g, one in zip(found, refused, strict=True))

    return once
