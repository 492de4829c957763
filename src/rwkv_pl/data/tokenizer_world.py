"""The tokenizer of the official World models: 65,529 byte strings; the longest one that fits is the next token.

Its file, rwkv_vocab_v20230424.txt, has a line for each token: the id, a Python literal and the length in bytes. Every
byte is a token, so any text can be encoded, UTF-8 or not.
"""

import ast
import functools
import itertools
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rwkv_pl.data.byte_vocabulary import BYTE_BY_CHARACTER, Tokens, Vocabulary, as_array, check_ids
from rwkv_pl.errors import UserError, one_line

FILE = "rwkv_vocab_v20230424.txt"
SIZE = 1 << 16  # of the official models; the ids that the file does not have are never produced

CHARACTER_BY_BYTE = {byte: character for character, byte in BYTE_BY_CHARACTER.items()}


class VocabularyWorld(Vocabulary):
    """The vocabulary world: decode(encode(text)) is the text, for any bytes.

    ``tokens``: the byte strings of the tokens 1, 2, 3, ..., in the visible characters of BYTE_BY_CHARACTER, separated
    by spaces. Token 0 is ``document_end``. It and the ids after the last token decode to no text.

    The constructor raises ValueError for tokens that are not such a vocabulary.
    """

    document_end = 0

    def __init__(self, tokens: str) -> None:
        try:
            spelled = [bytes(BYTE_BY_CHARACTER[character] for character in token) for token in tokens.split(" ")]
        except KeyError as error:
            raise ValueError(f"a token has the character {error}") from error
        if len(set(spelled)) < len(spelled) or not all(spelled):
            raise ValueError("a token is empty, or there twice")
        if not set(spelled) >= {bytes([byte]) for byte in range(256)}:
            raise ValueError("it has no token for some byte")
        if len(spelled) >= SIZE:
            raise ValueError(f"it has {len(spelled):,} tokens, more than {SIZE - 1:,}")
        self.kind = "world"
        self.size = SIZE
        self.dtype = np.min_scalar_type(SIZE - 1)
        self._tokens = tokens
        self._token_bytes = [b"", *spelled, *[b""] * (SIZE - 1 - len(spelled))]
        self.bytes_per_token = np.array([len(token) for token in self._token_bytes], np.int64)
        # A node of the trie has its children by byte, and its token under the key -1.
        self._trie: dict[int, Any] = {}
        self._is_inside = np.zeros((256, 256), bool)  # is a pair of bytes inside any token?
        for i, token in enumerate(spelled, 1):
            node = self._trie
            for byte in token:
                node = node.setdefault(byte, {})
            node[-1] = i
            for pair in itertools.pairwise(token):
                self._is_inside[pair] = True

    @classmethod
    def read(cls, path: Path) -> "VocabularyWorld":
        """Read the vocabulary from its file. Raises UserError if it is not one."""
        try:
            tokens = []
            for number, line in enumerate(path.read_bytes().decode().rstrip("\n").split("\n"), 1):
                token_id, _, rest = line.partition(" ")
                literal, _, length = rest.rpartition(" ")
                token = ast.literal_eval(literal)
                token = token.encode() if isinstance(token, str) else token
                if (int(token_id), int(length)) != (number, len(token)):
                    raise ValueError(f"line {number} is not token {number}")
                tokens.append("".join(CHARACTER_BY_BYTE[byte] for byte in token))
            return cls(" ".join(tokens))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
            reason = one_line(error)[:200]
            raise UserError(f"{path} is not the World vocabulary ({reason}): give {FILE}") from error

    def encode_documents(self, text: bytes | npt.NDArray[np.uint8], ends: Iterable[int]) -> Tokens:
        data = as_array(text)
        encode = functools.cache(self._encode_word)  # words repeat
        parts: list[Iterator[int] | tuple[int]] = []
        begin = 0
        for end in (*ends, len(data)):
            parts += [itertools.chain.from_iterable(map(encode, self._words(data[begin:end]))), (self.document_end,)]
            begin = end + 1  # skip the document-end byte
        parts.pop()  # the end of the data is not always the end of a document
        return np.fromiter(itertools.chain.from_iterable(parts), self.dtype)

    def _words(self, data: npt.NDArray[np.uint8]) -> Iterator[bytes]:
        """Split where no token goes across: between two bytes that are inside no token."""
        cuts = 1 + np.flatnonzero(~self._is_inside[data[:-1], data[1:]])
        whole = data.tobytes()
        return (whole[begin:end] for begin, end in itertools.pairwise((0, *cuts.tolist(), len(whole))))

    def _encode_word(self, word: bytes) -> list[int]:
        """Encode bytes by repeating: the next token is the longest one that fits."""
        ids, at = [], 0
        while at < len(word):
            node = self._trie
            for to in range(at, len(word)):
                child = node.get(word[to])
                if child is None:
                    break
                node = child
                if -1 in node:
                    token, end = node[-1], to + 1
            ids.append(token)
            at = end
        return ids

    def split_point(self, data: npt.NDArray[np.uint8], lo: int, at: int) -> int:
        for length in (1 << 12, 1 << 16, 1 << 22):
            begin = max(lo, at - length)
            block = np.asarray(data[begin : at + 1])
            places = np.flatnonzero(~self._is_inside[block[:-1], block[1:]])
            if len(places):
                return begin + 1 + int(places[-1])
        return lo

    def decode(self, ids: npt.ArrayLike) -> bytes:
        return b"".join([self._token_bytes[i] for i in check_ids(ids, self.size).tolist()])

    def to_dict(self) -> dict[str, str]:
        return {"kind": self.kind, "tokens": self._tokens}

    def to_tokenizer(self) -> None:
        return None


def find_installed() -> Path | None:
    """The vocabulary's file in the installed package `rwkv`, which is not imported; None if there is none."""
    package = find_spec("rwkv")
    folders = package.submodule_search_locations if package and package.submodule_search_locations else []
    return next((path for folder in folders if (path := Path(folder, FILE)).is_file()), None)
