"""What the sweepers share: jobs are composed one by one, and those that can't be fail alone."""

from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from rwkv_pl.sweeps.jobs import Job, validate_job, write_pending_result


class JobSweeper(Sweeper):
    """A sweeper for any of Hydra's launchers."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context: HydraContext = hydra_context
        self.config: DictConfig = config
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def check(self, overrides: Sequence[Override]) -> None:
        """Raises UserError where the sweep can't be made of these, before anything is."""

    @property
    def folder(self) -> Path:
        """The sweep's."""
        return Path(str(self.config.hydra.sweep.dir))

    def write_multirun_yaml(self) -> None:
        """Writes multirun.yaml, of which `-m resume=` makes the same jobs again."""
        OmegaConf.save(self.config, self.folder / "multirun.yaml")

    def launch(self, jobs: Sequence[Sequence[str]], first: int = 0) -> list[JobReturn]:
        """What became of each job, in their order. first: the number of the first."""
        outcomes = [
            validate_job(self.hydra_context.config_loader, self.config, list(job), first + i)
            for i, job in enumerate(jobs)
        ]
        good = [outcome for outcome in outcomes if isinstance(outcome, Job)]
        for job in good:
            write_pending_result(job)
        ended = iter(self.launcher.launch([job.overrides for job in good], initial_job_idx=first) if good else [])
        return [next(ended) if isinstance(outcome, Job) else outcome for outcome in outcomes]
