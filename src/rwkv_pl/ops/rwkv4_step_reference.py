"""One token of RWKV-4 for every row of a batch, in plain torch: what `rwkv4_step` computes.

Letters: B rows, C channels, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv_pl.ops.wkv4_reference import EMPTY, wkv4_recurrence

__all__ = ["rwkv4_step_reference"]

# Parameters of one block.
A_BLOCK = 18


def rwkv4_step_reference(
    parameters: Sequence[Tensor], tokens: Tensor, state: Sequence[Tensor] = ()
) -> tuple[Tensor, tuple[tuple[Tensor, Tensor, Tensor], ...]]:
    """The arguments and results of :func:`rwkv_pl.ops.rwkv4_step.rwkv4_step`, in the one dtype of what is given."""
    emb, ln0_weight, ln0_bias, *blocks, ln_out_weight, ln_out_bias, head = parameters
    layers = len(blocks) // A_BLOCK
    state = state or layers * _nothing(emb, len(tokens))
    after = []
    x = _norm(emb[tokens], ln0_weight, ln0_bias)
    for layer in range(layers):
        (
            ln1_weight, ln1_bias, ln2_weight, ln2_bias,
            time_decay, time_first, mix_k, mix_v, mix_r, key, value, receptance, output,
            ffn_mix_k, ffn_mix_r, ffn_key, ffn_receptance, ffn_value,
        ) = blocks[A_BLOCK * layer : A_BLOCK * (layer + 1)]  # fmt: skip
        att_shift, wkv, ffn_shift = state[3 * layer : 3 * layer + 3]

        now = _norm(x, ln1_weight, ln1_bias)
        k = torch.lerp(att_shift, now, mix_k.flatten()) @ key.T
        v = torch.lerp(att_shift, now, mix_v.flatten()) @ value.T
        r = torch.lerp(att_shift, now, mix_r.flatten()) @ receptance.T
        mean, wkv = wkv4_recurrence(time_decay, time_first, k[:, None], v[:, None], wkv)
        x = x + (torch.sigmoid(r) * mean[:, 0]) @ output.T
        att_shift = now

        now = _norm(x, ln2_weight, ln2_bias)
        k = torch.lerp(ffn_shift, now, ffn_mix_k.flatten()) @ ffn_key.T
        r = torch.lerp(ffn_shift, now, ffn_mix_r.flatten()) @ ffn_receptance.T
        x = x + torch.sigmoid(r) * (torch.relu(k).square() @ ffn_value.T)
        after.append((att_shift, wkv, now))
    return _norm(x, ln_out_weight, ln_out_bias) @ head.T, tuple(after)


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _nothing(like: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's state where a text begins."""
    shift, wkv = like.new_zeros(batch, like.shape[1]), like.new_zeros(batch, 3, like.shape[1])
    wkv[:, 2] = EMPTY
    return shift, wkv, shift
