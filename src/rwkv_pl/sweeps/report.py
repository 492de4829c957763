"""Reports many runs as a table, sweep.csv and sweep.png."""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rwkv_pl.errors import UserError, one_line
from rwkv_pl.files import atomic_write, describe_os_error
from rwkv_pl.runs.folder import MULTIRUN, OVERRIDES, has_started, is_in_use
from rwkv_pl.runs.outcome import DONE_STATUSES, RESULT_FILE, read_result
from rwkv_pl.runs.stored import flatten, normalize_value
from rwkv_pl.terminal import console
from rwkv_pl.training.curve import draw_sweep, read_rows, score_unit

if TYPE_CHECKING:
    from rich.console import Console

# Errors of reading a file with unexpected content.
READ_ERRORS = (OSError, LookupError, TypeError, ValueError, AttributeError)

# Settings that do not count as differences between runs.
UNCOMPARED_KEYS = ("resume", "logger", "trainer.enable_")


@dataclass
class Run:
    """A run, read from its folder. rows: of metrics.csv. result: of result.json.

    settings: dotted key to value. overrides: key to value, as typed at the start and at each resume.
    """

    folder: Path
    result: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, str] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    status: str = ""
    error: str = ""

    @property
    def unit(self) -> str:
        """byte, or token for ids whose text is not known."""
        return score_unit(self.rows)

    @property
    def score(self) -> str:
        """The column of the validations."""
        return f"val/bits_per_{self.unit}"

    @property
    def best(self) -> float | None:
        """The score of the best validation, in bits per `unit`."""
        validated = [row[self.score] for row in self.rows if self.score in row]
        if not validated and (objective := _to_number(self.result.get("objective"))) is not None:
            validated = [objective]
        if self.status == "damaged":
            return None
        return min((bits for bits in validated if math.isfinite(bits)), default=None)

    def latest(self, column: str) -> float | None:
        there = _to_number(self.result.get(column))
        return next((row[column] for row in reversed(self.rows) if column in row), there)

    @property
    def speed(self) -> float | None:
        """Tokens per second: the median of the logged values."""
        return self._median("tokens_per_second")

    @property
    def mfu(self) -> float | None:
        """MFU (model FLOPs utilisation), the share of the machine's measured peak: the median of the logged values."""
        return self._median("mfu")

    def _median(self, column: str) -> float | None:
        values = [row[column] for row in self.rows if column in row]
        return statistics.median(values) if values else None


