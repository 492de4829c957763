"""JSON results cached on disk."""

from collections.abc import Callable
from typing import Any

from filelock import FileLock

from rwkv_pl.files import as_user_error, cache_folder, read_record, write_record


def cached_json(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the cached result ``name``; on a cache miss, call ``make`` and store its result as JSON."""
    path = cache_folder() / "tokens" / name
    with as_user_error(path.parent), FileLock(path.with_suffix(".lock")):
        stored = read_record(path)
        if stored is None:
            stored = make()
            write_record(path, stored)
        return stored
