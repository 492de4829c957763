"""Token ids in memory: a list, an array, a tensor, or a column of a dataset."""

import hashlib
import numbers
import reprlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from rwkv_pl.data.corpus import Corpus, file_digest, split_at_documents
from rwkv_pl.data.document_ends import write_document_ends
from rwkv_pl.data.sources import Source
from rwkv_pl.data.sources.binidx import BLOCK, count_bytes
from rwkv_pl.data.token_file import TokenFile
from rwkv_pl.data.vocabulary import Tokens, Vocabulary
from rwkv_pl.errors import UserError, one_line
from rwkv_pl.files import as_user_error, atomic_write, cache_folder, read_record, write_record


@dataclass(frozen=True, eq=False)
class Ids(Source):
    """``ids`` of ``vocabulary``, one sequence or several documents, split like ``Binidx``.

    The first use writes them to a file in the cache folder, in the dtype of the vocabulary. Its name is a digest of the
    ids, so a later use of the same ids only reads them. They are read twice, in blocks: memory-mapped ids are never in
    memory as a whole. The corpus is that file; its ``splits`` are in tokens.

    The constructor raises UserError if ``ids`` is not a sequence, ``open`` if it is empty, or for an id that is not an
    integer or not in the vocabulary.
    """

    ids: Any = field(repr=False)
    vocabulary: Vocabulary
    split: tuple[float, float, float] = (0.9, 0.05, 0.05)

    def __post_init__(self) -> None:
        next(_documents(self.ids), None)

    def open(self) -> Corpus:
        return self._corpus

    @cached_property
    def _corpus(self) -> Corpus:
        dtype, starts, n = self.vocabulary.dtype, array("q"), 0
        content = hashlib.sha256(dtype.str.encode())
        for is_start, block in self._blocks():
            if is_start:
                starts.append(n)
            content.update(block.data)
            n += len(block)
        if not n:
            raise UserError("ids is empty: give at least one document with tokens")
        path = cache_folder() / "tokens" / f"ids-{content.hexdigest()[:16]}.{dtype.name}"
        record = path.with_suffix(".json")
        with as_user_error(path.parent), FileLock(path.with_suffix(".lock")):
            # The record is written last, so if it exists, the ids do too. Ids that do not match it are written again.
            stored = read_record(record)
            if stored is None or not path.is_file() or file_digest(path) != stored["digest"]:
                with atomic_write(path) as file:
                    for _, block in self._blocks():
                        file.write(block.data)
                stored = {"digest": file_digest(path)}
                write_record(record, stored)
        splits = split_at_documents(n, self.split, lambda at: starts[bisect_right(starts, at) - 1])
        described = f"{n:,} tokens" + (f" in {len(starts):,} documents" if len(starts) > 1 else "")
        return Corpus("ids", path, splits, stored["digest"], described)

    def open_tokens(self, corpus: Corpus, vocabulary: Vocabulary) -> TokenFile:
        ids = np.memmap(corpus.path, vocabulary.dtype, mode="r")
        train, val, test = (count_bytes(corpus.path, ids, vocabulary, *split) for split in corpus.splits)
        return TokenFile(corpus.path, vocabulary.dtype, corpus.splits, corpus.digest, (train, val, test))

    def document_ends(self, corpus: Corpus, file: TokenFile, vocabulary: Vocabulary) -> Path | None:
        ends = np.cumsum([len(document) for _, document in _documents(self.ids)], dtype=np.int64)[:-1] - 1
        return write_document_ends([ends], len(ends), [corpus.digest, hashlib.sha256(ends.data).hexdigest()])

    def _blocks(self) -> Iterator[tuple[bool, Tokens]]:
        """Yield all ids in blocks, and for each block whether a document starts with it."""
        for name, document in _documents(self.ids):
            for lo in range(0, len(document), BLOCK):
                yield lo == 0, _convert(document[lo : lo + BLOCK], name, lo, self.vocabulary)


def _documents(ids: Any) -> Iterator[tuple[str, Any]]:
    """Yield each document, and its name in messages. One sequence of numbers is one document."""
    ids = _to_sequence(ids, "ids")
    first = None if isinstance(ids, np.ndarray) else next(iter(ids), None)
    # A tensor without dimensions has a __len__, which raises an error.
    if not hasattr(first, "__len__") or isinstance(first, str) or getattr(first, "ndim", 1) == 0:
        yield "ids", ids
    else:
        for i, document in enumerate(ids):
            yield f"ids[{i}]", _to_sequence(document, f"ids[{i}]")


def _to_sequence(ids: Any, name: str) -> Any:
    """Convert an array, a tensor or bytes to a numpy array (n,), without a copy if it is in the CPU's memory."""
    if isinstance(ids, bytes | bytearray):
        return np.frombuffer(ids, np.uint8)
    if hasattr(ids, "cpu"):
        ids = ids.detach().cpu()
    if hasattr(ids, "__array__"):
        try:
            ids = np.asarray(ids)
        except TypeError as error:  # a dtype that numpy does not have
            raise UserError(f"{name} cannot be converted to integers: {one_line(error)}") from error
        if ids.ndim != 1:
            raise UserError(
                f"{name} has shape {ids.shape}, but ids must have one dimension: give {name}.reshape(-1) for one "
                f"sequence, or list({name}) if each row is a document"
            )
        return ids if ids.dtype != object else list(ids)
    if isinstance(ids, Mapping | str) or not (hasattr(ids, "__len__") and hasattr(ids, "__getitem__")):
        raise UserError(
            f"{name} is {reprlib.repr(ids)} ({type(ids).__name__}), not a sequence of token ids: give a list, an "
            "array, a tensor, or one column of a dataset, such as dataset['input_ids']"
        )
    return ids


def _convert(part: Any, name: str, lo: int, vocabulary: Vocabulary) -> Tokens:
    """Convert ``part``, which is ``name``[lo : lo + n], to the vocabulary's dtype. Raises UserError for a wrong id."""
    size = vocabulary.size
    try:
        block = np.asarray(part)
    except (ValueError, TypeError):  # lists of unequal lengths
        block = np.empty(0, object)
    if block.dtype.kind in "iu" and block.ndim == 1:
        if block.min() >= 0 and block.max() < size:
            return np.ascontiguousarray(block, vocabulary.dtype)
        part = block

    def is_wrong(value: Any) -> bool:
        return not isinstance(value, numbers.Integral) or isinstance(value, bool) or not 0 <= int(value) < size

    i, value = next(((i, value) for i, value in enumerate(part) if is_wrong(value)), (0, part[0]))
    kind = "" if isinstance(value, numbers.Integral) else f" ({type(value).__name__}), not an integer"
    shown = one_line(reprlib.repr(value.item() if isinstance(value, np.generic) else value))
    raise UserError(
        f"{name}[{lo + i}] is {shown}{kind}: token ids must be integers from 0 to {size - 1:,}; correct it, or give "
        "the vocab_size of the tokenizer that made them"
    )
