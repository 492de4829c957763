"""Atomic writes, the cache folder, and checks of a folder's files."""

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import platformdirs

from rwkv_pl.errors import UserError

PARTIAL_SUFFIX = ".partial"
"""Suffix of a file or folder that is being written or deleted. A killed process may leave one, which nobody reads."""

NEW_SUFFIX = ".new"
"""Suffix of a complete file or folder that waits for its name: another program has the earlier file open, or the
process was killed before it had moved an earlier folder away."""

log = logging.getLogger("rwkv_pl")

# On Windows, a file that another program has open cannot be replaced or deleted. Virus scanners and sync folders close
# it soon: the seconds between the attempts.
PAUSES = (0.05, 0.25, 0.7, 1.0, 1.0, 1.0)

# Files that stayed open during all attempts: the next save does not wait that long again.
_open_elsewhere: set[Path] = set()

DIRECTORY_NOT_EMPTY = 145
IN_USE = "another program has it open: close that program, then try again"

# What the system says in other words, or in the user's language.
WINDOWS_REASONS = {
    32: IN_USE,
    33: IN_USE,
    123: "Windows allows no such name",
    1224: IN_USE,
}


def cache_folder() -> Path:
    """Return the folder for derived files: $RWKV_PL_CACHE, else the user's cache folder."""
    return Path(os.environ.get("RWKV_PL_CACHE") or platformdirs.user_cache_path("rwkv_pl", appauthor=False)).absolute()


@contextlib.contextmanager
def atomic_write(path: Path, keep: bool = False) -> Iterator[IO[bytes]]:
    """Open a file that gets its name only when it is complete and on the disk. A failure leaves nothing behind.

    keep: if another program has the earlier file open, warn and keep the new one as `path`.new, where `newest` finds
    it. The next write or `settle` gives it its name.

    For one writer at a time: hold a lock on the name. Raises OSError with the path, even if the writer raised another
    error for it.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    raw = None
    try:
        partial.unlink(missing_ok=True)
        raw = _ErrorRecorder(partial, "xb")  # x: never writes through a link of this name
        with io.BufferedWriter(raw) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _give_name(partial, path, keep)
        fsync_folder(path.parent)
    except Exception as error:
        failure = raw.failure if raw else None
        if failure is None and isinstance(error, OSError):
            failure = error
        if failure is None:
            raise
        raise _with_filename(failure, path) from error
    finally:
        with contextlib.suppress(OSError):  # on a disk that can't be written, the file was not created either
            partial.unlink(missing_ok=True)


def json_digest(plain: Any) -> str:
    """Return the SHA-256 of JSON-serialisable content, as 64 hex digits; equal content has the same digest."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Write JSON-serialisable content with a checksum, which ``read_record`` verifies."""
    with atomic_write(path) as file:
        file.write(json.dumps({"content": content, "sum": json_digest(content)}).encode())


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the content that ``write_record`` wrote; None if the file is missing or its checksum is wrong."""
    try:
        stored = json.loads(path.read_bytes())
        return stored["content"] if stored["sum"] == json_digest(stored["content"]) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


@contextlib.contextmanager
def atomic_write_folder(folder: Path) -> Iterator[Path]:
    """Make a folder to fill, which gets its name only when the block has ended. A failure leaves nothing behind.

    `folder` must be absent or empty, and the block must write its files to the disk (fsync). For one writer at a time.
    Raises OSError with the path.
    """
    partial = folder.with_name(folder.name + PARTIAL_SUFFIX)
    partial.mkdir()
    try:
        yield partial
        fsync_folder(partial)
        if folder.exists():
            folder.rmdir()  # Windows can't rename onto a folder; rmdir fails if it is not empty
        _retry(lambda: partial.rename(folder), folder)
        fsync_folder(folder.parent)
    except OSError as error:
        raise _with_filename(error, folder) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _ErrorRecorder(io.FileIO):
    """Keeps the OSError of a failed write, because torch.save raises another error without the reason."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


def replace_with_retry(source: Path, target: Path) -> None:
    """os.replace with retries. Raises PermissionError if another program has one of the files open all the time."""
    _retry(lambda: source.replace(target), target)


def delete_with_retry(path: Path) -> None:
    """Delete a file or folder, if it exists. If another program has it open all the time, warn and leave it."""
    try:
        if is_folder(path):
            if path.suffix != PARTIAL_SUFFIX:  # a name refers to a complete folder
                partial = path.with_name(f"{path.name}.old{PARTIAL_SUFFIX}")
                delete_with_retry(partial)
                replace_with_retry(path, partial)
                path = partial
            _retry(lambda: shutil.rmtree(path), path)
        else:
            _retry(lambda: path.unlink(missing_ok=True), path)
    except PermissionError as error:
        log.warning(f"not deleted: {describe_os_error(_with_filename(error, path))}")


def _retry(change: Callable[[], Any], path: Path) -> None:
    pauses = PAUSES[:2] if path in _open_elsewhere else PAUSES
    for seconds in pauses:
        try:
            change()
            break
        except OSError as error:
            if not _is_in_use(error):
                raise
            time.sleep(seconds)
    else:
        _open_elsewhere.add(path)
        try:
            change()
        except OSError as error:  # Windows says that access is denied, as for a folder of somebody else
            if not _is_in_use(error):
                raise
            raise PermissionError(error.errno, IN_USE if os.name == "nt" else error.strerror, str(path)) from error
    _open_elsewhere.discard(path)


