"""A corpus: one plain file, split in three, and which content it has."""

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rwkv_pl.errors import UserError

BLOCK = 1 << 20

FULL_DIGEST_BELOW = 64 << 20


class Splits(NamedTuple):
    """Half-open ranges that follow each other from 0: of bytes in a corpus, of tokens in a token file."""

    train: tuple[int, int]
    val: tuple[int, int]
    test: tuple[int, int]


@dataclass(frozen=True)
class Corpus:
    """A plain file of bytes and how it is split.

    ``digest`` (64 hex) says which text this is, wherever it lies: see ``file_digest``. ``ends_path`` is the file behind
    ``document_ends``, None where no documents are known.
    """

    name: str
    path: Path
    splits: Splits
    digest: str
    description: str
    ends_path: Path | None = None

    @property
    def document_ends(self) -> npt.NDArray[np.int64]:
        """Offsets of the document ends, rising, mapped: (documents - 1,), or (0,) where no documents are known.

        At each lies one byte 10, between two documents and of neither: a vocabulary with a token of its own for the
        end of a document writes that for this byte.
        """
        return _map_offsets(self.ends_path)

    @property
    def cache_key(self) -> list[Any]:
        """What a derived file depends on; the time too, since the digest of a large file misses some changes."""
        return [self.digest, self.path.stat().st_mtime_ns, self.splits]

    def character_splits(self) -> Splits:
        """The splits, each edge moved back to the start of the character it cuts."""
        data = np.memmap(self.path, np.uint8, mode="r")
        train, val = (find_character_start(data, end) for _, end in self.splits[:2])
        return Splits((0, train), (train, val), (val, self.splits.test[1]))

    def __str__(self) -> str:
        """Which text this is, for people; figures on it mean nothing without that."""
        return f"{self.name} ({self.description}, digest {self.digest[:12]})"


def _map_offsets(path: Path | None) -> npt.NDArray[np.int64]:
    return np.empty(0, np.int64) if path is None else np.asarray(np.memmap(path, "<i8", mode="r"))


def split_by_fractions(path: Path, fractions: tuple[float, float, float], ends_path: Path | None = None) -> Splits:
    """Byte ranges for the fractions (train, val, test).

    Each edge moves to the nearest start of a document where one lies within a tenth of the smallest fraction, so that
    no split begins inside a document that another has seen; else back to the start of the character it cuts.

    Raises UserError where the fractions are not three numbers >= 0 with the sum 1.
    """
    # Asked this way round, a NaN is refused as well.
    if not (len(fractions) == 3 and min(fractions) >= 0 and abs(sum(fractions) - 1) < 1e-6):
        raise UserError(f"data.split={list(fractions)} is not three fractions >= 0 (train, val, test) with the sum 1")
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


def find_character_start(data: npt.NDArray[np.uint8], at: int) -> int:
    """Where the UTF-8 character begins that the cut at byte ``at`` would break; ``at`` where it breaks none.

    Looks at no more than three bytes to either side.
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
    """64 hex digits that say which content a file has, in a tenth of a second at most.

    Below 64 MiB the SHA-256 of the content; from there on the SHA-256 of its size (8 bytes, little endian) and of 1,024
    blocks of 16 KiB, evenly spaced from the first to the last: a change between those blocks is not seen.
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
