"""The two halves of RWKV-4's block by the compiled operators, on the CPU: fewer passes over memory, less kept.

:func:`time_mix` is `x + dropout(att(ln1(x)))` and :func:`channel_mix` is `x + dropout(ffn(ln2(x)))`, to rounding, with
one difference: channel_mix drops out what the gate lets through before the gate.

    B  batch    T  time    C  channels
"""

from typing import Any

import torch
from torch import Tensor, nn

from rwkv_pl.ops.autograd import once_differentiable
from rwkv_pl.ops.backend import supports_elementwise
from rwkv_pl.ops.linear import Linear, gradient_of_input, gradient_of_weight, product
from rwkv_pl.ops.wkv4 import TILE

ops = torch.ops.rwkv_pl


def supports(half: Any, kind: type[nn.Module], norm: Any, dropout: nn.Module, x: Tensor) -> bool:
    """Whether the compiled operators compute what the modules do: `half`, a `kind` of mixing, its norm and dropout.

    That is on the CPU, in float32 or under autocast to bfloat16, with no module replaced or hooked, and neither under
    torch.compile nor in a transform of torch.func.
    """
    return (
        not torch.compiler.is_compiling()
        and x.dim() == 3
        and is_unmodified(half, kind)
        and is_unmodified(norm, nn.LayerNorm)
        and is_unmodified(dropout, nn.Dropout)
        and all(is_unmodified(layer, Linear) for layer in half._modules.values())
        and supports_elementwise(
            x,
            *norm._parameters.values(),
            *half._parameters.values(),
            *(layer._parameters["weight"] for layer in half._modules.values()),
        )
    )


