"""Splits and digests of a corpus."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_pl.data import corpus as corpora
from rwkv_pl.data.corpus import Splits, file_digest


@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=40),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0.01, 1)),
)
def test_split_edge_moves_to_a_nearby_document_end(lengths: list[int], shares: tuple[float, float, float]) -> None:
    train, val, test = (share / sum(shares) for share in shares)
    with tempfile.TemporaryDirectory() as folder:
        path, ends_path = Path(folder, "text"), Path(folder, "ends")
        path.write_bytes(b"\n".join(b"x" * length for length in lengths))
        n = path.stat().st_size
        starts = np.cumsum(np.array(lengths[:-1], "<i8") + 1)
        ends_path.write_bytes((starts - 1).tobytes())
        splits = corpora.split_by_fractions(path, (train, val, test), ends_path if len(lengths) > 1 else None)
    edges = [0, splits.train[1], splits.val[1], n]
    assert splits == Splits((0, edges[1]), (edges[1], edges[2]), (edges[2], n))
    assert edges == sorted(edges)
    for edge, at in zip(edges[1:3], (round(n * train), round(n * (train + val))), strict=True):
        nearest = min((abs(start - at) for start in starts), default=n)
        if nearest <= min(train, val, test) * n / 10:
            assert edge in starts
            assert abs(edge - at) == nearest
        else:
            assert edge == at


def test_digest_changes_with_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "FULL_DIGEST_BELOW", 1 << 18)
    digests = set()
    for size in (0, (1 << 18) - 1, 1 << 18, (1 << 18) + 1, 1 << 20):
        for change in (0, size // 2, size - 1):
            path = tmp_path / f"{size}-{change}"
            content = bytearray(size)
            if size:
                content[change] = 1
            path.write_bytes(content)
            digests.add(file_digest(path))
    assert len(digests) == 13
