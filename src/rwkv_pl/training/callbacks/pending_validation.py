"""The validation before or in which a run was stopped: run first when the run is resumed."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer

from rwkv_pl.training.callbacks.metrics import MetricsRecorder


class PendingValidation(Callback):
    """A validation is pending if one is due at the step that the run is resumed from and `metrics` does not know it.

    Due is every `trainer.val_check_interval`-th step, and the last. After StopOnSignal in the list of callbacks, which
    may stop it again.
    """

    def __init__(self, metrics: MetricsRecorder) -> None:
        self.metrics = metrics

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = self.metrics.step  # the trainer does not know it yet
        every = trainer.val_check_interval // trainer.accumulate_grad_batches
        timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
        no_step_left = 0 < trainer.max_steps <= step
        no_time_left = any((timer.time_remaining() or 1) <= 0 for timer in timers)
        due = step > 0 and (step % every == 0 or no_step_left or no_time_left) and bool(trainer.limit_val_batches)
        self.pending = due and self.metrics.validated != step
        # Lightning begins no training that has all its steps or all its time, not even for the validation after them.
        self._only_validation = no_step_left or no_time_left
        self._extra_step = int(self.pending and no_step_left)
        self._timers = [(timer, timer._duration) for timer in timers if self.pending]
        for timer, _ in self._timers:
            timer._duration = None
        trainer.fit_loop.epoch_loop.max_steps += self._extra_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.pending:
            return
        for timer, duration in self._timers:
            timer._duration = duration
        trainer.fit_loop.epoch_loop.max_steps -= self._extra_step
        trainer.should_stop = self._only_validation
        validation: Any = trainer.fit_loop.epoch_loop.val_loop
        validation.restarting = False  # from its first batch, not from where it was broken off
        trainer.validating = True
        validation.run()
        trainer.training = True
