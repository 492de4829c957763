"""The parts of the training loss, and the byte count for bits per byte.

B  batch    T  time    V  vocab_size
"""

import reprlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rwkv_pl.errors import UserError
from rwkv_pl.ops.cross_entropy import IGNORE_INDEX

# The factor of L2Wrap in the official RWKV trainers, which divide by B * T too.
L2WRAP = 0.5e-4


def split_tokens(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """tokens (B, T+1) -> inputs (B, T), and targets (B, T) one step later. Padding (-1) becomes 0 in the inputs."""
    return tokens[:, :-1].clamp(min=0), tokens[:, 1:]


def split_batch(batch: Any) -> tuple[Tensor, Tensor]:
    """A batch -> inputs and targets, both (B, T). Raises TypeError for another kind of batch.

    A batch is tokens (B, T+1), a list or tuple of one such tensor, as a TensorDataset gives it, or a pair of inputs and
    targets, which are not shifted again. Targets of -1 are not counted. Of a batch of a stream, it takes the tokens.
    """
    batch = getattr(batch, "tokens", batch)
    parts = [batch] if isinstance(batch, Tensor) else list(batch) if isinstance(batch, list | tuple) else []
    if not 1 <= len(parts) <= 2 or not all(isinstance(part, Tensor) and part.dim() == 2 for part in parts):
        given = [tuple(getattr(part, "shape", ())) for part in parts] or type(batch).__name__
        raise TypeError(f"a batch must be tokens (B, T+1), or a pair of inputs and targets (B, T), not {given}")
    if len(parts) == 1:
        inputs, targets = split_tokens(parts[0])
        return inputs, targets.long()
    inputs, targets = parts
    if inputs.shape != targets.shape:
        raise TypeError(f"inputs {tuple(inputs.shape)} and targets {tuple(targets.shape)} must have one shape, (B, T)")
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets must be an int64 tensor, not {targets.dtype}")
    if targets.device.type == "cpu" and targets.numel() and targets.min() < IGNORE_INDEX:  # on a GPU, a sync
        raise IndexError(f"targets must be tokens, or {IGNORE_INDEX} if not counted, got {int(targets.min())}")
    return inputs.clamp(min=0), targets.long()


def check_byte_counts(bytes_per_token: Any) -> Tensor:
    """The bytes of each token as (V,) int64, from a tensor, an array or a list. Raises UserError for anything else."""
    wrong = "bytes_per_token must be one whole number of at least 0 for each token"
    try:
        given = np.asarray(bytes_per_token.cpu() if isinstance(bytes_per_token, Tensor) else bytes_per_token)
        counts = given.astype(np.int64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{wrong}, got {reprlib.repr(bytes_per_token)}") from error
    if given.ndim != 1 or not len(given):
        raise UserError(f"{wrong}, got the shape {given.shape}")
    if np.any(counts != given) or counts.min() < 0:
        raise UserError(f"{wrong}, got {reprlib.repr(given.tolist())}")
    return torch.as_tensor(counts)


def l2wrap(largest: Tensor) -> Tensor:
    """The penalty on the largest logits (B, T), which pulls them toward 0: 0.5e-4 * mean(largest^2), a scalar.

    Its gradient equals that of L2Wrap in the official trainers. As a term of the loss, it is also correct under
    gradient accumulation and loss scaling.
    """
    return L2WRAP * largest.square().mean()


def count_bytes(targets: Tensor, bytes_per_token: Tensor | None) -> Tensor:
    """The bytes of text in the targets (B, T), a scalar int64. bytes_per_token (V,) int64; None: one byte each."""
    counted = targets[targets != IGNORE_INDEX]
    if bytes_per_token is None:
        return torch.tensor(counted.numel(), device=targets.device)
    return bytes_per_token[counted].sum()
