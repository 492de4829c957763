"""Base of the sweepers. Each job is composed separately, so that an invalid job does not stop the others."""

from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from rwkv_pl.runs.folder import MULTIRUN
from rwkv_pl.sweeps.jobs import Job, require_distinct_folders, require_own_run, validate_job, write_pending_result


class JobSweeper(Sweeper):
    """A sweeper that works with any of Hydra's launchers."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context: HydraContext = hydra_context
        self.config: DictConfig = config
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def check(self, overrides: Sequence[Override]) -> None:
        """Raise UserError, before any folder is created, if the sweep can't use these overrides."""

    @property
    def folder(self) -> Path:
        """The folder of the sweep."""
        return Path(str(self.config.hydra.sweep.dir))

    def write_multirun_yaml(self) -> None:
        """Write multirun.yaml, from which `-m resume=` makes the same jobs."""
        OmegaConf.save(self.config, self.folder / MULTIRUN)

    def launch(self, jobs: Sequence[Sequence[str]], first: int = 0) -> list[JobReturn]:
        """Launch the jobs and return their outcomes in the same order. first: number of the first job."""
        outcomes = [
            validate_job(self.hydra_context.config_loader, self.config, list(job), first + i)
            for i, job in enumerate(jobs)
        ]
        good = [outcome for outcome in outcomes if isinstance(outcome, Job)]
        require_distinct_folders(good)
        for job in good:
            require_own_run(job)
        for job in good:
            write_pending_result(job)
        ended = iter(self.launcher.launch([job.overrides for job in good], initial_job_idx=first) if good else [])
        return [next(ended) if isinstance(outcome, Job) else outcome for outcome in outcomes]
