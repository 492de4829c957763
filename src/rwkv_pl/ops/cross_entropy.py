"""Cross-entropy, and the largest logit that L2Wrap pulls on, of each row of logits.

N  rows, one for each target    V  vocab_size
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv_pl.ops.fused import fused_serves, once_differentiable

IGNORED = -1  # a target that pads a short window; its loss does not count


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits (N, V) in any float dtype, targets (N,) int64.

    Returns, in float32, the nats of each target (N,), 0 where it is ignored, and each row's largest logit (N,), whose
    gradient falls on the first such logit.

    On the CPU, in float32 or bfloat16, the logits are read once each way.
    """
    if fused_serves(logits, io=True):
        return _CrossEntropy.apply(logits, targets)
    nats = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="none")
    return nats, logits.max(-1).values.float()


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        nats, largest, log_sum, top = torch.ops.rwkv_pl.cross_entropy(logits, targets)
        ctx.save_for_backward(logits, targets, largest, log_sum, top)
        return nats, largest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], of_nats: Tensor, of_largest: Tensor) -> tuple[Tensor, None]:
        return torch.ops.rwkv_pl.cross_entropy_backward(*saved, of_nats, of_largest), None
