"""The outcome of a run: result.json, and the one-line message of an error that ended it."""

import json
import logging
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rwkv_pl.errors import RunError, UserError, one_line
from rwkv_pl.files import atomic_write, delete_with_retry, describe_os_error, newest
from rwkv_pl.runs.ranks import is_first_process
from rwkv_pl.terminal import resume_command

log = logging.getLogger("rwkv_pl")

RESULT_FILE = "result.json"
BASELINES_FILE = "baselines.json"

# The statuses of runs with nothing left to do.
DONE_STATUSES = ("finished", "pruned")


def write_result(folder: Path, **figures: Any) -> None:
    """Write result.json: the status (not started, finished, pruned, stopped, failed), and the figures or the error."""
    plain = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in figures.items()}
    with atomic_write(folder / RESULT_FILE, keep=True) as file:
        file.write(json.dumps(plain, indent=1).encode())


def read_result(folder: Path) -> dict[str, Any]:
    """Read result.json; {} if there is none, as during a run or after it was killed."""
    return _read_mapping(folder / RESULT_FILE)


def write_baselines(folder: Path, baselines: dict[str, float]) -> None:
    """Write baselines.json, the bits per byte of other compressors, which a curve shows as lines."""
    with atomic_write(folder / BASELINES_FILE) as file:
        file.write(json.dumps(baselines).encode())


def read_baselines(folder: Path) -> dict[str, float]:
    """Read baselines.json; {} if there is none, as in a run of an earlier version."""
    content = _read_mapping(folder / BASELINES_FILE)
    return {name: float(value) for name, value in content.items() if isinstance(value, int | float)}


def _read_mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(newest(path).read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


class Record:
    """Keeps result.json up to date: removes it when the training starts, writes one when the run is stopped or fails.

    on_start: marks the folder as that of a started run. Until `start` is called, the outcome of an earlier process
    stays.
    """

    def __init__(self, folder: Path, on_start: Callable[[], None]) -> None:
        self.folder, self.has_started = folder, False
        self._on_start = on_start

    def start(self) -> None:
        """Mark the run as started. Call it when the training starts."""
        self.has_started = True
        if is_first_process():
            self._on_start()
            for name in (RESULT_FILE, "error.txt"):
                delete_with_retry(self.folder / name)

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not self.has_started or not is_first_process():
            return
        if isinstance(error, SystemExit):
            write_result(self.folder, status="stopped")
        elif isinstance(error, Exception):
            with suppress(OSError):  # the disk is full
                write_result(self.folder, status="failed", error=one_line(error))


def to_run_error(error: Exception, folder: Path, has_started: bool) -> RunError:
    """Describe an error that ended a run in one line, with the command that resumes it. Logs unexpected tracebacks."""
    import torch

    if isinstance(error, OSError):
        # If closing a logger raises the same error again, only the earlier one names the path.
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
            chain.append(cause)
        named = (e for e in reversed(chain) if isinstance(e, OSError) and e.filename)
        message = describe_os_error(next(named, OSError(error.errno, error.strerror, str(folder))))
    elif isinstance(error, UserError):
        # An error of a worker process contains the worker's traceback.
        message = str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")
    elif isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        reason = str(error).partition(". ")[0] or "the system refused an allocation"
        message = f"out of memory ({reason}): raise trainer.accumulate_grad_batches"
    else:
        log.error("the error that ended the run:", exc_info=error)
        more = " (more in train.log)" if has_started else ""
        message = f"{type(error).__name__}: {one_line(error)[:300]}{more}"
    return RunError(f"{message}; {resume_hint(folder)}" if has_started else message)


def resume_hint(folder: Path) -> str:
    """Name the last checkpoint of a run, and the command that resumes it."""
    from rwkv_pl.weights.checkpoint import read_checkpoint

    for name in ("last.ckpt", "last.prev.ckpt"):
        path = folder / "checkpoints" / name
        try:
            step = read_checkpoint(path, checked=False)["global_step"]
        except (UserError, KeyError):
            continue
        return f"the last checkpoint is {path} at step {step:,}; to resume: {resume_command(folder)}"
    return f"there is no checkpoint yet; to start again: {resume_command(folder)}"
