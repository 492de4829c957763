"""A run from top to bottom: inputs, folder, Trainer, fit, result."""

import gc
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from hydra._internal.callbacks import Callbacks
from hydra.core.utils import run_job
from hydra.types import HydraContext
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from omegaconf import DictConfig, open_dict
from torch import nn

from rwkv_pl.compose import compose
from rwkv_pl.config import Train
from rwkv_pl.data.order import micro_batch_rows
from rwkv_pl.errors import RunError, StoppedBySignal, UserError, one_line
from rwkv_pl.files import atomic_write, json_digest, with_path
from rwkv_pl.limits import limit_threads
from rwkv_pl.ops.heap import tune_allocator
from rwkv_pl.runs import agreement, build, processes, rank_errors, ranks
from rwkv_pl.runs.device import choose_kernel, choose_matmul_precision
from rwkv_pl.runs.folder import lock_for_all_ranks, run_folder, write_config, write_overrides
from rwkv_pl.runs.inputs import Inputs, open_inputs, open_stored
from rwkv_pl.runs.outcome import Record, resume_hint, to_run_error, write_result
from rwkv_pl.runs.start import Start
from rwkv_pl.runs.stored import StoredRun
from rwkv_pl.terminal import (
    BAD_INPUT,
    FAILED,
    STOPPED_AT_END,
    STOPPED_AT_START,
    SWEEP_JOB_ENV,
    is_called_from_python,
)
from rwkv_pl.training.callbacks.metrics import MetricsRecorder
from rwkv_pl.training.callbacks.pending_validation import PendingValidation
from rwkv_pl.training.callbacks.progress import TrainingProgress, format_duration, format_scores
from rwkv_pl.training.callbacks.pruning import PruneTrial
from rwkv_pl.training.callbacks.sample_text import sample_tokens
from rwkv_pl.training.callbacks.signals import StopOnSignal
from rwkv_pl.training.curve import read_rows

log = logging.getLogger("rwkv_pl")


def start(config: Train, composed: DictConfig, typed: bool) -> Path:
    """Start a new run and return its folder. typed: whether the user named the folder."""
    prepare_process(config)
    inputs = open_inputs(config, Path.cwd())
    with run_folder(Path(composed.hydra.run.dir).absolute(), typed) as folder:
        record = Record(folder, lambda: write_overrides(folder, composed))
        run_in(folder, composed, lambda: run(inputs, folder, record), described=False)
    return folder


def resume(stored: StoredRun, config: Train, entry: dict[str, Any], hydra_overrides: list[str]) -> None:
    """Resume a run. config, entry: see StoredRun.apply_overrides."""
    prepare_process(config)
    folder = stored.folder
    with lock_for_all_ranks(folder):
        inputs = open_stored(config, stored)
        if message := inputs.finish_message(settings=bool(entry["overrides"])):
            if ranks.is_first_process():
                print(f"{folder} is finished, {message}")
            return
        read_rows(folder / "metrics.csv", up_to=inputs.done_steps)  # raises UserError before anything is written
        inputs.remarks += [f"changed {key} = {value}" for key, value in entry["set"].items()]
        inputs.remarks += [f"changed {key} is removed" for key in entry["remove"]]
        # Hydra's part is composed anew, because a stored hydra.yaml could name any class for logging.
        record = Record(folder, lambda: stored.append_resume(entry))
        run_in(folder, compose(hydra_overrides), lambda: run(inputs, folder, record, resumed=True))


def run(inputs: Inputs, folder: Path, record: Record, resumed: bool = False) -> None:
    """Train in the run folder and write result.json. A sweep minimises its objective, the best bits per byte.

    resumed: whether the folder is that of an earlier run, which continues or starts again.
    """
    config = inputs.config
    data = inputs.data
    metrics = MetricsRecorder(
        folder,
        config.data.batch_size * config.data.ctx_len,
        passes=data.passes if data.corpus_names else None,
        unit=data.unit,
    )
    progress = [TrainingProgress(metrics)] if config.trainer["enable_progress_bar"] else []
    # A trial that its user resumes is an ordinary run: the study keeps the figure of the sweep's job.
    trial = [PruneTrial(folder)] if SWEEP_JOB_ENV in os.environ and (folder / "trial.json").exists() else []
    first = [Start(inputs, metrics, record), metrics, *progress, *trial]
    callbacks = [*first, *build.build_callbacks(config, folder), StopOnSignal(), PendingValidation(metrics)]
    if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        names = ",".join(["default", *config.callbacks])
        inputs.remarks.append(f"warning: this run saves no checkpoint: add default, as in 'callbacks=[{names}]'")
    loggers = build.build_loggers(config, folder, max(inputs.done_steps, 1) if resumed else None)
    trainer = build.build_trainer(inputs, folder, callbacks, loggers)

    device, accumulate = trainer.strategy.root_device, trainer.accumulate_grad_batches
    choose_matmul_precision(config, device)
    choose_kernel(config.kernel, device, config.model.name)
    ranks.check_world_size(trainer.world_size)
    micro_batch_rows(
        config.data.batch_size, world_size=trainer.world_size, rank=0, accumulate=accumulate, micro_batch=0
    )
    with _closed_events(loggers):
        _fit(trainer, inputs, metrics, folder, record, resumed)


