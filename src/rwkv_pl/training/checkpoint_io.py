"""Writes checkpoints to disk, atomically."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, distributed

from rwkv_pl.files import (
    PARTIAL_SUFFIX,
    atomic_write,
    delete_with_retry,
    is_folder,
    make_folder,
    new_file,
    newest,
    publish_folder,
    replace_with_retry,
    settle,
)
from rwkv_pl.weights.checkpoint import is_checkpoint, read_checkpoint
from rwkv_pl.weights.parts import load_whole, write_part, write_rest


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically: a checkpoint's name always refers to a complete file.

    Lightning's own class writes to the temporary folder and moves the file, without fsync; across file systems that is
    not atomic. The previous last.ckpt is kept as last.prev.ckpt. If best.ckpt and last.ckpt are of the same step, they
    are hard links to one file. A checkpoint is a file, or a folder to which each process of a sharded run adds a part.

    If the model is on a GPU, a background thread writes a CPU copy while training continues. `poll` raises an error of
    that write, as does the next `wait`. On a CPU, the thread would slow the training by as much as it saves.
    """

    def __init__(self) -> None:
        self._saved: tuple[Any, Path] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        self.wait()  # one write at a time, so that there is at most one copy in memory
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = _describe(checkpoint)
        same = self._find_same(content, path)
        self._saved = None
        if same is None and writes_in_background(checkpoint):
            checkpoint = apply_to_collection(checkpoint, Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))
            self._writing = self._thread.submit(_write, checkpoint, path, None)
        else:
            _write(checkpoint, path, same)
        self._saved = content, path

    def save_parts(self, checkpoint: dict[str, Any], rows: dict[str, tuple[int, Tensor]], path: str | Path) -> None:
        """Write a folder of parts; all processes must call it.

        If the write fails in one, all raise its OSError, and nothing is left of the new checkpoint.

        checkpoint: with its sharded tensors on the meta device; only that of rank 0 is written. rows: see `write_part`.
        """
        self.wait()
        path = Path(path)
        partial = path.with_name(path.name + PARTIAL_SUFFIX)
        rank, count = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
        content = _describe(checkpoint)

        def prepare() -> bool:
            make_folder(path.parent)
            settle(path, _previous(path))
            delete_with_retry(partial)
            partial.mkdir()
            same = self._find_same(content, path)
            for file in same.iterdir() if same else ():
                _link(file, partial / file.name)
            return same is not None

        def publish(checksums: dict[str, int]) -> None:
            for number, name in enumerate(checksums):
                if not (partial / name).is_file():
                    raise OSError(errno.ENOENT, f"process 0 does not see {name}, which process {number} has written")
            if checksums:
                write_rest(partial, checkpoint, checksums)
            publish_folder(partial, path, _previous(path))

        try:
            is_linked = _run_in_all(lambda: prepare() if rank == 0 else False, path)[0]
            written = [] if is_linked else _run_in_all(lambda: write_part(partial, rank, count, rows), path)
            _run_in_all(lambda: publish(dict(written)) if rank == 0 else None, path)
            self._saved = content, path
        except BaseException:
            self._saved = None
            raise
        finally:
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)

    def _find_same(self, content: Any, path: Path) -> Path | None:
        """Return the checkpoint next to `path` that was just written with the same content, None if there is none."""
        saved, beside = self._saved or (None, path)
        return newest(beside) if saved == content and beside != path and beside.exists() else None

    def load_checkpoint(self, path: str | Path, *arguments: Any, whole: bool = True, **options: Any) -> dict[str, Any]:
        """Load as Lightning does, but remove paths in other folders: ModelCheckpoint would delete these files.

        whole: load all values now, else map a file, and return the divided tensors of a folder as StoredTensor.
        """
        found = newest(Path(path))
        if found.is_dir() or not whole:
            checkpoint = read_checkpoint(found, checked=False)
            checkpoint = load_whole(checkpoint) if whole else checkpoint
        else:
            checkpoint = super().load_checkpoint(found, *arguments, **options)
        for state in checkpoint.get("callbacks", {}).values():
            if isinstance(state, dict) and "best_k_models" in state:
                folder = Path(str(state.get("dirpath"))).resolve()
                models = state["best_k_models"].items()
                state["best_k_models"] = {name: x for name, x in models if Path(name).resolve().parent == folder}
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        if is_checkpoint(Path(path)):  # never another folder
            delete_with_retry(Path(path))

    def poll(self) -> None:
        """Raise the error of the background write, if it has failed."""
        if self._writing and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint is on disk; raise the error of the write."""
        writing, self._writing = self._writing, None
        if writing:
            try:
                writing.result()
            except BaseException:
                self._saved = None
                raise

    def teardown(self) -> None:
        self.wait()


def writes_in_background(checkpoint: dict[str, Any]) -> bool:
    """Are the weights on a GPU, so that training can continue while the CPU writes?"""
    return any(isinstance(value, Tensor) and value.is_cuda for value in checkpoint.get("state_dict", {}).values())


def _describe(checkpoint: dict[str, Any]) -> Any:
    """The step and what else may differ between two checkpoints of it: save_weights_only leaves entries out."""
    return checkpoint["global_step"], checkpoint.get("rwkv_pl", {}).get("finished"), sorted(checkpoint)


def _run_in_all(act: Callable[[], Any], path: Path) -> list[Any]:
    """Call `act` in all processes, and return the results of all. If one raises an OSError, all raise it for `path`."""
    failure, result = None, None
    try:
        result = act()
    except OSError as error:
        failure = error.errno, error.strerror or str(error)
    found = [(result, failure)]
    if distributed.is_initialized():
        found = [(None, None)] * distributed.get_world_size()
        distributed.all_gather_object(found, (result, failure))
    for _, failure in found:
        if failure:
            raise OSError(*failure, str(path))
    return [result for result, _ in found]


def copy_checkpoint(source: Path, path: Path) -> None:
    """Write a copy of a checkpoint, a file or a folder of parts, atomically. Hard links take no space."""
    if not source.is_dir():
        _write({}, path, source)
        return
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    delete_with_retry(partial)
    partial.mkdir()
    for file in source.iterdir():
        _link(file, partial / file.name)
    publish_folder(partial, path, _previous(path))


def _write(checkpoint: dict[str, Any], path: Path, same: Path | None) -> None:
    settle(path, _previous(path))  # so that it becomes last.prev.ckpt
    target = new_file(path) if is_folder(path) else path  # a file can't replace a folder
    if same:
        _keep_previous(target)
        _link(same, target)
    else:
        with atomic_write(target, keep=True) as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
            _keep_previous(target)  # only after the new file is complete
    if target != path:
        settle(path, _previous(path))


def _previous(path: Path) -> Path | None:
    return path.with_name("last.prev.ckpt") if path.name == "last.ckpt" else None


def _keep_previous(path: Path) -> None:
    if (previous := _previous(path)) and path.exists():
        if is_folder(previous):
            delete_with_retry(previous)
        # If another program has last.ckpt open, it is not replaced, and stays the previous checkpoint itself.
        with contextlib.suppress(PermissionError):
            _link(path, previous, copy=False)


def _link(source: Path, target: Path, copy: bool = True) -> None:
    """Make `target` a hard link to `source`, atomically.

    If the file system has no hard links, `target` is a copy. If another program has one of the files open, so that
    Windows does not rename the link, it is a copy too; copy=False raises PermissionError instead.
    """
    beside = target.with_name(target.name + PARTIAL_SUFFIX)
    beside.unlink(missing_ok=True)
    try:
        os.link(source, beside)
    except OSError:  # a file system without hard links
        copy = True
    else:
        try:
            return replace_with_retry(beside, target)
        except PermissionError:
            if not copy:
                raise
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
    with source.open("rb") as content, atomic_write(target, keep=True) as file:
        shutil.copyfileobj(content, file)
