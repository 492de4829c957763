"""Writes checkpoints to disk, atomically."""

import contextlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from rwkv_pl.files import PARTIAL_SUFFIX, atomic_write, delete_with_retry, newest, replace_with_retry, settle


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically: a checkpoint's name always refers to a complete file.

    Lightning's own class writes to the temporary folder and moves the file, without fsync; across file systems that is
    not atomic. The previous last.ckpt is kept as last.prev.ckpt. If best.ckpt and last.ckpt are of the same step, they
    are hard links to one file.

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
        # A callback's save_weights_only leaves entries out.
        content = checkpoint["global_step"], checkpoint.get("rwkv_pl", {}).get("finished"), sorted(checkpoint)
        saved, beside = self._saved or (None, path)
        same = newest(beside) if saved == content and beside != path and beside.exists() else None
        self._saved = None
        if same is None and writes_in_background(checkpoint):
            checkpoint = apply_to_collection(checkpoint, Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))
            self._writing = self._thread.submit(_write, checkpoint, path, None)
        else:
            _write(checkpoint, path, same)
        self._saved = content, path

    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Load as Lightning does, but remove paths in other folders: ModelCheckpoint would delete these files."""
        checkpoint: dict[str, Any] = super().load_checkpoint(newest(Path(path)), *arguments, **options)
        for state in checkpoint.get("callbacks", {}).values():
            if isinstance(state, dict) and "best_k_models" in state:
                folder = Path(str(state.get("dirpath"))).resolve()
                models = state["best_k_models"].items()
                state["best_k_models"] = {name: x for name, x in models if Path(name).resolve().parent == folder}
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
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


def _write(checkpoint: dict[str, Any], path: Path, same: Path | None) -> None:
    settle(path)  # so that it becomes last.prev.ckpt
    if same:
        _keep_previous(path)
        _link(same, path)
        return
    with atomic_write(path, keep=True) as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
        _keep_previous(path)  # only after the new file is complete


def _keep_previous(path: Path) -> None:
    if path.name == "last.ckpt" and path.exists():
        # If another program has last.ckpt open, it is not replaced, and stays the previous checkpoint itself.
        with contextlib.suppress(PermissionError):
            _link(path, path.with_name("last.prev.ckpt"), copy=False)


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
    with atomic_write(target, keep=True) as file:
        file.write(source.read_bytes())
