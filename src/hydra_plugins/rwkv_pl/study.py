"""hydra/sweeper=optuna: a study whose trials are the jobs, stored in a journal in the sweep's folder.

Only the sweeper calls optuna's `ask` and `tell`. A job reads trial.json in its folder, and reports its validations to
the same journal (see training/callbacks/pruning.py).
"""

import codecs
import hashlib
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.rwkv_pl._jobs import JobSweeper
from rwkv_pl.checks import check_at_least, check_one_of
from rwkv_pl.errors import UserError
from rwkv_pl.files import atomic_write
from rwkv_pl.runs.outcome import read_result
from rwkv_pl.sweeps.jobs import merge_params

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

JOURNAL_FILE, STUDY_NAME = "study.journal", "sweep"


class StudySweeper(JobSweeper):
    """Minimises the bits per byte of the best validation. The arguments are those of conf/hydra/sweeper/optuna.yaml."""

    def __init__(
        self,
        n_trials: int = 20,
        sampler: str = "tpe",
        pruner: str = "median",
        seed: int = 42,
        batch: int | None = None,
        params: DictConfig | None = None,
    ) -> None:
        check_at_least("hydra.sweeper.n_trials", n_trials, 1)
        check_one_of("hydra.sweeper.sampler", sampler, ("tpe", "random"))
        check_one_of("hydra.sweeper.pruner", pruner, ("median", "halving", "none"))
        check_at_least("hydra.sweeper.batch", 1 if batch is None else batch, 1)
        self.n_trials, self.sampler, self.pruner, self.seed, self.batch = n_trials, sampler, pruner, seed, batch
        self.params = {} if params is None else params

    def check(self, overrides: Sequence[Override]) -> None:
        if find_spec("optuna") is None:
            raise UserError("hydra/sweeper=optuna needs a package that is not installed: pip install 'rwkv_pl[optuna]'")
        if not _search_space(overrides):
            raise UserError(
                "hydra/sweeper=optuna has nothing to search: give a key several values or interval(LOW,HIGH)"
            )

    def sweep(self, arguments: list[str]) -> None:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        overrides = merge_params(self.params, arguments)
        fixed = [str(o.input_line) for o in overrides if not o.is_sweep_override()]
        space = _search_space(overrides)
        self.write_multirun_yaml()
        _repair_lines(self.folder / JOURNAL_FILE)
        journal = str(self.folder / JOURNAL_FILE)
        # optuna's default lock is a symbolic link, which ordinary users can't create on Windows.
        backend = JournalFileBackend(journal, JournalFileOpenLock(journal))
        study = optuna.create_study(
            study_name=STUDY_NAME,
            storage=optuna.storages.JournalStorage(backend),
            load_if_exists=True,
            direction="minimize",
        )
        for trial in study.get_trials(deepcopy=False):
            if not _is_drawn_from(space, trial.params):
                where = f"trial {trial.number} of {self.folder / JOURNAL_FILE}"
                raise UserError(f"{where} is from another search, it has {trial.params}: start a new sweep")
        if not study.trials:
            if default_params := self._default_params(space):
                study.enqueue_trial(default_params)
            else:
                print("the config's own values are outside the search space: trial 0 is drawn too", flush=True)
        if left_running := study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
            self._run(study, left_running, fixed)  # they resume or start again in their folders
        at_once: int = self.batch or int(getattr(self.launcher, "jobs", None) or 1)
        while (left := self.n_trials - self._count_started(study)) > 0:
            asked = [self._ask(study, space) for _ in range(min(left, at_once))]
            self._run(study, asked, fixed)

    def _count_started(self, study: "Study") -> int:
        return sum(trial.state.name != "WAITING" for trial in study.get_trials(deepcopy=False))

    def _ask(self, study: "Study", space: "dict[str, BaseDistribution]") -> "FrozenTrial":
        import optuna

        # A new sampler for each trial: with one seed per process, a resumed study would draw the same values again.
        position = repr((self.seed, self._count_started(study))).encode()
        seed = int.from_bytes(hashlib.blake2b(position, digest_size=4).digest(), "big")
        if self.sampler == "tpe":
            study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=5)
        else:
            study.sampler = optuna.samplers.RandomSampler(seed=seed)
        number = study.ask(fixed_distributions=space).number
        return study.get_trials(deepcopy=False)[number]

    def _run(self, study: "Study", trials: "Sequence[FrozenTrial]", fixed: list[str]) -> None:
        from optuna.trial import TrialState

        folders = [self.folder / str(trial.number) for trial in trials]
        for trial, folder in zip(trials, folders, strict=True):
            folder.mkdir(exist_ok=True)
            with atomic_write(folder / "trial.json") as file:
                trial_info = {"number": trial.number, "id": trial._trial_id, "pruner": self.pruner}
                file.write(json.dumps(trial_info).encode())
        jobs = [
            [*fixed, *(f"{key}={value}" for key, value in trial.params.items()), f"hydra.sweep.subdir={trial.number}"]
            for trial in trials
        ]
        self.launch(jobs, first=trials[0].number)
        for trial, folder in zip(trials, folders, strict=True):
            result = read_result(folder)
            # A failed trial stays RUNNING in the study, so that -m resume= retries it like an interrupted one.
            if result.get("status") == "finished" and result.get("objective") is not None:
                study.tell(trial.number, result["objective"])
            elif result.get("status") == "pruned":
                study.tell(trial.number, state=TrialState.PRUNED)

    def _default_params(self, space: "dict[str, BaseDistribution]") -> dict[str, Any] | None:
        """Return the config's own values if all of them are in the search space, else None."""
        values = {}
        for key, where in space.items():
            value = OmegaConf.select(self.config, key)
            choices = getattr(where, "choices", None)
            if choices is not None:
                value = next((choice for choice in choices if _parse_choice(choice) == value), None)
            if value is None or not _contains(where, value):
                return None
            values[key] = value
        return values


