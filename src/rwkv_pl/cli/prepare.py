"""All of a run that can fail on bad input, done before there is a run folder."""

import contextlib
import hashlib
import logging
import lzma
import os
import subprocess
import tempfile
import threading
import warnings
import zlib
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import lightning
import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.profilers import AdvancedProfiler, PassThroughProfiler, PyTorchProfiler, SimpleProfiler
from torch import nn

from rwkv_pl.cli.app import load_target, one_line
from rwkv_pl.cli.ranks import check_world_size, first_decides
from rwkv_pl.config import Train, UserError
from rwkv_pl.data.datamodule import DataModule, EvalBatches, open_data
from rwkv_pl.data.order import micro_batch_rows
from rwkv_pl.data.vocabulary import Vocabulary, read_vocabulary
from rwkv_pl.limits import use_usable_cores
from rwkv_pl.model import MODELS
from rwkv_pl.ops.backend import use_kernel
from rwkv_pl.ops.heap import keep_freed_memory
from rwkv_pl.ops.wkv4 import wkv4
from rwkv_pl.training.checkpoints import BestCheckpoint, DurableCheckpointIO, LastCheckpoint
from rwkv_pl.training.compiled import compile_blocks
from rwkv_pl.training.footprint import Footprint, accumulation_that_fits, footprint, in_units
from rwkv_pl.training.module import LitRWKV
from rwkv_pl.training.optim import check_schedule
from rwkv_pl.training.precision import in_words, product_rates
from rwkv_pl.training.resume import agree, owes_validation, read_own, try_on
from rwkv_pl.weights.metadata import Metadata
from rwkv_pl.weights.read import read_weights
from rwkv_pl.weights.tensors import Weights

# Compressing more would keep the user waiting for a figure that is only there to compare with.
BASELINE_BYTES = 4_000_000

# What a validation reports, and callbacks can watch.
MONITORED = ("val/bits_per_byte", "val/loss")


class NoProfiler(PassThroughProfiler):
    """Lightning's, which makes a context by a generator for each of a hundred calls a step, to do nothing in it."""

    _nothing = contextlib.nullcontext()

    def profile(self, action_name: str) -> Any:
        return self._nothing


PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}

# Where the name of MLflow's run is kept, which a resume goes on with.
MLFLOW_RUN = "mlflow_run"

# Lightning's own settings that the order of batches, and the length in optimizer steps, leave no choice about.
FIXED_TRAINER = {
    "max_epochs": -1,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
}


@dataclass
class Prepared:
    """What a run is made of."""

    config: Train
    data: DataModule
    module: LitRWKV
    max_steps: int
    baselines: dict[str, float]
    resume_from: Path | None
    done_steps: int
    ended: str | None
    owes_validation: bool
    cost: Footprint
    remarks: list[str] = field(default_factory=list)
    """What the user should know of it, told where the run begins."""

    def over(self, settings: bool) -> str | None:
        """How the run that is resumed has ended, in words; None where something is left to do.

        settings: are other ones given than it had? They may prolong a run that something else ended than its length.
        """
        after = f"after {self.done_steps:,} steps"
        if self.ended and 0 < self.max_steps <= self.done_steps:
            return f"{after}; a trainer.max_steps above that prolongs it"
        if self.ended == "pruned" and not settings:
            return f"pruned {after}"
        if self.ended in ("time", "early stop") and not settings:
            by = "trainer.max_time" if self.ended == "time" else "an early stop"
            return f"by {by}, {after}; another setting of it prolongs it"
        return None

    def length(self) -> str:
        """How long the run is, in words."""
        passes = f"1 pass is {self.data.steps_per_pass:,} steps"
        if self.max_steps < 0:
            return f"until trainer.max_time ({passes})"
        tokens = self.max_steps * self.config.data.batch_size * self.config.data.ctx_len
        done = f", of which {self.done_steps:,} are done" if self.done_steps else ""
        return f"{self.max_steps:,} steps, {tokens:,} tokens{done} ({passes})"