def _is_in_use(error: OSError) -> bool:
    # Windows deletes an open file when it is closed. Until then, its folder is not empty.
    return isinstance(error, PermissionError) or getattr(error, "winerror", None) == DIRECTORY_NOT_EMPTY


def _give_name(partial: Path, path: Path, keep: bool) -> None:
    new, is_reported = new_file(path), path in _open_elsewhere
    try:
        replace_with_retry(partial, path)
    except PermissionError:
        if not keep or not path.is_file():
            raise
        replace_with_retry(partial, new)
        if not is_reported:
            log.warning(f"{path} is open in another program: until the next save, the new file is {new.name}")
    else:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)


def newest(path: Path) -> Path:
    """Return the file or folder with the newest content of `path`: `path`, or the one that waits for its name."""
    new = new_file(path)
    if not new.exists() or (path.exists() and path.stat().st_mtime_ns > new.stat().st_mtime_ns):
        return path
    return new


def settle(path: Path, previous: Path | None = None) -> None:
    """Give the file or folder that waits for the name `path` this name, unless the earlier file is still open.

    previous: the name that an earlier folder gets, or an earlier file if the new one is a folder; it is deleted if
    None. An earlier file is replaced.
    """
    new = new_file(path)
    if os.path.lexists(new):
        with contextlib.suppress(PermissionError):
            if newest(path) != new:
                delete_with_retry(new)
                return
            if os.path.lexists(path) and (is_folder(path) or is_folder(new)):  # which can't be replaced
                if previous:
                    delete_with_retry(previous)
                    replace_with_retry(path, previous)
                else:
                    delete_with_retry(path)
            replace_with_retry(new, path)
            fsync_folder(path.parent)


def publish_folder(partial: Path, path: Path, previous: Path | None = None) -> None:
    """Give a complete folder its final name. previous: see `settle`.

    The earlier folder has to be moved away first. The new one has the name `path`.new meanwhile, where `newest` finds
    it, so that a killed process loses nothing.
    """
    fsync_folder(partial)
    new = new_file(path)
    delete_with_retry(new)  # if it could not be settled
    replace_with_retry(partial, new)
    settle(path, previous)


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder, and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def new_file(path: Path) -> Path:
    """Return the name of the complete file or folder that waits for the name `path`."""
    return path.with_name(path.name + NEW_SUFFIX)


def describe_os_error(error: OSError) -> str:
    """Describe an error of the system, with its path."""
    where = f": {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return f"disk full{where} was not written" if where else "disk full"
    reason = WINDOWS_REASONS.get(getattr(error, "winerror", None) or 0)
    return f"{reason or error.strerror or error}{where}"


def _with_filename(error: OSError, path: str | Path) -> OSError:
    """The same error with a path."""
    number = getattr(error, "winerror", None)
    return OSError(error.errno, error.strerror, str(path), *([number] if number else []))


@contextlib.contextmanager
def with_path(where: str | Path) -> Iterator[None]:
    """Add the path `where` to an OSError that has none."""
    try:
        yield
    except OSError as error:
        raise _with_filename(error, error.filename or where) from error


def fsync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk, as after a rename."""
    with contextlib.suppress(OSError):  # some file systems can't sync a folder; the rename is atomic anyway
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def make_folder(folder: Path) -> None:
    """Make the folder and its parents. Raises NotADirectoryError if one of them is a file, on every system."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from error


@contextlib.contextmanager
def remove_on_failure(folder: Path) -> Iterator[None]:
    """If the block fails, removes the folder and its parents, as far as the block created them and they are empty."""
    missing = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    try:
        yield
    except BaseException:
        for place in missing:
            with contextlib.suppress(OSError):
                place.rmdir()
        raise


def is_outside(text: str, folder: Path, key: str = "") -> bool:
    """Whether a setting, as a URI or a path relative to the folder, is a place on this machine outside of the folder.

    key: dotted name of the setting. MLflow's paths (keys that end with _uri or _location) count from the current
    folder, so they are always outside.
    """
    if "://" in text or text.startswith("file:") or key.endswith(("_uri", "_location")):
        return not text.startswith(("http://", "https://"))
    try:
        return not (folder / text).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):  # a loop of links, a null byte
        return True


def require_own_files(folder: Path) -> None:
    """Raise UserError if the folder holds a pipe, a device, or a link to a place outside of it.

    Through a link in an untrusted run, its log or checkpoints could overwrite any of the user's files.
    """
    root = folder.resolve()
    for place, folders, names in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *names)):
            # wandb links to its log in the user's cache, and never writes through the link.
            own_log = "wandb" in path.relative_to(folder).parts[:-1] and path.suffix == ".log"
            if path.is_symlink() and not own_log and not path.resolve().is_relative_to(root):
                raise UserError(f"{path} is a link out of {folder}: replace it with a copy of its target")
            if path.exists() and not path.is_file() and not path.is_dir():
                raise UserError(f"{path} is neither a file nor a folder: remove it")


@contextlib.contextmanager
def as_user_error(folder: Path, fix: str = "") -> Iterator[None]:
    """Make the folder, and turn an OSError inside the block into a UserError, with the fix."""
    try:
        make_folder(folder)
        yield
    except OSError as error:
        if folder.is_relative_to(cache_folder()):
            fix = ": set RWKV_PL_CACHE to another folder"
        raise UserError(f"cannot write in {folder}: {describe_os_error(error)}{fix}") from error
