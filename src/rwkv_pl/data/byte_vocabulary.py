"""The vocabularies `byte` and `char`, and the base of `20b`: encode bytes as token ids, and decode them."""

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from rwkv_pl.checks import check_tokens
from rwkv_pl.config import FILE_VOCABULARIES, UNKNOWN, VOCABULARIES
from rwkv_pl.data.corpus import find_character_start
from rwkv_pl.errors import UserError
from rwkv_pl.files import json_digest

Tokens = npt.NDArray[np.unsignedinteger]

CHUNK = 1 << 22

# GPT-2's alphabet, in which a tokenizer's JSON writes bytes as visible characters. A byte that is visible in Latin-1 is
# written as itself; the others are U+0100, U+0101, ... in turn.
_VISIBLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_HIDDEN = tuple(sorted(set(range(256)) - set(_VISIBLE)))
BYTE_BY_CHARACTER = {chr(byte): byte for byte in _VISIBLE} | {chr(0x100 + i): byte for i, byte in enumerate(_HIDDEN)}


class EncodingError(UserError):
    """A vocabulary cannot encode the text from byte ``offset`` on."""

    def __init__(self, offset: int, reason: str, where: str = "the text") -> None:
        super().__init__(f"byte {offset:,} of {where} {reason}")
        self.offset, self.reason = offset, reason


def check_ids(ids: npt.ArrayLike, size: int) -> npt.NDArray[np.int64]:
    """``ids`` as int64. Raises TypeError unless they are integers, IndexError unless they are in [0, size)."""
    index = np.asarray(ids)
    if index.size and index.dtype.kind not in "iu":
        raise TypeError(f"tokens must be integers, not {index.dtype}")
    if index.size:
        check_tokens(index.min(), index.max(), size)
    return index.astype(np.int64)


