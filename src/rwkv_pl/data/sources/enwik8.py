"""enwik8, the first 10^8 bytes of an English Wikipedia dump: downloaded once, checked at every start."""

import hashlib
import http.client
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from filelock import FileLock

from rwkv_pl.config import corpus_setting
from rwkv_pl.data.corpus import Corpus, Splits, file_digest
from rwkv_pl.data.progress import make_bytes_progress
from rwkv_pl.data.sources import Source
from rwkv_pl.errors import UserError
from rwkv_pl.files import as_user_error, atomic_write, cache_folder, remove_on_failure

ENWIK8_URL = "http://mattmahoney.net/dc/enwik8.zip"

ENWIK8_BYTES = 100_000_000

ENWIK8_SHA1 = "57b8363b814821dc9d47aa4d41f58733519076b2"


BLOCK = 1 << 20

TIMEOUT_SECONDS = 30


@dataclass(frozen=True)
class Enwik8(Source):
    """The first 10^8 bytes of an English Wikipedia dump, split 90/5/5 to the byte, the split of published results.

    Uses ``path/enwik8`` if it exists, else unpacks ``path/enwik8.zip``, else downloads that from ``url``. Size and
    SHA-1 are checked every time. The write is atomic, and a lock lets one of several processes do it.

    ``open`` raises UserError if the file is not available or is not enwik8.
    """

    path: str | Path = "data/enwik8"
    url: str = ENWIK8_URL
    n_bytes: int = ENWIK8_BYTES
    sha1: str = ENWIK8_SHA1

    def open(self) -> Corpus:
        folder = Path(self.path)
        if folder.is_file():
            raise UserError(
                f"{corpus_setting('path')}={folder} is a file, and {corpus_setting('name')}=enwik8 needs a folder: "
                f"for your own text, add {corpus_setting('name')}=text"
            )
        path = folder / "enwik8"
        if path.is_file():
            _check_enwik8(path, self.n_bytes, self.sha1)
        else:
            locks = cache_folder() / "locks"
            lock = locks / f"enwik8-{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16]}"
            with as_user_error(locks), FileLock(lock):
                if not path.is_file():
                    with remove_on_failure(folder), as_user_error(folder):
                        _fetch_enwik8(path, self.url, self.n_bytes, self.sha1)
        train, val = self.n_bytes * 90 // 100, self.n_bytes * 95 // 100
        splits = Splits((0, train), (train, val), (val, self.n_bytes))
        return Corpus(
            "enwik8", path.absolute(), splits, file_digest(path), "the first bytes of an English Wikipedia dump"
        )


def _check_enwik8(path: Path, n_bytes: int, sha1: str) -> None:
    found = path.stat().st_size
    if found != n_bytes:
        raise UserError(
            f"{path} has {found:,} bytes, enwik8 has {n_bytes:,}: delete it, and the next start downloads it again"
        )
    digest = hashlib.sha1()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    if digest.hexdigest() != sha1:
        raise UserError(
            f"{path} has SHA-1 {digest.hexdigest()}, enwik8 has {sha1}: "
            "delete it, and the next start downloads it again"
        )


def _fetch_enwik8(path: Path, url: str, n_bytes: int, sha1: str) -> None:
    by_hand = path.with_name("enwik8.zip")
    if by_hand.is_file():
        _unpack(by_hand, path, n_bytes, sha1, f"{by_hand} is not the archive of enwik8", "delete or replace it")
        return
    # An interrupted or killed download leaves this file, and the next start resumes it.
    archive = path.with_name("enwik8.zip.partial")
    _download(url, archive)
    try:
        _unpack(archive, path, n_bytes, sha1, f"the download of {url} is not the archive of enwik8", "nothing was kept")
    finally:
        archive.unlink(missing_ok=True)


def _download(url: str, target: Path) -> None:
    instead = (
        f"put enwik8.zip from {ENWIK8_URL} in {target.parent.absolute()} by hand, "
        f"or use {corpus_setting('name')}=stdlib, which needs no network"
    )
    there = target.stat().st_size if target.is_file() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={there}-"} if there else {})
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and there:
            return  # the download is complete; _unpack checks its content
        raise UserError(f"cannot download {url}: {_describe(error)}; {instead}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"cannot download {url}: {_describe(error)}; {instead}") from error
    if response.status != HTTPStatus.PARTIAL_CONTENT:
        there = 0  # the server ignores Range and sends the whole file
    with (
        response,
        target.open("ab" if there else "wb") as file,
        make_bytes_progress() as progress,
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
                    f"the download of {url} was interrupted: {_describe(error)}; start again to resume it, or {instead}"
                ) from error
            if not block:
                break
            file.write(block)
            received += len(block)
            progress.update(task, completed=received)
        if expected is not None and received != expected:
            raise UserError(
                f"the download of {url} was interrupted after {received:,} of {expected:,} bytes: "
                f"start again to resume it, or {instead}"
            )


def _unpack(archive: Path, path: Path, n_bytes: int, sha1: str, wrong: str, cure: str) -> None:
    """Extract the member ``enwik8`` of ``archive`` to ``path``.

    Raises UserError if its size or SHA-1 is wrong: ``wrong`` is the start of the message, ``cure`` its end.
    """
    digest, found = hashlib.sha1(), 0
    with atomic_write(path) as target:
        try:
            with zipfile.ZipFile(archive) as opened, opened.open("enwik8") as source:
                # One byte past n_bytes is enough to detect a file that is too long.
                while block := source.read(min(BLOCK, n_bytes + 1 - found)):
                    target.write(block)
                    digest.update(block)
                    found += len(block)
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
            raise UserError(f"{wrong} ({archive.stat().st_size:,} bytes): {_describe(error)}; {cure}") from error
        if found != n_bytes:
            size = f"more than {n_bytes:,}" if found > n_bytes else f"{found:,}"
            raise UserError(f"{wrong}: it has {size} bytes, expected {n_bytes:,}; {cure}")
        if digest.hexdigest() != sha1:
            raise UserError(f"{wrong}: its content has SHA-1 {digest.hexdigest()}, expected {sha1}; {cure}")


def _describe(error: BaseException) -> str:
    """An exception's message in one line; for a URLError, that of its cause."""
    inner = getattr(error, "reason", None) if isinstance(error, urllib.error.URLError) else None
    words = error if isinstance(error, urllib.error.HTTPError) or inner is None else inner
    return " ".join(str(words).split()) or type(error).__name__
