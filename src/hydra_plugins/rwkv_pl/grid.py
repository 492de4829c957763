"""The default sweeper of -m: every combination of the swept values."""

from collections.abc import Sequence

from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn
from omegaconf import DictConfig

from hydra_plugins.rwkv_pl._jobs import JobSweeper
from rwkv_pl.errors import UserError
from rwkv_pl.sweeps.jobs import expand_grid, merge_params


class GridSweeper(JobSweeper):
    """A grid of values. params: swept values of a config file, by key; those of the command line take precedence."""

    def __init__(self, params: DictConfig | None = None) -> None:
        self.params = {} if params is None else params

    def check(self, overrides: Sequence[Override]) -> None:
        drawn = next((override for override in overrides if override.is_interval_sweep()), None)
        if drawn:
            raise UserError(f"{drawn.input_line} is not a list of values: use one, or hydra/sweeper=optuna")

    def sweep(self, arguments: list[str]) -> Sequence[JobReturn]:
        self.write_multirun_yaml()
        return self.launch(list(expand_grid(merge_params(self.params, arguments))))
