"""Text from a model, a token at a time: constant memory and time a token, whatever came before."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def generate(
    model: nn.Module,
    tokens: Tensor,
    state: Any = None,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yields (B,) int64 tokens without end, drawn from the model's distribution at `temperature` (0: the likeliest).

    tokens:    (B, T) int64, T >= 1: the prompt that is read first, in one parallel pass.
    state:     the model's state before the prompt; the caller's is never changed.
    generator: on the model's device; None is torch's own.

    Raises FloatingPointError where the model's logits are not finite.
    """
    while True:
        tokens, state = _next(model, tokens, state, temperature, generator)
        yield tokens[:, 0]


@torch.no_grad()
def _next(
    model: Any, tokens: Tensor, state: Any, temperature: float, generator: torch.Generator | None
) -> tuple[Tensor, Any]:
    """Reads tokens (B, T), draws the token after them, (B, 1)."""
    hidden, state = model.hidden(tokens, state)
    logits = model.head(hidden[:, -1]).float()
    if not logits.isfinite().all():
        raise FloatingPointError("the model's outputs are not finite: its training has diverged")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True), state
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator), state
