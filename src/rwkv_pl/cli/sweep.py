"""`rwkv-train -m`: a sweep, from its overrides to the table of its runs."""

import os
import secrets
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from hydra_plugins.rwkv_pl.grid import GridSweeper
from hydra_plugins.rwkv_pl.launcher import ProcessLauncher
from hydra_plugins.rwkv_pl.study import StudySweeper
from rwkv_pl.cli.arguments import run_with_hydra
from rwkv_pl.compose import check_config, compose
from rwkv_pl.config import CORPORA, errors_of_corpus
from rwkv_pl.data.documents import exists
from rwkv_pl.errors import UserError, one_line
from rwkv_pl.files import require_own_files
from rwkv_pl.overrides import is_group_choice, parse_overrides
from rwkv_pl.runs.folder import MULTIRUN, create_run_dir, has_started, locked
from rwkv_pl.runs.launch import RESUMED_ENV
from rwkv_pl.sweeps.jobs import Job, expand_grid, merge_params, require_distinct_folders
from rwkv_pl.sweeps.pool import run_job
from rwkv_pl.sweeps.report import print_report
from rwkv_pl.terminal import FAILED, quote_override, resume_command
from rwkv_pl.user_files import typed_config_dir

# The stored settings of Hydra itself that a resumed sweep uses again. Others could start an untrusted program.
STORED_KEYS = (
    "hydra/sweeper",
    "hydra.sweeper.",
    "hydra.sweep.subdir",
    "hydra.job.config.override_dirname.",
    "hydra.launcher.jobs=",
)

# Our launcher and sweepers, by their `_target_`.
OWN_PLUGINS: dict[str, Any] = {
    f"{plugin.__module__}.{plugin.__name__}": plugin for plugin in (ProcessLauncher, GridSweeper, StudySweeper)
}


def start_sweep(argv: Sequence[str], overrides: list[Override], config_dir: str | None) -> None:
    """`rwkv-train -m`. Raises UserError, before it creates a folder, if a setting is invalid in every job."""
    lines = [str(o.input_line) for o in overrides]
    texts = sweep_with_choices(overrides, config_dir)
    argv = [dict(zip(lines, texts, strict=True)).get(text, text) for text in argv]
    overrides = parse_overrides(texts, sweep=True)
    fixed = [o for o in overrides if not o.is_sweep_override()]
    composed = compose([str(o.input_line) for o in fixed], config_dir)
    merged = merge_params(
        composed.hydra.sweeper.get("params") or {}, [str(o.input_line) for o in overrides if not o.is_hydra_override()]
    )
    own = [str(o.input_line) for o in fixed if o.is_hydra_override()]
    _require_valid_job(own, merged, config_dir)
    _check_plugins(composed, merged)
    if "hydra.job.num" not in str(OmegaConf.to_container(composed.hydra.sweep)) and not _is_study(composed):
        _require_distinct_folders(own, merged, config_dir)
    typed = any(o.key_or_group == "hydra.sweep.dir" for o in overrides)
    _run_sweep(create_run_dir(Path(composed.hydra.sweep.dir).absolute(), typed), argv, composed.hydra.launcher)


def sweep_with_choices(overrides: Sequence[Override], config_dir: str | None) -> list[str]:
    """Return the settings, with choice(0) for the 0 in `schedule=cosine,linear schedule.final_lr=0`.

    Hydra composes the sweep's own config without the swept files, and would refuse a key that only they have.
    """
    swept = {o.key_or_group for o in overrides if o.is_sweep_override() and is_group_choice(o)}
    chosen = [str(o.input_line) for o in overrides if is_group_choice(o) and not o.is_sweep_override()]
    known = compose(chosen, config_dir)
    texts = []
    for o in overrides:
        is_inside = o.key_or_group.partition(".")[0] in swept and not o.is_sweep_override()
        is_new = is_inside and OmegaConf.select(known, o.key_or_group, default=...) is ...
        texts.append(f"{o.key_or_group}=choice({o.get_value_string()})" if is_new else str(o.input_line))
    return texts


