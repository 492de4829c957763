"""LayerNorm, token shift and the mixes of RWKV-4: what stands between the residual stream and the matrix products.

B  batch    T  time    C  channels
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_pl.ops.linear import remade
from rwkv_pl.ops.wkv4 import compiled_serves


def norm_mix(
    x: Tensor, norm: nn.LayerNorm, mixes: Sequence[Tensor], last: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Normalises each token, and mixes it with its predecessor (arXiv 2305.13048, equations 11 to 13).

        y_t = norm(x_t)        mixed_t = mix * y_t + (1 - mix) * y_{t-1}

    Args:
        x: (B, T, C), the residual stream.
        norm: over C, with weight and bias.
        mixes: two or three, each of C numbers.
        last: (B, C), the y before the first; None for zeros, where a text begins.

    Returns:
        A mixed tensor (B, T, C) for each mix, and the last y (B, C), which goes before what follows.

    On the CPU, in float32, one compiled pass over memory each way; under autocast it writes the mixed in bfloat16,
    as the products take them. Else, and under torch.compile, plainly: `norm_mix_plain`.
    """
    if not _serves(x, norm, mixes):
        return norm_mix_plain(x, norm, mixes, last)
    last = None if last is None else last.float()
    half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    *mixed, new_last = _NormMix.apply(x, norm.weight, norm.bias, norm.eps, half, last, *mixes)
    # Of a layer's memory for the backward pass, the mixed would be a quarter.
    again = partial(_one_mixed, norm.eps, half)
    return tuple(
        remade(y, again, x, norm.weight, norm.bias, mix, last) for y, mix in zip(mixed, mixes, strict=True)
    ), new_last


def _one_mixed(
    eps: float, half: bool, x: Tensor, weight: Tensor, bias: Tensor, mix: Tensor, last: Tensor | None
) -> Tensor:
    (mixed,), _, _ = torch.ops.rwkv_pl.norm_mix(x, weight, bias, [mix], last, eps, half)
    return mixed


def norm_mix_plain(
    x: Tensor, norm: nn.LayerNorm, mixes: Sequence[Tensor], last: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The same in torch's own operations, which judges the compiled operator and serves every device."""
    y = norm(x)
    first = torch.zeros_like(y[:, 0]) if last is None else last.to(y.dtype)
    before = torch.cat([first[:, None], y[:, :-1]], dim=1)
    return tuple(torch.lerp(before, y, mix) for mix in mixes), y[:, -1]


def _serves(x: Tensor, norm: nn.LayerNorm, mixes: Sequence[Tensor]) -> bool:
    return (
        x.device.type == "cpu"
        and {tensor.dtype for tensor in (x, norm.weight, norm.bias, *mixes)} == {torch.float32}
        and not torch.compiler.is_compiling()
        and compiled_serves("cpu")
    )


class _NormMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, half: bool, last: Tensor | None, *mixes: Tensor
    ) -> tuple[Tensor, ...]:
        mixed, new_last, figures = torch.ops.rwkv_pl.norm_mix(x, weight, bias, mixes, last, eps, half)
        ctx.save_for_backward(x, weight, bias, last, figures, *mixes)
        ctx.set_materialize_grads(False)
        return *mixed, new_last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, last, figures, *mixes = ctx.saved_tensors
        *of_mixed, of_last = grads
        dtype = next((g.dtype for g in of_mixed if g is not None), x.dtype)
        of_mixed = [torch.zeros_like(x, dtype=dtype) if g is None else g for g in of_mixed]
        of_x, of_weight, of_bias, of_mixes, of_first = torch.ops.rwkv_pl.norm_mix_backward(
            x, weight, bias, mixes, last, figures, of_mixed, of_last
        )
        shaped = (g.view_as(mix) for g, mix in zip(of_mixes, mixes, strict=True))
        return of_x, of_weight, of_bias, None, None, None if last is None else of_first, *shaped
