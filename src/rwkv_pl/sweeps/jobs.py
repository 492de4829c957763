"""The jobs of a sweep: their settings, and the status files in their folders.

A sweeper (hydra_plugins/rwkv_pl) makes the jobs. A launcher runs them: ours (pool.py), or another of Hydra's, whose
workers start the same processes. A job that has started before resumes, and a finished job is not run again, so that
`-m resume=SWEEP` can run the same sweep again.
"""

import itertools
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from rwkv_pl.compose import check_config, compose
from rwkv_pl.errors import RunError, UserError, one_line
from rwkv_pl.files import atomic_write
from rwkv_pl.overrides import is_group_choice, parse_overrides
from rwkv_pl.runs.folder import OVERRIDES, has_started, locked
from rwkv_pl.runs.outcome import read_result, write_result
from rwkv_pl.runs.stored import flatten, normalize_value
from rwkv_pl.terminal import quote_override
from rwkv_pl.texts import take_as_typed
from rwkv_pl.user_files import typed_config_dir


@dataclass
class Job:
    """A job of a sweep. overrides: its settings, with hydra.sweep.subdir. config_dir: the command's --config-dir."""

    overrides: list[str]
    folder: Path
    config_dir: str | None = None

    @property
    def name(self) -> str:
        return f"job {self.folder.name}"

    @property
    def plugins(self) -> list[str]:
        """The typed `plugins=`, which a stored run or sweep cannot set."""
        return [text for text in self.overrides if text.startswith("plugins=")]

    @property
    def settings(self) -> list[str]:
        """The overrides without Hydra's own."""
        return [text for text in self.overrides if not text.startswith(("hydra.", "hydra/"))]


def merge_params(params: Mapping[Any, Any], overrides: Sequence[str]) -> list[Override]:
    """Merge the swept values of a config file with those of the command line, which take precedence."""
    if "plugins" in params:
        raise UserError("hydra.sweeper.params cannot set plugins: type plugins=[mypkg] on the command line")
    typed = parse_overrides(overrides, sweep=True)
    keys = {override.key_or_group for override in typed}
    brought = [f"{key}={value}" for key, value in params.items() if key not in keys]
    return parse_overrides(take_as_typed(brought), sweep=True) + typed


