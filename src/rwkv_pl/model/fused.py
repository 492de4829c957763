"""Shared by the fused blocks of all versions: whether they support a module and an input, casts, dropout.

B  batch    T  time    C  channels
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_pl.ops.backend import supports_elementwise, uses_compiled
from rwkv_pl.ops.linear import Linear


def supports(library: str, mixing: Any, kind: type[nn.Module], norm: Any, dropout: nn.Module, x: Tensor) -> bool:
    """Can the fused operators replace these modules? `mixing` must be of class `kind`; norm and dropout are its own.

    library: that of the version's operator, in rwkv_pl.ops.libraries.

    They can on the CPU, in float32 or under autocast to bfloat16, if no module is replaced or hooked. They cannot under
    torch.compile or in a transform of torch.func.
    """
    layers = mixing._modules.values()
    return (
        not torch.compiler.is_compiling()
        and x.dim() == 3
        and is_unmodified(mixing, kind)
        and is_unmodified(norm, nn.LayerNorm)
        and is_unmodified(dropout, nn.Dropout)
        and all(is_unmodified(layer, type(layer)) and type(layer) in (Linear, nn.GroupNorm) for layer in layers)
        and supports_elementwise(
            x,
            *norm._parameters.values(),
            *mixing._parameters.values(),
            *(weight for layer in layers for weight in layer._parameters.values() if weight is not None),
        )
        and uses_compiled(library, "cpu")
    )


def is_unmodified(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Does the module behave exactly as its class: not a subclass, not parametrised, without hooks?"""
    return type(module) is kind and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def to_float32(x: Tensor | None) -> Tensor | None:
    """x in float32, or None."""
    return None if x is None else x.float()


def cast(to_bf16: bool, weights: Sequence[Tensor | None]) -> list[Any]:
    """The weights in bfloat16, or in float32; None stays None."""
    dtype = torch.bfloat16 if to_bf16 else torch.float32
    return [None if weight is None else weight.to(dtype) for weight in weights]


def apply_dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    """x after dropout, and the mask with its scale. The random numbers are those of torch's own dropout."""
    if not p:
        return x, None
    noise = torch.empty_like(x).bernoulli_(1 - p)
    if p < 1:
        noise.div_(1 - p)
    return x * noise, noise
