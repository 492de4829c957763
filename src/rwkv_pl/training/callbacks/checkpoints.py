"""best.ckpt and last.ckpt: when they are written."""

import functools
import logging
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from rwkv_pl.errors import UserError
from rwkv_pl.weights.checkpoint import read_checkpoint

log = logging.getLogger(__name__)


def validation_is_due(trainer: Trainer) -> bool:
    """At a micro-batch's end: does Lightning validate next?"""
    data_fetcher = trainer.fit_loop._data_fetcher
    return data_fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(data_fetcher)


class BestCheckpoint(ModelCheckpoint):
    """Lightning's, whose score to beat is that of the file, wherever the run folder lies now.

    What last.ckpt says of it may be older than the file, where a run was killed between the two, or speak of a file
    that is damaged or gone.
    """

    @functools.cached_property
    def state_key(self) -> str:
        # Lightning asks for it at each of its hooks, and would write out the settings each time.
        return super().state_key

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def here(path: str) -> str:
            return str(Path(str(self.dirpath), Path(path).name)) if path else path

        moved = {key: here(state_dict[key]) for key in ("best_model_path", "kth_best_model_path")}
        models = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **moved, "best_k_models": models, "dirpath": self.dirpath})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.save_top_k != 1 or not self.filename or "{" in self.filename:
            return
        path = Path(str(self.dirpath), f"{self.filename}{self.FILE_EXTENSION}")
        score = None
        if os.path.lexists(path) and not path.is_file():
            raise UserError(f"{path} is no file, or a link to none: move it away")
        if path.is_file():
            try:
                score = read_checkpoint(path)["callbacks"][self.state_key]["best_model_score"]
            except (UserError, LookupError, TypeError):
                log.warning(f"{path} is damaged, or of another monitor: the next validation writes it anew")
        self.best_model_score = score if isinstance(score, Tensor) and score.numel() == 1 else None
        self.best_k_models = {} if self.best_model_score is None else {str(path): self.best_model_score}
        self.best_model_path = self.kth_best_model_path = next(iter(self.best_k_models), "")


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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass  # it has none, and Lightning's warns where the folder was moved

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = not trainer.fit_loop.epoch_loop._should_accumulate()
        if trainer.should_stop or (stepped and trainer.global_step % self._every_n_train_steps == 0):
            if validation_is_due(trainer):
                self._after_validation = True
            else:
                self.save_now(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # At the end too: weight averaging puts its average in place of the trained weights when training has ended.
        if self._after_validation or trainer.should_stop:
            self._after_validation = False
            self.save_now(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass

    def save_now(self, trainer: Trainer) -> None:
        """Writes last.ckpt, unless this step's is there already and knows as well whether the run has ended."""
        if self._saved != (trainer.global_step, trainer.should_stop):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            self._saved = trainer.global_step, trainer.should_stop
