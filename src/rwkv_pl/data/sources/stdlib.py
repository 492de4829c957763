"""The source code of Python's standard library: a corpus that every machine has."""

import hashlib
import os
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from rwkv_pl.config import corpus_setting
from rwkv_pl.data.corpus import Corpus, file_digest, split_by_fractions
from rwkv_pl.data.sources import Source
from rwkv_pl.errors import UserError
from rwkv_pl.files import as_user_error, atomic_write, cache_folder

STDLIB_EXCLUDED = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
)


@dataclass(frozen=True)
class Stdlib(Source):
    """The source code of the running Python's standard library, 10 to 11 MB, split 90/5/5; it needs no download.

    It is every ``*.py`` under sysconfig's stdlib path except installed packages (site-packages, dist-packages), tests
    and applications (idlelib, lib2to3, turtledemo), concatenated in the order of their POSIX paths. It differs between
    versions of Python, so the description names the version. The text is stored in the cache folder.

    ``open`` raises UserError if this Python has no library source or the cache folder cannot be written.
    """

    def open(self) -> Corpus:
        root = Path(sysconfig.get_path("stdlib"))
        own_text = f"use {corpus_setting('name')}=text {corpus_setting('path')}=FILE"
        try:
            text = b"".join(path.read_bytes() for path in _stdlib_files(root))
        except OSError as error:
            raise UserError(f"cannot read the standard library: {error}; {own_text}") from error
        if not text:
            raise UserError(f"no *.py under {root}, this Python has no library source: {own_text}")
        digest = hashlib.sha256(text).hexdigest()
        path = cache_folder() / "corpora" / f"stdlib-{digest[:16]}.txt"
        if not path.is_file() or file_digest(path) != digest:
            with as_user_error(path.parent), FileLock(path.with_suffix(".lock")), atomic_write(path) as file:
                file.write(text)
        description = f"the standard library of Python {platform.python_version()}"
        return Corpus("stdlib", path, split_by_fractions(path, (0.9, 0.05, 0.05)), digest, description)


def _stdlib_files(root: Path) -> list[Path]:
    found = []
    for folder, names, files in os.walk(root):
        # Edited in place, so that os.walk does not enter these folders: a large site-packages costs nothing.
        names[:] = [name for name in names if name not in STDLIB_EXCLUDED]
        found += [Path(folder, file) for file in files if file.endswith(".py")]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(root).as_posix())
