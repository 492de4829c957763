"""RWKV-4's block with fused operators on the CPU: fewer passes over memory, and fewer tensors saved for backward.

:func:`time_mix` computes `x + dropout(att(ln1(x)))` and :func:`channel_mix` computes `x + dropout(ffn(ln2(x)))`, to
rounding. One difference: channel_mix applies dropout before the gate, not after it. Both multiply elementwise, so only
the rounding changes.

    B  batch    T  time    C  channels
"""

from typing import Any

import torch
from torch import Tensor, nn

from rwkv_pl.model.fused import apply_dropout, cast, to_float32
from rwkv_pl.ops.autograd import once_differentiable
from rwkv_pl.ops.linear import gradient_of_input, gradient_of_weight, product
from rwkv_pl.ops.wkv4 import CPU_TILE

__all__ = ["channel_mix", "time_mix"]

ops = torch.ops.rwkv_pl


def time_mix(
    att: Any,
    norm: nn.LayerNorm,
    dropout: nn.Dropout,
    x: Tensor,
    shift: Tensor | None,
    state: Tensor | None,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, T, C), shift (B, C), WKV state (B, 3, C) -> x plus the update, the new shift, the new WKV state.

    shift is the normalised token before the first one. recompute: recompute the inputs of the first matrix products in
    the backward pass instead of saving them. Differentiable once.
    """
    return _TimeMix.apply(
        (dropout.p if dropout.training else 0.0, norm.eps, torch.is_autocast_enabled("cpu"), recompute),
        x, to_float32(shift), to_float32(state), norm.weight, norm.bias, att.time_decay, att.time_first,
        att.time_mix_k, att.time_mix_v, att.time_mix_r,
        att.key.weight, att.value.weight, att.receptance.weight, att.output.weight,
    )  # fmt: skip


def channel_mix(
    ffn: Any, norm: nn.LayerNorm, dropout: nn.Dropout, x: Tensor, shift: Tensor | None, recompute: bool
) -> tuple[Tensor, Tensor]:
    """x (B, T, C), shift (B, C) -> x plus the update, the new shift. shift and recompute are as in `time_mix`."""
    return _ChannelMix.apply(
        (dropout.p if dropout.training else 0.0, norm.eps, torch.is_autocast_enabled("cpu"), recompute),
        x, to_float32(shift), norm.weight, norm.bias, ffn.time_mix_k, ffn.time_mix_r,
        ffn.key.weight, ffn.receptance.weight, ffn.value.weight,
    )  # fmt: skip


class _TimeMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, options: Any, x: Tensor, shift: Tensor | None, state: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        p, eps, to_bf16, recompute = options
        norm, (decay, first), mixes, weights = parameters[:2], parameters[2:4], parameters[4:7], parameters[7:]
        w_key, w_value, w_receptance, w_output = matrices = cast(to_bf16, weights)
        mixed, new_shift, mean_rstd = ops.norm_token_shift(x, *norm, mixes, shift, eps, to_bf16)
        key, value, receptance = product(mixed[0], w_key), product(mixed[1], w_value), product(mixed[2], w_receptance)
        wkv, new_state, tiles = ops.wkv4_forward(decay, first, key, value, state, CPU_TILE)
        y, noise = apply_dropout(product(ops.gate(receptance, wkv, None), w_output), p)
        ctx.eps, ctx.to_bf16 = eps, to_bf16
        ctx.save_for_backward(
            x, shift, state, *parameters, *matrices, mean_rstd, key, value, receptance, wkv, tiles, noise,
            *([] if recompute else mixed),
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        return x + y, new_shift, new_state

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: list[Any], grad: Tensor | None, grad_new_shift: Tensor | None, grad_new_state: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, shift, state, *parameters = saved[:14]
        norm, (decay, first), mixes = parameters[:2], parameters[2:4], parameters[4:7]
        w_key, w_value, w_receptance, w_output = saved[14:18]
        mean_rstd, key, value, receptance, wkv, tiles, noise, *mixed = saved[18:]
        saved.clear()
        *needs_weights, needs_output = ctx.needs_input_grad[-4:]

        grad = torch.zeros_like(x) if grad is None else grad
        grad_y = grad.to(w_output.dtype)
        if noise is not None:
            grad_y = grad_y * noise
        grad_w_output = gradient_of_weight(grad_y, ops.gate(receptance, wkv, None)) if needs_output else None
        grad_receptance, grad_wkv = ops.gate_backward(gradient_of_input(grad_y, w_output), receptance, wkv)
        del grad_y, receptance, wkv, noise
        grad_decay, grad_first, grad_key, grad_value, grad_state = ops.wkv4_backward(
            decay, first, key, value, tiles, grad_wkv, grad_new_state, CPU_TILE
        )
        del grad_wkv, key, value, tiles
        grad_weights: list[Tensor | None] = [None, None, None]
        if any(needs_weights):
            if not mixed:
                mixed, *_ = ops.norm_token_shift(x, *norm, mixes, shift, ctx.eps, ctx.to_bf16)
            grad_weights = [
                gradient_of_weight(*pair) for pair in zip((grad_key, grad_value, grad_receptance), mixed, strict=True)
            ]
        del mixed
        grad_mixed = [
            gradient_of_input(grad_key, w_key),
            gradient_of_input(grad_value, w_value),
            gradient_of_input(grad_receptance, w_receptance),
        ]
        del grad_key, grad_value, grad_receptance
        grad_x, grad_weight, grad_bias, grad_mixes, grad_shift = ops.norm_token_shift_backward(
            x, *norm, mixes, shift, mean_rstd, grad_mixed, grad, grad_new_shift
        )
        return (
            None, grad_x, None if shift is None else grad_shift, None if state is None else grad_state,
            grad_weight, grad_bias, grad_decay, grad_first, *grad_mixes, *grad_weights, grad_w_output,
        )  # fmt: skip


class _ChannelMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Any, x: Tensor, shift: Tensor | None, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        p, eps, to_bf16, recompute = options
        norm, mixes, weights = parameters[:2], parameters[2:4], parameters[4:]
        w_key, w_receptance, w_value = matrices = cast(to_bf16, weights)
        mixed, new_shift, mean_rstd = ops.norm_token_shift(x, *norm, mixes, shift, eps, to_bf16)
        square, receptance = product(mixed[0], w_key), product(mixed[1], w_receptance)
        # In place: the backward pass needs only the square, since the derivative is twice its root.
        ops.squared_relu_(square)
        value, noise = apply_dropout(product(square, w_value), p)
        ctx.eps, ctx.to_bf16 = eps, to_bf16
        ctx.save_for_backward(
            x, shift, *parameters, *matrices, mean_rstd, square, receptance, value, noise, *([] if recompute else mixed)
        )
        ctx.set_materialize_grads(False)
        return ops.gate(receptance, value, x), new_shift

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: list[Any], grad: Tensor | None, grad_new_shift: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, shift, *parameters = saved[:9]
        norm, mixes = parameters[:2], parameters[2:4]
        w_key, w_receptance, w_value = saved[9:12]
        mean_rstd, square, receptance, value, noise, *mixed = saved[12:]
        saved.clear()
        *needs_weights, needs_value = ctx.needs_input_grad[-3:]

        grad = torch.zeros_like(x) if grad is None else grad
        grad_receptance, grad_value = ops.gate_backward(grad, receptance, value)
        del receptance, value
        if noise is not None:
            grad_value = grad_value * noise
        grad_w_value = gradient_of_weight(grad_value, square) if needs_value else None
        grad_key = gradient_of_input(grad_value, w_value)
        ops.squared_relu_backward_(grad_key, square)
        del grad_value, square, noise
        grad_weights: list[Tensor | None] = [None, None]
        if any(needs_weights):
            if not mixed:
                mixed, *_ = ops.norm_token_shift(x, *norm, mixes, shift, ctx.eps, ctx.to_bf16)
            grad_weights = [gradient_of_weight(*pair) for pair in zip((grad_key, grad_receptance), mixed, strict=True)]
        del mixed
        grad_mixed = [gradient_of_input(grad_key, w_key), gradient_of_input(grad_receptance, w_receptance)]
        del grad_key, grad_receptance
        grad_x, grad_weight, grad_bias, grad_mixes, grad_shift = ops.norm_token_shift_backward(
            x, *norm, mixes, shift, mean_rstd, grad_mixed, grad, grad_new_shift
        )
        return (
            None, grad_x, None if shift is None else grad_shift, grad_weight, grad_bias, *grad_mixes, *grad_weights,
            grad_w_value,
        )  # fmt: skip
