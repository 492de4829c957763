"""Measures how well a model predicts a text, in two protocols: streams with a carried state, and independent windows.

    N  tokens of the corpus      [lo, hi)  the split                     V  vocab_size
    R  rows read in parallel     T         tokens of a row in one call

In both protocols, each token of [lo, hi) is a target exactly once. The first context is token lo - 1, read from an
empty state; no earlier token is read. Token 0 of a corpus has no context, so it is not a target.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rwkv_pl.inference.generate import eval_mode
from rwkv_pl.ops.cross_entropy import head_cross_entropy

Tokens = npt.NDArray[np.unsignedinteger]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

# Most logits in memory at once: 64 MiB in float32, for any vocabulary size.
MAX_LOGITS = 1 << 24


def evaluate_stream(
    model: nn.Module,
    tokens: Tokens,
    lo: int,
    hi: int,
    *,
    streams: int = 1,
    warmup: int = 1024,
    chunk_len: int = 1024,
    on_progress: Callable[[int, float], None] = lambda n_targets, nats: None,
) -> tuple[float, int]:
    """Read the split as one text and carry the state from chunk to chunk, as a recurrent model is used.

    tokens:      (N,); can be a memory map.
    streams:     the number of parts into which the split is cut, to read them in parallel. Above 1 it is faster, and
                 an approximation: each part except the first starts from an empty state, up to `warmup` tokens before
                 its first context (none before lo - 1), and these tokens are not counted.
    chunk_len:   tokens of a stream per call; it changes memory and speed, not the result.
    on_progress: called after each call of the model with the number of targets in it and the sum of their nats.

    Returns the summed cross-entropy in nats, and the number of targets, hi - max(lo, 1).

    Raises ValueError if the split has no target, FloatingPointError if the logits are not finite.
    """
    first = _first_target(lo, hi)
    n_streams = min(streams, hi - first)
    edges = first + np.arange(n_streams + 1) * (hi - first) // n_streams
    start = np.maximum(edges[:-1] - 1 - warmup, first - 1)
    total, count = 0.0, 0
    with eval_mode(model), torch.inference_mode():
        for nats, counted in _read(model, tokens, start, edges[:-1], edges[1:], chunk_len):
            total, count = total + nats.sum(), count + int(counted.sum())
            on_progress(int(counted.sum()), float(nats.sum()))
    return float(total), count


def evaluate_windows(
    model: nn.Module,
    tokens: Tokens,
    lo: int,
    hi: int,
    *,
    ctx_len: int,
    stride: int | None = None,
    rows: int = 8,
    on_progress: Callable[[int, float], None] = lambda n_targets, nats: None,
) -> tuple[Float64, Int64]:
    """Read windows of `ctx_len` targets, each from an empty state, as models with a limited context are evaluated.

    tokens:      (N,); can be a memory map.
    stride:      tokens from one window's start to the next. None means ctx_len, which gives the windows of validation
                 during training. If it is smaller, windows overlap, and only the last `stride` targets of each are
                 counted (in the first window, all). Then each counted target outside of the first window has more
                 than ctx_len - stride tokens of context.
    rows:        windows per call; it changes memory and speed, not the result.
    on_progress: called after each call of the model with the number of targets in it and the sum of their nats.

    Returns two arrays (ctx_len,), by position in the window: the summed cross-entropy in nats, and the number of
    targets. Position 0 has one token of context.

    Raises ValueError if the split has no target, FloatingPointError if the logits are not finite.
    """
    stride = stride or ctx_len
    first = _first_target(lo, hi)
    n_windows = 1 + -(-max(hi - first - ctx_len, 0) // stride)
    total, count = np.zeros(ctx_len), np.zeros(ctx_len, np.int64)
    with eval_mode(model), torch.inference_mode():
        for k in range(0, n_windows, rows):
            number = np.arange(k, min(k + rows, n_windows))
            start = first - 1 + number * stride
            end = np.minimum(start + 1 + ctx_len, hi)
            begin = np.where(number == 0, first, start + 1 + ctx_len - stride)
            for nats, counted in _read(model, tokens, start, begin, end, chunk_len=ctx_len):
                total[: nats.shape[1]] += nats.sum(0)
                count[: nats.shape[1]] += counted.sum(0)
                on_progress(int(counted.sum()), float(nats.sum()))
    return total, count


def bits_per_byte(nats: float, n_bytes: float) -> float:
    """Bits per byte, from the summed cross-entropy of a text in nats and its size in bytes. NaN for 0 bytes."""
    return nats / (math.log(2) * n_bytes) if n_bytes else math.nan


def compute_metrics(nats: float, n_tokens: int, n_bytes: int | None) -> dict[str, float]:
    """The reported metrics, from the summed cross-entropy in nats of `n_tokens` targets that are `n_bytes` of text.

    n_bytes: None if it is not known; then there is no bits_per_byte.
    """
    per_token = nats / n_tokens
    return {
        **({} if n_bytes is None else {"bits_per_byte": bits_per_byte(nats, n_bytes)}),
        "perplexity_per_token": math.exp(per_token) if per_token < 700 else math.inf,
        "nats_per_token": per_token,
        "bits_per_token": per_token / math.log(2),
    }


def _first_target(lo: int, hi: int) -> int:
    if hi <= max(lo, 1):
        raise ValueError(f"the range [{lo}, {hi}) has no target: it needs a token that has one before it")
    return max(lo, 1)


def _read(
    model: Any, tokens: Tokens, start: Int64, begin: Int64, end: Int64, chunk_len: int
) -> Iterator[tuple[Float64, npt.NDArray[np.bool_]]]:
    """Read R rows of text in parallel, each from an empty state.

    Row r starts at token start[r]; its targets in [begin[r], end[r]) count. start, begin and end are (R,).

    Yields for each chunk of time two arrays (R, T): the nats of each target, 0 if it does not count, and whether it
    counts.
    """
    device = next(model.parameters()).device
    length, state = int((end - 1 - start).max()), None
    for t in range(0, length, chunk_len):
        position = start[:, None] + np.arange(t, min(t + chunk_len, length))
        counted = (begin[:, None] <= position + 1) & (position + 1 < end[:, None])
        # A row that ends before the others reads on: later tokens do not change the results of earlier ones.
        inputs = tokens[np.minimum(position, end.max() - 1)].astype(np.int64)
        targets = tokens[(position + 1)[counted]].astype(np.int64)
        hidden, state = model.hidden(torch.from_numpy(inputs).to(device), state)
        nats = np.zeros(position.shape)
        nats[counted] = _cross_entropy(
            model, hidden[torch.from_numpy(counted).to(device)], torch.from_numpy(targets).to(device)
        )
        yield nats, counted


def _cross_entropy(model: Any, hidden: Tensor, targets: Tensor) -> Float64:
    """hidden (n, C), targets (n,) -> the nats of each target, (n,)."""
    nats, largest = head_cross_entropy(model.head, hidden, targets, max(1, MAX_LOGITS // model.config.vocab_size))
    if not (nats.isfinite() & largest.isfinite()).all():
        raise FloatingPointError("the model's outputs are not finite: its training has diverged")
    # To the CPU first, since some devices do not support float64.
    return nats.cpu().double().numpy()
