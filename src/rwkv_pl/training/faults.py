"""What a run does when it is told to stop, or cannot go on: what is saved stays, and it says how to go on."""

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
from lightning.pytorch.callbacks import Timer, WeightAveraging

from rwkv_pl.config import RunError, UserError
from rwkv_pl.files import in_words
from rwkv_pl.training.checkpoints import DurableCheckpointIO, LastCheckpoint, validation_is_due
from rwkv_pl.weights.checkpoint import read_checkpoint

log = logging.getLogger(__name__)

# Windows has no SIGTERM that reaches a console's program; Ctrl-Break is what stands for it.
EXIT_CODES: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143}
if hasattr(signal, "SIGBREAK"):
    EXIT_CODES[signal.SIGBREAK] = 143
if hasattr(signal, "SIGHUP"):  # the terminal was closed
    EXIT_CODES[signal.SIGHUP] = 129


class StopOnSignal(Callback):
    """SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a closed terminal; not under nohup) end the training after the micro-batch,
    with last.ckpt saved: exit code 143, 130 or 129.

    In a SLURM job its requeue signal does so too, and the job is queued again: exit code 0. A second signal ends the
    process at once. All processes of a run agree, at each micro-batch's end, on whether one of them was told. A
    validation that was due or under way is made first thing when the run is resumed.
    """

    def __init__(self) -> None:
        self._received = 0
        self._validation_due = False
        self._step = 0
        self._before: dict[int, Any] = {}
        self._codes = dict(EXIT_CODES)
        self._group: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"validation_due": self._validation_due, "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validation_due, self._step = state_dict["validation_due"], state_dict.get("step", 0)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning's handlers raise, or save, wherever the training is: inside an optimizer step too.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        # They are what it would ask all processes for at each micro-batch, and wait for the GPU.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False
            if environment.requeue_signal:
                self._codes[environment.requeue_signal] = 0
        self._handle(self._end_at_once)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning begins no training that has all its steps or all its time, not even for the validation after them.
        no_step_left = self._validation_due and 0 < trainer.max_steps <= self._step
        timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
        self._timers = [(timer, timer._duration) for timer in timers if self._validation_due]
        no_time_left = any((timer.time_remaining() or 1) <= 0 for timer, _ in self._timers)
        for timer, _ in self._timers:
            timer._duration = None
        self._extra_step = int(no_step_left)
        self._only_validation = no_step_left or no_time_left
        trainer.fit_loop.epoch_loop.max_steps += self._extra_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            backend = torch.distributed.get_backend()
            self._group = None if backend == "gloo" else torch.distributed.new_group(backend="gloo")
        self._handle(self._note)
        if self._validation_due:
            self._validation_due = False
            for timer, duration in self._timers:
                timer._duration = duration
            trainer.fit_loop.epoch_loop.max_steps -= self._extra_step
            trainer.should_stop = self._only_validation
            validation = trainer.fit_loop.epoch_loop.val_loop
            validation.restarting = False  # from its first batch, not from where it was broken off
            trainer.validating = True
            validation.run()
            trainer.training = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        files = trainer.strategy.checkpoint_io
        if isinstance(files, DurableCheckpointIO):
            files.poll()
        if number := self._told(trainer):
            self._stop(trainer, number, validation_is_due(trainer))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if trainer.state.fn == "fit" and (number := self._told(trainer)):
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):
                    # It validates its average in the place of the trained weights; this puts them back.
                    callback.on_validation_epoch_end(trainer, pl_module)
            self._stop(trainer, number, due=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if number := self._told(trainer):
            self._stop(trainer, number, due=False)
        self._handle(self._end_at_once)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, handler: Callable[[int, FrameType | None], None]) -> None:
        if threading.current_thread() is threading.main_thread():
            # Under nohup SIGHUP is ignored, and stays so.
            numbers = [number for number in self._codes if signal.getsignal(number) is not signal.SIG_IGN]
            before = {number: signal.signal(number, handler) for number in numbers}
            self._before = self._before or before

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            self._end_at_once(number, frame)
        self._received = number

    @staticmethod
    def _end_at_once(number: int, frame: FrameType | None) -> None:
        os._exit(EXIT_CODES.get(number, 128 + number))

    def _told(self, trainer: Trainer) -> int:
        if trainer.world_size == 1:
            return self._received
        flag = torch.tensor(self._received)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(flag)

    def _stop(self, trainer: Trainer, number: int, due: bool) -> None:
        self._validation_due, self._step = due, trainer.global_step
        if due:
            trainer.should_stop = False  # the run is not finished before its last validation
        last = next((c for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint)), None)
        if last:
            last.save_now(trainer)
        trainer.strategy.checkpoint_io.teardown()  # until it is on the disk
        trainer.strategy.barrier()
        requeued = self._codes.get(number) == 0 and trainer.is_global_zero and _requeue()
        if trainer.is_global_zero:
            told = f"stopped by {signal.Signals(number).name} after step {trainer.global_step:,}"
            goes_on = f"; rwkv-train resume={trainer.default_root_dir} goes on" if last else ""
            log.info(told + goes_on + (", and the job is queued again" if requeued else ""))
        raise SystemExit(self._codes.get(number, 128 + number))


def _requeue() -> bool:
    """Puts this SLURM job into the queue again."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    except OSError as error:
        log.warning(f"the job was not queued again: scontrol: {error.strerror}")
        return False
    if done.returncode:
        log.warning(f"the job was not queued again: scontrol: {' '.join(done.stderr.split())}")
    return not done.returncode


def explained(error: Exception, folder: Path) -> RunError:
    """One line for what ended a run, and where the run stands; a traceback goes to train.log alone."""
    if isinstance(error, OSError):
        # What a logger raises as it is closed, after the same, does not say where.
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
            chain.append(cause)
        named = (e for e in reversed(chain) if isinstance(e, OSError) and e.filename)
        told = in_words(next(named, OSError(error.errno, error.strerror, str(folder))))
    elif isinstance(error, UserError):
        # From a worker process it comes with that one's traceback.
        told = str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")
    elif isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        reason = str(error).partition(". ")[0] or "the system gives no more"
        told = f"out of memory ({reason}): a larger trainer.accumulate_grad_batches takes less"
    else:
        log.error("what ended the run:", exc_info=error)
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]} (more in train.log)"
    return RunError(f"{told}; {where_it_stands(folder)}")


def where_it_stands(folder: Path) -> str:
    """What is left of a run that ended, and how to go on with it."""
    for name in ("last.ckpt", "last.prev.ckpt"):
        path = folder / "checkpoints" / name
        try:
            step = read_checkpoint(path, checked=False)["global_step"]
        except (UserError, KeyError):
            continue
        return f"the last checkpoint is {path} of step {step:,}: rwkv-train resume={folder} goes on from it"
    return f"there is no checkpoint yet: rwkv-train resume={folder} starts it again"