def is_unmodified(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module does what its class does: not replaced, not parametrised, without hooks."""
    return type(module) is kind and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def time_mix(
    att: Any, norm: nn.LayerNorm, dropout: nn.Dropout, x: Tensor, last: Tensor | None, state: Tensor | None, again: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, T, C), the norm of the token before (B, C), WKV state (B, 3, C) -> x after, and both memories after.

    again: what the first products read is not kept, and computed again in the backward pass. Differentiable once.
    """
    return _TimeMix.apply(
        (dropout.p if dropout.training else 0.0, norm.eps, torch.is_autocast_enabled("cpu"), again),
        x, _float(last), _float(state), norm.weight, norm.bias, att.time_decay, att.time_first,
        att.time_mix_k, att.time_mix_v, att.time_mix_r,
        att.key.weight, att.value.weight, att.receptance.weight, att.output.weight,
    )  # fmt: skip


def channel_mix(
    ffn: Any, norm: nn.LayerNorm, dropout: nn.Dropout, x: Tensor, last: Tensor | None, again: bool
) -> tuple[Tensor, Tensor]:
    """x (B, T, C), the norm of the token before (B, C) -> x after, and the last norm. The rest is as in `time_mix`."""
    return _ChannelMix.apply(
        (dropout.p if dropout.training else 0.0, norm.eps, torch.is_autocast_enabled("cpu"), again),
        x, _float(last), norm.weight, norm.bias, ffn.time_mix_k, ffn.time_mix_r,
        ffn.key.weight, ffn.receptance.weight, ffn.value.weight,
    )  # fmt: skip


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


def _cast(to_half: bool, weights: tuple[Tensor, ...]) -> list[Tensor]:
    return [weight.to(torch.bfloat16 if to_half else torch.float32) for weight in weights]


def _drop(x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    """x after dropout, and what it was multiplied by: torch's own numbers."""
    if not p:
        return x, None
    noise = torch.empty_like(x).bernoulli_(1 - p)
    if p < 1:
        noise.div_(1 - p)
    return x * noise, noise


class _TimeMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, setting: Any, x: Tensor, last: Tensor | None, state: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        p, eps, to_half, again = setting
        norm, (decay, first), mixes, weights = parameters[:2], parameters[2:4], parameters[4:7], parameters[7:]
        w_key, w_value, w_receptance, w_output = matrices = _cast(to_half, weights)
        mixed, new_last, mean_rstd = ops.norm_mix(x, *norm, mixes, last, eps, to_half)
        key, value, receptance = product(mixed[0], w_key), product(mixed[1], w_value), product(mixed[2], w_receptance)
        wkv, new_state, tiles = ops.wkv4_forward(decay, first, key, value, state, TILE)
        y, noise = _drop(product(ops.gate(receptance, wkv, None), w_output), p)
        ctx.eps, ctx.to_half = eps, to_half
        ctx.save_for_backward(
            x, last, state, *parameters, *matrices, mean_rstd, key, value, receptance, wkv, tiles, noise,
            *([] if again else mixed),
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        return x + y, new_last, new_state

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: list[Any], g: Tensor | None, g_last: Tensor | None, g_state: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, last, state, *parameters = saved[:14]
        norm, (decay, first), mixes = parameters[:2], parameters[2:4], parameters[4:7]
        w_key, w_value, w_receptance, w_output = saved[14:18]
        mean_rstd, key, value, receptance, wkv, tiles, noise, *mixed = saved[18:]
        saved.clear()
        *need, needs_output = ctx.needs_input_grad[-4:]

        g = torch.zeros_like(x) if g is None else g
        g_y = g.to(w_output.dtype)
        if noise is not None:
            g_y = g_y * noise
        g_output = gradient_of_weight(g_y, ops.gate(receptance, wkv, None)) if needs_output else None
        g_receptance, g_wkv = ops.gate_backward(gradient_of_input(g_y, w_output), receptance, wkv)
        del g_y, receptance, wkv, noise
        g_decay, g_first, g_key, g_value, g_before = ops.wkv4_backward(
            decay, first, key, value, tiles, g_wkv, g_state, TILE
        )
        del g_wkv, key, value, tiles
        g_weights: list[Tensor | None] = [None, None, None]
        if any(need):
            if not mixed:
                mixed, *_ = ops.norm_mix(x, *norm, mixes, last, ctx.eps, ctx.to_half)
            g_weights = [gradient_of_weight(*pair) for pair in zip((g_key, g_value, g_receptance), mixed, strict=True)]
        del mixed
        g_mixed = [
            gradient_of_input(g_key, w_key),
            gradient_of_input(g_value, w_value),
            gradient_of_input(g_receptance, w_receptance),
        ]
        del g_key, g_value, g_receptance
        g_x, g_weight, g_bias, g_mixes, g_before_x = ops.norm_mix_backward(
            x, *norm, mixes, last, mean_rstd, g_mixed, g, g_last
        )
        return (
            None, g_x, None if last is None else g_before_x, None if state is None else g_before, g_weight, g_bias,
            g_decay, g_first, *g_mixes, *g_weights, g_output,
        )  # fmt: skip


class _ChannelMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, setting: Any, x: Tensor, last: Tensor | None, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        p, eps, to_half, again = setting
        norm, mixes, weights = parameters[:2], parameters[2:4], parameters[4:]
        w_key, w_receptance, w_value = matrices = _cast(to_half, weights)
        mixed, new_last, mean_rstd = ops.norm_mix(x, *norm, mixes, last, eps, to_half)
        square, receptance = product(mixed[0], w_key), product(mixed[1], w_receptance)
        # In place: the square is all that the backward pass needs, since its gradient is twice its root.
        ops.squared_relu_(square)
        value, noise = _drop(product(square, w_value), p)
        ctx.eps, ctx.to_half = eps, to_half
        ctx.save_for_backward(
            x, last, *parameters, *matrices, mean_rstd, square, receptance, value, noise, *([] if again else mixed)
        )
        ctx.set_materialize_grads(False)
        return ops.gate(receptance, value, x), new_last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: list[Any], g: Tensor | None, g_last: Tensor | None) -> tuple[Tensor | None, ...]:
        x, last, *parameters = saved[:9]
        norm, mixes = parameters[:2], parameters[2:4]
        w_key, w_receptance, w_value = saved[9:12]
        mean_rstd, square, receptance, value, noise, *mixed = saved[12:]
        saved.clear()
        *need, needs_value = ctx.needs_input_grad[-3:]

        g = torch.zeros_like(x) if g is None else g
        g_receptance, g_value = ops.gate_backward(g, receptance, value)
        del receptance, value
        if noise is not None:
            g_value = g_value * noise
        g_w_value = gradient_of_weight(g_value, square) if needs_value else None
        g_key = gradient_of_input(g_value, w_value)
        ops.squared_relu_backward_(g_key, square)
        del g_value, square, noise
        g_weights: list[Tensor | None] = [None, None]
        if any(need):
            if not mixed:
                mixed, *_ = ops.norm_mix(x, *norm, mixes, last, ctx.eps, ctx.to_half)
            g_weights = [gradient_of_weight(*pair) for pair in zip((g_key, g_receptance), mixed, strict=True)]
        del mixed
        g_mixed = [gradient_of_input(g_key, w_key), gradient_of_input(g_receptance, w_receptance)]
        del g_key, g_receptance
        g_x, g_weight, g_bias, g_mixes, g_before_x = ops.norm_mix_backward(
            x, *norm, mixes, last, mean_rstd, g_mixed, g, g_last
        )
        return (
            None, g_x, None if last is None else g_before_x, g_weight, g_bias, *g_mixes, *g_weights, g_w_value,
        )  # fmt: skip
