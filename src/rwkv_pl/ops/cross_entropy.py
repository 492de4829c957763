"""Cross-entropy of each row of logits, and the row's largest logit, the input of L2Wrap.

N  rows, one per target    V  vocab_size
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rwkv_pl.ops.autograd import once_differentiable
from rwkv_pl.ops.backend import supports_elementwise

IGNORE_INDEX = -1  # the target value of padding, which is not counted in the loss


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of logits (N, V), in any float dtype, with targets (N,) int64.

    Returns the nats of each target (N,), 0 if it is ignored, and the largest logit of each row (N,), whose gradient
    goes to the first logit of that value. Both are float32, or float64 for float64 logits.

    For float32 or bfloat16 on the CPU, forward and backward each read the logits once.
    """
    if supports_elementwise(logits, io=True):
        return _CrossEntropy.apply(logits, targets)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nats = F.cross_entropy(wide, targets, ignore_index=IGNORE_INDEX, reduction="none")
    return nats, logits.max(-1).values.to(nats.dtype)


def head_cross_entropy(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, chunk_len: int | None = None
) -> tuple[Tensor, Tensor]:
    """`cross_entropy` of head(hidden), for hidden (..., C) and targets (...); the results have the targets' shape.

    chunk_len: the number of rows whose logits are in memory at once; the backward pass recomputes them. None: all rows
    at once, without recomputation.
    """

    def chunk_cross_entropy(some_hidden: Tensor, some_targets: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy(head(some_hidden), some_targets)

    rows, flat_targets = hidden.flatten(0, -2), targets.flatten()
    if chunk_len is None or chunk_len >= len(rows):
        nats, largest = chunk_cross_entropy(rows, flat_targets)
        return nats.view_as(targets), largest.view_as(targets)
    chunks = zip(rows.split(chunk_len), flat_targets.split(chunk_len), strict=True)
    if torch.is_grad_enabled():
        # The head draws no random numbers, so the generator's state need not be restored.
        parts = [
            checkpoint(chunk_cross_entropy, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks
        ]
    else:
        parts = [chunk_cross_entropy(*chunk) for chunk in chunks]
    nats, largest = (torch.cat(part) for part in zip(*parts, strict=True))
    return nats.view_as(targets), largest.view_as(targets)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        nats, largest, log_sum, top = torch.ops.rwkv_pl.cross_entropy(logits, targets)
        ctx.save_for_backward(logits, targets, largest, log_sum, top)
        return nats, largest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad_nats: Tensor, grad_largest: Tensor) -> tuple[Tensor, None]:
        return torch.ops.rwkv_pl.cross_entropy_backward(*saved, grad_nats, grad_largest), None
