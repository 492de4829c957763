"""RWKV-7 against RWKV-4 after the same tokens: the table and the picture, from the runs of sweeps.

    rwkv-train -m experiment=rwkv7_enwik8 seed=1,2,3
    rwkv-train -m experiment=rwkv7_enwik8 seed=1,2,3 model=rwkv4_tiny optim.lr=4e-3
    python -m benchmarks learning FOLDER... [--until 800] [--rounds 9]

A comparison is made of the finished runs of one size, context and number of steps; with --until, also of those that
were validated at that step, and later validations do not count. For each version, the settings of
the optimizer with the lowest mean score count, among those that were run with the most seeds. The score is that of the
last validation. The ratio of the versions' steps is measured here, in CPU time, in alternating turns in one process.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import (
    begin_benchmark,
    existing_folder,
    int_at_least,
    make_parser,
    print_table,
    save_results,
    summarize,
)
from benchmarks.plot import draw_learning
from benchmarks.train_step import Setting, make_our_step
from rwkv_pl.model import MODELS
from rwkv_pl.sweeps.report import find_runs, read_run

SCORE = "val/bits_per_byte"
# Settings that may differ between the versions of one comparison.
FREE = {
    "lr": "optim.lr",
    "betas": "optim.betas",
    "eps": "optim.eps",
    "weight_decay": "optim.weight_decay",
    "warmup_steps": "schedule.warmup_steps",
    "final_lr": "schedule.final_lr",
}
WARM_UP_STEPS = 2


def read_runs(folders: Sequence[Path], until: int | None = None) -> list[dict[str, Any]]:
    """The runs below the folders that finished or reached step `until`: size, settings and curve of the score."""
    found = []
    for run in map(read_run, find_runs(folders)):
        curve = [[int(row["step"]), row[SCORE]] for row in run.rows if SCORE in row]
        if until:
            curve = [point for point in curve if point[0] <= until]
        if not curve or (run.status != "finished" and curve[-1][0] != until):
            print(f"left out: {run.folder}: {run.status} {run.error}")
            continue
        settings = run.settings
        found.append(
            {
                "version": settings["model.name"],
                "n_layer": settings["model.n_layer"],
                "n_embd": settings["model.n_embd"],
                "rows": settings["data.batch_size"],
                "ctx_len": settings["data.ctx_len"],
                "steps": settings["trainer.max_steps"],
                "validated": settings["trainer.limit_val_batches"],
                "settings": {name: settings.get(key) for name, key in FREE.items()},
                "seed": settings["seed"],
                "curve": curve,
            }
        )
    return found


def compare(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The comparisons, each with the runs of each version's best settings, smallest model and fewest steps first."""
    groups: dict[tuple[Any, ...], dict[str, dict[str, list[dict[str, Any]]]]] = defaultdict(dict)
    names = ("n_layer", "n_embd", "rows", "ctx_len", "steps", "validated")
    for run in runs:
        by_settings = groups[tuple(run[name] for name in names)].setdefault(run["version"], defaultdict(list))
        by_settings[repr(run["settings"])].append(run)
    found = []
    for key, versions in sorted(groups.items()):
        best = {}
        for version, by_settings in sorted(versions.items()):
            n_seeds = max(map(len, by_settings.values()))
            repeated = [each for each in by_settings.values() if len(each) == n_seeds]
            chosen = min(repeated, key=lambda each: statistics.mean(run["curve"][-1][1] for run in each))
            scores = [run["curve"][-1][1] for run in chosen]
            best[version] = {
                "settings": chosen[0]["settings"],
                "seeds": [run["seed"] for run in chosen],
                "mean": statistics.mean(scores),
                "deviation": statistics.stdev(scores) if len(scores) > 1 else None,
                "curves": [run["curve"] for run in chosen],
            }
        if len(best) == len(MODELS):
            found.append(dict(zip(names, key, strict=True)) | {"versions": best})
    return found


def measure_step_ratio(setting: Setting, rounds: int) -> dict[str, float]:
    """A step of RWKV-7 divided by one of RWKV-4, in CPU time."""
    steps = {version: make_our_step(setting, "float32", full=True, version=version) for version in MODELS}
    ratios = []
    for turn in range(WARM_UP_STEPS + rounds):
        seconds = {}
        for version, step in steps.items():
            started = time.process_time()
            step()
            seconds[version] = time.process_time() - started
        if turn >= WARM_UP_STEPS:
            ratios.append(seconds["rwkv7"] / seconds["rwkv4"])
    return summarize(ratios)


def format_score(version: dict[str, Any]) -> str:
    spread = "" if version["deviation"] is None else f" ± {version['deviation']:.4f}"
    return f"{version['mean']:.4f}{spread} ({len(version['seeds'])})"


def main() -> None:
    parser = make_parser("learning", __doc__, rounds=9, threads=1)
    parser.add_argument("folders", nargs="*", type=existing_folder, help="sweeps or runs of rwkv-train")
    parser.add_argument("--until", type=int_at_least(1), help="the step at which the scores are compared (the last)")
    parser.add_argument("--docs", type=existing_folder, help="the folder of the pictures (that of the results)")
    options = parser.parse_args()
    if not options.folders:
        parser.error("name the folders of the runs; the first lines of benchmarks/learning.py have the command")
    title = "bits per byte after the same tokens, RWKV-4 and RWKV-7"
    begin_benchmark(title, options.threads)
    runs = read_runs(options.folders, options.until)
    comparisons = compare(runs)
    if not comparisons:
        parser.error("no finished runs of both versions have the same size, context and number of steps")
    ratios: dict[Setting, dict[str, float]] = {}
    rows = []
    for each in comparisons:
        setting = Setting(each["n_layer"], each["n_embd"], each["rows"], each["ctx_len"])
        if setting not in ratios:
            ratios[setting] = measure_step_ratio(setting, options.rounds)
        each["step_ratio"] = ratios[setting]
        versions = each["versions"]
        seen = versions["rwkv7"]["curves"][0][-1][0]
        difference = versions["rwkv7"]["mean"] - versions["rwkv4"]["mean"]
        rows.append(
            [f"{setting}, step {seen:,} of {each['steps']:,}", *(format_score(versions[name]) for name in MODELS),
             f"{difference:+.4f}", f"{each['step_ratio']['median']:.2f}"]
        )  # fmt: skip
    print_table(["mean ± deviation (seeds)", *MODELS, "difference", "time of a step"], rows)
    save_results(options.results, "learning", title, rounds=options.rounds, comparisons=comparisons, runs=runs)
    draw_learning(options.results, options.docs or options.results)


if __name__ == "__main__":
    main()
