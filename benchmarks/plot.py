"""The pictures in docs/ that show results, drawn from the JSON files of the other benchmarks.

    python -m benchmarks plot [--results FOLDER] [--docs FOLDER]

Contestants side by side, and the machine's limit as a dashed line: the matrix products alone, the bytes over the
bandwidth of a copy, one read of the weights. Results that are missing have no panel, and are listed.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.common import RESULTS, existing_folder, format_machine, output_folder

DOCS = Path(__file__).parents[1] / "docs"
OURS, OTHERS = "tab:blue", "tab:gray"
VERSION_NAMES = {"rwkv4": "RWKV-4", "rwkv7": "RWKV-7"}


class UnreadableError(Exception):
    """A result cannot be drawn; the message says why."""


def draw_bars(
    axes: Axes, title: str, unit: str, rows: dict[str, dict[str, float]], factor: float, limit: dict[str, float]
) -> None:
    """rows: names to summaries; limit: names to one value each, drawn as dashed lines."""
    names = list(reversed(rows))
    heights = [factor * rows[name]["median"] for name in names]
    ends = [[factor * rows[name][end] for name in names] for end in ("low", "high")]
    errors = [[abs(end - height) for end, height in zip(each, heights, strict=True)] for each in ends]
    colors = [OURS if name.startswith(("rwkv_pl", "compiled")) else OTHERS for name in names]
    axes.barh(names, heights, xerr=errors, color=colors, height=0.7)
    for place, height in enumerate(heights):
        axes.text(height, place, f"  {height:,.{0 if height >= 100 else 2}f}", va="center", fontsize="small")
    if max(heights) > 20 * min(heights):
        axes.set_xscale("log")
        axes.set_xlim(min([*heights, *(factor * x for x in limit.values())]) / 2, 5 * max(heights))
    else:
        axes.set_xlim(0, 1.2 * max(heights))
    for (name, value), color in zip(limit.items(), ("tab:red", "tab:orange"), strict=False):
        axes.axvline(factor * value, color=color, linestyle="--", linewidth=1.2, label=name)
    axes.legend(fontsize="x-small", loc="lower right")
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(unit)


def draw_train_step(setting: str, axes: Axes, content: dict[str, Any]) -> None:
    about = content["settings"][setting]
    seconds, size = about["seconds"], about["setting"]
    # In older results the products come from another run than the bars, so they have no ratio.
    limit = {name: seconds[name]["median"] for name in about["times_ours"] if name.startswith("products")}
    if not limit:
        raise KeyError("products in times_ours")
    # By precision, the slowest first.
    names = sorted(seconds.keys() - limit, key=lambda name: ("bf16" in name, -seconds[name]["median"]))
    rows = {name: seconds[name] for name in names}
    title = f"a training step, {size['n_layer']} x {size['n_embd']}, {size['rows']} x {size['steps']:,} tokens"
    draw_bars(axes, title, "ms", rows, 1e3, {f"matrix {name}": value for name, value in limit.items()})


def draw_wkv(axes: Axes, content: dict[str, Any]) -> None:
    rows = {name: row["seconds"] for name, row in content["rows"].items()}
    floor = 8 * 4 * 1024 * 512 / content["copy_bytes_per_second"]
    draw_bars(axes, "WKV forward and backward, B1 T1,024 C512", "ms", rows, 1e3, {"bytes at a copy's speed": floor})


def draw_generate(axes: Axes, content: dict[str, Any]) -> None:
    rows = dict(content["tokens_per_second"])
    limit = {name: rows.pop(name)["median"] for name in list(rows) if name.startswith("reading")}
    draw_bars(axes, "generation, 12 x 512", "tokens per second", rows, 1, limit)


def draw_lines(field: str, factor: float, title: str, unit: str, axes: Axes, content: dict[str, Any]) -> None:
    for name in dict.fromkeys(row["contestant"] for row in content["by_length"]):
        own = [row for row in content["by_length"] if row["contestant"] == name]
        color, style = (OURS, "o--" if "," in name else "o-") if name.startswith("rwkv_pl") else (OTHERS, "o-")
        values = [factor * (row[field]["median"] - (row["gradients_mb"] if field == "peak_mb" else 0)) for row in own]
        axes.plot([row["steps"] for row in own], values, style, color=color, markersize=4, label=name)
        if name == "rwkv_pl":
            ends = [own[0]["steps"], own[-1]["steps"]]
            axes.plot(ends, [values[-1] * end / ends[1] for end in ends], ":", color="tab:red", label="linear")
    axes.set_title(title, fontsize="medium")
    axes.set(xlabel="context, tokens", ylabel=unit, xscale="log", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")


def draw_memory(axes: Axes, content: dict[str, Any]) -> None:
    draw_lines("peak_mb", 1, "memory of a step above weights and gradients, bf16-mixed", "MB", axes, content)


def draw_time(axes: Axes, content: dict[str, Any]) -> None:
    draw_lines("seconds", 1e3, "time of a step, 12 x 512, one row, bf16-mixed", "ms", axes, content)


# The name of the panel if it is left out, the benchmark whose result it shows, and its drawing function.
PANELS: list[tuple[str, str, Callable[[Axes, dict[str, Any]], None]]] = [
    ("train_step classic", "train_step", partial(draw_train_step, "classic")),
    ("train_step small", "train_step", partial(draw_train_step, "small")),
    ("wkv", "wkv", draw_wkv),
    ("generate", "generate", draw_generate),
    ("time by context", "memory", draw_time),
    ("memory by context", "memory", draw_memory),
]


def read_results(results: Path, name: str) -> dict[str, Any]:
    """Raises UnreadableError."""
    try:
        return json.loads((results / f"{name}.json").read_text())
    except FileNotFoundError:
        raise UnreadableError("not measured") from None
    except (OSError, ValueError):
        raise UnreadableError("not readable") from None


def draw_panel(panel: Callable[[Axes, dict[str, Any]], None], axes: Axes, content: dict[str, Any]) -> None:
    """Raises UnreadableError."""
    try:
        format_machine(content["machine"])
        panel(axes, content)
    except KeyError as error:  # of an older format, or without this setting
        raise UnreadableError(f"the result has no {error}") from None
    except (AttributeError, IndexError, TypeError, ValueError):
        raise UnreadableError("the result has another form") from None


def write_figure(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure).print_png(path)
    print(path)


def print_left_out(reasons: dict[str, str], names: Iterable[str]) -> None:
    """One line: the panels left out and why, and the benchmarks to run for them."""
    if reasons:
        panels = ", ".join(f"{panel} ({why})" for panel, why in reasons.items())
        commands = ", ".join(f"python -m benchmarks {name}" for name in dict.fromkeys(names))
        print(f"left out: {panels}; made by: {commands}")


def draw_all(results: Path = RESULTS, docs: Path = DOCS) -> None:
    panels, left_out, names = [], {}, []
    for title, name, panel in PANELS:
        try:
            content = read_results(results, name)
            draw_panel(panel, Figure().subplots(), content)  # a trial: the layout depends on the number of panels
            panels.append((panel, content))
        except UnreadableError as why:
            left_out[title] = str(why)
            names.append(name)
    print_left_out(left_out, names)
    if not panels:
        return
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(7 * columns, 0.5 + 3.5 * rows), dpi=100, layout="constrained")
    for place, (panel, content) in enumerate(panels, 1):
        draw_panel(panel, figure.add_subplot(rows, columns, place), content)
    figure.suptitle("\n".join(sorted({format_machine(content["machine"]) for _, content in panels})), fontsize="small")
    write_figure(figure, docs / "benchmarks.png")


def draw_race_panel(axes: Axes, content: dict[str, Any]) -> None:
    for (name, one), color in zip(content["contestants"].items(), (OURS, "tab:orange", "tab:green"), strict=False):
        x, y, steps = zip(*((p["seconds"], p["bits_per_byte"], p["steps"]) for p in one["curve"]), strict=True)
        axes.plot(x, y, "o-", color=color, markersize=3, label=f"{name}: {y[-1]:.2f} in {steps[-1]:,} steps")
    for (name, bits), color in zip(content["compressors"].items(), ("gray", "black"), strict=False):
        axes.axhline(bits, color=color, linestyle="--", linewidth=1, label=f"{name} {bits:.2f}")
    best = list(content["compressors"].values())
    best += [p["bits_per_byte"] for one in content["contestants"].values() for p in one["curve"]]
    axes.set_ylim(0.9 * min(best), 5)
    axes.set(xlabel="seconds of training", ylabel="bits per byte of held-out text", title=content["title"])
    axes.grid(alpha=0.3)
    axes.legend()


def draw_race(results: Path = RESULTS, docs: Path = DOCS) -> None:
    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    try:
        content = read_results(results, "race")
        draw_panel(draw_race_panel, figure.subplots(), content)
    except UnreadableError as why:
        print_left_out({"race": str(why)}, ["race"])
        return
    figure.suptitle(format_machine(content["machine"]), fontsize="x-small")
    write_figure(figure, docs / "race.png")


def draw_learning_curves(axes: Axes, comparison: dict[str, Any], by_time: bool) -> None:
    """Validation scores of both versions, every seed, against steps or against the time of RWKV-4's steps."""
    for (name, version), color in zip(comparison["versions"].items(), ("C1", "C0"), strict=True):
        factor = comparison["step_ratio"]["median"] if by_time and name == "rwkv7" else 1.0
        for place, curve in enumerate(version["curves"]):
            steps, scores = zip(*curve, strict=True)
            label = VERSION_NAMES[name] if not place else None
            axes.plot([factor * step for step in steps], scores, "o-", color=color, markersize=3, lw=1.2, label=label)
    axes.set(xlabel="time, in steps of RWKV-4" if by_time else "steps", ylabel="bits per byte")
    axes.set_title("at equal time" if by_time else "at equal steps")
    axes.legend()


