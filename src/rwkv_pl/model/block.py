"""The block of all versions: a half that mixes over time, then a half that mixes channels.

B  batch    T  time    C  channels
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from rwkv_pl.model.fused import supports
from rwkv_pl.model.state import BlockState


class Block(nn.Module):
    """Time mixing, then channel mixing. Each reads a normalised copy of the residual stream and is added to it.

    If the compiled operators support the input, the fused form of each half is used instead of the modules.
    """

    time_mix_class: ClassVar[Any]
    channel_mix_class: ClassVar[Any]
    """The classes of the halves, built with (config, layer)."""

    fused: ClassVar[Any]
    """The module with the fused forms of the halves, `time_mix` and `channel_mix`."""

    library: ClassVar[str]
    """The library of the version's compiled operators; see `LanguageModel`."""

    recompute_from = 4096

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        # The norm of the embedding is in the first block because the official files name it so.
        self.ln0 = nn.LayerNorm(config.n_embd) if layer == 0 else nn.Identity()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.att = self.time_mix_class(config, layer)
        self.ffn = self.channel_mix_class(config, layer)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, state: BlockState | None, *shared: Tensor) -> tuple[Any, ...]:
        """x (B, T, C), the block's state before -> x (B, T, C), and the state after the last token.

        shared: what the block before returned after its state; in RWKV-4 nothing.
        """
        att_shift, wkv, ffn_shift = state or (None, None, None)
        recompute = x.shape[0] * x.shape[1] >= self.recompute_from
        x = self.ln0(x)
        if self.supports_fused(self.att, self.time_mix_class, self.ln1, x):
            x, att_shift, wkv, *shared = self.fused.time_mix(
                self.att, self.ln1, self.dropout, x, att_shift, wkv, recompute, *shared
            )
        else:
            y, att_shift, wkv, *shared = self.att(self.ln1(x), att_shift, wkv, *shared)
            x = x + self.dropout(y)
        if self.supports_fused(self.ffn, self.channel_mix_class, self.ln2, x):
            x, ffn_shift = self.fused.channel_mix(self.ffn, self.ln2, self.dropout, x, ffn_shift, recompute)
        else:
            y, ffn_shift = self.ffn(self.ln2(x), ffn_shift)
            x = x + self.dropout(y)
        return x, BlockState(att_shift, wkv, ffn_shift), *shared

    def supports_fused(self, half: Any, kind: Any, norm: Any, x: Tensor) -> bool:
        """Can the fused form replace this half of class `kind`, and its norm?"""
        return supports(self.library, half, kind, norm, self.dropout, x)
