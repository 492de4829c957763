"""RWKV-7's block with fused operators on the CPU: fewer passes over memory, and fewer tensors saved for backward.

:func:`time_mix` computes `x + dropout(att(ln1(x)))` and :func:`channel_mix` computes `x + dropout(ffn(ln2(x)))`, to
rounding.

    B  batch    T  time    C  channels    H  heads    N  channels of a head
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_pl.model.fused import apply_dropout, cast, to_float32
from rwkv_pl.ops.autograd import once_differentiable
from rwkv_pl.ops.linear import gradient_of_input, gradient_of_weight, product
from rwkv_pl.ops.wkv7 import CPU_STRETCH, HEAD_SIZE

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
    v_first: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (B, T, C), shift (B, C), WKV state (B, H, N, N), v_first (B, T, C) -> x plus the update, the new shift, the new
    WKV state, v_first.

    shift is the normalised token before the first one; v_first is None in the first layer. recompute: recompute the
    inputs of the first matrix products in the backward pass instead of saving them. Differentiable once.
    """
    has_first = v_first is not None
    x, new_shift, state, *first = _TimeMix.apply(
        (dropout.p if dropout.training else 0.0, norm.eps, att.ln_x.eps, torch.is_autocast_enabled("cpu"), recompute,
         torch.is_grad_enabled()),
        x, to_float32(shift), to_float32(state), v_first, norm.weight, norm.bias,
        att.x_r, att.x_w, att.x_k, att.x_v, att.x_a, att.x_g,
        att.w0, att.a0, att.v0 if has_first else None, att.k_k, att.k_a, att.r_k, att.ln_x.weight, att.ln_x.bias,
        att.w1, att.w2, att.a1, att.a2, *((att.v1, att.v2) if has_first else (None, None)), att.g1, att.g2,
        att.receptance.weight, att.key.weight, att.value.weight, att.output.weight,
    )  # fmt: skip
    return x, new_shift, state, v_first if v_first is not None else first[0]


def channel_mix(
    ffn: Any, norm: nn.LayerNorm, dropout: nn.Dropout, x: Tensor, shift: Tensor | None, recompute: bool
) -> tuple[Tensor, Tensor]:
    """x (B, T, C), shift (B, C) -> x plus the update, the new shift. shift and recompute are as in `time_mix`."""
    return _ChannelMix.apply(
        (dropout.p if dropout.training else 0.0, norm.eps, torch.is_autocast_enabled("cpu"), recompute),
        x, to_float32(shift), norm.weight, norm.bias, ffn.x_k, ffn.key.weight, ffn.value.weight,
    )  # fmt: skip


def _heads(x: Tensor) -> Tensor:
    """x (B, T, C) -> (B, T, H, N)."""
    return x.unflatten(-1, (-1, HEAD_SIZE))


def _of_this(mixes: Sequence[Tensor]) -> list[Tensor]:
    """The weights of the present token, which the operator expects: RWKV-7's are those of the token before."""
    return [1 - mix for mix in mixes]


