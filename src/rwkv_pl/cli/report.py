"""rwkv-report: compares the runs below folders."""

import argparse
from pathlib import Path

from rwkv_pl.cli.entry import cli_entry_point
from rwkv_pl.errors import UserError
from rwkv_pl.sweeps.report import find_runs, print_report


@cli_entry_point
def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="rwkv-report",
        description="Prints a table of the runs below the folders, and writes sweep.csv and sweep.png into the folder.",
        epilog="example: rwkv-report multirun/2026-01-31/12-00-00",
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a run, a sweep, or any folder above them")
    parser.add_argument(
        "--out", type=Path, help="the folder for sweep.csv and sweep.png (default: PATH, or . if there are several)"
    )
    arguments = parser.parse_args()
    paths: list[Path] = arguments.paths
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is not a folder: give a run, or a folder of runs")
    out = arguments.out or (paths[0] if len(paths) == 1 else Path.cwd())
    if not find_runs(paths):
        raise UserError(f"there is no run below {', '.join(map(str, paths))}: give a run, or a folder of runs")
    out.mkdir(parents=True, exist_ok=True)
    print_report(paths, out)


if __name__ == "__main__":
    main()
