"""Megatron's binidx format: a file of token ids and its index, the corpus format of the existing RWKV trainers.

PREFIX.bin has the ids of all sequences, one after the other. PREFIX.idx, little endian:

    9 bytes  MMIDIDX and two zeros    uint64  version, 1    uint8   code of the ids' dtype
    uint64   S, sequences             uint64  D, entries of the list of documents
    (S,) int32 lengths in ids         (S,) int64 offsets in PREFIX.bin, in bytes
    (D,) int64 first sequence of each document; most writers add S at the end

The ids are memory-mapped in place, not copied. Some writers end each document with a token (the RWKV tools with 0),
others do not. The reader adds none.
"""

import bisect
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rwkv_pl.config import corpus_setting
from rwkv_pl.data.cache import cached_json
from rwkv_pl.data.corpus import Corpus, file_digest, split_at_documents
from rwkv_pl.data.document_ends import write_document_ends
from rwkv_pl.data.progress import progress_bar
from rwkv_pl.data.sources import Source
from rwkv_pl.data.token_file import TokenFile, check_ids
from rwkv_pl.data.vocabulary import Vocabulary
from rwkv_pl.errors import UserError
from rwkv_pl.files import json_digest

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4", 10: "<u8"}
FLOAT_CODES = (6, 7)
BLOCK = 1 << 22


class Index(NamedTuple):
    """The content of PREFIX.idx, validated against PREFIX.bin."""

    path: Path
    """PREFIX.bin."""
    dtype: np.dtype[np.integer]
    n_tokens: int
    sequence_starts: npt.NDArray[np.int64]
    """(S,) in bytes, memory-mapped."""
    documents: npt.NDArray[np.int64]
    """(D,) first sequence of each document, memory-mapped; an entry S marks the end, not a document."""

    def document_start(self, at: int) -> int:
        """The first token of the document that contains token ``at``."""

        def start(sequence: int) -> int:
            there = sequence < len(self.sequence_starts)
            return int(self.sequence_starts[sequence]) // self.dtype.itemsize if there else self.n_tokens

        i = bisect.bisect_right(self.documents, at, key=start)
        return start(self.documents[i - 1]) if i else 0


