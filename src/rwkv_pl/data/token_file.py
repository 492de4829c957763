"""The token file that training reads through a memory map.

With the vocabulary ``byte`` the corpus is the token file. With the others it is derived once, in pieces, so that
neither way the size of a corpus costs memory.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from rwkv_pl.config import UserError
from rwkv_pl.data.corpus import Corpus, Splits, character_start, file_digest
from rwkv_pl.data.vocabulary import NotSpelled, Tokens, Vocabulary, long_characters, read_vocabulary
from rwkv_pl.files import cache_folder, digest_of, publish, read_record, write_record, writing

CHUNK = 1 << 22


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
        self._stamp = stamp or _stamp(path)

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

    def check(self) -> None:
        """Raises UserError where the file is no longer the one that was opened; asks for its size and time alone."""
        try:
            stamp = _stamp(self.path)
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


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of change."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def open_tokens(corpus: Corpus, vocabulary: Vocabulary) -> TokenFile:
    """The corpus in tokens of ``vocabulary``, encoded at its first use and kept in the cache folder.

    Where a split's edge would cut a character the split moves back to that character's start. Raises UserError where
    the vocabulary cannot spell the corpus.
    """
    if vocabulary.kind == "byte":
        n_bytes = _lengths(corpus.splits)
        return TokenFile(corpus.path, vocabulary.dtype, corpus.splits, corpus.digest, n_bytes)
    data = np.memmap(corpus.path, np.uint8, mode="r")
    splits = _character_splits(corpus, data)
    key = [*_source(corpus), vocabulary.digest]
    if corpus.ends_path is not None:
        key.append(file_digest(corpus.ends_path))
    path = cache_folder() / "tokens" / f"{corpus.name}-{digest_of(key)[:16]}.{vocabulary.dtype.name}"
    about = path.with_suffix(".json")
    with writing(path.parent), FileLock(path.with_suffix(".lock")):
        # Published last: where it is, the tokens are; and where they are not what it says, they are made again.
        stored = read_record(about)
        if stored is None or not path.is_file() or file_digest(path) != stored["digest"]:
            document_ends = corpus.document_ends
            ends, count = [], 0
            with publish(path) as file:
                for split in splits:
                    for lo, hi in watched(_chunks(vocabulary, data, *split), f"encoding {corpus.name}"):
                        inside = slice(*np.searchsorted(document_ends, (lo, hi)))
                        try:
                            ids = vocabulary.encode_documents(data[lo:hi], document_ends[inside] - lo)
                        except NotSpelled as error:
                            raise NotSpelled(
                                lo + error.offset, f"{error.why}; data.vocab=byte takes any file", str(corpus.path)
                            ) from error
                        file.write(ids.data)
                        count += len(ids)
                    ends.append(count)
            stored = {"ends": ends, "digest": file_digest(path)}
            write_record(about, stored)
        train, val, test = stored["ends"]
        edges = Splits((0, train), (train, val), (val, test))
        return TokenFile(path, vocabulary.dtype, edges, stored["digest"], _lengths(splits))


def build_vocabulary(kind: str, corpus: Corpus, vocab_path: Path | None = None) -> Vocabulary:
    """The vocabulary of a corpus: for ``char``, of its training split, found once and kept in the cache folder; for
    ``20b``, of the json ``vocab_path``.

    Raises UserError for an unknown kind, and where there is no such json.
    """
    if kind == "20b":
        if vocab_path is None:
            raise UserError(
                "data.vocab=20b needs the tokenizer's json: data.vocab_path=20B_tokenizer.json (it is in the source of "
                "the official RWKV-4 code, and with GPT-NeoX-20B as tokenizer.json)"
            )
        return read_vocabulary(vocab_path)
    if kind != "char":
        return Vocabulary(kind)

    def found() -> dict[str, Any]:
        seen = np.zeros(0x110000, bool)
        data = np.memmap(corpus.path, np.uint8, mode="r")
        for lo, hi in _chunks(Vocabulary("char"), data, *_character_splits(corpus, data).train):
            seen[long_characters(data[lo:hi])[2]] = True
        return Vocabulary("char", "".join(map(chr, np.flatnonzero(seen)))).to_dict()

    return Vocabulary.from_dict(kept(f"char-{digest_of(_source(corpus))[:16]}.json", found))


def kept(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``make`` returns, made once and kept as ``name`` in the cache folder."""
    path = cache_folder() / "tokens" / name
    with writing(path.parent), FileLock(path.with_suffix(".lock")):
        stored = read_record(path)
        if stored is None:
            stored = make()
            write_record(path, stored)
        return stored


def watched(pieces: list[tuple[int, int]], what: str) -> Iterable[tuple[int, int]]:
    """The pieces, with a bar on a terminal while they are worked off."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(pieces, what, console=console, transient=True, disable=not console.is_terminal)


def _chunks(vocabulary: Vocabulary, data: npt.NDArray[np.uint8], lo: int, hi: int) -> list[tuple[int, int]]:
    """Ranges of about CHUNK bytes that make up [lo, hi), cut where the tokens do not tell; longer where there is no
    such place."""
    edges = [lo]
    for at in range(lo + CHUNK, hi, CHUNK):
        edges.append(vocabulary.cut(data, edges[-1], at))
    return [(begin, end) for begin, end in itertools.pairwise([*edges, hi]) if begin < end]


def _character_splits(corpus: Corpus, data: npt.NDArray[np.uint8]) -> Splits:
    train, val = (character_start(data, end) for _, end in corpus.splits[:2])
    return Splits((0, train), (train, val), (val, corpus.splits.test[1]))


def _lengths(splits: Splits) -> tuple[int, int, int]:
    train, val, test = (hi - lo for lo, hi in splits)
    return train, val, test


def _source(corpus: Corpus) -> list[Any]:
    """What a derived file depends on; the time too, since the digest of a large file does not see every change."""
    return [corpus.digest, corpus.path.stat().st_mtime_ns, corpus.splits]
