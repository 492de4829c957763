"""The default launcher of -m: each job is a separate process."""

import os
from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from rwkv_pl.errors import UserError
from rwkv_pl.sweeps.jobs import compose_job
from rwkv_pl.sweeps.pool import run_jobs


class ProcessLauncher(Launcher):
    """A pool of processes. jobs: number of jobs at a time, which share the cores."""

    def __init__(self, jobs: int = 1) -> None:
        if type(jobs) is not int or jobs < 1:
            raise UserError(f"hydra.launcher.jobs must be a whole number, at least 1, got {jobs!r}")
        self.jobs = jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs and return their outcomes in the same order: the objective, or the error."""
        loader = self.hydra_context.config_loader
        jobs = [
            compose_job(loader, self.config, list(overrides), number)[0]
            for number, overrides in enumerate(job_overrides, initial_job_idx)
        ]
        # In a SLURM allocation each job is a separate run, not one of several tasks.
        one_task = {"SLURM_NTASKS": "1"} if "SLURM_NTASKS" in os.environ else {}
        return run_jobs(jobs, at_once=self.jobs, environment=one_task)
