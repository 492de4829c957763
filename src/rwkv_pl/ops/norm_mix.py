"""From the residual stream to the first matrix products of a mixing: LayerNorm, token shift, the mixes, the products.

B  batch    T  time    C  channels    O  out_features of a product
"""

from typing import Any

import torch
from torch import Tensor, nn

from rwkv_pl.ops.fused import fused_serves, is_itself, once_differentiable
from rwkv_pl.ops.linear import Linear, gradient_of_input, gradient_of_weight, product

# Of so many tokens and more, what the products read is made again in the backward pass: a quarter of a layer's memory,
# and 1 to 2% of a step's time.
REMADE_FROM = 4096


def mixed_products(
    x: Tensor, norm: nn.LayerNorm, last: Tensor | None, *pairs: tuple[Tensor, Linear]
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Normalises each token, mixes it with its predecessor, and multiplies (arXiv 2305.13048, equations 11 to 13).

        y_t = norm(x_t)        product_t = linear(mix * y_t + (1 - mix) * y_{t-1})

    Args:
        x: (B, T, C), the residual stream.
        norm: over C, with weight and bias.
        last: (B, C), the y before the first; None for zeros, where a text begins.
        pairs: two or three, a mix of C numbers and the linear layer that reads what it makes.

    Returns:
        A product (B, T, O) for each pair; x again, for the residual connection, so that its gradient is added by the
        same pass; and the last y (B, C), which goes before what follows.

    On the CPU, in float32 or autocast to bfloat16, a compiled operator makes the mixed by one pass over memory each
    way. Differentiable once.
    """
    served = is_itself(norm, nn.LayerNorm) and all(is_itself(linear, Linear) for _, linear in pairs)
    if not (served and fused_serves(x, norm.weight, norm.bias, *(mix for mix, _ in pairs))):
        mixed, last = norm_mix(x, norm, last, *(mix for mix, _ in pairs))
        return tuple(linear(y) for y, (_, linear) in zip(mixed, pairs, strict=True)), x, last
    half = torch.is_autocast_enabled("cpu")
    mixes, weights = [mix for mix, _ in pairs], [linear.weight for _, linear in pairs]
    *products, x, last = _MixedProducts.apply(
        x, norm.weight, norm.bias, norm.eps, half, None if last is None else last.float(), *mixes, *weights
    )
    return tuple(products), x, last


def norm_mix(x: Tensor, norm: nn.LayerNorm, last: Tensor | None, *mixes: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """What the products read, (B, T, C) for each mix, and the last y (B, C), in torch's own operations."""
    y = norm(x)
    first = torch.zeros_like(y[:, 0]) if last is None else last.to(y.dtype)
    before = torch.cat([first[:, None], y[:, :-1]], dim=1)
    return tuple(torch.lerp(before, y, mix) for mix in mixes), y[:, -1]


class _MixedProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, half: bool, last: Tensor | None, *pairs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.n, ctx.eps, ctx.half = len(pairs) // 2, eps, half
        mixes, weights = pairs[: ctx.n], pairs[ctx.n :]
        matrices = [matrix.to(torch.bfloat16 if half else torch.float32) for matrix in weights]
        mixed, new_last, figures = torch.ops.rwkv_pl.norm_mix(x, weight, bias, mixes, last, eps, half)
        kept = mixed if x.shape[0] * x.shape[1] < REMADE_FROM else []
        ctx.save_for_backward(x, weight, bias, last, figures, *mixes, *weights, *matrices, *kept)
        return *(product(y, matrix) for y, matrix in zip(mixed, matrices, strict=True)), x, new_last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, last, figures, *others = saved
        mixes, matrices, mixed = others[: ctx.n], others[2 * ctx.n : 3 * ctx.n], others[3 * ctx.n :]
        *of_products, of_residual, of_last = gradients
        of_matrices: list[Tensor | None] = [None] * ctx.n
        if any(ctx.needs_input_grad[-ctx.n :]):
            if not mixed:
                mixed, *_ = torch.ops.rwkv_pl.norm_mix(x, weight, bias, mixes, last, ctx.eps, ctx.half)
            of_matrices = [gradient_of_weight(g, y) for g, y in zip(of_products, mixed, strict=True)]
            del mixed
        of_mixed = [gradient_of_input(g, matrix) for g, matrix in zip(of_products, matrices, strict=True)]
        of_x, of_weight, of_bias, of_mixes, of_first = torch.ops.rwkv_pl.norm_mix_backward(
            x, weight, bias, mixes, last, figures, of_mixed, of_residual, of_last
        )
        return of_x, of_weight, of_bias, None, None, None if last is None else of_first, *of_mixes, *of_matrices
