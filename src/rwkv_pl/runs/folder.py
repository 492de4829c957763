"""The run folder: taken by one process at a time, described, and found again."""

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
from rwkv_pl.files import PARTIAL_SUFFIX, atomic_write, describe_os_error, remove_on_failure, require_own_files
from rwkv_pl.runs.outcome import RESULT_FILE
from rwkv_pl.runs.ranks import decide_on_first_rank, is_first_process

LOCK = ".lock"

# Written when the training starts, so that its presence tells a run that has started.
OVERRIDES = Path(".hydra", "overrides.yaml")

# What a sweep leaves in the folder of a job, before it and after it has failed.
JOB_FILES = ("trial.json", "error.txt", RESULT_FILE)

# In the environment of a sweep's job: the text that it would show is left to its folder.
SWEEP_JOB_ENV = "RWKV_PL_OF_A_SWEEP"

# TensorBoard's files.
EVENT_FILES = "events.out.tfevents.*"

# What a start that was killed before its training can leave.
START_FILES = {
    LOCK,
    ".hydra",
    "train.log",
    "vocab.json",
    *JOB_FILES,
    "hparams.yaml",
    "wandb",
    "mlflow.db",
    "mlflow.db-journal",
    "mlflow_run",
}


@contextmanager
def run_folder(wanted: Path, typed: bool) -> Iterator[Path]:
    """The locked folder of a new run; all processes of the run get the one that the first of them has taken.

    If the start fails before its training, what it has put there is removed. typed: see `create_run_dir`.
    """
    before: set[str] | None = None  # the names in a folder that was there already
    with remove_on_failure(wanted.parent), ExitStack() as locks:

        def take() -> str:
            nonlocal before
            if attempt := int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
                raise UserError(f"torchrun's restart {attempt} would start at step 0 again: go on with resume=RUN")
            there = wanted.exists()
            folder = create_run_dir(wanted, typed)
            if there and folder == wanted:
                before = {path.name for path in folder.iterdir()}
            locks.enter_context(locked(folder))
            for events in folder.glob(EVENT_FILES):  # of a killed start: its settings would stand there twice
                events.unlink()
            return str(folder)

        folder = Path(decide_on_first_rank("folder", take))
        try:
            yield folder
        except BaseException:
            if is_first_process() and not has_started(folder):
                _remove_new_files(folder, before)
            raise


def _remove_new_files(folder: Path, before: set[str] | None) -> None:
    """Removes what is new in the folder, which is locked, so that nothing in it is another process's; and the folder
    itself if before is None."""
    for path in folder.iterdir():
        if path.name not in (before or ()):
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if before is None:
        with suppress(OSError):
            folder.rmdir()


def create_run_dir(folder: Path, typed: bool) -> Path:
    """Makes the run folder; returns its path.

    A dated name that exists gets -2, -3. One that the user typed is used if it is absent, or empty but for what a start
    leaves that was killed before its training. Raises UserError if it holds something else, or cannot be made.
    """
    try:
        with remove_on_failure(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            if typed:
                folder.mkdir(exist_ok=True)
                require_own_files(folder)
                if not _is_unused(folder):
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


def _is_unused(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    left = {name for name in names - START_FILES if not name.endswith(PARTIAL_SUFFIX)}
    if ".hydra" in names:  # else they are the user's
        left = {name for name in left if not fnmatch(name, EVENT_FILES)}
    return not left and not has_started(folder)


def write_config(folder: Path, composed: DictConfig) -> None:
    """Writes config.yaml and hydra.yaml into .hydra/, as Hydra does. The overrides come when the training starts."""
    place = folder / OVERRIDES.parent
    place.mkdir(exist_ok=True)
    keys = [str(key) for key in composed]
    for name, of in (("config.yaml", [key for key in keys if key != "hydra"]), ("hydra.yaml", ["hydra"])):
        with atomic_write(place / name) as file:
            file.write(OmegaConf.to_yaml(OmegaConf.masked_copy(composed, of)).encode())


def write_overrides(folder: Path, composed: DictConfig) -> None:
    """Marks the run as started."""
    with atomic_write(folder / OVERRIDES) as file:
        file.write(OmegaConf.to_yaml(composed.hydra.overrides.task).encode())


def has_started(folder: Path) -> bool:
    """Has the training of a run started there?"""
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
        raise UserError(f"{folder} can't be locked: {describe_os_error(error)}") from error
    try:
        with suppress(OSError):  # who it is, is a courtesy; Windows lets nobody write in a locked file
            path.write_text(f"process {os.getpid()} on {platform.node()}")
        for place in (folder, folder / ".hydra", folder / "checkpoints"):
            for left in place.glob("*" + PARTIAL_SUFFIX) if place == folder or not place.is_symlink() else ():
                left.unlink()
        yield
    finally:
        with suppress(OSError):
            os.truncate(path, 0)  # not there if the start has failed
        lock.release()


@contextmanager
def lock_for_all_ranks(folder: Path) -> Iterator[None]:
    """`locked` by the run's first process; if that is refused, all its processes end."""
    with ExitStack() as lock:

        def take() -> str:
            lock.enter_context(locked(folder))
            return str(folder)

        decide_on_first_rank("resume", take)
        yield


def is_in_use(folder: Path) -> bool:
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


def find_latest_run(outputs: Path) -> Path:
    """Of the runs below `outputs` that are neither finished nor in use, the one started last. Raises UserError."""
    from rwkv_pl.weights.checkpoint import read_checkpoint
    from rwkv_pl.weights.metadata import KEY

    found = [path.parent.parent for path in outputs.glob("**/" + OVERRIDES.as_posix())]
    started = [folder for folder in found if has_started(folder)]
    for folder in sorted(started, key=lambda folder: (folder / OVERRIDES).stat().st_mtime_ns, reverse=True):
        with suppress(UserError):
            metadata = read_checkpoint(folder / "checkpoints" / "last.ckpt", checked=False).get(KEY)
            if isinstance(metadata, dict) and metadata.get("finished"):
                continue
        with suppress(UserError), locked(folder):
            return folder
    raise UserError(
        f"resume=latest: of {len(started)} runs in {outputs} none is both unfinished and not in use; one that lies "
        "elsewhere is named by resume=FOLDER"
    )