def print_report(paths: Sequence[Path], out: Path) -> bool:
    """Print the table, and write sweep.csv and sweep.png into `out`. Returns whether all runs have finished."""
    runs = [read_run(folder) for folder in find_runs(paths)]
    if not runs:
        return False
    names = _short_names([run.folder for run in runs])
    keys = find_swept_settings(runs) or find_differing_settings(runs)
    # The files come first, because printing fails if the reader of the table has gone.
    try:
        with atomic_write(out / "sweep.csv", keep=True) as file:
            file.write(_to_csv(runs, names, keys).encode())
        curves = {name: run.rows for name, run in zip(names, runs, strict=True) if run.rows}
        if curves:
            best = {name: run.best for name, run in zip(names, runs, strict=True) if run.best is not None}
            swept = {key: {n: run.settings.get(key) for n, run in zip(names, runs, strict=True)} for key in keys}
            draw_sweep(curves, best, swept, out / "sweep.png")
        message = f"also in {out / 'sweep.csv'}" + (f", the curves in {out / 'sweep.png'}" if curves else "")
    except OSError as error:
        message = f"rwkv-report: {describe_os_error(error)}"
    _print_table(runs, names, keys)
    print(message)
    return all(run.status in DONE_STATUSES for run in runs)


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Return the folders of the runs at and below the paths, sorted by name, with numbers compared as numbers."""
    found = set()
    for path in paths:
        for name, above in ((OVERRIDES.as_posix(), 2), (RESULT_FILE, 1)):
            found |= {file.parents[above - 1] for file in path.glob(f"**/{name}")}

    def by_number(folder: Path) -> list[tuple[int, int, str]]:
        return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in folder.parts]

    return sorted(found, key=by_number)


def read_run(folder: Path) -> Run:
    """Read a run's folder. If a file in it is corrupt, the run's status is "damaged"."""
    result = read_result(folder)
    run = Run(folder, result)
    run.status, run.error = str(result.get("status", "")), str(result.get("error") or "")
    try:
        if has_started(folder):
            run.settings = flatten(_read_yaml(folder / ".hydra" / "config.yaml"))
            run.overrides = _split_overrides(yaml.safe_load((folder / OVERRIDES).read_text(encoding="utf-8")))
            later = folder / ".hydra" / "resumes.yaml"
            for entry in _read_yaml(later) if later.exists() else []:
                run.settings |= flatten(entry["set"])
                run.overrides |= _split_overrides(entry.get("overrides"))
        else:
            run.overrides = _split_overrides(result.get("overrides"))
            run.settings = {key: yaml.safe_load(value) for key, value in run.overrides.items()}
        run.rows = read_rows(folder / "metrics.csv", up_to=10**18)
    except (UserError, OmegaConfBaseException, yaml.YAMLError, *READ_ERRORS) as error:
        run.status, run.error = "damaged", one_line(error)
    if run.status in DONE_STATUSES and run.latest(run.score) is None and run.best is not None:
        run.error = f"{folder / 'metrics.csv'} has no validation: only the figures of result.json are shown"
    if not run.status:
        run.status = "running" if is_in_use(folder) else "broken off"
    return run


def find_swept_settings(runs: Sequence[Run]) -> list[str]:
    """Return the overrides that differ between the jobs of a sweep, and add them to the settings of each job.

    [] if the runs are not of one sweep. A choice such as optim=adamw is one override, though it changes many settings,
    and a job that failed at its start has its overrides too.
    """
    sweeps = {next((f for f in run.folder.absolute().parents if (f / MULTIRUN).is_file()), None) for run in runs}
    if len(sweeps) != 1 or None in sweeps:
        return []
    intact = [run for run in runs if run.status != "damaged"]
    keys = dict.fromkeys(key for run in intact for key in run.overrides)
    swept = [key for key in keys if len({run.overrides.get(key) for run in intact}) > 1]
    for run in runs:
        run.settings |= {key: _to_plain(run.overrides[key]) for key in swept if key in run.overrides}
    return swept


def find_differing_settings(runs: Sequence[Run]) -> list[str]:
    """Return the settings that differ between the runs, in the order of the config."""
    intact = [run for run in runs if has_started(run.folder) and run.status != "damaged"]
    found = []
    for key in dict.fromkeys(key for run in intact or runs for key in run.settings):
        # A job that never started has only the settings that were typed.
        compared = [run for run in runs if run in intact or key in run.settings]
        if len({repr(normalize_value(run.settings.get(key))) for run in compared}) > 1 and not key.startswith(
            UNCOMPARED_KEYS
        ):
            found.append(key)
    return found


def _print_table(runs: Sequence[Run], names: Sequence[str], keys: Sequence[str]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(header_style="bold")
    table.add_column("run", overflow="fold")
    for title in _short_titles(keys):
        table.add_column(title, justify="right", overflow="fold")
    unit = _unit(runs)
    for title in (f"bits/{unit}", "tokens/s", "steps", "time"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    best = min((run.best for run in runs if run.best is not None), default=None)
    for run, name in zip(runs, names, strict=True):
        bits, speed, seconds, step = run.best, run.speed, run.latest("seconds"), run.latest("step")
        table.add_row(
            escape(name),
            *(escape(_format_value(run.settings.get(key, ""))) for key in keys),
            "" if bits is None else f"{bits:.4f}",
            "" if speed is None else f"{speed:,.0f}",
            "" if step is None else f"{step:,.0f}",
            "" if seconds is None else _format_duration(seconds),
            escape(run.status),
            style="bold green" if bits is not None and bits == best else None if run.status != "failed" else "red",
        )
    screen = console()
    screen.print(table)
    for run, name in zip(runs, names, strict=True):
        if run.error:
            screen.print(f"{name}: {run.error}", markup=False, highlight=False, soft_wrap=True)
    _print_seeds(screen, runs, keys)
    if best is not None and len(runs) > 1:
        winner, name = next((run, name) for run, name in zip(runs, names, strict=True) if run.best == best)
        how = ", ".join(f"{key}={_format_value(winner.settings[key])}" for key in keys if key in winner.settings)
        line = f"best: run {name}, {best:.4f} bits per {winner.unit}" + (f": {how}" if how else "")
        screen.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_seeds(screen: "Console", runs: Sequence[Run], keys: Sequence[str]) -> None:
    """Print the mean and the sample standard deviation of finished runs that differ in the seed alone."""
    from rich.markup import escape
    from rich.table import Table

    if "seed" not in keys:
        return
    others = [key for key in keys if key != "seed"]
    groups: dict[str, tuple[list[Any], dict[Any, float]]] = {}
    for run in runs:
        if run.best is not None and run.status == "finished":
            # All settings, not only the swept ones: a sweep's files may have been changed before it was resumed.
            equal = {k: v for k, v in run.settings.items() if not k.startswith(("seed", *UNCOMPARED_KEYS))}
            settings = [run.settings.get(key, "") for key in others]
            group = groups.setdefault(repr(sorted(normalize_value(equal).items())), (settings, {}))
            group[1][run.settings.get("seed")] = run.best
    if not any(len(scores) > 1 for _, scores in groups.values()):
        return
    table = Table(header_style="bold")
    for title in (*_short_titles(others), "seeds", f"mean bits/{_unit(runs)}", "std"):
        table.add_column(title, justify="right")
    for settings, scores in groups.values():
        values = scores.values()
        spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else ""
        shown = (escape(_format_value(value)) for value in settings)
        table.add_row(*shown, str(len(values)), f"{statistics.mean(values):.4f}", spread)
    screen.print(table)


def _to_csv(runs: Sequence[Run], names: Sequence[str], keys: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    score = f"val/bits_per_{_unit(runs)}"
    figures = (score, "tokens_per_second", "mfu", "step", "tokens", "seconds", "status", "error")
    writer.writerow(["run", *keys, *figures])
    for run, name in zip(runs, names, strict=True):
        latest = [run.latest(column) for column in ("step", "tokens", "seconds")]
        values = [run.settings.get(key) for key in keys]
        writer.writerow([name, *values, run.best, run.speed, run.mfu, *latest, run.status, run.error])
    return text.getvalue()


def _unit(runs: Sequence[Run]) -> str:
    """The unit of the scores, byte unless all are of tokens."""
    return "token" if {run.unit for run in runs if run.rows} == {"token"} else "byte"


def _short_titles(keys: Sequence[str]) -> list[str]:
    """Return the shortest end of each dotted key that no other key has."""
    titles = []
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]
        taken = [end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) > 1]
        titles.append(ends[min(len(taken), len(ends) - 1)])
    return titles


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Return each path relative to the folder that contains all of them."""
    absolute = [folder.absolute() for folder in folders]
    common = absolute[0].parent
    while not all(folder.is_relative_to(common) for folder in absolute):
        common = common.parent
    return [folder.relative_to(common).as_posix() for folder in absolute]


def _read_yaml(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if "${" in text:
        return OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    # libyaml is ten times as fast, if PyYAML was built with it.
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _split_overrides(texts: Any) -> dict[str, str]:
    """The values of key=value texts by key. Later ones take precedence."""
    pairs = (str(text).partition("=") for text in (texts if isinstance(texts, list) else []))
    return {key: value for key, _, value in pairs}


def _to_plain(text: str) -> Any:
    """The number that an override's value is, or else its text without quotes."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text.removeprefix("'").removesuffix("'")


def _to_number(value: Any) -> float | None:
    return value if isinstance(value, int | float) else None


def _format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _format_duration(seconds: float) -> str:
    minutes = int(seconds) // 60
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes}:{int(seconds) % 60:02}"
