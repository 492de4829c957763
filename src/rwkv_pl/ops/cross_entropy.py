"""Cross-entropy, and the largest logit that L2Wrap pulls on, of each row of logits.

    N  rows, one for each target    V  vocab_size
"""

from torch import Tensor
from torch.nn import functional as F

IGNORED = -1  # a target that pads a short window; its loss does not count


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits (N, V) in any float dtype, targets (N,) int64.

    Returns, in float32, the nats of each target (N,), 0 where it is ignored, and each row's largest logit (N,), whose
    gradient falls on the first such logit.
    """
    nats = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="none")
    return nats, logits.max(-1).values.float()
