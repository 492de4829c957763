"""A corpus: one plain file, its three splits, and a digest of its content."""

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rwkv_pl.config import check_fractions

BLOCK = 1 << 20

FULL_DIGEST_BELOW = 64 << 20


class Splits(NamedTuple):
    """Consecutive half-open ranges, starting at 0: of bytes in a corpus, of tokens in a token file."""

    train: tuple[int, int]
    val: tuple[int, int]
    test: tuple[int, int]


@dataclass(frozen=True)
class Corpus:
    """A plain file of bytes and its splits.

    ``digest`` (64 hex digits) identifies the content, wherever the file is: see ``file_digest``. ``ends_path`` is the
    file behind ``document_ends``, or None if the documents are not known.
    """

    name: str
    path: Path
    splits: Splits
    digest: str
    description: str
    ends_path: Path | None = None

    @property
    def document_ends(self) -> npt.NDArray[np.int64]:
        """Byte offsets of the document ends, ascending, memory-mapped: (documents - 1,), or (0,) if not known.

        Each offset is that of one byte 10, which separates two documents and belongs to neither. A vocabulary with a
        separate end-of-document token encodes this byte as that token.
        """
        return _map_offsets(self.ends_path)

    @property
    def cache_key(self) -> list[Any]:
        """The cache key of derived files; includes the mtime, since the digest of a large file misses some changes."""
        return [self.digest, self.path.stat().st_mtime_ns, self.splits]

    def character_splits(self) -> Splits:
        """The splits, with each boundary moved back to the start of the character that it would cut."""
        data = np.memmap(self.path, np.uint8, mode="r")
        train, val = (find_character_start(data, end) for _, end in self.splits[:2])
        return Splits((0, train), (train, val), (val, self.splits.test[1]))

    def __str__(self) -> str:
        """The name, description and short digest of the text, to print next to any score on it."""
        return f"{self.name} ({self.description}, digest {self.digest[:12]})"


def _map_offsets(path: Path | None) -> npt.NDArray[np.int64]:
    return np.empty(0, np.int64) if path is None else np.asarray(np.memmap(path, "<i8", mode="r"))


def split_by_fractions(path: Path, fractions: tuple[float, float, float], ends_path: Path | None = None) -> Splits:
    """Byte ranges for the fractions (train, val, test).

    If a document starts within a tenth of the smallest fraction, the boundary moves to the nearest such start, so that
    no document is in two splits. Else it moves back to the start of the character that it would cut.

    Raises UserError unless the fractions are three numbers >= 0 that sum to 1.
    """
    check_fractions(fractions)
    data = np.memmap(path, np.uint8, mode="r")
    n = len(data)
    document_ends, reach = _map_offsets(ends_path), min(fractions) * n / 10

    def move_edge(at: int) -> int:
        index = int(np.searchsorted(document_ends, at))
        starts = (document_ends[max(index - 1, 0) : index + 1] + 1).tolist()
        near = [start for start in starts if abs(start - at) <= reach]
        return min(near, key=lambda start: abs(start - at)) if near else find_character_start(data, at)

    train, val = move_edge(round(n * fractions[0])), move_edge(round(n * (fractions[0] + fractions[1])))
    return Splits((0, train), (train, val), (val, n))


def split_at_documents(
    n_tokens: int, fractions: tuple[float, float, float], document_start: Callable[[int], int]
) -> Splits:
    """Token ranges for the fractions (train, val, test).

    A boundary moves back to the start of the document that it would cut, unless a split would be left empty.
    ``document_start``: the first token of the document that contains a token.

    Raises UserError unless the fractions are three numbers >= 0 that sum to 1.
    """
    check_fractions(fractions)
    cuts = round(n_tokens * fractions[0]), round(n_tokens * (fractions[0] + fractions[1]))
    train, val = map(document_start, cuts)
    if not 0 < train < val < n_tokens:
        train, val = cuts
    return Splits((0, train), (train, val), (val, n_tokens))


def find_character_start(data: npt.NDArray[np.uint8], at: int) -> int:
    """The start of the UTF-8 character that a cut before byte ``at`` would break, or ``at`` if it breaks none.

    Reads at most three bytes on either side.
    """
    for start in range(at - 1, max(at - 4, -1), -1):
        if data[start] < 0x80:
            break
        if data[start] >= 0xC0:
            length = 2 + (data[start] >= 0xE0) + (data[start] >= 0xF0)
            with contextlib.suppress(UnicodeDecodeError):
                bytes(data[start : start + length]).decode()
                return start if start + length > at else at
            break
    return at


def file_digest(path: Path) -> str:
    """A digest of a file's content, 64 hex digits, computed in at most a tenth of a second.

    Below 64 MiB it is the SHA-256 of the content. From 64 MiB on it is the SHA-256 of the size (8 bytes, little
    endian) and of 1,024 blocks of 16 KiB, evenly spaced from start to end. It misses a change between those blocks.
    """
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size < FULL_DIGEST_BELOW:
            while block := file.read(BLOCK):
                digest.update(block)
        else:
            digest.update(size.to_bytes(8, "little"))
            length = 1 << 14
            for i in range(1024):
                file.seek((size - length) * i // 1023)
                digest.update(file.read(length))
    return digest.hexdigest()
