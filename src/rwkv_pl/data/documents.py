"""Finds text files (a file, a folder, a glob; plain, compressed or JSON lines) and joins them into one plain file.

A document is a file, or a row of a ``.jsonl`` or ``.ndjson``; empty ones are skipped. One byte 10, the document end,
separates two documents. Nothing else is added, so a single document keeps exactly its bytes.
"""

import bz2
import contextlib
import functools
import gzip
import io
import json
import lzma
import os
import re
import struct
import sys
import zlib
from collections.abc import Collection, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from rwkv_pl import windows
from rwkv_pl.config import corpus_setting
from rwkv_pl.data.progress import make_bytes_progress
from rwkv_pl.errors import UserError
from rwkv_pl.files import cache_folder

DOCUMENT_END = b"\n"

BLOCK = 1 << 20
MAX_ROW_BYTES = 1 << 28

COMPRESSIONS = {
    ".gz": rb"\x1f\x8b\x08",
    ".bz2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
    ".xz": rb"\xfd7zXZ\0",
    ".zst": rb"\x28\xb5\x2f\xfd",
}
"""Patterns of the first bytes of the compressed files that are unpacked, by suffix."""

CONTAINERS = {
    "zip": rb"PK\x03\x04|PK\x05\x06",
    "parquet": rb"PAR1",
    "arrow": rb"ARROW1\0",
    "avro": rb"Obj\x01",
    "hdf5": rb"\x89HDF\r\n",
    "sqlite": rb"SQLite format 3\0",
    "tar": rb"(?s:.{257})ustar",
    "pdf": rb"%PDF-",
    "old Office": rb"\xd0\xcf\x11\xe0\xa1\xb1",
    "7z": rb"7z\xbc\xaf\x27\x1c",
    "rar": rb"Rar!\x1a\x07",
    "lz4": rb"\x04\x22\x4d\x18",
    "lzma": rb"\]\0\0",  # the old format
    "lzip": rb"LZIP\x01",
    "lzop": rb"\x89LZO\0",
    "snappy": rb"\xff\x06\0\0sNaPpY",
    "z": rb"\x1f[\x9d\xa0]",
    "br": rb"(?!)",  # brotli files have no common first bytes
}
"""Patterns of the first bytes of binary files that contain text but are not read, by suffix."""


OUTPUT_FILES = re.compile(
    r"(sweep\.(csv|png)|eval-.*\b(train|val|test)\.(json|png)|.*\.(ckpt|pth|safetensors|state))(\.new)?|.*\.partial"
    r"|events\.out\.tfevents\..*"
)
"""Names of the files that the commands, or Lightning, write outside of run folders."""


class SourceFile(NamedTuple):
    """A file, and the metadata that reveals a change without reading it: size in bytes, mtime and ctime in ns."""

    path: Path
    size: int
    modified_ns: int
    changed_ns: int


class JoinResult(NamedTuple):
    """The result of ``join_documents``: the byte offset at which each part ends, and the number of documents."""

    ends: list[int]
    documents: int


def exists(path: Path) -> bool:
    """Is ``path`` a file, a folder, a glob with a match, or the prefix of a binidx corpus?"""
    return (
        path.exists() or Path(f"{path}.bin").exists() or next(_match_glob(*_split_at_wildcard(path)), None) is not None
    )


def is_plain_text(path: Path, old_rule: bool = False) -> bool:
    """Is ``path`` a single file whose bytes are the text: not compressed, not JSON lines?

    Raises UserError if it is another container. old_rule: see ``join_documents``.
    """
    if not path.is_file():
        return False
    with _as_user_error(path), path.open("rb") as file:
        compression = _find_compression(path, file.peek(), old_rule)
        if compression or _is_jsonl(path, old_rule):
            return False
        if not old_rule:
            _refuse_container(path, file.peek())
    return True


def find_files(path: Path, key: str, old_rule: bool = False) -> list[SourceFile]:
    """List the files of ``path``, sorted by POSIX path: one file, all files below a folder, or all matches of a glob.

    In a glob, ``**`` matches any folders. Names that start with a dot and the files of runs, sweeps and other commands
    are skipped below the folder, or below the part of the glob before its first wildcard. A link to a folder is
    followed only if a glob names it (``*/*``). old_rule: finds files of runs too, as the first versions did.

    Raises UserError, which names the setting ``key``, if there is no file or a folder cannot be read.
    """
    with _as_user_error(path):
        if path.is_file():
            return [_stat(path)]
        if path.is_dir():
            root, found = path, list(_walk(path, old_rule))
            message = (
                f"{key}={path} is a folder without files: give a folder that contains text; files of runs are left out"
            )
        else:
            root, pattern = _split_at_wildcard(path)
            found = [match for match in _match_glob(root, pattern) if not match.is_dir()]
            if not old_rule:
                found = list(_leave_out_outputs(root, found))
            if _has_wildcard(pattern):
                message = f"{key}={path}: no file matches in {root.absolute()}, except those of runs"
            else:
                where = "" if path.is_absolute() else f" (looked for {path.absolute()})"
                message = f"{key}={path}: no such file{where}; if it was moved, set {key}= to its new path"
        names = {file.relative_to(root): file for file in found}
        seen = [names[name] for name in sorted(names, key=Path.as_posix) if not any(p[0] == "." for p in name.parts)]
        # Pipes and sockets are skipped. A broken link was probably meant to be a text, so _stat reports it as an error.
        sources = [_stat(file) for file in seen if file.is_file() or not file.exists()]
    if not sources:
        raise UserError(message)
    return sources


