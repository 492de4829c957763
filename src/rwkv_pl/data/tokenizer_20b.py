"""The 20B tokenizer of GPT-NeoX and the official RWKV-4 Pile models: byte-level BPE, as its json describes it.

The text, in Unicode's normal form C, is cut at runs of two and more spaces, which are tokens, then into words by
GPT-2's pattern, and the bytes of each word are merged into tokens. All of that is the library's; here is what it leaves
open: a corpus goes through it in pieces, and tokens become bytes one by one.
"""

import itertools
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from rwkv_pl.data.vocabulary import BYTE_BY_CHARACTER, EncodingError, Tokens, Vocabulary
from rwkv_pl.errors import UserError, one_line

# Before 0.23.1 the library warns at every fork that follows a use of its threads. What we fork, workers that gather
# batches, does not use it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

END_OF_TEXT = "<|endoftext|>"

PIECE = 1 << 12

# Between two bytes where the tokens of a text are those of its two parts.
# A space after what is no space: no word goes on over it, no run of spaces begins before it and no character is
# normalised together with it. (Spaces are what Unicode calls so, and the separators U+001C to U+001F to be careful.)
# And a punctuation mark after a letter, both of ASCII, for texts in one line: every word with a letter ends there.
SAFE_CUT = re.compile(
    rb"(?<![\t-\r\x1c-\x20])(?<!\xc2[\x85\xa0])(?<!\xe1\x9a\x80)(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])"
    rb"(?<!\xe2\x81\x9f)(?<!\xe3\x80\x80)(?=[ \t\n\r])"
    rb"|(?<=[A-Za-z])(?=[!-/:-@\[-`{-~])"
)

# A byte of UTF-8 is none of these.
_INVALID_BYTES = {0xC0, 0xC1, *range(0xF5, 0x100)}


class Vocabulary20B(Vocabulary):
    """Text as byte pairs: decode(encode(text)) is the text in normal form C, which most text is in.

    ``tokenizer``: the json, in the form that ``read`` gives it. Token 0, <|endoftext|>, is ``document_end``; like
    <|padding|> it stands for no text: where such words are in a text they are spelled as other words are, so no text
    has these tokens.

    ``encode`` raises EncodingError if the text is not UTF-8. Raises ValueError if the json describes another kind of
    tokenizer.
    """

    document_end = 0

    def __init__(self, tokenizer: str) -> None:
        described = json.loads(tokenizer)
        self.kind = "20b"
        self._json = tokenizer
        self._token_bytes = _read_token_bytes(described)
        self.size = len(self._token_bytes)
        self.dtype = np.min_scalar_type(self.size - 1)
        self.bytes_per_token = np.array([len(spelled) for spelled in self._token_bytes], np.int64)
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(str(error)) from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @classmethod
    def read(cls, path: Path) -> "Vocabulary20B":
        """The tokenizer whose json ``path`` is. Raises UserError where it is none."""
        try:
            # In one form, whoever has written it: what is equal has one digest.
            described = json.loads(path.read_bytes())
            return cls(json.dumps(described, sort_keys=True, ensure_ascii=False, separators=(",", ":")))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            reason = one_line(error)[:200]
            raise UserError(
                f"{path} is not the json of the 20B tokenizer ({reason}): name 20B_tokenizer.json"
            ) from error

    def encode(self, text: bytes | npt.NDArray[np.uint8]) -> Tokens:
        return self.encode_documents(text, ())

    def encode_documents(self, text: bytes | npt.NDArray[np.uint8], ends: Iterable[int]) -> Tokens:
        data = bytes(text)
        pieces: list[str] = []
        document_ends: list[int] = []  # in pieces
        at = 0
        for end in (*ends, len(data)):
            while at < end:
                cut = SAFE_CUT.search(data, at + PIECE, end)
                to = cut.start() if cut else int(end)
                pieces.append(_decode_utf8(data, at, to))
                at = to
            at += 1  # the byte that is the end
            document_ends.append(len(pieces))
        encodings = self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        ids: list[list[int]] = []
        for begin, end in itertools.pairwise((0, *document_ends)):
            ids += [encoding.ids for encoding in encodings[begin:end]]
            ids.append([self.document_end])
        ids.pop()  # of the end of the data, which need not be that of a document
        return np.fromiter(itertools.chain.from_iterable(ids), self.dtype)

    def split_point(self, data: npt.NDArray[np.uint8], lo: int, at: int) -> int:
        for length in (1 << 12, 1 << 16, 1 << 22):
            begin = max(lo, at - length)
            block = bytes(data[begin : at + 1])
            # The first three bytes may be the rest of a character.
            places = [match.start() for match in SAFE_CUT.finditer(block, 3)]
            if places:
                return begin + places[-1]
        return lo

    def decode(self, ids: npt.ArrayLike) -> bytes:
        return b"".join([self._token_bytes[i] for i in np.asarray(ids, np.int64).tolist()])

    def to_dict(self) -> dict[str, str]:
        return {"kind": self.kind, "tokenizer": self._json}

    def to_tokenizer(self) -> dict[str, Any]:
        return json.loads(self._json)


def _decode_utf8(data: bytes, lo: int, hi: int) -> str:
    try:
        return data[lo:hi].decode()
    except UnicodeDecodeError as error:
        raise EncodingError(lo + error.start, "is not UTF-8, and vocab 20b spells text alone") from error


def _read_token_bytes(described: Any) -> list[bytes]:
    """What each token stands for. Raises ValueError where the json describes a tokenizer of another kind."""
    try:
        model, added = described["model"], described["added_tokens"]
        before, normalizer = described["pre_tokenizer"], described["normalizer"]
        unlike = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "unk_token", "byte_fallback")
        words = before["type"], before["add_prefix_space"], before.get("use_regex", True)
        alike = model["type"] == "BPE" and not any(model.get(key) for key in (*unlike, "ignore_merges"))
        alike = alike and (normalizer or {"type": "NFC"})["type"] == "NFC" and words == ("ByteLevel", False, True)
        if not alike:
            raise ValueError("it is not byte-level BPE with GPT-2's pattern")
        spelling = {
            i: bytes(BYTE_BY_CHARACTER[character] for character in token) for token, i in model["vocab"].items()
        }
        if not set(spelling.values()) >= {bytes([byte]) for byte in range(256) if byte not in _INVALID_BYTES}:
            raise ValueError("it has no token for some byte")
        for token in added:
            content, special = token["content"], token["special"]
            if not special and content.strip(" "):
                raise ValueError(f"its added token {content!r} is no run of spaces")
            if token["single_word"] or token["lstrip"] or token["rstrip"]:
                raise ValueError(f"its added token {content!r} takes what stands beside it")
            # What is special stands for no text.
            spelling[token["id"]] = b"" if special else content.encode()
            if (token["id"] == Vocabulary20B.document_end) != (content == END_OF_TEXT):
                raise ValueError(f"its token 0 is not {END_OF_TEXT}")
        if sorted(spelling) != list(range(len(spelling))) or spelling[Vocabulary20B.document_end]:
            raise ValueError(f"its tokens are not 0, 1, 2, ..., of which 0 is {END_OF_TEXT}")
        return [spelling[i] for i in range(len(spelling))]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("it lacks a part, or has one of another kind") from error
