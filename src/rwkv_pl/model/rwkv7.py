"""RWKV-7 (Peng et al. 2025, arXiv 2503.14456): the whole model and its initialisation.

Like RWKV-4, it reads all tokens of a text in parallel in training, and one token at a time in generation, with a state
of fixed size. The state of a head is now a matrix, a memory of values by keys, and a token can also remove values from
it. Where the paper and the official training code differ, this file follows the code (RWKV-LM, RWKV-v7/train_temp).

    tokens -> embedding -> L blocks -> LayerNorm -> head -> logits of the next token
    block:  x = x + TimeMix(LayerNorm(x))       mixes information over time, like attention
            x = x + ChannelMix(LayerNorm(x))    mixes the channels of one token, like a feed-forward layer

    B  batch        T  time, tokens in a piece of text        C  channels, n_embd
    V  vocab_size   L  n_layer                                l  the index of a layer, from 0
    N  channels of a head, 64                                 H  heads, C / N

Parameter names and shapes are those of the official RWKV-7 `.pth` files. Files of some versions of the official code
also have v0, v1 and v2 in block 0. Nothing reads them, so this model does not have them.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwkv_pl.config import RWKV7Config
from rwkv_pl.model import block, rwkv7_fused
from rwkv_pl.model.language_model import LanguageModel, depth_ratios, token_shift
from rwkv_pl.ops.linear import Linear
from rwkv_pl.ops.wkv7 import HEAD_SIZE, wkv7


class TimeMix(nn.Module):
    """Time mixing, RWKV's replacement for attention (section 4, "Time Mixing").

    Six vectors are functions of six mixes of this token and the one before it: receptance r, key k and value v are
    linear; decay w, in-context learning rate a and gate g are of low rank. Per head, with the state S (rows are values,
    columns are keys) and kk, the key times k_k with length 1::

        S <- S diag(decay(w)) - (S kk) (a kk)^T + v k'^T        y = S r        k' = (1 + (a - 1) k_a) k

    Each channel of the keys decays, decay(w) = exp(-e^-0.5 sigmoid(w)), from 0.55 to 1. The value that was stored under
    the key, S kk, is removed to the fraction a, and the new value v is stored. The output is a linear function of
    g (GroupNorm(y) + (r . r_k k') v), where the second term is a bonus for the present token. The values of all layers
    but the first are mixed with those of the first layer, v_first.
    """

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        C, N = config.n_embd, config.head_size
        self.head_size = N
        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (_vector(C) for _ in range(6))
        self.w0, self.w1, self.w2 = _vector(C), _matrix(C, config.rank_w), _matrix(config.rank_w, C)
        self.a0, self.a1, self.a2 = _vector(C), _matrix(C, config.rank_a), _matrix(config.rank_a, C)
        if layer > 0:
            self.v0, self.v1, self.v2 = _vector(C), _matrix(C, config.rank_v), _matrix(config.rank_v, C)
        self.g1, self.g2 = _matrix(C, config.rank_g), _matrix(config.rank_g, C)
        self.k_k, self.k_a = _vector(C), _vector(C)
        self.r_k = _matrix(C // N, N)
        self.receptance = Linear(C, C)
        self.key = Linear(C, C)
        self.value = Linear(C, C)
        self.output = Linear(C, C)
        self.ln_x = nn.GroupNorm(C // N, C, eps=64e-5)
        self.reset_parameters(layer, config.n_layer)

    @torch.no_grad()
    def reset_parameters(self, layer: int, n_layer: int) -> None:
        """The official initialisation, a function of the channel and the layer.

        Channels forget at graded speeds, over the whole layer and again inside each head. The deeper the layer, the
        more its mixes favour the present token. The zero matrices make the low-rank functions constant, and the layer's
        output 0.
        """
        C, N = self.key.in_features, self.head_size
        r01, r10 = depth_ratios(layer, n_layer)
        i = torch.arange(C)
        x = i / C
        line = i / max(C - 1, 1) - 0.5
        zigzag = (i % N - (N - 1) / 2) / ((N - 1) / 2)
        zigzag = zigzag * zigzag.abs()
        for name, power in {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}.items():
            self.get_parameter(f"x_{name}").copy_(1 - x ** (power * r10))
        self.w0.copy_(-5.5 + 6 * (i / max(C - 1, 1)) ** (1 + r01**0.3) + 2.5 * zigzag)
        self.a0.copy_(-0.19 + 0.3 * zigzag + 0.4 * line)
        if layer > 0:
            self.v0.copy_(0.73 - 0.4 * line)
        for name in ("w", "a", "g") if layer == 0 else ("w", "a", "v", "g"):
            nn.init.zeros_(self.get_parameter(f"{name}1"))
            nn.init.orthogonal_(self.get_parameter(f"{name}2"), gain=0.1)
        self.k_k.copy_(0.71 - 0.1 * line)
        self.k_a.fill_(1.02)
        self.r_k.fill_(-0.04)
        nn.init.orthogonal_(self.receptance.weight)
        nn.init.orthogonal_(self.key.weight, gain=0.1)
        nn.init.orthogonal_(self.value.weight)
        nn.init.zeros_(self.output.weight)
        nn.init.constant_(self.ln_x.weight, ((layer + 1) / n_layer) ** 0.7)
        nn.init.zeros_(self.ln_x.bias)

    def forward(
        self, x: Tensor, shift: Tensor | None, state: Tensor | None, v_first: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, T, C), shift (B, C), WKV state (B, H, N, N), v_first (B, T, C)
        -> y (B, T, C), the new shift (the last x), the new WKV state, v_first.

        shift is the token before the first one; both it and the state are None at the start of a text. v_first is None
        in the first layer, which returns its own values.
        """
        x_prev = token_shift(x, shift)
        mixes = (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        x_r, x_w, x_k, x_v, x_a, x_g = (torch.lerp(x, x_prev, mix) for mix in mixes)
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        w = self.w0 + torch.tanh(x_w @ self.w1) @ self.w2
        a = torch.sigmoid(self.a0 + x_a @ self.a1 @ self.a2)
        g = torch.sigmoid(x_g @ self.g1) @ self.g2
        if v_first is None:
            v_first = v
        else:
            v = torch.lerp(v, v_first, torch.sigmoid(self.v0 + x_v @ self.v1 @ self.v2).to(v.dtype))

        kk = F.normalize(self._heads(k * self.k_k), dim=-1)
        k = (k * (1 + (a - 1) * self.k_a)).to(v.dtype)
        r, w, k, v, a = (self._heads(y) for y in (r, w, k, v, a))
        y, state = wkv7(r, w, k, v, -kk, a * kk, state)

        y = self.ln_x(y.flatten(0, 1).flatten(1)).view(v.shape)
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v
        return self.output((y + bonus).flatten(2) * g), x[:, -1], state, v_first

    def empty_wkv(self, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The WKV state at the start of `rows` texts, (rows, H, N, N)."""
        C, N = self.key.in_features, self.head_size
        return torch.zeros(rows, C // N, N, N, dtype=dtype, device=device)

    def _heads(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, H, N)."""
        return x.unflatten(-1, (-1, self.head_size))


class ChannelMix(nn.Module):
    """Channel mixing, RWKV's feed-forward layer (section 4, "MLP"): two matrices with a squared ReLU between them.

    The key is linear in a mix of this token and the one before it.
    """

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        C = config.n_embd
        self.x_k = _vector(C)
        self.key = Linear(C, config.n_ffn)
        self.value = Linear(config.n_ffn, C)
        self.reset_parameters(layer, config.n_layer)

    @torch.no_grad()
    def reset_parameters(self, layer: int, n_layer: int) -> None:
        """The official initialisation. The zero matrices here and in TimeMix make a new block the identity."""
        C = self.key.in_features
        _, r10 = depth_ratios(layer, n_layer)
        self.x_k.copy_(1 - (torch.arange(C) / C) ** (r10**4))
        nn.init.orthogonal_(self.key.weight)
        nn.init.zeros_(self.value.weight)

    def forward(self, x: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, T, C), shift (B, C) or None at the start of a text -> y (B, T, C), the new shift (the last x)."""
        key = self.key(torch.lerp(x, token_shift(x, shift), self.x_k))
        return self.value(torch.relu(key).square()), x[:, -1]


class Block(block.Block):
    """The two halves of a block of RWKV-7; `model/block.py` adds them to the residual stream.

    The time mixing also takes v_first (B, T, C) from the block before, and returns it.
    """

    time_mix_class, channel_mix_class = TimeMix, ChannelMix
    fused: ClassVar = rwkv7_fused
    library = "wkv7"

    def supports_fused(self, half: Any, kind: Any, norm: Any, x: Tensor) -> bool:
        """As in all versions; the fused time mixing also needs heads of the size that the operator is compiled for."""
        return (kind is ChannelMix or half.head_size == HEAD_SIZE) and super().supports_fused(half, kind, norm, x)


class RWKV7(LanguageModel):
    """The language model, from tokens to logits: `LanguageModel` with the blocks above.

    A text gives the same logits, to rounding, if it is read whole, in pieces or one token at a time.
    """

    block_class, library = Block, Block.library
    mark = r"att\.(w0|k_k|r_k)$"  # several: a file that lacks one of them is still recognised
    # The inputs of wkv7, their gradients, and those of its output, the receptance, the key, the value and the gate.
    backward_tensors = 17

    # The official factors of the learning rate, by the last part of a parameter's name.
    lr_scale = {"w0": 2.0}  # noqa: RUF012

    # Programs that build the model from settings, such as LightningCLI, read the type of config here.
    def __init__(self, config: RWKV7Config) -> None:
        super().__init__(config)

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of the products with matrices and with the state, forward and backward."""
        L, C, N = self.config.n_layer, self.config.n_embd, self.config.head_size
        # Of the two-dimensional parameters, only r_k is not a matrix. For each channel and step, the recurrence takes
        # 9 N operations, and its backward pass 24 N.
        return super().flops_per_token + L * C * (33 * N - 6)

    @classmethod
    def sizes(cls, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """The official files differ in the ranks and in the width of the channel mixing, so they are read as well."""
        found = super().sizes(tensors)
        for name, (parameter, dim) in {
            "head_size": ("blocks.0.att.r_k", -1),
            "n_ffn": ("blocks.0.ffn.key.weight", 0),
            "rank_w": ("blocks.0.att.w1", -1),
            "rank_a": ("blocks.0.att.a1", -1),
            "rank_v": ("blocks.1.att.v1", -1),
            "rank_g": ("blocks.0.att.g1", -1),
        }.items():
            if parameter in tensors and tensors[parameter].dim():
                found[name] = tensors[parameter].shape[dim]
        return found

    @classmethod
    def check_official(cls, sizes: Mapping[str, int]) -> None:
        """All official files have heads of 64 channels. For others, programs disagree on the GroupNorm's epsilon."""
        if sizes.get("head_size", HEAD_SIZE) != HEAD_SIZE:
            raise ValueError(f"it has heads of {sizes['head_size']} channels; only heads of {HEAD_SIZE} are supported")

    @classmethod
    def unread(cls, config: Any) -> dict[str, tuple[int, ...]]:
        C, rank = config.n_embd, config.rank_v
        return {"blocks.0.att.v0": (1, 1, C), "blocks.0.att.v1": (C, rank), "blocks.0.att.v2": (rank, C)}


def _vector(n_channels: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, 1, n_channels))


def _matrix(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns))
