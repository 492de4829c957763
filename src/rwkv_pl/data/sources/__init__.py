"""Corpus types, one per file: each class opens one type of corpus. `config.CORPORA` is the table of them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from rwkv_pl.config import CORPORA, DATA_PATHS
from rwkv_pl.data.corpus import Corpus
from rwkv_pl.data.document_ends import open_document_ends
from rwkv_pl.data.token_file import TokenFile, open_tokens
from rwkv_pl.data.vocabulary import Vocabulary


class Source:
    """The base class of corpus types. A subclass is a dataclass whose fields are settings of `data`."""

    has_test_split = True

    def open(self) -> Corpus:
        """Open the corpus; the first use downloads or derives it. Raises UserError if it is missing or wrong."""
        raise NotImplementedError

    def open_tokens(self, corpus: Corpus, vocabulary: Vocabulary) -> TokenFile:
        """Open the tokens of `corpus`, a result of `open`. Raises UserError if `vocabulary` cannot encode it."""
        return open_tokens(corpus, vocabulary)

    def document_ends(self, corpus: Corpus, file: TokenFile, vocabulary: Vocabulary) -> Path | None:
        """The file of the last token of each document but the last, int64; None if the documents are not known.

        `corpus`, `file`: the results of `open` and `open_tokens`. The first use writes it to the cache folder.
        """
        return open_document_ends(corpus, file, vocabulary)


@dataclass(frozen=True)
class Mix:
    """Several corpora by name, and the share of the samples that each has: whole numbers >= 1."""

    sources: dict[str, Source]
    shares: Sequence[int]


def build_source(data: Any, cwd: Path) -> Source:
    """Build the source of type `data.name` from the settings `data`, a `config.Data`. Paths are relative to `cwd`."""
    module, _, name = CORPORA[data.name].source.partition(":")
    source_class = getattr(import_module(module), name)
    settings = {field.name: getattr(data, field.name, None) for field in fields(source_class)}
    given = {key: value for key, value in settings.items() if value is not None}
    return source_class(**{key: cwd / value if key in DATA_PATHS else value for key, value in given.items()})
