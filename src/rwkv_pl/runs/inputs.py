"""Opens the corpus, weights and checkpoint of a run, and checks them against the config. Creates no folder."""

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rwkv_pl.config import UNKNOWN, Train
from rwkv_pl.data.datamodule import DataModule, open_data
from rwkv_pl.data.vocabulary import Vocabulary, read_vocabulary, vocabulary_from_dict
from rwkv_pl.errors import CorruptFileError, UserError, one_line
from rwkv_pl.model import MODELS
from rwkv_pl.runs.checkpoint import check_loadable, check_same_run, load_resume_checkpoint
from rwkv_pl.runs.device import choose_accelerator, choose_precision
from rwkv_pl.runs.outcome import DONE_STATUSES, read_result
from rwkv_pl.runs.stored import StoredRun
from rwkv_pl.targets import find_targets, load_class
from rwkv_pl.training.module import LitRWKV
from rwkv_pl.training.schedule import check_schedule
from rwkv_pl.weights.metadata import Metadata
from rwkv_pl.weights.read import read_weights
from rwkv_pl.weights.tensors import Weights

# Of trainer.val_check_interval=auto.
MAX_VAL_CHECK_INTERVAL = 5000


@dataclass
class Inputs:
    """The inputs of a run. The module builds its model when the Trainer asks for it.

    resume_from: the checkpoint, from step done_steps. finish_reason: why the run has finished, or None. accumulate:
    micro-batches of a step before the resume. val_check_interval: optimizer steps between
    validations. remarks: lines for the head of the run.
    """

    config: Train
    data: DataModule
    module: LitRWKV
    max_steps: int
    val_check_interval: int
    resume_from: Path | None = None
    done_steps: int = 0
    finish_reason: str | None = None
    accumulate: int | None = None
    remarks: list[str] = field(default_factory=list)

    def finish_message(self, settings: bool) -> str | None:
        """Describe how the resumed run has finished; None if it can continue.

        settings: whether the resume changes settings. New ones may extend a run that did not end by its length.
        """
        after = f"after {self.done_steps:,} steps"
        if self.finish_reason and 0 < self.max_steps <= self.done_steps:
            return f"{after}; a larger trainer.max_steps extends it"
        if self.finish_reason == "pruned" and not settings:
            return f"pruned {after}"
        if self.finish_reason in ("time", "early stop") and not settings:
            by = "trainer.max_time" if self.finish_reason == "time" else "an early stop"
            return f"by {by}, {after}; change that setting to extend it"
        return None

    def describe_passes(self, n_steps: int) -> str:
        """Describe how often `n_steps` read each corpus of a mix."""
        passes = self.data.passes(n_steps).items()
        return ", ".join(f"{name} {n:,.1f} passes" if n >= 1 else f"{name} {n:.2g} passes" for name, n in passes)

    def describe_length(self) -> str:
        """Describe the length of the run."""
        passes = f"1 pass is {self.data.steps_per_pass:,} step{'s' if self.data.steps_per_pass > 1 else ''}"
        if self.data.corpus_names:
            passes = self.describe_passes(self.max_steps)
        if self.max_steps < 0:
            return f"until trainer.max_time ({passes})"
        tokens = self.max_steps * self.config.data.batch_size * self.config.data.ctx_len
        done = f", of which {self.done_steps:,} are done" if self.done_steps else ""
        return f"{self.max_steps:,} steps, {tokens:,} tokens{done} ({passes})"


def open_stored(config: Train, stored: StoredRun) -> Inputs:
    """Open the inputs of a resumed run, from its first intact checkpoint, or from step 0 if it has none yet."""
    names = ("last.ckpt", "last.prev.ckpt", "best.ckpt")
    checkpoints = [path for name in names if os.path.lexists(path := stored.folder / "checkpoints" / name)]
    if not checkpoints:
        if read_result(stored.folder).get("status") in DONE_STATUSES:
            raise UserError(
                f"{stored.folder} is finished and has no checkpoint to resume from: start a new run with "
                "callbacks=[default], or with default in the list"
            )
        inputs = open_inputs(config, stored.cwd)
        inputs.remarks.append(f"{stored.folder} has no checkpoint yet: it starts at step 0")
        return inputs
    damaged: list[str] = []
    for path in checkpoints:
        try:
            inputs = open_inputs(config, stored.cwd, path)
        except CorruptFileError as error:
            damaged.append(one_line(error))
            continue
        if path.name != "last.ckpt":
            why = "; ".join(damaged) or "there is no last.ckpt"
            inputs.remarks.append(f"{why}; resuming from {path}, step {inputs.done_steps:,}")
        return inputs
    raise CorruptFileError(f"{'; '.join(damaged)}: there is no other checkpoint to resume from")


