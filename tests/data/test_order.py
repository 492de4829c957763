"""The order of batches: a bijection, uniform, the same on any hardware, and fixed for ever."""

import tracemalloc

import numpy as np
import pytest

from rwkv_pl.data.order import (
    eval_window_count,
    micro_batch_rows,
    read_eval_windows,
    read_windows,
    steps_per_pass,
    window_starts,
)
from rwkv_pl.errors import UserError

WORD = 2**64 - 1


def mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & WORD
    return x ^ (x >> 31)


def reference_start(g: int, seed: int, n_tokens: int, ctx_len: int) -> int:
    """Start of sample g, in Python integers, one sample at a time: written from the specification, without numpy."""
    windows = n_tokens // ctx_len
    p, x = divmod(g, windows)

    def key(i: int) -> int:
        return mix(mix(mix(seed & WORD) ^ (p & WORD)) ^ i)

    half = 3
    while 4**half < windows:
        half += 1
    low = 2**half - 1
    while True:
        left, right = x >> half, x & low
        for i in range(1, 7):
            left, right = right, left ^ (mix(right ^ key(i)) & low)
        x = left << half | right
        if x < windows:
            return (key(0) % n_tokens + ctx_len * x) % n_tokens


# fmt: off
PINNED = [  # n, seed, n_tokens, ctx_len, the starts of batch n at batch size 4
    (0, 42, 90_000_000, 1024, [48425054, 52238430, 55741534, 40652894]),
    (7, 0, 1000, 8, [264, 584, 672, 856]),
    (10**12, 2**64 - 1, 10**12, 1024, [678519788343, 174147084087, 458981340983, 295730659127]),
    (3, 5, 17, 16, [2, 6, 2, 9]),
]
# fmt: on


@pytest.mark.parametrize(("n", "seed", "n_tokens", "ctx_len", "expected"), PINNED)
def test_order_matches_pinned_values(n: int, seed: int, n_tokens: int, ctx_len: int, expected: list[int]) -> None:
    starts = window_starts(n, seed=seed, n_tokens=n_tokens, ctx_len=ctx_len, batch_size=4)
    assert starts.dtype == np.int64
    assert starts.tolist() == expected


@pytest.mark.parametrize("seed", [0, 1, 42, 2**63, 2**64 + 42, 10**30])
@pytest.mark.parametrize(("n_tokens", "ctx_len"), [(5, 4), (100, 7), (90_000_000, 1024), (10**12, 1024), (2**40, 1)])
def test_order_matches_the_reference_in_plain_integers(seed: int, n_tokens: int, ctx_len: int) -> None:
    for n, batch_size in [(0, 1), (0, 64), (3, 5), (10**15, 6)]:
        expected = [reference_start(n * batch_size + b, seed, n_tokens, ctx_len) for b in range(batch_size)]
        starts = window_starts(n, seed=seed, n_tokens=n_tokens, ctx_len=ctx_len, batch_size=batch_size)
        assert starts.tolist() == expected


@pytest.mark.parametrize("seed", [0, 42, 12345])
def test_each_pass_is_a_bijection(seed: int) -> None:
    for windows in [*range(1, 71), 127, 128, 129, 1000]:
        for ctx_len, rest in [(1, 1), (3, 1), (3, 2)]:
            n_tokens = windows * ctx_len + (rest if ctx_len > 1 or windows == 1 else 0)
            n_windows = n_tokens // ctx_len
            starts = window_starts(0, seed=seed, n_tokens=n_tokens, ctx_len=ctx_len, batch_size=3 * n_windows)
            for one_pass in starts.reshape(3, n_windows):
                targets = (one_pass[:, None] + 1 + np.arange(ctx_len)) % n_tokens
                assert len(np.unique(targets)) == n_windows * ctx_len, (windows, ctx_len, rest)