def resume_sweep(sweep: Path, later: list[Override], config_dir: str | None) -> None:
    """`rwkv-train -m resume=SWEEP`: finishes the missing jobs. Raises UserError if the folder is not a sweep's.

    The sweep's folder is not trusted. From its stored settings come only those of the jobs and, of Hydra's own,
    STORED_KEYS. A config folder can make Hydra run any program, so --config-dir must be typed again.
    """
    if any(not o.is_hydra_override() and o.key_or_group != "plugins" for o in later):
        raise UserError("-m resume= cannot change a sweep's settings, except hydra.*: leave out the others")
    path = sweep / MULTIRUN
    if not path.is_file():
        hint = "it is a run; leave out -m" if has_started(sweep) else f"it has no {MULTIRUN}"
        raise UserError(f"resume={sweep} is not the folder of a sweep: {hint}")
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))["hydra"]
        task, own = ([str(text) for text in stored["overrides"][part]] for part in ("task", "hydra"))
        cwd = Path(stored["runtime"]["cwd"])
        config_dir_then = typed_config_dir(stored["runtime"]["config_sources"])
        settings = parse_overrides(task, sweep=True)
        parse_overrides(own, sweep=True)
    except Exception as error:  # a file that was changed by hand can fail in any way
        raise UserError(f"{path} is corrupt: {one_line(error)[:200]}") from error
    if not cwd.is_absolute() or not cwd.is_dir():
        raise UserError(f"the sweep was started in {cwd}, which no longer exists: create it again")
    if config_dir_then and not config_dir:
        raise UserError(f"the sweep used --config-dir {config_dir_then}: give it again if you trust its files")
    require_own_files(sweep)
    os.chdir(cwd)
    kept = [o.input_line or "" for o in settings if not o.is_hydra_override() and o.key_or_group != "plugins"]
    own = [text for text in own if text.startswith(STORED_KEYS) and "_target_" not in text]
    if any(o.key_or_group == "hydra/launcher" for o in later):
        own = [text for text in own if not text.startswith("hydra.launcher.")]
    given = [str(o.input_line) for o in later]
    launcher = compose([*own, *given], config_dir).hydra.launcher
    where = ["--config-dir", config_dir] if config_dir else []
    os.environ[RESUMED_ENV] = "1"
    try:
        _run_sweep(sweep, ["-m", *where, *own, *given, *kept], launcher)
    finally:
        del os.environ[RESUMED_ENV]


def _run_sweep(sweep: Path, argv: Sequence[str], launcher: DictConfig) -> None:
    """Run the sweep with Hydra and print its report, even after an error. Exits with 1 if a job failed."""
    # The job's process writes its own .hydra/ and log, so Hydra must not.
    ours = [f"hydra.sweep.dir={quote_override(sweep)}", "hydra.output_subdir=null", "hydra/job_logging=none"]
    if "submitit_folder" in launcher and not any(text.startswith("hydra.launcher.submitit_folder=") for text in argv):
        # submitit loads pickles from this folder: with a random name, nobody can have put other ones there before.
        private = sweep / f".submitit-{secrets.token_hex(8)}" / "%j"
        ours.append(f"hydra.launcher.submitit_folder={quote_override(private)}")
    for plugin in OWN_PLUGINS.values():  # Hydra's search does not find them in an editable install
        Plugins.instance().register(plugin)
    with locked(sweep):
        try:
            run_with_hydra(run_job, [*argv, *ours])
        finally:
            done = print_report([sweep], sweep)
            if not done:
                print(f"to finish the sweep: {resume_command(sweep, '-m')}")
    if not done:
        sys.exit(FAILED)


def _check_plugins(composed: DictConfig, overrides: Sequence[Override]) -> None:
    """Raise UserError if our launcher or sweeper refuses its settings."""
    for part in ("launcher", "sweeper"):
        arguments = dict(composed.hydra[part])
        if plugin := OWN_PLUGINS.get(arguments.pop("_target_")):
            try:
                made = plugin(**arguments)
            except TypeError as error:
                raise UserError(f"hydra.{part} refuses its settings: {one_line(error)}") from error
            if part == "sweeper":
                made.check(overrides)


def _is_study(composed: DictConfig) -> bool:
    return OWN_PLUGINS.get(composed.hydra.sweeper["_target_"]) is StudySweeper  # it numbers the folders


def _require_distinct_folders(own: list[str], overrides: Sequence[Override], config_dir: str | None) -> None:
    """Raise UserError if two jobs of a grid would have the same folder."""
    jobs = []
    for number, job in enumerate(expand_grid(overrides)):
        with suppress(UserError, OmegaConfBaseException):  # the sweep records this job as failed
            composed = compose([*own, *job], config_dir)
            with open_dict(composed):
                composed.hydra.job.num = composed.hydra.job.id = number
            jobs.append(Job(job, Path(composed.hydra.sweep.dir, str(composed.hydra.sweep.subdir))))
    require_distinct_folders(jobs)


def _require_valid_job(own: list[str], overrides: Sequence[Override], config_dir: str | None) -> None:
    """Raise the first job's UserError if the settings of every job are invalid."""
    first = None
    for job in expand_grid(overrides):
        try:
            config = check_config(compose([*own, *job], config_dir), parse_overrides(job), config_dir)
            for name, data in config.data.parts().items():
                texts = {"data.path": data.path, "data.val_path": data.val_path}
                for key, path in texts.items() if CORPORA[data.name].path else ():
                    if path and not exists(Path(path)):
                        with errors_of_corpus(name):
                            raise UserError(f"{key}={path}: no such file")
            for key, path in {"data.vocab_path": config.data.vocab_path, "weights": config.weights}.items():
                if path and not Path(path).exists():
                    raise UserError(f"{key}={path}: no such file")
            return
        except UserError as error:
            first = first or error
    raise first or UserError("the sweep has no job, because a key has no value: give it at least one")
