"""The recurrent state, which the model carries from one piece of a text to the next; its size never grows."""

from typing import NamedTuple

from torch import Tensor


class BlockState(NamedTuple):
    """The state of one block. The first dimension of every tensor is the batch.

    att_shift: (B, C), the last token's input to the time mixing, for its token shift.
    wkv:       (B, ...), the sums over the past, in a shape that depends on the version. In RWKV-4 it is (B, 3, C),
               the rows num, den and max_exp (see `rwkv_pl.ops.wkv4`), in RWKV-7 (B, H, N, N), for each head a matrix
               of values by keys (see `rwkv_pl.ops.wkv7`).
    ffn_shift: (B, C), the last token's input to the channel mixing, for its token shift.
    """

    att_shift: Tensor
    wkv: Tensor
    ffn_shift: Tensor


State = tuple[BlockState, ...]
"""The state of a model, one entry per block.

As an argument, None means the empty state, at the start of a text. A model's `empty_state(rows)` is this state in
tensors, for batches in which only some of the rows start a text.
"""