def test_positions_and_offsets_are_uniform() -> None:
    """A window's position in its pass and the offset of a pass are uniform: chi-squared over 64 cells, 63 +- 11."""
    windows, ctx_len, passes = 64, 16, 4096
    n_tokens = windows * ctx_len
    starts = window_starts(0, seed=42, n_tokens=n_tokens, ctx_len=ctx_len, batch_size=passes * windows)
    starts = starts.reshape(passes, windows)
    offsets = starts.min(axis=1) % ctx_len
    for cells, values in [(n_tokens // 16, starts[:, 0] // 16), (n_tokens // 16, starts[:, -1] // 16), (16, offsets)]:
        expected = passes / cells
        chi2 = ((np.bincount(values, minlength=cells) - expected) ** 2 / expected).sum()
        freedom = cells - 1
        assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5, chi2
    # Windows that are adjacent in the order are not adjacent in the text: by chance, one pair in 63 is.
    adjacent = (starts[:, 1] - starts[:, 0]) % n_tokens == ctx_len
    assert abs(adjacent.mean() - 1 / 63) < 0.01


def test_seeds_and_passes_have_different_orders() -> None:
    def order(n: int, seed: int) -> tuple[int, ...]:
        return tuple(window_starts(n, seed=seed, n_tokens=64 * 8, ctx_len=8, batch_size=64))

    assert len({order(n, seed) for n in range(10) for seed in range(10)}) == 100


@pytest.mark.parametrize("batch_size", [1, 12, 24])
def test_every_hardware_reads_the_same_batch_in_the_same_order(batch_size: int) -> None:
    rows = list(range(batch_size))
    for world_size in range(1, batch_size + 1):
        for accumulate in range(1, batch_size + 1):
            if batch_size % (world_size * accumulate):
                continue
            read = [
                row
                for a in range(accumulate)
                for d in range(world_size)
                for row in rows[
                    micro_batch_rows(batch_size, world_size=world_size, rank=d, accumulate=accumulate, micro_batch=a)
                ]
            ]
            assert read == rows
            per = batch_size // (world_size * accumulate)
            last = micro_batch_rows(
                batch_size, world_size=world_size, rank=world_size - 1, accumulate=accumulate, micro_batch=0
            )
            assert [b // per for b in rows[last]] == [world_size - 1] * per


def test_batch_size_not_divisible_by_the_devices_is_an_error() -> None:
    with pytest.raises(UserError, match=r"batch_size=10 .*multiple of 6 = 3 device\(s\) x 2 accumulated"):
        micro_batch_rows(10, world_size=3, rank=0, accumulate=2, micro_batch=0)


def test_pass_length() -> None:
    assert steps_per_pass(90_000_000, 1024, 1) == 87_890
    assert steps_per_pass(100, 10, 4) == 3
    with pytest.raises(UserError, match=r"10 tokens.*ctx_len=10 needs 11"):
        steps_per_pass(10, 10, 1)
    with pytest.raises(UserError, match="larger corpus"):
        window_starts(0, seed=0, n_tokens=10, ctx_len=10, batch_size=1)


def test_windows_wrap_around_the_end_of_the_text() -> None:
    tokens = np.arange(10, dtype=np.uint8)
    assert read_windows([tokens] * 2, np.array([0, 8]), 4).tolist() == [[0, 1, 2, 3, 4], [8, 9, 0, 1, 2]]


def test_eval_windows_on_small_examples() -> None:
    tokens = np.arange(100, 120, dtype=np.uint8)
    read = read_eval_windows(tokens, 10, 17, ctx_len=4, first=0, rows=3)
    assert read.tolist() == [[109, 110, 111, 112, 113], [113, 114, 115, 116, -1], [-1] * 5]
    # If a split ends with a window, no single context token is left over; token 0 is only context.
    read = read_eval_windows(tokens, 0, 5, ctx_len=4, first=0, rows=2)
    assert read.tolist() == [[100, 101, 102, 103, 104], [-1] * 5]
    assert [eval_window_count(lo, hi, 4) for lo, hi in [(0, 0), (0, 1), (0, 5), (10, 10), (10, 17)]] == [0, 0, 1, 0, 2]


def test_batch_memory_does_not_grow_with_the_pass() -> None:
    """The pass has 10^9 windows: no shuffled list of them, which takes gigabytes and seconds, may be built."""
    tracemalloc.start()
    for n in range(20):
        window_starts(n, seed=42, n_tokens=10**12, ctx_len=1024, batch_size=64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
