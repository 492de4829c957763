"""RWKV-4 (Peng et al. 2023, arXiv 2305.13048): the whole model and its initialisation.

RWKV is a language model that can be computed in two ways, with the same results. In training it reads all tokens of a
text in parallel, as a transformer does. In generation it reads one token at a time, as a recurrent network does, and
all it knows about the past is a state of fixed size. Section and equation numbers below are those of the paper.

    tokens -> embedding -> L blocks -> LayerNorm -> head -> logits of the next token
    block:  x = x + TimeMix(LayerNorm(x))       mixes information over time, like attention
            x = x + ChannelMix(LayerNorm(x))    mixes the channels of one token, like a feed-forward layer

    B  batch        T  time, tokens in a piece of text        C  channels, n_embd
    V  vocab_size   L  n_layer                                l  the index of a layer, from 0

Parameter names and shapes are those of the official RWKV-4 `.pth` files.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rwkv_pl.config import RWKV4Config
from rwkv_pl.model import block, rwkv4_fused
from rwkv_pl.model.language_model import LanguageModel, depth_ratios, token_shift
from rwkv_pl.ops.linear import Linear
from rwkv_pl.ops.wkv4 import wkv4
from rwkv_pl.ops.wkv4_reference import EMPTY


class TimeMix(nn.Module):
    """Time mixing, RWKV's replacement for attention (section 3.1.2, equations 11 to 18).

    WKV is a weighted mean of the values up to now, separately in each channel. The weight of a past token is
    exp(its key - its age * exp(time_decay)), with age 0 for the token just before; that of the present token is
    exp(its key + time_first). The mean is gated by sigmoid(receptance). Key, value and receptance are linear in a mix
    of this token and the one before it.
    """

    def __init__(self, config: RWKV4Config, layer: int) -> None:
        super().__init__()
        C = config.n_embd
        self.time_decay = nn.Parameter(torch.empty(C))
        self.time_first = nn.Parameter(torch.empty(C))
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_mix_v = nn.Parameter(torch.empty(1, 1, C))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, C))
        self.key = Linear(C, C)
        self.value = Linear(C, C)
        self.receptance = Linear(C, C)
        self.output = Linear(C, C)
        self.register_load_state_dict_pre_hook(_unsqueeze_time_mix)
        self.reset_parameters(*depth_ratios(layer, config.n_layer))

    @torch.no_grad()
    def reset_parameters(self, r01: float, r10: float) -> None:
        """The official initialisation, a function of the channel and the layer.

        Channels forget at graded speeds, from slowly (channel 0) to almost at once (channel C - 1). The deeper the
        layer, the more its mix favours the present token. The zero matrices make the layer's output 0. r01, r10: see
        `depth_ratios`.
        """
        C = len(self.time_decay)
        i = torch.arange(C)
        x = i / C
        self.time_decay.copy_(-5 + 8 * (i / max(C - 1, 1)) ** (0.7 + 1.3 * r01))
        self.time_first.copy_(math.log(0.3) + 0.5 * ((i + 1) % 3 - 1))
        self.time_mix_k.copy_(x**r10)
        self.time_mix_v.copy_(x**r10 + 0.3 * r01)
        self.time_mix_r.copy_(x ** (0.5 * r10))
        nn.init.orthogonal_(self.value.weight)
        for zero in (self.key, self.receptance, self.output):
            nn.init.zeros_(zero.weight)

    def forward(self, x: Tensor, shift: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C), shift (B, C), WKV state (B, 3, C) -> y (B, T, C), the new shift (the last x), the new WKV state.

        shift is the token before the first one; both it and the state are None at the start of a text.
        """
        x_prev = token_shift(x, shift)
        key = self.key(torch.lerp(x_prev, x, self.time_mix_k))
        value = self.value(torch.lerp(x_prev, x, self.time_mix_v))
        receptance = self.receptance(torch.lerp(x_prev, x, self.time_mix_r))
        wkv, state = wkv4(self.time_decay, self.time_first, key, value, state)
        return self.output(torch.sigmoid(receptance) * wkv), x[:, -1], state

    def empty_wkv(self, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The WKV state at the start of `rows` texts, (rows, 3, C)."""
        wkv = torch.zeros(rows, 3, self.key.in_features, dtype=dtype, device=device)
        wkv[:, 2] = EMPTY
        return wkv


class ChannelMix(nn.Module):
    """Channel mixing, RWKV's feed-forward layer (section 3.1.3, equations 19 to 21).

    Two matrices with a squared ReLU between them, gated by sigmoid(receptance). Key and receptance are linear in a mix
    of this token and the one before it.
    """

    def __init__(self, config: RWKV4Config, layer: int) -> None:
        super().__init__()
        C = config.n_embd
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, C))
        self.key = Linear(C, 4 * C)
        self.receptance = Linear(C, C)
        self.value = Linear(4 * C, C)
        self.register_load_state_dict_pre_hook(_unsqueeze_time_mix)
        self.reset_parameters(*depth_ratios(layer, config.n_layer))

    @torch.no_grad()
    def reset_parameters(self, r01: float, r10: float) -> None:
        """The official initialisation. The zero matrices here and in TimeMix make a new block the identity."""
        C = self.key.in_features
        x = torch.arange(C) / C
        self.time_mix_k.copy_(x**r10)
        self.time_mix_r.copy_(x**r10)
        nn.init.orthogonal_(self.key.weight, gain=2)
        for zero in (self.receptance, self.value):
            nn.init.zeros_(zero.weight)

    def forward(self, x: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, T, C), shift (B, C) or None at the start of a text -> y (B, T, C), the new shift (the last x)."""
        x_prev = token_shift(x, shift)
        key = self.key(torch.lerp(x_prev, x, self.time_mix_k))
        receptance = self.receptance(torch.lerp(x_prev, x, self.time_mix_r))
        return torch.sigmoid(receptance) * self.value(torch.relu(key).square()), x[:, -1]


class Block(block.Block):
    """The two halves of a block of RWKV-4; `model/block.py` adds them to the residual stream."""

    time_mix_class, channel_mix_class = TimeMix, ChannelMix
    fused: ClassVar = rwkv4_fused
    library = "wkv4"


class RWKV4(LanguageModel):
    """The language model, from tokens to logits: `LanguageModel` with the blocks above.

    A text gives the same logits, to rounding, if it is read whole, in pieces or one token at a time.
    """

    block_class, library = Block, Block.library
    mark = r"att\.time_first$"

    # The official factors of the learning rate, by the last part of a parameter's name.
    lr_scale = {"time_decay": 2.0, "time_first": 3.0}  # noqa: RUF012

    # Programs that build the model from settings, such as LightningCLI, read the type of config here.
    def __init__(self, config: RWKV4Config) -> None:
        super().__init__(config)


def _unsqueeze_time_mix(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Reshape time_mix parameters to (1, 1, C) on loading: some official files have them as (C,)."""
    for name in ("time_mix_k", "time_mix_v", "time_mix_r"):
        if (mix := state_dict.get(prefix + name)) is not None:
            state_dict[prefix + name] = mix.reshape(1, 1, -1)
