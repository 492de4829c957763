"""best.ckpt and last.ckpt, and how checkpoints reach the disk."""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from rwkv_pl.files import publish


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint so that its name is that of a whole file, whatever happens meanwhile.

    Lightning's own writes into the temporary folder and moves, which is not atomic across file systems, without fsync.
    The last.ckpt before stays as last.prev.ckpt. best and last of one step are one file under two names.
    """

    def __init__(self) -> None:
        self._written: tuple[Any, Path] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name == "last.ckpt" and path.exists():
            _link(path, path.with_name("last.prev.ckpt"))
        content = checkpoint["global_step"], checkpoint.get("rwkv_pl", {}).get("finished")
        written, beside = self._written or (None, path)
        if written == content and beside != path and beside.exists():
            _link(beside, path)
            return
        with publish(path) as file:
            torch.save(checkpoint, file)
        self._written = content, path


def _link(source: Path, target: Path) -> None:
    """`target` becomes another name of the file `source`, at once."""
    beside = target.with_name(target.name + ".partial")
    beside.unlink(missing_ok=True)
    try:
        os.link(source, beside)
    except OSError:  # a file system without hard links
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
        with publish(target) as file:
            file.write(source.read_bytes())
        return
    beside.replace(target)


def validation_is_due(trainer: Trainer) -> bool:
    """At a micro-batch's end: does Lightning validate next?"""
    data_fetcher = trainer.fit_loop._data_fetcher
    return data_fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(data_fetcher)


class BestCheckpoint(ModelCheckpoint):
    """Lightning's, but in a run folder that was moved, where that forgets the score and overwrites the best model."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def here(path: str) -> str:
            return str(Path(str(self.dirpath), Path(path).name)) if path else path

        moved = {key: here(state_dict[key]) for key in ("best_model_path", "kth_best_model_path")}
        models = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **moved, "best_k_models": models, "dirpath": self.dirpath})


class LastCheckpoint(ModelCheckpoint):
    """Writes last.ckpt every N optimizer steps and at the end of training, however it ends in order.

    Where a validation is due on the same step it is written after it, so that it knows the score: a run killed during
    the validation goes on from before it, and validates again. Must come after the checkpoint that keeps the best.
    """

    def __init__(self, dirpath: str, every_n_train_steps: int = 1000) -> None:
        if every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps must be at least 1, got {every_n_train_steps}")
        super().__init__(
            dirpath=dirpath,
            save_top_k=0,
            save_last=True,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )
        self._after_validation = False
        self._saved: tuple[int, bool] | None = None

    @property
    def state_key(self) -> str:
        # Lightning's names the interval, so a run resumed with another one would not find its state.
        return type(self).__qualname__

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop.epoch_loop._should_accumulate() or trainer.global_step % self._every_n_train_steps:
            return
        if validation_is_due(trainer):
            self._after_validation = True
        else:
            self.save_now(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._after_validation:
            self._after_validation = False
            self.save_now(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save_now(trainer)

    def save_now(self, trainer: Trainer) -> None:
        """Writes last.ckpt, unless this step's is there already and knows as well whether the run has ended."""
        if self._saved != (trainer.global_step, trainer.should_stop):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            self._saved = trainer.global_step, trainer.should_stop
