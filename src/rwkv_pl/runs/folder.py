"""The run folder: created, locked for one process at a time, marked as started, and found again."""

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from rwkv_pl.errors import UserError
from rwkv_pl.files import (
    NEW_SUFFIX,
    PARTIAL_SUFFIX,
    atomic_write,
    delete_with_retry,
    describe_os_error,
    is_folder,
    make_folder,
    remove_on_failure,
    require_own_files,
    settle,
)
from rwkv_pl.runs.agreement import decide_on_first_rank
from rwkv_pl.runs.outcome import BASELINES_FILE, DONE_STATUSES, RESULT_FILE, read_result
from rwkv_pl.runs.ranks import is_first_process

LOCK = ".lock"

# Written when the training starts: a folder with this file is a run that has started.
OVERRIDES = Path(".hydra", "overrides.yaml")

# Hydra's settings of a sweep, in its folder.
MULTIRUN = "multirun.yaml"

# Files that a sweep writes into the folder of a job before it starts and after it has failed.
JOB_FILES = ("trial.json", "error.txt", RESULT_FILE)

EVENT_FILES = "events.out.tfevents.*"

# Files that a start can leave if it is killed before its training.
START_FILES = {
    LOCK,
    ".hydra",
    "train.log",
    "vocab.json",
    BASELINES_FILE,
    *JOB_FILES,
    "hparams.yaml",
    "wandb",
    "mlflow.db",
    "mlflow.db-journal",
    "mlflow_run",
}


@contextmanager
def run_folder(wanted: Path, typed: bool) -> Iterator[Path]:
    """Create and lock the folder of a new run. All processes of the run get the folder that rank 0 created.

    If the start fails before its training, its files are removed. typed: see `create_run_dir`.
    """
    before: set[str] | None = None  # the names in a folder that existed before
    # On Windows, the folder can be removed only when its lock is released.
    with remove_on_failure(wanted), ExitStack() as locks:

        def take() -> str:
            nonlocal before
            if attempt := int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
                raise UserError(f"torchrun's restart {attempt} would start again at step 0: use resume=RUN")
            there = wanted.exists()
            folder = create_run_dir(wanted, typed)
            if there and folder == wanted:
                before = {path.name for path in folder.iterdir()}
            locks.enter_context(locked(folder))
            for events in folder.glob(EVENT_FILES):  # from a killed start: TensorBoard would show its settings twice
                delete_with_retry(events)
            return str(folder)

        folder = Path(decide_on_first_rank("folder", take))
        try:
            yield folder
        except BaseException:
            if is_first_process() and not has_started(folder):
                _remove_new_files(folder, before)
            raise


def _remove_new_files(folder: Path, before: set[str] | None) -> None:
    """Remove the files that are not in `before`, and the folder itself if `before` is None.

    The folder is locked, so no other process has written into it.
    """
    for path in folder.iterdir():
        if path.name not in (before or ()):
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if before is None:
        with suppress(OSError):
            folder.rmdir()


def create_run_dir(folder: Path, typed: bool) -> Path:
    """Create the run folder and return its path.

    If a dated name exists, it gets the suffix -2, -3. A name that the user typed is used if the folder is absent or
    empty, or if it has only the files of a start that was killed before its training. Raises UserError if it has other
    files, or can't be created.
    """
    try:
        with remove_on_failure(folder):
            make_folder(folder.parent)
            if typed:
                folder.mkdir(exist_ok=True)
                require_own_files(folder)
                if not _is_unused(folder):
                    raise UserError(
                        f"the folder {folder} is not empty: to resume its run, or with -m its sweep, use "
                        f"resume={folder}; else give another folder"
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
            f"the output folder {folder} can't be created ({error.strerror}): give another with hydra.run.dir=FOLDER"
        ) from error


