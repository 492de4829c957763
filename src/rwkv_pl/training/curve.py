"""Reads metrics.csv and draws loss.png. Does not import torch, so that a report of many runs starts at once."""

import contextlib
import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_pl.errors import UserError
from rwkv_pl.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    "step",
    "tokens",
    "seconds",
    "train/loss",
    "train/bits_per_byte",
    "train/l2wrap",
    "train/grad_norm",
    "lr",
    "tokens_per_second",
    "val/loss",
    "val/bits_per_byte",
    "model_flops_per_second",
    "mfu",
)


def columns_of(unit: str) -> list[str]:
    """The columns for scores in bits per `unit`: byte, or token for ids whose text is not known."""
    return [name.replace("bits_per_byte", f"bits_per_{unit}") for name in COLUMNS]


def is_column(name: Any) -> bool:
    """Is this a column of metrics.csv? A mix has more for each of its corpora."""
    of_corpus = ("val/bits_per_byte/", "val/bits_per_token/", "passes/")
    return name in (*COLUMNS, *columns_of("token")) or str(name).startswith(of_corpus)


def score_unit(rows: Iterable[Mapping[str, Any]]) -> str:
    """Whether the rows have scores in bits per byte or per token."""
    return "token" if any(f"{split}/bits_per_token" in row for row in rows for split in ("train", "val")) else "byte"


