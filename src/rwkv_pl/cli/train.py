"""rwkv-train: from settings to a trained model, top to bottom.

The order is that of what can go wrong: the config is checked before anything heavy is imported, the corpus and the
weights are opened before there is a run folder, and only then the folder is taken and Hydra starts the run in it.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from rwkv_pl.cli import app
from rwkv_pl.cli.folder import is_first_process, latest_run, locked, take_folder
from rwkv_pl.cli.resume import StoredRun
from rwkv_pl.config import DamagedError, Train, UserError
from rwkv_pl.files import publish

if TYPE_CHECKING:
    from rwkv_pl.cli.prepare import Prepared

log = logging.getLogger("rwkv_pl")


@app.told_in_one_line
def main() -> None:
    """The command. Exit codes: 0 trained, 1 failed while training, 2 bad input."""
    argv = sys.argv[1:]
    args = app.parse_arguments(argv)
    overrides = app.parse_overrides(args.overrides, sweep=args.multirun)
    resume = next((o.value() for o in overrides if o.key_or_group == "resume"), None)
    if args.help or args.hydra_help or args.cfg or args.info or args.shell_completion:
        if not args.shell_completion:
            app.compose(_single(overrides), args.config_dir)
        _hydra_main(lambda _: None, argv)
    elif args.multirun:
        if resume is not None:
            raise UserError("resume= goes on with one run: leave out -m")
        _sweep(argv, overrides, args.config_dir)
    elif resume is not None:
        if args.config_dir:
            raise UserError("resume= reads the --config-dir that the run started with: leave it out")
        folder = latest_run(Path("outputs").absolute()) if resume == "latest" else Path(str(resume)).absolute()
        # Lightning starts the processes of further devices by the same words, which must mean the same run.
        sys.argv = [argument for argument in sys.argv if argument != "resume=latest"]
        sys.argv += [f"resume={app.quoted(folder)}"] if resume == "latest" else []
        _resume(folder, [o for o in overrides if o.key_or_group != "resume"])
    else:
        _start(argv, overrides, args.config_dir)


def _start(argv: Sequence[str], overrides: list[Override], config_dir: str | None) -> None:
    composed = app.compose([str(o.input_line) for o in overrides], config_dir)
    config = app.check(composed, overrides, config_dir)
    prepared = _prepare(config, Path.cwd())
    folder = Path(composed.hydra.run.dir).absolute()
    started = [*argv, f"hydra.run.dir={app.quoted(folder)}"]
    if is_first_process() and "LOCAL_RANK" not in os.environ:
        folder = take_folder(folder, typed=any(o.key_or_group == "hydra.run.dir" for o in overrides))
        started[-1] = f"hydra.run.dir={app.quoted(folder)}"
    elif not is_first_process():
        started.append("hydra.output_subdir=null")
    with locked(folder):
        _hydra_main(lambda _: _run(prepared, folder), started)


def _resume(folder: Path, later: list[Override]) -> None:
    stored = StoredRun(folder)
    settings = [o for o in later if not o.key_or_group.startswith("hydra")]
    config, entry = stored.resumed_with(settings)
    with locked(folder):
        prepared = _prepare_resumed(config, stored)
        if told := prepared.over(settings=bool(settings)):
            print(f"{folder} is finished, {told}")
            return
        if is_first_process():
            stored.keep(entry)
        hydra_part = [str(o.input_line) for o in later if o.key_or_group.startswith("hydra")]
        argv = [*hydra_part, f"hydra.run.dir={app.quoted(folder)}", "hydra.output_subdir=null"]
        _hydra_main(lambda _: _run(prepared, folder, resumed=True), argv)


def _prepare_resumed(config: Train, stored: StoredRun) -> "Prepared":
    """From last.ckpt, or where that is damaged the one before it; from step 0 where there is none yet."""
    names = ("last.ckpt", "last.prev.ckpt")
    checkpoints = [path for name in names if (path := stored.folder / "checkpoints" / name).is_file()]
    if not checkpoints:
        print(f"{stored.folder} has no checkpoint yet: it starts at step 0", file=sys.stderr)
        return _prepare(config, stored.cwd)
    for path, before in zip(checkpoints, [*checkpoints[1:], None], strict=True):
        try:
            return _prepare(config, stored.cwd, resume_from=path)
        except DamagedError as error:
            if before is None:
                raise
            print(f"{app.one_line(error)}; going on from {before}, the one before it", file=sys.stderr)
    raise AssertionError


def _sweep(argv: Sequence[str], overrides: list[Override], config_dir: str | None) -> None:
    first_job = _single(overrides)
    composed = app.compose(first_job, config_dir)
    app.check(composed, app.parse_overrides(first_job), config_dir)
    typed = any(o.key_or_group == "hydra.sweep.dir" for o in overrides)
    folder = take_folder(Path(composed.hydra.sweep.dir).absolute(), typed)

    def job(config: DictConfig) -> float:
        job_folder = Path(HydraConfig.get().runtime.output_dir)
        with locked(job_folder):
            return _run(_prepare(app.check(config), Path.cwd()), job_folder)

    try:
        _hydra_main(job, [*argv, f"hydra.sweep.dir={app.quoted(folder)}"], multirun=True)
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: a job failed: {app.one_line(error)}", file=sys.stderr)
        sys.exit(app.FAILED)


def _printable(text: bytes) -> str:
    """What a terminal can show: a model that has learned little writes control characters too."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text.decode(errors="replace"))