def _is_unused(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    left = {name for name in names - START_FILES if not name.endswith((PARTIAL_SUFFIX, NEW_SUFFIX))}
    if ".hydra" in names:  # without it, event files are the user's
        left = {name for name in left if not fnmatch(name, EVENT_FILES)}
    return not left and not has_started(folder)


def write_config(folder: Path, composed: DictConfig) -> None:
    """Write config.yaml and hydra.yaml into .hydra/, as Hydra does. overrides.yaml follows when training starts."""
    place = folder / OVERRIDES.parent
    place.mkdir(exist_ok=True)
    keys = [str(key) for key in composed]
    for name, of in (("config.yaml", [key for key in keys if key != "hydra"]), ("hydra.yaml", ["hydra"])):
        with atomic_write(place / name) as file:
            file.write(OmegaConf.to_yaml(OmegaConf.masked_copy(composed, of)).encode())


def write_overrides(folder: Path, composed: DictConfig) -> None:
    """Write .hydra/overrides.yaml, which marks the run as started."""
    with atomic_write(folder / OVERRIDES) as file:
        file.write(OmegaConf.to_yaml(composed.hydra.overrides.task).encode())


def has_started(folder: Path) -> bool:
    """Whether the training of the run in this folder has started."""
    try:
        return bool((folder / OVERRIDES).read_bytes().strip())
    except OSError:
        return False


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the run folder for this process. The lock ends with the process, and its forked children do not hold it.

    Removes what a killed process left half written, and settles the files that wait for their names. Raises UserError
    if another process uses the folder. Ranks other than 0 do not lock.
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
        raise UserError(f"{folder} is in use by {holder or 'another process'}: wait until it ends") from None
    except OSError as error:
        raise UserError(f"{folder} can't be locked: {describe_os_error(error)}") from error
    try:
        with suppress(OSError):  # only for the message above; Windows can't write to a locked file
            path.write_text(f"process {os.getpid()} on {platform.node()}")
        for left in _glob_own(folder, PARTIAL_SUFFIX):
            delete_with_retry(left)
        _settle_all(folder)
        yield
        _settle_all(folder)
    finally:
        with suppress(OSError):
            os.truncate(path, 0)  # the file is gone if the start failed
        lock.release()


def is_released(folder: Path) -> bool:
    """Whether rank 0 of the run in this folder has ended in order, or removed the folder of a failed start.

    Its lock then has no text: even on a full disk, a file can be truncated.
    """
    path = folder / LOCK
    return not path.exists() or not path.stat().st_size


def _glob_own(folder: Path, suffix: str) -> Iterator[Path]:
    for place in (folder, folder / ".hydra", folder / "checkpoints"):
        if place == folder or not place.is_symlink():
            yield from place.glob("*" + suffix)


def _settle_all(folder: Path) -> None:
    for new in _glob_own(folder, NEW_SUFFIX):
        path = new.with_suffix("")
        if path.suffix == ".ckpt" or not (is_folder(new) or is_folder(path)):  # other folders are the user's
            settle(path)


@contextmanager
def lock_for_all_ranks(folder: Path) -> Iterator[None]:
    """Lock the folder in the run's first process. If that is refused, all processes of the run exit."""
    with ExitStack() as lock:

        def take() -> str:
            lock.enter_context(locked(folder))
            return str(folder)

        decide_on_first_rank("resume", take)
        yield


def is_in_use(folder: Path) -> bool:
    """Whether a process holds the lock of the folder."""
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


def started_runs(outputs: Path) -> list[Path]:
    """Return the folders of the started runs below `outputs`, the latest first."""
    found = [path.parent.parent for path in outputs.glob("**/" + OVERRIDES.as_posix())]
    started = [folder for folder in found if has_started(folder)]
    return sorted(started, key=lambda folder: (folder / OVERRIDES).stat().st_mtime_ns, reverse=True)


def find_latest_run(outputs: Path) -> Path:
    """Return the latest run below `outputs` that is neither finished nor in use. Raises UserError if there is none."""
    from rwkv_pl.weights.checkpoint import read_checkpoint
    from rwkv_pl.weights.metadata import KEY

    started = started_runs(outputs)
    for folder in started:
        if read_result(folder).get("status") in DONE_STATUSES:
            continue
        with suppress(UserError):
            metadata = read_checkpoint(folder / "checkpoints" / "last.ckpt", checked=False).get(KEY)
            if isinstance(metadata, dict) and metadata.get("finished"):
                continue
        with suppress(UserError), locked(folder):
            return folder
    if not started:
        raise UserError(f"resume=latest: no runs in {outputs}; name one elsewhere with resume=FOLDER")
    count = f"all {len(started)} runs" if len(started) > 1 else "the only run"
    be = "are" if len(started) > 1 else "is"
    raise UserError(f"resume=latest: {count} in {outputs} {be} finished or in use; name one with resume=FOLDER")