def prepare(config: Train, cwd: Path, resume_from: Path | None) -> Prepared:
    """Opens corpus and weights, and tries the settings out. Relative paths count from `cwd`. Raises UserError."""
    _quiet()
    keep_freed_memory()
    devices = config.trainer["devices"]
    use_usable_cores(devices if isinstance(devices, int) and devices > 0 else 1)
    done_steps, ended, owes, loaded, vocabulary = 0, None, False, None, None
    content = read_own(resume_from) if resume_from else None
    resumed = Metadata.from_checkpoint(content, resume_from) if content and resume_from else None
    if content and resumed:
        done_steps, ended = content["global_step"], resumed.finished
        vocabulary = Vocabulary.from_dict(resumed.vocabulary or {})
        owes = owes_validation(content)
    elif config.weights:
        loaded = read_weights(cwd / config.weights)
        vocabulary = loaded.vocabulary
        if vocabulary and vocabulary.kind != config.data.vocab:
            raise UserError(
                f"weights={config.weights} was trained with data.vocab={vocabulary.kind}, "
                f"the config has {config.data.vocab}: give data.vocab={vocabulary.kind} too"
            )
        if vocabulary and config.data.vocab_path and read_vocabulary(cwd / config.data.vocab_path) != vocabulary:
            raise UserError(
                f"data.vocab_path={config.data.vocab_path} is not the tokenizer that weights={config.weights} was "
                "trained with, which it holds: leave it out"
            )
    data = open_data(config.data, config.seed, cwd, vocabulary)
    data.prepare_data()
    data.setup("fit")
    past = {
        "corpus": data.corpus.digest,
        "seed": config.seed,
        "data.batch_size": config.data.batch_size,
        "data.ctx_len": config.data.ctx_len,
        "data.split": [list(split) for split in data.corpus.splits],
        "model.name": config.model.name,
        "model.n_layer": config.model.n_layer,
        "model.n_embd": config.model.n_embd,
    }
    if resumed and resume_from:
        agree(resumed, past, resume_from)
    max_steps = run_length(config, data.steps_per_pass)
    if 0 < max_steps < done_steps and ended is None:
        raise UserError(f"the run is at step {done_steps:,} already, behind which {max_steps:,} steps would end it")
    check_schedule(config.schedule, max_steps)
    load_target("optim", config.optim._target_)
    module = LitRWKV(
        build_model(config, data.vocabulary.size, loaded),
        config.optim,
        config.schedule,
        seed=config.seed,
        vocabulary=data.vocabulary.to_dict(),
        bytes_per_token=torch.from_numpy(data.vocabulary.bytes_per_token) if data.vocabulary.size > 256 else None,
        past=past,
        loss_chunk_len=config.loss_chunk_len,
        skip_nonfinite=config.skip_nonfinite,
    )
    # Built for their errors, here where no folder is made yet; the run builds its own.
    optimizer = module.configure_optimizers()
    if content and resume_from:
        try_on(content, module, optimizer, resume_from)
    choose_accelerator(config)
    comparison = choose_precision(config, resumed.precision if resumed else None)
    with tempfile.TemporaryDirectory() as nowhere:
        callbacks, loggers = build_callbacks(config, Path(nowhere)), build_loggers(config, Path(nowhere), None)
        trial = build_trainer(config, Path(nowhere), max_steps, callbacks, loggers)
    device = trial.strategy.root_device
    choose_products(config, device)
    choose_kernel(config.kernel, device)
    module.model.activation_checkpointing = config.activation_checkpointing
    cost = footprint(trial.precision_plugin.convert_module(module.to(device)), trial.precision_plugin)
    found = None
    if config.trainer["accumulate_grad_batches"] == "auto":
        before = resumed.accumulate if resumed else None
        found = config.trainer["accumulate_grad_batches"] = before or _accumulation(config, module, cost, trial)
    accumulate = config.trainer["accumulate_grad_batches"]
    check_world_size(trial.world_size)
    micro_batch_rows(config.data.batch_size, world_size=trial.world_size, rank=0, accumulate=accumulate, micro_batch=0)
    limit = config.trainer["limit_val_batches"]
    if limit and not _validation_batches(config, data):
        raise UserError(f"trainer.limit_val_batches={limit} is less than one of the validation's batches")
    try:
        data.train_dataloader().dataset[0]
    except MemoryError as error:
        raise UserError(f"data.batch_size={config.data.batch_size}: one batch does not fit in the memory") from error
    remarks = [f"weights {loaded.path}:\n        {loaded}"] if loaded else []
    if device.type not in ("cpu", "cuda"):
        remarks.append(f"device  {device.type} is untested: nothing of rwkv_pl has run there")
    remarks += [comparison] if comparison else []
    if found:
        remarks.append(f"batch   of {config.data.batch_size} as {found} micro-batches: accumulate_grad_batches=auto")
    if config.compile:
        rows = config.data.batch_size // (trial.world_size * accumulate)
        remarks.append(compile_blocks(module, rows, config.data.ctx_len, trial.precision_plugin))
    return Prepared(
        config, data, module, max_steps, _baselines(config, data), resume_from, done_steps, ended, owes, cost, remarks
    )


