"""Stops a run on a signal: at the end of the micro-batch, after saving a checkpoint."""

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging

from rwkv_pl.errors import StoppedBySignal
from rwkv_pl.terminal import (
    SIGNAL_CODES,
    STOPPED_AT_START,
    SWEEP_JOB_ENV,
    exit_at_once,
    is_called_from_python,
    resume_command,
)
from rwkv_pl.training.callbacks.checkpoints import LastCheckpoint, validation_is_due
from rwkv_pl.training.callbacks.progress import TrainingProgress
from rwkv_pl.training.checkpoint_io import DurableCheckpointIO

log = logging.getLogger(__name__)


class StopOnSignal(Callback):
    """Ends the training after the micro-batch and saves last.ckpt, on SIGTERM, SIGINT (Ctrl-C) or SIGHUP.

    The exit codes are 143, 130 and 129. SIGHUP means a closed terminal; under nohup it is ignored. In a SLURM job, the
    requeue signal does the same and requeues the job; the exit code is 0. A second signal ends the process at once.

    In a call of `rwkv_pl.train`, signals do not end the process: the caller's handlers raise StoppedBySignal before and
    after the training, and so does the second signal.

    At the end of each micro-batch, all processes of a run find out whether one of them received a signal. A validation
    that was due or running is run first when the run is resumed (PendingValidation).
    """

    def __init__(self) -> None:
        self._received = 0
        self._previous_handlers: dict[int, Any] = {}
        self._codes = dict(SIGNAL_CODES)
        self._group: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning's handlers raise or save at once, even inside an optimizer step.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        # For these handlers, Lightning would synchronise all processes and the GPU after each micro-batch.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False
        if SLURMEnvironment.job_id() is not None and hasattr(signal, "SIGUSR1"):
            self._codes[signal.SIGUSR1] = 0
        if not is_called_from_python():
            self._set_handlers(self._end_at_start if trainer.is_global_zero else self._end_at_once)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._folder = Path(trainer.default_root_dir)
        if trainer.world_size > 1:
            backend = torch.distributed.get_backend()
            timeout = trainer.strategy._timeout  # type: ignore[attr-defined]
            self._group = None if backend == "gloo" else torch.distributed.new_group(backend="gloo", timeout=timeout)
        self._set_handlers(self._on_signal)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        files = trainer.strategy.checkpoint_io
        if isinstance(files, DurableCheckpointIO):
            files.poll()
        if number := self._received_by_any(trainer):
            self._stop(trainer, number, validation_is_due(trainer))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if trainer.state.fn == "fit" and (number := self._received_by_any(trainer)):
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):
                    # During validation the average replaces the trained weights; this restores them.
                    callback.on_validation_epoch_end(trainer, pl_module)
            self._stop(trainer, number, due=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if number := self._received_by_any(trainer):
            self._stop(trainer, number, due=False)
        if is_called_from_python():
            self._restore_handlers()
        else:
            self._set_handlers(self._end_at_once)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def _set_handlers(self, handler: Callable[[int, FrameType | None], None]) -> None:
        if threading.current_thread() is threading.main_thread():
            # Under nohup, SIGHUP is ignored; keep it ignored.
            numbers = [number for number in self._codes if signal.getsignal(number) not in (signal.SIG_IGN, None)]
            before = {number: signal.signal(number, handler) for number in numbers}
            self._previous_handlers = self._previous_handlers or before

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            if is_called_from_python():
                message = f"stopped by a second signal, without saving; to resume: {resume_command(self._folder)}"
                raise StoppedBySignal(number, self._codes[number], message)
            self._end_at_once(number, frame)
        self._received = number

    @staticmethod
    def _end_at_start(number: int, frame: FrameType | None) -> None:
        exit_at_once(STOPPED_AT_START, SIGNAL_CODES.get(number, 128 + number))

    @staticmethod
    def _end_at_once(number: int, frame: FrameType | None) -> None:
        os._exit(SIGNAL_CODES.get(number, 128 + number))

    def _received_by_any(self, trainer: Trainer) -> int:
        if trainer.world_size == 1:
            return self._received
        flag = torch.tensor(self._received)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(flag)

    def _stop(self, trainer: Trainer, number: int, due: bool) -> None:
        if due:
            trainer.should_stop = False  # so that the checkpoint is not marked as finished before the validation
        last = next((c for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint)), None)
        if last:
            last.save_now(trainer)
        trainer.strategy.checkpoint_io.teardown()  # waits until the checkpoint is on disk
        trainer.strategy.barrier()
        requeued = self._codes.get(number) == 0 and trainer.is_global_zero and _requeue()
        if isinstance(trainer.progress_bar_callback, TrainingProgress):
            trainer.progress_bar_callback.stop(trainer)
        message = f"stopped by {signal.Signals(number).name} after step {trainer.global_step:,}"
        # A sweep prints the command that resumes all its jobs.
        can_resume = last and SWEEP_JOB_ENV not in os.environ
        message += f"; to resume: {resume_command(Path(trainer.default_root_dir))}" if can_resume else ""
        message += "; the job was requeued" if requeued else ""
        if trainer.is_global_zero:
            log.info(message)
        raise StoppedBySignal(number, self._codes.get(number, 128 + number), message)


def _requeue() -> bool:
    """Requeue this SLURM job. Returns whether that succeeded; if not, logs a warning."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    except OSError as error:
        log.warning(f"the job was not requeued: scontrol: {error.strerror}")
        return False
    if done.returncode:
        log.warning(f"the job was not requeued: scontrol: {' '.join(done.stderr.split())}")
    return not done.returncode