def open_inputs(config: Train, cwd: Path, resume_from: Path | None = None) -> Inputs:
    """Open corpus, weights and checkpoint. Relative paths count from `cwd`.

    Raises UserError for every mistake that can be found without creating the folder or allocating the model.
    """
    content, resumed = load_resume_checkpoint(resume_from) if resume_from else (None, None)
    loaded = read_weights(cwd / config.weights) if config.weights and not content else None
    if resumed:
        vocabulary: Vocabulary | None = vocabulary_from_dict(resumed.vocabulary or {})
    else:
        vocabulary = _choose_vocabulary(loaded, config, cwd)
    data = open_data(config.data, config.seed, cwd, vocabulary, resumed.corpora if resumed else None)
    data.limit_val_batches = config.trainer["limit_val_batches"] or None
    data.prepare_data()
    data.setup("fit")
    run_identity = {
        **identify_corpora(data),
        "seed": config.seed,
        "data.batch_size": config.data.batch_size,
        "data.ctx_len": config.data.ctx_len,
        "data.stream": config.data.stream,
        "model.name": config.model.name,
        "model.n_layer": config.model.n_layer,
        "model.n_embd": config.model.n_embd,
    }
    done_steps, finish_reason = 0, None
    if content and resumed and resume_from:
        check_same_run(resumed, run_identity, resume_from)
        done_steps, finish_reason = content["global_step"], resumed.finished
    max_steps = count_steps(config, data.steps_per_pass)
    if 0 < max_steps < done_steps and finish_reason is None:
        raise UserError(
            f"the run is already at step {done_steps:,}, past its new end at step {max_steps:,}: give a larger "
            "trainer.max_steps"
        )
    if not 0 < max_steps <= done_steps:  # else no step is left, whatever the schedule
        check_schedule(config.schedule, max_steps)
    for where, target in find_targets(asdict(config)):
        load_class(where, target)

    def make_module(model: nn.Module | Callable[[], nn.Module]) -> LitRWKV:
        return LitRWKV(
            model,
            config.optim,
            config.schedule,
            seed=config.seed,
            vocabulary=data.vocabulary.to_dict(),
            bytes_per_token=_bytes_per_token(data.vocabulary),
            past=run_identity,
            loss_chunk_len=config.loss_chunk_len,
            skip_nonfinite=config.skip_nonfinite,
        )

    model_class, size = choose_model(config, data.vocabulary.size, loaded, resumed.config if resumed else None)
    with torch.device("meta"):
        outline = make_module(model_class(size))  # names and shapes, without memory for the values
    optimizer = outline.configure_optimizers()
    if content and resume_from:
        check_loadable(content, outline, optimizer, resume_from)
    if (limit := config.trainer["limit_val_batches"]) and 0 in count_validation_batches(config, data):
        raise UserError(
            f"trainer.limit_val_batches={limit} is less than one validation batch: raise it, or set it to 0"
        )
    try:
        data.train_dataloader().dataset[0]
    except MemoryError as error:
        raise UserError(f"data.batch_size={config.data.batch_size} does not fit in memory: lower it") from error

    def build_model() -> nn.Module:
        torch.manual_seed(config.seed)
        model = model_class(size)
        if loaded:
            model.load_state_dict(loaded.tensors)
        model.activation_checkpointing = config.activation_checkpointing
        return model

    remarks = [f"weights {loaded.path}:\n        {loaded}"] if loaded else []
    if config.data.stream:
        remarks.append(
            f"stream  each of the {config.data.batch_size} rows reads on from batch to batch, with its state; "
            f"gradients reach back to the start of its window of {config.data.ctx_len:,} tokens"
        )
    if warning := data.text_warning():
        remarks.append(f"warning: {warning}")
    config.trainer["accelerator"] = choose_accelerator("trainer.accelerator", config.trainer["accelerator"])
    if comparison := choose_precision(config, resumed.precision if resumed else None):
        remarks.append(comparison)
    threads = torch.get_num_threads()
    if resumed and resumed.threads not in (None, threads):
        remarks.append(f"threads {threads}, the run had {resumed.threads}: its bits may differ from now on")
    return Inputs(
        config,
        data,
        make_module(build_model),
        max_steps,
        choose_val_check_interval(config, max_steps, resumed),
        resume_from,
        done_steps,
        finish_reason,
        resumed.accumulate if resumed else None,
        remarks,
    )


def _bytes_per_token(vocabulary: Vocabulary) -> torch.Tensor | None:
    """(V,) int64, or None if each token is a byte, or if the vocabulary does not know them."""
    is_known = vocabulary.kind != UNKNOWN and vocabulary.size > 256
    return torch.from_numpy(vocabulary.bytes_per_token) if is_known else None


