"""rwkv-train: from settings to a trained model, top to bottom.

The order is that of what can go wrong: the config is checked before anything heavy is imported, the corpus and the
weights are opened before there is a run folder, and only then the folder is taken and Hydra starts the run in it.
"""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from rwkv_pl.cli import app, ranks, sweep
from rwkv_pl.cli.arguments import parse_arguments
from rwkv_pl.cli.folder import latest_run, locked, recorded, take_folder, write_result
from rwkv_pl.cli.ranks import is_first_process
from rwkv_pl.cli.resume import StoredRun, require_own_places
from rwkv_pl.config import DamagedError, Train, UserError
from rwkv_pl.files import located, publish, require_own_files

if TYPE_CHECKING:
    from rwkv_pl.cli.prepare import Prepared

log = logging.getLogger("rwkv_pl")


@app.told_in_one_line
def main() -> None:
    """The command. Exit codes: 0 trained, 1 failed while training, 2 bad input."""
    if sweep.OF_A_SWEEP in os.environ:
        sys.stdout, sys.stderr = sweep.Unbroken(sys.stdout), sweep.Unbroken(sys.stderr)
    argv = sys.argv[1:]
    args = parse_arguments(argv)
    overrides = app.parse_overrides(args.overrides, sweep=args.multirun)
    resume = next((o.value() for o in overrides if o.key_or_group == "resume"), None)
    if args.cfg and resume is not None and not args.multirun:
        config, _ = StoredRun(_run_folder(resume)).resumed_with([o for o in overrides if o.key_or_group != "resume"])
        print(OmegaConf.to_yaml(config), end="")
    elif args.help or args.hydra_help or args.cfg or args.info or args.shell_completion:
        if not args.shell_completion:
            app.compose([str(o.input_line) for o in overrides if not o.is_sweep_override()], args.config_dir)
        app.hand_over(lambda _: None, argv)
    elif args.multirun and resume is not None:
        ranks.refuse_sweep()
        sweep.go_on(Path(str(resume)).absolute(), [o for o in overrides if o.key_or_group != "resume"], args.config_dir)
    elif args.multirun:
        ranks.refuse_sweep()
        sweep.start(argv, overrides, args.config_dir)
    elif resume is not None:
        if args.config_dir:
            raise UserError("resume= reads the --config-dir that the run started with: leave it out")
        folder = _run_folder(resume)
        # Lightning starts the processes of further devices by the same words, which must mean the same run.
        sys.argv = [argument for argument in sys.argv if argument != "resume=latest"]
        sys.argv += [f"resume={app.quoted(folder)}"] if resume == "latest" else []
        _resume(folder, [o for o in overrides if o.key_or_group != "resume"])
    else:
        _start(argv, overrides, args.config_dir)


def _run_folder(resume: Any) -> Path:
    if resume == "latest":
        return Path(ranks.first_decides("latest", lambda: str(latest_run(Path("outputs").absolute()))))
    return Path(str(resume)).absolute()


def _start(argv: Sequence[str], overrides: list[Override], config_dir: str | None) -> None:
    composed = app.compose([str(o.input_line) for o in overrides], config_dir)
    config = app.check(composed, overrides, config_dir)
    if sweep.RESUMED in os.environ:
        require_own_places(config, Path(composed.hydra.run.dir))
    prepared = _prepare(config, Path.cwd())
    with contextlib.ExitStack() as lock:

        def take() -> str:
            """The folder's name. Its lock is held until the run ends."""
            if attempt := int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
                raise UserError(f"torchrun's restart {attempt} would start at step 0 again: go on with resume=RUN")
            typed = any(o.key_or_group == "hydra.run.dir" for o in overrides)
            folder = take_folder(Path(composed.hydra.run.dir).absolute(), typed)
            lock.enter_context(locked(folder))
            return str(folder)

        folder = Path(ranks.first_decides("folder", take))
        started = [*argv, f"hydra.run.dir={app.quoted(folder)}", *ranks.hydra_part()]
        with recorded(folder), located(folder), ranks.leading():
            app.hand_over(lambda _: _run(prepared, folder), started)