def read_rows(path: Path, up_to: int) -> list[dict[str, float]]:
    """Read the rows of a metrics.csv up to step `up_to`, without an incomplete last line; [] if there is no file.

    Lines may end as on any system, and a byte order mark is skipped. Raises UserError if the file is corrupt.
    """
    if not path.is_file():
        return []
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        lines = list(file)
    if lines and not lines[-1].endswith("\n") and lines[-1].count(",") < lines[0].count(","):
        del lines[-1]
    reader = csv.DictReader(lines)
    try:
        rows = [{name: float(value) for name, value in row.items() if value} for row in reader]
        if lines and "step" not in (reader.fieldnames or ()):
            raise ValueError("no column step")
        if not all(math.isfinite(row.get("step", math.nan)) for row in rows):
            raise ValueError("a row without a step")
        if strange := {name for name in reader.fieldnames or () if not is_column(name)}:
            raise ValueError(f"an unknown column {min(map(str, strange))}")
        if not all(math.isfinite(row.get("tokens", math.nan)) for row in rows):
            raise ValueError("a row without tokens")
    except (ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is corrupt ({error}): move it away, and a new one is started") from error
    return [row for row in rows if row["step"] <= up_to]


@contextlib.contextmanager
def default_style() -> Iterator[None]:
    """Draw with matplotlib's built-in defaults.

    matplotlib reads a matplotlibrc in the current folder. An untrusted one could run LaTeX, with text.usetex.
    """
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def draw_curve(rows: list[dict[str, float]], path: Path, baselines: dict[str, float]) -> None:
    """Write the picture of `plot_curve` to a PNG file."""
    with atomic_write(path, keep=True) as file:
        file.write(render_png(plot_curve(rows, baselines)))


@default_style()
def render_png(figure: "Figure") -> bytes:
    """Render a figure as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    return picture.getvalue()


@default_style()
def plot_curve(rows: list[dict[str, float]], baselines: dict[str, float]) -> "Figure":
    """Plot the scores against tokens (logged steps, running mean, validations, baselines) and the learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    axes, below = figure.subplots(2, sharex=True, height_ratios=(5, 1))
    unit = score_unit(rows)
    axes.set_ylabel(f"bits per {unit}")
    below.set(xlabel="tokens", ylabel="learning rate", ylim=(0, None))
    names = (f"train/bits_per_{unit}", f"val/bits_per_{unit}", "lr")
    train, val, rate = (finite_points(rows, name) for name in names)
    if train:
        tokens, bits = zip(*train, strict=True)
        axes.plot(tokens, bits, color="tab:blue", alpha=0.25, linewidth=1)
        axes.plot(tokens, _running_mean(bits), color="tab:blue", label=f"train {_running_mean(bits)[-1]:.3f}")
    if val:
        axes.plot(*zip(*val, strict=True), "o-", color="tab:orange", label=f"validation {val[-1][1]:.3f}")
    for (name, bits_there), color in zip(baselines.items(), ("gray", "black"), strict=False):
        axes.axhline(bits_there, color=color, linestyle="--", linewidth=1, label=f"{name} {bits_there:.3f}")
    if rate:
        below.plot(*zip(*rate, strict=True), color="tab:green")
        below.set_ylim(0, 1.1 * max(value for _, value in rate))
    # The first steps start at 8 bits, so the range of y ignores them.
    heights = [value for _, value in train[len(train) // 10 :] + val] + list(baselines.values())
    if heights:
        axes.set_ylim(0.95 * min(heights), 1.05 * max(heights))
    for each in (axes, below):
        each.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    return figure


@default_style()
def draw_sweep(
    curves: dict[str, list[dict[str, float]]], best: dict[str, float], swept: dict[str, dict[str, Any]], path: Path
) -> None:
    """Draw the curves of all runs in one panel, and the best score against each swept setting in further panels.

    curves: run name -> rows. best: run name -> score of the best validation. swept: setting -> run name ->
    value.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    keys = list(swept)[:6]
    figure = Figure(figsize=(8 + 3.2 * len(keys), 5), dpi=110, layout="constrained")
    axes, *beside = figure.subplots(1, 1 + len(keys), width_ratios=[2.4] + [1] * len(keys), squeeze=False)[0]
    units = {name: score_unit(rows) for name, rows in curves.items()}
    score = f"bits per {'/'.join(sorted(set(units.values()))) or 'byte'}"
    axes.set(xlabel="tokens", ylabel=score, title="validation, dots; training's running mean, faint")
    ranked = sorted(curves, key=lambda name: best.get(name, math.inf))
    colors = {name: colormaps["viridis"](0.9 * i / max(1, len(ranked) - 1)) for i, name in enumerate(ranked)}
    heights = []
    for i, name in enumerate(ranked):
        columns = (f"train/bits_per_{units[name]}", f"val/bits_per_{units[name]}")
        train, val = (finite_points(curves[name], column) for column in columns)
        # Up to three settings label a run; with more, its name does.
        settings = [f"{key.rpartition('.')[2]} {_shorten(swept[key].get(name))}" for key in swept]
        label = f"{', '.join(settings) if 0 < len(settings) <= 3 else name}: {best[name]:.3f}" if name in best else None
        if train:
            tokens, bits = zip(*train, strict=True)
            means = _running_mean(bits)
            axes.plot(tokens, means, color=colors[name], linewidth=1, alpha=0.4)
            heights += means[len(means) // 5 :]
        if val:
            shown = label if i < 12 else None
            axes.plot(*zip(*val, strict=True), "o-", color=colors[name], markersize=4, linewidth=1.5, label=shown)
            heights += [value for _, value in val]
    if heights:
        low, high = min(heights), sorted(heights)[int(0.98 * (len(heights) - 1))]
        axes.set_ylim(low - 0.05 * (high - low + 0.1), high + 0.1 * (high - low + 0.1))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(title="best first", fontsize="small")
    for key, panel in zip(keys, beside, strict=True):
        names = [name for name in ranked if name in best and name in swept[key]]
        values = [swept[key][name] for name in names]
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        x: list[Any] = values
        if numbers and len(numbers) == len(values):
            if min(numbers) > 0 and max(numbers) / min(numbers) >= 3 and key != "seed":
                panel.set_xscale("log")
            if len(set(numbers)) <= 5:
                ticks = sorted(set(numbers))
                panel.set_xticks(ticks, [_shorten(number) for number in ticks], minor=False)
                panel.set_xticks([], minor=True)
        else:
            x = [str(value) for value in values]
        panel.scatter(x, [best[name] for name in names], c=[colors[name] for name in names])
        panel.set(xlabel=key)
        panel.sharey(beside[0])
    if beside:
        beside[0].set_ylabel(f"best validation, {score}")
    for each in (axes, *beside):
        each.grid(alpha=0.3)
    with atomic_write(path, keep=True) as file:
        FigureCanvasAgg(figure).print_png(file)


def _shorten(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def finite_points(rows: list[dict[str, float]], name: str) -> list[tuple[float, float]]:
    """The points (tokens, value) of the rows with a finite value of `name`."""
    return [(row["tokens"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]


def _running_mean(values: tuple[float, ...]) -> list[float]:
    """An exponential mean over about a twentieth of the points."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    means, mean = [], values[0]
    for value in values:
        mean = keep * mean + (1 - keep) * value
        means.append(mean)
    return means
