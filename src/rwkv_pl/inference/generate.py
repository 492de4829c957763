"""Text from a model, a token at a time: constant memory and time a token, whatever came before.

B  rows, the texts that are written at once    T  time    V  vocab_size
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_pl.inference.sampling import RowRandom, Sampling
from rwkv_pl.model.state import BlockState, State

# Tokens of a prompt that are read at once: enough to keep the products busy, and little memory.
CHUNK = 1024


def generate(
    model: Any,
    tokens: Tensor | Sequence[Tensor],
    state: State | None = None,
    *,
    seed: int | None = None,
    **sampling: Any,
) -> "Generation":
    """Yields (B,) int64 tokens without end, by default drawn from the model's distribution at temperature 1.

    model:    with `hidden`, `head` and `step`.
    tokens:   (B, T) int64, or B prompts (T_i,) of any lengths, T >= 1. A text that begins from nothing begins with
              its vocabulary's `document_end`.
    state:    the model's state of B rows before the prompts; the caller's is never changed.
    seed:     row i draws by (seed, i), whatever the other rows; None: by torch's own generator.
    sampling: temperature, top_k, top_p, repetition and window: see `Sampling`.

    Raises ValueError for an empty prompt or a setting out of its range, IndexError for a token outside of the
    vocabulary, FloatingPointError where logits are not finite.
    """
    chosen = Sampling(**sampling)
    prompts = list(tokens)
    logits, state = read_prompts(model, prompts, state)
    return Generation(model, logits, state, chosen, RowRandom(seed, len(prompts)), prompts)


class Generation(Iterator[Tensor]):
    """The texts that a model writes: an iterator of tokens (B,), without end.

    logits (B, V) for the token that follows and the state that they came with; recent: of each row the tokens before,
    for Sampling's repetition. After `catch_up`, `logits` and `state` are those after all tokens that were yielded.
    """

    def __init__(
        self, model: Any, logits: Tensor, state: State, sampling: Sampling, random: RowRandom, recent: Sequence[Tensor]
    ) -> None:
        self.logits, self.state = logits, state
        self._model, self._sampling, self._random = model, sampling, random
        self.recent = [self._last(tokens).cpu() for tokens in recent]
        self._unread: Tensor | None = None

    def __next__(self) -> Tensor:
        self.catch_up()
        tokens = self._sampling.choose(self.logits, self.recent, self._random.uniform())
        self.recent = [
            self._last(torch.cat([before, token[None]])) for before, token in zip(self.recent, tokens, strict=True)
        ]
        self._unread = tokens.to(self.logits.device)
        return self._unread

    def _last(self, tokens: Tensor) -> Tensor:
        return tokens[max(0, len(tokens) - self._sampling.window) :]

    def catch_up(self) -> None:
        """Reads the token that was yielded last."""
        if self._unread is not None:
            with eval_mode(self._model):
                self.logits, self.state = self._model.step(self._unread, self.state)
            self._unread = None


def read_prompts(model: Any, prompts: Sequence[Tensor], state: State | None = None) -> tuple[Tensor, State]:
    """Prompts (T_i,), one state row for each -> logits after them (B, V), and the state.

    One by one where their lengths differ: to fill up the shorter ones would change what the model has read.
    """
    if not prompts:
        raise ValueError("no prompt: give at least one")
    if len({len(prompt) for prompt in prompts}) == 1:
        return read_tokens(model, torch.stack(list(prompts)), state)
    rows = [
        read_tokens(model, prompt[None], None if state is None else select_rows(state, slice(i, i + 1)))
        for i, prompt in enumerate(prompts)
    ]
    logits, states = zip(*rows, strict=True)
    joined = (BlockState(*map(torch.cat, zip(*blocks, strict=True))) for blocks in zip(*states, strict=True))
    return torch.cat(logits), tuple(joined)


def select_rows(state: State, rows: slice | Tensor) -> State:
    """Some rows of a state, e. g. `torch.zeros(5, dtype=torch.int64)`: five times the first."""
    return tuple(BlockState(*(part[rows] for part in block)) for block in state)


@torch.no_grad()
def read_tokens(
    model: Any, tokens: Tensor, state: State | None = None, progress: Callable[[int], None] = lambda done: None
) -> tuple[Tensor, State]:
    """tokens (B, T), T >= 1 -> the logits after the last one, (B, V) float32, and the state.

    In chunks, each parallel in time. progress: is told how many tokens of each row are read.
    """
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(f"an empty prompt, {tuple(tokens.shape)}: begin with the vocabulary's document_end")
    with eval_mode(model):
        for chunk in tokens.split(CHUNK, dim=1):
            hidden, state = model.hidden(chunk, state)
            progress(chunk.shape[1])
        assert state is not None
        return model.head(hidden[:, -1]).float(), state


class eval_mode:
    """The model without dropout, inside the block; costs nothing where it is so already."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._was = model, model.training

    def __enter__(self) -> None:
        if self._was:
            self._model.eval()

    def __exit__(self, *_: object) -> None:
        if self._was:
            self._model.train()
