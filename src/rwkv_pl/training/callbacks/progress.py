"""Shows the progress of a run: a bar in a terminal, else a plain line every ten seconds."""

import contextlib
import logging
import sys
import time
from typing import Any

import rich
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rwkv_pl.training.callbacks.metrics import MetricsRecorder

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10
SECONDS_BETWEEN_BARS = 0.5


class ConsoleHandler(logging.Handler):
    """Prints log messages above a progress bar. Tracebacks are not printed; they are in train.log."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            return
        console = rich.get_console()
        text = self.format(record)
        with contextlib.suppress(OSError):  # a closed terminal must not end the run
            if console.is_jupyter:  # rich would display each line as a separate output
                print(text, flush=True)
            else:
                text = text.encode(console.encoding, "replace").decode(console.encoding)
                console.print(text, markup=False, highlight=False, soft_wrap=True)


class LogFile(logging.FileHandler):
    """The handler of train.log. A failed write raises OSError; logging's default prints a traceback and continues."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, self.baseFilename) from error
        super().handleError(record)


class TrainingProgress(ProgressBar):
    """Shows steps, loss, score, tokens/s, MFU and the time left, from the last row that `metrics` logged."""

    def __init__(self, metrics: MetricsRecorder) -> None:
        super().__init__()
        self._metrics = metrics
        self._bar: Progress | None = None

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._started = self._last_shown = time.perf_counter()
        self._first_step = trainer.global_step
        console = rich.get_console()
        if console.is_terminal and trainer.is_global_zero:
            self._bar = Progress(
                # All columns together fit into 80 characters.
                BarColumn(bar_width=None, finished_style="bar.complete"),
                MofNCompleteColumn(),
                TextColumn("{task.description}{task.fields[figures]}"),
                TimeRemainingColumn(compact=True),
                TextColumn("left"),
                console=console,
                auto_refresh=False,  # rich's refresh thread would block the training while it draws
            )
            total = trainer.max_steps if trainer.max_steps > 0 else None
            self._task = self._bar.add_task("", total=total, completed=trainer.global_step, figures="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if self._bar:
            if now - self._last_shown >= SECONDS_BETWEEN_BARS:
                self._last_shown = now
                self._show(completed=trainer.global_step, figures=self._format_figures())
        elif now - self._last_shown >= SECONDS_BETWEEN_LINES and trainer.is_global_zero:
            self._last_shown = now
            log.info(f"step {self._format_step(trainer)}  {self._format_figures()}  {self._format_time_left(trainer)}")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar:
            self._show(completed=trainer.global_step, description="validating ", figures="")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._bar and time.perf_counter() - self._last_shown >= SECONDS_BETWEEN_BARS:
            self._last_shown = time.perf_counter()
            done = sum(trainer.num_val_batches[:dataloader_idx]) + batch_idx + 1
            self._show(figures=f"call {done:,} of {sum(trainer.num_val_batches):,}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        if self._bar:
            self._show(description="", figures=self._format_figures())
        bits = {name: float(trainer.callback_metrics[name]) for name in self._metrics.scores}
        log.info(f"step {self._format_step(trainer)}  validation {format_scores(bits)} bits per {self._metrics.unit}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.stop(trainer)

    def stop(self, trainer: Trainer) -> None:
        """Show the current step and end the bar, so that a message printed next is below it."""
        if self._bar:
            self._show(completed=trainer.global_step, description="", figures=self._format_figures())
            self._bar.stop()
            self._bar = None

    def _show(self, **changes: Any) -> None:
        if self._bar:
            self._bar.update(self._task, refresh=True, **changes)

    def _format_step(self, trainer: Trainer) -> str:
        return f"{trainer.global_step:,}" + (f"/{trainer.max_steps:,}" if trainer.max_steps > 0 else "")

    def _format_figures(self) -> str:
        latest, unit = self._metrics.latest, self._metrics.unit
        if "train/loss" not in latest:
            return ""
        return (
            f"loss {latest['train/loss']:.3f}  {latest[f'train/bits_per_{unit}']:.3f} bits/{unit}  "
            f"{latest['tokens_per_second']:,.0f} tokens/s" + (f"  {latest['mfu']:.0%} MFU" if "mfu" in latest else "")
        )

    def _format_time_left(self, trainer: Trainer) -> str:
        done = trainer.global_step - self._first_step
        if trainer.max_steps < 0 or not done:
            return ""
        left = (trainer.max_steps - trainer.global_step) * (time.perf_counter() - self._started) / done
        return f"{format_duration(left)} left"


def format_scores(scores: dict[str, float]) -> str:
    """Format scores; those of the corpora of a mix, the entries val/bits_per_byte/NAME, are in parentheses."""
    total, *corpora = [("/".join(name.split("/")[2:]), f"{bits:.4f}") for name, bits in scores.items()]
    each = ", ".join(f"{name} {bits}" for name, bits in corpora)
    return total[1] + (f" ({each})" if each else "")


def format_duration(seconds: float) -> str:
    """Format a duration with one or two units: 12 s, 3 min 20 s, 5 h 10 min, 2 days 3 h."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if days >= 1:
        return f"{int(days)} day{'s' if days >= 2 else ''} {int(hours % 24)} h"
    if hours >= 1:
        return f"{int(hours)} h {int(minutes % 60)} min"
    return f"{int(minutes)} min {int(seconds % 60)} s" if minutes >= 1 else f"{seconds:.0f} s"