def _fit(
    trainer: Trainer, inputs: Inputs, metrics: MetricsRecorder, folder: Path, record: Record, resumed: bool
) -> None:
    if trainer.is_global_zero:
        with atomic_write(folder / "vocab.json") as file:
            file.write(json.dumps(inputs.data.vocabulary.to_dict()).encode())
        start_loggers(trainer, inputs.config, folder, resumed)
    with _describe_stop(record), record:
        if trainer.is_global_zero:
            rank_errors.remove_old(folder)
        agreement.confirm_ready()
        started = time.perf_counter()
        try:
            trainer.fit(inputs.module, inputs.data, ckpt_path=inputs.resume_from, weights_only=True)
        except Exception as error:
            processes.stop_watching()
            if trainer.world_size > 1:
                reason = rank_errors.explain(trainer, folder, error, inputs.config.trainer["timeout"])
                if reason:
                    raise RunError(f"{reason}; {resume_hint(folder)}" if record.has_started else reason) from error
                if not trainer.is_global_zero and not is_called_from_python():  # another process prints the error
                    is_input = isinstance(error, UserError) and not record.has_started
                    raise SystemExit(BAD_INPUT if is_input else FAILED) from error
            if isinstance(error, UserError) and not record.has_started:
                raise
            system = isinstance(error, OSError | MemoryError | torch.OutOfMemoryError)
            if inputs.resume_from and not record.has_started and not system:
                reason = one_line(error)[:200]
                raise UserError(f"{inputs.resume_from} does not fit this run ({reason}): it is corrupt") from error
            raise to_run_error(error, folder, record.has_started) from error
        model = inputs.module.whole_model()
        if model is not None and trainer.is_global_zero:
            try:
                conclude(trainer, model, inputs, metrics, folder, time.perf_counter() - started)
            except KeyboardInterrupt as error:
                raise KeyboardInterrupt(STOPPED_AT_END) from error


@contextmanager
def _closed_events(loggers: list[Logger]) -> Iterator[None]:
    """Close TensorBoard's files at the end: Windows does not delete an open file after a failed start."""
    try:
        yield
    finally:
        for logger in loggers:
            if isinstance(logger, TensorBoardLogger) and logger._experiment is not None:
                with suppress(OSError):  # a full disk was reported already
                    logger._experiment.close()


@contextmanager
def _describe_stop(record: Record) -> Iterator[None]:
    """Give a signal outside of the training, for which StopOnSignal has no message, its message."""
    try:
        yield
    except StoppedBySignal as stop:
        stop.message = stop.message or (STOPPED_AT_END if record.has_started else STOPPED_AT_START)
        raise


