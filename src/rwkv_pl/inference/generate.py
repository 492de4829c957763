"""Generates text one token at a time; memory and time per token do not grow with the length of the text.

B  rows, texts generated in parallel    T  time    V  vocab_size
"""

import reprlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_pl.inference.sampling import RowRandom, Sampling
from rwkv_pl.model.state import BlockState, State

# Prompt tokens read at once: enough to keep the matrix products efficient, few enough to need little memory.
CHUNK = 1024


def generate(
    model: Any,
    tokens: Tensor | Sequence[Tensor],
    state: State | None = None,
    *,
    seed: int | None = None,
    **sampling: Any,
) -> "Generation":
    """Yield tokens (B,) int64 without end, by default drawn from the model's distribution at temperature 1.

    Args:
        model: a module with `hidden`, `head` and `step`.
        tokens: the prompts: (B, T) int64, or B prompts (T_i,) of any lengths, T >= 1. To generate without a prompt,
            pass the vocabulary's `document_end`.
        state: the model's state of B rows before the prompts; it is not modified. None: the empty state.
        seed: row i is a function of (seed, i), independent of the other rows. None: seeded by torch's global generator.
        sampling: temperature, top_k, top_p, repetition and window: see `Sampling`.

    Raises:
        ValueError: an empty prompt, or a setting out of range.
        IndexError: a token outside of the vocabulary.
        FloatingPointError: logits are not finite.
    """
    chosen = Sampling(**sampling)
    prompts = list(tokens)
    if not all(isinstance(prompt, Tensor) for prompt in prompts):
        raise TypeError(f"the prompts must be a tensor, or a list of tensors, not {reprlib.repr(tokens)}")
    if any(prompt.dim() != 1 for prompt in prompts):
        raise ValueError("the prompts must be (B, T), or a list of (T_i,): for one prompt, pass tokens[None]")
    logits, state = read_prompts(model, prompts, state)
    return Generation(model, logits, state, chosen, RowRandom(seed, len(prompts)), prompts)


class Generation(Iterator[Tensor]):
    """An endless iterator over generated tokens (B,).

    logits: (B, V), for the next token. state: the model's state at that position. recent: the last tokens of each row,
    for the repetition penalty of `Sampling`. After `catch_up`, `logits` and `state` include all yielded tokens.
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
        """Feed the last yielded token to the model."""
        if self._unread is not None:
            with eval_mode(self._model):
                self.logits, self.state = self._model.step(self._unread, self.state)
            self._unread = None


def read_prompts(model: Any, prompts: Sequence[Tensor], state: State | None = None) -> tuple[Tensor, State]:
    """Read prompts (T_i,), each with its row of the state -> the logits after them (B, V), and the state.

    If their lengths differ, they are read one by one: padding would change the state.
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
    """Select rows of a state; `torch.zeros(5, dtype=torch.int64)` repeats the first row five times."""
    return tuple(BlockState(*(part[rows] for part in block)) for block in state)


@torch.no_grad()
def read_tokens(
    model: Any, tokens: Tensor, state: State | None = None, progress: Callable[[int], None] = lambda done: None
) -> tuple[Tensor, State]:
    """Read tokens (B, T), T >= 1 -> the logits after the last one, (B, V) float32, and the state.

    Reads in chunks that are parallel in time. progress: called after each chunk with its number of tokens per row.
    """
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(f"empty prompt of shape {tuple(tokens.shape)}: start with the vocabulary's document_end")
    with eval_mode(model):
        for chunk in tokens.split(CHUNK, dim=1):
            hidden, state = model.hidden(chunk, state)
            progress(chunk.shape[1])
        assert state is not None
        return model.head(hidden[:, -1]).float(), state


class eval_mode:
    """A context in which the model is in eval mode; costs nothing if it already is."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._was = model, model.training

    def __enter__(self) -> None:
        if self._was:
            self._model.eval()

    def __exit__(self, *_: object) -> None:
        if self._was:
            self._model.train()
