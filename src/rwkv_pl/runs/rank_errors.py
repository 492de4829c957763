"""The error of a run with several processes: rank 0 prints the one that came first, wherever it came from.

If a process fails, the others only see that a connection was closed. So each rank above 0 writes its error to
error-rank-N.txt in the run folder before it exits. A rank that wrote nothing was killed, or does not answer.
"""

import re
import time
from contextlib import suppress
from pathlib import Path

import torch
from lightning.fabric.strategies.launchers import subprocess_script

from rwkv_pl.errors import one_line
from rwkv_pl.files import atomic_write

TIMED_OUT = re.compile(r"timed out|timeout", re.IGNORECASE)

# Seconds for the files of the others to appear.
PATIENCE = 3.0

NO_REASON = "lost the others"


class _Observer(subprocess_script._ChildProcessObserver):
    """Lightning's thread that kills rank 0 up to 5 seconds after a process that it started has failed: rank 0 may need
    longer to print the error."""

    def _terminate_all(self) -> None:
        time.sleep(2 * PATIENCE)
        super()._terminate_all()


def prepare(folder: Path) -> None:
    """Remove the files of an earlier start, and let rank 0 live until it has printed an error."""
    subprocess_script._ChildProcessObserver = _Observer  # type: ignore[misc]
    for path in folder.glob("error-rank-*.txt"):
        path.unlink(missing_ok=True)


def is_lost_connection(error: BaseException) -> bool:
    """Whether this process failed only because another one has failed or does not answer."""
    is_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)  # its messages start with a source file's path
    return is_gloo or isinstance(error, torch.distributed.DistError)


def write(folder: Path, rank: int, error: BaseException) -> None:
    """Write the error of this rank for rank 0 to find."""
    reason = NO_REASON if is_lost_connection(error) else f"{type(error).__name__}: {one_line(error)[:300]}"
    with suppress(OSError), atomic_write(folder / f"error-rank-{rank}.txt") as file:
        file.write(reason.encode())


def explain(folder: Path, world_size: int, error: BaseException, timeout: int) -> str | None:
    """Return the error of the rank that failed first, in one line; None if that was this one. For rank 0."""
    if not is_lost_connection(error):
        return None
    found: dict[int, str] = {}
    deadline = time.monotonic() + PATIENCE
    while len(found) < world_size - 1 and time.monotonic() < deadline:
        for rank in range(1, world_size):
            with suppress(OSError):
                found[rank] = (folder / f"error-rank-{rank}.txt").read_text(encoding="utf-8")
        if any(reason != NO_REASON for reason in found.values()):
            break
        time.sleep(0.05)
    for rank, reason in sorted(found.items()):
        if reason != NO_REASON:
            return f"process {rank}: {reason}"
    silent = [str(rank) for rank in range(1, world_size) if rank not in found]
    if not silent:
        return None
    who = f"process {silent[0]}" if len(silent) == 1 else f"processes {', '.join(silent)}"
    if TIMED_OUT.search(str(error)):
        return f"{who} did not answer within trainer.timeout={timeout} seconds"
    return f"{who} ended without an error (killed?)"