def _accumulation(config: Train, module: LitRWKV, cost: Footprint, trial: Trainer) -> int:
    rows, left = divmod(config.data.batch_size, trial.world_size)
    if left:
        return 1  # which is refused next
    found = accumulation_that_fits(module, cost, rows, config.data.ctx_len, trial.precision_plugin)
    if found is None:
        raise UserError(
            f"trainer.accumulate_grad_batches=auto: not even one sequence fits the memory, it takes about "
            f"{in_units(cost.bytes(config.data.ctx_len))}: a smaller model or data.ctx_len"
        )
    return found


def build_model(config: Train, vocab_size: int, loaded: Weights | None) -> nn.Module:
    """The config's model, initialised by the seed or with the weights of `loaded`. Raises UserError on a mismatch."""
    model_class, config_class = MODELS[config.model.name]
    here = config_class(vocab_size=vocab_size, **{key: v for key, v in vars(config.model).items() if key != "name"})
    if loaded:
        there = loaded.config
        if (there.n_layer, there.n_embd) != (here.n_layer, here.n_embd):
            raise UserError(
                f"weights={config.weights} are of {there.n_layer} x {there.n_embd}, the config has {here.n_layer} x "
                f"{here.n_embd}: give model.n_layer={there.n_layer} model.n_embd={there.n_embd} too"
            )
        if there.vocab_size != here.vocab_size:
            raise UserError(
                f"weights={config.weights} know {there.vocab_size:,} tokens, data.vocab={config.data.vocab} has "
                f"{here.vocab_size:,}: give the data.vocab that they were trained with"
            )
    torch.manual_seed(config.seed)
    model = model_class(here)
    if loaded:
        model.load_state_dict(loaded.tensors)
    return model


def choose_accelerator(config: Train) -> None:
    """`auto` is a CUDA GPU if there is one, else the CPU: Lightning's would also be a device that is untested here."""
    if config.trainer["accelerator"] == "auto":
        config.trainer["accelerator"] = "cuda" if torch.cuda.is_available() else "cpu"


def choose_precision(config: Train, kept: str | None) -> str | None:
    """`auto` is bf16-mixed if that is faster on the device, else 32-true. Returns a line for the user, or None.

    kept: what a run that goes on has had so far, which `auto` keeps.
    """
    trainer = config.trainer
    asked = trainer["precision"]
    if asked == "auto" and kept:
        asked = trainer["precision"] = kept
    on_gpu = trainer["accelerator"] in ("cuda", "gpu") and torch.cuda.is_available()
    if asked != "auto" and (on_gpu or not str(asked).startswith("bf16")):
        return None
    device = torch.device("cuda" if on_gpu else "cpu")
    choose_products(config, device)
    tokens = config.data.batch_size * config.data.ctx_len

    def measure() -> str:
        rates = product_rates(device, tokens, config.model.n_embd)
        return repr(rates[torch.bfloat16] / rates[torch.float32])

    speedup = float(first_decides("bf16_speedup", measure))
    comparison = f"bf16 products are {in_words(speedup)} in float32 on this {device.type.upper()}"
    if asked == "auto":
        trainer["precision"] = "bf16-mixed" if speedup > 1 else "32-true"
        return f"precision {trainer['precision']}: {comparison} (trainer.precision=auto)"
    return f"precision {asked}: {comparison}; 32-true would be faster" if speedup < 1 else None


