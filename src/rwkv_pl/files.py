"""Files that are whole or not there, and the folder for what is derived."""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import platformdirs

from rwkv_pl.errors import UserError

PARTIAL_SUFFIX = ".partial"
"""How the name ends of a file that is being written; one that a killed process has left is nothing."""


def cache_folder() -> Path:
    """Where derived files lie: $RWKV_PL_CACHE, else the user's cache folder."""
    return Path(os.environ.get("RWKV_PL_CACHE") or platformdirs.user_cache_path("rwkv_pl", appauthor=False)).absolute()


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that bears its name only when it is complete and on the disk; nothing is left of a failure.

    For one writer at a time: hold a lock on the name. Raises OSError with the name, whatever the writer made of it.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    raw = None
    try:
        partial.unlink(missing_ok=True)
        raw = _ErrorRecorder(partial, "xb")  # never through a link of this name
        with io.BufferedWriter(raw) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace_with_retry(partial, path)
        _fsync_folder(path.parent)
    except Exception as error:
        failure = raw.failure if raw else None
        if failure is None and isinstance(error, OSError):
            failure = error
        if failure is None:
            raise
        raise OSError(failure.errno, failure.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # a disk that cannot be written holds nothing of ours
            partial.unlink(missing_ok=True)


def json_digest(plain: Any) -> str:
    """64 hex digits, the same for equal content of what JSON can hold."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Publishes what JSON can hold, with a sum by which ``read_record`` knows it again."""
    with atomic_write(path) as file:
        file.write(json.dumps({"content": content, "sum": json_digest(content)}).encode())


def read_record(path: Path) -> dict[str, Any] | None:
    """What ``write_record`` wrote there; None where that is not what the file holds."""
    try:
        stored = json.loads(path.read_bytes())
        return stored["content"] if stored["sum"] == json_digest(stored["content"]) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


@contextlib.contextmanager
def atomic_write_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill with files that are on the disk; it bears its name only then, and nothing is left of a failure.

    `folder` is not there, or empty. For one writer at a time. Raises OSError.
    """
    partial = folder.with_name(folder.name + PARTIAL_SUFFIX)
    partial.mkdir()
    try:
        yield partial
        _fsync_folder(partial)
        if folder.exists():
            folder.rmdir()  # Windows renames onto no folder, and no system removes one that holds something
        partial.rename(folder)
        _fsync_folder(folder.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _ErrorRecorder(io.FileIO):
    """Keeps what a write failed of: torch.save says no more than that it did."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


def replace_with_retry(source: Path, target: Path) -> None:
    """os.replace, tried again for two seconds while another process has `target` open, which Windows refuses."""
    for seconds in (0.05, 0.25, 0.7, 1.0):
        try:
            source.replace(target)
            return
        except PermissionError:
            time.sleep(seconds)
    source.replace(target)


def describe_os_error(error: OSError) -> str:
    """What the system refused, and where."""
    where = f": {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return f"disk full{where} was not written" if where else "disk full"
    return f"{error.strerror or error}{where}"


@contextlib.contextmanager
def with_path(where: str | Path) -> Iterator[None]:
    """Says where, when the disk refuses a write and the writer does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(where)) from error


def _fsync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system has this; the rename is atomic without it
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def remove_on_failure(folder: Path) -> Iterator[None]:
    """Takes away what the block has made of the folder and its parents, where it fails and leaves them empty."""
    missing = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    try:
        yield
    except BaseException:
        for place in missing:
            with contextlib.suppress(OSError):
                place.rmdir()
        raise


def is_outside(text: str, folder: Path, key: str = "") -> bool:
    """Whether a setting, read as a path below the folder or as a URI, names a place on this machine outside of it.

    key: its dotted name. MLflow's places count from the current folder, not from the run's.
    """
    if "://" in text or text.startswith("file:") or key.endswith(("_uri", "_location")):
        return not text.startswith(("http://", "https://"))
    try:
        return not (folder / text).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):  # a loop of links, a null byte
        return True


def require_own_files(folder: Path) -> None:
    """Raises UserError for a link that leads out of the folder, and for pipes and devices.

    Through a link in a stranger's run, its log or its checkpoints would overwrite any file of the user's.
    """
    root = folder.resolve()
    for place, folders, names in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *names)):
            # wandb links to its log in the user's cache, and never writes through the link.
            own_log = "wandb" in path.relative_to(folder).parts[:-1] and path.suffix == ".log"
            if path.is_symlink() and not own_log and not path.resolve().is_relative_to(root):
                raise UserError(f"{path} leads out of {folder}: replace the link by what it leads to")
            if path.exists() and not path.is_file() and not path.is_dir():
                raise UserError(f"{path} is neither a file nor a folder: remove it")


@contextlib.contextmanager
def as_user_error(folder: Path) -> Iterator[None]:
    """Makes the folder; what the disk refuses inside the block becomes one line."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {describe_os_error(error)}") from error
