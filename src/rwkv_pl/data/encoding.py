"""Encodes a corpus into a file of token ids. An encoding that was killed continues at its last journal record.

    NAME.unfinished  the ids so far, in the order of the text
    NAME.journal     how much of it is on the disk: written after each JOURNAL_BYTES of text

The next start cuts NAME.unfinished to the journal's length, since a kill can leave more, and continues with the text
that follows. So the file has the same bytes as that of an unbroken encoding. The name has a digest of the text and of
the vocabulary: if one of them changes, the encoding starts anew.
"""

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from rwkv_pl.data.byte_vocabulary import EncodingError, Tokens, Vocabulary
from rwkv_pl.data.corpus import Corpus, Splits
from rwkv_pl.data.progress import progress_bar
from rwkv_pl.files import fsync_folder, read_record, replace_with_retry, write_record

JOURNAL_BYTES = 64 << 20

# Pieces that are encoded at once, while one is written. The tokenizers library uses all cores for one piece, but Python
# turns its results into an array on one core.
THREADS = 2

Piece = tuple[int, int]


def encode_corpus(corpus: Corpus, splits: Splits, vocabulary: Vocabulary, path: Path) -> list[int]:
    """Write the ids of the splits to `path`, one after the other. Returns the end of each split, in tokens.

    For one process at a time: hold the lock `path`.lock. Raises EncodingError if the vocabulary cannot encode the text,
    OSError if a write fails; the next call continues after the last journal record.
    """
    data, document_ends = np.memmap(corpus.path, np.uint8, mode="r"), corpus.document_ends
    unfinished, journal = path.with_suffix(".unfinished"), path.with_suffix(".journal")
    _remove_earlier_versions(corpus, journal)
    pieces = [piece for split in splits for piece in vocabulary.chunks(data, *split)]
    done = _read_journal(journal, unfinished, pieces)
    left = [piece for piece in pieces if piece[0] >= done["text"]]

    def encode(piece: Piece) -> Tokens:
        lo, hi = piece
        inside = slice(*np.searchsorted(document_ends, (lo, hi)))
        try:
            return vocabulary.encode_documents(data[lo:hi], document_ends[inside] - lo)
        except EncodingError as error:
            reason = f"{error.reason}; data.vocab=byte takes any file"
            raise EncodingError(lo + error.offset, reason, str(corpus.path)) from error

    counts, n_bytes = list(done["counts"]), done["bytes"]
    try:
        with unfinished.open("r+b" if n_bytes else "wb") as file:
            file.truncate(n_bytes)
            file.seek(n_bytes)
            shown = progress_bar(left, f"encoding {corpus.name}", done["text"])
            for (lo, hi), ids in _encode_ahead(encode, shown):
                file.write(ids.data)
                n_bytes += ids.nbytes
                counts[next(i for i, (_, end) in enumerate(splits) if lo < end)] += len(ids)
                if hi - done["text"] >= JOURNAL_BYTES or (lo, hi) == pieces[-1]:
                    file.flush()
                    os.fsync(file.fileno())
                    record = {"source": str(corpus.path), "text": hi, "bytes": n_bytes, "counts": list(counts)}
                    write_record(journal, record)
                    done = record
    except BaseException as error:
        with contextlib.suppress(OSError):
            if isinstance(error, EncodingError) or not done["bytes"]:
                unfinished.unlink(missing_ok=True)
                journal.unlink(missing_ok=True)
            else:
                os.truncate(unfinished, done["bytes"])  # gives back the disk space of the rest
        raise
    replace_with_retry(unfinished, path)
    fsync_folder(path.parent)
    journal.unlink(missing_ok=True)
    return list(itertools.accumulate(counts))


def _read_journal(journal: Path, unfinished: Path, pieces: list[Piece]) -> dict[str, Any]:
    """The last record, or that of an encoding that has not started if there is none that fits."""
    anew = {"source": "", "text": 0, "bytes": 0, "counts": [0, 0, 0]}
    done = read_record(journal)
    if done is None or not unfinished.is_file() or unfinished.is_symlink():
        return anew
    # Another version of this program can divide the text otherwise.
    fits = done["text"] in {hi for _, hi in pieces} and unfinished.stat().st_size >= done["bytes"]
    return done if fits else anew


def _remove_earlier_versions(corpus: Corpus, journal: Path) -> None:
    """Delete unfinished encodings of the same file with another content or vocabulary, unless one is being written."""
    for other in journal.parent.glob("*.journal"):
        stored = read_record(other) or {}
        if other != journal and stored.get("source") == str(corpus.path):
            with contextlib.suppress(Timeout, OSError), FileLock(other.with_suffix(".lock"), timeout=0):
                other.with_suffix(".unfinished").unlink(missing_ok=True)
                other.unlink(missing_ok=True)


def _encode_ahead(encode: Callable[[Piece], Tokens], pieces: Iterable[Piece]) -> Iterator[tuple[Piece, Tokens]]:
    """Yield the pieces with their ids, in order, while the next THREADS pieces are encoded."""
    waiting: deque[tuple[Piece, Future[Tokens]]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for piece in pieces:
                waiting.append((piece, pool.submit(encode, piece)))
                if len(waiting) > THREADS:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()
