"""A run from top to bottom: inputs, folder, Trainer, fit, result."""

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra._internal.callbacks import Callbacks
from hydra.core.utils import run_job
from hydra.types import HydraContext
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger
from omegaconf import DictConfig, open_dict

from rwkv_pl.compose import compose
from rwkv_pl.config import Train
from rwkv_pl.data.order import micro_batch_rows
from rwkv_pl.errors import UserError, one_line
from rwkv_pl.files import atomic_write, with_path
from rwkv_pl.limits import limit_threads
from rwkv_pl.ops.heap import keep_freed_memory
from rwkv_pl.runs import build, ranks
from rwkv_pl.runs.device import choose_kernel, choose_matmul_precision
from rwkv_pl.runs.folder import lock_for_all_ranks, run_folder, write_config, write_overrides
from rwkv_pl.runs.inputs import Inputs, open_inputs, open_stored
from rwkv_pl.runs.outcome import Record, to_run_error, write_result
from rwkv_pl.runs.start import Start
from rwkv_pl.runs.stored import StoredRun
from rwkv_pl.terminal import SWEEP_JOB_ENV
from rwkv_pl.training.callbacks.metrics import MetricsRecorder
from rwkv_pl.training.callbacks.pending_validation import PendingValidation
from rwkv_pl.training.callbacks.progress import TrainingProgress, format_duration
from rwkv_pl.training.callbacks.pruning import PruneTrial
from rwkv_pl.training.callbacks.sample_text import sample_tokens
from rwkv_pl.training.callbacks.signals import StopOnSignal

log = logging.getLogger("rwkv_pl")


def start(config: Train, composed: DictConfig, typed: bool) -> None:
    """Start a new run. typed: whether the user named its folder."""
    prepare_process(config)
    inputs = open_inputs(config, Path.cwd())
    with run_folder(Path(composed.hydra.run.dir).absolute(), typed) as folder:
        record = Record(folder, lambda: write_overrides(folder, composed))
        run_in(folder, composed, lambda: run(inputs, folder, record), described=False)


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
        inputs.remarks += [f"changed {key} = {value}" for key, value in entry["set"].items()]
        inputs.remarks += [f"changed {key} is removed" for key in entry["remove"]]
        # Hydra's part is composed anew, because a stored hydra.yaml could name any class for logging.
        record = Record(folder, lambda: stored.append_resume(entry))
        run_in(folder, compose(hydra_overrides), lambda: run(inputs, folder, record, resumed=True))


def run(inputs: Inputs, folder: Path, record: Record, resumed: bool = False) -> None:
    """Train in the run folder and write result.json. A sweep minimises its objective, the best bits per byte.

    resumed: whether the folder is that of an earlier run, which continues or starts again.
    """
    config, data = inputs.config, inputs.data
    metrics = MetricsRecorder(folder, config.data.batch_size * config.data.ctx_len)
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
    choose_kernel(config.kernel, device)
    ranks.check_world_size(trainer.world_size)
    micro_batch_rows(
        config.data.batch_size, world_size=trainer.world_size, rank=0, accumulate=accumulate, micro_batch=0
    )
    if trainer.is_global_zero:
        with atomic_write(folder / "vocab.json") as file:
            file.write(json.dumps(data.vocabulary.to_dict()).encode())
        if not resumed:
            start_loggers(trainer, config, folder)
    with record, ranks.share_answers():
        started = time.perf_counter()
        try:
            trainer.fit(inputs.module, data, ckpt_path=inputs.resume_from, weights_only=True)
        except Exception as error:
            if isinstance(error, UserError) and not record.has_started:
                raise
            system = isinstance(error, OSError | MemoryError | torch.OutOfMemoryError)
            if inputs.resume_from and not record.has_started and not system:
                reason = one_line(error)[:200]
                raise UserError(f"{inputs.resume_from} does not fit this run ({reason}): it is corrupt") from error
            raise to_run_error(error, folder, record.has_started) from error
        if trainer.is_global_zero:
            try:
                conclude(trainer, inputs, metrics, folder, time.perf_counter() - started)
            except KeyboardInterrupt as error:
                raise KeyboardInterrupt("stopped after the last step: the checkpoints are complete") from error


