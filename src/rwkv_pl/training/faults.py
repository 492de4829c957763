"""What a run does when it is told to stop: it saves, and says how to go on."""

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rwkv_pl.training.checkpoints import LastCheckpoint, validation_is_due

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(Callback):
    """SIGTERM and SIGINT (Ctrl-C) end the training after the micro-batch, with last.ckpt saved: exit code 143 or 130.

    A second signal ends the process at once. All processes of a run agree, at each micro-batch's end, on whether one of
    them was told. A validation that was due or under way is made first thing when the run is resumed.
    """

    def __init__(self) -> None:
        self._received = 0
        self._validation_due = False
        self._before: dict[int, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"validation_due": self._validation_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validation_due = state_dict["validation_due"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            # In place of Lightning's, which raise wherever the training is, inside an optimizer step too.
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        if self._validation_due:
            self._validation_due = False
            validation = trainer.fit_loop.epoch_loop.val_loop
            validation.restarting = False  # from its first batch, not from where it was broken off
            trainer.validating = True
            validation.run()
            trainer.training = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if number := self._told(trainer):
            self._stop(trainer, number, validation_is_due(trainer))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if trainer.state.fn == "fit" and (number := self._told(trainer)):
            self._stop(trainer, number, due=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            os._exit(128 + number)
        self._received = number

    def _told(self, trainer: Trainer) -> int:
        if trainer.world_size == 1:
            return self._received
        flag = torch.tensor(self._received, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return int(flag)

    def _stop(self, trainer: Trainer, number: int, due: bool) -> None:
        self._validation_due = due
        if due:
            trainer.should_stop = False  # the run is not finished before its last validation
        last = next((c for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint)), None)
        if last and not (due and trainer.global_step == trainer.max_steps and last.last_model_path):
            # Lightning begins no training that has all its steps, nor its last validation: the one before goes on.
            last.save_now(trainer)
        if trainer.is_global_zero:
            told = f"stopped by {signal.Signals(number).name} after step {trainer.global_step:,}"
            log.info(f"{told}; rwkv-train resume={trainer.default_root_dir} goes on" if last else told)
        raise SystemExit(128 + number)
