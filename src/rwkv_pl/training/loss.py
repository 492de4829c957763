"""What is minimised, and what is reported.

B  batch    T  time    C  channels, n_embd    V  vocab_size
"""

import torch
from torch import Tensor

from rwkv_pl.ops.cross_entropy import IGNORE_INDEX

# L2Wrap's factor in the official RWKV trainers, there divided by B * T as here.
L2WRAP = 0.5e-4


def split_tokens(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """tokens (B, T+1) -> inputs (B, T) and targets (B, T), one step later. Padding stays in the targets alone."""
    return tokens[:, :-1].clamp(min=0), tokens[:, 1:]


def l2wrap(largest: Tensor) -> Tensor:
    """The pull of the largest logits (B, T) toward 0: 0.5e-4 * mean(largest^2), a scalar.

    Its gradient is that of the official trainers' L2Wrap; as a term of the loss it stays right under gradient
    accumulation and loss scaling.
    """
    return L2WRAP * largest.square().mean()


def count_bytes(targets: Tensor, bytes_per_token: Tensor | None) -> Tensor:
    """Bytes that the targets (B, T) spell, a scalar int64. bytes_per_token (V,) int64; None: each is one byte."""
    counted = targets[targets != IGNORE_INDEX]
    if bytes_per_token is None:
        return torch.tensor(counted.numel(), device=targets.device)
    return bytes_per_token[counted].sum()