def _single(overrides: list[Override]) -> list[str]:
    """The overrides of a sweep's first job."""
    first = []
    for override in overrides:
        if override.is_sweep_override() and not override.is_interval_sweep():
            first.append(f"{override.key_or_group}={next(iter(override.sweep_string_iterator()))}")
        elif not override.is_sweep_override():
            first.append(str(override.input_line))
    return first


def _hydra_main(task: Any, argv: Sequence[str], multirun: bool = False) -> None:
    """Hands over to Hydra, which makes .hydra/ and train.log and calls `task` with the composed config."""
    typed, failure = sys.argv, []

    def train(config: DictConfig) -> Any:
        # Lightning starts the processes of further devices by the command line as it was typed.
        sys.argv = typed
        try:
            return task(config)
        except Exception as error:
            if multirun:
                raise
            # Raised here, Hydra would print a line of its own before ours.
            failure.append(error)
            return None

    sys.argv = [typed[0], *argv]
    try:
        hydra.main(version_base="1.3", config_path=f"pkg://{app.CONFIG_MODULE}", config_name="train")(train)()
    finally:
        sys.argv = typed
    if failure:
        raise failure[0]


def _prepare(config: Train, cwd: Path, resume_from: Path | None = None) -> "Prepared":
    if sys.stderr.isatty():
        print("loading torch and lightning ...", file=sys.stderr, flush=True)
    from rwkv_pl.cli.prepare import prepare

    return prepare(config, cwd, resume_from)


def _run(prepared: "Prepared", folder: Path, resumed: bool = False) -> float:
    """Trains in the run folder; returns the best validation's bits per byte, which a sweep minimises.

    resumed: the folder is that of a run which goes on, or starts again.
    """
    from lightning.pytorch.callbacks import ModelCheckpoint

    from rwkv_pl.cli.prepare import build_callbacks, build_loggers, build_trainer
    from rwkv_pl.training.faults import StopOnSignal, explained
    from rwkv_pl.training.history import History
    from rwkv_pl.training.progress import TrainingProgress, duration
    from rwkv_pl.training.sample import sample_tokens

    config, data, module = prepared.config, prepared.data, prepared.module
    vocabulary = data.vocabulary
    history = History(folder, config.data.batch_size * config.data.ctx_len, prepared.baselines)
    progress = [TrainingProgress(history)] if config.trainer["enable_progress_bar"] else []
    callbacks = [history, *progress, *build_callbacks(config, folder), StopOnSignal()]
    loggers = build_loggers(config, folder, prepared.done_steps if resumed else None)
    trainer = build_trainer(config, folder, prepared.max_steps, callbacks, loggers)

    if trainer.is_global_zero:
        with publish(folder / "vocab.json") as file:
            file.write(json.dumps(vocabulary.to_dict()).encode())
        model, size = config.model, sum(parameter.numel() for parameter in module.parameters())
        log.info(f"run     {folder}")
        log.info("data    " + data.description().replace(": ", ":\n        ", 1))
        log.info(f"model   {model.name}, {model.n_layer} x {model.n_embd}, {size:,} parameters")
        log.info(f"length  {prepared.length()}")
    started = time.perf_counter()
    try:
        trainer.fit(module, data, ckpt_path=prepared.resume_from, weights_only=True)
    except Exception as error:
        if prepared.resume_from and not history.begun and not isinstance(error, OSError | UserError):
            told = app.one_line(error)[:200]
            raise UserError(f"{prepared.resume_from} does not fit this run ({told}): it is damaged") from error
        raise explained(error, folder) from error
    if not trainer.is_global_zero:
        return 0.0

    prompt = vocabulary.encode(b"\n").tolist()
    try:
        written = vocabulary.decode(sample_tokens(module.model, prompt, 400, config.seed))
        with publish(folder / "sample.txt") as file:
            file.write(written)
        log.info(f"sample  (400 tokens, also in sample.txt)\n{_printable(written).rstrip()}\n")
    except FloatingPointError as error:
        log.info(f"sample  none: {error}")

    log.info(
        f"trained {trainer.global_step - prepared.done_steps:,} steps in {duration(time.perf_counter() - started)}"
    )
    scores = [c.best_model_score for c in callbacks if isinstance(c, ModelCheckpoint)]
    best = next((float(score) for score in scores if score is not None), float("nan"))
    if "val/bits_per_byte" in history.latest:
        figures = {"this model": history.latest["val/bits_per_byte"], **prepared.baselines}
        told = ", ".join(f"{name} {bits:.4f}" for name, bits in figures.items())
        log.info(f"result  bits per byte of {data.corpus}, validation part:\n        {told}")
    for what, path in (("curve", "loss.png"), ("weights", "checkpoints")):
        log.info(f"{what:7} {folder / path}")
    return best


if __name__ == "__main__":
    main()
