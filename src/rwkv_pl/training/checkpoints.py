"""last.ckpt: what a run goes on from. (best.ckpt is Lightning's own ModelCheckpoint, see conf/callbacks/best.yaml.)"""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Writes last.ckpt every N optimizer steps and at the end of training, however it ends in order.

    Where a validation is due on the same step it is written after it, so that it knows the score: a run killed during
    the validation goes on from before it, and validates again. Must come after the checkpoint that keeps the best.
    """

    def __init__(self, dirpath: str, every_n_train_steps: int = 1000) -> None:
        super().__init__(
            dirpath=dirpath,
            save_top_k=0,
            save_last=True,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )
        self._after_validation = False

    @property
    def state_key(self) -> str:
        # Lightning's names the interval, so a run resumed with another one would not find its state.
        return type(self).__qualname__

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        epoch_loop = trainer.fit_loop.epoch_loop
        if epoch_loop._should_accumulate() or trainer.global_step % self._every_n_train_steps:
            return
        data_fetcher = trainer.fit_loop._data_fetcher
        if data_fetcher is not None and epoch_loop._should_check_val_fx(data_fetcher):
            self._after_validation = True
        else:
            self._save_now(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._after_validation:
            self._after_validation = False
            self._save_now(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_now(trainer)

    def _save_now(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
