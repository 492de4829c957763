"""Records the metrics of a run: in metrics.csv, in loss.png and in the loggers."""

import contextlib
import csv
import io
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor

from rwkv_pl.errors import RunError
from rwkv_pl.files import atomic_write, with_path
from rwkv_pl.inference.evaluate import bits_per_byte
from rwkv_pl.training.curve import COLUMNS, columns_of, draw_curve, read_rows
from rwkv_pl.training.loss import count_bytes, split_batch

SECONDS_BETWEEN_DRAWINGS = 30
SHARE_OF_DRAWING = 0.003


class MetricsRecorder(Callback):
    """Writes a row for step 1, for every `trainer.log_every_n_steps`-th optimizer step, and for each validation.

    A row covers one whole step, with all its micro-batches and processes:

    train/loss, train/l2wrap: in nats per token.
    train/grad_norm:          before clipping.
    lr:                       the learning rate of the step.
    tokens, seconds:          since the start of the run; the seconds include training and validation.
    tokens_per_second:        since the last row, without validations and checkpoints.
    model_flops_per_second:   the floating-point operations of the matrix products at that speed.
    mfu:                      model_flops_per_second as a share of `peak`.

    When a run is resumed, the rows after its step are dropped.

    Arguments:

    folder:          the run folder.
    tokens_per_step: batch_size * ctx_len.
    baselines:       bits per byte of other compressors on the validation text, drawn as lines, as in {"gzip -9": 2.0}.
    flops_per_token: of training, forward and backward; None omits model_flops_per_second.
    peak:            the floating-point operations per second of all devices of the run together; None omits mfu.
    passes:          of a mix: the passes over each of its corpora in n steps, by name. Each corpus has the columns
                     val/bits_per_byte/NAME and passes/NAME.
    unit:            "byte"; "token" for ids whose text is not known, whose scores are named val/bits_per_token.

    Attributes: step is that of the checkpoint from which the run was resumed, validated that of the last validation
    recorded in it.
    """

    def __init__(
        self,
        folder: Path,
        tokens_per_step: int,
        baselines: dict[str, float] | None = None,
        flops_per_token: int | None = None,
        peak: float | None = None,
        passes: Callable[[int], dict[str, float]] | None = None,
        unit: str = "byte",
    ) -> None:
        self.folder = folder
        self.tokens_per_step = tokens_per_step
        self.baselines = baselines or {}
        self.flops_per_token, self.peak = flops_per_token, peak
        self.unit, self._passes = unit, passes or (lambda n_steps: {})
        corpora = list(self._passes(0))
        self.scores = [f"val/bits_per_{unit}", *(f"val/bits_per_{unit}/{name}" for name in corpora)]
        self._columns = list(dict.fromkeys([*columns_of(unit), *self.scores, *(f"passes/{name}" for name in corpora)]))
        self.rows: list[dict[str, float]] = []
        self.latest: dict[str, float] = {}
        self.step = self.validated = 0
        self._paused_at: float | None = None
        self._seconds_before = 0.0

    @property
    def state_key(self) -> str:
        return "History"  # the first name of this class, which checkpoints contain

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds(), "validated": self.validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before = state_dict["seconds"]
        self.validated = state_dict.get("validated", self.validated)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.step = checkpoint["global_step"]
        # For early checkpoints, in which StopOnSignal saved whether a validation was pending, not this callback.
        pending = checkpoint["callbacks"].get("StopOnSignal", {}).get("validation_due")
        self.validated = 0 if pending else self.step

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._pause(pl_module)
        # The rows up to a checkpoint's step must be on disk before the checkpoint.
        if file := self.__dict__.get("_file"):
            os.fsync(file.fileno())
            for logger in trainer.loggers:
                with with_path(str(logger.save_dir)):
                    logger.save()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._started = self._drawn = time.perf_counter()
        self._timed_from, self._timed_step = self._started, trainer.global_step
        self._drawing, self._paused_at = 0.0, None
        self._sums: list[Tensor] = []
        if trainer.is_global_zero:
            self.rows = read_rows(self.folder / "metrics.csv", up_to=trainer.global_step)
            here = [row for row in self.rows if row["step"] == trainer.global_step]
            if self.validated != trainer.global_step:  # a validation that no checkpoint has recorded will run again
                here = [row for row in here if "val/loss" not in row]
            self.rows = [row for row in self.rows if row["step"] != trainer.global_step] + here
            for row in here:
                self._log(trainer, row, TensorBoardLogger)  # it has purged all rows of this step
            self._file = _rewrite_csv(self.folder / "metrics.csv", self.rows, self._columns)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Tensor, batch_idx: int) -> None:
        if self._paused_at is not None:
            self._timed_from += time.perf_counter() - self._paused_at
            self._paused_at = None

    def _pause(self, pl_module: Any) -> None:
        """Exclude the time until the next micro-batch from the training speed."""
        if self._paused_at is None:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)  # pending GPU work is part of the training
            self._paused_at = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        ended = not trainer.fit_loop.epoch_loop._should_accumulate()
        step = trainer.global_step + (not ended)  # the step of this micro-batch, counted from 1
        if step % trainer.log_every_n_steps and step != 1:  # type: ignore[attr-defined]
            return
        if ended:
            pl_module.check_finite()  # raises first, so a batch that stops the run gets no row
        _, targets = split_batch(batch)
        n_bytes = count_bytes(targets, pl_module.bytes_per_token)
        self._sums.append(torch.stack([outputs["nats"], outputs["l2wrap"], n_bytes]))
        if not ended:
            return
        tokens_per_micro_batch = targets.numel()
        sums = trainer.strategy.reduce(torch.stack(self._sums).mean(0), reduce_op="mean")
        nats, pull, n_bytes = sums.tolist()
        n_units = n_bytes if self.unit == "byte" else tokens_per_micro_batch
        grad_norm = float(pl_module.grad_norm)
        self._sums = []
        now = time.perf_counter()
        speed = (step - self._timed_step) * self.tokens_per_step / (now - self._timed_from)
        self._write(
            trainer,
            {
                "train/loss": nats,
                f"train/bits_per_{self.unit}": bits_per_byte(nats * tokens_per_micro_batch, n_units),
                "train/l2wrap": pull,
                "train/grad_norm": grad_norm,
                "lr": pl_module.last_lr,
                "tokens_per_second": speed,
                **self._flops_figures(speed),
            },
        )
        self._timed_from, self._timed_step = now, step
        if now - self._drawn > max(SECONDS_BETWEEN_DRAWINGS, self._drawing / SHARE_OF_DRAWING):
            self._draw(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "fit":
            self._pause(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn != "fit":
            return
        self.validated = trainer.global_step
        metrics = trainer.callback_metrics
        passes = {f"passes/{name}": n for name, n in self._passes(trainer.global_step).items()}
        self._write(trainer, {name: float(metrics[name]) for name in ("val/loss", *self.scores)} | passes)
        self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._draw(trainer)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        if isinstance(exception, SystemExit | RunError):  # stopped by a signal, or by a loss of NaN
            self._draw(trainer)
        self._close_file()  # Lightning then calls no teardown, and Windows replaces no open file in a resume

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self._close_file()

    def _close_file(self) -> None:
        if file := self.__dict__.pop("_file", None):
            with contextlib.suppress(OSError):  # a full disk was reported already
                file.close()

    def _flops_figures(self, tokens_per_second: float) -> dict[str, float]:
        if self.flops_per_token is None:
            return {}
        speed = tokens_per_second * self.flops_per_token
        if self.peak is None:
            return {"model_flops_per_second": speed}
        # Other jobs may have slowed the measurement of the peak; a speed that was reached is a lower bound of it.
        self.peak = max(self.peak, speed)
        return {"model_flops_per_second": speed, "mfu": speed / self.peak}

    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._started

    def _write(self, trainer: Trainer, figures: dict[str, float]) -> None:
        step = trainer.global_step
        row = {"step": step, "tokens": step * self.tokens_per_step, "seconds": self._seconds(), **figures}
        self.latest |= row
        if not trainer.is_global_zero:
            return
        self.rows.append(row)
        with with_path(self.folder / "metrics.csv"):
            texts = _append_row(self._file, row, self._columns)
        # As in the file, from which a resume logs the rows again that a killed process had not yet written to a logger.
        self._log(trainer, {name: float(text) for name, text in texts.items()})

    @staticmethod
    def _log(trainer: Trainer, row: dict[str, float], to: type[Logger] = Logger) -> None:
        metrics = {name: value for name, value in row.items() if name != "step"}
        for logger in (logger for logger in trainer.loggers if isinstance(logger, to)):
            with with_path(str(logger.save_dir)):
                logger.log_metrics(metrics, step=int(row["step"]))

    def _draw(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and self.rows:
            began = time.perf_counter()
            draw_curve(self.rows, self.folder / "loss.png", self.baselines)
            self._drawn = time.perf_counter()
            self._drawing = self._drawn - began


def _rewrite_csv(path: Path, rows: list[dict[str, float]], columns: Sequence[str] = COLUMNS) -> Any:
    """Write the remaining rows, and return the file, open for appending."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(_format_row(row) for row in rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
    return path.open("a", newline="", encoding="utf-8")


def _append_row(file: Any, row: dict[str, float], columns: Sequence[str] = COLUMNS) -> dict[str, str]:
    """Write a row, and return its texts."""
    texts = _format_row(row)
    csv.DictWriter(file, columns).writerow(texts)
    file.flush()
    return texts


def _format_row(row: dict[str, float]) -> dict[str, str]:
    return {name: str(int(value)) if name in ("step", "tokens") else f"{value:.9g}" for name, value in row.items()}