def conclude(
    trainer: Trainer, model: nn.Module, inputs: Inputs, metrics: MetricsRecorder, folder: Path, seconds: float
) -> None:
    """Print a sample of text, the score next to gzip's and the paths of the results; write result.json."""
    data, module = inputs.data, inputs.module
    try:
        tokens = sample_tokens(model, [data.vocabulary.document_end], 400, inputs.config.seed)
        written = data.vocabulary.decode(tokens)
        with atomic_write(folder / "sample.txt", keep=True) as file:
            file.write(written)
        if SWEEP_JOB_ENV not in os.environ:
            log.info(f"sample  (400 tokens, also in sample.txt)\n{_printable(written).rstrip()}\n")
    except FloatingPointError as error:
        log.info(f"sample  none: {error}")
    log.info(f"trained {trainer.global_step - inputs.done_steps:,} steps in {format_duration(seconds)}")
    found = {name: metrics.latest[name] for name in metrics.scores if name in metrics.latest}
    if found:
        others = [f"{name} {bits:.4f}" for name, bits in metrics.baselines.items()]
        scores = ", ".join([f"this model {format_scores(found)}", *others])
        texts = ",\n        ".join(map(str, data.corpora.values()))
        log.info(f"result  bits per {data.unit} of {texts}, validation split:\n        {scores}")
    score = f"val/bits_per_{data.unit}"
    each = {name: found.get(f"{score}/{name}") for name in data.corpus_names}
    if each:
        log.info(f"passes  {inputs.describe_passes(trainer.global_step)}")
    for title, path in (("curve", "loss.png"), ("weights", "checkpoints"), ("profile", "fit-profile.txt")):
        if (folder / path).exists():
            log.info(f"{title:7} {folder / path}")
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    # From the rows, since a callback can keep other scores. In float32, as Lightning's scores: the file has 9 digits.
    bits = [row[score] for row in metrics.rows if score in row]
    best = torch.tensor(bits).nan_to_num(nan=math.inf, posinf=math.inf).min().item() if bits else math.nan
    write_result(
        folder,
        status="pruned" if any(getattr(callback, "pruned", False) for callback in callbacks) else "finished",
        ended=module.finish_reason(),
        objective=best,
        step=trainer.global_step,
        seconds=metrics.latest.get("seconds"),
        **({"unit": data.unit} if data.unit != "byte" else {}),
        **({"corpora": each, "passes": data.passes(trainer.global_step)} if each else {}),
    )


def start_loggers(trainer: Trainer, config: Train, folder: Path, resumed: bool) -> None:
    """Log the settings, on a resume only to a new run of MLflow. Raises UserError for a logger that can't start, for
    example without an account or a server."""
    for logger, arguments in zip(trainer.loggers, config.logger.values(), strict=True):
        if resumed and not (isinstance(logger, MLFlowLogger) and logger._run_id is None):
            continue
        try:
            logger.log_hyperparams(config.hyperparameters() | {"code": build.describe_code()})
            if isinstance(logger, MLFlowLogger):
                (folder / build.MLFLOW_RUN).write_text(f"{logger.run_id}\n{json_digest(arguments)}\n")
        except OSError:
            raise
        except Exception as error:
            name = type(logger).__name__
            hint = "; logger.wandb.offline=true needs no account" if name == "WandbLogger" else ""
            raise UserError(f"{name} can't start: {one_line(error)[:300]}{hint}") from error


def prepare_process(config: Train) -> None:
    """Wait for the other processes of the run, and set up memory allocation, threads and Lightning's messages."""
    build.silence_lightning()
    tune_allocator()
    devices = processes.count_devices(config.trainer)
    agreement.join(devices * config.trainer["num_nodes"], config.trainer["timeout"])
    limit_threads(devices)


def run_in(folder: Path, composed: DictConfig, task: Callable[[], None], described: bool = True) -> None:
    """Run `task` as Hydra runs a job: log to the screen and train.log, and set HydraConfig, which Lightning reads.

    described: whether the folder already has its .hydra/.
    """
    with open_dict(composed):
        composed.hydra.run.dir = composed.hydra.runtime.output_dir = str(folder)
        if not ranks.is_first_process():  # rank 0 writes the log, and prints
            silent = {"version": 1, "disable_existing_loggers": False, "root": {"level": "CRITICAL"}}
            composed.hydra.job_logging = silent
    if not described and ranks.is_first_process():
        write_config(folder, composed)
    with open_dict(composed):
        composed.hydra.output_subdir = None  # else Hydra writes overrides.yaml now, which marks the run as started
    before = list(logging.getLogger().handlers)
    context = HydraContext(config_loader=None, callbacks=Callbacks(composed))  # type: ignore[arg-type]
    try:
        with with_path(folder):
            invalid = ""
            try:
                ended = run_job(lambda _: task(), composed, "hydra.run.dir", None, context)
            except ValueError as error:  # not from the task, whose errors run_job returns
                invalid = one_line(error.__cause__ or error)
            if invalid:
                gc.collect()  # the failed configuration, a cycle, holds the log open, and Windows removes no open file
                raise UserError(f"hydra.job_logging is invalid: {invalid}")
            if isinstance(ended._return_value, Exception):
                raise ended._return_value
    finally:
        root = logging.getLogger()
        for handler in [handler for handler in root.handlers if isinstance(handler, logging.FileHandler)]:
            if handler in before:
                continue
            root.removeHandler(handler)  # a closed handler opens its file again
            handler.close()  # Windows can't remove an open file


def _printable(text: bytes) -> str:
    """Decode text for a terminal: a model that has learned little generates control characters too."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text.decode(errors="replace"))
