"""Vocabulary: every byte string round-trips."""

import json
import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rwkv_pl.data.corpus import find_character_start
from rwkv_pl.data.vocabulary import Vocabulary, describe_strange_bytes, vocabulary_from_dict
from rwkv_pl.errors import UserError

CHARACTERS = "".join(sorted("éßЖ漢字😀\u0080\u07ff\u0800\uffff\U00010000\U0010ffff"))

CHAR = Vocabulary("char", CHARACTERS)

# Text, random bytes, and text with random bytes in between, where UTF-8 decoders go wrong.
PIECES = st.one_of(
    st.binary(max_size=6),
    st.text(max_size=6).map(str.encode),
    st.text(alphabet=CHARACTERS + "añ", max_size=6).map(str.encode),
    st.text(alphabet=CHARACTERS, min_size=1, max_size=2).map(lambda text: text.encode()[:-1]),
    st.sampled_from([b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe0\x80\x80", b"\xf8\x88\x80\x80\x80"]),
)

TEXTS = st.lists(PIECES, max_size=8).map(b"".join)


def plain_encode(text: bytes, characters: str) -> list[int]:
    """Encode from left to right by the definition: a character of the vocabulary, else one byte."""
    ids, at = [], 0
    while at < len(text):
        for length in (2, 3, 4):
            try:
                character = text[at : at + length].decode()
            except UnicodeDecodeError:
                continue
            if len(character) == 1 and character in characters:
                ids.append(256 + characters.index(character))
                at += length
                break
        else:
            ids.append(text[at])
            at += 1
    return ids


@given(TEXTS)
@example("naïve café 漢字 😀".encode())
@example(b"\xe6\xbc")
@example(b"\xf8\x90\x80\x80 spells U+10000 if one looks away")
@example(b"\xe0\x82\x80 is too long for U+0080")
@example(b"")
def test_char_encoding_matches_the_reference_and_round_trips(text: bytes) -> None:
    ids = CHAR.encode(text)
    assert ids.tolist() == plain_encode(text, CHARACTERS)
    assert CHAR.decode(ids) == text
    assert CHAR.bytes_per_token[ids].sum() == len(text)


@given(st.binary())
def test_byte_tokens_are_the_bytes(text: bytes) -> None:
    vocabulary = Vocabulary()
    ids = vocabulary.encode(text)
    assert ids.dtype == np.uint8
    assert ids.tolist() == list(text)
    assert vocabulary.decode(ids) == text


@given(st.lists(st.integers(0, CHAR.size - 1)))
def test_any_ids_decode(ids: list[int]) -> None:
    spelled = b"".join(bytes([i]) if i < 256 else CHARACTERS[i - 256].encode() for i in ids)
    assert CHAR.decode(ids) == spelled
    assert CHAR.bytes_per_token[np.array(ids, int)].sum() == len(spelled)


@given(TEXTS, st.integers(0, 60))
def test_split_inside_a_character_moves_to_its_start(text: bytes, at: int) -> None:
    at = min(at, len(text))
    data = np.frombuffer(text, np.uint8)
    start = find_character_start(data, at)
    assert at - 3 <= start <= at
    everything = Vocabulary("char", "".join(sorted({c for c in text.decode(errors="ignore") if c > "\x7f"})))
    whole = everything.encode(text).tolist()
    assert everything.encode(text[:start]).tolist() + everything.encode(text[start:]).tolist() == whole
    if start != at:
        assert everything.encode(text[:at]).tolist() + everything.encode(text[at:]).tolist() != whole


def test_ids_have_the_smallest_unsigned_dtype() -> None:
    assert Vocabulary("char", "é").dtype == np.uint16
    many = "".join(map(chr, range(0x10000, 0x10000 + 65536)))
    assert Vocabulary("char", many).dtype == np.uint32
    assert Vocabulary("char", many[: 65536 - 256]).dtype == np.uint16


def test_vocabulary_round_trips_through_json() -> None:
    for vocabulary in (Vocabulary(), CHAR):
        stored = json.loads(json.dumps(vocabulary.to_dict()))
        again = vocabulary_from_dict(stored)
        assert again == vocabulary
        assert again.digest == vocabulary.digest
        assert again.encode("é漢".encode()).tolist() == vocabulary.encode("é漢".encode()).tolist()
    assert Vocabulary().digest != CHAR.digest
    assert Vocabulary() != CHAR


@pytest.mark.parametrize(
    "stored", [{}, [], None, {"kind": "char", "characters": "ba"}, {"kind": "char", "characters": "\ud800"}]
)
def test_corrupt_vocabulary_gives_one_line_error(stored: object) -> None:
    with pytest.raises(UserError, match="stored vocabulary is corrupt") as caught:
        vocabulary_from_dict(stored)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_unknown_vocabulary_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"vocab=word is not available.*byte, char, 20b"):
        Vocabulary("word")


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([300], IndexError, "tokens must be from 0 to 255, got 300"),
        ([1, -1], IndexError, "tokens must be from 0 to 255, got -1"),
        ([1.5], TypeError, "tokens must be integers, not float64"),
    ],
)
def test_ids_outside_of_the_vocabulary_are_refused(ids, error, message):
    with pytest.raises(error, match=message):
        Vocabulary().decode(ids)


def test_text_that_is_not_bytes_is_refused():
    with pytest.raises(TypeError, match=r"encode takes bytes, not str: use text.encode\(\)"):
        Vocabulary().encode("text")
    assert Vocabulary().decode([]) == b""


@pytest.mark.parametrize(
    ("content", "kind", "says"),
    [
        (b"plain text" * 9, "char", None),
        ("Grüße 漢字 😀 ".encode() * 9, "char", None),
        ("Grüße".encode("utf-16-le") * 9, "byte", "50% of .* are NUL bytes: convert UTF-16 to UTF-8"),
        (b"\0" + b"x" * 99, "byte", None),
        (b"\0\0" + b"x" * 98, "char", "2% of .* are NUL"),
        ("Grüße ".encode("latin-1") * 9, "char", "33% of .* is not UTF-8: convert it, or use data.vocab=byte"),
        ("Grüße ".encode("latin-1") * 9, "byte", None),
        (b"x" * (1 << 24) + bytes(1 << 24), "byte", "50% of .* are NUL"),
    ],
)
def test_text_that_is_not_text_is_described(tmp_path, content, kind, says):
    (tmp_path / "a").write_bytes(content)
    found = describe_strange_bytes(tmp_path / "a", kind)
    assert found is None if says is None else re.match(says, found or "")