def _resume(folder: Path, later: list[Override]) -> None:
    stored = StoredRun(folder)
    require_own_files(folder)
    settings = [o for o in later if not o.key_or_group.startswith("hydra")]
    if is_first_process() and any(o.key_or_group == "hydra.run.dir" for o in later):
        raise UserError("a run goes on in its own folder: leave out hydra.run.dir, or move the folder")
    config, entry = stored.resumed_with(settings)
    with contextlib.ExitStack() as lock:

        def take() -> str:
            lock.enter_context(locked(folder))
            return str(folder)

        ranks.first_decides("resume", take)
        prepared = _prepare_resumed(config, stored)
        if told := prepared.over(settings=bool(settings)):
            if is_first_process():
                print(f"{folder} is finished, {told}")
            return
        if is_first_process():
            stored.keep(entry)
        prepared.remarks += [f"changed {key} = {value}" for key, value in entry["set"].items()]
        prepared.remarks += [f"changed {key} falls away" for key in entry["remove"]]
        hydra_part = [str(o.input_line) for o in later if o.key_or_group.startswith("hydra")]
        argv = [*hydra_part, f"hydra.run.dir={app.quoted(folder)}", "hydra.output_subdir=null", *ranks.hydra_part()]
        with recorded(folder), ranks.leading():
            app.hand_over(lambda _: _run(prepared, folder, resumed=True), argv)


def _prepare_resumed(config: Train, stored: StoredRun) -> "Prepared":
    """From the first of the run's checkpoints that is whole; from step 0 where there is none yet."""
    names = ("last.ckpt", "last.prev.ckpt", "best.ckpt")
    checkpoints = [path for name in names if os.path.lexists(path := stored.folder / "checkpoints" / name)]
    if not checkpoints:
        prepared = _prepare(config, stored.cwd)
        prepared.remarks.append(f"{stored.folder} has no checkpoint yet: it starts at step 0")
        return prepared
    damaged: list[str] = []
    for path in checkpoints:
        try:
            prepared = _prepare(config, stored.cwd, resume_from=path)
        except DamagedError as error:
            damaged.append(app.one_line(error))
            continue
        if path.name != "last.ckpt":
            why = "; ".join(damaged) or "there is no last.ckpt"
            prepared.remarks.append(f"{why}; going on from {path}, of step {prepared.done_steps:,}")
        return prepared
    raise DamagedError(f"{'; '.join(damaged)}: there is no other to go on from")