def draw_differences(axes: Axes, comparisons: list[dict[str, Any]]) -> None:
    """The score of RWKV-7 minus that of RWKV-4, with the range over the pairs of seeds."""
    labels = []
    for place, each in enumerate(reversed(comparisons)):
        scores = [[curve[-1][1] for curve in each["versions"][name]["curves"]] for name in ("rwkv4", "rwkv7")]
        differences = [b - a for a in scores[0] for b in scores[1]]
        mean = sum(differences) / len(differences)
        axes.plot([min(differences), max(differences)], [place, place], "-", color="C4", lw=3, alpha=0.5)
        axes.plot(mean, place, "o", color="C0" if mean < 0 else "C1", markersize=6)
        step = each["versions"]["rwkv7"]["curves"][0][-1][0]
        size = f"{each['n_layer']} x {each['n_embd']}, {each['rows']} x {each['ctx_len']:,}"
        labels.append(f"{size}\nstep {step:,} of {each['steps']:,}")
    axes.axvline(0, color="C4", lw=1)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_title("RWKV-7 minus RWKV-4")
    axes.set_xlabel("bits per byte")


def draw_learning(results: Path = RESULTS, pictures: Path = DOCS / "pictures") -> None:
    """learning_light.png and learning_dark.png."""
    try:
        content = read_results(results, "learning")
        comparisons = content["comparisons"]
        # The curves are of the comparison with the most runs, or the longest of them.
        main = max(comparisons, key=lambda c: (sum(len(v["seeds"]) for v in c["versions"].values()), c["steps"]))
    except (KeyError, ValueError, UnreadableError) as why:
        print_left_out({"learning": str(why)}, ["learning"])
        return
    for theme in ("light", "dark"):
        with matplotlib.style.context(DOCS / f"{theme}.mplstyle"):
            figure = Figure(figsize=(10, 3.6))
            left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 0.9))
            draw_learning_curves(left, main, by_time=False)
            draw_learning_curves(middle, main, by_time=True)
            middle.sharey(left)
            draw_differences(right, comparisons)
            figure.savefig(pictures / f"learning_{theme}.png")
            print(pictures / f"learning_{theme}.png")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks plot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=existing_folder, default=RESULTS, help="the folder of the JSON files")
    parser.add_argument("--docs", type=output_folder, default=DOCS, help="the folder of the pictures")
    options = parser.parse_args()
    draw_all(options.results, options.docs)
    draw_race(options.results, options.docs)
    draw_learning(options.results, options.docs / "pictures" if options.docs == DOCS else options.docs)


if __name__ == "__main__":
    main()
