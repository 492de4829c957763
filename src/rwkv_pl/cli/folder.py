"""The run folder: one process's at a time, found again, and what became of the run."""

import json
import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rwkv_pl.cli.ranks import is_first_process
from rwkv_pl.config import UserError
from rwkv_pl.files import PARTIAL, in_words, made_for_success, publish, require_own_files

LOCK = ".lock"

# Hydra writes this last of what a run starts from.
OVERRIDES = Path(".hydra", "overrides.yaml")

RESULT = "result.json"

# The statuses of runs with nothing left to do.
DONE = ("finished", "pruned")

# What a sweep leaves in the folder of a job, before it and after it has failed.
OF_SWEEP = ("trial.json", "error.txt", RESULT)


def take_folder(folder: Path, typed: bool) -> Path:
    """Makes the run folder; returns its path.

    A dated name that exists gets -2, -3. One that the user typed is used where absent, or empty but for what a start
    leaves that was killed before it began. Raises UserError where it holds something, or cannot be made.
    """
    try:
        with made_for_success(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            if typed:
                folder.mkdir(exist_ok=True)
                require_own_files(folder)
                if not _unused(folder):
                    raise UserError(
                        f"the folder {folder} holds something already: go on with a run by resume={folder}, "
                        "or give another hydra.run.dir"
                    )
                return folder
            taken, number = folder, 1
            while True:
                try:
                    taken.mkdir()
                    return taken
                except FileExistsError:
                    number += 1
                    taken = folder.with_name(f"{folder.name}-{number}")
    except OSError as error:
        raise UserError(
            f"the output folder {folder} can't be made ({error.strerror}): give another by hydra.run.dir=FOLDER"
        ) from error


def _unused(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    return names <= {LOCK, ".hydra", "train.log", *OF_SWEEP} and not begun(folder)


def begun(folder: Path) -> bool:
    """Has a run begun there: is all of what it starts from written?"""
    try:
        return (folder / OVERRIDES).read_bytes().endswith(b"\n")
    except OSError:
        return False


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the run folder for this process; the lock dies with it, and its forked children do not keep it.

    What a killed process was writing there is removed. Raises UserError where another process is at work in it. The
    other processes of the same run do not ask.
    """
    if not is_first_process():
        yield
        return
    path = folder / LOCK
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = ""
        with suppress(OSError):
            holder = path.read_text()
        raise UserError(f"{folder} is in use by {holder or 'another process'}: one run at a time") from None
    except OSError as error:
        raise UserError(f"{folder} can't be locked: {in_words(error)}") from error
    try:
        with suppress(OSError):  # who it is, is a courtesy; Windows lets nobody write in a locked file
            path.write_text(f"process {os.getpid()} on {platform.node()}")
        for place in (folder, folder / ".hydra", folder / "checkpoints"):
            for left in place.glob("*" + PARTIAL) if place == folder or not place.is_symlink() else ():
                left.unlink()
        yield
    finally:
        with suppress(OSError):
            path.write_text("")
        lock.release()


def in_use(folder: Path) -> bool:
    """Is a process at work there?"""
    if not (folder / LOCK).exists():
        return False
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:
        return False
    lock.release()
    return False


def latest_run(outputs: Path) -> Path:
    """Of the runs below `outputs` that are neither finished nor in use, the one started last. Raises UserError."""
    from rwkv_pl.weights.checkpoint import read_checkpoint

    found = [path.parent.parent for path in outputs.glob("**/" + OVERRIDES.as_posix())]
    started = [folder for folder in found if begun(folder)]
    for folder in sorted(started, key=lambda folder: (folder / OVERRIDES).stat().st_mtime_ns, reverse=True):
        with suppress(UserError):
            about = read_checkpoint(folder / "checkpoints" / "last.ckpt", checked=False).get("rwkv_pl")
            if isinstance(about, dict) and about.get("finished"):
                continue
        with suppress(UserError), locked(folder):
            return folder
    raise UserError(
        f"resume=latest: of {len(started)} runs in {outputs} none is both unfinished and not in use; one that lies "
        "elsewhere is named by resume=FOLDER"
    )


def write_result(folder: Path, **figures: Any) -> None:
    """result.json: the run's status (waiting, finished, pruned, stopped, failed), and its figures or its error."""
    plain = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in figures.items()}
    with publish(folder / RESULT) as file:
        file.write(json.dumps(plain, indent=1).encode())


def read_result(folder: Path) -> dict[str, Any]:
    """What result.json says; {} where there is none, as of a run that goes on or was killed."""
    if not (folder / RESULT).is_file():
        return {}
    try:
        content = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Of a run under way there is no result.json; of one that was stopped or has failed, one that says so."""
    if not is_first_process():
        yield
        return
    for name in (RESULT, "error.txt"):
        (folder / name).unlink(missing_ok=True)
    try:
        yield
    except SystemExit:
        write_result(folder, status="stopped")
        raise
    except Exception as error:
        with suppress(OSError):  # the disk is full
            write_result(folder, status="failed", error=" ".join(str(error).split()))
        raise
