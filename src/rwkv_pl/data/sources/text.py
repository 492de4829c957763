"""Any text: a file, a folder or a glob, compressed or as rows of JSON."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from rwkv_pl.data.corpus import Corpus, Splits, file_digest, split_by_fractions
from rwkv_pl.data.documents import SourceFile, find_files, is_plain_text, join_documents
from rwkv_pl.data.sources import Source
from rwkv_pl.errors import UserError
from rwkv_pl.files import as_user_error, atomic_write, cache_folder, json_digest, read_record, write_record


@dataclass(frozen=True)
class Text(Source):
    """Texts of any kind, split by fractions of their bytes (train, val, test); see ``split_by_fractions``.

    ``path`` is a file, a folder or a glob: see ``documents.find``. A plain file is the corpus itself. From anything
    else (several files, ``.gz``, the ``field`` of the rows of a ``.jsonl``) one plain file is written to the cache
    folder, at the first use and again when a source has changed: see ``documents.join``. It takes the space of the
    whole text, and bits per byte counts its bytes, document ends among them.

    With ``val_path``, which takes the same, all of ``path`` is train, all of ``val_path`` is val, and there is no test
    split. A file in both is only used for validation.

    ``open`` raises UserError if there is no such text, it cannot be read or is empty, or the fractions are not a split.
    """

    path: str | Path
    split: tuple[float, float, float] = (0.9, 0.05, 0.05)
    val_path: str | Path | None = None
    field: str = "text"

    @property
    def has_test_split(self) -> bool:  # type: ignore[override]
        return self.val_path is None

    def open(self) -> Corpus:
        path = Path(self.path)
        parts = {"data.path": find_files(path, "data.path")}
        if self.val_path is None and is_plain_text(path):
            if path.stat().st_size == 0:
                raise UserError(f"data.path={path} is empty: name a file with text in it")
            try:
                splits, digest = split_by_fractions(path, self.split), file_digest(path)
            except OSError as error:
                raise UserError(f"cannot read data.path={path}: {error.strerror}") from error
            return Corpus(path.name, path.absolute(), splits, digest, str(path))
        described = str(path)
        if self.val_path is not None:
            parts["data.val_path"] = find_files(Path(self.val_path), "data.val_path")
            held_back = {source.path.resolve() for source in parts["data.val_path"]}
            parts["data.path"] = [source for source in parts["data.path"] if source.path.resolve() not in held_back]
            if not parts["data.path"]:
                raise UserError(
                    f"data.val_path={self.val_path} has all files of data.path={path}: none is left to train on"
                )
            described += f", validated on {self.val_path}"
        joined, ends_path, joining = _join_parts(parts, self.field)
        if ends_path:
            described += f", {joining['documents']:,} documents"
        if self.val_path is None:
            splits = split_by_fractions(joined, self.split, ends_path)
        else:
            # The document end between the two is train's, and validation's first context.
            train, end = joining["ends"][0] + 1, joining["ends"][1]
            splits = Splits((0, train), (train, end), (end, end))
        name = path.name if path.exists() else "text"  # a glob is no name for a file
        return Corpus(name, joined, splits, joining["digests"][0], described, ends_path)


def _join_parts(parts: dict[str, list[SourceFile]], field: str) -> tuple[Path, Path | None, dict[str, Any]]:
    """The parts as one file in the cache folder, the file of its document ends if it has any, and ``join``'s result."""
    sources = [[(str(source.path.absolute()), *source[1:]) for source in part] for part in parts.values()]
    path = cache_folder() / "corpora" / f"text-{json_digest([field, sources])[:16]}.txt"
    ends_path, record = path.with_suffix(".ends"), path.with_suffix(".json")
    with as_user_error(path.parent), FileLock(path.with_suffix(".lock")):
        # Written last: if it exists, so does the text; if the text is not the one it describes, it is made again.
        stored = read_record(record)
        there = path.is_file() and ends_path.is_file()
        if stored is None or not there or stored["digests"] != [file_digest(path), file_digest(ends_path)]:
            with atomic_write(path) as file, atomic_write(ends_path) as ends_file:
                joined = join_documents(parts, field, file, ends_file)
            digests = [file_digest(path), file_digest(ends_path)]
            stored = {**joined._asdict(), "digests": digests}
            write_record(record, stored)
        return path, ends_path if stored["documents"] > 1 else None, stored