def conclude(trainer: Trainer, inputs: Inputs, metrics: MetricsRecorder, folder: Path, seconds: float) -> None:
    """Print a sample of text, the score next to gzip's and the paths of the results; write result.json."""
    data, module = inputs.data, inputs.module
    try:
        tokens = sample_tokens(module.model, [data.vocabulary.document_end], 400, inputs.config.seed)
        written = data.vocabulary.decode(tokens)
        with atomic_write(folder / "sample.txt") as file:
            file.write(written)
        if SWEEP_JOB_ENV not in os.environ:
            log.info(f"sample  (400 tokens, also in sample.txt)\n{_printable(written).rstrip()}\n")
    except FloatingPointError as error:
        log.info(f"sample  none: {error}")
    log.info(f"trained {trainer.global_step - inputs.done_steps:,} steps in {format_duration(seconds)}")
    if "val/bits_per_byte" in metrics.latest:
        figures = {"this model": metrics.latest["val/bits_per_byte"], **metrics.baselines}
        scores = ", ".join(f"{name} {bits:.4f}" for name, bits in figures.items())
        log.info(f"result  bits per byte of {data.corpus}, validation split:\n        {scores}")
    for title, path in (("curve", "loss.png"), ("weights", "checkpoints"), ("profile", "fit-profile.txt")):
        if (folder / path).exists():
            log.info(f"{title:7} {folder / path}")
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    best = [c.best_model_score for c in callbacks if isinstance(c, ModelCheckpoint) and c.best_model_score is not None]
    write_result(
        folder,
        status="pruned" if any(getattr(callback, "pruned", False) for callback in callbacks) else "finished",
        ended=module.finish_reason(),
        objective=float(best[0]) if best else float("nan"),
        step=trainer.global_step,
        seconds=metrics.latest.get("seconds"),
    )


def start_loggers(trainer: Trainer, config: Train, folder: Path) -> None:
    """Log the settings. Raises UserError for a logger that can't start, for example without an account or a server."""
    for logger in trainer.loggers:
        try:
            logger.log_hyperparams(config.hyperparameters() | {"code": build.describe_code()})
            if isinstance(logger, MLFlowLogger):
                (folder / build.MLFLOW_RUN).write_text(str(logger.run_id))
        except OSError:
            raise
        except Exception as error:
            name = type(logger).__name__
            hint = "; logger.wandb.offline=true needs no account" if name == "WandbLogger" else ""
            raise UserError(f"{name} can't start: {one_line(error)[:300]}{hint}") from error


def prepare_process(config: Train) -> None:
    """Set up the process: memory allocation, threads, Lightning's messages. Checks the number of processes."""
    build.silence_lightning()
    keep_freed_memory()
    devices = config.trainer["devices"]
    known = isinstance(devices, int) and devices > 0
    if known:  # before the run folder: rank 0 would remove it while another rank opens its log there
        ranks.check_world_size(devices * config.trainer["num_nodes"])
    limit_threads(devices if known else 1)


def run_in(folder: Path, composed: DictConfig, task: Callable[[], None], described: bool = True) -> None:
    """Run `task` as Hydra runs a job: log to the screen and train.log, and set HydraConfig, which Lightning reads.

    described: whether the folder already has its .hydra/.
    """
    with open_dict(composed):
        composed.hydra.run.dir = composed.hydra.runtime.output_dir = str(folder)
        composed.hydra.job.name = ranks.log_name() or composed.hydra.job.name
    if not described and ranks.is_first_process():
        write_config(folder, composed)
    with open_dict(composed):
        composed.hydra.output_subdir = None  # else Hydra writes overrides.yaml now, which marks the run as started
    context = HydraContext(config_loader=None, callbacks=Callbacks(composed))  # type: ignore[arg-type]
    try:
        with with_path(folder):
            try:
                ended = run_job(lambda _: task(), composed, "hydra.run.dir", None, context)
            except ValueError as error:  # not from the task, whose errors run_job returns
                raise UserError(f"hydra.job_logging is invalid: {one_line(error.__cause__ or error)}") from error
            if isinstance(ended._return_value, Exception):
                raise ended._return_value
    finally:
        root = logging.getLogger()
        for handler in [handler for handler in root.handlers if isinstance(handler, logging.FileHandler)]:
            root.removeHandler(handler)  # a closed handler opens its file again
            handler.close()  # Windows can't remove an open file


def _printable(text: bytes) -> str:
    """Decode text for a terminal: a model that has learned little generates control characters too."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text.decode(errors="replace"))
