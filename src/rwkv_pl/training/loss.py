"""What is minimised, and what is reported.

B  batch    T  time    C  channels, n_embd    V  vocab_size
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rwkv_pl.ops.cross_entropy import IGNORED
from rwkv_pl.ops.cross_entropy import cross_entropy as cross_entropy_of_rows

# L2Wrap's factor in the official RWKV trainers, there divided by B * T as here.
L2WRAP = 0.5e-4


def split_tokens(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """tokens (B, T+1) -> inputs (B, T) and targets (B, T), one step later. Padding stays in the targets alone."""
    return tokens[:, :-1].clamp(min=0), tokens[:, 1:]


def cross_entropy(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, chunk_len: int | None = None
) -> tuple[Tensor, Tensor]:
    """What the model's `head` makes of its `hidden` (B, T, C), judged by targets (B, T).

    Returns, in float32, the nats of each target (B, T), 0 where it is ignored, and each place's largest logit (B, T).

    chunk_len: the logits of so many tokens are there at once, and are made again in the backward pass; None: all of
        them. The same numbers but for the order in which a gradient of the head is summed.
    """

    def of(some_hidden: Tensor, some_targets: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy_of_rows(head(some_hidden), some_targets)

    rows, flat_targets = hidden.flatten(0, 1), targets.flatten()
    if chunk_len is None or chunk_len >= len(rows):
        nats, largest = of(rows, flat_targets)
        return nats.view_as(targets), largest.view_as(targets)
    chunks = zip(rows.split(chunk_len), flat_targets.split(chunk_len), strict=True)
    if torch.is_grad_enabled():
        # The head draws no random numbers, so there is no generator to put back.
        parts = [checkpoint(of, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    else:
        parts = [of(*chunk) for chunk in chunks]
    nats, largest = (torch.cat(part) for part in zip(*parts, strict=True))
    return nats.view_as(targets), largest.view_as(targets)


def l2wrap(largest: Tensor) -> Tensor:
    """The pull of the largest logits (B, T) toward 0: 0.5e-4 * mean(largest^2), a scalar.

    Its gradient is that of the official trainers' L2Wrap; as a term of the loss it stays right under gradient
    accumulation and loss scaling.
    """
    return L2WRAP * largest.square().mean()


def bits_per_byte(nats: float, n_bytes: float) -> float:
    """The summed cross-entropy of a text in nats, over the bytes that the text has. NaN where it has none."""
    return nats / (math.log(2) * n_bytes) if n_bytes else math.nan


def count_bytes(targets: Tensor, bytes_per_token: Tensor | None) -> Tensor:
    """Bytes that the targets (B, T) spell, a scalar int64. bytes_per_token (V,) int64; None: each is one byte."""
    counted = targets[targets != IGNORED]
    if bytes_per_token is None:
        return torch.tensor(counted.numel(), device=targets.device)
    return bytes_per_token[counted].sum()
