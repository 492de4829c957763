"""The parts that all versions of RWKV share: embedding, a chain of blocks, head, and the names in a file of weights.

A version is a subclass of :class:`LanguageModel` with its own blocks, in a file of its name.

    B  batch        T  time, tokens in a piece of text        C  channels, n_embd
    V  vocab_size   L  n_layer                                l  the index of a layer, from 0
"""

import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv_pl.checks import check_tokens
from rwkv_pl.model.state import BlockState, State
from rwkv_pl.ops.linear import Linear
from rwkv_pl.ops.step import run_step, supports_step


class LanguageModel(nn.Module):
    """A language model of any version, from tokens to logits.

    A block is called with x (B, T, C), its state or None, and what the block before returned after its state. It
    returns x (B, T, C), its new state, and anything that the next block needs: nothing in RWKV-4.
    """

    block_class: ClassVar[Any]
    """The class of the blocks, built with (config, layer)."""

    library: ClassVar[str]
    """The library of its compiled operators, in rwkv_pl.ops.libraries."""

    mark: ClassVar[str]
    """A regular expression that a parameter's name in the files of this version matches, but of no earlier version."""

    lr_scale: ClassVar[dict[str, float]] = {}
    """The official factors of the learning rate, by the last part of a parameter's name."""

    backward_tensors: ClassVar[int] = 0
    """Float32 tensors of (B, T, C) that a block's backward pass has in memory at once, besides the saved ones; 0 if the
    gradient of its widest layer is larger."""

    activation_checkpointing = False
    """Whether to store only each block's input and recompute the rest in the backward pass; same gradients."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(self.block_class(config, layer) for layer in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = Linear(config.n_embd, config.vocab_size)
        self.reset_parameters()

    @property
    def recompute_from(self) -> int:
        """The number of tokens per micro-batch from which the fused blocks recompute the inputs of their first matrix
        products in the backward pass: it saves a quarter of a layer's memory for 1 to 2% of a step's time."""
        return self.blocks[0].recompute_from  # type: ignore[return-value]

    @recompute_from.setter
    def recompute_from(self, n_tokens: int) -> None:
        for block in self.blocks:
            block.recompute_from = n_tokens  # type: ignore[assignment]

    def hidden(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """tokens (B, T) int64, T >= 1 -> the head's input (B, T, C), and the state after the last token."""
        x = self._embed(tokens, state)
        shared: list[Tensor] = []
        after = []
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for block, before in zip(self.blocks, state or [None] * len(self.blocks), strict=True):
            if recompute:
                x, block_state, *shared = checkpoint(block, x, before, *shared, use_reentrant=False)
            else:
                x, block_state, *shared = block(x, before, *shared)
            after.append(block_state)
        return self.ln_out(x), tuple(after)

    def empty_state(self, rows: int) -> State:
        """The state at the start of a text, for `rows` texts: as an argument, the same as None, but in tensors."""
        dtype, device, state = self.emb.weight.dtype, self.emb.weight.device, []
        for block in self.blocks:
            att: Any = block.att
            shifts = torch.zeros(2, rows, self.config.n_embd, dtype=dtype, device=device)
            wkv = att.empty_wkv(rows, torch.promote_types(dtype, torch.float32), device)
            state.append(BlockState(shifts[0], wkv, shifts[1]))
        return tuple(state)

    def _embed(self, tokens: Tensor, state: State | None) -> Tensor:
        """tokens (B, T) -> (B, T, C). Wrong tokens, and a state of another size, raise an error that names them."""
        if torch.compiler.is_compiling():
            return self.emb(tokens)
        att: Any = self.blocks[0].att
        wkv_shape = att.empty_wkv(1, torch.float32, torch.device("meta")).shape[1:] if state else ()
        check_inputs(tokens, state, self.emb.weight, len(self.blocks), wkv_shape)
        try:
            return self.emb(tokens)
        except IndexError:  # raised on the CPU only; looking for the token before each step would slow it
            lowest, highest = (int(token) for token in tokens.aminmax())
            check_tokens(lowest, highest, len(self.emb.weight))
            raise

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """tokens (B, T) int64, T >= 1 -> logits (B, T, V), and the state after the last token.

        logits[:, t] are for the token after tokens[:, t].
        """
        hidden, state = self.hidden(tokens, state)
        return self.head(hidden), state

    @torch.no_grad()
    def step(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """`forward` for one token per text: tokens (B,) int64 -> logits (B, V) float32, and the state after it.

        For inference: it has no gradient. If the version's library has an operator for it (rwkv_pl.ops.step), it is one
        call of that with float32 or bfloat16 weights on the CPU. The operator computes in float32 and does not run
        hooks on the modules.
        """
        parameters = _list_parameters(self)
        if supports_step(self.library, parameters) and not (self.training and self.config.dropout):
            logits, after = run_step(self.library, parameters, tokens, [x for block in state or () for x in block])
            return logits, tuple(BlockState(*block) for block in after)
        hidden, state = self.hidden(tokens[:, None], state)
        return self.head(hidden[:, 0]).float(), state

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The official initialisation of the embedding and the head; the blocks initialise themselves."""
        V, C = self.config.vocab_size, self.config.n_embd
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
        nn.init.orthogonal_(self.head.weight, gain=0.5 * math.sqrt(max(V / C, 1)))

    @staticmethod
    def has_weight_decay(name: str, parameter: Tensor) -> bool:
        """Does weight decay apply to this parameter in the official trainer? To two-dimensional `*.weight` only."""
        return name.rpartition(".")[2] == "weight" and parameter.dim() == 2

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of the matrix products for one token, forward and backward."""
        # Per weight, a product takes 2 operations forward and 4 backward.
        return 6 * sum(p.numel() for name, p in self.named_parameters() if p.dim() == 2 and not name.startswith("emb."))

    @classmethod
    def sizes(cls, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """Read the fields of the config class that the tensors of a file determine.

        Raises ValueError with the reason if they are not those of a whole model.
        """
        embedding = tensors.get("emb.weight")
        if embedding is None or embedding.dim() != 2 or not embedding.numel():
            raise ValueError("it has no emb.weight of (vocabulary, channels)")
        vocab_size, n_embd = embedding.shape
        layers = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
        if not layers:
            raise ValueError("it has no blocks")
        return {"vocab_size": vocab_size, "n_layer": len(layers), "n_embd": n_embd}

    @classmethod
    def check_official(cls, sizes: Mapping[str, int]) -> None:
        """Raise ValueError if a file with these sizes is unsupported unless rwkv_pl has written it."""

    @classmethod
    def unread(cls, config: Any) -> dict[str, tuple[int, ...]]:
        """Names and shapes of parameters that official files may hold, although no official code reads them."""
        return {}


def _list_parameters(module: Any) -> list[Tensor]:
    """The same as list(module.parameters()), which would take a tenth of the time of a token."""
    found = list(module._parameters.values())
    for child in module._modules.values():
        found += _list_parameters(child) if child._modules else child._parameters.values()
    return [parameter for parameter in found if parameter is not None]


def check_inputs(
    tokens: Tensor, state: State | None, embedding: Tensor, n_layer: int, wkv_shape: tuple[int, ...]
) -> None:
    """Raise TypeError or ValueError unless tokens (B, T) and the state suit a model of this size; reads no values.

    wkv_shape: that of one row of a block's `wkv`.
    """
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
        given = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokens must be an int64 tensor, not {given}")
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens must be (B, T) with T at least 1, not {tuple(tokens.shape)}")
    if tokens.device != embedding.device:
        raise ValueError(f"tokens are on {tokens.device} and the model on {embedding.device}: move them to one device")
    if state is not None and not isinstance(state, tuple | list):
        raise TypeError(f"the state must be one that the model returned, not {type(state).__name__}")
    if state is not None and (len(state) != n_layer or len(state[0].att_shift) != len(tokens)):
        raise ValueError(
            f"the state has {len(state)} layers and {len(state[0].att_shift) if state else 0} rows; "
            f"the model has {n_layer} layers, and tokens {len(tokens)} rows"
        )
    if state and state[0].att_shift.shape[-1] != embedding.shape[1]:
        raise ValueError(
            f"the state has {state[0].att_shift.shape[-1]} channels and the model {embedding.shape[1]}: "
            "it is the state of another model"
        )
    shift = (len(tokens), embedding.shape[1])
    expected = shift, (len(tokens), *wkv_shape), shift
    for block in state or ():
        found = tuple(tuple(x.shape) for x in block)
        if found != expected:
            raise ValueError(f"the state of a block has {found} and needs {expected}: it is the state of another model")


def token_shift(x: Tensor, shift: Tensor | None) -> Tensor:
    """Delay x (B, T, C) by one token: the result at t is x at t - 1.

    At t = 0 it is shift (B, C), the last token of the piece before, or zeros at the start of a text (shift None).
    """
    first = torch.zeros_like(x[:, 0]) if shift is None else shift.to(x.dtype)
    return torch.cat([first[:, None], x[:, :-1]], dim=1)


def depth_ratios(layer: int, n_layer: int) -> tuple[float, float]:
    """The layer's relative depth, for the initialisation: r01 = l / (L - 1) and r10 = 1 - l / L.

    Over the layers, r01 rises from 0 to 1 and r10 falls from 1 to 1/L (ratio_0_to_1 and ratio_1_to_almost0 in the
    official code).
    """
    return layer / max(n_layer - 1, 1), 1 - layer / n_layer