def expand_grid(overrides: Sequence[Override]) -> Iterator[list[str]]:
    """Yield every combination of the swept values; the last key changes fastest. Intervals are left out."""
    choices = [
        [f"{o.key_or_group}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [str(o.input_line)]
        for o in overrides
        if not o.is_interval_sweep()
    ]
    return (take_as_typed(job) for job in itertools.product(*choices))


def require_distinct_folders(jobs: Sequence[Job]) -> None:
    """Raise UserError if two jobs have the same folder: the second would be taken for the first."""
    taken: dict[str, Job] = {}
    for job in jobs:
        other = taken.setdefault(os.path.normcase(job.folder.resolve()), job)
        if other is not job:
            one, two = (
                shlex.join(text for text in each.settings if text not in others.settings) or "the same settings"
                for each, others in ((other, job), (job, other))
            )
            raise UserError(
                f"two jobs have the folder {job.folder}, one with {one}, one with {two}: "
                "add the settings that differ to hydra.sweep.subdir, or ${hydra.job.num}"
            )


def require_own_run(job: Job) -> None:
    """Raise UserError if the job's folder holds a run of other settings, which must not be taken for the job's."""

    def values(texts: Sequence[str]) -> dict[str, str]:
        # The sweeps of earlier versions have not quoted the texts that read as numbers.
        parsed = parse_overrides(take_as_typed([text for text in texts if not text.startswith("plugins=")]))
        return {override.key_or_group: str(override.value()) for override in parsed}

    if has_started(job.folder):
        try:
            stored = values([str(text) for text in OmegaConf.load(job.folder / OVERRIDES)])
        except Exception:  # resume= reports a corrupt file
            return
        own = values(job.settings)
        if differing := sorted(key for key in {*stored, *own} if stored.get(key) != own.get(key)):
            raise UserError(
                f"{job.folder} holds another run, which differs in {', '.join(differing)}: "
                "move that folder away, then resume the sweep"
            )


def is_in_config(loader: ConfigLoader, config: DictConfig, key: str, choice: str, fixed: Sequence[str]) -> bool:
    """Whether a sweep's config has this choice of a file or of a value. fixed: the overrides of every job."""
    (override,) = parse_overrides([f"{key}={choice}"])
    if not is_group_choice(override):
        return normalize_value(override.value()) == normalize_value(OmegaConf.select(config, key))
    try:
        job = loader.load_sweep_config(config, [*fixed, f"{key}={choice}"])
    except (HydraException, OmegaConfBaseException):  # a setting that this file does not have
        return False
    return flatten(job) == flatten(config)


def write_pending_result(job: Job) -> None:
    """Write a job's settings into its folder, so that the report lists a job that never starts."""
    if not has_started(job.folder) and not read_result(job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
        write_result(job.folder, status="not started", overrides=job.settings)


def compose_job(loader: ConfigLoader, config: DictConfig, overrides: list[str], number: int) -> tuple[Job, DictConfig]:
    """Return a job, in the folder that its settings name, and its config."""
    config_dir = typed_config_dir(config.hydra.runtime.config_sources)
    try:
        composed = loader.load_sweep_config(config, overrides)
    except (HydraException, OmegaConfBaseException):
        state = GlobalHydra.instance()
        running, state.hydra = state.hydra, None  # Hydra composes this sweep, and refuses a second one
        try:
            compose(overrides, config_dir)  # raises the error as one line
        finally:
            GlobalHydra.instance().hydra = running
        raise
    with open_dict(composed):
        composed.hydra.job.num = composed.hydra.job.id = number
    sweep = Path(str(composed.hydra.sweep.dir))
    folder = sweep / str(composed.hydra.sweep.subdir)
    if not folder.resolve().is_relative_to(sweep.resolve()):
        raise UserError(
            f"hydra.sweep.subdir={composed.hydra.sweep.subdir} is outside of the sweep's folder: give a folder below it"
        )
    return Job(overrides, folder, config_dir), composed


def validate_job(loader: ConfigLoader, config: DictConfig, overrides: list[str], number: int) -> Job | JobReturn:
    """Return a job to launch. If its settings are invalid, record and return its failure."""
    job = Job(overrides, Path(str(config.hydra.sweep.dir), str(number)))
    try:
        overrides = take_as_typed(overrides)
        parse_overrides(overrides)
        job, composed = compose_job(loader, config, overrides, number)
        check_config(composed, parse_overrides(job.plugins))
    except (UserError, HydraException, OmegaConfBaseException) as error:
        return record_failure(job, one_line(error))
    # This gives the job the same folder under every launcher, even if invalid jobs before it are not launched.
    subdir = job.folder.relative_to(str(config.hydra.sweep.dir))
    job.overrides.append(f"hydra.sweep.subdir={quote_override(subdir.as_posix())}")
    return job


def record_failure(job: Job, reason: str, status: str = "failed", is_shown: bool = False) -> JobReturn:
    """Print a job's failure and write it into its folder. is_shown: whether the job has printed `reason` itself."""
    shown = status if is_shown else reason if reason.startswith(status) else f"{status}: {reason}"
    print(f"{job.name} {shown}", flush=True)
    # The folder stays unchanged if another process uses it, or if it holds the run of another job.
    with suppress(UserError, OSError):
        require_own_run(job)
        job.folder.mkdir(parents=True, exist_ok=True)
        with locked(job.folder):
            with atomic_write(job.folder / "error.txt", keep=True) as file:
                file.write(f"{reason}\n".encode())
            write_result(job.folder, status=status, error=reason, overrides=job.settings)
    return JobReturn(overrides=job.overrides, _return_value=RunError(reason), status=JobStatus.FAILED)
