"""The 20B tokenizer of GPT-NeoX and of the official RWKV-4 Pile models: byte-level BPE, described by its JSON file.

The text is normalised to Unicode form C and split at runs of two or more spaces, which are tokens. GPT-2's pattern
then splits it into words, and the bytes of each word are merged into tokens. The tokenizers library does all of that.
This file adds two things: encoding a corpus in pieces, and decoding each token to its bytes.
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

from rwkv_pl.data.byte_vocabulary import BYTE_BY_CHARACTER, EncodingError, Tokens, Vocabulary, as_array, check_ids
from rwkv_pl.errors import UserError, one_line

# Versions before 0.23.1 warn at every fork after the library has used its threads. The processes forked here, the data
# workers, do not use it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

END_OF_TEXT = "<|endoftext|>"

PIECE = 1 << 12

# Matches a position at which a text can be cut: the tokens of the two parts are those of the whole.
# First case: before whitespace that follows a non-space. No word crosses that position, no run of spaces starts before
# it, and no character is normalised together with its neighbour across it. (Spaces are Unicode's, and to be safe also
# the separators U+001C to U+001F.)
# Second case, for texts without whitespace: between an ASCII letter and ASCII punctuation. Every word with a letter
# ends there.
SAFE_CUT = re.compile(
    rb"(?<![\t-\r\x1c-\x20])(?<!\xc2[\x85\xa0])(?<!\xe1\x9a\x80)(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])"
    rb"(?<!\xe2\x81\x9f)(?<!\xe3\x80\x80)(?=[ \t\n\r])"
    rb"|(?<=[A-Za-z])(?=[!-/:-@\[-`{-~])"
)

# Bytes that never occur in UTF-8.
_INVALID_BYTES = {0xC0, 0xC1, *range(0xF5, 0x100)}


class Vocabulary20B(Vocabulary):
    """The byte-pair vocabulary 20b: decode(encode(text)) is the text in Unicode form C, which most text already is in.

    ``tokenizer``: the JSON, serialised as ``read`` does it. Token 0, <|endoftext|>, is ``document_end``. It and
    <|padding|> decode to no text. If a text contains these words, they are encoded as ordinary text, so encoding never
    produces these tokens.

    ``encode`` raises EncodingError if the text is not UTF-8. The constructor raises ValueError if the JSON describes
    another kind of tokenizer.
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
        except Exception as error:  # the library raises no narrower type
            raise ValueError(str(error)) from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @classmethod
    def read(cls, path: Path) -> "Vocabulary20B":
        """Read the tokenizer from the JSON file ``path``. Raises UserError if it is not the 20B tokenizer."""
        try:
            # Serialised again, so that equal tokenizers have equal digests whatever wrote the file.
            described = json.loads(path.read_bytes())
            return cls(json.dumps(described, sort_keys=True, ensure_ascii=False, separators=(",", ":")))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            reason = one_line(error)[:200]
            raise UserError(
                f"{path} is not the JSON file of the 20B tokenizer ({reason}): give 20B_tokenizer.json"
            ) from error

    def encode_documents(self, text: bytes | npt.NDArray[np.uint8], ends: Iterable[int]) -> Tokens:
        data = as_array(text).tobytes()
        pieces: list[str] = []
        document_ends: list[int] = []  # in pieces
        at = 0
        for end in (*ends, len(data)):
            while at < end:
                cut = SAFE_CUT.search(data, at + PIECE, end)
                to = cut.start() if cut else int(end)
                pieces.append(_decode_utf8(data, at, to))
                at = to
            at += 1  # skip the document-end byte
            document_ends.append(len(pieces))
        encodings = self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        ids: list[list[int]] = []
        for begin, end in itertools.pairwise((0, *document_ends)):
            ids += [encoding.ids for encoding in encodings[begin:end]]
            ids.append([self.document_end])
        ids.pop()  # the end of the data is not always the end of a document
        return np.fromiter(itertools.chain.from_iterable(ids), self.dtype)

    def split_point(self, data: npt.NDArray[np.uint8], lo: int, at: int) -> int:
        for length in (1 << 12, 1 << 16, 1 << 22):
            begin = max(lo, at - length)
            block = bytes(data[begin : at + 1])
            # The first three bytes may be the end of a cut character.
            places = [match.start() for match in SAFE_CUT.finditer(block, 3)]
            if places:
                return begin + places[-1]
        return lo

    def decode(self, ids: npt.ArrayLike) -> bytes:
        return b"".join([self._token_bytes[i] for i in check_ids(ids, self.size).tolist()])

    def to_dict(self) -> dict[str, str]:
        return {"kind": self.kind, "tokenizer": self._json}

    def to_tokenizer(self) -> dict[str, Any]:
        return json.loads(self._json)


def _decode_utf8(data: bytes, lo: int, hi: int) -> str:
    try:
        return data[lo:hi].decode()
    except UnicodeDecodeError as error:
        raise EncodingError(lo + error.start, "is not UTF-8, and vocab 20b encodes only UTF-8 text") from error


def _read_token_bytes(described: Any) -> list[bytes]:
    """The bytes of each token, by id. Raises ValueError if the JSON describes another kind of tokenizer."""
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
                raise ValueError(f"its added token {content!r} is not a run of spaces")
            if token["single_word"] or token["lstrip"] or token["rstrip"]:
                raise ValueError(f"its added token {content!r} depends on the text around it")
            # Special tokens decode to no text.
            spelling[token["id"]] = b"" if special else content.encode()
            if (token["id"] == Vocabulary20B.document_end) != (content == END_OF_TEXT):
                raise ValueError(f"its token 0 is not {END_OF_TEXT}")
        if sorted(spelling) != list(range(len(spelling))) or spelling[Vocabulary20B.document_end]:
            raise ValueError(f"its tokens are not 0, 1, 2, ..., of which 0 is {END_OF_TEXT}")
        return [spelling[i] for i in range(len(spelling))]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("a part is missing or has the wrong type") from error
