"""Where bytes come from: enwik8, the Python standard library, any text. A corpus is one plain file, split in three."""

import contextlib
import hashlib
import http.client
import os
import platform
import sysconfig
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from rwkv_pl.data.sources import Source, bytes_progress, find, is_plain, join
from rwkv_pl.errors import UserError
from rwkv_pl.files import cache_folder, digest_of, made_for_success, publish, read_record, write_record, writing

ENWIK8_URL = "http://mattmahoney.net/dc/enwik8.zip"
ENWIK8_BYTES = 100_000_000
ENWIK8_SHA1 = "57b8363b814821dc9d47aa4d41f58733519076b2"

STDLIB_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
)

BLOCK = 1 << 20
WHOLE_DIGEST_BELOW = 64 << 20
TIMEOUT_SECONDS = 30


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
        return _offsets(self.ends_path)

    def __str__(self) -> str:
        """Which text this is, for people; figures on it mean nothing without that."""
        return f"{self.name} ({self.description}, digest {self.digest[:12]})"


def enwik8(
    folder: str | Path, *, url: str = ENWIK8_URL, n_bytes: int = ENWIK8_BYTES, sha1: str = ENWIK8_SHA1
) -> Corpus:
    """The first 10^8 bytes of an English Wikipedia dump, split 90/5/5 to the byte, as everybody reports it.

    ``folder/enwik8`` is used where it is there, else ``folder/enwik8.zip`` is unpacked, else that is downloaded from
    ``url``. Size and SHA-1 are checked every time. Nothing half written ever bears the final name, and of many
    processes at once one does the work.

    Raises UserError where it cannot be had or is not the file that it should be.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"data.path={folder} is a file: for a text of yours add data=text; data=enwik8 takes a folder")
    path = folder / "enwik8"
    if path.is_file():
        _check_enwik8(path, n_bytes, sha1)
    else:
        locks = cache_folder() / "locks"
        lock = locks / f"enwik8-{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16]}"
        with writing(locks), FileLock(lock):
            if not path.is_file():
                with made_for_success(folder), writing(folder):
                    _fetch_enwik8(path, url, n_bytes, sha1)
    train, val = n_bytes * 90 // 100, n_bytes * 95 // 100
    splits = Splits((0, train), (train, val), (val, n_bytes))
    return Corpus("enwik8", path.absolute(), splits, file_digest(path), "the first bytes of an English Wikipedia dump")


def stdlib() -> Corpus:
    """The source of the running Python's standard library, 10 to 11 MB, split 90/5/5: a corpus that needs no network.

    Every ``*.py`` under sysconfig's stdlib path but for what is installed beside it (site-packages, dist-packages), the
    tests and the applications (idlelib, lib2to3, turtledemo), one after the other in the order of their POSIX paths.
    It differs between versions of Python, so the description names the version. The text lies in the
    cache folder.

    Raises UserError where Python has no library source or the cache folder cannot be written.
    """
    root = Path(sysconfig.get_path("stdlib"))
    try:
        text = b"".join(path.read_bytes() for path in _stdlib_files(root))
    except OSError as error:
        raise UserError(f"cannot read the standard library: {error}; use data=text data.path=FILE") from error
    if not text:
        raise UserError(f"no *.py under {root}, this Python has no library source: use data=text data.path=FILE")
    digest = hashlib.sha256(text).hexdigest()
    path = cache_folder() / "corpora" / f"stdlib-{digest[:16]}.txt"
    if not path.is_file() or file_digest(path) != digest:
        with writing(path.parent), FileLock(path.with_suffix(".lock")), publish(path) as file:
            file.write(text)
    description = f"the standard library of Python {platform.python_version()}"
    return Corpus("stdlib", path, split_by_fractions(path, (0.9, 0.05, 0.05)), digest, description)


def text(
    path: str | Path,
    split: tuple[float, float, float] = (0.9, 0.05, 0.05),
    *,
    val_path: str | Path | None = None,
    field: str = "text",
) -> Corpus:
    """Texts of any kind, split by fractions of their bytes (train, val, test); see ``split_by_fractions``.

    ``path`` is a file, a folder or a glob: see ``sources.find``. A plain file is the corpus as it lies there. Of
    anything else (several files, ``.gz``, the ``field`` of the rows of a ``.jsonl``) one plain file is made in the
    cache folder, at the first use and again when a source has changed: see ``sources.join``. It takes the space of the
    whole text, and its bytes, document ends among them, are those that bits per byte counts.

    With ``val_path``, which takes the same, all of ``path`` is train, all of that val, and no test split is left. A
    file that both name is validation's alone.

    Raises UserError where there is no such text, it cannot be read or holds nothing, or the fractions are no split.
    """
    path = Path(path)
    parts = {"data.path": find(path, "data.path")}
    if val_path is None and is_plain(path):
        if path.stat().st_size == 0:
            raise UserError(f"data.path={path} is empty: name a file with text in it")
        try:
            splits, digest = split_by_fractions(path, split), file_digest(path)
        except OSError as error:
            raise UserError(f"cannot read data.path={path}: {error.strerror}") from error
        return Corpus(path.name, path.absolute(), splits, digest, str(path))
    described = str(path)
    if val_path is not None:
        parts["data.val_path"] = find(Path(val_path), "data.val_path")
        held_back = {source.path.resolve() for source in parts["data.val_path"]}
        parts["data.path"] = [source for source in parts["data.path"] if source.path.resolve() not in held_back]
        if not parts["data.path"]:
            raise UserError(f"data.val_path={val_path} has all files of data.path={path}: none is left to train on")
        described += f", validated on {val_path}"
    joined, ends_path, about = _joined(parts, field)
    if ends_path:
        described += f", {about['documents']:,} documents"
    if val_path is None:
        splits = split_by_fractions(joined, split, ends_path)
    else:
        # The document end between the two is train's, and validation's first context.
        train, end = about["ends"][0] + 1, about["ends"][1]
        splits = Splits((0, train), (train, end), (end, end))
    name = path.name if path.exists() else "text"  # a glob is no name for a file
    return Corpus(name, joined, splits, about["digests"][0], described, ends_path)


def _joined(parts: dict[str, list[Source]], field: str) -> tuple[Path, Path | None, dict[str, Any]]:
    """The parts as one file in the cache folder, that of its document ends if it has any, and what ``join`` told."""
    sources = [[(str(source.path.absolute()), *source[1:]) for source in part] for part in parts.values()]
    path = cache_folder() / "corpora" / f"text-{digest_of([field, sources])[:16]}.txt"
    ends_path, about = path.with_suffix(".ends"), path.with_suffix(".json")
    with writing(path.parent), FileLock(path.with_suffix(".lock")):
        # Published last: where it is, the text is; and where that is not what it says, it is made again.
        stored = read_record(about)
        there = path.is_file() and ends_path.is_file()
        if stored is None or not there or stored["digests"] != [file_digest(path), file_digest(ends_path)]:
            with publish(path) as file, publish(ends_path) as ends_file:
                joined = join(parts, field, file, ends_file)
            digests = [file_digest(path), file_digest(ends_path)]
            stored = {**joined._asdict(), "digests": digests}
            write_record(about, stored)
        return path, ends_path if stored["documents"] > 1 else None, stored


def _offsets(path: Path | None) -> npt.NDArray[np.int64]:
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
    document_ends, reach = _offsets(ends_path), min(fractions) * n / 10

    def edge(at: int) -> int:
        place = int(np.searchsorted(document_ends, at))
        starts = (document_ends[max(place - 1, 0) : place + 1] + 1).tolist()
        near = [start for start in starts if abs(start - at) <= reach]
        return min(near, key=lambda start: abs(start - at)) if near else character_start(data, at)

    train, val = edge(round(n * fractions[0])), edge(round(n * (fractions[0] + fractions[1])))
    return Splits((0, train), (train, val), (val, n))


def character_start(data: npt.NDArray[np.uint8], at: int) -> int:
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
        if size < WHOLE_DIGEST_BELOW:
            while block := file.read(BLOCK):
                digest.update(block)
        else:
            digest.update(size.to_bytes(8, "little"))
            length = 1 << 14
            for i in range(1024):
                file.seek((size - length) * i // 1023)
                digest.update(file.read(length))
    return digest.hexdigest()


def _stdlib_files(root: Path) -> list[Path]:
    found = []
    for folder, names, files in os.walk(root):
        # In place: os.walk then does not descend, and a large site-packages costs nothing.
        names[:] = [name for name in names if name not in STDLIB_LEFT_OUT]
        found += [Path(folder, file) for file in files if file.endswith(".py")]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(root).as_posix())


def _check_enwik8(path: Path, n_bytes: int, sha1: str) -> None:
    found = path.stat().st_size
    if found != n_bytes:
        raise UserError(
            f"{path} has {found:,} bytes, enwik8 has {n_bytes:,}: delete it, and it is fetched again at the next start"
        )
    digest = hashlib.sha1()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    if digest.hexdigest() != sha1:
        raise UserError(
            f"{path} has SHA-1 {digest.hexdigest()}, enwik8 has {sha1}: "
            "delete it, and it is fetched again at the next start"
        )


def _fetch_enwik8(path: Path, url: str, n_bytes: int, sha1: str) -> None:
    by_hand = path.with_name("enwik8.zip")
    if by_hand.is_file():
        _unpack(by_hand, path, n_bytes, sha1, f"{by_hand} is not the archive of enwik8", "delete or replace it")
        return
    # A download that broke off, or was killed, leaves it under this name and goes on from there at the next start.
    archive = path.with_name("enwik8.zip.partial")
    _download(url, archive)
    try:
        _unpack(archive, path, n_bytes, sha1, f"the download of {url} is not the archive of enwik8", "nothing was kept")
    finally:
        archive.unlink(missing_ok=True)


def _download(url: str, target: Path) -> None:
    instead = (
        f"place enwik8.zip from {ENWIK8_URL} in {target.parent.absolute()} by hand, "
        "or use data=stdlib, which needs no network"
    )
    there = target.stat().st_size if target.is_file() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={there}-"} if there else {})
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and there:
            return  # nothing is missing; whether it is right is seen when it is unpacked
        raise UserError(f"cannot download {url}: {_reason(error)}; {instead}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"cannot download {url}: {_reason(error)}; {instead}") from error
    if response.status != HTTPStatus.PARTIAL_CONTENT:
        there = 0  # a server that sends the whole again
    with (
        response,
        target.open("ab" if there else "wb") as file,
        bytes_progress() as progress,
    ):
        header = response.headers.get("Content-Length")
        expected = there + int(header) if header and header.isdigit() else None
        received = there
        task = progress.add_task(f"downloading {url}", total=expected, completed=received)
        while True:
            try:
                block = response.read(1 << 16)
            except (OSError, http.client.HTTPException) as error:
                raise UserError(
                    f"the download of {url} broke off: {_reason(error)}; start again, and it goes on; or {instead}"
                ) from error
            if not block:
                break
            file.write(block)
            received += len(block)
            progress.update(task, completed=received)
        if expected is not None and received != expected:
            raise UserError(
                f"the download of {url} broke off after {received:,} of {expected:,} bytes: "
                f"start again, and it goes on; or {instead}"
            )


def _unpack(archive: Path, path: Path, n_bytes: int, sha1: str, wrong: str, cure: str) -> None:
    """Writes the member ``enwik8`` of ``archive`` to ``path`` where it is what it should be; else one line."""
    digest, found = hashlib.sha1(), 0
    with publish(path) as target:
        try:
            with zipfile.ZipFile(archive) as opened, opened.open("enwik8") as source:
                # One byte more is enough to know that it is too long.
                while block := source.read(min(BLOCK, n_bytes + 1 - found)):
                    target.write(block)
                    digest.update(block)
                    found += len(block)
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
            raise UserError(f"{wrong} ({archive.stat().st_size:,} bytes): {_reason(error)}; {cure}") from error
        if found != n_bytes:
            size = f"more than {n_bytes:,}" if found > n_bytes else f"{found:,}"
            raise UserError(f"{wrong}: it holds {size} bytes, expected {n_bytes:,}; {cure}")
        if digest.hexdigest() != sha1:
            raise UserError(f"{wrong}: its content has SHA-1 {digest.hexdigest()}, expected {sha1}; {cure}")


def _reason(error: BaseException) -> str:
    """An exception in one line."""
    inner = getattr(error, "reason", None) if isinstance(error, urllib.error.URLError) else None
    words = error if isinstance(error, urllib.error.HTTPError) or inner is None else inner
    return " ".join(str(words).split()) or type(error).__name__
