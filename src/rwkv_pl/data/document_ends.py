"""Where the documents of a token file end: needed in a stream, where a state must not pass from one to the next.

The ends are positions in tokens, those of the last token of each document, in a file of int64, little endian.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from rwkv_pl.data.corpus import BLOCK, Corpus, file_digest
from rwkv_pl.data.token_file import TokenFile
from rwkv_pl.data.vocabulary import Vocabulary
from rwkv_pl.files import as_user_error, atomic_write, cache_folder, json_digest

Int64 = npt.NDArray[np.int64]


class DocumentEnds:
    """The positions in a file, memory-mapped; none if ``path`` is None."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    @cached_property
    def positions(self) -> Int64:
        """(documents - 1,) ascending."""
        if self.path is None or self.path.stat().st_size == 0:
            return np.empty(0, np.int64)
        return np.asarray(np.memmap(self.path, "<i8", mode="r"))

    def __reduce__(self) -> tuple[Any, ...]:
        return DocumentEnds, (self.path,)  # a worker process maps the file itself


def open_document_ends(corpus: Corpus, file: TokenFile, vocabulary: Vocabulary) -> Path | None:
    """The ends of the documents of a text, each with the newline or the token that marks its end.

    Returns None if the corpus does not know its documents.
    """
    if corpus.ends_path is None or vocabulary.kind == "byte":
        return corpus.ends_path
    n_documents = len(corpus.document_ends)
    found = _find_marks(corpus, file, vocabulary)
    return write_document_ends(found, n_documents, [file_digest(corpus.ends_path), file.digest])


def _find_marks(corpus: Corpus, file: TokenFile, vocabulary: Vocabulary) -> Iterator[Int64]:
    """Yield the tokens that mark document ends, in blocks.

    With 20b, a special token marks them. With char it is a newline, and each newline of the text is one token. So the
    k-th newline of the text is the k-th of the tokens.
    """
    numbers = None
    if vocabulary.kind == "char":
        text, ends = np.memmap(corpus.path, np.uint8, mode="r"), corpus.document_ends
        numbers, seen = np.empty(len(ends), np.int64), 0
        for lo in range(0, len(text), BLOCK):
            newlines = lo + np.flatnonzero(text[lo : lo + BLOCK] == 10)
            inside = slice(*np.searchsorted(ends, (lo, lo + BLOCK)))
            numbers[inside] = seen + np.searchsorted(newlines, ends[inside])
            seen += len(newlines)
    seen = 0
    for lo in range(0, len(file.tokens), BLOCK):
        marks = lo + np.flatnonzero(file.tokens[lo : lo + BLOCK] == vocabulary.document_end)
        if numbers is None:
            yield marks
        else:
            yield marks[numbers[slice(*np.searchsorted(numbers, (seen, seen + len(marks))))] - seen]
        seen += len(marks)


def write_document_ends(blocks: Iterable[Int64], count: int, key: list[Any]) -> Path | None:
    """Write ``count`` ends, given in blocks, to the cache folder, unless it has the file for ``key``. None for no ends.

    key: identifies the documents, in JSON.
    """
    if count == 0:
        return None
    path = cache_folder() / "tokens" / f"documents-{json_digest(key)[:16]}.ends"
    with as_user_error(path.parent), FileLock(path.with_suffix(".lock")):
        if not path.is_file() or path.stat().st_size != 8 * count:
            with atomic_write(path) as file:
                for block in blocks:
                    file.write(block.astype("<i8").data)
    return path
