"""The order of batches: which tokens batch n of a run reads, as a pure function of n and the seed.

    N  tokens in a split    T  ctx_len    B  batch_size, sequences of one optimizer step
    W  windows of one pass, N // T

Row b of batch n is sample g = n * B + b. In a mix, ``place_samples`` says which corpus sample g is read from, and which
of this corpus's samples it is; ``sample_starts`` says where that begins.

The training tokens form a ring. Each pass cuts the ring into W windows of T targets at a random offset and visits them
in a random order. The order is a keyed permutation, computed element by element and never stored, so its cost does
not depend on the size of the corpus. A resumed run needs only its step: nothing is saved, and nothing is replayed.

A stream (data.stream=true) has another order, without a seed: each row reads on where its last window ended, and a
model can carry its state along. See ``stream_starts``.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rwkv_pl.errors import UserError

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

ROUNDS = 6


def window_starts(n: int, *, seed: int, n_tokens: int, ctx_len: int, batch_size: int) -> Int64:
    """The first token of each row of batch ``n``: (B,) int64, each in [0, n_tokens).

    A row reads the tokens ``(start + 0..T) mod n_tokens``: the first T are its inputs, the last T its targets. In one
    pass (W consecutive rows) no token is a target twice. ``seed`` and ``n`` are any integers >= 0; the seed is taken
    modulo 2^64.

    Raises UserError if the tokens do not fill one window: ``n_tokens < ctx_len + 1``.
    """
    return sample_starts(n * batch_size, batch_size, seed=seed, n_tokens=n_tokens, ctx_len=ctx_len)


def sample_starts(first: int, count: int, *, seed: int, n_tokens: int, ctx_len: int) -> Int64:
    """The first token of each of the samples ``first, first + 1, ...``: (count,) int64. See ``window_starts``."""
    windows = _count_windows(n_tokens, ctx_len)
    first_pass, first_place = divmod(first, windows)
    sample = first_place + np.arange(count, dtype=np.int64)
    passes = np.uint64(first_pass % 2**64) + (sample // windows).astype(np.uint64)
    keys = _mix(_mix(_mix(np.array([seed % 2**64], np.uint64)) ^ passes) ^ _ROUND_NUMBERS)
    offset = (keys[0] % np.uint64(n_tokens)).astype(np.int64)
    place = _permute((sample % windows).astype(np.uint64), keys[1:], windows).astype(np.int64)
    return (offset + ctx_len * place) % n_tokens


def place_samples(samples: Int64, shares: Sequence[int]) -> tuple[Int64, Int64]:
    """The corpus of each of the ``samples`` (G,), and which of that corpus's samples it is: both (G,) int64.

    ``shares``: K whole numbers >= 1 with a sum below 2^31. With M_c = m_c + ... + m_{K-1}, corpus c takes, in turn, the
    share m_c / M_c of the samples i = 0, 1, ... that the corpora before it have left:

        sample i belongs to c if  floor((i + 1) m_c / M_c) > floor(i m_c / M_c),  as its sample  floor(i m_c / M_c);
        else it is sample  i - floor(i m_c / M_c)  of those that c leaves.

    So each corpus's samples 0, 1, 2, ... occur once and in order. Any batch of B samples holds more than
    B m_c / M_0 - (K - 1) and less than B m_c / M_0 + (K - 1) of corpus c.
    """
    index = samples.copy()
    corpus = np.full(samples.shape, len(shares) - 1, np.int64)
    for c, share in enumerate(shares[:-1]):
        is_left = np.flatnonzero(corpus == len(shares) - 1)
        # i * m // M without overflow: i = q * M + r.
        total = sum(shares[c:])
        q, r = np.divmod(index[is_left], total)
        before, after = q * share + r * share // total, q * share + (r + 1) * share // total
        is_here = after > before
        corpus[is_left[is_here]] = c
        index[is_left] = np.where(is_here, before, index[is_left] - before)
    return corpus, index


def stream_starts(n: int, *, n_tokens: int, ctx_len: int, batch_size: int) -> Int64:
    """The first token of each row of batch ``n`` of a stream: (B,) int64, each in [0, n_tokens).

    The rows start evenly spaced, and each reads on window after window:

        row b starts at  (b floor(N / B) + n T) mod N.

    Raises UserError as ``window_starts`` does.
    """
    _count_windows(n_tokens, ctx_len)
    rows = np.arange(batch_size, dtype=np.int64) * (n_tokens // batch_size)
    return (rows + n * ctx_len % n_tokens) % n_tokens


def stream_restarts(n: int, starts: Int64, *, ctx_len: int, document_ends: Int64) -> npt.NDArray[np.bool_]:
    """Which rows of batch ``n`` of a stream must not carry a state from their window before: (R,) bool.

    Those in whose window before a document ended, or the training split, whose end is that of its last document; in
    batch 0, all. ``starts`` (R,): of these rows, from ``stream_starts``. ``document_ends``: the last token of each
    document, ascending; empty if the documents are not known.
    """
    before = starts - ctx_len
    ended = np.searchsorted(document_ends, starts) > np.searchsorted(document_ends, before)
    return ended | (before < 0) | (n == 0)


def steps_per_pass(n_tokens: int, ctx_len: int, batch_size: int) -> int:
    """Optimizer steps of one pass: ceil(W / B). Raises UserError as ``window_starts`` does."""
    return -(-_count_windows(n_tokens, ctx_len) // batch_size)


def check_division(batch_size: int, world_size: int, accumulate: int) -> None:
    """Raise UserError if the rows of a batch cannot be divided among all devices and micro-batches."""
    parts = accumulate * world_size
    if batch_size % parts:
        raise UserError(
            f"data.batch_size={batch_size} is not a multiple of {parts} = {world_size} device(s) x "
            f"{accumulate} accumulated batch(es): it counts the sequences of one optimizer step over all of them; "
            f"use a multiple of {parts}"
        )


def micro_batch_rows(batch_size: int, *, world_size: int, rank: int, accumulate: int, micro_batch: int) -> slice:
    """The rows of micro-batch ``micro_batch`` on process ``rank``: B / (A * D) of the batch's B rows.

    A = accumulate, D = world_size. Together, the micro-batches of a step over all processes contain each row of the
    batch once, for any A and D. So the hardware changes memory and speed, but not the training data.

    Raises UserError if A * D does not divide B.
    """
    check_division(batch_size, world_size, accumulate)
    rows = batch_size // (accumulate * world_size)
    part = micro_batch * world_size + rank
    return slice(part * rows, (part + 1) * rows)


def read_windows(rings: Sequence[npt.NDArray[np.unsignedinteger]], starts: Int64, ctx_len: int) -> Int64:
    """Read one window from each of the R ``rings`` of tokens (N,), from its start (R,) on: (R, T+1) int64."""
    windows = np.empty((len(starts), ctx_len + 1), np.int64)
    for window, tokens, start in zip(windows, rings, starts.tolist(), strict=True):
        # One slice per row is ten times as fast as fancy indexing of all rows at once.
        before_the_seam = tokens[start : start + ctx_len + 1]
        window[: len(before_the_seam)] = before_the_seam
        window[len(before_the_seam) :] = tokens[: ctx_len + 1 - len(before_the_seam)]
    return windows


def eval_window_count(lo: int, hi: int, ctx_len: int) -> int:
    """The number of windows in which each token of [lo, hi) is a target once.

    Token 0 of a corpus has no context, so it is not a target.
    """
    return -(-max(hi - max(lo, 1), 0) // ctx_len)


def read_eval_windows(
    tokens: npt.NDArray[np.unsignedinteger], lo: int, hi: int, *, ctx_len: int, first: int, rows: int
) -> Int64:
    """Read windows ``first, first + 1, ...`` of the split [lo, hi) of ``tokens`` (N,): (rows, T+1) int64.

    Windows are consecutive: the last token of one is the first context of the next, and token ``lo - 1`` is the first
    context of window 0. Positions past the end of the split are -1, and the loss ignores negative targets.
    """
    begin = max(lo, 1) - 1 + (first + np.arange(rows, dtype=np.int64)) * ctx_len
    # A window without a target is -1 throughout, its context included.
    positions = np.where(begin[:, None] < hi - 1, begin[:, None] + np.arange(ctx_len + 1), hi)
    inside = positions < hi
    return np.where(inside, tokens[np.where(inside, positions, 0)].astype(np.int64), -1)


def _count_windows(n_tokens: int, ctx_len: int) -> int:
    if n_tokens < ctx_len + 1:
        raise UserError(
            f"the training split has {n_tokens:,} tokens, one window of data.ctx_len={ctx_len} needs {ctx_len + 1:,}: "
            "use a larger corpus or a smaller data.ctx_len"
        )
    return n_tokens // ctx_len


_ROUND_NUMBERS = np.arange(ROUNDS + 1, dtype=np.uint64)[:, None]


def _mix(x: UInt64) -> UInt64:
    """The finaliser of splitmix64, elementwise: a bijection of 64-bit words. Arrays overflow without a warning."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _permute(x: UInt64, keys: UInt64, size: int) -> UInt64:
    """Permute each element of ``x`` (B,) within [0, size), with the keys in its column of ``keys`` (rounds, B).

    A Feistel network permutes the integers of an even number of bits, at least 6 and enough for ``size``. If an output
    is not below ``size``, the network is applied again until it is (cycle walking). That gives a permutation of any
    size.
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
