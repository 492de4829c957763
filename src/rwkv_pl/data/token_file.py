"""The token file, which training reads through a memory map.

With vocabulary ``byte``, the corpus is the token file. With the others, it is encoded once, in chunks. Either way,
memory use does not depend on the size of the corpus.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from rwkv_pl.config import UNKNOWN, corpus_setting
from rwkv_pl.data.corpus import Corpus, Splits, file_digest
from rwkv_pl.data.encoding import encode_corpus
from rwkv_pl.data.vocabulary import Tokens, Vocabulary
from rwkv_pl.errors import UserError
from rwkv_pl.files import as_user_error, cache_folder, json_digest, read_record, write_record


class TokenFile:
    """A file of token ids without a header, and the ranges of its splits, in tokens.

    digest: the ``file_digest`` of the file. n_bytes: the bytes of text in each split, 0 if the vocabulary does not know
    them. offset: bytes before the first token. vocab_size: if the ids are not all checked yet, their number: see
    ``check_range``.
    """

    def __init__(
        self,
        path: Path,
        dtype: np.dtype[np.unsignedinteger],
        splits: Splits,
        digest: str,
        n_bytes: tuple[int, int, int],
        stamp: tuple[int, int] | None = None,
        offset: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        self.path, self.dtype, self.splits, self.digest, self.n_bytes = path, dtype, splits, digest, n_bytes
        self.offset, self.vocab_size = offset, vocab_size
        self._stamp = stamp or _stat_file(path)

    @functools.cached_property
    def tokens(self) -> Tokens:
        """All tokens: (N,), memory-mapped."""
        return np.asarray(np.memmap(self.path, self.dtype, mode="r", offset=self.offset))

    def split(self, name: str) -> Tokens:
        """The tokens of "train", "val" or "test", memory-mapped."""
        lo, hi = getattr(self.splits, name)
        return self.tokens[lo:hi]

    def split_bytes(self, name: str) -> int:
        """The bytes of text in "train", "val" or "test".

        For text, these are the bytes of the corpus file. If a vocabulary normalises, its tokens may decode to more or
        fewer.
        """
        return self.n_bytes[Splits._fields.index(name)]

    def check_range(self, lo: int, hi: int) -> None:
        """Raise UserError if one of the tokens [lo, hi) is not in the vocabulary, unless all are checked already."""
        if self.vocab_size is not None:
            check_ids(self.path, self.tokens[lo : max(lo, hi)], lo, self.vocab_size)

    def check_unchanged(self) -> None:
        """Raise UserError if the file has changed since it was opened.

        Compares size and mtime; the content is read only if the mtime alone has changed.
        """
        try:
            stamp = _stat_file(self.path)
            if stamp == self._stamp:
                return
            if stamp[0] == self._stamp[0] and file_digest(self.path) == self.digest:
                self._stamp = stamp
                return
            how = f"{self._stamp[0]:,} bytes before, {stamp[0]:,} now" if stamp[0] != self._stamp[0] else "other bytes"
        except OSError as error:
            how = str(error.strerror)
        raise UserError(f"the data file {self.path} changed during the run ({how}): restore its original content")

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process receives only the path: pickling a memory map would send the whole content.
        of_file = self.path, self.dtype, self.splits, self.digest, self.n_bytes, self._stamp
        return TokenFile, (*of_file, self.offset, self.vocab_size)


def check_ids(path: Path, ids: npt.NDArray[np.integer], first: int, size: int, vocab: str = UNKNOWN) -> None:
    """Raise UserError unless all ``ids``, the tokens of a file from ``first`` on, are in [0, size).

    vocab: the kind of the vocabulary.
    """
    if not len(ids) or (ids.max() < size and ids.min() >= 0):
        return
    i = int(np.flatnonzero((ids < 0) | (ids >= size))[0])
    if vocab == UNKNOWN:
        raise UserError(
            f"{path}: token {first + i:,} is {ids[i]:,}, but ids are below data.vocab_size={size}: raise it, or "
            f"correct the file or its {corpus_setting('dtype')}"
        )
    raise UserError(
        f"{path}: token {first + i:,} is {ids[i]}, vocabulary {vocab} has {size:,}: "
        "set data.vocab to the vocabulary that it was written with"
    )


def _stat_file(path: Path) -> tuple[int, int]:
    """Size in bytes and mtime in nanoseconds."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def open_tokens(corpus: Corpus, vocabulary: Vocabulary) -> TokenFile:
    """Open the tokens of a corpus, encoding it with ``vocabulary`` at the first use; the cache folder stores them.

    Except with vocabulary ``byte``, a split boundary inside a character moves back to its start. Raises UserError if
    the vocabulary cannot encode the corpus.
    """
    if vocabulary.kind == "byte":
        n_bytes = _split_lengths(corpus.splits)
        return TokenFile(corpus.path, vocabulary.dtype, corpus.splits, corpus.digest, n_bytes)
    splits = corpus.character_splits()
    key = [*corpus.cache_key, vocabulary.digest]
    if corpus.ends_path is not None:
        key.append(file_digest(corpus.ends_path))
    path = cache_folder() / "tokens" / f"{corpus.name}-{json_digest(key)[:16]}.{vocabulary.dtype.name}"
    record_path = path.with_suffix(".json")
    with as_user_error(path.parent), FileLock(path.with_suffix(".lock")):
        # The record is written last, so if it exists, the tokens do too. Tokens that do not match it are made again.
        stored = read_record(record_path)
        if stored is None or not path.is_file() or file_digest(path) != stored["digest"]:
            ends = encode_corpus(corpus, splits, vocabulary, path)
            stored = {"ends": ends, "digest": file_digest(path)}
            write_record(record_path, stored)
        train, val, test = stored["ends"]
        edges = Splits((0, train), (train, val), (val, test))
        return TokenFile(path, vocabulary.dtype, edges, stored["digest"], _split_lengths(splits))


def _split_lengths(splits: Splits) -> tuple[int, int, int]:
    train, val, test = (hi - lo for lo, hi in splits)
    return train, val, test
