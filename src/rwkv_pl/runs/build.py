"""Builds Lightning's Trainer, the callbacks and the loggers of a config for a run folder."""

import contextlib
import hashlib
import logging
import os
import re
import subprocess
import threading
import warnings
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.profilers import AdvancedProfiler, PassThroughProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.strategies import DDPStrategy

from rwkv_pl.config import UNKNOWN, Train
from rwkv_pl.errors import UserError, one_line
from rwkv_pl.files import json_digest
from rwkv_pl.runs.inputs import Inputs
from rwkv_pl.runs.ranks import current_group
from rwkv_pl.targets import load_class
from rwkv_pl.training.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from rwkv_pl.training.checkpoint_io import DurableCheckpointIO
from rwkv_pl.training.sharded import ShardedStrategy

# The last seconds of trainer.timeout, in which a process reports which other one did not answer.
SECONDS_TO_REPORT = 4

# The metrics of a validation, which callbacks can monitor.


class NoProfiler(PassThroughProfiler):
    """PassThroughProfiler without its generator-based context manager, which about 100 calls in each step enter."""

    _nothing = contextlib.nullcontext()

    def profile(self, action_name: str) -> Any:
        return self._nothing


PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}

# File with the id of MLflow's run and the digest of the logger's settings: a resume with these settings continues it.
MLFLOW_RUN = "mlflow_run"

# Lightning's settings that are fixed by the order of batches and by the length in optimizer steps.
FIXED_TRAINER = {
    "max_epochs": -1,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
}


def build_trainer(inputs: Inputs, folder: Path, callbacks: list[Callback], loggers: list[Logger]) -> Trainer:
    """Build Lightning's Trainer with the config's arguments. Raises UserError for a value that it refuses."""
    arguments = inputs.config.trainer | FIXED_TRAINER | {"max_steps": inputs.max_steps}
    if arguments["accumulate_grad_batches"] == "auto":
        arguments["accumulate_grad_batches"] = inputs.accumulate or 1  # until Start has found the number
    # Lightning counts the interval in micro-batches; in the config, steps are always optimizer steps.
    arguments["val_check_interval"] = inputs.val_check_interval * arguments["accumulate_grad_batches"]
    if arguments["limit_val_batches"]:
        arguments["limit_val_batches"] = 1.0  # the data module limits those of all processes together
    if name := arguments["profiler"]:
        if name not in PROFILERS:
            raise UserError(f"trainer.profiler must be one of {', '.join(PROFILERS)}, got {name}")
        # A profiler chosen by name would only log, at a level that is not shown.
        arguments["profiler"] = PROFILERS[name](dirpath=folder, filename="profile")
    else:
        arguments["profiler"] = NoProfiler()
    if arguments["strategy"] == "ddp":
        # The gradients are views of the buckets in which they are sent, which saves a copy of them.
        arguments["strategy"] = DDPStrategy(gradient_as_bucket_view=True)
    elif arguments["strategy"] == "fsdp":
        arguments["strategy"] = ShardedStrategy(inputs.config.checkpoints.sharded)
    timeout = arguments.pop("timeout")
    timeout = timedelta(seconds=max(timeout - SECONDS_TO_REPORT, timeout / 2))
    plugins: list[Any] = [DurableCheckpointIO()]
    group = current_group()
    if group and not group.by_slurm and not TorchElasticEnvironment.detect():
        plugins.append(LightningEnvironment())  # Lightning would take one task of SLURM as one process
    try:
        trainer = Trainer(
            **arguments,
            callbacks=callbacks,
            logger=loggers,
            plugins=plugins,
            default_root_dir=folder,
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        )
        trainer.strategy._timeout = timeout  # type: ignore[attr-defined]  # strategies of one device do not read it
        return trainer
    except Exception as error:
        message = one_line(error)
        # The first setting that the message names is the one that it is about.
        found = [(match.start(), key) for key in arguments if (match := re.search(rf"\b{key}\b", message))]
        key = min(found)[1] if found else ""
        where = f"trainer.{key}={arguments[key]}: Lightning" if key else "Lightning's Trainer"
        raise UserError(f"{where} refuses {'it' if key else 'its settings'}: {message}") from error