def join_documents(
    parts: dict[str, list[SourceFile]], field: str, text: IO[bytes], document_ends: IO[bytes], old_rule: bool = False
) -> JoinResult:
    """Write the documents of all parts to ``text``, and the offset of each document end to ``document_ends``.

    parts: the source files by the setting that names them. field: the field of a JSON row that contains the text.
    old_rule: read as the first versions did, which unpacked only ``.gz`` and took any other file for text.
    Offsets are int64, little endian. Memory use is one block, or one row. In a terminal, a bar shows the progress.

    Raises UserError if a source cannot be read, is corrupt, is a binary container or changes during the reading, or if
    a part has no text.
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
                    for is_first, block in _read_blocks(
                        source.path, io.BufferedReader(counted, BLOCK), field, old_rule
                    ):
                        if is_first and documents:
                            document_ends.write(struct.pack("<q", size))
                            size += text.write(DOCUMENT_END)
                        documents += is_first
                        size += text.write(block)
            if size == begin:
                raise UserError(f"{key} names {len(part):,} file(s) without any text; the first is {part[0].path}")
            ends.append(size)
    for source in sources:
        if _stat(source.path) != source:
            raise UserError(f"{source.path} changed while it was read: start again when nothing writes to it")
    return JoinResult(ends, documents)


def _read_blocks(path: Path, raw: io.BufferedReader, field: str, old_rule: bool) -> Iterator[tuple[bool, bytes]]:
    """Yield the documents of a file in non-empty blocks: (is it the first block of its document?, block)."""
    with _as_user_error(path):
        file = _unpack(path, raw, _find_compression(path, raw.peek(), old_rule))
        if not old_rule:
            _refuse_container(path, file.peek(BLOCK))  # type: ignore[attr-defined]
        if _is_jsonl(path, old_rule):
            yield from ((True, document) for document in _read_rows(path, file, field))
        else:
            is_first = True
            while block := file.read(BLOCK):
                yield is_first, block
                is_first = False


def _find_compression(path: Path, head: bytes, old_rule: bool) -> str:
    """Find the compression by the first bytes, else by the name: a suffix in COMPRESSIONS, or "" for none."""
    suffix = path.suffix.lower()
    if old_rule:
        return suffix if suffix == ".gz" else ""
    found = (name for name, pattern in COMPRESSIONS.items() if re.match(pattern, head))
    return next(found, suffix if suffix in COMPRESSIONS else "")


def _unpack(path: Path, raw: io.BufferedReader, compression: str) -> IO[bytes]:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=raw, mode="rb")  # type: ignore[return-value]
    if compression == ".bz2":
        return bz2.BZ2File(raw)
    if compression == ".xz":
        return lzma.LZMAFile(raw)
    return io.BufferedReader(_ZstdFile(path, raw), BLOCK) if compression == ".zst" else raw


class _ZstdFile(io.RawIOBase):
    """The unpacked bytes of a zstd file. The package's own reader takes a truncated file for a complete one."""

    def __init__(self, path: Path, raw: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise UserError(
                f"{path} needs a package that is not installed: pip install 'rwkv_pl[zstd]', or unpack it"
            ) from error
        # The largest window that `zstd --long=31` makes; by default, the package refuses more than 128 MiB.
        self._make = lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        self._error = zstandard.ZstdError
        self._raw, self._frame, self._packed, self._unpacked = raw, self._make(), b"", b""
        self._has_started = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            # A small block, since all that it unpacks to is in memory.
            self._packed = self._packed or self._raw.read(1 << 12)
            if not self._packed:
                if self._has_started:
                    raise EOFError("its last frame is incomplete")
                return 0
            try:
                self._unpacked = self._frame.decompress(self._packed)
            except self._error as error:
                raise EOFError(str(error)) from error
            self._has_started, self._packed = not self._frame.eof, self._frame.unused_data
            if self._frame.eof:
                self._frame = self._make()
        count = min(len(buffer), len(self._unpacked))
        buffer[:count], self._unpacked = self._unpacked[:count], self._unpacked[count:]
        return count


def _refuse_container(path: Path, head: bytes) -> None:
    """Raise UserError if the unpacked file is not text, by its first bytes or its name."""
    suffix = _inner_suffix(path)
    kinds = (name for name, pattern in (CONTAINERS | COMPRESSIONS).items() if re.match(pattern, head))
    if kind := next(kinds, suffix[1:] if suffix[1:] in CONTAINERS else ""):
        raise UserError(
            f"{path} is not text but a container ({kind.lstrip('.')}): extract plain text or .jsonl from it"
        )
    if suffix == ".json":
        raise UserError(f"{path} is not read: write its documents as one object a line, into a .jsonl")


def _read_rows(path: Path, file: IO[bytes], field: str) -> Iterator[bytes]:
    for number in count(1):
        line = file.readline(MAX_ROW_BYTES + 1)
        if not line:
            return
        where = f"{path}, line {number:,}"
        if len(line) > MAX_ROW_BYTES:
            raise UserError(f"{where} is longer than {MAX_ROW_BYTES >> 20} MiB: a .jsonl needs one document per line")
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({error}): a .jsonl needs one object per line") from error
        if not isinstance(row, dict):
            raise UserError(f"{where} is not a JSON object: a .jsonl needs one per line, with the text in a field")
        fix = f"set {corpus_setting('field')} to the text's field"
        if field not in row:
            there = ", ".join(map(str, row)) or "none"
            raise UserError(f"{where} has no field {field} (its fields: {there}): {fix}")
        if not isinstance(row[field], str):
            raise UserError(f"{where}: the field {field} is not a string: {fix}")
        # JSON can contain half of a surrogate pair, UTF-8 cannot. It is encoded as the three bytes of its code point.
        if document := row[field].encode("utf-8", "surrogatepass"):
            yield document


@contextlib.contextmanager
def _as_user_error(path: Path) -> Iterator[None]:
    """Turn an error from reading ``path`` into a one-line UserError."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise UserError(f"{path} is corrupt or truncated ({error}): copy or create it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _stat(path: Path) -> SourceFile:
    with _as_user_error(path):
        status = path.stat()
        changed_ns = status.st_ctime_ns
        if sys.platform == "win32":  # where st_ctime is the time of creation
            changed_ns = windows.changed_ns(path)
        return SourceFile(path, status.st_size, status.st_mtime_ns, changed_ns)


def _walk(folder: Path, old_rule: bool) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error

    for place, names, files in os.walk(folder, onerror=refuse):
        # Edited in place, so that os.walk does not enter the other folders.
        names[:] = [n for n in names if not n.startswith(".") and (old_rule or not _is_output_folder(Path(place, n)))]
        yield from (Path(place, file) for file in files if old_rule or not OUTPUT_FILES.fullmatch(file))


def _leave_out_outputs(root: Path, found: Iterable[Path]) -> Iterator[Path]:
    is_output_folder = functools.cache(_is_output_folder)
    for path in found:
        folders = (folder for folder in path.parents if folder != root and folder.is_relative_to(root))
        if not OUTPUT_FILES.fullmatch(path.name) and not any(map(is_output_folder, folders)):
            yield path


def _is_output_folder(path: Path) -> bool:
    """Is the folder a run, a sweep, converted weights, the cache, or Lightning's logs?"""
    marks = (path / ".hydra", path / "multirun.yaml", path / "model.safetensors")
    return path.name == "lightning_logs" or any(map(os.path.exists, marks)) or path.absolute() == cache_folder()


def _split_at_wildcard(path: Path) -> tuple[Path, str]:
    """Split a path into its longest existing folder, even if that has wildcard characters, and the rest, a glob."""
    root = next((folder for folder in path.parents if folder.is_dir()), Path(path.anchor))
    return root, path.relative_to(root).as_posix()


def _match_glob(root: Path, pattern: str) -> Iterator[Path]:
    if not _has_wildcard(pattern):
        return
    try:
        # Whether a trailing ** matches files depends on the version of Python.
        yield from root.glob(f"{pattern}/*" if pattern.endswith("**") else pattern)
    except ValueError as error:
        raise UserError(f"{root / pattern} is not a valid glob: {error}") from error


def _has_wildcard(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")


def _inner_suffix(path: Path, compressions: Collection[str] = COMPRESSIONS) -> str:
    """Return the suffix of the name without that of a compression."""
    return (path.with_suffix("") if path.suffix.lower() in compressions else path).suffix.lower()


def _is_jsonl(path: Path, old_rule: bool) -> bool:
    return _inner_suffix(path, [".gz"]) == ".jsonl" if old_rule else _inner_suffix(path) in (".jsonl", ".ndjson")
