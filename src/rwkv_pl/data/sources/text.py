"""The user's own text: a file, a folder or a glob; plain, compressed or JSON lines."""

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from rwkv_pl.config import corpus_setting
from rwkv_pl.data.corpus import Corpus, Splits, file_digest, split_by_fractions
from rwkv_pl.data.documents import SourceFile, find_files, is_plain_text, join_documents
from rwkv_pl.data.sources import Source
from rwkv_pl.errors import UserError
from rwkv_pl.files import as_user_error, atomic_write, cache_folder, json_digest, read_record, write_record


@dataclass(frozen=True)
class Text(Source):
    """Text files, split by fractions of their bytes (train, val, test): see ``split_by_fractions``.

    ``path`` is a file, a folder or a glob: see ``documents.find_files``. A plain file is the corpus itself. Anything
    else (several files, compressed ones, the ``field`` of each row of a ``.jsonl``) is joined into one plain file in
    the cache folder, at the first use and again when a source changes: see ``documents.join_documents``. That file
    takes the disk space of the whole text. Bits per byte are per byte of that file, document ends included.

    If ``val_path`` is set (a file, folder or glob too), all of ``path`` is train, all of ``val_path`` is val, and there
    is no test split. A file in both is used for validation only.

    ``old_rule``: find and read the files as the first versions did, for their runs: see ``documents``.

    ``open`` raises UserError if the text is missing, unreadable or empty, or if the fractions are invalid.
    """

    path: str | Path
    split: tuple[float, float, float] = (0.9, 0.05, 0.05)
    val_path: str | Path | None = None
    field: str = "text"
    old_rule: bool = False

    @property
    def has_test_split(self) -> bool:  # type: ignore[override]
        return self.val_path is None

    def matching(self, digest: str) -> "Text":
        """Return this text, or if only that has the digest, the text as the first versions read it."""
        for text in (self, replace(self, old_rule=True)):
            with contextlib.suppress(UserError):
                if text.open().digest == digest:
                    return text
        return self

    def open(self) -> Corpus:
        path = Path(self.path)
        path_key, val_key = corpus_setting("path"), corpus_setting("val_path")
        parts = {path_key: find_files(path, path_key, self.old_rule)}
        if self.val_path is None and is_plain_text(path, self.old_rule):
            if path.stat().st_size == 0:
                raise UserError(f"{path_key}={path} is empty: give a file that contains text")
            try:
                splits, digest = split_by_fractions(path, self.split), file_digest(path)
            except OSError as error:
                raise UserError(f"cannot read {path_key}={path}: {error.strerror}") from error
            return Corpus(path.name, path.absolute(), splits, digest, str(path))
        described = str(path)
        if self.val_path is not None:
            parts[val_key] = find_files(Path(self.val_path), val_key, self.old_rule)
            held_back = {source.path.resolve() for source in parts[val_key]}
            parts[path_key] = [source for source in parts[path_key] if source.path.resolve() not in held_back]
            if not parts[path_key]:
                raise UserError(
                    f"{val_key}={self.val_path} includes all files of {path_key}={path}: none is left to train on"
                )
            described += f", validated on {self.val_path}"
        joined, ends_path, joining = _join_parts(parts, self.field, self.old_rule)
        if (count := sum(map(len, parts.values()))) > 1 or not path.is_file():
            described += f", {count:,} file" + "s" * (count > 1)
        if ends_path:
            described += f", {joining['documents']:,} documents"
        if self.val_path is None:
            splits = split_by_fractions(joined, self.split, ends_path)
        else:
            # The document end between the two belongs to train; it is the first context of validation.
            train, end = joining["ends"][0] + 1, joining["ends"][1]
            splits = Splits((0, train), (train, end), (end, end))
        name = path.name if path.exists() else "text"  # a glob cannot be part of a file name
        return Corpus(name, joined, splits, joining["digests"][0], described, ends_path)


def _join_parts(
    parts: dict[str, list[SourceFile]], field: str, old_rule: bool
) -> tuple[Path, Path | None, dict[str, Any]]:
    """Join the parts into one file in the cache folder, unless it is there already.

    Returns the file, the file of its document ends (None if it has fewer than two documents), and the JoinResult as a
    dictionary, with the digests of both files.
    """
    sources = [[(str(source.path.absolute()), *source[1:]) for source in part] for part in parts.values()]
    key = [field, sources] if old_rule else [field, sources, "unpacked by content"]
    path = cache_folder() / "corpora" / f"text-{json_digest(key)[:16]}.txt"
    ends_path, record = path.with_suffix(".ends"), path.with_suffix(".json")
    with as_user_error(path.parent), FileLock(path.with_suffix(".lock")):
        # The record is written last, so if it exists, the text does too. A text that does not match it is made again.
        stored = read_record(record)
        there = path.is_file() and ends_path.is_file()
        if stored is None or not there or stored["digests"] != [file_digest(path), file_digest(ends_path)]:
            with atomic_write(path) as file, atomic_write(ends_path) as ends_file:
                joined = join_documents(parts, field, file, ends_file, old_rule)
            digests = [file_digest(path), file_digest(ends_path)]
            stored = {**joined._asdict(), "digests": digests}
            write_record(record, stored)
        return path, ends_path if stored["documents"] > 1 else None, stored