def as_array(text: bytes | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return the bytes of a text as an array (n,). Raises TypeError for a str."""
    if isinstance(text, str):
        raise TypeError("encode takes bytes, not str: use text.encode()")
    return np.frombuffer(text, np.uint8)


class Vocabulary:
    """A lossless mapping from any byte string to token ids: decode(encode(text)) == text.

    ``byte``: 256 tokens, the bytes. ``char``: the 256 bytes, then ``characters``, whose UTF-8 has more than one byte,
    in the order of their code points. A character that is not among them is encoded as byte tokens, as is anything
    that is not UTF-8. So bits per byte are exact on any text. (``20b`` and ``world`` are classes with
    other guarantees: ``tokenizer_20b.Vocabulary20B``, ``tokenizer_world.VocabularyWorld``.)

    Raises UserError for an unknown kind, ValueError for characters that cannot be tokens.
    """

    document_end = 10
    """The token between two documents, and before a text without context: here the newline."""

    def __init__(self, kind: str = "byte", characters: str = "") -> None:
        if kind not in VOCABULARIES:
            raise UserError(f"vocab={kind} is not available: choose one of {', '.join(VOCABULARIES)}")
        if kind in FILE_VOCABULARIES:
            raise ValueError(f"vocabulary {kind} needs its file: use vocabulary.read_vocabulary")
        points = np.array([ord(character) for character in characters], np.int64)
        surrogates = (points >= 0xD800) & (points < 0xE000)
        if (kind == "byte" and characters) or np.any(np.diff(points, prepend=0x7F) <= 0) or np.any(surrogates):
            raise ValueError(f"vocabulary {kind}: characters must be sorted, above U+007F and not surrogates")
        self.kind = kind
        self.characters = characters
        self.size = 256 + len(characters)
        self.dtype: np.dtype[np.unsignedinteger] = np.min_scalar_type(self.size - 1)
        self.bytes_per_token: npt.NDArray[np.int64] = np.concatenate(
            [np.ones(256, np.int64), 2 + (points >= 0x800).astype(np.int64) + (points >= 0x10000)]
        )
        """(size,) int64: the bytes of text that each token decodes to."""
        # Row i has the bytes of token i, left-aligned.
        self._spelling = np.zeros((self.size, 4), np.uint8)
        self._spelling[:256, 0] = np.arange(256)
        spelled = np.arange(4) < self.bytes_per_token[256:, None]
        self._spelling[256:][spelled] = np.frombuffer(characters.encode(), np.uint8)
        self._points = points

    def encode(self, text: bytes | npt.NDArray[np.uint8]) -> Tokens:
        """Encode ``text``: ids (n,) of the smallest unsigned dtype that can hold ``size - 1``."""
        return self.encode_documents(text, ())

    def encode_documents(self, text: bytes | npt.NDArray[np.uint8], ends: Iterable[int]) -> Tokens:
        """Encode ``text``, in which a document ends at each of the byte offsets ``ends``, ascending.

        With ``byte`` and ``char``, that byte, a newline, is the document end. The others encode it as ``document_end``.
        """
        data = as_array(text)
        ids = data.astype(self.dtype)
        if not self.characters:
            return ids
        starts, lengths, points = find_multibyte_characters(data)
        place = np.minimum(np.searchsorted(self._points, points), len(self._points) - 1)
        known = self._points[place] == points
        starts, lengths = starts[known], lengths[known]
        ids[starts] = (256 + place[known]).astype(self.dtype)
        keep = np.ones(len(ids), bool)
        for i in range(1, 4):
            keep[starts[lengths > i] + i] = False
        return ids[keep]

    def split_point(self, data: npt.NDArray[np.uint8], lo: int, at: int) -> int:
        """The last offset in (lo, at] at which ``data`` (N,) can be cut: the two parts encode to the ids of the whole.

        Returns ``lo``, the start of the text, if there is no such offset.
        """
        return find_character_start(data, at)

    def chunks(self, data: npt.NDArray[np.uint8], lo: int, hi: int) -> list[tuple[int, int]]:
        """Split [lo, hi) into ranges of about CHUNK bytes, longer if no cut is possible, to encode separately."""
        edges = [lo]
        for at in range(lo + CHUNK, hi, CHUNK):
            edges.append(self.split_point(data, edges[-1], at))
        return [(begin, end) for begin, end in itertools.pairwise([*edges, hi]) if begin < end]

    def decode(self, ids: npt.ArrayLike) -> bytes:
        """Decode ``ids`` (n,), any integers in [0, size). The result can start or end inside a UTF-8 character."""
        index = check_ids(ids, self.size)
        spelled = np.arange(4) < self.bytes_per_token[index][:, None]
        return self._spelling[index][spelled].tobytes()

    def to_dict(self) -> dict[str, str]:
        """Plain types for JSON and checkpoints; ``vocabulary_from_dict`` restores the same vocabulary."""
        return {"kind": self.kind, "characters": self.characters}

    def to_tokenizer(self) -> dict[str, Any] | None:
        """The tokenizer.json of this encoding, for the tokenizers library and transformers; None if it has none."""
        if self.kind != "byte":
            return None
        bytes_alone = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        return {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": bytes_alone,
            "decoder": bytes_alone,
            "model": {"type": "BPE", "vocab": BYTE_BY_CHARACTER, "merges": []},
        }

    @property
    def digest(self) -> str:
        """A digest of 64 hex digits, equal for equal vocabularies."""
        return json_digest(self.to_dict())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Vocabulary({self.kind!r}, size={self.size})"


def find_multibyte_characters(
    data: npt.NDArray[np.uint8],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Starts, lengths in bytes (2 to 4) and code points of the well-formed UTF-8 characters above U+007F.

    No byte can be both a lead byte and a continuation byte, so characters never overlap, and each lead byte is checked
    independently.
    """
    starts = np.flatnonzero(data >= 0xC2)
    lead = data[starts].astype(np.int64)
    lengths = 2 + (lead >= 0xE0).astype(np.int64) + (lead >= 0xF0)
    points = lead & (0x7F >> lengths)
    good = (lead < 0xF5) & (starts + lengths <= len(data))
    for i in range(1, 4):
        continues = data[np.minimum(starts + i, len(data) - 1)]
        inside = lengths > i
        good &= ~inside | (continues & 0xC0 == 0x80)
        points = np.where(inside, points << 6 | continues & 0x3F, points)
    # Overlong encodings, surrogates and code points above U+10FFFF are not UTF-8.
    smallest = np.array([0, 0, 0x80, 0x800, 0x10000])[lengths]
    good &= (points >= smallest) & ((points < 0xD800) | (points >= 0xE000)) & (points < 0x110000)
    return starts[good], lengths[good], points[good]


class UnknownVocabulary(Vocabulary):
    """``size`` token ids whose text is not known: it has no ``bytes_per_token``.

    A text of these tokens is the ids themselves in decimal, each after a space: decode([12, 5]) is b" 12 5".
    ``encode`` raises UserError for a word that is not an id.
    """

    document_end = 0

    def __init__(self, size: int) -> None:
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise UserError(f"vocab_size must be a whole number of at least 1, got {size!r}")
        self.kind, self.characters, self.size = UNKNOWN, "", int(size)
        self.dtype = np.min_scalar_type(self.size - 1)

    def encode_documents(self, text: bytes | npt.NDArray[np.uint8], ends: Iterable[int]) -> Tokens:
        words = as_array(text).tobytes().split()
        for word in words:
            if not word.isdigit() or int(word[:20]) >= self.size:
                shown = word[:20].decode(errors="replace")
                raise UserError(
                    f"{shown!r} is not a token id from 0 to {self.size - 1:,}: the model was trained on ids whose text "
                    "is not known, so write ids, as in '12 5 7'"
                )
        return np.array([int(word) for word in words], self.dtype)

    def decode(self, ids: npt.ArrayLike) -> bytes:
        return b"".join(b" %d" % i for i in check_ids(ids, self.size).tolist())

    def to_dict(self) -> dict[str, str]:
        return {"kind": self.kind, "size": str(self.size)}