def build_callbacks(config: Train, folder: Path) -> list[Callback]:
    """Build the callbacks of the config, in its order."""
    unit = "token" if config.data.vocab == UNKNOWN else "byte"
    callbacks = []
    for name, arguments in config.callbacks.items():
        if isinstance(monitor := arguments.get("monitor"), str):  # the files of conf/ name bits_per_byte
            arguments = arguments | {"monitor": monitor.replace("bits_per_byte", f"bits_per_{unit}")}
        callbacks.append(_instantiate(f"callbacks.{name}", arguments, folder))
    score = f"val/bits_per_{unit}"
    monitored = [score, "val/loss", *(f"{score}/{name}" for name in config.data.parts() if name)]
    for name, callback in zip(config.callbacks, callbacks, strict=True):
        if getattr(callback, "monitor", None) not in (None, *monitored):
            raise UserError(f"callbacks.{name}.monitor must be one of {', '.join(monitored)}, got {callback.monitor}")
        if getattr(callback, "monitor", None) and getattr(callback, "mode", "min") != "min":
            raise UserError(
                f"callbacks.{name}.mode must be min, got {callback.mode}: {callback.monitor} is better lower"
            )
        if not isinstance(callback, BestCheckpoint | LastCheckpoint):
            continue
        if Path(str(callback.dirpath)).resolve() != (folder / "checkpoints").resolve():
            raise UserError(
                f"callbacks.{name}.dirpath must be checkpoints, which resume= and weights= read: "
                "to move the whole run, use hydra.run.dir=FOLDER"
            )
    return callbacks


def build_loggers(config: Train, folder: Path, resumed_step: int | None) -> list[Logger]:
    """Build the loggers of the config. On a resume, TensorBoard's drops its rows from the resumed step on."""
    loggers = []
    for name, arguments in config.logger.items():
        target = load_class(f"logger.{name}", arguments["_target_"])
        if target is TensorBoardLogger and resumed_step is not None:
            arguments = arguments | {"purge_step": resumed_step}  # MetricsRecorder writes them again
        described = folder / ".hydra" / "hydra.yaml"  # the same after a resume and after the folder was moved
        if target is WandbLogger and described.is_file():
            run_id = hashlib.blake2b(described.read_bytes(), digest_size=8).hexdigest()
            arguments = {"id": run_id, "resume": "allow"} | arguments
        if target is MLFlowLogger:
            if (folder / MLFLOW_RUN).is_file():
                run_id, *digest = (folder / MLFLOW_RUN).read_text().splitlines()
                if digest in ([], [json_digest(arguments)]):  # early runs have only the id
                    arguments = arguments | {"run_id": run_id.strip()}
            if arguments.get("tracking_uri") is None:
                own = f"sqlite:///{(folder / 'mlflow.db').as_posix()}"
                arguments = arguments | {"tracking_uri": os.environ.get("MLFLOW_TRACKING_URI", own)}
        loggers.append(_instantiate(f"logger.{name}", arguments, folder))
    return loggers


def describe_code() -> str:
    """Describe the versions, and the git commit of rwkv_pl's own checkout.

    It never runs git in the working folder, which may be untrusted: git runs programs that a repository's config names.
    """
    versions = f"rwkv_pl {version('rwkv_pl')}, torch {torch.__version__}, lightning {lightning.__version__}"
    checkout = Path(__file__).parents[3]
    if not (checkout / ".git").exists():
        return versions
    git = ["git", "-C", str(checkout)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except OSError:
        return versions
    if commit.returncode:
        return versions
    return f"{versions}, git {commit.stdout.strip()}" + (" with changes" if changes.stdout.strip() else "")


def _instantiate(where: str, arguments: dict[str, Any], folder: Path) -> Any:
    arguments = dict(arguments)
    target = load_class(where, arguments.pop("_target_"))
    try:
        for key in ("dirpath", "save_dir"):
            if arguments.get(key) is not None:
                arguments[key] = str(folder / arguments[key])
        return target(**arguments)
    except Exception as error:
        raise UserError(f"{where} refuses its settings: {one_line(error)}") from error


def silence_lightning() -> None:
    """Silence Lightning's messages that do not apply here or advertise."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        for part in ("", ".utilities.rank_zero"):
            logging.getLogger(name + part).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*treespec, LeafSpec.*",
        ".*Checkpoint directory .* exists.*",
        ".*ended before the epoch ended and your dataloader is not resumable.*",
        ".*recommended to use .*sync_dist=True.*",
        ".*callbacks used to create the checkpoint need to be provided.*",
        ".*is supported for historical reasons.*",  # trainer.precision=16
        ".*AMP with fp16 is not supported on CPU.*",  # choose_matmul_precision refuses that
    ):
        warnings.filterwarnings("ignore", message=message)
    # An OSError in TensorBoard's thread is raised again by its next write.
    threading.excepthook = lambda args: None if args.exc_type is OSError else threading.__excepthook__(args)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
