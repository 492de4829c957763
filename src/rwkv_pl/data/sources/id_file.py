"""A file of token ids: a `.npy` array, or a `.bin` of plain numbers, little endian and without a header."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rwkv_pl.config import corpus_setting
from rwkv_pl.data.byte_vocabulary import UnknownVocabulary
from rwkv_pl.data.cache import cached_json
from rwkv_pl.data.corpus import Corpus, file_digest, split_at_documents
from rwkv_pl.data.sources import Source
from rwkv_pl.data.sources.binidx import count_bytes
from rwkv_pl.data.token_file import TokenFile
from rwkv_pl.data.vocabulary import Vocabulary
from rwkv_pl.errors import UserError, one_line
from rwkv_pl.files import json_digest

NPY_MAGIC = b"\x93NUMPY"

NOT_ENOUGH_MEMORY = 8

# From this size on, the ids are not all checked before the training: reading a terabyte takes hours.
FULL_CHECK_BELOW = 16 << 30

# Blocks that are checked at the start of a larger file, and the ids of each.
N_BLOCKS, BLOCK = 1024, 1 << 12


@dataclass(frozen=True)
class IdFile(Source):
    """The ids of one file, memory-mapped and split by fractions of their number, to the id.

    ``path``: a .npy with a one-dimensional array of integers, or any other name, a file of numbers without a header,
    little endian, whose ``dtype`` must be given. The corpus is the file; its ``splits`` are in tokens.

    ``open`` raises UserError if the file is missing, empty, or not such an array. ``open_tokens`` checks that each id
    is in the vocabulary, once per version of the file. A file of 16 GiB or more is checked in 1,024 evenly spaced
    blocks, and each window again when it is read.
    """

    path: str | Path
    split: tuple[float, float, float] = (0.9, 0.05, 0.05)
    dtype: str | None = None

    def open(self) -> Corpus:
        path = Path(self.path)
        try:
            ids, digest = self._map(), file_digest(path)
        except OSError as error:
            raise UserError(
                f"cannot read {corpus_setting('path')}={path}: {error.strerror or one_line(error)}"
            ) from error
        splits = split_at_documents(len(ids), self.split, lambda at: at)
        return Corpus(path.name, path.absolute(), splits, digest, f"{self.path}, {ids.dtype.name}")

    def open_tokens(self, corpus: Corpus, vocabulary: Vocabulary) -> TokenFile:
        ids = self._map()
        # Ids in the vocabulary are not negative, so signed numbers can be read as unsigned.
        unsigned = np.dtype(ids.dtype.str.replace("i", "u"))
        file = TokenFile(corpus.path, unsigned, corpus.splits, corpus.digest, (0, 0, 0), offset=ids.offset)
        if isinstance(vocabulary, UnknownVocabulary):
            if vocabulary.size > np.iinfo(ids.dtype).max and ids.dtype.kind == "u":
                return file  # each number is an id
            if ids.nbytes >= FULL_CHECK_BELOW:
                file.vocab_size = vocabulary.size
                n = min(BLOCK, len(ids))
                for start in np.linspace(0, len(ids) - n, N_BLOCKS, dtype=np.int64).tolist():
                    file.check_range(start, start + n)
                return file

        def counted() -> dict[str, list[int]]:
            return {"n_bytes": [count_bytes(corpus.path, ids, vocabulary, *split) for split in corpus.splits]}

        key = [*corpus.cache_key, ids.dtype.str, vocabulary.digest]
        train, val, test = cached_json(f"ids-{json_digest(key)[:16]}.json", counted)["n_bytes"]
        file.n_bytes = (train, val, test)
        return file

    def _map(self) -> "np.memmap[tuple[int], np.dtype[np.integer]]":
        """The ids (N,). Raises UserError, or OSError if the file cannot be read."""
        path = Path(self.path)
        given, dtype_key = f"{corpus_setting('path')}={path}", corpus_setting("dtype")
        if not path.is_file():
            what = "is a folder: give one file" if path.is_dir() else "does not exist: give a .npy or .bin of token ids"
            raise UserError(f"{given} {what}")
        n_bytes = path.stat().st_size
        if n_bytes == 0:
            raise UserError(f"{given} is empty: give a file with token ids")
        if path.suffix == ".npy":
            return self._map_npy(path, given, dtype_key)
        with path.open("rb") as opened:
            if opened.read(len(NPY_MAGIC)) == NPY_MAGIC:
                raise UserError(f"{given} is a numpy array: rename it to {path.with_suffix('.npy').name}")
        if self.dtype is None:
            raise UserError(f"{dtype_key} is missing: {path} has no header; give the type of its ids, as in uint16")
        dtype = np.dtype(self.dtype).newbyteorder("<")
        if n_bytes % dtype.itemsize:
            raise UserError(
                f"{given} has {n_bytes:,} bytes, not a multiple of {dtype.itemsize}, the size of "
                f"{dtype_key}={self.dtype}: it is truncated, or has another dtype"
            )
        return np.memmap(path, dtype, mode="r")

    def _map_npy(self, path: Path, given: str, dtype_key: str) -> "np.memmap[tuple[int], np.dtype[np.integer]]":
        try:
            ids = np.lib.format.open_memmap(path, mode="r")  # never unpickles
        except Exception as error:  # a corrupt header can fail in any way
            # Windows' error for a map that is longer than the file.
            if isinstance(error, OSError) and getattr(error, "winerror", None) != NOT_ENOUGH_MEMORY:
                raise
            raise UserError(f"{given} is not a .npy of numbers, or is truncated: {one_line(error)}") from error
        if ids.dtype.kind not in "iu":
            raise UserError(f"{given} has dtype {ids.dtype}: token ids must be integers")
        if ids.ndim != 1:
            raise UserError(f"{given} has shape {ids.shape}: save one sequence, for example ids.reshape(-1)")
        if not len(ids):
            raise UserError(f"{given} is empty: give a file with token ids")
        if self.dtype is not None and np.dtype(self.dtype) != ids.dtype.newbyteorder("="):
            raise UserError(f"{dtype_key}={self.dtype}, but {path} has dtype {ids.dtype}: leave out {dtype_key}")
        return ids
