"""What a block remembers between two stretches of a text."""

from typing import NamedTuple

from torch import Tensor


class BlockState(NamedTuple):
    """One block's memory; the batch comes first in every tensor.

    att_shift: (B, C), the last token's input of the time mixing.
    wkv:       (B, ...), the version's own; for RWKV-4 (B, 3, C), rows num, den, max_exp (see `rwkv_pl.ops.wkv4`).
    ffn_shift: (B, C), the last token's input of the channel mixing.
    """

    att_shift: Tensor
    wkv: Tensor
    ffn_shift: Tensor


State = tuple[BlockState, ...]
"""A model's memory, one entry a block; None, where it is asked for, is that of a text that begins."""