def choose_products(config: Train, device: torch.device) -> None:
    """Of float32's products on a GPU. Raises UserError for a trainer.precision that the device does not have."""
    if device.type == "cpu" and str(config.trainer["precision"]) in ("16-mixed", "16"):
        raise UserError("trainer.precision=16-mixed needs a GPU; use trainer.precision=auto on a CPU")
    if device.type == "cuda":
        # Elsewhere it would round as well: on a CPU to bfloat16 or tf32, by oneDNN.
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")


def choose_kernel(name: str, device: torch.device) -> None:
    """`use_kernel`, and the kernel is built where that is still to be done. Raises UserError where it can't be."""
    use_kernel(name)
    one = torch.zeros(1, 1, 1, device=device)
    try:
        wkv4(one[0, 0], one[0, 0], one, one)
    except RuntimeError as error:
        raise UserError(f"kernel={name}: {one_line(error)}") from error


def run_length(config: Train, steps_per_pass: int) -> int:
    """Optimizer steps of the run: the earlier of max_steps and max_epochs passes; -1 where max_time alone ends it."""
    max_steps, max_epochs = config.trainer["max_steps"], config.trainer["max_epochs"]
    if max_steps == -1 and max_epochs is None and config.trainer["max_time"] is None:
        max_epochs = 1
    lengths = [max_steps] if max_steps > 0 else []
    if max_epochs is not None and max_epochs > 0:
        lengths.append(max_epochs * steps_per_pass)
    if not lengths and config.trainer["max_time"] is None:
        raise UserError("the run has no end: give trainer.max_steps, trainer.max_epochs or trainer.max_time")
    return min(lengths, default=-1)


def build_trainer(
    config: Train, folder: Path, max_steps: int, callbacks: list[Callback], loggers: list[Logger] | bool
) -> Trainer:
    """Lightning's Trainer with the config's arguments. Raises UserError for a value that it refuses."""
    arguments = config.trainer | FIXED_TRAINER | {"max_steps": max_steps}
    # Lightning counts this one in micro-batches; steps are optimizer steps everywhere in the config.
    if arguments["accumulate_grad_batches"] == "auto":
        arguments["accumulate_grad_batches"] = 1  # of the trial; the run has a number by then
    arguments["val_check_interval"] *= arguments["accumulate_grad_batches"]
    if name := arguments["profiler"]:
        if name not in PROFILERS:
            raise UserError(f"trainer.profiler must be one of {', '.join(PROFILERS)}, got {name}")
        # By its name alone Lightning's would only log, at a level that is not shown.
        arguments["profiler"] = PROFILERS[name](dirpath=folder, filename="profile")
    else:
        arguments["profiler"] = NoProfiler()
    try:
        return Trainer(
            **arguments,
            callbacks=callbacks,
            logger=loggers,
            plugins=[DurableCheckpointIO()],
            default_root_dir=folder,
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        )
    except Exception as error:
        raise UserError(f"Lightning's Trainer refuses its settings: {one_line(error)}") from error


def build_callbacks(config: Train, folder: Path) -> list[Callback]:
    """The callbacks of the config, in its order."""
    callbacks = [_instantiate(f"callbacks.{name}", arguments, folder) for name, arguments in config.callbacks.items()]
    for name, callback in zip(config.callbacks, callbacks, strict=True):
        if getattr(callback, "monitor", None) not in (None, *MONITORED):
            raise UserError(f"callbacks.{name}.monitor must be one of {', '.join(MONITORED)}, got {callback.monitor}")
        if not isinstance(callback, BestCheckpoint | LastCheckpoint):
            continue
        if Path(str(callback.dirpath)).resolve() != (folder / "checkpoints").resolve():
            raise UserError(
                f"callbacks.{name}.dirpath must be checkpoints, where resume= and weights= look: "
                "hydra.run.dir=FOLDER puts the whole run elsewhere"
            )
    return callbacks


