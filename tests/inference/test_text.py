"""Streamed text is valid UTF-8 at every step, and does not depend on the pieces of bytes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from rwkv_pl.inference import generate as generation
from rwkv_pl.inference.text import TextStream, continue_text

PIECES = st.lists(st.one_of(st.binary(max_size=3), st.text(max_size=2).map(str.encode), st.sampled_from([b"a", b"b"])))


@given(PIECES)
@example([b"\xe2", b"\x82", b"\xac"])
@example([b"\xe2", b"\x82"])
def test_text_without_stops_is_the_decoded_bytes(pieces):
    stream = TextStream()
    shown = [stream.feed(piece) for piece in pieces] + [stream.close()]
    for part in shown:
        part.decode()
    assert b"".join(shown).decode() == b"".join(pieces).decode(errors="replace")


@given(PIECES, st.lists(st.text(alphabet="abü", min_size=1, max_size=4).map(str.encode), min_size=1, max_size=3))
@example([b"abc", b"d"], [b"abcd", b"bc"])
@example([b"abab", b"c"], [b"abc"])
def test_stop_ends_the_text_and_is_not_shown(pieces, stops):
    stream = TextStream(stops)
    shown = b""
    for piece in pieces:
        part = stream.feed(piece)
        part.decode()
        shown += part
    shown += stream.close()
    text = b"".join(pieces)
    expected, stopped = text, False
    for end in range(len(text) + 1):
        if whole := [stop for stop in stops if text[:end].endswith(stop)]:
            expected, stopped = text[: end - len(max(whole, key=len))], True
            break
    assert shown.decode() == expected.decode(errors="replace")
    assert stream.stopped == stopped
    assert stream.feed(b"more") == b"" or not stopped


@given(PIECES, PIECES, st.lists(st.text(alphabet="abü", min_size=1, max_size=4).map(str.encode), max_size=3))
def test_unfinished_bytes_continue_in_another_stream(before, after, stops):
    whole, first, second = (TextStream(stops) for _ in range(3))
    expected = b"".join(whole.feed(piece) for piece in before + after)
    shown = b"".join(first.feed(piece) for piece in before)
    if not first.stopped:
        shown += second.feed(first.unfinished) + b"".join(second.feed(piece) for piece in after)
    assert shown == expected
    assert first.unfinished == b"" or not first.stopped


def test_start_of_a_stop_is_held_back():
    stream = TextStream([b"\n\n"])
    assert stream.feed(b"one\n") == b"one"
    assert stream.feed(b"two\n") == b"\ntwo"
    assert stream.feed(b"\nthree") == b""
    assert stream.stopped


def test_empty_stop_is_refused():
    with pytest.raises(ValueError, match="at least one byte"):
        TextStream([b""])


def test_continuation_ends_at_a_token_without_bytes(monkeypatch):
    """As the document end of vocabulary 20b."""
    monkeypatch.setattr(generation, "generate", lambda *_, **__: (torch.tensor([token]) for token in (2, 1, 0, 2)))
    vocabulary = SimpleNamespace(
        encode=lambda text: np.frombuffer(text, np.uint8), decode=lambda ids: b"".join(bytes(i) for i in ids)
    )
    model = torch.nn.Linear(1, 1)
    assert continue_text(model, vocabulary, "a", 9, seed=0) == "\0\0\0"
    assert continue_text(model, vocabulary, "a", 1, seed=0) == "\0\0"