class _TimeMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        options: Any,
        x: Tensor,
        shift: Tensor | None,
        state: Tensor | None,
        v_first: Tensor | None,
        *parameters: Any,
    ) -> tuple[Tensor, ...]:
        p, eps, eps_x, to_bf16, recompute, grad_enabled = options
        norm, mixes, vectors, after = parameters[:2], parameters[2:8], parameters[8:13], parameters[13:16]
        w1, w2, a1, a2, v1, v2, g1, g2, w_r, w_k, w_v, w_o = matrices = cast(to_bf16, parameters[16:])
        mixed, new_shift, mean_rstd = ops.norm_token_shift(x, *norm, _of_this(mixes), shift, eps, to_bf16)
        x_r, x_w, x_k, x_v, x_a, x_g = mixed
        r, k, v = product(x_r, w_r), product(x_k, w_k), product(x_v, w_v)
        tanh_w, sigmoid_g = torch.tanh(product(x_w, w1.T)), torch.sigmoid(product(x_g, g1.T))
        low_a, low_v = product(x_a, a1.T), None if v_first is None else product(x_v, v1.T)
        w, a, g = product(tanh_w, w2.T), product(low_a, a2.T), product(sigmoid_g, g2.T)
        m = None if low_v is None else product(low_v, v2.T)
        decay, key, value, removed, added = ops.rwkv7_prepare(k, v, w, a, m, v_first, *vectors)
        value = v if v_first is None else value
        stretch = CPU_STRETCH if grad_enabled and any(ctx.needs_input_grad) else 0
        heads = map(_heads, (r, decay, key, value, removed, added))
        wkv, new_state, states, sa = ops.wkv7_forward(*heads, state, stretch)
        wkv = wkv.flatten(2)
        y, noise = apply_dropout(product(ops.rwkv7_output(wkv, r, key, value, g, *after, eps_x), w_o), p)
        ctx.eps, ctx.eps_x, ctx.to_bf16 = eps, eps_x, to_bf16
        ctx.save_for_backward(
            x, shift, state, v_first, *parameters, *matrices, mean_rstd, r, k, v, w, a, m, g,
            tanh_w, low_a, low_v, sigmoid_g, wkv, states, sa, noise, *([] if recompute else mixed),
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        return x + y, new_shift, new_state, *((v,) if v_first is None else ())

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        saved: list[Any],
        grad: Tensor | None,
        grad_new_shift: Tensor | None,
        grad_new_state: Tensor | None,
        grad_first: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        x, shift, state, v_first, *parameters = saved[:32]
        norm, mixes, vectors, after = parameters[:2], parameters[2:8], parameters[8:13], parameters[13:16]
        w1, w2, a1, a2, v1, v2, g1, g2, w_r, w_k, w_v, w_o = saved[32:44]
        mean_rstd, r, k, v, w, a, m, g, tanh_w, low_a, low_v, sigmoid_g, wkv, states, sa, noise, *mixed = saved[44:]
        saved.clear()

        grad = torch.zeros_like(x) if grad is None else grad
        grad_y = grad.to(w_o.dtype)
        if noise is not None:
            grad_y = grad_y * noise
        decay, key, value, removed, added = ops.rwkv7_prepare(k, v, w, a, m, v_first, *vectors)
        value = v if v_first is None else value
        inputs = wkv, r, key, value, g, *after, ctx.eps_x
        grad_w_o = gradient_of_weight(grad_y, ops.rwkv7_output(*inputs))
        grad_wkv, grad_r, grad_key, grad_value, grad_g, *grad_after = ops.rwkv7_output_backward(
            gradient_of_input(grad_y, w_o), *inputs
        )
        del grad_y, noise, inputs, wkv, g
        heads = map(_heads, (r, decay, key, value, removed, added))
        grads = ops.wkv7_backward(*heads, states, sa, _heads(grad_wkv), grad_new_state, CPU_STRETCH)
        grad_r2, grad_decay, grad_key2, grad_value2, grad_removed, grad_added = (of.flatten(2) for of in grads[:6])
        grad_state = grads[6]
        del heads, grad_wkv, states, sa, r, decay, key, value, removed, added
        grad_r += grad_r2
        grad_k, grad_v, grad_w, grad_a, grad_m, grad_v_first, (grad_w0, grad_a0, grad_k_k, grad_k_a, grad_v0) = (
            ops.rwkv7_prepare_backward(
                k, v, w, a, m, v_first, *vectors,
                grad_decay, [grad_key, grad_key2], [grad_value, grad_value2], grad_removed, grad_added,
            )
        )  # fmt: skip
        del k, v, w, a, m, grad_r2, grad_key, grad_key2, grad_value, grad_value2, grad_removed, grad_added
        if grad_first is not None:
            grad_v = grad_v + grad_first

        # Back through the low-rank products, whose weights are (rank, C) transposed.
        low_w = gradient_of_input(grad_w, w2.T) * (1 - tanh_w * tanh_w)
        low_g = gradient_of_input(grad_g, g2.T) * (sigmoid_g * (1 - sigmoid_g))
        grad_low_a = gradient_of_input(grad_a, a2.T)
        grad_w2, grad_g2 = gradient_of_weight(grad_w, tanh_w).T, gradient_of_weight(grad_g, sigmoid_g).T
        grad_a2 = gradient_of_weight(grad_a, low_a).T
        if not mixed:
            mixed, *_ = ops.norm_token_shift(x, *norm, _of_this(mixes), shift, ctx.eps, ctx.to_bf16)
        x_r, x_w, x_k, x_v, x_a, x_g = mixed
        grad_w1, grad_a1, grad_g1 = (
            gradient_of_weight(*pair).T for pair in ((low_w, x_w), (grad_low_a, x_a), (low_g, x_g))
        )
        grad_w_r, grad_w_k, grad_w_v = (
            gradient_of_weight(*pair) for pair in ((grad_r, x_r), (grad_k, x_k), (grad_v, x_v))
        )
        grad_x_v, grad_v1, grad_v2 = gradient_of_input(grad_v, w_v), None, None
        if v_first is not None:
            grad_low_v = gradient_of_input(grad_m, v2.T)
            grad_v2, grad_v1 = gradient_of_weight(grad_m, low_v).T, gradient_of_weight(grad_low_v, x_v).T
            grad_x_v += gradient_of_input(grad_low_v, v1.T)
        del mixed, x_r, x_w, x_k, x_v, x_a, x_g
        grad_mixed = [
            gradient_of_input(grad_r, w_r),
            gradient_of_input(low_w, w1.T),
            gradient_of_input(grad_k, w_k),
            grad_x_v,
            gradient_of_input(grad_low_a, a1.T),
            gradient_of_input(low_g, g1.T),
        ]
        del grad_r, grad_k, grad_v, grad_w, grad_a, grad_g
        grad_x, grad_weight, grad_bias, grad_mixes, grad_shift = ops.norm_token_shift_backward(
            x, *norm, _of_this(mixes), shift, mean_rstd, grad_mixed, grad, grad_new_shift
        )
        has_first = v_first is not None
        return (
            None, grad_x, None if shift is None else grad_shift, None if state is None else grad_state,
            grad_v_first if has_first else None, grad_weight, grad_bias, *(-of for of in grad_mixes),
            grad_w0, grad_a0, grad_v0 if has_first else None, grad_k_k, grad_k_a, *grad_after,
            grad_w1, grad_w2, grad_a1, grad_a2, grad_v1, grad_v2, grad_g1, grad_g2,
            grad_w_r, grad_w_k, grad_w_v, grad_w_o,
        )  # fmt: skip


class _ChannelMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Any, x: Tensor, shift: Tensor | None, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        p, eps, to_bf16, recompute = options
        norm, mixes = parameters[:2], parameters[2:3]
        w_key, w_value = matrices = cast(to_bf16, parameters[3:])
        mixed, new_shift, mean_rstd = ops.norm_token_shift(x, *norm, _of_this(mixes), shift, eps, to_bf16)
        square = product(mixed[0], w_key)
        # In place: the backward pass needs only the square, since the derivative is twice its root.
        ops.squared_relu_(square)
        value, noise = apply_dropout(product(square, w_value), p)
        ctx.eps, ctx.to_bf16 = eps, to_bf16
        ctx.save_for_backward(x, shift, *parameters, *matrices, mean_rstd, square, noise, *([] if recompute else mixed))
        ctx.set_materialize_grads(False)
        return x + value, new_shift

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: list[Any], grad: Tensor | None, grad_new_shift: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, shift, *parameters = saved[:7]
        norm, mixes = parameters[:2], parameters[2:3]
        w_key, w_value, mean_rstd, square, noise, *mixed = saved[7:]
        saved.clear()

        grad = torch.zeros_like(x) if grad is None else grad
        grad_value = grad.to(w_value.dtype)
        if noise is not None:
            grad_value = grad_value * noise
        grad_w_value = gradient_of_weight(grad_value, square)
        grad_key = gradient_of_input(grad_value, w_value)
        ops.squared_relu_backward_(grad_key, square)
        del grad_value, square, noise
        if not mixed:
            mixed, *_ = ops.norm_token_shift(x, *norm, _of_this(mixes), shift, ctx.eps, ctx.to_bf16)
        grad_w_key = gradient_of_weight(grad_key, mixed[0])
        del mixed
        grad_mixed = [gradient_of_input(grad_key, w_key)]
        del grad_key
        grad_x, grad_weight, grad_bias, grad_mixes, grad_shift = ops.norm_token_shift_backward(
            x, *norm, _of_this(mixes), shift, mean_rstd, grad_mixed, grad, grad_new_shift
        )
        return (
            None, grad_x, None if shift is None else grad_shift, grad_weight, grad_bias, -grad_mixes[0],
            grad_w_key, grad_w_value,
        )  # fmt: skip
