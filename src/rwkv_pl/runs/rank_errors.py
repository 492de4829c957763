"""The error of a training with several processes: it is printed once, in the words of the process that failed first.

If a process fails, the others only see that a connection was closed. So each writes error-rank-N.txt to the run folder
before it exits. A process that wrote nothing was killed, or does not answer. The first of the others prints that.
"""

import re
import time
import traceback
from contextlib import suppress
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from rwkv_pl.errors import UserError, one_line
from rwkv_pl.files import atomic_write
from rwkv_pl.runs.folder import is_released
from rwkv_pl.runs.ranks import name_processes
from rwkv_pl.terminal import is_called_from_python, skip_cleanup

TIMED_OUT = re.compile(r"timed out|timeout", re.IGNORECASE)

# Seconds for the files of the others to appear.
PATIENCE = 3.0

LOST = "lost the others"


def remove_old(folder: Path) -> None:
    """Remove the files of an earlier start."""
    for path in folder.glob("error-rank-*.txt"):
        path.unlink(missing_ok=True)


def is_lost_connection(error: BaseException) -> bool:
    """Whether this process failed only because another one has failed or does not answer."""
    is_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)  # its messages start with a source file's path
    return is_gloo or isinstance(error, torch.distributed.DistError)


def explain(trainer: Trainer, folder: Path, error: Exception, timeout: int) -> str | None:
    """Write this process's error, and return the line to print about other processes: None if it is not for this one.

    timeout: trainer.timeout.
    """
    if not is_called_from_python():
        skip_cleanup()
    rank, size = trainer.global_rank, trainer.world_size
    is_lost = is_lost_connection(error)
    reason = LOST if is_lost else f"{type(error).__name__}: {one_line(error)[:300]}"
    details = "" if is_lost or isinstance(error, UserError) else "".join(traceback.format_exception(error))
    with suppress(OSError), atomic_write(folder / f"error-rank-{rank}.txt") as file:
        file.write(f"{reason}\n{details}".encode())
    if not is_lost:
        return None
    found: dict[int, str] = {}
    deadline = time.monotonic() + PATIENCE
    while len(found) < size - 1 and time.monotonic() < deadline:
        for other in (other for other in range(size) if other != rank):
            with suppress(OSError, IndexError):
                found[other] = (folder / f"error-rank-{other}.txt").read_text(encoding="utf-8").splitlines()[0]
        if rank > 0 and (is_released(folder) or min(found, default=rank) < rank):
            return None  # that process prints the error
        if any(reason != LOST for reason in found.values()):
            break
        time.sleep(0.05)
    for other, reason in sorted(found.items()):
        if reason != LOST:
            return f"process {other}: {reason}"
    silent = [other for other in range(size) if other != rank and other not in found]
    if not silent:
        return f"the other processes have ended: process {rank} did not answer within trainer.timeout={timeout} seconds"
    if TIMED_OUT.search(str(error)):
        return f"{name_processes(silent)} did not answer within trainer.timeout={timeout} seconds"
    return f"{name_processes(silent)} ended without a word (killed?)"
