"""Runs the validation that a stop prevented or interrupted, when the run is resumed."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer

from rwkv_pl.training.callbacks.metrics import MetricsRecorder


class PendingValidation(Callback):
    """Runs a pending validation before training: one that was due at the resumed step and that `metrics` lacks.

    Validations are due every `trainer.val_check_interval` steps and at the last step. In the list of callbacks, this
    one comes after StopOnSignal, so that a signal can stop the validation again.
    """

    def __init__(self, metrics: MetricsRecorder) -> None:
        self.metrics = metrics

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = self.metrics.step  # trainer.global_step is not restored yet
        every = trainer.val_check_interval // trainer.accumulate_grad_batches
        timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
        no_step_left = 0 < trainer.max_steps <= step
        no_time_left = any((timer.time_remaining() or 1) <= 0 for timer in timers)
        due = step > 0 and (step % every == 0 or no_step_left or no_time_left) and bool(trainer.limit_val_batches)
        self.pending = due and self.metrics.validated != step
        # Lightning does not start a fit without steps or time left, not even for a validation: allow one more step.
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
        validation.restarting = False  # start at its first batch, not where it was interrupted
        trainer.validating = True
        validation.run()
        trainer.training = True
