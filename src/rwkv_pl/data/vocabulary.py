"""Build, read and restore a vocabulary of any kind."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_pl.config import FILE_VOCABULARIES, UNKNOWN
from rwkv_pl.data.byte_vocabulary import (
    EncodingError,
    Tokens,
    UnknownVocabulary,
    Vocabulary,
    find_multibyte_characters,
)
from rwkv_pl.data.cache import cached_json
from rwkv_pl.data.corpus import Corpus
from rwkv_pl.errors import UserError
from rwkv_pl.files import json_digest

__all__ = [
    "EncodingError",
    "Tokens",
    "Vocabulary",
    "build_vocabulary",
    "describe_strange_bytes",
    "read_vocabulary",
    "vocabulary_from_dict",
]


def build_vocabulary(kind: str, corpora: Sequence[Corpus], vocab_path: Path | None = None) -> Vocabulary:
    """Build one vocabulary for all corpora.

    For ``char``, it has the characters of the training splits, which are collected once and cached. ``20b`` and
    ``world`` are read from the file ``vocab_path``.

    Raises UserError for an unknown kind, or if the file is missing.
    """
    if kind in FILE_VOCABULARIES:
        return read_vocabulary(vocab_path, kind)
    if kind != "char":
        return Vocabulary(kind)
    characters = {character for corpus in corpora for character in _find_characters(corpus).characters}
    return Vocabulary(kind, "".join(sorted(characters)))


def _find_characters(corpus: Corpus) -> Vocabulary:
    """Return the vocabulary ``char`` of a corpus."""

    def find_characters() -> dict[str, Any]:
        seen = np.zeros(0x110000, bool)
        data = np.memmap(corpus.path, np.uint8, mode="r")
        for lo, hi in Vocabulary("char").chunks(data, *corpus.character_splits().train):
            seen[find_multibyte_characters(data[lo:hi])[2]] = True
        return Vocabulary("char", "".join(map(chr, np.flatnonzero(seen)))).to_dict()

    return vocabulary_from_dict(cached_json(f"char-{json_digest(corpus.cache_key)[:16]}.json", find_characters))


def read_vocabulary(path: Path | None, kind: str | None = None) -> Vocabulary:
    """Read the vocabulary ``20b`` from its JSON file, or ``world`` from its text file.

    kind: None for the kind that the file's suffix says. path: None for the file of ``world`` in the installed package
    rwkv. Raises UserError if there is none, or if the file is not one of that kind.
    """
    if (kind or ("world" if path and path.suffix == ".txt" else "20b")) == "world":
        from rwkv_pl.data.tokenizer_world import FILE, VocabularyWorld, find_installed

        if path is None and (path := find_installed()) is None:
            raise UserError(
                f"data.vocab=world needs the file {FILE}: set data.vocab_path={FILE}, or run `pip install rwkv`, a "
                "package that has it"
            )
        return VocabularyWorld.read(path)
    if path is None:
        raise UserError(
            "data.vocab=20b needs the tokenizer's JSON file: set data.vocab_path=20B_tokenizer.json (it is part of "
            "the official RWKV-4 code, and of GPT-NeoX-20B as tokenizer.json)"
        )
    from rwkv_pl.data.tokenizer_20b import Vocabulary20B  # imports the tokenizers library only when needed

    return Vocabulary20B.read(path)


def describe_strange_bytes(path: Path, kind: str) -> str | None:
    """Describe a file that is probably not text for the vocabulary `kind`: NUL bytes, or not UTF-8. None for text.

    From 16 MiB on, it reads 1,024 evenly spaced blocks.
    """
    data, size = np.memmap(path, np.uint8, mode="r"), 1 << 14
    starts = range(0, len(data), size) if len(data) < size << 10 else np.linspace(0, len(data) - size, 1024, dtype=int)
    n = nul = invalid = 0
    for start in starts:
        block = np.asarray(data[start : start + size])
        n, nul = n + len(block), nul + int(np.count_nonzero(block == 0))
        if kind != "byte":
            invalid += int(np.count_nonzero(block >= 0x80)) - int(find_multibyte_characters(block)[1].sum())
    if nul > 0.01 * n:
        return f"{nul / n:.0%} of {path} are NUL bytes: convert UTF-16 to UTF-8, and leave out binary files"
    if invalid > 0.1 * n:
        return f"{invalid / n:.0%} of {path} is not UTF-8: convert it, or use data.vocab=byte"
    return None


def vocabulary_from_dict(stored: dict[str, Any]) -> Vocabulary:
    """Restore a vocabulary from a result of ``to_dict``. Raises UserError if it is corrupt or its kind unknown."""
    try:
        if stored["kind"] == "20b":
            from rwkv_pl.data.tokenizer_20b import Vocabulary20B  # imports the tokenizers library only when needed

            return Vocabulary20B(str(stored["tokenizer"]))
        if stored["kind"] == UNKNOWN:
            return UnknownVocabulary(int(stored["size"]))
        if stored["kind"] == "world":
            from rwkv_pl.data.tokenizer_world import VocabularyWorld

            return VocabularyWorld(str(stored["tokens"]))
        return Vocabulary(str(stored["kind"]), str(stored.get("characters", "")))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise UserError(f"the stored vocabulary is corrupt: {error!r}") from error