@dataclass(frozen=True)
class Binidx(Source):
    """PREFIX.bin and PREFIX.idx, split by fractions of the tokens. ``path`` is the prefix or one of the two names.

    A split boundary moves back to the start of the document that it would cut, unless there are too few documents for
    three splits. The corpus is PREFIX.bin; its ``splits`` are in tokens. The byte counts of a split are those of its
    decoded tokens, 0 if the vocabulary does not know them.

    ``open`` raises UserError if a file is missing or not in the format, ``open_tokens`` if an id is not in the
    vocabulary. Every id is checked, once per version of the file.
    """

    path: str | Path
    split: tuple[float, float, float] = (0.9, 0.05, 0.05)

    @cached_property
    def index(self) -> Index:
        """PREFIX.idx, validated against PREFIX.bin."""
        return _read_index(_strip_suffix(Path(self.path)), Path(self.path))

    def open(self) -> Corpus:
        try:
            index = self.index
            content = file_digest(index.path)
        except OSError as error:
            raise UserError(f"cannot read {error.filename or self.path}: {error.strerror}") from error
        splits = split_at_documents(index.n_tokens, self.split, index.document_start)
        return Corpus(index.path.stem, index.path.absolute(), splits, content, str(self.path))

    def open_tokens(self, corpus: Corpus, vocabulary: Vocabulary) -> TokenFile:
        index = self.index
        ids = np.memmap(index.path, index.dtype, mode="r")

        def counted() -> dict[str, Any]:
            return {"n_bytes": [count_bytes(index.path, ids, vocabulary, *split) for split in corpus.splits]}

        key = [corpus.digest, index.path.stat().st_mtime_ns, index.dtype.str, corpus.splits, vocabulary.digest]
        train, val, test = cached_json(f"binidx-{json_digest(key)[:16]}.json", counted)["n_bytes"]
        # No id is negative, so signed ids can be read as unsigned.
        unsigned = np.dtype(f"<u{index.dtype.itemsize}")
        return TokenFile(index.path, unsigned, corpus.splits, corpus.digest, (train, val, test))

    def document_ends(self, corpus: Corpus, file: TokenFile, vocabulary: Vocabulary) -> Path | None:
        starts, documents = self.index.sequence_starts, self.index.documents
        sequences = documents[1 : np.searchsorted(documents, len(starts))]  # an entry S at the end is not a document
        blocks = (sequences[lo : lo + BLOCK] for lo in range(0, len(sequences), BLOCK))
        ends = (starts[block] // self.index.dtype.itemsize - 1 for block in blocks)
        return write_document_ends(
            ends, len(sequences), [corpus.digest, file_digest(self.index.path.with_suffix(".idx"))]
        )


def _strip_suffix(path: Path) -> str:
    return str(path.absolute())[:-4] if path.suffix in (".bin", ".idx") else str(path.absolute())


def _read_index(prefix: str, given: Path) -> Index:
    data, path = Path(prefix + ".bin"), Path(prefix + ".idx")
    for file in (data, path):
        if not file.is_file():
            raise UserError(
                f"{corpus_setting('path')}={given}: there is no {file}; a binidx corpus is PREFIX.bin and PREFIX.idx, "
                f"if they were moved, set {corpus_setting('path')}= to their new path"
            )
    n_index, n_data = path.stat().st_size, data.stat().st_size
    with path.open("rb") as opened:
        header = opened.read(HEADER.size)
    if not header.startswith(MAGIC) or len(header) < HEADER.size:
        raise UserError(
            f"{path} is not a binidx index: it does not start with MMIDIDX and a header of {HEADER.size} bytes"
        )
    _, version, code, n_sequences, n_documents = HEADER.unpack(header)
    if version != 1:
        raise UserError(f"{path} has version {version} of the binidx format; only version 1 is supported")
    if code not in DTYPES:
        what = "floating-point numbers" if code in FLOAT_CODES else f"an unknown dtype (code {code})"
        raise UserError(f"{path} declares {what} in {data.name}: token ids must be integers")
    expected = HEADER.size + 12 * n_sequences + 8 * n_documents
    if n_index != expected:
        raise UserError(
            f"{path} has {n_index:,} bytes, an index of {n_sequences:,} sequences and {n_documents:,} documents has "
            f"{expected:,}: it is truncated, or its header is wrong; copy or create it again"
        )
    dtype = np.dtype(DTYPES[code])
    if n_sequences == 0 or n_data == 0:
        raise UserError(
            f"{corpus_setting('path')}={given} is empty: {data} has {n_data:,} bytes in {n_sequences:,} sequences"
        )

    def mapped(kind: str, offset: int, count: int) -> npt.NDArray[Any]:
        return np.asarray(np.memmap(path, kind, mode="r", offset=offset, shape=count)) if count else np.zeros(0, kind)

    lengths = mapped("<i4", HEADER.size, n_sequences)
    starts = mapped("<i8", HEADER.size + 4 * n_sequences, n_sequences)
    documents = mapped("<i8", HEADER.size + 12 * n_sequences, n_documents)
    end = 0
    for lo in range(0, n_sequences, BLOCK):
        n_bytes = lengths[lo : lo + BLOCK].astype(np.int64) * dtype.itemsize
        ends = end + np.cumsum(n_bytes)
        wrong = np.flatnonzero((n_bytes < 0) | (starts[lo : lo + BLOCK] != ends - n_bytes))
        if wrong.size:
            raise UserError(
                f"{path}: sequence {lo + int(wrong[0]):,} does not follow the one before it in {data.name}; "
                "only ids without gaps are supported: create the corpus again"
            )
        end = int(ends[-1])
    if end != n_data:
        raise UserError(f"{data} has {n_data:,} bytes, its index {path.name} needs {end:,}: copy or create it again")
    for lo in range(0, n_documents, BLOCK):
        some = documents[max(lo - 1, 0) : lo + BLOCK]
        if some[0] < 0 or some[-1] > n_sequences or np.any(np.diff(some) < 0):
            raise UserError(
                f"{path}: its documents are not in order within its {n_sequences:,} sequences: create the corpus again"
            )
    return Index(data, dtype, n_data // dtype.itemsize, starts, documents)


def count_bytes(path: Path, ids: npt.NDArray[np.integer], vocabulary: Vocabulary, lo: int, hi: int) -> int:
    """The number of bytes that the ``ids`` [lo, hi) of a file decode to, 0 if the vocabulary does not know it.

    Raises UserError if an id is not in the vocabulary.
    """
    n_bytes, bytes_per_token = 0, getattr(vocabulary, "bytes_per_token", None)
    blocks = [(at, min(at + BLOCK, hi)) for at in range(lo, hi, BLOCK)]
    for begin, end in progress_bar(blocks, f"checking the ids of {path.name}"):
        check_ids(path, ids[begin:end], begin, vocabulary.size, vocabulary.kind)
        if bytes_per_token is not None:
            n_bytes += int(np.bincount(ids[begin:end].astype(np.int64), minlength=vocabulary.size) @ bytes_per_token)
    return n_bytes
