"""Shared by the WKV operators of all versions: checks of their arguments, registration of their gradients."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rwkv_pl.ops.backend import when_loaded

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_arguments(
    operator: str,
    key_form: str,
    n_dims: int,
    arguments: Mapping[str, Tensor | None],
    shapes: Callable[..., Mapping[str, tuple[int, ...]]],
) -> None:
    """Raise TypeError or ValueError unless all are floating-point tensors of the right shapes on one device.

    The state can be None.

    key_form: the shape of `key`, the first of the arguments, in words; n_dims: its dimensions. shapes: from the sizes
    of key, the shapes of the arguments that have another.
    """
    key: Any = arguments["key"]
    for name, tensor in arguments.items():
        if tensor is None and name == "state":
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
            given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{operator}: {name} must be a floating-point tensor of 16, 32 or 64 bits, not {given}")
        if tensor.device != key.device:
            raise ValueError(
                f"{operator}: {name} is on {tensor.device} and key on {key.device}; move them to one device"
            )
    size = tuple(key.shape)
    if len(size) != n_dims or 0 in size[1:]:
        raise ValueError(f"{operator}: key must be {key_form}, not {size}")
    others = shapes(*size)
    for name, tensor in arguments.items():
        shape = others.get(name, size)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{operator}: {name} must be {shape} for key {size}, not {tuple(tensor.shape)}")


def register(library: str, forward_fake: Callable[..., Any], backward_fake: Callable[..., Any]) -> None:
    """Register the fake kernels and the gradients of a library's operators LIBRARY_forward and LIBRARY_backward.

    The forward operator's arguments are tensors, key the third and the optional state the last of them, then an int.
    Its results are the output, the state, and what it saves for the backward operator. This takes the same tensors but
    the state, the saved ones, the gradients of output and state, and the int. It returns the gradients of the tensors.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *arguments, state, ctx.n_steps = inputs
        ctx.has_state = state is not None
        ctx.save_for_backward(*arguments, *output[2:])
        # An unused gradient of the state is None, not a tensor of zeros.
        ctx.set_materialize_grads(False)

    def backward(
        ctx: Any, grad_output: Tensor | None, grad_state: Tensor | None, *unused: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            grad_output = torch.zeros_like(ctx.saved_tensors[2])
        operator = getattr(torch.ops.rwkv_pl, f"{library}_backward")
        *grads, grad_first = operator(*ctx.saved_tensors, grad_output, grad_state, ctx.n_steps)
        return *grads, grad_first if ctx.has_state else None, None

    def double_backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{library}: the compiled operator has no second derivative; use_kernel('scan') has one")

    @when_loaded(library)
    def register_all() -> None:
        torch.library.register_fake(f"rwkv_pl::{library}_forward", forward_fake)
        torch.library.register_fake(f"rwkv_pl::{library}_backward", backward_fake)
        torch.library.register_autograd(f"rwkv_pl::{library}_forward", backward, setup_context=setup_context)
        torch.library.register_autograd(f"rwkv_pl::{library}_backward", double_backward)
