"""Texts as people have them: files, folders, globs, compressed or as rows of JSON; and how one file is made of them.

A document is a file, or a row of a ``.jsonl``; an empty one is none. Documents are joined by one byte 10, the document
end, and by nothing else: a document alone is its own bytes.
"""

import contextlib
import gzip
import io
import json
import os
import struct
import zlib
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import IO, NamedTuple, cast

from rwkv_pl.data.progress import make_bytes_progress
from rwkv_pl.errors import UserError

DOCUMENT_END = b"\n"

BLOCK = 1 << 20
MAX_ROW_BYTES = 1 << 28


class SourceFile(NamedTuple):
    """A file, and by what one sees that it has changed without reading it."""

    path: Path
    size: int
    modified_ns: int
    changed_ns: int


class JoinResult(NamedTuple):
    """What ``join_documents`` wrote: where each part ends, in bytes, and how many documents there are."""

    ends: list[int]
    documents: int


def exists(path: Path) -> bool:
    """Is ``path`` a file, a folder, a glob that something matches, or the prefix of a binidx corpus?"""
    return (
        path.exists() or Path(f"{path}.bin").exists() or next(_match_glob(*_split_at_wildcard(path)), None) is not None
    )


def is_plain_text(path: Path) -> bool:
    """Is ``path`` one file whose bytes are the text?"""
    return path.is_file() and not _is_gzip(path) and not _is_jsonl(path)


def find_files(path: Path, key: str) -> list[SourceFile]:
    """The file itself, all below a folder, or those that a glob matches (``**``: any folders), by their POSIX paths.

    Below the folder, or the part of a glob that has no wildcard, a name that begins with a dot is left out, and no link
    to a folder is followed but by a glob that names it (``*/*``).

    Raises UserError, naming the setting ``key``, where there are none or a folder cannot be read.
    """
    with _as_user_error(path):
        if path.is_file():
            return [_stat(path)]
        if path.is_dir():
            root, found = path, list(_walk(path))
            message = f"{key}={path} is a folder without files: name one with text in it"
        else:
            root, pattern = _split_at_wildcard(path)
            found = [match for match in _match_glob(root, pattern) if not match.is_dir()]
            if _has_wildcard(pattern):
                message = f"{key}={path}: no file matches in {root.absolute()}"
            else:
                where = "" if path.is_absolute() else f" (looked for {path.absolute()})"
                message = f"{key}={path}: no such file{where}; if it was moved, give {key}= where it is now"
        names = {file.relative_to(root): file for file in found}
        seen = [names[name] for name in sorted(names, key=Path.as_posix) if not any(p[0] == "." for p in name.parts)]
        # Pipes and sockets are no text; a link that leads nowhere was to be one, and is told.
        sources = [_stat(file) for file in seen if file.is_file() or not file.exists()]
    if not sources:
        raise UserError(message)
    return sources


def join_documents(
    parts: dict[str, list[SourceFile]], field: str, text: IO[bytes], document_ends: IO[bytes]
) -> JoinResult:
    """Writes the documents of all parts to ``text``, and to ``document_ends`` the offset of each document end.

    parts: the sources of each setting that names some. field: of a row of JSON, the one that holds the text.
    Offsets are int64, little endian. Memory is that of a block, or of a row. A progress line goes to a terminal.

    Raises UserError for a source that cannot be read, is damaged or changes meanwhile, and for a part without text.
    """
    sources = [source for part in parts.values() for source in part]
    size, documents, ends = 0, 0, []
    with make_bytes_progress() as progress:
        task = progress.add_task("reading the corpus", total=sum(source.size for source in sources))
        for key, part in parts.items():
            begin = size
            for source in part:
                with _as_user_error(source.path):
                    raw = source.path.open("rb", buffering=0)
                with raw:
                    counted = cast(io.RawIOBase, progress.wrap_file(raw, task_id=task))
                    for is_first, block in _read_blocks(source.path, io.BufferedReader(counted, BLOCK), field):
                        if is_first and documents:
                            document_ends.write(struct.pack("<q", size))
                            size += text.write(DOCUMENT_END)
                        documents += is_first
                        size += text.write(block)
            if size == begin:
                raise UserError(f"{key} names {len(part):,} file(s) without any text, the first is {part[0].path}")
            ends.append(size)
    for source in sources:
        if _stat(source.path) != source:
            raise UserError(f"{source.path} has changed while it was read: start again when it is at rest")
    return JoinResult(ends, documents)


def _read_blocks(path: Path, raw: IO[bytes], field: str) -> Iterator[tuple[bool, bytes]]:
    """The documents of a file in blocks, none of them empty, each with: is it the first of its document?"""
    with _as_user_error(path):
        file: IO[bytes] = gzip.GzipFile(fileobj=raw, mode="rb") if _is_gzip(path) else raw  # type: ignore[assignment]
        if _is_jsonl(path):
            yield from ((True, document) for document in _read_rows(path, file, field))
        else:
            is_first = True
            while block := file.read(BLOCK):
                yield is_first, block
                is_first = False


def _read_rows(path: Path, file: IO[bytes], field: str) -> Iterator[bytes]:
    for number in count(1):
        line = file.readline(MAX_ROW_BYTES + 1)
        if not line:
            return
        where = f"{path}, line {number:,}"
        if len(line) > MAX_ROW_BYTES:
            raise UserError(f"{where} is longer than {MAX_ROW_BYTES >> 20} MiB: .jsonl has one document a line")
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({error}): .jsonl has one object a line") from error
        if not isinstance(row, dict):
            raise UserError(f"{where} is no JSON object: .jsonl has one a line, with the text in a field")
        if field not in row:
            there = ", ".join(map(str, row)) or "none"
            raise UserError(f"{where} has no field {field}; there are: {there}: name the text's by data.field")
        if not isinstance(row[field], str):
            raise UserError(f"{where}: the field {field} holds no string: name the text's by data.field")
        # Half of a surrogate pair, which JSON can spell and UTF-8 cannot, is kept as the three bytes it would be.
        if document := row[field].encode("utf-8", "surrogatepass"):
            yield document


@contextlib.contextmanager
def _as_user_error(path: Path) -> Iterator[None]:
    """What reading ``path`` fails of, in one line."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}): fetch or make it anew") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _stat(path: Path) -> SourceFile:
    with _as_user_error(path):
        status = path.stat()
        return SourceFile(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error

    for place, names, files in os.walk(folder, onerror=refuse):
        # In place: os.walk then does not descend.
        names[:] = [name for name in names if not name.startswith(".")]
        yield from (Path(place, file) for file in files)


def _split_at_wildcard(path: Path) -> tuple[Path, str]:
    """The part of a path that is there as it is written, whatever characters it has; and the rest, a glob."""
    root = next((folder for folder in path.parents if folder.is_dir()), Path(path.anchor))
    return root, path.relative_to(root).as_posix()


def _match_glob(root: Path, pattern: str) -> Iterator[Path]:
    if not _has_wildcard(pattern):
        return
    try:
        # Whether ** at the end means files is a matter of Python's version.
        yield from root.glob(f"{pattern}/*" if pattern.endswith("**") else pattern)
    except ValueError as error:
        raise UserError(f"{root / pattern} is no glob: {error}") from error


def _has_wildcard(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")


def _is_gzip(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _is_jsonl(path: Path) -> bool:
    return (path.with_suffix("") if _is_gzip(path) else path).suffix.lower() == ".jsonl"
