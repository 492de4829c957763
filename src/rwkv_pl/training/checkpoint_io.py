"""How checkpoints reach the disk."""

import contextlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from rwkv_pl.files import PARTIAL_SUFFIX, atomic_write, replace_with_retry


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint so that its name is that of a whole file, whatever happens meanwhile.

    Lightning's own writes into the temporary folder and moves, which is not atomic across file systems, without fsync.
    The last.ckpt before stays as last.prev.ckpt. best and last of one step are one file under two names.

    Of a model on a GPU a copy is written by a thread, while the training goes on; an error of it is raised by `poll`,
    or by whatever waits for it next. On a CPU the thread would take from the training what it spares it.
    """

    def __init__(self) -> None:
        self._saved: tuple[Any, Path] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        self.wait()  # one at a time, so that there is never more than one copy
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = checkpoint["global_step"], checkpoint.get("rwkv_pl", {}).get("finished")
        saved, beside = self._saved or (None, path)
        same = beside if saved == content and beside != path and beside.exists() else None
        self._saved = None
        if same is None and writes_in_background(checkpoint):
            checkpoint = apply_to_collection(checkpoint, Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))
            self._writing = self._thread.submit(_write, checkpoint, path, None)
        else:
            _write(checkpoint, path, same)
        self._saved = content, path

    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Lightning's, without the names of other folders' files: ModelCheckpoint deletes those that it knows of."""
        checkpoint: dict[str, Any] = super().load_checkpoint(path, *arguments, **options)
        for state in checkpoint.get("callbacks", {}).values():
            if isinstance(state, dict) and "best_k_models" in state:
                folder = Path(str(state.get("dirpath"))).resolve()
                models = state["best_k_models"].items()
                state["best_k_models"] = {name: x for name, x in models if Path(name).resolve().parent == folder}
        return checkpoint

    def poll(self) -> None:
        """Raises the error of a write that has ended by one."""
        if self._writing and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until what was saved is on the disk; raises the write's error."""
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
    """Is there a GPU that works on while the CPU writes?"""
    return any(isinstance(value, Tensor) and value.is_cuda for value in checkpoint.get("state_dict", {}).values())


def _write(checkpoint: dict[str, Any], path: Path, same: Path | None) -> None:
    if same:
        _keep_previous(path)
        _link(same, path)
        return
    with atomic_write(path) as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
        _keep_previous(path)  # only now, when nothing can fail any more


def _keep_previous(path: Path) -> None:
    if path.name == "last.ckpt" and path.exists():
        _link(path, path.with_name("last.prev.ckpt"))


def _link(source: Path, target: Path) -> None:
    """`target` becomes another name of the file `source`, at once."""
    beside = target.with_name(target.name + PARTIAL_SUFFIX)
    beside.unlink(missing_ok=True)
    try:
        os.link(source, beside)
    except OSError:  # a file system without hard links
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
        with atomic_write(target) as file:
            file.write(source.read_bytes())
        return
    replace_with_retry(beside, target)
