"""Draws the next token from the model's logits.

B  rows    V  vocab_size
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Logits are clamped to this, so that the difference of two is finite in float64.
MAX_LOGIT = 1e300


@dataclass(frozen=True)
class Sampling:
    """The sampling parameters, applied in this order:

    repetition:  above 1, tokens among the last `window` become less likely: positive logits are divided by it,
                 negative ones multiplied (CTRL, arXiv 1909.05858, section 4.1). 1 is off.
    temperature: divides the logits; 0 selects the likeliest token.
    top_k:       keeps only the k likeliest tokens; 0, or k >= V, is off.
    top_p:       keeps the fewest likeliest tokens whose total probability reaches p, at least one (nucleus sampling,
                 arXiv 1904.09751, section 3.1); above 0, and 1 is off.

    Raises ValueError for a number out of range.
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
            ("window", self.window, 1),
        ):
            if not (math.isfinite(value) and value >= lowest):
                raise ValueError(f"{name} must be at least {lowest}, got {value}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p:g}")
        if not (math.isfinite(self.repetition) and self.repetition > 0):
            raise ValueError(f"repetition must be a number above 0 (1 is off), got {self.repetition}")

    def choose(self, logits: Tensor, recent: Sequence[Tensor], uniform: Tensor) -> Tensor:
        """Draw one token for each row of logits (B, V) -> tokens (B,) int64.

        recent: the preceding tokens (n,) of each row. uniform: numbers in [0, 1), (B,) float64.

        Runs on the CPU for logits on any device, so that a seed gives the same text everywhere. Raises
        FloatingPointError if a logit is not finite.
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
        tokens = None
        if self.top_k or self.top_p < 1:
            # Before the subtraction, which can round different logits to the same score.
            logits, tokens = logits.sort(dim=-1, descending=True, stable=True)
            logits = logits[:, : self.top_k or None]
        scores = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        shares = scores.softmax(-1)
        if self.top_p < 1:
            better = shares.cumsum(-1) - shares
            shares = torch.where(better < self.top_p, shares, 0)
        sums = shares.cumsum(-1)
        total = sums[:, -1:]
        index = (sums <= uniform[:, None] * total).sum(-1)
        # If the product rounds up to the total, take the last token with a share above 0.
        index = torch.minimum(index, (sums < total).sum(-1))
        return index if tokens is None else tokens.gather(-1, index[:, None])[:, 0]


class RowRandom:
    """Random numbers in [0, 1), one stream per row. Row i depends only on (seed, i), not on the number of rows.

    If seed is None, it is drawn from torch's global generator, so torch.manual_seed determines it.
    """

    def __init__(self, seed: int | None, rows: int) -> None:
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        self._generators = [torch.Generator().manual_seed(derive_seed(seed, i)) for i in range(rows)]

    def uniform(self) -> Tensor:
        """The next number of each row: (rows,) float64."""
        return torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in self._generators])


def derive_seed(*numbers: int) -> int:
    """Hash several numbers to one 64-bit seed for a generator."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big")
