"""Which token follows, given the model's logits.

B  rows    V  vocab_size
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A logit that is still a number when another is taken from it.
MAX_LOGIT = 1e300


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. In this order:

    repetition:  above 1, what occurred among the last `window` tokens becomes less likely: its logit is divided by
                 this where positive, multiplied where negative (CTRL, arXiv 1909.05858, section 4.1); 1 is off.
    temperature: what the logits are divided by; 0 takes the likeliest token.
    top_k:       only the k likeliest tokens; 0 is off, and more than there are is all.
    top_p:       only the likeliest tokens that together have this probability (arXiv 1904.09751, section 3.1); the
                 best one always, and from 1 on all.

    Raises ValueError for a number out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition: float = 1.0
    window: int = 256

    def __post_init__(self) -> None:
        for name, value, lowest in (
            ("temperature", self.temperature, 0),
            ("top_k", self.top_k, 0),
            ("top_p", self.top_p, 0),
            ("window", self.window, 1),
        ):
            if not (math.isfinite(value) and value >= lowest):
                raise ValueError(f"{name} must be at least {lowest}, got {value}")
        if not (math.isfinite(self.repetition) and self.repetition > 0):
            raise ValueError(f"repetition must be a number above 0 (1 is off), got {self.repetition}")

    def choose(self, logits: Tensor, recent: Sequence[Tensor], uniform: Tensor) -> Tensor:
        """logits (B, V); of each row the tokens before (n,), and a number in [0, 1) (B,) float64 -> tokens (B,) int64.

        On the CPU, whatever the logits' device, so that a seed means the same everywhere. Raises FloatingPointError
        where a logit is not finite.
        """
        logits = logits.cpu().double()
        if not logits.isfinite().all():
            raise FloatingPointError("the model's outputs are not finite: its training has diverged")
        if self.repetition != 1:
            logits = logits.clone()
            for row, before in zip(logits, recent, strict=True):
                seen = before[max(0, len(before) - self.window) :]
                row[seen] = torch.where(row[seen] > 0, row[seen] / self.repetition, row[seen] * self.repetition)
            logits = logits.clamp(-MAX_LOGIT, MAX_LOGIT)
        if self.temperature == 0:
            return logits.argmax(-1)
        scores, tokens = (logits - logits.amax(-1, keepdim=True)) / self.temperature, None
        if self.top_k or self.top_p < 1:
            scores, tokens = scores.sort(dim=-1, descending=True, stable=True)
            scores = scores[:, : self.top_k or None]
        shares = scores.softmax(-1)
        if self.top_p < 1:
            better = shares.cumsum(-1) - shares
            better[:, 0] = -1  # the best token has none before it, and stays with a top_p of 0 too
            shares = torch.where(better < self.top_p, shares, 0)
        sums = shares.cumsum(-1)
        total = sums[:, -1:]
        index = (sums <= uniform[:, None] * total).sum(-1)
        # Where the product is rounded up to the whole: the last token that has a share.
        index = torch.minimum(index, (sums < total).sum(-1))
        return index if tokens is None else tokens.gather(-1, index[:, None])[:, 0]


class RowRandom:
    """Numbers in [0, 1), one stream a row: row i's is a function of (seed, i) alone, however many rows there are.

    seed None: one of torch's own generator, so that torch.manual_seed settles it.
    """

    def __init__(self, seed: int | None, rows: int) -> None:
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        self._generators = [torch.Generator().manual_seed(derive_seed(seed, i)) for i in range(rows)]

    def uniform(self) -> Tensor:
        """(rows,) float64."""
        return torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in self._generators])


def derive_seed(*numbers: int) -> int:
    """A generator's seed that is a function of several numbers, and unlike that of any others."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big")