def _is_drawn_from(space: "dict[str, BaseDistribution]", params: dict[str, Any]) -> bool:
    """Whether all parameters of a trial are in the search space."""
    return params.keys() <= space.keys() and all(_contains(space[key], value) for key, value in params.items())


def _contains(where: "BaseDistribution", value: Any) -> bool:
    try:
        return where._contains(where.to_internal_repr(value))
    except (ValueError, TypeError):  # for example 0 on a log scale, or a text among numbers
        return False


def _parse_choice(choice: str) -> Any:
    """Parse a choice as it would be on the command line, so that 1e-4 equals 0.0001."""
    value = OverridesParser.create().parse_override(f"key={choice}").value()
    return getattr(value, "text", value)


def _repair_lines(journal: Path) -> None:
    """Remove an incomplete last line, left by a full disk or a power cut, and end all lines with a newline.

    optuna would reject the journal, or would not see lines that an editor has ended otherwise.
    """
    content = journal.read_bytes() if journal.exists() else b""
    lines = [line for line in content.removeprefix(codecs.BOM_UTF8).splitlines() if line.strip()]
    try:
        json.loads(lines[-1] if lines else b"{}")
    except ValueError:
        print(f"{journal}: removed an incomplete last line", flush=True)
        del lines[-1]
    complete = b"".join(line + b"\n" for line in lines)
    if complete != content:
        with atomic_write(journal) as file:
            file.write(complete)


def _search_space(overrides: Sequence[Override]) -> "dict[str, BaseDistribution]":
    return {o.key_or_group: to_distribution(o) for o in overrides if o.is_sweep_override()}


def to_distribution(override: Override) -> "BaseDistribution":
    """Convert a swept value in Hydra's grammar to optuna's: choices, range(), interval(), tag(log, ...)."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    key, value = override.key_or_group, override.value()
    try:
        if isinstance(value, IntervalSweep):
            assert value.start is not None and value.end is not None
            log = "log" in value.tags
            if isinstance(value.start, int) and isinstance(value.end, int):
                return IntDistribution(value.start, value.end, log=log)
            return FloatDistribution(float(value.start), float(value.end), log=log)
        if isinstance(value, RangeSweep) and not value.shuffle:
            numbers = list(value.range())
            if numbers and all(isinstance(number, int) for number in numbers) and value.step > 0:
                return IntDistribution(int(numbers[0]), int(numbers[-1]), step=int(value.step))
        return CategoricalDistribution(tuple(override.sweep_string_iterator()))
    except ValueError as error:
        raise UserError(f"{override.input_line}: invalid search space for {key}: {error}") from error