def identify_corpora(data: DataModule) -> dict[str, Any]:
    """Return what a resume must not change of the corpora: content, splits, and in a mix order and shares."""
    found: dict[str, Any] = {"data.corpora": data.corpus_names} if data.corpus_names else {}
    for (name, corpus), share in zip(data.corpora.items(), data.mix.shares, strict=True):
        where = f"data.corpora.{name}" if name else "data"
        found[f"corpus.{name}" if name else "corpus"] = corpus.digest
        found[f"{where}.split"] = [list(split) for split in corpus.splits]
        if name:
            found[f"{where}.share"] = share
    return found


def choose_model(
    config: Train, vocab_size: int, loaded: Weights | None, stored: dict[str, Any] | None
) -> tuple[Any, Any]:
    """Return the config's model class and its size.

    Sizes that are not settings come from the `loaded` weights, or from the config `stored` in a checkpoint. Raises
    UserError if the weights have another version or size than the settings.
    """
    model_class, config_class = MODELS[config.model.name]
    settings = {key: v for key, v in vars(config.model).items() if key != "name"} | {"vocab_size": vocab_size}
    known = {of.name for of in fields(config_class)}
    here = config_class(**({key: value for key, value in (stored or {}).items() if key in known} | settings))
    if loaded:
        there = loaded.config
        if loaded.version != config.model.name:
            raise UserError(
                f"weights={config.weights} holds a {loaded.version} model, the config has {config.model.name}: "
                f"give model={loaded.version} model.n_layer={there.n_layer} model.n_embd={there.n_embd}"
            )
        if (there.n_layer, there.n_embd) != (here.n_layer, here.n_embd):
            raise UserError(
                f"weights={config.weights} has {there.n_layer} x {there.n_embd}, the config has {here.n_layer} x "
                f"{here.n_embd}: give model.n_layer={there.n_layer} model.n_embd={there.n_embd} too"
            )
        if there.vocab_size != here.vocab_size:
            raise UserError(
                f"weights={config.weights} has {there.vocab_size:,} tokens, data.vocab={config.data.vocab} has "
                f"{here.vocab_size:,}: give the data.vocab that it was trained with"
            )
        here = config_class(**(asdict(there) | settings))
    return model_class, here


def _choose_vocabulary(loaded: Weights | None, config: Train, cwd: Path) -> Vocabulary | None:
    vocabulary = loaded.vocabulary if loaded else None
    if vocabulary and vocabulary.kind != config.data.vocab:
        raise UserError(
            f"weights={config.weights} was trained with data.vocab={vocabulary.kind}, "
            f"the config has {config.data.vocab}: give data.vocab={vocabulary.kind} too"
        )
    if vocabulary and vocabulary.kind == UNKNOWN and vocabulary.size != config.data.vocab_size:
        raise UserError(
            f"weights={config.weights} was trained with data.vocab_size={vocabulary.size}, "
            f"the config has {config.data.vocab_size}: give data.vocab_size={vocabulary.size} too"
        )
    path = config.data.vocab_path
    if vocabulary and path and read_vocabulary(cwd / path, config.data.vocab) != vocabulary:
        raise UserError(
            f"data.vocab_path={config.data.vocab_path} differs from the tokenizer stored in weights={config.weights}: "
            "leave it out"
        )
    return vocabulary


def count_steps(config: Train, steps_per_pass: int) -> int:
    """Return the optimizer steps of the run: the least of max_steps and max_epochs passes, -1 if only max_time is set.

    Without any of the three, the run is one pass.
    """
    max_steps, max_epochs = config.trainer["max_steps"], config.trainer["max_epochs"]
    if max_steps == -1 and max_epochs is None and config.trainer["max_time"] is None:
        max_epochs = 1
    lengths = [max_steps] if max_steps > 0 else []
    if max_epochs is not None and max_epochs > 0:
        lengths.append(max_epochs * steps_per_pass)
    if not lengths and config.trainer["max_time"] is None:
        raise UserError("the run has no end: give trainer.max_steps, trainer.max_epochs or trainer.max_time")
    return min(lengths, default=-1)


def choose_val_check_interval(config: Train, max_steps: int, resumed: Metadata | None) -> int:
    """Optimizer steps between validations; auto keeps those of the run that is resumed, which may get longer."""
    given = config.trainer["val_check_interval"]
    if given != "auto":
        return given
    if resumed and resumed.val_check_interval:
        return resumed.val_check_interval
    return min(MAX_VAL_CHECK_INTERVAL, math.ceil(max_steps / 10)) if max_steps > 0 else MAX_VAL_CHECK_INTERVAL


def count_validation_batches(config: Train, data: DataModule) -> list[int]:
    """Count the batches of each corpus in one validation, those of all processes."""
    counts = [len(batches) for batches in data.eval_batches("val", all_processes=True)]
    return [0 for _ in counts] if config.trainer["limit_val_batches"] == 0 else counts
