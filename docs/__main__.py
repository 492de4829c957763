"""Run the tour and the guides, and compare what they print with the pages: python -m docs [01 02 library ...]"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from docs.notebook import to_notebook
from docs.page import NEEDS_KERNEL, PICTURES, list_pages, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m docs", description=__doc__)
    parser.add_argument(
        "pages",
        nargs="*",
        metavar="PAGE",
        help="01, 02, ..., library, notebook; default: all",
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="put the output and the pictures into the pages",
    )
    parser.add_argument(
        "--times", action="store_true", help="print the seconds of each block"
    )
    parser.add_argument(
        "--notebook",
        metavar="FOLDER",
        type=Path,
        help="write the pages as notebooks, run nothing",
    )
    args = parser.parse_args()
    pages = list_pages(args.pages)
    for name in args.pages:
        if not list_pages([name]):
            known = ", ".join(page.stem.partition("_")[0] for page in list_pages())
            parser.error(f"no page starts with {name}; choose from {known}")
    if args.notebook:
        args.notebook.mkdir(parents=True, exist_ok=True)
        for page in pages:
            notebook = args.notebook / f"{page.stem}.ipynb"
            notebook.write_text(
                to_notebook(page.read_text(encoding="utf-8")), encoding="utf-8"
            )
            print(notebook)
        return 0
    # Before torch is imported: threads that wait for each other should not keep a busy core from other programs.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    from rwkv_pl.ops.backend import load_all

    failure = load_all("cpu")
    failed = 0
    for page in pages:
        if failure and NEEDS_KERNEL in page.read_text(encoding="utf-8"):
            print(f"{page.name} needs the compiled kernel: {failure}")
            continue
        since, cpu = time.perf_counter(), time.process_time()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            os.chdir(folder)
            report = run(page, PICTURES if args.write else None)
            os.chdir("/")
        if args.write:
            page.write_text(report.text, encoding="utf-8")
        print(
            f"{page.name}  {time.perf_counter() - since:.1f} s, {time.process_time() - cpu:.1f} s of CPU time",
            *(report.faults or ["  as shown"]),
            sep="\n",
        )
        if args.times:
            print(
                *(
                    f"  line {line:4d}  {seconds:6.2f} s"
                    for line, seconds in report.seconds
                ),
                sep="\n",
            )
        failed += len(report.faults) > (report.outdated if args.write else 0)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
