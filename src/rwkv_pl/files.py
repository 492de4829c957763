"""Files that are whole or not there, and the folder for what is derived."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import platformdirs

from rwkv_pl.config import UserError


def cache_folder() -> Path:
    """Where derived files lie: $RWKV_PL_CACHE, else the user's cache folder."""
    return Path(os.environ.get("RWKV_PL_CACHE") or platformdirs.user_cache_path("rwkv_pl", appauthor=False)).absolute()


@contextlib.contextmanager
def publish(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that bears its name only when it is complete and on the disk; nothing is left of a failure.

    For one writer at a time: hold a lock on the name.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _fsync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _fsync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system has this; the rename is atomic without it
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def made_for_success(folder: Path) -> Iterator[None]:
    """Takes away what the block has made of the folder and its parents, where it fails and leaves them empty."""
    missing = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    try:
        yield
    except BaseException:
        for place in missing:
            with contextlib.suppress(OSError):
                place.rmdir()
        raise


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes the folder; what the disk refuses inside the block becomes one line."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror or error}") from error
