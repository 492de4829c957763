"""Which tokens batch n of a run reads: a pure function, so there is nothing to save and nothing to replay.

N tokens in a split, T = ctx_len, B = batch_size (sequences of one optimizer step), W = N // T windows of one pass.

The training tokens form a ring. A pass cuts it into W windows of T targets, starting at an offset of its own, and
visits them in an order of its own: a keyed permutation that is computed place by place, never stored, so a terabyte
costs what a kilobyte does. Position n of the run is all that is needed to know what comes next.
"""

import numpy as np
import numpy.typing as npt

from rwkv_pl.errors import UserError

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

ROUNDS = 6


def window_starts(n: int, *, seed: int, n_tokens: int, ctx_len: int, batch_size: int) -> Int64:
    """First token of each row of batch ``n``: (B,) int64, each in [0, n_tokens).

    Row b reads the tokens ``(start + 0..T) mod n_tokens``: inputs the first T, targets the last T. Over one pass, that
    is over W consecutive rows, no token is a target twice. ``seed`` and ``n`` are any integers >= 0 (the seed counts
    modulo 2^64).

    Raises UserError where the tokens do not fill one window, ``n_tokens < ctx_len + 1``.
    """
    windows = _count_windows(n_tokens, ctx_len)
    first_pass, first_place = divmod(n * batch_size, windows)
    sample = first_place + np.arange(batch_size, dtype=np.int64)
    passes = np.uint64(first_pass % 2**64) + (sample // windows).astype(np.uint64)
    keys = _mix(_mix(_mix(np.array([seed % 2**64], np.uint64)) ^ passes) ^ _ROUND_NUMBERS)
    offset = (keys[0] % np.uint64(n_tokens)).astype(np.int64)
    place = _permute((sample % windows).astype(np.uint64), keys[1:], windows).astype(np.int64)
    return (offset + ctx_len * place) % n_tokens


def steps_per_pass(n_tokens: int, ctx_len: int, batch_size: int) -> int:
    """Optimizer steps until every window was read once: ceil(W / B). Raises UserError as ``window_starts`` does."""
    return -(-_count_windows(n_tokens, ctx_len) // batch_size)


def micro_batch_rows(batch_size: int, *, world_size: int, rank: int, accumulate: int, micro_batch: int) -> slice:
    """The rows of a batch that process ``rank`` of D reads as micro-batch ``micro_batch`` of A: B / (A * D) rows.

    All micro-batches of a step over all processes are the batch, each row once, whatever D and A are: hardware
    changes memory and speed, never what the run trains on.

    Raises UserError where A * D does not divide B.
    """
    parts = accumulate * world_size
    if batch_size % parts:
        raise UserError(
            f"data.batch_size={batch_size} is not a multiple of {parts} = {world_size} device(s) x "
            f"{accumulate} accumulated batch(es): it counts the sequences of one optimizer step over all of them; "
            f"take a multiple of {parts}"
        )
    rows = batch_size // parts
    part = micro_batch * world_size + rank
    return slice(part * rows, (part + 1) * rows)


def read_windows(tokens: npt.NDArray[np.unsignedinteger], starts: Int64, ctx_len: int) -> Int64:
    """The windows of a ring of ``tokens`` (N,) that begin at ``starts`` (R,): (R, T+1) int64."""
    windows = np.empty((len(starts), ctx_len + 1), np.int64)
    for window, start in zip(windows, starts.tolist(), strict=True):
        # A slice is a copy; one index a token, of all rows at once, takes ten times as long.
        before_the_seam = tokens[start : start + ctx_len + 1]
        window[: len(before_the_seam)] = before_the_seam
        window[len(before_the_seam) :] = tokens[: ctx_len + 1 - len(before_the_seam)]
    return windows


def eval_window_count(lo: int, hi: int, ctx_len: int) -> int:
    """Windows that make each token of [lo, hi) a target once; token 0 of a corpus has no context and is no target."""
    return -(-max(hi - max(lo, 1), 0) // ctx_len)


def read_eval_windows(
    tokens: npt.NDArray[np.unsignedinteger], lo: int, hi: int, *, ctx_len: int, first: int, rows: int
) -> Int64:
    """Windows ``first, first + 1, ...`` of the split [lo, hi) of ``tokens`` (N,): (rows, T+1) int64.

    Windows follow each other in the text: the last token of one is the first context of the next, token ``lo - 1``
    that of the first. What lies past the split's end is -1, at the end of the last window and in all of the rows after
    it: a negative target does not count.
    """
    begin = max(lo, 1) - 1 + (first + np.arange(rows, dtype=np.int64)) * ctx_len
    # A window needs a target, not only a context: where it has none the context is left out too.
    positions = np.where(begin[:, None] < hi - 1, begin[:, None] + np.arange(ctx_len + 1), hi)
    inside = positions < hi
    return np.where(inside, tokens[np.where(inside, positions, 0)].astype(np.int64), -1)


def _count_windows(n_tokens: int, ctx_len: int) -> int:
    if n_tokens < ctx_len + 1:
        raise UserError(
            f"the training split has {n_tokens:,} tokens, one window of data.ctx_len={ctx_len} needs {ctx_len + 1:,}: "
            "take a larger corpus or a smaller data.ctx_len"
        )
    return n_tokens // ctx_len


_ROUND_NUMBERS = np.arange(ROUNDS + 1, dtype=np.uint64)[:, None]


def _mix(x: UInt64) -> UInt64:
    """The finaliser of splitmix64, element by element: a bijection of 64-bit words; arrays wrap without a warning."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _permute(x: UInt64, keys: UInt64, size: int) -> UInt64:
    """A permutation of [0, size) for each column of ``keys`` (rounds, B), taken at ``x`` (B,).

    A Feistel network permutes the even number of bits that holds ``size``; from a point outside, its cycle is walked
    on until it is inside again, which makes it a permutation of any size.
    """
    half = max(3, ((size - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)

    def network(x: UInt64, keys: UInt64) -> UInt64:
        left, right = x >> shift, x & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << shift) | right

    x = network(x, keys)
    while (outside := np.flatnonzero(x >= np.uint64(size))).size:
        x[outside] = network(x[outside], keys[:, outside])
    return x