def _printable(text: bytes) -> str:
    """What a terminal can show: a model that has learned little writes control characters too."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text.decode(errors="replace"))


def _prepare(config: Train, cwd: Path, resume_from: Path | None = None) -> "Prepared":
    if sys.stderr.isatty():
        print("loading torch and lightning ...", file=sys.stderr, flush=True)
    from rwkv_pl.cli.prepare import prepare

    return prepare(config, cwd, resume_from)


def _run(prepared: "Prepared", folder: Path, resumed: bool = False) -> None:
    """Trains in the run folder, and leaves result.json: the best validation's bits per byte is what a sweep minimises.

    resumed: the folder is that of a run which goes on, or starts again.
    """
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import MLFlowLogger

    from rwkv_pl.cli.prepare import MLFLOW_RUN, build_callbacks, build_loggers, build_trainer, code_state
    from rwkv_pl.training.faults import StopOnSignal, explained
    from rwkv_pl.training.footprint import free_memory, in_units
    from rwkv_pl.training.history import History
    from rwkv_pl.training.peak import measured_peak, product_dtype
    from rwkv_pl.training.progress import TrainingProgress, duration
    from rwkv_pl.training.pruning import PruneTrial
    from rwkv_pl.training.sample import sample_tokens

    config, data, module = prepared.config, prepared.data, prepared.module
    vocabulary = data.vocabulary
    tokens_per_step = config.data.batch_size * config.data.ctx_len
    cost = prepared.cost
    history = History(folder, tokens_per_step, prepared.baselines, prepared.owes_validation, flops_per_token=cost.flops)
    progress = [TrainingProgress(history)] if config.trainer["enable_progress_bar"] else []
    trial = [PruneTrial(folder)] if (folder / "trial.json").exists() else []
    callbacks = [history, *progress, *trial, *build_callbacks(config, folder), StopOnSignal()]
    # The rows of a validation that is made again are not kept; TensorBoard drops all of the step.
    kept = prepared.done_steps - prepared.owes_validation
    loggers = build_loggers(config, folder, kept if resumed else None)
    trainer = build_trainer(config, folder, prepared.max_steps, callbacks, loggers)

    if trainer.is_global_zero:
        with publish(folder / "vocab.json") as file:
            file.write(json.dumps(vocabulary.to_dict()).encode())
        model, trained, device = config.model, config.data, trainer.strategy.root_device
        dtype = product_dtype(device, trainer.precision_plugin)
        peak = measured_peak(device, dtype)
        history.peak = peak * trainer.world_size
        rows = trained.batch_size // (trainer.world_size * trainer.accumulate_grad_batches)
        log.info(f"run     {folder}")
        for remark in prepared.remarks:
            log.info(remark)
        code = code_state()
        log.info("data    " + data.description().replace(": ", ":\n        ", 1))
        log.info(
            f"model   {model.name}, {model.n_layer} x {model.n_embd}, {cost.parameters:,} parameters, "
            f"{in_units(cost.flops, 'FLOP')} a token"
        )
        log.info(
            f"memory  about {in_units(cost.bytes(rows * trained.ctx_len))} for weights, optimizer and a micro-batch of "
            f"{rows} x {trained.ctx_len:,} tokens, of {in_units(free_memory(device))} free"
        )
        each = f"{trainer.world_size} x " if trainer.world_size > 1 else ""
        log.info(f"machine {each}{in_units(peak, 'FLOP/s')} of {str(dtype).removeprefix('torch.')} products, measured")
        log.info(f"length  {prepared.length()}")
        log.info(f"code    {code}")
        for logger in [] if resumed else trainer.loggers:
            try:
                logger.log_hyperparams(config.hyperparameters() | {"code": code})
                if isinstance(logger, MLFlowLogger):
                    (folder / MLFLOW_RUN).write_text(str(logger.run_id))
            except OSError:
                raise
            except Exception as error:  # as without an account, or without its server
                name = type(logger).__name__
                hint = "; logger.wandb.offline=true needs no account" if name == "WandbLogger" else ""
                raise UserError(f"{name} can't begin: {app.one_line(error)[:300]}{hint}") from error
    started = time.perf_counter()
    try:
        trainer.fit(module, data, ckpt_path=prepared.resume_from, weights_only=True)
    except Exception as error:
        if prepared.resume_from and not history.begun and not isinstance(error, OSError | UserError):
            told = app.one_line(error)[:200]
            raise UserError(f"{prepared.resume_from} does not fit this run ({told}): it is damaged") from error
        raise explained(error, folder) from error
    if not trainer.is_global_zero:
        return

    prompt = [vocabulary.document_end]
    try:
        written = vocabulary.decode(sample_tokens(module.model, prompt, 400, config.seed))
        with publish(folder / "sample.txt") as file:
            file.write(written)
        if sweep.OF_A_SWEEP not in os.environ:
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
    for what, path in (("curve", "loss.png"), ("weights", "checkpoints"), ("profile", "fit-profile.txt")):
        if (folder / path).exists():
            log.info(f"{what:7} {folder / path}")
    write_result(
        folder,
        status="pruned" if any(callback.pruned for callback in trial) else "finished",
        ended=module.finished(),
        objective=best,
        step=trainer.global_step,
        seconds=history.latest.get("seconds"),
    )


if __name__ == "__main__":
    sys.argv[0] = "rwkv-train"  # in the errors of a sweep's jobs
    main()
