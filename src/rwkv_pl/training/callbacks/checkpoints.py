"""The callbacks that write best.ckpt and last.ckpt."""

import copy
import functools
import logging
import os
import re
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from rwkv_pl.errors import UserError
from rwkv_pl.training.checkpoint_io import copy_checkpoint
from rwkv_pl.weights.checkpoint import find_best, is_checkpoint, read_checkpoint

log = logging.getLogger(__name__)


def validation_is_due(trainer: Trainer) -> bool:
    """At the end of a micro-batch: will Lightning validate next?"""
    data_fetcher = trainer.fit_loop._data_fetcher
    return data_fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(data_fetcher)


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which always writes best.ckpt too, and reads the score to beat from that file.

    The score in last.ckpt can be older than best.ckpt, if the run was killed between writing the two, or best.ckpt may
    be corrupt or missing. The run folder may have been moved.

    filename: of the `save_top_k` best checkpoints; it has to contain the step, as in "{step}". With "best", the default
    name, save_top_k=1 writes only best.ckpt, and other numbers use "best-{step}".
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = "best",
        monitor: str | None = "val/bits_per_byte",
        save_top_k: int = 1,
        **options: Any,
    ) -> None:
        self._is_single = filename == "best" and save_top_k == 1
        if filename == "best" and not self._is_single:
            filename = "best-{step}"
        if filename and not self._is_single and not re.search(r"\{step[:}]", filename):
            raise ValueError(f"filename={filename} must contain {{step}}: it names checkpoints next to best.ckpt")
        if save_top_k == 0 or not monitor:
            raise ValueError("the best checkpoint needs a monitor, and a save_top_k that is not 0")
        super().__init__(dirpath, filename, monitor, save_top_k=save_top_k, **options)
        if self._every_n_train_steps or self._train_time_interval or self._save_on_train_epoch_end:
            raise ValueError("the best checkpoint is written after a validation: leave out the other intervals")
        self._best_score: Tensor | None = None

    @functools.cached_property
    def state_key(self) -> str:
        # Cached: Lightning reads it in every hook, and formats the settings each time.
        return super().state_key

    @property
    def _best_path(self) -> Path:
        return Path(str(self.dirpath), "best.ckpt")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def here(path: str) -> str:
            return str(Path(str(self.dirpath), Path(path).name)) if path else path

        moved = {key: here(state_dict[key]) for key in ("best_model_path", "kth_best_model_path")}
        models = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **moved, "best_k_models": models, "dirpath": self.dirpath})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = self._best_path
        score = None
        if os.path.lexists(path) and not is_checkpoint(path):
            raise UserError(f"{path} is not a checkpoint, or is a broken link: move it away")
        if trainer.is_global_zero and (found := find_best(path.parent)) not in (None, path):
            # The run was killed before it wrote best.ckpt, or is from a version that did not write it.
            copy_checkpoint(found, path)
        trainer.strategy.barrier()
        if is_checkpoint(path):
            try:
                # A copy, since its tensor keeps the file open, and Windows would not replace it.
                score = copy.deepcopy(read_checkpoint(path)["callbacks"][self.state_key]["current_score"])
            except (UserError, LookupError, TypeError):
                log.warning(f"{path} is corrupt, or has another monitor: the next validation writes it again")
        self._best_score = score if isinstance(score, Tensor) and score.numel() == 1 else None
        # The suffix: a checkpoint from somebody else could name "..", which would be deleted later.
        paths = {name: Path(name) for name in self.best_k_models if Path(name).suffix == self.FILE_EXTENSION}
        models = {name: self.best_k_models[name] for name, at in paths.items() if is_checkpoint(at) and at != path}
        if self._is_single:
            models = {} if self._best_score is None else {str(path): self._best_score}
        ranked = sorted(models, key=lambda name: float(models[name]))
        self.best_k_models = {name: models[name] for name in ranked[: None if self.save_top_k < 0 else self.save_top_k]}
        self.best_model_path, self.kth_best_model_path = (ranked[0], [*self.best_k_models][-1]) if ranked else ("", "")
        self.best_model_score = self.best_k_models.get(self.best_model_path)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        assert self.current_score is not None
        if self._best_score is None or self.current_score < self._best_score:
            self._best_score = self.current_score
            if Path(filepath) != self._best_path:
                super()._save_checkpoint(trainer, str(self._best_path))

    def _format_checkpoint_name(self, *arguments: Any, **options: Any) -> str:
        # The score's name has a slash, which would make a folder.
        return super()._format_checkpoint_name(*arguments, **options).replace("/", "_")


class LastCheckpoint(ModelCheckpoint):
    """Writes last.ckpt every N optimizer steps and at every orderly end of training.

    If a validation is due at the same step, last.ckpt is written after it, to include the score. If the run is killed
    during the validation, it continues from the checkpoint before and validates again. In the list of callbacks, this
    one must come after the one that writes best.ckpt.
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
        # Lightning's key contains the interval, so a run resumed with another interval would not find its state.
        return type(self).__qualname__

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass  # there is no state, and Lightning's method warns if the folder was moved

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
        # At the end too, before weight averaging replaces the trained weights with their average (in on_train_end).
        if self._after_validation or trainer.should_stop:
            self._after_validation = False
            self.save_now(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass

    def save_now(self, trainer: Trainer) -> None:
        """Write last.ckpt, unless it was already written for this step with the same should_stop."""
        if self._saved != (trainer.global_step, trainer.should_stop):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            self._saved = trainer.global_step, trainer.should_stop
