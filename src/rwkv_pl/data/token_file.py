"""The token file that training reads through a memory map.

With the vocabulary ``byte`` the corpus is the token file. With the others it is derived once, in pieces, so that
neither way the size of a corpus costs memory.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from rwkv_pl.data.corpus import Corpus, Splits, file_digest
from rwkv_pl.data.progress import progress_bar
from rwkv_pl.data.vocabulary import EncodingError, Tokens, Vocabulary
from rwkv_pl.errors import UserError
from rwkv_pl.files import as_user_error, atomic_write, cache_folder, json_digest, read_record, write_record


class TokenFile:
    """Ids one after the other in a file, and the ranges of the splits, in tokens.

    digest: of the file's content, by ``file_digest``. n_bytes: how many bytes of text the splits stand for.
    """

    def __init__(
        self,
        path: Path,
        dtype: np.dtype[np.unsignedinteger],
        splits: Splits,
        digest: str,
        n_bytes: tuple[int, int, int],
        stamp: tuple[int, int] | None = None,
    ) -> None:
        self.path, self.dtype, self.splits, self.digest, self.n_bytes = path, dtype, splits, digest, n_bytes
        self._stamp = stamp or _stat_file(path)

    @functools.cached_property
    def tokens(self) -> Tokens:
        """All tokens: (N,), mapped, not read."""
        return np.asarray(np.memmap(self.path, self.dtype, mode="r"))

    def split(self, name: str) -> Tokens:
        """The tokens of "train", "val" or "test", mapped, not read."""
        lo, hi = getattr(self.splits, name)
        return self.tokens[lo:hi]

    def split_bytes(self, name: str) -> int:
        """How many bytes the corpus file has between the edges of "train", "val" or "test".

        Of the file itself, whatever its tokens spell: a vocabulary that normalises may spell some more, or fewer.
        """
        return self.n_bytes[Splits._fields.index(name)]

    def check_unchanged(self) -> None:
        """Raises UserError where the file is no longer the one that was opened; asks for its size and time alone."""
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
        raise UserError(f"the data file {self.path} has changed under the run ({how}): put back the text that it was")

    def __reduce__(self) -> tuple[Any, ...]:
        # To a worker process goes the name: a memory map would be sent as the whole content.
        return TokenFile, (self.path, self.dtype, self.splits, self.digest, self.n_bytes, self._stamp)


def _stat_file(path: Path) -> tuple[int, int]:
    """Size and time of change."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def open_tokens(corpus: Corpus, vocabulary: Vocabulary) -> TokenFile:
    """The corpus in tokens of ``vocabulary``, encoded at its first use and kept in the cache folder.

    Where a split's edge would cut a character the split moves back to that character's start. Raises UserError where
    the vocabulary cannot spell the corpus.
    """
    if vocabulary.kind == "byte":
        n_bytes = _split_lengths(corpus.splits)
        return TokenFile(corpus.path, vocabulary.dtype, corpus.splits, corpus.digest, n_bytes)
    data = np.memmap(corpus.path, np.uint8, mode="r")
    splits = corpus.character_splits()
    key = [*corpus.cache_key, vocabulary.digest]
    if corpus.ends_path is not None:
        key.append(file_digest(corpus.ends_path))
    path = cache_folder() / "tokens" / f"{corpus.name}-{json_digest(key)[:16]}.{vocabulary.dtype.name}"
    record_path = path.with_suffix(".json")
    with as_user_error(path.parent), FileLock(path.with_suffix(".lock")):
        # Published last: where it is, the tokens are; and where they are not what it says, they are made again.
        stored = read_record(record_path)
        if stored is None or not path.is_file() or file_digest(path) != stored["digest"]:
            document_ends = corpus.document_ends
            ends, count = [], 0
            with atomic_write(path) as file:
                for split in splits:
                    for lo, hi in progress_bar(vocabulary.chunks(data, *split), f"encoding {corpus.name}"):
                        inside = slice(*np.searchsorted(document_ends, (lo, hi)))
                        try:
                            ids = vocabulary.encode_documents(data[lo:hi], document_ends[inside] - lo)
                        except EncodingError as error:
                            raise EncodingError(
                                lo + error.offset, f"{error.reason}; data.vocab=byte takes any file", str(corpus.path)
                            ) from error
                        file.write(ids.data)
                        count += len(ids)
                    ends.append(count)
            stored = {"ends": ends, "digest": file_digest(path)}
            write_record(record_path, stored)
        train, val, test = stored["ends"]
        edges = Splits((0, train), (train, val), (val, test))
        return TokenFile(path, vocabulary.dtype, edges, stored["digest"], _split_lengths(splits))


def _split_lengths(splits: Splits) -> tuple[int, int, int]:
    train, val, test = (hi - lo for lo, hi in splits)
    return train, val, test