def build_loggers(config: Train, folder: Path, resumed_step: int | None) -> list[Logger]:
    """The loggers of the config; TensorBoard's goes on after the resumed step, without the rows that followed it."""
    loggers = []
    for name, arguments in config.logger.items():
        target = load_target(f"logger.{name}", arguments["_target_"])
        if target is TensorBoardLogger and resumed_step is not None:
            arguments = arguments | {"purge_step": resumed_step + 1}
        described = folder / ".hydra" / "hydra.yaml"  # which no resume changes, wherever the folder lies
        if target is WandbLogger and described.is_file():
            run_id = hashlib.blake2b(described.read_bytes(), digest_size=8).hexdigest()
            arguments = {"id": run_id, "resume": "allow"} | arguments
        if target is MLFlowLogger:
            if arguments.get("tracking_uri") is None:
                own = f"sqlite:///{(folder / 'mlflow.db').as_posix()}"
                arguments = arguments | {"tracking_uri": os.environ.get("MLFLOW_TRACKING_URI", own)}
            if (folder / MLFLOW_RUN).is_file():
                arguments = arguments | {"run_id": (folder / MLFLOW_RUN).read_text().strip()}
        loggers.append(_instantiate(f"logger.{name}", arguments, folder))
    return loggers


def code_state() -> str:
    """Versions, and the commit of the checkout that runs.

    Not that of the working folder: git runs the programs that a repository's own config names.
    """
    told = f"rwkv_pl {version('rwkv_pl')}, torch {torch.__version__}, lightning {lightning.__version__}"
    checkout = Path(__file__).parents[3]
    if not (checkout / ".git").exists():
        return told
    git = ["git", "-C", str(checkout)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except OSError:
        return told
    if commit.returncode:
        return told
    return f"{told}, git {commit.stdout.strip()}" + (" with changes" if changes.stdout.strip() else "")


def _instantiate(where: str, arguments: dict[str, Any], folder: Path) -> Any:
    arguments = dict(arguments)
    target = load_target(where, arguments.pop("_target_"))
    try:
        for key in ("dirpath", "save_dir"):
            if arguments.get(key) is not None:
                arguments[key] = str(folder / arguments[key])
        return target(**arguments)
    except Exception as error:
        raise UserError(f"{where} refuses its settings: {one_line(error)}") from error


def _baselines(config: Train, data: DataModule) -> dict[str, float]:
    """Bits per byte that gzip -9 and xz -9 need for the text that a validation reads."""
    windows = cast(EvalBatches, data.val_dataloader().dataset)
    n_batches = _validation_batches(config, data)
    if not 0 < n_batches * config.data.eval_batch_size * config.data.ctx_len <= BASELINE_BYTES:
        return {}
    targets = np.concatenate([windows[i][:, 1:].flatten().numpy() for i in range(n_batches)])
    text = data.vocabulary.decode(targets[targets >= 0])
    if not 0 < len(text) <= BASELINE_BYTES:
        return {}
    gzip = zlib.compressobj(9, zlib.DEFLATED, 31)
    sizes = {"gzip -9": len(gzip.compress(text) + gzip.flush()), "xz -9": len(lzma.compress(text, preset=9))}
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def _validation_batches(config: Train, data: DataModule) -> int:
    """Calls of one validation on one device."""
    there = len(cast(EvalBatches, data.val_dataloader().dataset))
    limit = 1.0 if config.trainer["limit_val_batches"] is None else config.trainer["limit_val_batches"]
    return min(there, limit if isinstance(limit, int) else int(limit * there))


def _quiet() -> None:
    """Keeps Lightning's remarks that do not fit this use, or advertise, out of the user's sight."""
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
        ".*AMP with fp16 is not supported on CPU.*",  # which choose_products refuses
    ):
        warnings.filterwarnings("ignore", message=message)
    # TensorBoard's thread: what the disk refused is raised again at its next figure.
    threading.excepthook = lambda args: None if args.exc_type is OSError else threading.__excepthook__(args)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
