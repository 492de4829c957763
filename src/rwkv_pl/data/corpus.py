"""Where bytes come from: enwik8, the Python standard library, any file. A corpus is one plain file, split in three."""

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
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from rwkv_pl.config import UserError
from rwkv_pl.files import cache_folder, made_for_success, publish, writing

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

    ``digest`` (64 hex) says which text this is, wherever it lies: see ``file_digest``. ``document_ends``, where the
    documents are known that it was made of: a file of their ends, byte offsets, ascending, (n,) little-endian int64.
    """

    name: str
    path: Path
    splits: Splits
    digest: str
    description: str
    document_ends: Path | None = None

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


def text(path: str | Path, split: tuple[float, float, float] = (0.9, 0.05, 0.05)) -> Corpus:
    """Any file, split by fractions of its bytes (train, val, test) that move back to the start of a character they cut.

    Raises UserError where the file is missing, a folder or empty, or the fractions are no split.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"data.path={path} is a folder: name one file")
    if not path.is_file():
        where = "" if path.is_absolute() else f" (looked for {path.absolute()})"
        raise UserError(f"data.path={path}: no such file{where}; if it was moved, give data.path= where it is now")
    if path.stat().st_size == 0:
        raise UserError(f"data.path={path} is empty: name a file with text in it")
    try:
        splits, digest = split_by_fractions(path, split), file_digest(path)
    except OSError as error:
        raise UserError(f"cannot read data.path={path}: {error.strerror}") from error
    return Corpus(path.name, path.absolute(), splits, digest, str(path))


def split_by_fractions(path: Path, fractions: tuple[float, float, float]) -> Splits:
    """Byte ranges for the fractions (train, val, test), each edge moved back to the start of the character it cuts.

    Raises UserError where the fractions are not three numbers >= 0 with the sum 1.
    """
    # Asked this way round, a NaN is refused as well.
    if not (len(fractions) == 3 and min(fractions) >= 0 and abs(sum(fractions) - 1) < 1e-6):
        raise UserError(f"data.split={list(fractions)} is not three fractions >= 0 (train, val, test) with the sum 1")
    data = np.memmap(path, np.uint8, mode="r")
    n = len(data)
    train = character_start(data, round(n * fractions[0]))
    val = character_start(data, round(n * (fractions[0] + fractions[1])))
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
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

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
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with (
        response,
        target.open("ab" if there else "wb") as file,
        Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress,
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
